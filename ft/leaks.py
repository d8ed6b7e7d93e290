"""Leaks that no single pair of rows shows: groups and times across splits, columns that tell.

Every function returns rows for the card, [] where there is nothing to look at, and raises
`guards.Missing` with the reason where what it needs is not there.
"""

import collections
import datetime

import numpy as np

from ft import guards, stats

_TIMES = ("time", "date", "datetime", "timestamp", "ds", "created", "created_at", "year")
_EPOCH = 1e8  # numbers from here on are seconds since 1970: 1973 and later
_SHARE = 0.95  # of values that have to be times, or numbers, for a column to count as such
_MANY = 20  # different numbers, above which a column is measured rather than of kinds
_ROWS = 5000  # of a split that columns are judged by


def groups(rows: dict) -> list[dict]:
  """Rows of other splits whose group (patient, customer, …) is in train too.

  Args:
    rows: split -> its rows.

  Returns:
    [{"split", "n", "rows", "share", "interval", "groups": shared ones}].
  """
  known = _groups(rows.get("train"))
  if known is None:
    raise guards.Missing("no column of groups is named; set data.group, such as patient")
  if len(set(known)) < 2:
    raise guards.Missing("the column of groups has one value only")
  seen, found = set(known), []
  for split, part in rows.items():
    of = None if split == "train" else _groups(part)
    if of:
      hits = sum(group in seen for group in of)
      found.append({"split": split, "n": len(of), "rows": hits, "share": hits / len(of),
                    "interval": stats.wilson(hits, len(of)), "groups": len(seen & set(of))})
  return found


def times(rows: dict) -> list[dict]:
  """How far the times of train reach into those of other splits.

  Returns:
    [{"split", "column", "n", "later": share of train rows that are later than the median row of
    the split, "train", "of_split": first and last time of each}]; later is 0 where train comes
    first, .5 where times are mixed.
  """
  train = rows.get("train")
  table = getattr(train, "table", None)
  column = next((name for name in _TIMES if table is not None and name in table.columns), None)
  if column is None:
    raise guards.Missing(f"no column of times is there, such as {', '.join(_TIMES[:3])}")
  known, found = _times(train, column), []
  if known is None:
    raise guards.Missing(f"the column {column} does not hold times (ISO 8601, seconds, years)")
  for split, part in rows.items():
    of = None if split == "train" or not hasattr(part, "table") else _times(part, column)
    if of is not None and len(of):
      found.append({"split": split, "column": column, "n": len(of),
                    "later": float((known > np.median(of)).mean()),
                    "train": [_written(known.min()), _written(known.max())],
                    "of_split": [_written(of.min()), _written(of.max())]})
  return found


def columns(rows: dict) -> list[dict]:
  """How well each of `data.attributes` alone predicts the label of rows it was not fitted to.

  Of tables also each column that the model reads.
  Columns of kinds give the most frequent label of each kind, measured ones a small decision tree.

  Returns:
    [{"column", "n", "accuracy", "interval", "majority": accuracy without it}], the best first.
  """
  train, test = rows.get("train"), rows.get("test")
  first = [_values(part[0]) if part is not None and len(part) else {} for part in (train, test)]
  named = [name for name in first[0] if name in first[1]]
  if not named:
    raise guards.Missing("no columns that train and test have are named in data.attributes")
  if train.classes is None or test.classes is None:
    raise guards.Missing("rows have no single class that a column could give away")
  known, asked = (_sample(len(part)) for part in (train, test))
  label = [np.array([str(part.classes[i]) for i in which])
           for part, which in ((train, known), (test, asked))]
  most = collections.Counter(label[0]).most_common(1)[0][0]
  parts = [[_values(part[int(i)]) for i in which]
           for part, which in ((train, known), (test, asked))]
  found = []
  for name in named:
    values = [np.array([row[name] for row in part]) for part in parts]
    hits = int((_predicted(*values, label[0], most) == label[1]).sum())
    found.append({"column": name, "n": len(asked), "accuracy": hits / len(asked),
                  "interval": stats.wilson(hits, len(asked)),
                  "majority": float((label[1] == most).mean())})
  return sorted(found, key=lambda row: -row["accuracy"])


def _values(row) -> dict:
  """Column -> text of what a row is told apart by, and of tables of what the model reads."""
  found = {**row.get("record", {}), **(row.get("attributes") or {})}
  return {name: "" if value is None else str(value).strip() for name, value in found.items()}


def windows(rows: dict) -> list[dict]:
  """Windows of series whose forecast begins at a time that train was trained to forecast.

  Returns:
    [{"split", "n", "rows", "share", "interval"}].
  """
  train = rows.get("train")
  if not hasattr(train, "places") or not hasattr(train, "parts"):
    return []
  taught, found = collections.defaultdict(set), []
  for number, series in enumerate(train.series):
    at = train.places[train.places[:, 0] == number, 1]
    if len(at):
      steps = range(int(at.min()), int(train.parts[number][1]))
      taught[series.name] |= {train.show(series, step) for step in steps}
  for split, part in rows.items():
    if split == "train" or not len(part):
      continue
    hits = sum(part.show(part.series[k], int(step)) in taught[part.series[k].name]
               for k, step in part.places)
    found.append({"split": split, "n": len(part), "rows": hits, "share": hits / len(part),
                  "interval": stats.wilson(hits, len(part))})
  return found


def _groups(part):
  """The group of each row that has one; None where the source names none."""
  if part is None or "group" not in getattr(part, "roles", ()):
    return None
  column = part.roles["group"]
  values = (part.table.records[int(i)].get(column) for i in part.indices)
  return [str(value) for value in values if value not in (None, "")]


def _times(part, column):
  """(n,) seconds of the rows of a split; None where most of them are no times."""
  found = [_seconds(part.table.records[int(i)].get(column), column) for i in part.indices]
  good = np.array([value for value in found if value is not None])
  return good if len(good) >= _SHARE * max(len(found), 1) else None


def _seconds(value, column):
  try:
    number = float(value)
  except (TypeError, ValueError):
    try:
      moment = datetime.datetime.fromisoformat(str(value).strip())
    except ValueError:
      return None
    return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
  if column == "year" and 1000 < number < 3000:
    return datetime.datetime(int(number), 1, 1, tzinfo=datetime.UTC).timestamp()
  number = number / 1000 if number >= 1000 * _EPOCH else number  # milliseconds
  return number if _EPOCH <= number < 1000 * _EPOCH else None


def _written(seconds):
  moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=float(seconds))
  return moment.isoformat(sep=" ", timespec="minutes")


def _sample(size):
  if size <= _ROWS:
    return np.arange(size)
  return np.sort(np.random.default_rng(0).choice(size, _ROWS, replace=False))


def _predicted(known, asked, label, most):
  """(n,) labels that a column's values (n,) suggest, learnt from known values and their labels."""
  numbers = [_numbers(values) for values in (known, asked)]
  if all(value is not None for value in numbers) and len(np.unique(numbers[0])) > _MANY:
    from sklearn import tree

    model = tree.DecisionTreeClassifier(max_depth=4, min_samples_leaf=5, random_state=0)
    return model.fit(numbers[0][:, None], label).predict(numbers[1][:, None])
  counts = collections.defaultdict(collections.Counter)
  for value, of in zip(known, label, strict=True):
    counts[value][of] += 1
  best = {value: count.most_common(1)[0][0] for value, count in counts.items()}
  return np.array([best.get(value, most) for value in asked])


def _numbers(values):
  """(n,) float of a column's texts, 0 for those that are none; None where many are not."""
  found = np.zeros(len(values))
  wrong = 0
  for i, value in enumerate(values):
    try:
      found[i] = float(value)
    except ValueError:
      wrong += 1
  return found if wrong <= (1 - _SHARE) * len(values) and np.isfinite(found).all() else None
