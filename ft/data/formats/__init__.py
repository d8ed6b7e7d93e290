"""Readers of data files: each gives a `Table`, and says exactly where bad input stands.

A format is a module here with `FORMATS` (its names), `SUFFIXES` (suffix -> name) and
`read(path, options) -> Table`; adding one touches no other file.
"""

import dataclasses
import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from ft import errors
from ft.weights import resolve

_FOLDERS = ("tfds", "images", "audio")  # formats that need not be one file


@dataclasses.dataclass(frozen=True)
class Options:
  """How to read a file; see the keys of the same names in ft/data/sources.py."""

  format: str = ""
  split: str = ""  # of a container that holds several (npz, TFDS)
  header: bool = True
  names: tuple[str, ...] = ()
  encoding: str = "utf-8"
  quoting: str = ""
  display: str = ""  # what to call the source in messages


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of one source: `records[i]` is a dict column -> value, `where(i)` says where it stands."""

  source: str
  columns: tuple[str, ...]
  records: Sequence[dict[str, Any]]
  where: Callable[[int], str]
  folder: pathlib.Path | None = None  # what relative paths in the rows start from
  roles: dict[str, str] = dataclasses.field(default_factory=dict)  # the format's own defaults


@functools.cache
def _formats() -> tuple[dict[str, str], dict[str, str]]:
  """Returns format -> module and suffix -> format."""
  modules, suffixes = {}, {}
  for info in pkgutil.iter_modules(__path__):
    module = importlib.import_module(f"{__name__}.{info.name}")
    modules |= dict.fromkeys(module.FORMATS, info.name)
    suffixes |= module.SUFFIXES
  return modules, suffixes


def read(path: pathlib.Path | str, options: Options) -> Table:
  """Reads one source.

  Args:
    path: a file or folder, or for the format "tfds" the name or folder of the data set.
    options: how; an empty `format` means "by the suffix; a folder holds images".

  Raises:
    UserError: not there, unknown format, empty, or malformed (names file and line).
  """
  modules, suffixes = _formats()
  name = options.format
  if name != "tfds":
    path = pathlib.Path(path)
    if not path.exists():
      raise resolve.missing(path)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    name = name or ("images" if path.is_dir() else suffixes.get(suffix.lower(), ""))
  display = options.display or str(path)
  if name not in modules:
    raise errors.UserError(
        f"{display}: its format cannot be told from its name; set data.format to one of "
        f"{', '.join(sorted(modules))}.")
  if name not in _FOLDERS and not path.is_file():
    raise errors.UserError(f"{display} is a folder, and data.format={name} needs a file.")
  if name not in _FOLDERS and path.stat().st_size == 0:
    raise errors.UserError(f"{display} is empty.")
  module = importlib.import_module(f"{__name__}.{modules[name]}")
  table = module.read(path, dataclasses.replace(options, format=name, display=display))
  if not len(table.records):
    raise errors.UserError(f"{display} holds no rows.")
  return table
