"""A finished run on data it has not seen: metrics with intervals."""

import json

import numpy as np

from ft import config as config_lib
from ft import errors, evaluate, predict, stats
from ft.data import loader as loaders
from ft.data import sources


def judge(run, source: str, batch: int = 32) -> dict:
  """Returns {"n", "metrics", "interval", "dropped"} of a run's model on every row of a source.

  Args:
    run: pathlib.Path of the run's folder.
    source: data spec, read with the columns, format and encoding of the run's config.
    batch: rows computed together.
  """
  values = json.loads((run / "config.json").read_text())
  values["data"] |= {
    "train": source, "validation": "", "test": "", "extra": None,
    "validation_fraction": 0.0, "test_fraction": 0.0,
  }
  config = config_lib.from_json(values)
  rows = sources.load(config.data).splits["train"]
  predictor = predict.Predictor(run, batch)
  if rows.labels is None:
    raise errors.UserError(f"{source}: has no labels to compare with; scripts/predict.py needs none")
  examples = loaders.prepare(rows, predictor.task.example, preprocess=predictor.preprocess,
                             drop_policy=config.data.drop)
  loader = loaders.Loader(examples, batch, pad=predictor.preprocess.pad,
                          buckets=predictor.preprocess.buckets)
  outputs = evaluate.run(predictor.step, predictor.state, predictor.variables, loader, dict)
  score = predictor.task.score(outputs)
  low, high = stats.bootstrap(score)
  return {
    "source": source,
    "n": len(score),
    "metrics": {k: None if not np.isfinite(v) else v for k, v in predictor.task.metrics(outputs).items()},
    "interval": {predictor.task.metric[0]: [low, high]},
    "counts": examples.report,
  }
