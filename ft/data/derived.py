"""Labels that a data set does not have but that follow from its other columns, by name.

A rule is (columns that it reads, function of a record -> columns that it adds or replaces). Those
here are of VTAB (Zhai et al. 2019, arXiv:1910.04867), as its public data code defines them.
"""

import collections.abc
import dataclasses
import io

import numpy as np

from ft import errors
from ft.data.formats import Table

VEHICLES = 3  # KITTI's first types: car, van, truck


def clevr_count(record: dict) -> dict:
  """How many objects, less the three that every scene has: 0 to 7."""
  return {"label": len(record["objects"]["size"]) - 3}


def clevr_distance(record: dict) -> dict:
  """How far the closest object is from the camera: 0 to 5."""
  away = np.asarray(record["objects"]["pixel_coords"])[:, 2].min()
  return {"label": _bin(away, (0, 8, 8.5, 9, 9.5, 10, 100))}


def kitti_distance(record: dict) -> dict:
  """How far the closest car, van or truck is: 0 up to 8 m, 1 up to 20 m, 2 beyond, 3 none."""
  kinds = np.asarray(record["objects"]["type"], int)
  away = np.asarray(record["objects"]["location"]).reshape(-1, 3)[kinds < VEHICLES, 2]
  return {"label": _bin(away.min(initial=1000), (-100, 8, 20, 999))}


def dsprites_location(record: dict) -> dict:
  """Which of 16 columns the sprite is in, of 32 positions."""
  return {"label": int(record["label_x_position"]) * 16 // 32, "image": _black_and_white(record)}


def dsprites_orientation(record: dict) -> dict:
  """Which of 16 directions the sprite has, of 40."""
  return {"label": int(record["label_orientation"]) * 16 // 40, "image": _black_and_white(record)}


def _bin(value: float, edges: tuple) -> int:
  """Returns the number of the interval (edge, next edge] that a value is in."""
  return int(np.searchsorted(edges, value)) - 1


def _black_and_white(record: dict) -> np.ndarray:
  """Returns pixels (H, W) uint8, 0 or 255; the data set's are 0 or 1."""
  import PIL.Image
  pixels = record["image"]
  if isinstance(pixels, bytes):
    with PIL.Image.open(io.BytesIO(pixels), formats=("PNG",)) as image:
      pixels = np.asarray(image)
  return (np.asarray(pixels).reshape(pixels.shape[:2]) > 0) * np.uint8(255)


RULES = {
  "clevr-count": (("objects",), clevr_count),
  "clevr-distance": (("objects",), clevr_distance),
  "kitti-distance": (("objects",), kitti_distance),
  "dsprites-location": (("image", "label_x_position"), dsprites_location),
  "dsprites-orientation": (("image", "label_orientation"), dsprites_orientation),
}


class _Records(collections.abc.Sequence):
  """Records with what a rule makes of each, when it is asked for."""

  def __init__(self, records, rule):
    self._records, self._rule = records, rule

  def __len__(self):
    return len(self._records)

  def __getitem__(self, i):
    record = self._records[int(i)]
    return {**record, **self._rule(record)}


def add(table: Table, name: str) -> Table:
  """Returns a table with the label that the rule of this name makes; "": as it is.

  Raises:
    UserError: no such rule, or the table lacks a column that it reads.
  """
  if not name:
    return table
  if name not in RULES:
    raise errors.UserError(f"data.derive={name}: no such rule{errors.suggest(name, RULES)}; there "
                           f"are {', '.join(RULES)}.")
  needed, rule = RULES[name]
  for column in needed:
    if column not in table.columns:
      raise errors.UserError(f"{table.source}: data.derive={name} reads a column {column}, and "
                             f"there are {', '.join(map(str, table.columns))}.")
  columns = tuple(dict.fromkeys((*table.columns, "label")))
  return dataclasses.replace(table, columns=columns, records=_Records(table.records, rule))
