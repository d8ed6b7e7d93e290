"""RecBole's atomic files: a tab-separated table whose header says what each column holds.

`user_id:token	item_id:token	rating:float	timestamp:float`; the kinds are token, float, and
sequences of either (Zhao et al. 2021, arXiv:2011.01731). Columns are called by what stands before
the colon; those of RecBole's own default names have their roles.
"""

import dataclasses
import pathlib

from ft import errors
from ft.data.formats import Options, Table, lines

FORMATS = ("atomic",)
SUFFIXES = {".inter": "atomic"}
_KINDS = ("token", "float", "token_seq", "float_seq")
_ROLES = {"user": "user_id", "item": "item_id", "time": "timestamp", "rating": "rating"}


def read(path: pathlib.Path, options: Options) -> Table:
  """Reads a file, or one compressed by gzip; every value is a string.

  Raises:
    UserError: a line has other fields than the header, or a column of the header has no kind.
  """
  table = lines.read(path, dataclasses.replace(options, format="tsv", header=True, names=()))
  names = {}
  for column in table.columns:
    names[column], _, kind = column.partition(":")
    if kind not in _KINDS:
      raise errors.UserError(f"{options.display}: the column {column!r} of the header should be a "
                             f"name and a kind, {', '.join(_KINDS)}, such as user_id:token; read "
                             "other tables with data.format=tsv or csv")
  records = [{names[column]: value for column, value in record.items()} for record in table.records]
  roles = {role: name for role, name in _ROLES.items() if name in names.values()}
  return dataclasses.replace(table, columns=tuple(names.values()), records=records, roles=roles)
