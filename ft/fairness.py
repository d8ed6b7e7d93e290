"""How results differ between groups of rows: the definitions that the guard of bias reports.

Shapes: N rows; `group` (N,) names of groups; `said`, `truth` (N,) bool, what was decided and what
is the case. What is not defined (a group without positives) is NaN and in no difference.
Sources: Hardt et al. 2016, Equality of Opportunity in Supervised Learning, arXiv:1610.02413
(equalised odds); Dwork et al. 2012 (demographic parity).
"""

import numpy as np

from ft import stats

BANDS = 4  # of a column of numbers with more values than LEVELS
LEVELS = 12
MOST = 50  # groups of a column above which they are too many to be compared
NONE = "(none)"  # the group of rows without a value


def bands(values, like=None) -> np.ndarray:
  """Returns (N,) names of groups: values as they are, many different numbers as four bands.

  Rows without a value are a group of their own.

  Args:
    values: (N,) of a column.
    like: values that say whether the column is of many numbers, and where bands begin, so that the
      bands of several splits are the same; None: these.
  """
  edges = _edges(values if like is None else like)
  if edges is None:
    return np.array([str(value) or NONE for value in values])
  names = [f"below {edges[0]:g}", *[f"{low:g} to {high:g}" for low, high in
                                    zip(edges[:-1], edges[1:], strict=True)], f"from {edges[-1]:g}"]
  numbers = np.array([_number(value) for value in values])
  place = np.searchsorted(edges, numbers, side="right")
  return np.where(np.isnan(numbers), NONE, np.array(names)[place])


def _edges(values) -> np.ndarray | None:
  """Returns where all bands but the lowest begin; None for values as they are."""
  known = [str(value) for value in values if str(value).lower() not in ("", "nan")]
  if len(set(known)) <= LEVELS:
    return None
  numbers = np.array([_number(value) for value in known])
  if np.isnan(numbers).any():
    return None
  edges = np.unique(np.quantile(numbers, np.arange(1, BANDS) / BANDS))
  above = numbers[numbers > numbers.min()]  # where most values are the least one, the others
  return edges[edges > numbers.min()] if edges[-1] > numbers.min() else above.min(keepdims=True)


def _number(value) -> float:
  try:
    return float(value)
  except ValueError:
    return float("nan")


def rates(said, truth, group) -> list[dict]:
  """Returns the error rates of each group, by name.

  group, n; positives, negatives (rows); tpr, fpr, fnr and selected (share that is decided to be
  positive), each with "<name>_interval" (Wilson, 95 %).
  """
  said, truth, group = np.asarray(said, bool), np.asarray(truth, bool), np.asarray(group)
  found = []
  for name in np.unique(group):
    here = group == name
    cells = {"tpr": said[here & truth], "fpr": said[here & ~truth], "fnr": ~said[here & truth],
             "selected": said[here]}
    row = {"group": str(name), "n": int(here.sum()), "positives": int((here & truth).sum()),
           "negatives": int((here & ~truth).sum())}
    for key, hits in cells.items():
      row[key] = float(hits.mean()) if len(hits) else float("nan")
      row[f"{key}_interval"] = list(stats.wilson(int(hits.sum()), len(hits)))
    found.append(row)
  return found


def differences(table: list[dict], fewest: int = 1) -> dict[str, float]:
  """Returns how far groups are apart, given `rates`; NaN where fewer than two can be compared.

  equalised_odds is max(|ΔTPR|, |ΔFPR|) over all pairs of groups, equal_opportunity |ΔTPR|, and
  demographic_parity the difference of the shares that are decided to be positive.

  Args:
    fewest: rows that a rate has to be of.
  """
  spread = {key: _spread([row[key] for row in table if row[of] >= fewest])
            for key, of in (("tpr", "positives"), ("fpr", "negatives"), ("selected", "n"))}
  odds = [spread[key] for key in ("tpr", "fpr") if np.isfinite(spread[key])]
  return {"equalised_odds": max(odds) if odds else float("nan"),
          "equal_opportunity": spread["tpr"], "demographic_parity": spread["selected"]}


def odds_by_chance(table: list[dict], fewest: int = 1, draws: int = 1000, seed: int = 0) -> float:
  """Returns what equalised odds stay below in 95 of 100 draws if all groups have the same rates."""
  rng, spreads = np.random.default_rng(seed), []
  for key, of in (("tpr", "positives"), ("fpr", "negatives")):
    counts = np.array([row[of] for row in table if row[of] >= fewest])
    values = np.array([row[key] for row in table if row[of] >= fewest])
    if len(counts) > 1:
      shares = rng.binomial(counts, (counts @ values) / counts.sum(), (draws, len(counts))) / counts
      spreads.append(np.ptp(shares, axis=1))
  return float(np.quantile(np.max(spreads, axis=0), 0.95)) if spreads else float("nan")


def thresholds(scores, truth, group, fewest: int = 1) -> dict[str, float]:
  """Returns for each group the score from which a row is decided to be positive.

  All groups get the same true positive rate, the one of 99 at which accuracy less the
  equalised-odds difference is largest on these rows (Hardt et al. 2016, without randomising). A
  group with fewer than `fewest` positives or negatives gets 0.5.

  Args:
    scores: (N,) probability of being positive.
  """
  scores, truth, group = np.asarray(scores), np.asarray(truth, bool), np.asarray(group)
  names = [str(name) for name in np.unique(group)]
  fitted = [name for name in names
            if min(np.sum(truth & (group == name)), np.sum(~truth & (group == name))) >= fewest]
  best = -np.inf, dict.fromkeys(names, 0.5)
  for share in np.arange(1, 100) / 100:
    at = {name: float(np.quantile(scores[truth & (group == name)], 1 - share)) for name in fitted}
    at = dict.fromkeys(names, 0.5) | at
    said = decided(scores, group, at)
    apart = differences(rates(said, truth, group), fewest)["equalised_odds"]
    value = np.mean(said == truth) - np.nan_to_num(apart)
    if value > best[0]:
      best = value, at
  return best[1]


def decided(scores, group, at: dict[str, float]) -> np.ndarray:
  """Returns (N,) bool decisions by `thresholds`; a group without one has 0.5."""
  return np.asarray(scores) >= np.array([at.get(str(name), 0.5) for name in group])


def worst(score, group, mode: str = "max", fewest: int = 1, draws: int = 500,
          seed: int = 0) -> dict | None:
  """Returns the group that fares worst, and how often chance alone makes a worst one as bad.

  {"group", "n", "value", "average" (of all rows), "gap" (how much worse than the average), "p"},
  where p is from permutations of the scores over all rows: a worst group there always is. None
  where fewer than two groups have enough rows.

  Args:
    score: (N,) contributions of rows to the metric. mode: "max" or "min", what is better.
    fewest: rows of a group that takes part.
  """
  score = np.asarray(score, np.float64) * (1 if mode == "max" else -1)
  names, code = np.unique(group, return_inverse=True)
  counts = np.bincount(code)
  enough = np.flatnonzero(counts >= max(fewest, 1))
  if len(enough) < 2:
    return None

  def means(values):
    return (np.bincount(code, values, len(names)) / counts)[enough]

  seen = means(score)
  at = int(np.argmin(seen))
  rng = np.random.default_rng(seed)
  lower = sum(means(rng.permutation(score)).min() <= seen[at] + 1e-12 for _ in range(draws))
  sign = 1 if mode == "max" else -1
  return {"group": str(names[enough[at]]), "n": int(counts[enough[at]]),
          "value": float(sign * seen[at]), "average": float(sign * score.mean()),
          "gap": float(score.mean() - seen[at]), "p": (1 + int(lower)) / (1 + draws)}


def _spread(values) -> float:
  return float(np.ptp(values)) if len(values) > 1 else float("nan")
