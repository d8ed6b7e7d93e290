"""The card: the honest account of a run, as card.json, card.html, README.md and terminal lines."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import secrets

import numpy as np
from absl import logging

from ft import errors
from ft.card import html, readme, schema, seeds, words

JSON, HTML = "card.json", "card.html"
# Of the summary: lines, columns of splits, characters of a guard's line.
_LINES, _COLUMNS, _WIDTH = 10, 6, 160


def write(record, folder):
  """Writes card.json and card.html into the folder, each whole or not at all.

  Where the folder has exported weights in `model/` or `adapter/`, README.md there is the same card
  for the Hugging Face Hub; what goes wrong with it is logged and costs no card.

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
  record = json.loads(text)
  page = write_text(folder / HTML, html.page(record))
  try:
    readme.write_beside(record, folder)
  except Exception:  # noqa: BLE001  a finished run must not lose its card for this copy of it
    logging.exception("%s: README.md of the exported weights could not be written", folder)
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
  """The card on the terminal: results by split with intervals, then the verdicts.

  Ten lines, or more where the table alone leaves less than four of them; what does not fit is
  named by a line of its own.
  """
  record = schema.normalise(record)
  lines = _results(record)
  if "test" in (record.get("results") or {}):
    lines.append(words.verdict(record, "test"))
  lines += [line for line in (words.elsewhere(record),) if line]
  found = words.tally(record)
  raised = [label for verdict in ("alarm", "warning") for label in found.pop(verdict, ())]
  rest = "; ".join(f"{verdict}: {', '.join(labels)}" for verdict, labels in found.items())
  room = max(_LINES - len(lines) - bool(rest), 2)
  shown = raised if len(raised) <= room else raised[:room - 1]
  for label in shown:
    guard = record["guards"][label]
    lines.append(words.shortened(f"{guard['verdict']}, {label}: {guard['words']}", _WIDTH))
  if len(shown) < len(raised):
    more = ", ".join(f"{label} ({record['guards'][label]['verdict']})"
                     for label in raised[len(shown):])
    lines.append(f"raised too: {more}")
  if rest:
    lines.append(f"{rest[0].upper()}{rest[1:]} (why is in {HTML})")
  return "\n".join(lines)


def _results(record):
  """The table of results as aligned lines, and the protocol."""
  metric, results = record["task"]["metric"], record.get("results") or {}
  splits = words.splits_in_order(record)
  names = words.rows_in_order({key: 0 for split in splits for key in results[split]})
  shown, hidden = splits[:_COLUMNS], len(splits[_COLUMNS:])
  table = [[words.unit(metric), *shown, *[f"({hidden} more in {HTML})"] * bool(hidden)]]
  for key in names:
    cells = [results[split].get(key) for split in shown]
    table.append([words.row_name(key), *[_cell(entry, metric) for entry in cells]])
  widths = [max(len(row[i]) for row in table) for i in range(len(shown) + 1)]
  lines = ["  ".join(cell.ljust(width) for cell, width in
                     itertools.zip_longest(row, widths, fillvalue=0)).rstrip() for row in table]
  if record["task"].get("protocol"):
    lines.append(f"({record['task']['protocol']})")
  if seeds.line(record):
    lines.append(seeds.line(record))
  return lines


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
