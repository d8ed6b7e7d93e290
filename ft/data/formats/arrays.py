"""Columns in binary files: npz archives of arrays, and Parquet."""

import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np

from ft import errors
from ft.data.formats import Options, Table

FORMATS = ("npz", "parquet")
SUFFIXES = {".npz": "npz", ".parquet": "parquet", ".pq": "parquet"}


class _Columns(Sequence):
  """Arrays of one length, seen as rows."""

  def __init__(self, columns: dict[str, np.ndarray]):
    self._columns = columns

  def __len__(self):
    return min(map(len, self._columns.values()), default=0)

  def __getitem__(self, i):
    return {name: column[i] for name, column in self._columns.items()}


def read(path: pathlib.Path, options: Options) -> Table:
  """Reads an npz archive (one of its splits) or a Parquet file."""
  if options.format == "npz":
    return _read_npz(path, options)
  return _read_parquet(path, options)


def _read_npz(path: pathlib.Path, options: Options) -> Table:
  """`split` chooses the arrays named `<split>_<column>`; plural column names lose their `s`."""
  try:
    with np.load(path, allow_pickle=False) as archive:
      names = [n for n in archive.files if n.startswith(f"{options.split}_") or not options.split]
      columns = {n.removeprefix(f"{options.split}_"): archive[n] for n in names}
      there = archive.files
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, KeyError) as e:
    raise errors.UserError(
        f"{options.display} is no readable npz archive of plain arrays: {e}") from e
  splits = sorted({n.partition("_")[0] for n in there if "_" in n})
  if not columns or any(c.ndim == 0 for c in columns.values()):
    raise errors.UserError(f"{options.display}: no arrays for the split {options.split!r}; it "
                           f"holds {', '.join(there)}.")
  lengths = {name: len(column) for name, column in columns.items()}
  if len(set(lengths.values())) > 1:
    hint = f" Name a split: {path.name}:{splits[0]}." if splits and not options.split else ""
    raise errors.UserError(f"{options.display}: its arrays differ in length: {lengths}.{hint}")
  roles = {role: name for role in ("image", "label", "text", "group", "id")
           for name in (f"{role}s", role) if name in columns}
  where = f"{options.display}: row "
  return Table(options.display, tuple(columns), _Columns(columns), lambda i: f"{where}{i}",
               path.parent, roles)


def _read_parquet(path: pathlib.Path, options: Options) -> Table:
  try:
    import pyarrow  # slow to import, and only needed here
    import pyarrow.parquet
  except ImportError as e:
    raise errors.UserError(f"{options.display}: reading Parquet needs pyarrow: "
                           "pip install pyarrow") from e
  try:
    content = pyarrow.parquet.ParquetFile(path).read()
  except (pyarrow.ArrowException, OSError) as e:
    raise errors.UserError(f"{options.display} is no readable Parquet file: {e}") from e
  where = f"{options.display}: row "
  return Table(options.display, tuple(content.column_names), content.to_pylist(),
               lambda i: f"{where}{i}", path.parent)
