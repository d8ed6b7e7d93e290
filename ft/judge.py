"""A finished run on data it has not seen: metrics with intervals."""

import json

import numpy as np

from ft import config as config_lib
from ft import errors, evaluate, generation, guards, predict
from ft.data import loader as loaders
from ft.data import sources
from ft.guards import overfit


def judge(run, source: str, batch: int = 32) -> dict:
  """Returns {"source", "n", "metrics", "interval", "counts"} of a run on every row of a source.

  Args:
    run: pathlib.Path of the run's folder.
    source: data spec, read with the columns, format and encoding of the run's config.
    batch: rows computed together.
  """
  predictor = predict.Predictor(run, batch)
  rows = loader(run, source, predictor)
  outputs = evaluate.run(predictor.step, predictor.state, predictor.variables, rows, dict)
  task = predictor.task
  if generation.writes(task):
    # Every row gets its text, and not a choice of them: that is what was asked for.
    index = rows.examples.indices
    prompts = loaders.Loader(generation.prompts(task, rows.examples.rows, index), batch,
                             pad=predictor.preprocess.pad, buckets=generation.buckets(task))
    made = evaluate.run(predictor.write, predictor.state, predictor.variables, prompts, dict)
    outputs = generation.join(task, rows.examples.rows, outputs, made, index)
  metric, mode = getattr(task, "judged", task.metric)
  evidence = guards.Evidence(
    metric=metric, mode=mode, outputs={"data": {guards.TUNED: outputs}},
    score=task.score, metrics=task.metrics, value=task.value, count=getattr(task, "count", None),
    blocks=getattr(task, "blocks", None),
  )
  result = overfit.results(evidence)["data"][guards.TUNED]
  said = task.describe_task()
  return {
    "source": source,
    **({"protocol": said["protocol"]} if "protocol" in said else {}),
    "n": result["n"],
    "metrics": {k: v if np.isfinite(v) else None for k, v in result["metrics"].items()},
    "interval": result["interval"],
    "counts": rows.examples.report,
  }


def loader(run, source: str, predictor) -> loaders.Loader:
  """Returns batches of every row of a source, as the predictor's task reads them.

  Args:
    run: pathlib.Path of a run's folder, whose config says how sources are read.
    source: data spec.
    predictor: predict.Predictor.
  """
  values = json.loads((run / "config.json").read_text())
  values["data"] |= {
    "train": source, "validation": "", "test": "", "extra": None,
    "validation_fraction": 0.0, "test_fraction": 0.0,
  }
  config = config_lib.from_json(values)
  rows = getattr(predictor.preprocess, "load", sources.load)(config.data).splits["train"]
  for role in predictor.task.needs:
    if role not in rows.roles and not (role == "label" and rows.binarize):
      raise errors.UserError(f"{source}: has no {role}s; scripts/predict.py needs none")
  examples = loaders.prepare(rows, predictor.task.example, preprocess=predictor.preprocess,
                             drop_policy=config.data.drop)
  return loaders.Loader(examples, predictor.batch, pad=predictor.preprocess.pad,
                        buckets=predictor.preprocess.buckets)
