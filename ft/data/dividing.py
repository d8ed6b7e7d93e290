"""Splits of rows: carved, kept apart, held out and limited, as the config's `data` section says."""

import collections
import pathlib
from collections.abc import Iterable

import numpy as np

from ft import errors
from ft.data import splits
from ft.data.roles import ANSWERS, FILES, MODALITY, Rows

CARVED = {"validation": "validation_fraction", "test": "test_fraction"}


def check_apart(found: dict[str, Rows], group: str) -> None:
  """No row and no group may be in two splits."""
  names = list(found)
  for a, b in ((a, b) for i, a in enumerate(names) for b in names[i + 1:]):
    if found[a].table is found[b].table:
      shared = np.intersect1d(found[a].indices, found[b].indices)
      if len(shared):
        raise errors.UserError(f"{a} and {b} share {len(shared)} rows of {found[a].table.source}; "
                               "give them slices that do not overlap.")
    if group:
      shared = {row["group"] for row in found[a]} & {row["group"] for row in found[b]}
      shared.discard(None)
      if shared:
        raise errors.UserError(
            f"{a} and {b} share {len(shared)} values of {group}, such as {min(map(str, shared))}; "
            "no group may straddle splits (data.group).")


def carve(config, rows: Rows, names: list[str]) -> list[Rows]:
  """Returns `rows` less what is carved from it, then the carved splits."""
  shares = {name: config[CARVED[name]] for name in names if config[CARVED[name]] > 0}
  if not shares:
    return [rows]
  if sum(shares.values()) >= 1:
    raise errors.UserError(
        "data.validation_fraction and data.test_fraction leave nothing to train on.")
  _check_classes(rows)
  groups = [row["group"] for row in rows] if config.group else None
  keys = _identities(rows) if config.keep_duplicates_together else None
  labels = rows.classes if config.stratify else None
  unit = splits.units(groups, keys, size=len(rows))
  shares = {"train": 1 - sum(shares.values()), **shares}
  parts = splits.carve(unit, labels, shares, config.split_seed)
  for name, indices in parts.items():
    if not len(indices):
      what = "groups" if config.group else "rows"
      raise errors.UserError(
          f"{rows.table.source}: too few {what} ({unit.max() + 1}) to carve {name} from; give it a "
          "source of its own or a larger fraction.")
  return [rows.select(indices, name) for name, indices in parts.items()]


def _check_classes(rows: Rows) -> None:
  """A class of one image could be trained on alone: nothing would say what was learnt of it."""
  counts = count(rows.classes or ()) if "image" in rows.roles else {}
  lonely = [label for label, count in counts.items() if count == 1]
  if lonely:
    raise errors.UserError(
        f"{rows.table.source}: there is one image only of {', '.join(lonely[:12])}, so that "
        "none is left to carve validation and test from; add images, take the class out, or name "
        "sources in data.validation and data.test.")


def hold_out(config, found: dict[str, Rows], report: dict) -> dict[str, Rows]:
  """Takes the rows of `data.unknown` out of all splits but `open`, which is test with them."""
  unknown = set(map(str, config.unknown))
  if not unknown:
    return found
  if "test" not in found or "open" in found or found["train"].classes is None:
    raise errors.UserError("data.unknown needs labels, a test split, and no extra one named open.")
  there = set(map(str, found["train"].labels)) | set(map(str, found["test"].labels))
  for label in unknown - there:
    raise errors.UserError(f"data.unknown: no row has the label {label!r}"
                           f"{errors.suggest(label, there)}.")
  result = {}
  for name, rows in found.items():
    result[name] = rows.select([i for i, label in enumerate(rows.labels)
                                if str(label) not in unknown])
    report["dropped"].setdefault(name, {})["of data.unknown"] = len(rows) - len(result[name])
  return {**result, "open": found["test"].select(np.arange(len(found["test"])), "open")}


def few(config, found: dict[str, Rows], report: dict) -> dict[str, Rows]:
  """Keeps `data.per_label` training rows of each label."""
  if not config.per_label:
    return found
  train = found["train"]
  if train.classes is None:
    raise errors.UserError("data.per_label needs a label, one class of each row; set it to 0.")
  kept = train.select(splits.few(train.labels, config.per_label, config.split_seed))
  left_out = len(train) - len(kept)
  report["dropped"].setdefault("train", {})["beyond data.per_label"] = left_out
  return {**found, "train": kept}


def limit(config, found: dict[str, Rows], report: dict) -> dict[str, Rows]:
  """Keeps `data.limit` rows a split, and no label elsewhere that train lost by it."""
  if not config.limit:
    return found
  result = {}
  for name, rows in found.items():
    labels = rows.classes
    if labels and name != "train":
      lost = set(map(str, found["train"].labels)) - set(map(str, result["train"].labels))
      kept = [i for i, label in enumerate(labels) if str(label) not in lost]
      rows = rows.select(kept)
      labels = rows.classes
    result[name] = rows.select(splits.sample(labels, config.limit, config.split_seed, len(rows)))
    left_out = len(found[name]) - len(result[name])
    report["dropped"].setdefault(name, {})["beyond data.limit"] = left_out
  return result


def _identities(rows: Rows) -> list[bytes | None]:
  """Returns a key per row that exact duplicates share."""
  paths = [next((row[role] for role in FILES if isinstance(row.get(role), pathlib.Path)), None)
           for row in rows]
  files = {path for path in paths if path and path.is_file()}
  sizes = collections.Counter(path.stat().st_size for path in files)
  keys = []
  for i, row in enumerate(rows):
    value = [row[role] for role in ("text", "text_b", *FILES) if row.get(role) is not None]
    value += [repr(row[role]) for role in ("turns", "words", "record", *ANSWERS) if role in row]
    if paths[i] in files:  # only files of one size can be equal, so only those are read
      path = paths[i]
      value = path.read_bytes() if sizes[path.stat().st_size] > 1 else str(path)
    keys.append(b"".join(map(splits.identity, value if isinstance(value, list) else [value])))
  return keys


def duplicates(found: dict[str, Rows]) -> dict[str, int]:
  """Counts rows of other splits whose text has an exact duplicate in train."""
  roles = set(found["train"].roles)
  if not set(MODALITY["text"]) & roles or set(FILES) & roles:
    return {}
  known = set(_identities(found["train"]))
  return {name: sum(key in known for key in _identities(rows))
          for name, rows in found.items() if name != "train"}


def count(labels: Iterable) -> dict[str, int]:
  counts = collections.Counter()
  for label in labels:
    counts.update(map(str, label if isinstance(label, (list, tuple)) else [label]))
  return dict(sorted(counts.items()))
