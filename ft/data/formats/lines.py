"""Text files: CSV, TSV and JSON lines."""

import contextlib
import csv
import gzip
import json
import pathlib
from collections.abc import Iterator

from ft import errors
from ft.data.formats import Options, Table

FORMATS = ("csv", "tsv", "jsonl")
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
MAX_FIELD = 2**31 - 1


def read(path: pathlib.Path, options: Options) -> Table:
  """Reads a CSV, TSV or JSONL file: every value of a CSV or TSV file is a string."""
  read_rows = _json_rows if options.format == "jsonl" else _delimited_rows
  with decoded(path, options) as file:
    columns, records, lines = read_rows(file, options)
  return Table(options.display, tuple(columns), records,
               lambda i: f"{options.display}: line {lines[i]}", path.parent)


@contextlib.contextmanager
def decoded(path: pathlib.Path, options: Options):
  """Opens a text file for reading, unpacked where its name ends in .gz.

  Raises:
    UserError: what is read of it is not text in the encoding, or not packed as its name says.
  """
  # utf-8-sig also reads what has no byte order mark
  encoding = options.encoding.lower().replace("_", "-")
  encoding = "utf-8-sig" if encoding in ("utf-8", "utf8") else encoding
  try:
    with _opener(path)(path, "rt", encoding=encoding, newline="") as file:
      yield file
  except UnicodeDecodeError as e:
    raise _not_text(path, options) from e
  except LookupError as e:
    raise errors.UserError(f"data.encoding={options.encoding!r} is no encoding: {e}") from e
  except (gzip.BadGzipFile, EOFError) as e:
    raise errors.UserError(f"{options.display} is no whole gzip file: {e}") from e


def _opener(path: pathlib.Path):
  return gzip.open if path.suffix == ".gz" else open


def _delimited_rows(file, options: Options):
  rows = _quoted(file, options) if _has_quotes(options) else _plain(file, options)
  columns, source = list(options.names), "data.names"
  if options.header:
    line, columns = next(rows, (1, []))
    source = "the header"
    if options.names and len(options.names) != len(columns):
      raise errors.UserError(f"{options.display}: data.names has {len(options.names)} names, its "
                             f"header has {len(columns)} columns.")
    columns = list(options.names) or [c.strip() for c in columns]
  records, lines = [], []
  for line, fields in rows:
    if not columns:
      columns, source = [str(i) for i in range(len(fields))], "the first line"
    if len(fields) != len(columns):
      raise errors.UserError(_ragged(options, line, fields, columns, source))
    records.append(dict(zip(columns, fields, strict=True)))
    lines.append(line)
  if len(set(columns)) < len(columns):
    twice = sorted({c for c in columns if columns.count(c) > 1})
    raise errors.UserError(f"{options.display}: columns named twice: {', '.join(twice)}; give each "
                           "its own name in data.names.")
  return columns, records, lines


def _has_quotes(options: Options) -> bool:
  return (options.quoting or {"csv": "standard", "tsv": "none"}[options.format]) == "standard"


def _delimiter(options: Options) -> str:
  return "," if options.format == "csv" else "\t"


def _plain(file, options: Options) -> Iterator[tuple[int, list[str]]]:
  """Yields (line number, fields) of a file in which a quote is a character like any other."""
  for line, text in enumerate(file, 1):
    if text := text.rstrip("\r\n"):
      yield line, text.split(_delimiter(options))


def _quoted(file, options: Options) -> Iterator[tuple[int, list[str]]]:
  """Yields (line a record starts at, fields); a quoted field may hold line breaks."""
  before = csv.field_size_limit(MAX_FIELD)
  reader = csv.reader(file, delimiter=_delimiter(options), strict=True)
  start = 1
  try:
    for fields in reader:
      if fields:
        yield start, fields
      start = reader.line_num + 1
  except csv.Error as e:
    raise errors.UserError(
        f"{options.display}: line {start}: {e}. If quotes are plain characters in this file, set "
        "data.quoting=none.") from e
  finally:
    csv.field_size_limit(before)


def _ragged(options, line: int, fields, columns, source: str) -> str:
  hint = ""
  if _has_quotes(options) and any('"' in f for f in fields):
    hint = " If quotes are plain characters in this file, set data.quoting=none."
  elif len(fields) == 1:
    hint = f" Is it really {options.format} (data.format)?"
  return (f"{options.display}: line {line} has {len(fields)} fields, {source} has {len(columns)} "
          f"({', '.join(columns)}).{hint}")


def _json_rows(file, options: Options):
  columns, records, lines = {}, [], []
  for line, text in enumerate(file, 1):
    if not text.strip():
      continue
    try:
      record = json.loads(text)
    except (ValueError, RecursionError) as e:
      raise errors.UserError(f"{options.display}: line {line} is not JSON: {e}") from e
    if not isinstance(record, dict):
      raise errors.UserError(f"{options.display}: line {line} is {type(record).__name__}, not an "
                             'object such as {"text": …, "label": …}.')
    columns |= dict.fromkeys(record)
    records.append(record)
    lines.append(line)
  return columns, records, lines


def _not_text(path: pathlib.Path, options: Options) -> errors.UserError:
  """Returns the error that says where a file stops being text in its encoding."""
  offset = 0
  with _opener(path)(path, "rb") as file:
    for line, raw in enumerate(file, 1):
      try:
        raw.decode(options.encoding)
      except UnicodeDecodeError as e:
        place = f"line {line}, byte {offset + e.start} (0x{raw[e.start]:02x})"
        break
      offset += len(raw)
    else:
      place = "its end"  # a character that is cut off, or one that holds a line feed byte
    file.seek(0)
    head = file.read(4)
  other = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252 or latin-1"
  return errors.UserError(f"{options.display}: {place}: not {options.encoding} text; set "
                          f"data.encoding to what the file is written in, perhaps {other}.")
