"""What users chose, as sequences of items: (user, item, time[, rating]) tables for recommenders.

A user is known by history alone: there are no parameters of users, so one that train never had is
served like any other. An item needs a row of the model's item table; `items.json` beside its
weights lists them. Items without one stop a run, or are left out as data.unseen_items says; at
prediction they are left out and named in the answer. Row 0 is padding.
Shapes: T items of a history that the model reads, V rows of the item table.
"""

import json
import pathlib
import shlex
import types
from collections.abc import Iterator

import numpy as np

from ft import errors, models
from ft.data import histories, sources, splits
from ft.data.fixed import Fixed

KEYS = {
  "split": ("leave-one-out", "each user's last interaction is test and the one before validation; "
            "or time: all users are cut at two points in time, by the fractions",
            ["leave-one-out", "time"]),
  "k_core": (0, "fewest interactions of each user and each item; others are left out, until all "
             "have as many", (0, None)),
  "min_rating": (None, "interactions rated lower are left out; empty: all count", "float"),
  "unseen_items": ("error", "items that the model has no row for: stop, or leave them out",
                   ["error", "drop"]),
  "history": (0, "newest items of a history that are read; 0: as many as the model reads",
              (0, None)),
  "stride": (0, "targets that a training row teaches; 0: as many as it reads; fewer give each more "
             "of its past", (0, None)),
  "padding_side": ("left", "where short histories are filled up: right for models of RecBole",
                   ["left", "right"]),
  "time_format": ("", "how times are written, as strptime has it; empty: ISO 8601"),
}
ITEMS = "items.json"
# Keys of ft/data/sources.py that divide or drop rows in other ways.
_NOT_HERE = ("validation", "test", "binarize", "group", "per_label", "unknown")
_FILES = ("header", "names", "encoding", "quoting")
_SPLITS = {
  "leave-one-out": "leave-one-out: each user's last interaction is test, the one before validation",
  "time": "by time: train before validation before test for all users; a user's first interaction "
          "in a period is the target",
  "last": "each user's last interaction is the target",
}


class Preprocess(Fixed):
  """Turns a history into item ids of one length, and tables into splits.

  Args:
    config: the `data` section.
    info: what models.inspect says.

  Attributes:
    items: (V - 1 or, with a mask, V - 2,) ids; that of row 1 first.
    rows: id -> row.
    size: V.
    window: T.
    mask: row of the mask that stands for the item to be told, of a bidirectional model, or None.
    ranked: (V,) bool, the items that are ranked: those of the run's table; None before `load`.
    chosen: (V,) how often train has each; None before `load`.

  Raises:
    UserError: a key does not fit, or the checkpoint does not say what its items are.
  """

  def __init__(self, config, info):
    for key in _NOT_HERE:
      if config[key]:
        raise errors.UserError(f"data.{key} is of no use with interactions, which data.split "
                               "divides; leave it empty")
    model = models.family_module(info.family).Config.from_hf(info.hf_config)
    most = model.max_position_embeddings
    if config.history > most:
      raise errors.UserError(f"data.history={config.history}: the model reads {most} items; set it "
                             f"to {most} or less")
    items = _items(info.folder)
    mask = model.mask_token_id if model.bidirectional else None
    wanted = len(items) + 1 + (mask is not None)
    if model.vocab_size != wanted or mask not in (None, wanted - 1):
      raise errors.UserError(f"{info.folder / ITEMS} lists {len(items):,} items, and the item "
                             f"table has {model.vocab_size:,} rows; expected are padding, the "
                             "items" + (" and the mask, last" if mask is not None else ""))
    keys = {key: config[key] for key in KEYS}
    keys["columns"] = dict(config.columns.items()) if config.columns else {}
    self._settle(keys, {key: config[key] for key in _FILES}, items, config.history or most, mask)

  def _settle(self, keys: dict, files: dict, items: list, window: int, mask: int | None) -> None:
    self._keys, self._files, self.items = types.SimpleNamespace(**keys), files, items
    self.window, self.mask = window, mask
    self.rows = {item: i for i, item in enumerate(items, 1)}
    self.size = len(items) + 1 + (mask is not None)
    self.ranked = self.chosen = None

  # Tables to rows.

  def load(self, config) -> sources.Data:
    """Returns the splits of a `data` section, in place of `sources.load`.

    A run that is finished gets one split of its training source: each user's last interaction.

    Raises:
      UserError: besides what `histories.read` says, no source, or a split without a row.
    """
    if not config.train:
      raise errors.UserError("data.train is empty; give a table of interactions such as clicks.csv")
    if self.chosen is not None:
      rows, self._keys.split = self.read(config, config.train, name="train"), "last"
      return sources.Data({"train": rows}, {"labels": {}}, {})
    log, stride = self._log(config, config.train), self._keys.stride or self.window
    if self._keys.split == "time":
      shares = config.validation_fraction, config.test_fraction
      if min(shares) <= 0 or sum(shares) >= 1:
        raise errors.UserError("data.split=time needs data.validation_fraction and "
                               "data.test_fraction above 0, and below 1 together")
      found = histories.by_time(log, stride, *shares)
    else:
      found = histories.leave_one_out(log, stride)
    for name, rows in found.items():
      if not len(rows):
        raise errors.UserError(f"{log.source}: {name} has no row: {len(log.users):,} users with "
                               f"{log.size:,} interactions; leave-one-out needs users of three or "
                               "more, time users that act on both sides of a border")
    known = [items[:stop] for items, stop in zip(log.items, found["train"].known, strict=True)]
    self.chosen = np.bincount(np.concatenate(known), minlength=self.size)
    self.ranked = np.bincount(np.concatenate(log.items), minlength=self.size) > 0
    report = self._report(log, found)
    found |= {name: self.read(config, spec, name=name)
              for name, spec in dict(config.extra or {}).items()}
    if config.limit:
      found = {name: rows.select(splits.sample(None, config.limit, config.split_seed, len(rows)))
               for name, rows in found.items()}
    return sources.Data(found, report, {})

  def read(self, config, spec, *, name: str = "input", labelled: bool = True):
    """Returns a row a user of a further source, in place of `sources.read`: the last interaction.

    Raises:
      UserError: see `histories.read`; or no user has two interactions.
    """
    del labelled
    rows = histories.last(self._log(config, spec), name)
    if not len(rows):
      raise errors.UserError(f"{rows.log.source}: no user has two interactions; the last is "
                             "predicted from those before")
    return rows

  def _log(self, config, spec) -> histories.Log:
    own, table, indices = sources.table(config, spec)
    columns = dict(own.columns.items()) if own.columns else {}
    if self.chosen is None:  # of train, which files to predict on are like
      self._keys.columns = columns
    keys = types.SimpleNamespace(**{**vars(self._keys), "columns": columns})
    return histories.read(keys, table, indices, self.rows)

  def _report(self, log: histories.Log, found: dict) -> dict:
    cold = self.ranked & (self.chosen == 0)
    short = sum(len(items) < 3 for items in log.items)
    return {
      "labels": {}, "splits": {name: len(rows) for name, rows in found.items()},
      "interactions": {"users": len(log.users), "items": int(self.ranked.sum()),
                       "interactions": log.size, "of train": int(self.chosen.sum()),
                       "items that train never has": int(cold.sum()),
                       "users of fewer than three interactions": short},
      "left out": log.dropped, "divided": self.divided,
    }

  @property
  def divided(self) -> str:
    """How the splits were made, for people."""
    return _SPLITS[self._keys.split]

  # Rows to examples.

  def __call__(self, row: dict) -> dict[str, np.ndarray]:
    """Returns what is known before the choice; RowError for a history without a known item.

    item_ids (T,) int32, oldest first, the mask last where the model has one; seen (V / 8,) uint8,
    a bit a row of the item table, 1 for items of the whole history.
    """
    history = row["history"]
    if not len(history):
      raise errors.RowError("a history without an item that the model knows")
    ids = history[-self.window:]
    if self.mask is not None:
      ids = [*history[len(history) - min(len(history), self.window - 1):], self.mask]
    return {"item_ids": self._filled(ids), "seen": self._bits(history)}

  def targets(self, row: dict) -> dict[str, np.ndarray]:
    """Returns what follows: targets (T,) int32, 0 where nothing is predicted; target () int32."""
    target = np.int32(row["target"])
    if self.mask is not None:
      size = min(len(row["history"]) + 1, self.window)
      following = [0] * (size - 1) + [target]
    else:
      following = np.append(row["history"][1:], target)[-self.window:]
      following = np.where(np.arange(len(following), 0, -1) <= row["learn"], following, 0)
    return {"targets": self._filled(following), "target": target}

  def _filled(self, ids) -> np.ndarray:
    filled = np.zeros(self.window, np.int32)
    place = slice(len(ids)) if self._keys.padding_side == "right" else slice(-len(ids), None)
    filled[place] = ids
    return filled

  def _bits(self, items) -> np.ndarray:
    seen = np.zeros(self.size, bool)
    seen[items] = True
    return np.packbits(seen)

  def show(self, example: dict) -> str:
    """Returns one line about an example for log and card."""
    ids = example["item_ids"]
    read = [self.name(i) for i in ids[ids > 0]]
    shown = ", ".join(read[-8:])
    return (f"{len(read)} items{', the last' if len(read) > 8 else ''}: {shown}"
            + (f" → {self.name(example['target'])}" if "target" in example else ""))

  def name(self, row: int) -> str:
    """Returns the id of a row of the item table, for people."""
    return "⟦mask⟧" if row == self.mask else self.items[int(row) - 1]

  # Prediction.

  def read_rows(self, source: str) -> Iterator[dict]:
    """Yields rows to predict on: a history each.

    Args:
      source: a table of interactions as the run's, of which each user is a row with an "id"; or one
        with a column `history`, a list of items or a text with spaces between them, oldest first;
        "-": CSV, or JSON lines, on standard input. A row's "unseen_items" are those left out.

    Raises:
      UserError: the file cannot be read.
    """
    if source == "-":
      with sources.standard_input() as path:
        yield from list(self.read_rows(path))
      return
    config = sources.written(**self._files)
    _, table, indices = sources.table(config, source)
    if "history" in table.columns:
      for i in indices:
        given = table.records[int(i)]["history"]
        given = given.split() if isinstance(given, str) else given
        if not isinstance(given, (list, tuple, np.ndarray)):
          yield errors.RowError(f"{table.where(int(i))}: history is {given!r}; it should be a list "
                                "of items, or a text with spaces between them")
          continue
        yield self._row(list(given), {"id": table.records[int(i)].get("id")})
      return
    given = {role: column for role, column in self._keys.columns.items()
             if role in ("user", "item") or column in table.columns}
    roles = histories.columns(given, table)
    ids = histories.names(table, indices, roles["item"], "item")
    # Every item counts here, also those that the run's table did not have.
    every = list(dict.fromkeys(ids))
    least = self._keys.min_rating if "rating" in roles else None
    keys = {**vars(self._keys), "columns": given, "k_core": 0, "min_rating": least}
    log = histories.read(types.SimpleNamespace(**keys), table, indices,
                         {item: i for i, item in enumerate(every)})
    for user, items in zip(log.users, log.items, strict=True):
      yield self._row([every[i] for i in items], {"id": user})

  def _row(self, given: list, row: dict) -> dict:
    names = [histories.name(item) for item in given]
    known = [self.rows[item] for item in names if item in self.rows]
    unseen = [item for item in names if item not in self.rows]
    row = {key: value for key, value in row.items() if value is not None}
    return {"history": np.array(known, np.int32), **row,
            **({"unseen_items": unseen} if unseen else {})}

  def try_it(self, folder) -> str:
    """Returns the command that recommends to the user's own users with the run in a folder."""
    history = json.dumps({"history": self.items[:2]})
    return (f"echo {shlex.quote(history)} | python scripts/predict.py "
            f"--run={shlex.quote(str(folder))} --input=-")

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"modality": "interactions", "keys": vars(self._keys), "files": self._files,
            "items": self.items, "window": self.window, "mask": self.mask,
            "chosen": self.chosen.tolist(), "ranked": self.ranked.astype(int).tolist()}

  @classmethod
  def from_spec(cls, spec: dict, folder=None) -> "Preprocess":
    """Rebuilds the preprocessing of a run for prediction."""
    self = cls.__new__(cls)
    self._settle(dict(spec["keys"]), spec["files"], spec["items"], spec["window"], spec["mask"])
    self.chosen, self.ranked = np.array(spec["chosen"]), np.array(spec["ranked"], bool)
    return self


def _items(folder: pathlib.Path) -> list[str]:
  """Returns the ids that a checkpoint's items.json lists; UserError where there is no such list."""
  path = folder / ITEMS
  if not path.is_file():
    raise errors.UserError(f"{folder} has no {ITEMS}, a JSON list of the items' ids, that of row 1 "
                           "of the item table first; scripts/prepare.py --interactions=TABLE "
                           "--output=FOLDER makes a model with one")
  try:
    items = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as e:
    raise errors.UserError(f"{path} is no readable JSON: {e}") from None
  if not isinstance(items, list) or len(set(map(str, items))) < len(items):
    raise errors.UserError(f"{path} should be a list of ids, each once")
  return [str(item) for item in items]


from_spec = Preprocess.from_spec
