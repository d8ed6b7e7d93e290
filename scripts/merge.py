"""Makes one model of several tuned from the same base, without training.

    python scripts/merge.py --method=uniform --models=RUN,RUN,… --output=DIR

uniform: mean of the weights (--weights). greedy: from the best on --data on, each model is kept if
the mean with it is not worse. arithmetic, ties, dare: what each learnt beyond --base, added up
(--scale; --density of ties, --drop of dare). slerp: of two, on the circle between them (--t). The
output is a Hugging Face folder with the first model's preprocessing and calibration, for
scripts/predict.py; what was merged is printed as JSON.
"""

import dataclasses
import json
import pathlib

from absl import flags

from ft import cli

METHODS = ["uniform", "greedy", "arithmetic", "ties", "dare", "slerp"]
flags.DEFINE_enum("method", "uniform", METHODS, "how to merge")
flags.DEFINE_list("models", [], "folders of finished runs, or of exported models")
flags.DEFINE_string("base", "", "arithmetic, ties, dare: the pretrained model, as model.source")
flags.DEFINE_list("weights", [], "uniform: weight of each model; they need not sum to one")
flags.DEFINE_float("scale", None, "arithmetic, ties, dare: factor of what is added to the base")
flags.DEFINE_float("density", 0.2, "ties: share of each task vector that is kept")
flags.DEFINE_float("drop", 0.9, "dare: share of each task vector that is dropped")
flags.DEFINE_float("t", 0.5, "slerp: 0 is the first model, 1 the second")
flags.DEFINE_integer("seed", 0, "dare: of what is dropped")
flags.DEFINE_string("data", "", "greedy: validation rows; the first of --models has to be a run")
flags.DEFINE_integer("batch", 32, "greedy: rows computed together", lower_bound=1)
flags.DEFINE_string("output", "", "folder to write; must not exist or be empty")


def main(_):
  from ft import compilation, errors, merging, models, predict
  from ft.weights import names

  f = flags.FLAGS
  compilation.cache()
  output = pathlib.Path(f.output)
  if not f.output or output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise errors.UserError(f"--output={f.output}: name a folder that is new or empty")
  if f.method == "slerp" and len(f.models) != 2:
    raise errors.UserError(f"--method=slerp merges two models, {len(f.models)} given")
  folders = [predict.exported(pathlib.Path(folder)) for folder in f.models]
  loaded = [models.load(str(folder)) for folder in folders]
  leaves = [names.flatten(one.variables) for one in loaded]
  merging.check(leaves, f.models, least=2 if f.method in ("uniform", "greedy", "slerp") else 1)
  for one, folder in zip(loaded, f.models, strict=True):
    if one.config.labels != loaded[0].config.labels:
      raise errors.UserError(f"{folder} and {f.models[0]} have different labels; merge models of "
                             "one task")
  found = {}
  if f.method in ("arithmetic", "ties", "dare"):
    merged = _on_base(leaves, loaded[0])
  elif f.method == "greedy":
    merged, found = _greedy(leaves)
  elif f.method == "slerp":
    merged = merging.slerp(*leaves, t=f.t)
  else:
    merged = merging.mean(leaves, _numbers(f.weights))
  files = {**loaded[0].files, "ft.json": (folders[0] / "ft.json").read_bytes()}
  models.export(dataclasses.replace(loaded[0], variables=names.unflatten(merged), files=files),
                output)
  print(json.dumps({"output": str(output), "method": f.method, "models": f.models, **found}))


def _numbers(words):
  from ft import errors

  try:
    return [float(word) for word in words] or None
  except ValueError:
    raise errors.UserError(f"--weights={','.join(words)}: expected numbers") from None


def _on_base(leaves, like):
  """Merges what was learnt beyond the base; its parameters that were initialised are left out."""
  from ft import errors, merging, models
  from ft.weights import names

  f = flags.FLAGS
  if not f.base:
    raise errors.UserError(f"--method={f.method} needs --base, the model these were tuned from")
  labels = {"num_labels": like.config.num_labels, "labels": like.config.labels or None}
  base = models.load(f.base, family=like.family, head=like.config.head,
                     **(labels if like.config.num_labels else {}))
  known = {path: leaf for path, leaf in names.flatten(base.variables).items()
           if path not in base.report.initialised}
  if f.method == "arithmetic":
    return merging.arithmetic(known, leaves, f.scale)
  if f.method == "dare":
    return merging.dare(known, leaves, f.drop, f.scale, f.seed)
  return merging.ties(known, leaves, f.density, 1.0 if f.scale is None else f.scale)


def _greedy(leaves):
  """The greedy soup on the rows of --data, and what it was chosen by."""
  from ft import errors, evaluate, judge, merging, predict
  from ft.weights import names

  f = flags.FLAGS
  if not f.data:
    raise errors.UserError("--method=greedy needs --data, rows to choose on (no test rows)")
  run = cli.run_folder(f.models[0])
  predictor = predict.Predictor(run, f.batch)
  rows = judge.loader(run, f.data, predictor)
  (metric, direction), values = predictor.task.metric, []

  def value(weights):
    outputs = evaluate.run(predictor.step, predictor.state, names.unflatten(weights), rows, dict)
    values.append(float(predictor.task.value(outputs)))
    return values[-1] if direction == "max" else -values[-1]

  merged, chosen = merging.greedy(leaves, value)
  return merged, {"metric": metric, "values": dict(zip(f.models, values, strict=False)),
                  "in_soup": [f.models[i] for i in chosen]}


if __name__ == "__main__":
  cli.run(main, __doc__)
