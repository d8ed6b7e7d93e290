"""Scores of forecasts, as gluonts defines them, and forecasts that need no training (numpy).

Shapes: N windows, T steps of the past, H of the forecast, C channels, Q quantile levels. Values are
standardised, `mean` and `std` (N, C) undo it; `observed` (N, H, C) is 1 where there is a target. A
score that no observed target defines is NaN.
"""

import dataclasses

import numpy as np

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the ridge's penalty, over its features' mean square
_MOST = 300_000  # windows times channels that a ridge is fitted to; of more, evenly spaced ones
_CHUNK = 2**24  # numbers held at once


def per_window(name: str, outputs: dict, levels: tuple[float, ...] = ()) -> np.ndarray:
  """Returns the score of each window, (N,): the mean over its observed targets.

  Args:
    name: mse, mae; mase, the absolute error over that of the seasonal naive forecast in the history
      (Hyndman & Koehler 2006), channels whose history has none left out; or crps, twice the mean
      pinball loss of the levels, which is the CRPS in the limit of many levels.
    outputs: "forecast", "target", "observed" (N, H, C); for mase "seasonal_error" (N, C); for crps
      "quantiles" (N, Q, H, C), without them the forecast is all quantiles.
    levels: (Q,) of crps.
  """
  away, observed = _away(outputs), np.asarray(outputs["observed"], np.float64)
  if name == "mase":
    scale = np.asarray(outputs["seasonal_error"], np.float64)[:, None]
    observed = observed * (scale > 0)
    away = away / np.where(scale > 0, scale, 1.0)
  each = {"mse": np.square, "mae": np.abs, "mase": np.abs}.get(name)
  each = pinball(outputs, levels) if each is None else each(away)
  total, count = (part.reshape(len(part), -1).sum(1) for part in (each * observed, observed))
  return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def pinball(outputs: dict, levels: tuple[float, ...]) -> np.ndarray:
  """Returns (N, H, C): twice the pinball loss, the mean over levels; gluonts's quantile loss."""
  target, total = np.asarray(outputs["target"], np.float64), 0.0
  for i, level in enumerate(levels):
    made = outputs["quantiles"][:, i] if "quantiles" in outputs else outputs["forecast"]
    total = total + 2 * np.abs((target - made) * ((target <= made) - level))
  return total / len(levels)


def summary(outputs: dict, levels: tuple[float, ...], steps: tuple[int, ...]) -> dict[str, float]:
  """Returns the scores of a split by name.

  mse and mae on the standardised scale, mase; mae_original, rmse_original and mape (in per cent,
  targets that are 0 left out) on the original one; wql, the weighted quantile loss: twice the
  pinball losses over the sum of |target|, the mean over levels (with a single level 0.5 gluonts's
  ND). Of quantile forecasts crps and coverage_80 (say), the share of targets from the lowest to the
  highest level. For each of the steps, counted from 1, mae, rmse and mape at it alone, original.
  """
  names = ("mse", "mae", "mase", *(("crps",) if levels else ()))
  found = {name: mean(per_window(name, outputs, levels)) for name in names}
  observed = np.asarray(outputs["observed"], np.float64)
  target, std = np.asarray(outputs["target"], np.float64), np.asarray(outputs["std"])[:, None]
  away = _away(outputs) * std
  value = target * std + np.asarray(outputs["mean"], np.float64)[:, None]
  found |= _original(away, value, observed, std)
  loss = pinball({**outputs, "target": target}, levels or (0.5,)) * std
  size = (np.abs(value) * observed).sum()
  found["wql"] = float((loss * observed).sum() / size) if size else float("nan")
  if "quantiles" in outputs:
    low, high = np.asarray(outputs["quantiles"])[:, [0, -1]].swapaxes(0, 1)
    found[f"coverage_{100 * (levels[-1] - levels[0]):.0f}"] = covered(target, low, high, observed)
  for step in steps:
    at = slice(step - 1, step)
    one = _original(away[:, at], value[:, at], observed[:, at], std)
    found |= {f"{name.removesuffix('_original')}_at_{step}": score for name, score in one.items()}
  return found


def covered(target, low, high, observed) -> float:
  """Returns the share of observed targets from low to high, all (N, H, C)."""
  inside = (target >= low) & (target <= high)
  count = np.sum(observed)
  return float((inside * observed).sum() / count) if count else float("nan")


def mean(scores: np.ndarray) -> float:
  """Returns the mean over windows that have a score; NaN where none has."""
  known = scores[~np.isnan(scores)]
  return float(known.mean()) if len(known) else float("nan")


def _away(outputs: dict) -> np.ndarray:
  return np.asarray(outputs["forecast"], np.float64) - np.asarray(outputs["target"], np.float64)


def _original(away, value, observed, std) -> dict[str, float]:
  # Standardising in float32 leaves a residue where the value was 0.
  real = observed * (np.abs(value) > 1e-5 * std)

  def average(each, weight):
    return float((each * weight).sum() / weight.sum()) if weight.any() else float("nan")

  relative = np.abs(away) / np.where(real > 0, np.abs(value), 1.0)
  return {"mae_original": average(np.abs(away), observed),
          "rmse_original": average(np.square(away), observed)**0.5,
          "mape": 100 * average(relative, real)}


# ---- Forecasts without training ------------------------------------------------------------------


def last_value(past: np.ndarray, horizon: int) -> np.ndarray:
  """Returns (N, H, C): the last value of past (N, T, C), repeated."""
  return np.repeat(past[:, -1:], horizon, 1)


def seasonal(past: np.ndarray, horizon: int, season: int) -> np.ndarray:
  """Returns (N, H, C): the last season of past (N, T, C) again; its last value if T < season."""
  season = season if past.shape[1] >= season else 1
  return past[:, -season:][:, np.arange(horizon) % season]


@dataclasses.dataclass(frozen=True)
class Ridge:
  """NLinear (Zeng et al. 2023, arXiv:2205.13504) in closed form: one linear map for all channels.

  It reads the past less its last value, with an adjacency that of the neighbours' mean too, and
  gives the steps ahead less the last value.

  Attributes:
    weights: (F, H), F = T or 2 T.
    lookback: T.
    adjacency: (C, C) or None.
  """

  weights: np.ndarray
  lookback: int
  adjacency: np.ndarray | None = None

  def __call__(self, past: np.ndarray) -> np.ndarray:
    """Returns (N, H, C) float32 of past (N, >= T, C)."""
    x = features(past[:, -self.lookback:], self.adjacency)
    return (x @ self.weights).swapaxes(1, 2).astype(np.float32) + past[:, -1:]


def features(past: np.ndarray, adjacency: np.ndarray | None) -> np.ndarray:
  """Returns (N, C, F) float64: the past (N, T, C) less its last value, then the neighbours'."""
  x = (past - past[:, -1:]).swapaxes(1, 2).astype(np.float64)
  return x if adjacency is None else np.concatenate([x, adjacency @ x], -1)


def ridges(parts, lookback: int, horizon: int, adjacency: np.ndarray | None = None):
  """Yields a Ridge for each of STRENGTHS, fitted to all windows of the training parts of series.

  Args:
    parts: (values (T, C) standardised, observed (T, C)) of each series; windows of which a target
      is missing are left out, channel by channel.

  Windows are as many as lie in a part, whatever context a model reads. No part may be too short for
  all of them.
  """
  windows = [np.arange(lookback, len(values) - horizon + 1) for values, _ in parts]
  count = sum(len(at) * values.shape[1] for at, (values, _) in zip(windows, parts, strict=True))
  every = -(-count // _MOST)
  gram = cross = 0.0
  for at, (values, observed) in zip(windows, parts, strict=True):
    at = at[::every]
    size = max(1, _CHUNK // ((lookback + horizon) * 2 * values.shape[1]))
    for chunk in np.split(at, range(size, len(at), size)):
      past = values[chunk[:, None] + np.arange(-lookback, 0)]
      ahead = chunk[:, None] + np.arange(horizon)
      y = (values[ahead] - past[:, -1:]).swapaxes(1, 2).astype(np.float64)
      x, whole = features(past, adjacency), observed[ahead].all(1)
      x, y = x[whole], y[whole]
      gram, cross = gram + x.T @ x, cross + x.T @ y
  penalty = np.trace(gram) / len(gram) * np.eye(len(gram))
  for strength in STRENGTHS:
    weights = np.linalg.solve(gram + strength * penalty, cross)
    yield Ridge(weights, lookback, adjacency)
