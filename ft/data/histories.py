"""Tables of (user, item, time), read as what each user chose, oldest first, and cut into splits.

Shapes: N rows of a split, U users, n interactions of one of them, V rows of the item table.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from absl import logging

from ft import errors
from ft.data import sources, timeline

ROLES = ("user", "item", "time", "rating")
# Columns that have a role where nothing says otherwise.
_COLUMNS = {
  "user": ("user", "user_id", "userId", "customer_id"),
  "item": ("item", "item_id", "itemId", "movieId", "product_id"),
  "time": ("time", "timestamp", "date", "datetime"), "rating": ("rating",),
}


@dataclasses.dataclass(frozen=True)
class Log:
  """What users chose.

  Attributes:
    users: (U,) their ids.
    items: of each user (n,) int32 rows of the item table, oldest first; equal times as in the file.
    ticks: of each user (n,) times as numbers.
    source: what they were read from.
    dropped: reason -> interactions that were left out.
  """

  users: list[str]
  items: list[np.ndarray]
  ticks: list[np.ndarray]
  source: str
  dropped: dict[str, int]

  @property
  def size(self) -> int:
    return sum(map(len, self.items))


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Rows of a split; each is a history and the item that follows it.

  Attributes:
    name: of the split.
    log: of all splits.
    places: (N, 3) a user's number, the position of the target among the user's items, and how many
      targets the row teaches, it and those before.
    known: (U,) how many of a user's interactions belong to train.
  """

  name: str
  log: Log
  places: np.ndarray
  known: np.ndarray

  roles = ROLES[:3]

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, i: int) -> dict:
    user, stop, learn = map(int, self.places[i])
    items = self.log.items[user]
    return {"history": items[:stop], "target": int(items[stop]), "learn": learn,
            "user": self.log.users[user]}

  def where(self, i: int) -> str:
    return f"{self.log.source}: user {self.log.users[self.places[i][0]]}"

  def select(self, indices) -> "Sequences":
    """Returns the rows at these positions."""
    return dataclasses.replace(self, places=self.places[np.asarray(indices, int)])


# ---- Reading -------------------------------------------------------------------------------------


def columns(given, table, needed=("user", "item")) -> dict[str, str]:
  """Returns role -> column of a table: as the config says, else by the format, else by its name.

  Raises:
    UserError: a role that there is not, or a column that the table lacks.
  """
  given = dict(given.items()) if given else {}
  for role, column in given.items():
    if role not in ROLES:
      raise errors.UserError(f"data.columns.{role}: interactions have no such role"
                             f"{errors.suggest(role, ROLES)}; roles are {', '.join(ROLES)}")
    sources.need(table, column, f"data.columns.{role}")
  found = {}
  for role, names in _COLUMNS.items():
    there = [name for name in names if name in table.columns][:1]
    chosen = given.get(role) or table.roles.get(role) or next(iter(there), None)
    if chosen:
      found[role] = chosen
    elif role in needed:
      raise errors.UserError(f"{table.source}: no column for the {role}; set data.columns.{role} "
                             f"to one of {', '.join(map(str, table.columns))}")
  return found


def name(value) -> str:
  """Returns the id of a user or an item as text, "" where there is none."""
  if isinstance(value, (float, np.floating)) and float(value).is_integer():
    value = int(value)  # such as a column of whole numbers that lacks some
  return "" if value is None or value != value else str(value).strip()


def names(table, indices, column: str, role: str) -> list[str]:
  """Returns the ids (n,) of a column; UserError where one is empty."""
  found = [name(table.records[int(i)].get(column)) for i in indices]
  if "" in found:
    raise errors.UserError(f"{table.where(int(indices[found.index('')]))}: the {role} in column "
                           f"{column} is empty; each interaction needs one")
  return found


def read(config, table, indices, rows: Mapping[str, int]) -> Log:
  """Reads interactions, the rarely met left out.

  Args:
    config: time_format, min_rating, k_core and unseen_items of ft/data/interactions.py, columns.
    table: formats.Table.
    indices: (n,) its rows to read.
    rows: item -> its row of the item table.

  Raises:
    UserError: a column is missing, an id is empty, a time or rating is none, items that the model
      does not know while unseen_items is "error", or nothing is left.
  """
  roles, dropped = columns(config.columns, table), {}
  if config.min_rating is not None:
    kept = _rated(config.min_rating, roles, table, indices)
    dropped["rated below data.min_rating"] = len(indices) - len(kept)
    indices = kept
  items = names(table, indices, roles["item"], "item")
  known = np.array([item in rows for item in items], bool)
  if not known.all() and config.unseen_items == "error":
    missing = sorted({item for item in items if item not in rows})
    raise errors.UserError(
      f"{table.source}: {len(missing):,} of its items are not among the {len(rows):,} of the "
      f"model, such as {missing[0]!r}; scripts/prepare.py --interactions={table.source} "
      "--start=MODEL makes a model with rows for them, data.unseen_items=drop leaves their "
      "interactions out")
  dropped["of items that the model has no row for"] = int((~known).sum())
  indices = indices[known]
  users = names(table, indices, roles["user"], "user")
  places = np.array([rows[item] for item in items if item in rows], np.int32)
  if "time" in roles:
    ticks = _ticks([table.records[int(i)].get(roles["time"]) for i in indices], config.time_format,
                   lambda i: table.where(int(indices[i])))
  else:
    logging.warning("%s has no column of times: its rows are taken to be in order", table.source)
    ticks = np.arange(len(indices))
  ids, number = np.unique(users, return_inverse=True)
  kept = core(number, places, config.k_core)
  dropped["beyond data.k_core"] = int((~kept).sum())
  if not kept.any():
    raise errors.UserError(f"{table.source}: no interaction is left: {dropped}; lower data.k_core "
                           "or data.min_rating")
  number, places, ticks = number[kept], places[kept], ticks[kept]
  order = np.lexsort((np.arange(len(ticks)), ticks, number))
  there, starts = np.unique(number[order], return_index=True)
  cut = lambda values: np.split(values[order], starts[1:])  # noqa: E731
  return Log([str(ids[i]) for i in there], cut(places), cut(ticks), table.source,
             {why: count for why, count in dropped.items() if count})


def _rated(least: float, roles, table, indices) -> np.ndarray:
  if "rating" not in roles:
    raise errors.UserError(f"{table.source}: data.min_rating needs a rating; name its column in "
                           f"data.columns.rating, one of {', '.join(map(str, table.columns))}")
  ratings = []
  for i in indices:
    value = table.records[int(i)].get(roles["rating"])
    try:
      ratings.append(float(value))
    except (TypeError, ValueError):
      raise errors.UserError(f"{table.where(int(i))}: the rating in column {roles['rating']} is "
                             f"{value!r}, no number") from None
  return indices[np.array(ratings) >= least]


def _ticks(values, time_format: str, where) -> np.ndarray:
  """Returns (n,) times as numbers: seconds since 1970 and the like as they are, dates in µs."""
  if not time_format:
    try:
      numbers = np.array([float(value) for value in values])
    except (TypeError, ValueError):
      pass
    else:
      if not np.isfinite(numbers).all():
        i = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise errors.UserError(f"{where(i)}: {values[i]!r} is no time")
      return numbers
  return timeline.read(values, time_format, where)[1]


def core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
  """Returns which interactions (n,) stay when users and items of fewer than k are left out.

  Leaving out a user may leave an item too few, and so on; what stays is the largest set in which
  all have k, whatever the order.
  """
  kept = np.ones(len(users), bool)
  while True:
    few = np.zeros(len(users), bool)
    for part in (users, items):
      counts = np.bincount(part[kept], minlength=part.max(initial=0) + 1)
      few |= counts[part] < k
    if not (few & kept).any():
      return kept
    kept &= ~few


# ---- Splitting -----------------------------------------------------------------------------------


def leave_one_out(log: Log, stride: int) -> dict[str, Sequences]:
  """Returns train, validation and test: of each user the last is test, the one before validation.

  Users of fewer than three interactions belong to train alone.
  """
  sizes = np.array(list(map(len, log.items)))
  known = np.where(sizes >= 3, sizes - 2, sizes)
  tested = np.flatnonzero(sizes >= 3)
  return {"train": _train(log, known, stride),
          "validation": Sequences("validation", log, _ends(tested, sizes - 2), known),
          "test": Sequences("test", log, _ends(tested, sizes - 1), known)}


def by_time(log: Log, stride: int, validation: float, test: float) -> dict[str, Sequences]:
  """Returns train, validation and test, cut at two points in time for all users.

  Train is what happened before the first. A target of validation and test is a user's first
  interaction of that period, and its history all that the user did before.

  Args:
    validation, test: shares of the interactions in these periods.
  """
  every = np.sort(np.concatenate(log.ticks))
  at = [1 - validation - test, 1 - test]
  first, second = (every[min(len(every) - 1, round(share * len(every)))] for share in at)
  known = np.array([int(np.sum(ticks < first)) for ticks in log.ticks])
  behind = np.array([int(np.sum(ticks < second)) for ticks in log.ticks])
  sizes = np.array(list(map(len, log.items)))
  there = np.flatnonzero((behind > known) & (known > 0))
  later = np.flatnonzero((sizes > behind) & (behind > 0))
  return {"train": _train(log, known, stride),
          "validation": Sequences("validation", log, _ends(there, known), known),
          "test": Sequences("test", log, _ends(later, behind), known)}


def last(log: Log, name: str) -> Sequences:
  """Returns a row a user: the last interaction, given those before."""
  sizes = np.array(list(map(len, log.items)))
  return Sequences(name, log, _ends(np.flatnonzero(sizes >= 2), sizes - 1), sizes)


def _ends(users: np.ndarray, stops: np.ndarray) -> np.ndarray:
  return np.stack([users, stops[users], np.ones_like(users)], 1)


def _train(log: Log, known: np.ndarray, stride: int) -> Sequences:
  """Cuts train so that each interaction but a user's first is a target once, the newest first."""
  places = [(user, stop, min(stride, stop)) for user, size in enumerate(known)
            for stop in range(size - 1, 0, -stride)]
  return Sequences("train", log, np.array(places, int).reshape(-1, 3), known)
