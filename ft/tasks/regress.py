"""Regression: one number an example, of a text or an image.

The model learns the target less its mean over its standard deviation, both of the training rows;
everything a user sees is in the target's own unit. Shapes: B batch, N rows of a split, D features.
"""

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from ft import errors

KEYS = {
  "loss": ("mse", "of the standardised target; huber: squared up to 1, straight beyond",
           ["mse", "mae", "huber"]),
  "metric": ("mae", "what the best checkpoint is chosen by", ["mae", "rmse", "r2", "spearman"]),
}

# What a batch holds beside the model's inputs.
BOOKKEEPING = ("target", "weight", "index", "stop")
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the probe's ridge penalty, over the rows' number


class Task:
  """Loss, predictions, metrics and baselines of regression; pure functions, no loop.

  Everywhere `apply(variables, inputs, rng)` returns the model's outputs, a dict with "logits"
  (B, 1) and "features"; rng None is evaluation. A batch with "features" goes to the head.

  Attributes:
    metric: (name, "min" or "max").
    model_args: what the model has to be loaded with.
    needs: roles that a row has to have beside the model's inputs.
    head_features: `features` are what the head reads, so that a head alone can be trained on them.
    score: outputs -> (N,) absolute errors where the metric is their mean, else None.
  """

  needs = ("target",)
  head_features = True

  def __init__(self, config, data, preprocess):
    """Settles mean and standard deviation of the target from the training rows.

    Args:
      config: the section `task`.
      data: a `sources.Data` whose rows have a target.
      preprocess: the modality's, row -> example; `finish(batch)` runs on the device.

    Raises:
      UserError: no target, one that is no number, or the same one in every training row.
    """
    if "target" not in data.columns:
      raise errors.UserError("task.name=regress needs a number a row; name its column in "
                             "data.columns.target")
    values = {name: [number(row["target"], rows.where(i)) for i, row in enumerate(rows)]
              for name, rows in data.splits.items()}
    train = np.array([value for value in values["train"] if value is not None])
    if not len(train) or train.std() <= 1e-12 * np.abs(train).max():
      raise errors.UserError(f"train: every target is {train[0] if len(train) else 'missing'}; "
                             "there is nothing to learn")
    self._loss = config.loss
    self._settle(config.metric, float(train.mean()), float(train.std()), data.columns["target"],
                 preprocess)

  def _settle(self, metric, mean, deviation, name, preprocess):
    self.metric = (metric, "min" if metric in ("mae", "rmse") else "max")
    self.score = self._errors if metric == "mae" else None
    self.model_args = {"head": "classify", "num_labels": 1, "labels": [str(name)]}
    self._mean, self._deviation, self._name = mean, deviation, str(name)
    self.preprocess = preprocess

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"metric": self.metric[0], "mean": self._mean, "deviation": self._deviation,
            "target": self._name}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can predict and describe (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(spec["metric"], spec["mean"], spec["deviation"], spec["target"], preprocess)
    return task

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    return {"mode": self.metric[1]}

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns preprocess(row) with "target": () float32, standardised; RowError where it is empty.

    Raises:
      UserError: the target is no number.
    """
    value = number(row["target"], "a row")
    if value is None:
      raise errors.RowError("no target")
    target = np.float32((value - self._mean) / self._deviation)
    return {**self.preprocess(row), "target": np.asarray(target)}

  def unlabelled(self, row: dict) -> dict:
    """Returns preprocess(row): an example for what takes no loss of its target."""
    return self.preprocess(row)

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over the batch: (total, weight, {"mae": …}); weight 0 masks a row.

    All are of the standardised target but the mae, which has the target's unit.
    """
    away = apply(variables, self._inputs(batch), rng)["logits"][:, 0].astype(jnp.float32)
    away = jnp.abs(away - batch["target"])
    each = {"mse": jnp.square(away), "mae": away,
            "huber": jnp.where(away < 1, 0.5 * jnp.square(away), away - 0.5)}[self._loss]
    weight = batch["weight"]
    return (jnp.sum(each * weight), jnp.sum(weight),
            {"mae": self._deviation * jnp.sum(away * weight)})

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"prediction": (B,) float32, standardised} and, where the batch has it, "target"."""
    made = apply(variables, self._inputs(batch), None)["logits"][:, 0].astype(jnp.float32)
    return {"prediction": made, **_target(batch)}

  def features(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"features": (B, D) float32}, what the head reads, and "target" where it is there."""
    outputs = apply(variables, self._inputs(batch), None)
    return {"features": outputs["features"].astype(jnp.float32), **_target(batch)}

  def _inputs(self, batch: dict) -> dict:
    if "features" in batch:
      return {"features": batch["features"]}
    return self.preprocess.finish({k: v for k, v in batch.items() if k not in BOOKKEEPING})

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns mae and rmse in the target's unit, r2, and Spearman's rank correlation of a split.

    r2 and spearman are NaN where the targets (spearman: or the predictions) are all equal.

    Args:
      outputs: "prediction" and "target", (N,), standardised.
    """
    return {name: measure(self, outputs) for name, measure in _METRICS.items()}

  def value(self, outputs: dict) -> float:
    """Returns the selection metric of a split."""
    return _METRICS[self.metric[0]](self, outputs)

  def _errors(self, outputs: dict) -> np.ndarray:
    made, target = (np.asarray(outputs[key], np.float64) for key in ("prediction", "target"))
    return self._deviation * np.abs(made - target)

  def _rmse(self, outputs: dict) -> float:
    return float(np.sqrt(np.mean(np.square(self._errors(outputs)))))

  def _r2(self, outputs: dict) -> float:
    spread = self._deviation * np.std(np.asarray(outputs["target"], np.float64))
    return 1 - (self._rmse(outputs) / spread)**2 if spread > 0 else float("nan")

  def calibrate(self, outputs: dict) -> dict:
    """Returns {}: nothing is fitted."""
    del outputs
    return {}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one row as JSON types: {"prediction": in the target's unit}."""
    del calibration
    return {"prediction": self._mean + self._deviation * float(outputs["prediction"])}

  def evidence(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the card's further fields about the tuned outputs: none."""
    del outputs, calibration
    return {}

  def baselines(self, features: dict) -> dict:
    """Returns what no fine-tuning gets.

    Args:
      features: split -> {"features": (N, D), "target"}, with at least "train".

    Returns:
      "mean" (of train) and "probe" (ridge regression on the features, its strength chosen on
      validation) -> split -> {"prediction": (N,), "target"}.
    """
    found = {"mean": lambda x: np.zeros(len(x), np.float32), "probe": self._probe(features)}
    return {name: {split: {"prediction": predict(part["features"]), "target": part["target"]}
                   for split, part in features.items()}
            for name, predict in found.items()}

  def _probe(self, features: dict) -> Callable:
    """Returns features (N, D) -> (N,) of the ridge regression that is best on validation."""
    import threadpoolctl
    from sklearn import linear_model, pipeline, preprocessing

    train, validation = features["train"], features.get("validation")
    best, best_value, sign = None, None, 1 if self.metric[1] == "max" else -1
    with threadpoolctl.threadpool_limits(1):  # as in ft/probes.py
      for strength in STRENGTHS:
        model = pipeline.make_pipeline(
          preprocessing.StandardScaler(),
          linear_model.Ridge(alpha=strength * len(train["target"])))
        model.fit(np.asarray(train["features"], np.float64), train["target"])
        if validation is None:
          return model.predict
        value = self.value({"prediction": model.predict(validation["features"]),
                            "target": validation["target"]})
        value = sign * value if np.isfinite(value) else -np.inf
        if best is None or value > best_value:
          best, best_value = model.predict, value
    return lambda x: best(x).astype(np.float32)


def spearman(first, second) -> float:
  """Returns Spearman's rank correlation of (N,) and (N,); NaN where either is constant."""
  from scipy import stats

  first, second = (stats.rankdata(values) for values in (first, second))
  if len(first) < 2 or first.std() == 0 or second.std() == 0:
    return float("nan")
  return float(np.corrcoef(first, second)[0, 1])


_METRICS = {
  "mae": lambda task, outputs: float(np.mean(task._errors(outputs))),
  "rmse": Task._rmse,
  "r2": Task._r2,
  "spearman": lambda task, outputs: spearman(outputs["prediction"], outputs["target"]),
}


def number(value, where: str) -> float | None:
  """Returns a target as a number, None for an empty one; UserError for anything else."""
  text = str(value).strip()
  if text.lower() in ("", "none", "nan"):
    return None
  try:
    number = float(text)
  except ValueError:
    number = math.inf
  if not math.isfinite(number):
    raise errors.UserError(f"{where}: the target {text[:40]!r} is no finite number; "
                           "data.columns.target should name a column of numbers")
  return number


def _target(batch: dict) -> dict:
  return {"target": batch["target"]} if "target" in batch else {}
