r"""Is there enough data? The learning curve of a probe on a config's data and untuned model.

    python scripts/curve.py --config=configs/NAME.py --workdir=runs/curve [--config.key=value …]

Features are computed once and kept in the folder; then logistic regressions (--probe=closed for
numbers, or to save minutes) are solved on subsets of the training rows, each half the next, and
error(n) = a n^-b + c is fitted. Nothing is predicted beyond four times the rows. The table also
tells what the fit would have predicted without its last sizes. Leaves curve.html and curve.json.
"""

import itertools
import json
import pathlib

from absl import flags

from ft import cli

flags.DEFINE_string("config", "", "config file, as configs/NAME.py or configs/NAME.py:key=value,…")
flags.DEFINE_string("workdir", "", "folder of the features and the results, made if absent")
flags.DEFINE_enum("probe", "logistic", ["logistic", "closed"], "what is solved on the features")
flags.DEFINE_integer("sizes", 7, "subsets of the training rows", lower_bound=4)
flags.DEFINE_integer("draws", 3, "draws of each subset", lower_bound=3)
flags.DEFINE_integer("resamples", 1000, "bootstrap resamples of the band", lower_bound=100)
flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0)


def main(_):
  import jax

  from ft import card, compilation, errors, learning_curve, logs, mesh, run, tune, workdir
  from ft.guards import amount

  f = flags.FLAGS
  if not f.workdir:
    raise errors.UserError("--workdir=DIR is missing: the folder that will hold the curve")
  config = cli.config()
  compilation.cache()
  mesh.start(config.mesh)
  with workdir.Workdir(f.workdir, config) as home:
    started, examples = run.prepare(config, home.path, lambda: None)
    if not started.task.head_features:
      raise errors.UserError(f"task.name={config.task.name} has no features of a row that a probe "
                             "could read; the curve is for classes and numbers")
    untuned = tune.build({}, dict(started.pretrained.variables), started.pretrained.head)
    frozen = mesh.place(untuned.frozen, mesh.shardings(started.mesh, untuned.frozen))
    features = run.extract_features(started, examples, frozen, {}, untuned)
  parts = amount.prepared(features, max(len(part["index"]) for part in features.values()))
  if isinstance(parts, str):
    raise errors.UserError(f"no curve can be measured: {parts}")
  train, _, judged = parts
  try:
    named, solve = learning_curve.probe(f.probe, train.target)
  except ValueError as error:
    raise errors.UserError(f"--probe={f.probe}: {error}; use --probe=closed") from None
  smallest = max(learning_curve.SMALLEST, amount.classes(train.target))
  ns = learning_curve.sizes(len(train.target), smallest, f.sizes)
  if len(ns) < learning_curve.FEWEST_SIZES:
    raise errors.UserError(f"train has {len(train.target):,} rows, too few for "
                           f"{learning_curve.FEWEST_SIZES} subsets of at least {smallest}")
  bar, done = logs.Progress("probes", f.draws * (len(ns) - 1) + 1), itertools.count(1)
  show = lambda n, k, error: bar.show(  # noqa: E731
      next(done), f"{n:,} rows, draw {k + 1}: error {error:.4f}")
  curve = learning_curve.measure(*learning_curve.narrowed(parts), ns, f.draws,
                                 solve, f.seed, show)
  numbers = {"rows": len(train.target), "used": len(train.target), "probe": named,
             "unit": amount.unit(train.target),
             "judged": {"split": "test", "n": len(judged.target)},
             **amount.account(curve, len(train.target), f.resamples),
             "effective": amount.effective(train.features, 0.95),
             "backtest": backtest(curve), "device": jax.devices()[0].device_kind}
  print(table(numbers))
  folder = pathlib.Path(f.workdir)
  card.write_text(folder / "curve.json", json.dumps(numbers, indent=1) + "\n")
  print(card.write_text(folder / "curve.html", page(config, numbers)))


def backtest(curve) -> list[dict]:
  """What fits of fewer sizes predict for the sizes left out, up to four times their largest.

  Returns:
    [{"fitted": largest size of the fit, "n", "predicted", "measured"}].
  """
  from ft import learning_curve

  found = []
  for count in range(learning_curve.FEWEST_SIZES, len(curve.n)):
    made = learning_curve.fit(curve.n[:count], curve.errors[:count])
    found += [{"fitted": int(curve.n[count - 1]), "n": int(n), "predicted": float(made(n)),
               "measured": float(curve.errors[count + i].mean())}
              for i, n in enumerate(curve.n[count:])
              if n <= learning_curve.FURTHEST * curve.n[count - 1]]
  return found


def table(numbers) -> str:
  """The numbers as lines of text."""
  lines = [f"{'rows':>9}  error ({numbers['unit']}), 95 % interval"]
  for row in numbers["points"]:
    lines.append(f"{row['n']:>9,}  {row['error']:.4f} [{row['lo']:.4f}, {row['hi']:.4f}]")
  for row in numbers["predicted"]:
    lines.append(f"{row['n']:>9,}  {row['error']:.4f} [{row['lo']:.4f}, {row['hi']:.4f}] "
                 f"predicted, {row['times']} times the rows")
  made = numbers["fit"]
  lines.append(f"error(n) = {made['a']:.4g} n^-{made['b']:.4g} + {made['c']:.4g}; the next 100 "
               f"labels: -{numbers['per_100']['gain']:.5f}")
  lines += [f"fitted up to {row['fitted']:,} rows: {row['predicted']:.4f} predicted at "
            f"{row['n']:,}, {row['measured']:.4f} measured" for row in numbers["backtest"]]
  return "\n".join(lines)


def page(config, numbers) -> str:
  """curve.html: the card's section on the amount of data by itself."""
  from ft.card import elements as el
  from ft.card.evidence import amount as evidence
  from ft.card.markup import h, join, name

  title = config.title or f"{config.model.source}: {config.task.name}"
  tested = [[f"{row['fitted']:,}", (f"{row['n']:,}", "n"), (f"{row['predicted']:.4f}", "n"),
             (f"{row['measured']:.4f}", "n")] for row in numbers["backtest"]]
  tested = el.table("What the fit would have predicted", ["fitted up to", ("rows", "n"),
                    ("predicted", "n"), ("measured", "n")], tested) if tested else None
  head = h("header", h("p", "Learning curve", cls="eyebrow"), h("h1", name(title)))
  body = h("main", h("section", h("h2", evidence.TITLE), evidence.section(numbers, {}), tested))
  return el.document(title, join([head, body]))


if __name__ == "__main__":
  cli.run(main, __doc__, with_config=True)
