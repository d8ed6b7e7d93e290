"""Tables of series, read as arrays: wide (a column a series) or long (a row a series and time).

Shapes: T steps, C channels, K covariates.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from absl import logging

from ft import errors
from ft.data import sources, timeline

TIMES = ("time", "date", "datetime", "timestamp", "ds")
_SOME = 100  # rows by which numbers are told from other columns


@dataclasses.dataclass(frozen=True)
class Raw:
  """One series as its table has it.

  Attributes:
    name: "" where the table has one series of many channels.
    first: tick of its first step.
    values: (T, C) float64, NaN where there is no value; the last step has one.
    known: (S, K) float64, S >= T: covariates, also of the steps that follow.
    where: where its first row stands.
  """

  name: str
  first: int
  values: np.ndarray
  known: np.ndarray
  where: str


@dataclasses.dataclass(frozen=True)
class Panel:
  """Series of one table or of several that follow on each other.

  Attributes:
    series: the series, in the order of the table.
    clock: how ticks are read.
    channels: (C,) names of the columns that are forecast.
    starts: source -> its earliest tick.
  """

  series: list[Raw]
  clock: timeline.Clock
  channels: tuple[str, ...]
  starts: dict[str, int]


def read(config, tables: dict) -> Panel:
  """Reads series.

  Args:
    config: the keys of ft/data/series.py; of them the time's, the targets' and the covariates'.
    tables: name of a source -> (formats.Table, (n,) its rows); they continue each other.

  Raises:
    UserError: a column is missing, a value is no number, times are not in order, or there are
      gaps and config.gaps is "error".
  """
  targets, rows = config.targets, _Rows(tables)
  for column, key in [*((c, "time") for c in config.time), *((c, "targets") for c in targets),
                      *((c, "covariates") for c in config.covariates),
                      *((c, "series_id") for c in [config.series_id] if c)]:
    for table, _ in tables.values():
      sources.need(table, column, f"data.{key}")
  time = tuple(config.time) or tuple(c for c in TIMES if c in rows.columns)[:1]
  taken = {*time, *config.covariates, config.series_id}
  missing = set(config.missing)
  targets = tuple(targets) or _numeric(rows, taken, missing)
  if both := set(targets) & taken:
    raise errors.UserError(f"data.targets: {', '.join(sorted(both))} is also the time, the series' "
                           "name or a covariate")
  values = np.stack([_column(rows, c, missing) for c in targets], 1)
  known = [_column(rows, c, missing) for c in config.covariates]
  known = np.stack(known, 1) if known else np.zeros((len(rows), 0))
  kind, ticks = _times(rows, time, config.time_format)
  groups = _groups(rows, config.series_id)
  clock = timeline.Clock("count", 1)
  if time:
    clock = timeline.frequency(config.frequency, kind, [ticks[at] for at in groups.values()])
  elif len(groups) > 1:
    ticks = _counted(groups, len(rows))
  if clock.kind == "month":
    ticks = timeline.months(ticks)
  starts = {name: int(ticks[part].min()) for name, part in rows.parts.items()}
  series = [_one(name, at, ticks, values, known, clock, rows.where, config, targets)
            for name, at in groups.items()]
  return Panel(series, clock, targets, starts)


class _Rows:
  """Rows of several tables, one after the other; `parts` says which are whose."""

  def __init__(self, tables: dict):
    self._places, self.parts, self.records = [], {}, []
    for name, (table, indices) in tables.items():
      self.parts[name] = slice(len(self._places), len(self._places) + len(indices))
      self._places += [(table, int(i)) for i in indices]
      self.records += [table.records[int(i)] for i in indices]
    first = next(iter(tables.values()))[0]
    self.columns, self.source = first.columns, first.source

  def __len__(self):
    return len(self.records)

  def where(self, i: int) -> str:
    table, row = self._places[int(i)]
    return table.where(row)


def _numeric(rows: _Rows, taken: set, missing: set) -> tuple[str, ...]:
  """Returns the columns of numbers that have no other use; the others are named in the log."""
  found, other = [], []
  for column in rows.columns:
    if column in taken:
      continue
    some = [_number(record.get(column), missing) for record in rows.records[:_SOME]]
    (other if None in some or all(map(math.isnan, some)) else found).append(column)
  if not found:
    raise errors.UserError(f"{rows.source}: no column of numbers to forecast; its columns are "
                           f"{', '.join(rows.columns)}; name them in data.targets")
  if other:
    logging.warning("%s: columns that hold no numbers are not forecast: %s", rows.source,
                    ", ".join(other))
  return tuple(found)


def _column(rows: _Rows, column: str, missing: set) -> np.ndarray:
  """Returns (N,) float64 of a column; UserError where it holds something else."""
  values = np.empty(len(rows))
  for i, record in enumerate(rows.records):
    value = _number(record.get(column), missing)
    if value is None:
      raise errors.UserError(f"{rows.where(i)}: {column} is {record.get(column)!r}, no finite "
                             "number; data.missing names what stands for a missing value, "
                             "data.targets the columns that are forecast")
    values[i] = value
  numbers = [number for number in (_number(text, ()) for text in missing) if number is not None]
  return np.where(np.isin(values, numbers), np.nan, values)  # such as a 0 of a binary file


def _number(value, missing) -> float | None:
  """Returns a value as a number, NaN for a missing one, None for anything else."""
  if isinstance(value, str):
    value = value.strip()
    if value in missing:
      return math.nan
  try:
    number = math.nan if value is None else float(value)
  except (TypeError, ValueError):
    return None
  return None if math.isinf(number) else number


def _times(rows: _Rows, time: tuple[str, ...], time_format: str) -> tuple[str, np.ndarray]:
  """Returns the kind and the ticks of all rows; their numbers where no column is the time."""
  if not time:
    return "count", np.arange(len(rows))
  if len(time) == 1:
    return timeline.read([r.get(time[0]) for r in rows.records], time_format, rows.where)
  texts = [" ".join(str(r.get(c)).strip() for c in time) for r in rows.records]
  return timeline.read(texts, time_format, rows.where)


def _groups(rows: _Rows, column: str) -> dict[str, np.ndarray]:
  """Returns name of a series -> (n,) its rows; "" of a wide table."""
  if not column:
    return {"": np.arange(len(rows))}
  found = {}
  for i, record in enumerate(rows.records):
    found.setdefault(str(record.get(column)), []).append(i)
  return {name: np.array(at) for name, at in found.items()}


def _counted(groups: dict, size: int) -> np.ndarray:
  ticks = np.empty(size, np.int64)
  for at in groups.values():
    ticks[at] = np.arange(len(at))
  return ticks


def _one(name, at, ticks, values, known, clock, where: Callable, config, channels) -> Raw:
  """Lays the rows of a series out on its steps and checks them."""
  places = lambda i: where(at[i])  # noqa: E731
  steps = timeline.positions(ticks[at], clock, name, places)
  last = np.flatnonzero(~np.isnan(values[at]).all(1))
  if not len(last):
    raise errors.UserError(f"{places(0)}: {name or 'the series'} has no value at all in "
                           f"{', '.join(channels[:5])}")
  size, length = int(steps[-1]) + 1, int(steps[last[-1]]) + 1
  if size > 10 * len(at) + 10_000:
    i = int(np.argmax(np.diff(steps))) + 1
    raise errors.UserError(f"{places(i)}: {steps[i] - steps[i - 1] - 1:,} steps of "
                           f"{clock.name or clock.step} are missing before "
                           f"{clock.show(ticks[at[i]])}; is that time right, and data.frequency?")
  laid, covariates = (np.full((size, part.shape[1]), np.nan) for part in (values, known))
  laid[steps], covariates[steps] = values[at], known[at]
  if config.gaps == "error":
    _no_gaps(name, laid[:length], steps[:last[-1] + 1], int(ticks[at[0]]), clock, places, channels)
  if np.isnan(covariates).any():
    step, k = np.argwhere(np.isnan(covariates))[0]
    raise errors.UserError(f"{places(0)}: {name or 'the series'}: the covariate "
                           f"{config.covariates[k]} has no value at "
                           f"{clock.show(int(ticks[at[0]]) + int(step) * clock.step)}; known "
                           "covariates need one at every step")
  return Raw(name, int(ticks[at[0]]), laid[:length], covariates, places(0))


def _no_gaps(name, values, steps, first, clock, places, channels) -> None:
  hint = ("; data.gaps=mask tells the model which values are missing and shows it the last one "
          "before them")
  of = f" of {name}" if name else ""
  missing = np.diff(steps) - 1
  if missing.any():
    i = int(np.flatnonzero(missing)[0]) + 1
    raise errors.UserError(
      f"{places(i)}: a gap{of}: {missing[i - 1]} steps of {clock.name or clock.step} are missing "
      f"before {clock.show(first + int(steps[i]) * clock.step)} ({missing.sum():,} in "
      f"{(missing > 0).sum():,} gaps){hint}")
  empty = np.isnan(values)
  if empty.any():
    step, c = np.argwhere(empty)[0]
    raise errors.UserError(
      f"{places(int(step))}: no value of {channels[c]}{of} at "
      f"{clock.show(first + int(step) * clock.step)} ({empty.sum():,} values are missing){hint}")


def neighbours(config, channels: tuple[str, ...]) -> np.ndarray:
  """Reads which channels lie near each other, and how near.

  Args:
    config: the section `data`, whose `adjacency` is a square table with a header of channels (and
      their names in a column before it, or rows in the header's order), or one of edges with the
      columns from, to and, if they differ, weight.
    channels: (C,) of the series; others in the table are left out.

  Returns:
    (C, C) float64: row i holds the shares, which sum to 1, that the neighbours of channel i have in
    their mean; zeros where it has none.

  Raises:
    UserError: a channel is not in the table, or a weight is no number or below 0.
  """
  spec = {"source": config.adjacency, "format": "", "names": None, "header": True}
  _, table, indices = sources.table(config, spec)
  records = [(table.where(int(i)), table.records[int(i)]) for i in indices]
  place = {name: i for i, name in enumerate(channels)}
  matrix = np.zeros((len(channels), len(channels)))
  edges = {"from", "to"} <= set(table.columns)
  rest = [c for c in table.columns if c not in place]
  for number, (where, record) in enumerate(records):
    if edges:
      ends = {str(record["from"]), str(record["to"])}
      cells = [(str(record["from"]), str(record["to"]), record.get("weight", 1))]
    else:
      name = str(record[table.columns[0]]) if rest and rest[0] == table.columns[0] else (
        table.columns[number] if number < len(table.columns) else "")
      ends, cells = {name}, [(name, c, record[c]) for c in table.columns if c in place]
    for row, column, value in cells if ends <= place.keys() else []:
      weight = _number(value, ())
      if weight is None or not weight >= 0:
        raise errors.UserError(f"{where}: {value!r} should be a weight, a number of at least 0")
      matrix[place[row], place[column]] = weight
  there = {str(r[k]) for _, r in records for k in ("from", "to")} if edges else set(table.columns)
  if absent := [name for name in channels if name not in there]:
    raise errors.UserError(f"{table.source}: nothing about {', '.join(absent[:5])}"
                           f"{' and others' if len(absent) > 5 else ''}, which data.targets has; "
                           "data.adjacency names the columns of the series, or from and to")
  np.fill_diagonal(matrix, 0)
  total = matrix.sum(1, keepdims=True)
  return np.divide(matrix, total, out=np.zeros_like(matrix), where=total > 0)
