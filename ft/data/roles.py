"""Rows of a table by their roles: what tasks and preprocessings read, whatever its columns are."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import numpy as np

from ft import errors
from ft.data import formats

ANSWERS = ("prompt", "chosen", "rejected", "completion")
ROLES = ("text", "text_b", "negative", "words", "target", "turns", *ANSWERS, "label", "image",
         "mask", "audio", "group", "id")
TEXTS = ("text", "text_b", "negative", "target")
INPUTS = ("text", "text_b", "words", "turns", "image", "audio")
FILES = ("image", "audio")
# modality -> roles, one is needed
MODALITY = {"text": ("text", "words", "turns", "chosen", "completion"), "image": ("image",),
            "audio": ("audio",)}


@dataclasses.dataclass(frozen=True)
class Rows:
  """Some rows of one source: `rows[i]` is a dict role -> value, `rows.where(i)` where it stands.

  Values: text, text_b, negative (what text_b is better than) and target str; words a list of str;
  turns a list, see ft.data.turns; prompt, chosen, rejected and completion str or a list, see
  ft.data.answers; label str, int or a list of them (None: there is none); image and audio a Path,
  encoded bytes or an array, mask too (None: nothing is marked); group and id as in the source;
  attributes a dict column -> str ("" where there is no value) of those that the source has (those
  it lacks are in `absent`); of tables also record, a dict of all columns that have no role and
  are not in data.ignore.
  """

  name: str
  table: formats.Table
  roles: dict[str, str]
  indices: np.ndarray
  binarize: dict | None = None
  attributes: tuple[str, ...] = ()
  whole: bool = False
  label_strip: str = ""
  absent: tuple[str, ...] = ()
  ignored: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, i: int) -> dict[str, Any]:
    record = self.table.records[int(self.indices[i])]
    row = {role: record.get(column) for role, column in self.roles.items()}
    for role in TEXTS:
      if role in row:
        row[role] = _text(row[role])
    for role in ANSWERS:
      if isinstance(row.get(role), bytes):
        row[role] = _text(row[role])
    if self.binarize:
      row["label"] = self.binarize["labels"][self.rating(i) > self.binarize["at"]]
    elif "label" in row:
      row["label"] = _label(row["label"], self.label_strip)
    if self.attributes:
      row["attributes"] = {column: _text(record.get(column)).strip()
                           for column in self.attributes}
    if self.whole:
      taken = {*self.roles.values(), (self.binarize or {}).get("column"), *self.ignored}
      row["record"] = {column: record.get(column) for column in self.table.columns
                       if column not in taken}
    for role in (*FILES, "mask"):
      if isinstance(row.get(role), str):
        row[role] = (self.table.folder or pathlib.Path()) / row[role] if row[role] else None
    return row

  def where(self, i: int) -> str:
    """Returns where row i stands, such as `reviews.csv: line 17`."""
    return self.table.where(int(self.indices[i]))

  def select(self, indices, name: str = "") -> "Rows":
    """Returns the rows at these positions, in this order."""
    indices = np.asarray(indices, int)
    chosen = dataclasses.replace(self, indices=self.indices[indices], name=name or self.name)
    if self.__dict__.get("labels"):  # known by now, and reading them again may be slow
      chosen.__dict__["labels"] = [self.labels[i] for i in indices]
    return chosen

  def rating(self, i: int) -> float:
    """Returns the number that `binarize` makes row i's label from (NaN where there is none)."""
    value = self.table.records[int(self.indices[i])].get(self.binarize["column"])
    if value is None or value == "":
      return math.nan
    try:
      return float(value)
    except (TypeError, ValueError):
      raise errors.UserError(f"{self.where(i)}: {self.binarize['column']} is {value!r}, and "
                             "data.binarize needs a number there.") from None

  @functools.cached_property
  def labels(self) -> list | None:
    """The label of each row; None where the source has no labels."""
    return [row["label"] for row in self] if self.binarize or "label" in self.roles else None

  @property
  def classes(self) -> list | None:
    """The labels, where they divide the rows into classes: no measured values, no tags of words."""
    measured = any(isinstance(label, float) for label in self.labels or ())
    return None if measured or "words" in self.roles else self.labels


def _text(value) -> str:
  if isinstance(value, bytes):
    return value.decode("utf-8", "replace")
  return "" if value is None else str(value)


def _label(value, strip: str = ""):
  """Returns a label as str, int, float or a list of them; None where there is none.

  Args:
    strip: characters taken off both ends of a text.
  """
  if isinstance(value, np.ndarray):
    value = value.tolist()
    while isinstance(value, list) and len(value) == 1:
      value = value[0]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, (list, tuple)):
    return [_label(v, strip) for v in value]
  if isinstance(value, (str, bytes)):
    return _text(value).strip().strip(strip).strip() or None
  if isinstance(value, float):
    return None if math.isnan(value) else int(value) if value.is_integer() else value
  return int(value) if isinstance(value, bool) else value
