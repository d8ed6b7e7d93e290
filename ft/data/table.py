"""Rows of a table as numbers and categories, by what the training rows show.

A column is numeric where all its values in train are numbers, else categorical; data.numeric and
data.categorical say otherwise. Means, deviations and categories are those of train alone, and lie
with the run. A missing number is the mean, and a column that has such in train gets an indicator;
a missing category is a category. What train never had gets a code of its own, 0, and is counted.
Shapes: n numbers (indicators last), k columns of categories.
"""

import dataclasses
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator

import numpy as np
from absl import logging

from ft import errors
from ft.data import sources
from ft.data.fixed import Fixed

KEYS = {
  "numeric": ((), "columns read as numbers; (): those with nothing else in train"),
  "categorical": ((), "columns read as categories although they hold numbers, such as codes"),
  "ignore": ((), "columns that the model does not read, such as ids"),
  "missing": (("", "?", "NA", "N/A", "NaN", "nan", "null", "None"), "texts that stand for no "
              "value"),
  "most_categories": (256, "categories a column keeps, the most frequent; others count as never "
                      "seen", (1, None)),
}
_FILES = ("header", "names", "encoding", "quoting")
_UNKNOWN, _MISSING = "with_unknown_categories", "with_missing_values"


@dataclasses.dataclass(frozen=True)
class Number:
  """A numeric column: mean and standard deviation in train, and whether values were missing."""

  name: str
  mean: float
  sd: float
  gaps: bool


@dataclasses.dataclass(frozen=True)
class Category:
  """A categorical column: its values in train, the most frequent first; value i has code i + 1."""

  name: str
  values: tuple[str, ...]


class Preprocess(Fixed):
  """Turns rows of a table into arrays.

  Args:
    config: the `data` section.
    info: what models.inspect says.

  Attributes:
    numbers: the numeric columns; () before `load`.
    categories: the categorical ones.
    counts: rows so far with unknown categories, and with missing values.

  Raises:
    UserError: a column is asked for in two ways.
  """

  def __init__(self, config, info):
    del info
    asked = Counter((*config.numeric, *config.categorical, *config.ignore))
    if twice := [name for name, times in asked.items() if times > 1]:
      raise errors.UserError(f"data: column {twice[0]!r} is in two of numeric, categorical, ignore")
    self._settle((), (), tuple(config.missing), {key: config[key] for key in _FILES})
    self._config = config

  def _settle(self, numbers, categories, missing, files):
    self.numbers, self.categories, self._missing = tuple(numbers), tuple(categories), missing
    self._files, self.counts = files, {_UNKNOWN: 0, _MISSING: 0}
    self._codes = [{value: i for i, value in enumerate(column.values, 1)}
                   for column in self.categories]

  # Tables to rows.

  def load(self, config) -> sources.Data:
    """Returns the splits, in place of `sources.load`; the first time, what train is like is kept.

    Raises:
      UserError: besides what `sources.load` says, a column that is asked for is not there or no
        numbers, or none is left.
    """
    data = sources.load(config)
    if not self.numbers and not self.categories:
      self._fit(data.splits["train"])
    return data

  def _fit(self, train) -> None:
    c = self._config
    for key in ("numeric", "categorical", "ignore"):
      for name in c[key]:
        sources.need(train.table, name, f"data.{key}")
    columns = {name: [] for name in train[0]["record"] if name not in c.ignore}
    for row in train:
      for name, values in columns.items():
        values.append(self._value(row["record"][name]))
    if not columns:
      raise errors.UserError(f"{train.table.source}: no column is left for the model to read")
    numbers, categories = [], []
    for name, values in columns.items():
      if name not in c.categorical and (number := self._number_column(name, values)):
        numbers.append(number)
      else:
        categories.append(self._category_column(name, values))
    self._settle(numbers, categories, self._missing, self._files)
    logging.info("numbers: %s; categories: %s", ", ".join(x.name for x in numbers) or "none",
                 ", ".join(f"{x.name} ({len(x.values)})" for x in categories) or "none")

  def _number_column(self, name: str, values: list) -> Number | None:
    """Returns a column's statistics; None where it holds something else than numbers."""
    there = [_number(value) for value in values if value is not None]
    if None in there or not there:
      if name in self._config.numeric:
        wrong = next((v for v in values if v is not None and _number(v) is None), "nothing")
        raise errors.UserError(f"data.numeric: column {name!r} of train holds {wrong!r}, no number")
      return None
    there = np.array(there)
    return Number(name, float(there.mean()), float(there.std()) or 1.0, len(there) < len(values))

  def _category_column(self, name: str, values: list) -> Category:
    counts = Counter("" if value is None else value for value in values)
    most = self._config.most_categories
    if len(counts) > most:
      rows = sum(n for _, n in counts.most_common()[most:])
      logging.warning("column %s has %d categories in train; %d of its %d rows hold one beyond the "
                      "%d of data.most_categories. An id belongs in data.ignore", name, len(counts),
                      rows, len(values), most)
    return Category(name, tuple(value for value, _ in counts.most_common(most)))

  def _value(self, value) -> str | None:
    """Returns a value as text without blanks around; None where it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
      return None
    if isinstance(value, (bool, np.bool_)):
      value = int(value)
    text = (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()
    return None if text in self._missing else text

  @property
  def model_args(self) -> dict:
    """What a model has to be like to read these rows."""
    gaps = sum(column.gaps for column in self.numbers)
    return {"shape": {"model_type": "tabular", "numbers": len(self.numbers) + gaps,
                      "cardinalities": [len(column.values) for column in self.categories]}}

  # Rows to examples.

  def __call__(self, row: dict) -> dict[str, np.ndarray]:
    """Returns numbers (n,) float32, standardised, and categories (k,) int32.

    Raises:
      RowError: a column is not there, or a numeric one holds something else.
    """
    record = row["record"]
    for column in (*self.numbers, *self.categories):
      if column.name not in record:
        raise errors.RowError(f"no column {column.name!r}, which the model reads")
    numbers, gaps, lacking = [], [], False
    for column in self.numbers:
      text = self._value(record[column.name])
      value = column.mean if text is None else _number(text)
      if value is None:
        raise errors.RowError(f"{column.name} is {text!r}, no number")
      numbers.append((value - column.mean) / column.sd)
      gaps += [float(text is None)] * column.gaps
      lacking |= text is None
    values = [self._value(record[column.name]) for column in self.categories]
    codes = [known.get(value or "", 0) for known, value in zip(self._codes, values, strict=True)]
    self.counts[_UNKNOWN] += 0 in codes
    self.counts[_MISSING] += lacking or None in values
    return {"numbers": np.array([*numbers, *gaps], np.float32),
            "categories": np.array(codes, np.int32)}

  def show(self, example: dict) -> str:
    """Returns one line about an example for log and card."""
    numbers = [f"{column.name} {column.mean + column.sd * value:.4g} ({value:+.2f} sd)"
               for column, value in zip(self.numbers, example["numbers"], strict=False)]
    words = [f"{column.name} {(column.values[code - 1] or '(missing)') if code else '(unknown)'}"
             for column, code in zip(self.categories, example["categories"], strict=True)]
    return ", ".join([*numbers, *words])

  # Prediction.

  def read_rows(self, source: str) -> Iterator[dict]:
    """Yields rows to predict on.

    Args:
      source: a table like the run's, with or without its label; "-": CSV with a header, or JSON
        lines, on standard input. A column `id` is repeated in the answers.

    Raises:
      UserError: the file cannot be read.
    """
    if source == "-":
      with sources.standard_input() as path:
        yield from list(_records(sources.written(), path))
    else:
      yield from _records(sources.written(**self._files), source)

  def try_it(self, folder) -> str:
    """Returns the command that predicts on a row with the run in a folder."""
    record = {column.name: round(column.mean, 4) for column in self.numbers}
    record |= {column.name: column.values[0] for column in self.categories}
    return (f"echo {shlex.quote(json.dumps(record))} | python scripts/predict.py "
            f"--run={shlex.quote(str(folder))} --input=-")

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON: the statistics of train too."""
    return {"modality": "table", "numbers": [dataclasses.asdict(x) for x in self.numbers],
            "categories": [{"name": x.name, "values": list(x.values)} for x in self.categories],
            "missing": list(self._missing),
            "files": {key: list(value) if isinstance(value, (list, tuple)) else value
                      for key, value in self._files.items()}}

  @classmethod
  def from_spec(cls, spec: dict, folder=None) -> "Preprocess":
    """Rebuilds the preprocessing of a run for prediction."""
    del folder
    self = cls.__new__(cls)
    self._settle([Number(**x) for x in spec["numbers"]],
                 [Category(x["name"], tuple(x["values"])) for x in spec["categories"]],
                 tuple(spec["missing"]), spec["files"])
    return self


def _number(text: str) -> float | None:
  """Returns a text as a finite number; None where it is none."""
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None


from_spec = Preprocess.from_spec


def _records(written, source: str) -> Iterator[dict]:
  """Yields the rows of a table that is written so, to predict on."""
  _, table, indices = sources.table(written, source)
  for i in indices:
    record = table.records[int(i)]
    yield {"record": record, **({"id": record["id"]} if record.get("id") is not None else {})}
