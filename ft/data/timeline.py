"""Times of series: read, ordered, spaced evenly.

Times are kept as whole numbers, ticks: microseconds since 1970 for dates and times, months since
year 0 for series of months or longer steps, and the numbers themselves where the column counts.
"""

import collections
import dataclasses
import datetime
import re

import numpy as np

from ft import errors

_EPOCH = datetime.datetime(1970, 1, 1)
_SECOND = 10**6
_DAY = 86400 * _SECOND
_UNITS = {"s": _SECOND, "min": 60 * _SECOND, "h": 3600 * _SECOND, "d": _DAY, "w": 7 * _DAY}
_MONTHS = {"mo": 1, "q": 3, "y": 12}
# Steps after which a pattern usually repeats: the day, the week, the year.
_SEASONS = {"s": 3600, "min": 1440, "h": 24, "d": 7, "w": 52, "mo": 12, "q": 4, "y": 1}


@dataclasses.dataclass(frozen=True)
class Clock:
  """How ticks are to be read.

  Attributes:
    kind: "time" (microseconds), "month", or "count".
    step: ticks from one value to the next.
  """

  kind: str
  step: int

  def show(self, tick: int) -> str:
    """Returns a tick as ISO 8601, or the number it is."""
    if self.kind == "count":
      return str(int(tick))
    if self.kind == "month":
      return f"{int(tick) // 12:04d}-{int(tick) % 12 + 1:02d}"
    time = _EPOCH + datetime.timedelta(microseconds=int(tick))
    return time.isoformat(sep=" ", timespec="microseconds" if time.microsecond else "auto")

  @property
  def name(self) -> str:
    """The step in words that `frequency` reads, such as 15min; "" where values are counted."""
    unit, size = self._unit()
    return f"{self.step // size}{unit}" if unit else ""

  @property
  def season(self) -> int:
    """Steps after which the pattern usually repeats: an hour's day, a day's week, a month's year.

    1 where the usual one is no whole number of steps.
    """
    unit, size = self._unit()
    whole, rest = divmod(_SEASONS.get(unit, 1), self.step // size)
    return max(whole, 1) if not rest else 1

  def tick(self, value, time_format: str, what: str) -> int:
    """Returns the tick of a time as it is written; UserError that names `what` if it is none."""
    kind, tick = _tick(value, time_format, what)
    if kind == "time" and self.kind == "month":
      return _month(tick)
    if kind != self.kind:
      raise errors.UserError(f"{what}: {value!r} should be a time such as {self.show(0)}")
    return tick

  def _unit(self) -> tuple[str, int]:
    units = {"time": _UNITS, "month": _MONTHS}.get(self.kind, {})
    fitting = [(unit, size) for unit, size in units.items() if self.step % size == 0]
    return fitting[-1] if fitting else ("", 1)


def read(values, time_format: str, where) -> tuple[str, np.ndarray]:
  """Reads a column of times.

  Args:
    values: texts (ISO 8601, or as time_format says), datetimes, dates or whole numbers.
    time_format: of `datetime.strptime`; "": ISO 8601.
    where: position -> where it stands, for messages.

  Returns:
    ("time" or "count", (N,) int64 ticks).

  Raises:
    UserError: one of them is no time.
  """
  kinds, ticks = set(), np.empty(len(values), np.int64)
  for i, value in enumerate(values):
    kind, ticks[i] = _tick(value, time_format, where, i)
    kinds.add(kind)
    if len(kinds) > 1:
      raise errors.UserError(f"{where(i)}: the time {value!r} is written in another way than those "
                             "before it")
  return next(iter(kinds), "count"), ticks


def frequency(stated: str, kind: str, parts: list[np.ndarray]) -> Clock:
  """Returns the Clock of series: as stated (15min, 1h, 1d, 1mo, …), or their most common step.

  Args:
    stated: data.frequency; "" for the most common step.
    kind: of the ticks, as `read` gives it.
    parts: the (N,) ticks of each series.

  Raises:
    UserError: stated in words that are not known, or no two times to tell it from.
  """
  if stated:
    match = re.fullmatch(r"(\d*) ?([a-z]+)", stated.lower())
    units = {**_UNITS, **_MONTHS}
    if not match or match[2] not in units or match[1] == "0" or kind == "count":
      raise errors.UserError(f"data.frequency={stated!r}: expected a number and one of "
                             f"{', '.join(units)}, such as 15min, of times that are dates")
    step = int(match[1] or 1) * units[match[2]]
    return Clock("month" if match[2] in _MONTHS else kind, step)
  counts = collections.Counter()
  for ticks in parts:
    values, times = np.unique(np.diff(ticks), return_counts=True)
    counts.update(dict(zip(values[values > 0].tolist(), times[values > 0].tolist(), strict=True)))
  if not counts:
    raise errors.UserError("no series has two times one after the other to tell the step from; "
                           "set data.frequency")
  step = counts.most_common(1)[0][0]
  if kind == "time" and step >= 28 * _DAY:
    return frequency("", "month", [months(ticks) for ticks in parts])
  return Clock(kind, step)


def months(ticks: np.ndarray) -> np.ndarray:
  """Returns ticks in microseconds as months since year 0."""
  return ticks.astype("datetime64[us]").astype("datetime64[M]").astype(np.int64) + 12 * 1970


def positions(ticks: np.ndarray, clock: Clock, name: str, where) -> np.ndarray:
  """Returns (N,) the steps from the first time to each.

  Args:
    ticks: (N,) of one series.
    name: of the series, for messages.
    where: position -> where it stands.

  Raises:
    UserError: a time stands twice, comes before the one above it, or lies between two steps.
  """
  of = f" of {name}" if name else ""
  steps, rest = np.divmod(ticks - ticks[0], clock.step)
  for i in np.flatnonzero(np.diff(ticks) <= 0)[:1] + 1:
    if ticks[i] in ticks[:i]:
      first = int(np.flatnonzero(ticks[:i] == ticks[i])[0])
      raise errors.UserError(f"{where(i)}: the time {clock.show(ticks[i])}{of} stands there twice "
                             f"(first: {where(first)}); keep one row a time"
                             + ("" if name else ", or name the column that tells series apart in "
                                "data.series_id"))
    raise errors.UserError(f"{where(i)}: the time {clock.show(ticks[i])}{of} comes after "
                           f"{clock.show(ticks[i - 1])}; rows have to be in the order of time")
  if rest.any():
    i = int(np.flatnonzero(rest)[0])
    step = clock.name or clock.step
    raise errors.UserError(f"{where(i)}: the time {clock.show(ticks[i])}{of} lies between two "
                           f"steps of {step} from {clock.show(ticks[0])}; data.frequency states "
                           "another step")
  return steps


def _tick(value, time_format: str, where, i: int | None = None) -> tuple[str, int]:
  try:
    if isinstance(value, str) and not time_format and re.fullmatch(r"-?\d{1,7}", value.strip()):
      return "count", int(value)
    if isinstance(value, str):
      text = value.strip()
      value = (datetime.datetime.strptime(text, time_format) if time_format
               else datetime.datetime.fromisoformat(text))
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
      value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, datetime.datetime):
      if value.tzinfo is not None:
        value = value.astimezone(datetime.UTC).replace(tzinfo=None)
      return "time", (value - _EPOCH) // datetime.timedelta(microseconds=1)
    if isinstance(value, np.datetime64):
      return "time", int(value.astype("datetime64[us]").astype(np.int64))
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
      return "count", int(value)
  except ValueError:
    pass
  place = where if i is None else where(i)
  raise errors.UserError(
    f"{place}: {value!r} is no time" + (f" of the form {time_format}" if time_format else
    " such as 2020-01-31 13:00; data.time_format says how others are written (%d.%m.%Y %H:%M)"))


def _month(tick: int) -> int:
  return int(months(np.array([tick]))[0])
