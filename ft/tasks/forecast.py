"""Forecasting: the next steps of series, as points or as quantiles.

Everything is learnt and judged on the standardised scale and answered in the series' own units.
Channels of a window are forecast side by side; what they may learn of each other is the model's, or
by `task.neighbours`. Windows overlap: intervals resample blocks of time, not windows.

Shapes: B batch, N windows of a split, T steps of context, H of the forecast, C channels, Q levels.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from ft import errors, forecasts

KEYS = {
  "loss": ("auto", "of standardised values; auto: quantile for a model of quantiles, else mse; "
           "huber: squared up to 1, straight beyond", ["auto", "mse", "mae", "huber", "quantile"]),
  "metric": ("mse", "what the best checkpoint is chosen by, on the standardised scale",
             ["mse", "mae", "mase", "crps"]),
  "steps": ((), "steps of the forecast, from 1, that are scored on their own too", "list"),
  "neighbours": (0.0, "share that neighbours have in the past of a channel; see data.adjacency",
                 (0.0, 1.0)),
  "lookback": (336, "most steps of the past that the ridge baseline reads", (1, None)),
}

INTERVAL = (0.1, 0.9)  # levels of the intervals that a point forecast gets from validation
_PASSED = ("mean", "std", "seasonal_error", "block")


class Task:
  """Loss, predictions, metrics and baselines of forecasting; pure functions, no loop.

  Everywhere `apply(variables, inputs, rng)` returns the model's outputs: "prediction_outputs"
  (B, H, C) of past_values and past_observed_mask (B, T, C), or "quantile_preds" (B, Q, H) of
  context (B, T). rng None is evaluation. Inputs are made of the past alone.

  Attributes:
    metric: (name, "min").
    model_args: what the model has to be loaded with.
    needs: roles that a row has to have beside the model's inputs: none.
    head_features: False: `features` are forecasts, and are not made of train.
    levels: (Q,) of a model of quantiles, else ().
  """

  model_args = {"head": "forecast"}
  needs = ()
  head_features = False

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data` of windows.
      preprocess: `ft.data.series.Preprocess`, after `load`.

    Raises:
      UserError: rows are no windows of series, or a key does not fit the model or the data.
    """
    if not hasattr(preprocess, "horizon"):
      raise errors.UserError("task.name=forecast reads series; set data.modality=series")
    self._settle(config.metric, config.steps, config.neighbours, preprocess)
    quantiles = bool(self.levels)
    if config.loss == "quantile" and not quantiles or config.metric == "crps" and not quantiles:
      raise errors.UserError("task.loss=quantile and task.metric=crps need a model of quantiles, "
                             "such as Chronos-Bolt; this one forecasts points: take mse or mae")
    if config.neighbours and preprocess.adjacency is None:
      raise errors.UserError("task.neighbours mixes the past of neighbours in, and data.adjacency "
                             "does not name any")
    for step in config.steps:
      if not isinstance(step, int) or not 1 <= step <= preprocess.horizon:
        raise errors.UserError(f"task.steps={list(config.steps)}: expected whole numbers from 1 to "
                               f"the {preprocess.horizon} steps that are forecast")
    self._loss = config.loss
    if config.loss == "auto":
      self._loss = "quantile" if quantiles else "mse"
    self._lookback, self._splits = min(config.lookback, preprocess.context), data.splits

  def _settle(self, metric, steps, neighbours, preprocess):
    self.metric, self._steps, self._neighbours = (metric, "min"), tuple(steps), float(neighbours)
    self.preprocess, self.levels = preprocess, preprocess.reads.levels

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"metric": self.metric[0], "steps": list(self._steps), "neighbours": self._neighbours}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can predict and describe (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(spec["metric"], spec["steps"], spec["neighbours"], preprocess)
    return task

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    size = self.preprocess.block
    return {"mode": self.metric[1],
            "resampled": f"blocks of windows whose forecasts start within {size} steps"}

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns preprocess(row) with "future_values" and "future_observed" (H, C)."""
    return {**self.preprocess(row), **self.preprocess.future(row)}

  def unlabelled(self, row: dict) -> dict:
    """Returns preprocess(row): an example for what takes no loss of its future."""
    return self.preprocess(row)

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over windows: (total, weight, {"mae": …}); weight 0 masks a window.

    A window's loss is the mean over its observed targets; that of quantiles is twice the pinball
    loss, the mean over levels.
    """
    made = self._forecast(apply, variables, batch, rng)
    target = batch["future_values"][:, None]
    away = jnp.abs(self._median(made)[:, None] - target)
    each = {
      "mse": lambda: jnp.square(away), "mae": lambda: away,
      "huber": lambda: jnp.where(away < 1, 0.5 * jnp.square(away), away - 0.5),
      "quantile": lambda: self._pinball(made, target),
    }[self._loss]()
    weight = batch["weight"]
    return (jnp.sum(_mean(each[:, 0], batch) * weight), jnp.sum(weight),
            {"mae": jnp.sum(_mean(away[:, 0], batch) * weight)})

  def divergence(self, apply: Callable, variables, base_variables, batch: dict,
                 temperature: float = 1.0) -> tuple:
    """Returns (total, weight), sums over windows: half the squared distance to the base's forecast.

    That is the KL divergence of normal distributions of variance 1 around them, which temperature
    does not change. Both sides pass gradients on.
    """
    del temperature
    ours, base = (self._forecast(apply, v, batch, None) for v in (variables, base_variables))
    each = 0.5 * jnp.mean(jnp.square(ours - base), (1, 2, 3))
    return jnp.sum(each * batch["weight"]), jnp.sum(batch["weight"])

  def _pinball(self, made, target):
    levels = jnp.asarray(self.levels, jnp.float32)[:, None, None]
    return jnp.mean(2 * jnp.abs((target - made) * ((target <= made) - levels)), 1, keepdims=True)

  def _median(self, made):
    """Returns (B, H, C) of forecasts (B, Q, H, C): the level nearest to one half."""
    if not self.levels:
      return made[:, 0]
    return made[:, int(np.argmin(np.abs(np.array(self.levels) - 0.5)))]

  def _forecast(self, apply, variables, batch, rng):
    """Returns forecasts (B, Q or 1, H, C) float32, made of the past and of nothing else."""
    past, seen = self._mixed(batch["past_values"]), batch["past_observed_mask"]
    horizon = self.preprocess.horizon
    if self.levels:
      rows, length, channels = past.shape
      context = jnp.where(seen > 0, past, jnp.nan).swapaxes(1, 2).reshape(-1, length)
      made = apply(variables, {"context": context}, rng)["quantile_preds"][..., :horizon]
      made = jnp.moveaxis(made.reshape(rows, channels, len(self.levels), horizon), 1, 3)
      return made.astype(jnp.float32)
    short = ((0, 0), (self.preprocess.reads.context - past.shape[1], 0), (0, 0))
    inputs = {"past_values": jnp.pad(past, short), "past_observed_mask": jnp.pad(seen, short)}
    if "freq_token" in batch:
      inputs["freq_token"] = batch["freq_token"]
    made = apply(variables, inputs, rng)["prediction_outputs"][:, None, :horizon]
    return made.astype(jnp.float32)

  def _mixed(self, past):
    """Returns the past (B, T, C) with that of neighbours mixed in; its last values stay."""
    if not self._neighbours:
      return past
    adjacency = jnp.asarray(self.preprocess.adjacency, past.dtype)
    share = self._neighbours * (adjacency.sum(1) > 0)
    own = past - past[:, -1:]
    return past + share * (jnp.einsum("btc,dc->btd", own, adjacency) - own)

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns the forecasts of windows, standardised, and what they are judged with.

    "forecast" (B, H, C), of quantiles the median; "quantiles" (B, Q, H, C) where the model has
    them; where the batch has the future "target" and "observed" (B, H, C); mean, std and
    seasonal_error (B, C), block (B,).
    """
    made = self._forecast(apply, variables, batch, None)
    explained = batch.get("explained", 0.0)
    found = {"forecast": self._median(made) + explained}
    if self.levels:
      # Levels that cross are put in order, which never makes the pinball loss worse.
      found["quantiles"] = jnp.sort(made, 1) + (explained[:, None] if "explained" in batch else 0.0)
    if "future_values" in batch:
      found |= {"target": batch["future_values"] + explained, "observed": batch["future_observed"]}
    return {**found, **{key: batch[key] for key in _PASSED}}

  # What baselines are made of: here the pretrained model's own forecasts.
  features = predict

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the scores of a split; see `forecasts.summary`."""
    return forecasts.summary(outputs, self.levels, self._steps)

  def score(self, outputs: dict) -> np.ndarray:
    """Returns (N,) the metric of each window; their mean is that of the split."""
    return forecasts.per_window(self.metric[0], outputs, self.levels)

  def value(self, outputs: dict) -> float:
    """Returns the selection metric of a split."""
    return forecasts.mean(self.score(outputs))

  def blocks(self, outputs: dict) -> np.ndarray:
    """Returns (N,) numbers of the stretches of time that intervals resample as one."""
    return np.asarray(outputs["block"])

  def calibrate(self, outputs: dict) -> dict:
    """Returns what is fitted to a split (validation).

    Of point forecasts {"lower", "upper"}: (H,) lists, the levels INTERVAL of target less forecast
    at each step, standardised, over windows and channels. Of quantile forecasts {}.
    """
    if self.levels:
      return {}
    away = np.asarray(outputs["target"], np.float64) - outputs["forecast"]
    away = np.where(np.asarray(outputs["observed"]) > 0, away, np.nan)
    found = np.nanquantile(away.swapaxes(0, 1).reshape(away.shape[1], -1), INTERVAL, axis=1)
    return {"lower": found[0].tolist(), "upper": found[1].tolist()}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one window as JSON types, in the series' own units.

    {"forecast": {channel: [H numbers]}} with, of quantiles, "quantiles": {level: {channel: …}},
    else "lower" and "upper", between which 80 % of the values of validation lay.
    """
    def units(values):  # (H, C)
      real = np.asarray(values, np.float64) * outputs["std"] + outputs["mean"]
      return {name: real[:, c].tolist() for c, name in enumerate(self.preprocess.channels)}

    made = np.asarray(outputs["forecast"], np.float64)
    found = {"forecast": units(made)}
    if "quantiles" in outputs:
      found["quantiles"] = {f"{level:g}": units(outputs["quantiles"][i])
                            for i, level in enumerate(self.levels)}
    for key in ("lower", "upper"):
      if key in calibration:
        found[key] = units(made + np.array(calibration[key])[:, None])
    return found

  def evidence(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the card's further fields: the share of targets in the intervals from validation."""
    if "lower" not in calibration:
      return {}
    low, high = (np.array(calibration[key])[:, None] for key in ("lower", "upper"))
    return {"intervals": {"level": INTERVAL[1] - INTERVAL[0], "coverage": {
      name: forecasts.covered(part["target"], part["forecast"] + low, part["forecast"] + high,
                              part["observed"])
      for name, part in outputs.items() if name != "validation"}}}

  def baselines(self, features: dict) -> dict:
    """Returns what no training gets, the best on validation first.

    Args:
      features: split -> what the pretrained model gives, with "index" (N,): "zero-shot".

    Returns:
      "zero-shot", "last-value", "seasonal-naive", "ridge" (NLinear in closed form, its strength
      chosen on validation; all of the training part, also where data.train_share trains on less)
      and, with an adjacency, "ridge-neighbours" -> split -> what `predict` gives.
    """
    horizon, season = self.preprocess.horizon, self.preprocess.season
    methods = {"last-value": lambda past: forecasts.last_value(past, horizon),
               "seasonal-naive": lambda past: forecasts.seasonal(past, horizon, season)}
    found = {"zero-shot": features}
    for name, method in methods.items():
      found[name] = self._by(method, features)
    found["ridge"] = self._ridge(features, None)
    if self.preprocess.adjacency is not None:
      found["ridge-neighbours"] = self._ridge(features, self.preprocess.adjacency)
    order = {name: self.value(of["validation"]) for name, of in found.items() if of}
    return {name: found[name] for name in sorted(order, key=order.get)}

  def _by(self, method: Callable, features: dict) -> dict:
    """Returns split -> what a method (past (n, T, C) -> (n, H, C)) forecasts of its windows."""
    return {name: self._judged(method, self._splits[name], part) for name, part in features.items()}

  def _judged(self, method: Callable, rows, part: dict, chunk: int = 256) -> dict:
    made, index, context = [], part["index"], self.preprocess.context
    for at in np.split(index, range(chunk, len(index), chunk)):
      past = []
      for number, origin in rows.places[at]:
        past.append(rows.series[number].actual_before(int(origin), context))
      made.append(method(np.stack(past)))
    kept = {key: value for key, value in part.items() if key not in ("forecast", "quantiles")}
    return {**kept, "forecast": np.concatenate(made).astype(np.float32)}

  def _ridge(self, features: dict, adjacency) -> dict:
    """Returns what the ridge that is best on validation gives; {} if no series is long enough."""
    import threadpoolctl

    train, size = self._splits["train"], self._lookback + self.preprocess.horizon
    parts = [(one.actual[:stop], one.observed[:stop])
             for one, (_, stop) in zip(train.series, train.parts, strict=True) if stop >= size]
    best, best_value = None, np.inf
    if not parts:
      return {}
    with threadpoolctl.threadpool_limits(1):  # as in ft/probes.py
      for ridge in forecasts.ridges(parts, self._lookback, self.preprocess.horizon, adjacency):
        found = self._by(ridge, {"validation": features["validation"]})
        value = self.value(found["validation"])
        if best is None or value < best_value:
          best, best_value = ridge, value
      return self._by(best, features)


def _mean(each, batch: dict):
  """Returns (B,) the mean of (B, H, C) over observed targets."""
  seen = batch["future_observed"]
  return jnp.sum(each * seen, (1, 2)) / jnp.maximum(jnp.sum(seen, (1, 2)), 1.0)
