"""The card: the honest account of a run, as card.json, as card.html and as a few terminal lines."""

import contextlib
import hashlib
import json
import os
import pathlib
import secrets

import numpy as np

from ft import errors
from ft.card import html, schema, seeds, words

JSON, HTML = "card.json", "card.html"


def write(record, folder):
  """Writes card.json and card.html into the folder, each whole or not at all.

  Args:
    record: see `ft/card/schema.py`; numpy values, NaN and tuples are welcome.
    folder: an existing folder.

  Returns:
    (path of card.json, path of card.html).

  Raises:
    errors.UserError: the record breaks the schema (all faults named), or the folder cannot be
      written; nothing is left half-written.
  """
  record = schema.normalise(record)
  schema.validate(record)
  folder = pathlib.Path(folder)
  text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
  # From the text, so that rebuilding the page from card.json gives the same page; and the page
  # first, so that a card.json is never newer than the page that shows it.
  page = write_text(folder / HTML, html.page(json.loads(text)))
  return write_text(folder / JSON, text), page


def read(folder):
  """The valid record of a run's folder (or of a card.json itself).

  Raises:
    errors.UserError: there is no card, or it is no card of this schema.
  """
  path = pathlib.Path(folder)
  path = path / JSON if path.is_dir() else path
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise errors.UserError(
        f"{path} does not exist; a run writes it when it ends") from None
  except OSError as error:
    raise errors.UserError(f"cannot read {path}: {error.strerror}") from None
  except ValueError as error:  # Also what json and UTF-8 decoding raise.
    raise errors.UserError(f"{path} is not a card: {error}") from None
  try:
    schema.validate(record)
  except errors.UserError as error:
    raise errors.UserError(f"{path}: {error}") from None
  return record


def summary(record):
  """The card in at most 12 terminal lines: results by split with intervals, then the verdicts."""
  record = schema.normalise(record)
  metric, results = record["task"]["metric"], record.get("results") or {}
  splits = words.splits_in_order(record)
  names = words.rows_in_order({key: 0 for split in splits for key in results[split]})
  table = [[words.unit(metric), *splits]]
  for key in names:
    cells = [results[split].get(key) for split in splits]
    table.append([words.row_name(key), *[_cell(entry, metric) for entry in cells]])
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
           for row in table]
  if record["task"].get("protocol"):
    lines.append(f"({record['task']['protocol']})")
  if seeds.line(record):
    lines.append(seeds.line(record))
  found = [sentence for *_, sentence in words.verdicts(record)]
  room = 12 - len(lines)
  if len(found) > room:
    found = found[:room - 1] + [f"{len(found) - room + 1} more splits are on the card."]
  return "\n".join(lines + found)


def fingerprint(rows):
  """Hash of a split's rows in order: equal for equal rows, whatever file they came from.

  Args:
    rows: iterable of dicts of role -> str, number, bytes, array or path (of a path only
      its name counts).

  Returns:
    Hex digest (str, 16 characters).
  """
  digest = hashlib.sha256()
  for row in rows:
    for role in sorted(row):
      value = row[role]
      if isinstance(value, pathlib.Path):
        value = value.name
      if isinstance(value, np.ndarray):
        value = f"{value.shape}{value.dtype}".encode() + value.tobytes()
      data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace")
      digest.update(f"{role}:{len(data)}:".encode() + data)
    digest.update(b"\n")
  return digest.hexdigest()[:16]


def write_text(path, text):
  """Writes a UTF-8 file whole or not at all; returns its path.

  Raises:
    errors.UserError: the file cannot be written.
  """
  path = pathlib.Path(path)
  draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    with open(draft, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(draft, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      draft.unlink()
    raise errors.UserError(f"cannot write {path}: {error.strerror or error}") from None
  return path


def _cell(entry, metric):
  if entry is None:
    return "–"
  pair = words.interval((entry.get("interval") or {}).get(metric), metric)
  return f"{words.number(entry['metrics'].get(metric), metric)} {pair}".strip()
