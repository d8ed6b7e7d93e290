"""CoNLL files: a word and its tags a line, an empty line behind each sentence.

A sentence is a row whose columns hold lists, one value a word. Fields stand apart by tabs where a
line has any, else by white space. Columns are called 0, 1, … or as data.names says; the first holds
the words and the last the labels, if data.columns says nothing else. Lines -DOCSTART- (Tjong Kim
Sang and De Meulder 2003) and comments, which start with # and have other fields than words have,
are left out.
"""

import pathlib

from ft import errors
from ft.data.formats import Options, Table, lines

FORMATS = ("conll",)
SUFFIXES = dict.fromkeys((".conll", ".bio", ".bilou", ".iob", ".iob2"), "conll")


def read(path: pathlib.Path, options: Options) -> Table:
  """Reads a file, or one compressed by gzip.

  Raises:
    UserError: a line has other fields than the first word, or data.names has.
  """
  with lines.decoded(path, options) as file:
    sentences, starts = _sentences(file, options)
  width = len(sentences[0][0]) if sentences else 0
  names = tuple(options.names) or tuple(str(i) for i in range(width))
  records = [dict(zip(names, map(list, zip(*words, strict=True)), strict=True))
             for words in sentences]
  roles = {"words": names[0], "label": names[-1]} if width > 1 else {}
  return Table(options.display, names, records,
               lambda i: f"{options.display}: line {starts[i]}", path.parent, roles)


def _sentences(file, options: Options) -> tuple[list, list[int]]:
  """Returns the fields of each word of each sentence, and the line that each sentence starts at."""
  width, sentences, starts, words = len(options.names), [], [], []
  for number, line in enumerate(file, 1):
    line = line.rstrip("\r\n")
    fields = line.split("\t") if "\t" in line else line.split()
    if not line.strip() or fields[0] == "-DOCSTART-":
      words = []
      continue
    if line.startswith("#") and (not width or len(fields) != width):
      continue
    width = width or len(fields)
    if len(fields) != width or not fields[0].strip():
      raise errors.UserError(
          f"{options.display}: line {number} has {len(fields)} fields, and "
          f"{'data.names' if options.names else 'the first word'} has {width}: each line should be "
          "a word and its tags, and an empty line should end a sentence.")
    if not words:
      sentences.append(words)
      starts.append(number)
    words.append([field.strip() for field in fields])
  return sentences, starts
