"""Rows of a table: numbers, standardised by train alone, and categories as numbers of their own.

The checkpoint's table.json says which columns are read: {"numbers": [column, …], "categories":
{column: [value, …]}}. A number that is missing is 0 with a mark beside it; a category that is
missing or not in the list is 0. Shapes: F numbers, G categories.
"""

import json
import math
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Iterator

import ml_collections
import numpy as np

from ft import errors
from ft.data import sources
from ft.data.fixed import Fixed

KEYS = {}
TABLE = "table.json"
MISSING = ("", "?", "NA", "NaN", "nan", "null", "None")


class Preprocess(Fixed):
  """A row's `fields`, a dict column -> value, as the model's input; see the top of this file.

  Args:
    config: the `data` section.
    info: what models.inspect says; its folder has table.json.

  Attributes:
    numbers, categories: columns; of categories column -> {value: id from 1}.
    mean, scale: (F,) of the numbers in train; None before `load`.
    counts: {"missing_numbers", "unknown_categories": rows that have any}.

  Raises:
    UserError: there is no table.json, or it is not of the form above.
  """

  def __init__(self, config, info):
    del config
    self._settle(*read_columns(info.folder))

  def _settle(self, numbers, categories, mean=None, scale=None):
    self.numbers = list(numbers)
    self.categories = {name: {value: i for i, value in enumerate(values, 1)}
                       for name, values in categories.items()}
    self.mean, self.scale = mean, scale
    self.counts = {"missing_numbers": 0, "unknown_categories": 0}

  @property
  def columns(self) -> list[str]:
    """The columns that the model reads."""
    return [*self.numbers, *self.categories]

  def load(self, config) -> sources.Data:
    """Returns the splits, rows with "fields"; a run standardises numbers as they are in train."""
    config = ml_collections.ConfigDict({**dict(config.items()), "fields": tuple(self.columns)})
    data = sources.load(config)
    if self.mean is None:
      self._fit(data.splits["train"])
    return data

  def _fit(self, rows) -> None:
    """Settles mean and scale; what is no number here is said when the row is made an example."""
    texts = [[_category(row["fields"][name]) for name in self.numbers] for row in rows]
    values = np.array([[float(text) if _is_number(text) else math.nan for text in row]
                       for row in texts], np.float64).reshape(-1, len(self.numbers))
    known = np.isfinite(values)
    count = np.maximum(known.sum(0), 1)
    self.mean = np.where(known, values, 0).sum(0) / count
    spread = np.sqrt((np.where(known, values - self.mean, 0)**2).sum(0) / count)
    self.scale = np.where(spread > 0, spread, 1.0)

  def __call__(self, row: dict) -> dict:
    """Returns numbers (2 F,) float32 and categories (G,) int32 of a row.

    Raises:
      RowError: a column is not in the row, or a number is none.
    """
    fields = row.get("fields") or {}
    absent = [name for name in self.columns if name not in fields]
    if absent:
      raise errors.RowError(f"no value for {', '.join(absent[:5])}; the model reads "
                            f"{', '.join(self.columns)}")
    values = np.array([_number(fields[name], name) for name in self.numbers], np.float64)
    gone = ~np.isfinite(values)
    scaled = np.where(gone, 0.0, (values - self.mean) / self.scale)
    ids = [known.get(_category(fields[name]), 0) for name, known in self.categories.items()]
    self.counts["missing_numbers"] += bool(gone.any())
    self.counts["unknown_categories"] += 0 in ids
    return {"numbers": np.concatenate([scaled, gone]).astype(np.float32),
            "categories": np.array(ids, np.int32)}

  def show(self, example: dict) -> str:
    """Returns one line about an example for log and card."""
    values = example["numbers"][:len(self.numbers)] * self.scale + self.mean
    names = [{i: value for value, i in known.items()} for known in self.categories.values()]
    said = [f"{name} {value:g}" for name, value in zip(self.numbers, values, strict=True)]
    said += [f"{name} {of.get(int(i), 'unknown')}" for name, i, of in
             zip(self.categories, example["categories"], names, strict=True)]
    return ", ".join(said)

  def read_rows(self, source: str) -> Iterator[dict]:
    """Yields rows to predict on, those of any table with the model's columns.

    Args:
      source: a file such as `ft.data.sources` reads; "-": CSV, or JSON lines, on standard input.

    Raises:
      UserError: it cannot be read, or lacks a column.
    """
    if source == "-":
      text = sys.stdin.read()
      with tempfile.TemporaryDirectory() as folder:
        kind = "jsonl" if text.lstrip().startswith("{") else "csv"
        path = pathlib.Path(folder) / f"standard input.{kind}"
        path.write_text(text)
        yield from list(self.read_rows(str(path)))
      return
    _, table, indices = sources.table(sources.written(), source)
    for name in self.columns:
      sources.need(table, name, "which the model reads")
    for i in indices:
      record = table.records[int(i)]
      yield {"fields": {name: record.get(name) for name in self.columns}}

  def try_it(self, folder) -> str:
    """Returns the command that predicts on rows of the user's own with the run in a folder."""
    few = ", ".join(self.columns[:3]) + (", …" if len(self.columns) > 3 else "")
    return (f"python scripts/predict.py --run={shlex.quote(str(folder))} --input=TABLE "
            f"(with the columns {few})")

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"modality": "table", "numbers": self.numbers,
            "categories": {name: list(of) for name, of in self.categories.items()},
            "mean": self.mean.tolist(), "scale": self.scale.tolist()}

  @classmethod
  def from_spec(cls, spec: dict, folder=None) -> "Preprocess":
    """Rebuilds the preprocessing of a run for prediction, with what train's numbers were like."""
    self = cls.__new__(cls)
    self._settle(spec["numbers"], spec["categories"], np.array(spec["mean"]),
                 np.array(spec["scale"]))
    return self


def read_columns(folder: pathlib.Path) -> tuple[list, dict]:
  """Returns (numbers, categories) of a checkpoint's table.json.

  Raises:
    UserError: there is none, or it is not of the form at the top of this file.
  """
  path = folder / TABLE
  if not path.is_file():
    raise errors.UserError(f"{folder} has no {TABLE}, which says what columns the model reads; "
                           "scripts/prepare.py --table=FILE --output=FOLDER makes a model with one")
  try:
    stated = json.loads(path.read_text(encoding="utf-8"))
    return list(stated["numbers"]), {name: list(of) for name, of in stated["categories"].items()}
  except (ValueError, KeyError, TypeError, AttributeError):
    raise errors.UserError(f'{path} should be {{"numbers": [column, …], "categories": {{column: '
                           "[value, …]}}") from None


def columns(table, indices, leave_out=(), most: int = 1000) -> tuple[list, dict]:
  """Tells the numbers of a table from its categories: what table.json holds.

  A column is of numbers where every value that is there is one; a column of no values, or of one,
  tells rows apart by nothing and is left out.

  Args:
    table: formats.Table. indices: (n,) its rows.
    leave_out: columns that the model must not read, such as the label.
    most: values of a category at the most; beyond, the rarest are unknown.

  Raises:
    UserError: no column is left.
  """
  numbers, categories = [], {}
  for name in table.columns:
    if name in leave_out:
      continue
    values = [_category(table.records[int(i)].get(name)) for i in indices]
    there = [value for value in values if value]
    if len(set(values)) < 2:
      continue
    if there and all(_is_number(value) for value in there):
      numbers.append(name)
    else:
      names, counts = np.unique(there, return_counts=True)
      kept = names[np.sort(np.argsort(-counts, kind="stable")[:most])]
      categories[name] = kept.tolist()
  if not numbers and not categories:
    raise errors.UserError(f"{table.source}: no column to learn from beside "
                           f"{', '.join(leave_out) or 'none'}")
  return numbers, categories


def _category(value) -> str:
  text = "" if value is None else str(value).strip()
  return "" if text in MISSING else text


def _is_number(text: str) -> bool:
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False


def _number(value, name: str) -> float:
  """Returns a number; NaN where there is none."""
  text = _category(value)
  try:
    return float(text) if text else math.nan
  except ValueError:
    raise errors.RowError(f"{name} is {text[:40]!r}; the model reads a number there") from None


from_spec = Preprocess.from_spec
