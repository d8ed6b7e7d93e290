"""Plain text files: each line is a row with the column `text`; empty lines are left out."""

import pathlib

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
