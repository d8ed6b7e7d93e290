"""Windows of series: what a forecast may read, and what it is compared with.

A series is standardised by its training part, and what known covariates explain there is taken out
of it; both are undone in every answer. Shapes: T steps, C channels, K covariates, H horizon.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from ft import errors
from ft.data import panel

_RIDGE = 1e-3  # penalty on what covariates explain, over the number of steps


@dataclasses.dataclass(frozen=True)
class Scale:
  """What was fitted to the training part of a series; all JSON lists in a run's files.

  Attributes:
    mean, std: (C,) of the channels.
    known_mean, known_std: (K,) of the covariates.
    effect: (K, C): what a standardised covariate adds to a standardised channel.
  """

  mean: np.ndarray
  std: np.ndarray
  known_mean: np.ndarray
  known_std: np.ndarray
  effect: np.ndarray

  def spec(self) -> dict:
    """Returns the numbers as JSON."""
    return {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}

  @classmethod
  def from_spec(cls, spec: dict) -> "Scale":
    """Returns what `spec` was made of."""
    return cls(**{key: np.asarray(value, np.float64) for key, value in spec.items()})

  def explained(self, known: np.ndarray) -> np.ndarray:
    """Returns (S, C): what the covariates (S, K) add to the standardised channels."""
    return (known - self.known_mean) / self.known_std @ self.effect.reshape(known.shape[1], -1)


def fit(raw: panel.Raw, stop: int) -> Scale:
  """Fits a Scale to the first `stop` steps of a series.

  The effect of covariates is a ridge regression of all of them on each channel, over its observed
  steps.
  """
  values, known = raw.values[:stop], raw.known[:stop]
  mean, std = np.nanmean(values, 0), np.nanstd(values, 0)
  size = known.shape[1]
  known_mean, known_std = (known.mean(0), known.std(0)) if size else (np.zeros(0), np.zeros(0))
  known_std = np.where(known_std > 0, known_std, 1.0)
  effect = np.zeros((size, values.shape[1]))
  x, y = (known - known_mean) / known_std, (values - mean) / std
  for c in range(values.shape[1] if size else 0):
    seen = ~np.isnan(y[:, c])
    gram = x[seen].T @ x[seen] + _RIDGE * seen.sum() * np.eye(size)
    effect[:, c] = np.linalg.solve(gram, x[seen].T @ y[seen, c])
  return Scale(mean, std, known_mean, known_std, effect)


def unusable(values: np.ndarray) -> str:
  """Returns why a channel (T,) cannot be standardised by these values, "" where it can."""
  seen = values[~np.isnan(values)]
  if len(seen) < 2:
    return "has no values in the training part"
  if np.ptp(seen) <= 1e-9 * max(1.0, np.abs(seen).max()):
    return f"is {seen[0]:g} at every step of the training part"
  return ""


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
  """A series as models see it.

  Attributes:
    name: "" for the one series of a wide table.
    first: tick of its first step.
    values: (S, C) float32: standardised, less what covariates explain; the value before where one
      is missing, so that nothing of the future fills the past; after the last one, as many steps
      as are forecast.
    observed: (S, C) float32, 1 where there is a value.
    explained: (S, C) float32: what covariates explain; None without covariates.
    scale: its Scale.
    season: steps of MASE's season.
    block: number of its first block, see `Windows`.
  """

  name: str
  first: int
  values: np.ndarray
  observed: np.ndarray
  explained: np.ndarray | None
  scale: Scale
  season: int
  block: int = 0

  @functools.cached_property
  def digest(self) -> str:
    """What equal series share."""
    parts = [self.values, self.observed, self.scale.mean, self.scale.std]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]

  @property
  def actual(self) -> np.ndarray:
    """(S, C) the standardised values, what covariates explain included."""
    return self.values if self.explained is None else self.values + self.explained

  def actual_before(self, origin: int, count: int) -> np.ndarray:
    """Returns (count, C): `actual` of the last steps before `origin`."""
    at = slice(origin - count, origin)
    return self.values[at] if self.explained is None else self.values[at] + self.explained[at]

  def seasonal_error(self, origin: int) -> np.ndarray:
    """Returns (C,): mean |y_t - y_(t - season)| over the steps before `origin`; NaN without any.

    Of a history no longer than a season, the season is one step, as gluonts has it.
    """
    total, count = self._seasonal if origin > self.season else self._naive
    with np.errstate(invalid="ignore", divide="ignore"):
      return (total[origin] / count[origin]).astype(np.float32)

  @functools.cached_property
  def _seasonal(self):
    return _running(self.actual, self.observed, self.season)

  @functools.cached_property
  def _naive(self):
    return _running(self.actual, self.observed, 1)


def _running(y, observed, lag: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (S + 1, C) twice: sums of |y_t - y_(t - lag)| over t < origin, and their number."""
  total, count = (np.zeros((len(y) + 1, y.shape[1])) for _ in range(2))
  both = observed[lag:] * observed[:-lag]
  count[lag + 1:] = np.cumsum(both, 0)
  total[lag + 1:] = np.cumsum(np.abs(y[lag:].astype(np.float64) - y[:-lag]) * both, 0)
  return total, count


def build(raw: panel.Raw, scale: Scale, season: int, ahead: int = 0, block: int = 0) -> Series:
  """Returns a series as models see it; `ahead`: steps to lay out after its last value."""
  length, channels = raw.values.shape
  size = length + ahead
  values = np.full((size, channels), np.nan)
  values[:length] = (raw.values - scale.mean) / scale.std
  observed, explained = ~np.isnan(values), None
  if raw.known.shape[1]:
    explained = np.zeros((size, channels))
    known = raw.known[:size]
    explained[:len(known)] = scale.explained(known)
    values -= explained
  at = np.maximum.accumulate(np.where(observed, np.arange(size)[:, None], -1), 0)
  filled = np.where(at >= 0, np.take_along_axis(values, np.maximum(at, 0), 0), 0.0)
  return Series(raw.name, raw.first, filled.astype(np.float32), observed.astype(np.float32),
                None if explained is None else explained.astype(np.float32), scale, season, block)


@dataclasses.dataclass(frozen=True)
class Window:
  """A forecast's place: steps origin … origin + horizon - 1 of a series."""

  series: Series
  origin: int

  def __repr__(self) -> str:  # of what it holds: equal for equal windows of equal series
    return f"{self.series.digest} {self.origin}"

  def past(self, context: int) -> slice:
    """Returns the steps that are read: the last `context` before the forecast."""
    if self.origin < context:
      raise errors.RowError(f"{self.origin} steps of history, and data.context reads {context}")
    return slice(self.origin - context, self.origin)

  def future(self, horizon: int) -> slice:
    """Returns the steps that are forecast."""
    return slice(self.origin, self.origin + horizon)


@dataclasses.dataclass(frozen=True)
class Windows:
  """Rows of a split, each {"window": Window}, in the order of series and time.

  Windows overlap. `block` numbers those whose forecasts start within the same stretch of `length`
  steps of a series: intervals resample blocks.

  Attributes:
    name: of the split.
    series: those that windows lie in.
    places: (N, 2) int: number of the series, first step that is forecast.
    source: what the table is called.
    show: (series, step) -> its time.
    parts: (n, 2) int: the steps of each series that belong to the split.
  """

  name: str
  series: tuple[Series, ...]
  places: np.ndarray
  source: str
  show: Any
  parts: np.ndarray

  labels = classes = binarize = None
  roles = {}

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, i: int) -> dict[str, Window]:
    number, origin = self.places[i]
    return {"window": Window(self.series[number], int(origin))}

  def where(self, i: int) -> str:
    """Returns where window i stands: the series and the time of its first forecast."""
    number, origin = self.places[i]
    name = self.series[number].name
    return (f"{self.source}: {name + ', ' if name else ''}forecast from "
            f"{self.show(self.series[number], int(origin))}")

  def select(self, indices, name: str = "") -> "Windows":
    """Returns the windows at these positions, in this order."""
    return dataclasses.replace(self, places=self.places[np.asarray(indices, int)],
                               name=name or self.name)


def origins(series: Series, start: int, stop: int, context: int, horizon: int,
            stride: int = 1) -> np.ndarray:
  """Returns the first steps of the forecasts of a part of a series.

  Args:
    start, stop: steps that are forecast; the context before them may lie outside, further back.
    stride: steps from one to the next.

  Forecasts of which nothing was observed, before or in them, are left out.
  """
  found = np.arange(max(start, context), stop - horizon + 1, stride)
  seen = np.concatenate([[0], np.cumsum(series.observed.sum(1))])
  return found[(seen[found] > seen[found - context]) & (seen[found + horizon] > seen[found])]
