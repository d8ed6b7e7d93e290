"""Plain text files: each line is a row with the column `text`; empty lines are left out.

Two files of parallel lines, a source text and its target, are one table: see `pair`.
"""

import dataclasses
import pathlib

from ft import errors
from ft.data.formats import Options, Table, lines

FORMATS = ("text",)
# Parallel corpora name their files by language: train.en, train.de.
_LANGUAGES = ("ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl "
              "pt ro ru sk sl sr sv sw ta th tr uk ur vi zh").split()
SUFFIXES = {".txt": "text"} | {f".{code}": "text" for code in _LANGUAGES}


def read(path: pathlib.Path, options: Options) -> Table:
  """Reads a text file, or one compressed by gzip."""
  with lines.decoded(path, options) as file:
    rows = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
  return Table(options.display, ("text",), [{"text": line.rstrip("\r\n")} for _, line in rows],
               lambda i: f"{options.display}: line {rows[i][0]}", path.parent)


def pair(paths: tuple[pathlib.Path, pathlib.Path], names: tuple[str, str],
         options: Options) -> Table:
  """Reads two files whose lines belong together: columns `text` and `target`.

  Args:
    paths: of the source texts and of their targets; either may be compressed by gzip.
    names: what to call the two in messages.
    options: the encoding.

  Lines that are empty in both files are left out.

  Raises:
    UserError: the files have not the same number of lines, or hold none.
  """
  sides = []
  for path, name in zip(paths, names, strict=True):
    with lines.decoded(path, dataclasses.replace(options, display=name)) as file:
      sides.append([line.rstrip("\r\n") for line in file])
  count, other = map(len, sides)
  if count != other:
    raise errors.UserError(
        f"{names[0]} has {count:,} lines, {names[1]} has {other:,}: line i of one has to be the "
        "translation of line i of the other.")
  rows = [(number, text, target) for number, (text, target) in
          enumerate(zip(*sides, strict=True), 1) if text.strip() or target.strip()]
  if not rows:
    raise errors.UserError(f"{names[0]} and {names[1]} hold no rows.")
  return Table(options.display, ("text", "target"),
               [{"text": text, "target": target} for _, text, target in rows],
               lambda i: f"{names[0]} and {names[1]}: line {rows[i][0]}", paths[0].parent)
