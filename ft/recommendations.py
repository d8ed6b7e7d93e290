"""Scores of recommendations over all items, and recommendations that need no training.

Each row has one relevant item, its target, and all items are ranked: no negatives are drawn, since
measures over a sample of them order models wrongly (Krichene & Rendle 2020).
Shapes: N rows, V rows of the item table, U users, K items of a list.
"""

import numpy as np

NEIGHBOURS = (20, 100, 500)  # of an item, between which item-kNN chooses on validation
_CHUNK = 256  # rows scored at once


def place(xp, scores, target, blocked):
  """Returns the rank of each target, from 1, (N,) int; 0 where it is not among what is ranked.

  Equal scores count as ahead of the target, and so do those that are no numbers: what cannot tell
  items apart gets the lowest place.

  Args:
    xp: numpy or jax.numpy, whose arrays the others are.
    scores: (N, V).
    target: (N,) int.
    blocked: (N, V) or (V,) bool, items that are not ranked.
  """
  blocked = xp.broadcast_to(blocked, scores.shape)
  own = xp.take_along_axis(scores, target[:, None], 1)
  other = xp.arange(scores.shape[1]) != target[:, None]
  ahead = ~(scores < own) & ~blocked & other
  reachable = ~xp.take_along_axis(blocked, target[:, None], 1)[:, 0]
  return xp.where(reachable, 1 + ahead.sum(1), 0)


def gains(rank) -> tuple[np.ndarray, np.ndarray]:
  """Returns 1 / rank and 1 / log2(1 + rank), (N,) each, 0 where there is no rank.

  The second is NDCG, as long as the list is long enough: the ideal list of one target has 1.
  """
  rank = np.asarray(rank)
  safe = np.maximum(rank, 1)
  return np.where(rank > 0, 1 / safe, 0.0), np.where(rank > 0, 1 / np.log2(1 + safe), 0.0)


def per_row(name: str, rank) -> np.ndarray:
  """Returns (N,) what each row gives to a measure: mrr, hr@k or ndcg@k of its target's rank."""
  reciprocal, discounted = gains(rank)
  kind, _, k = name.partition("@")
  if kind == "mrr":
    return reciprocal
  inside = (np.asarray(rank) > 0) & (np.asarray(rank) <= int(k))
  return inside * (discounted if kind == "ndcg" else 1.0)


def percentiles(counts: np.ndarray, ranked: np.ndarray) -> np.ndarray:
  """Returns (V,) how popular an item is: the share of the ranked ones that are chosen less often.

  Items chosen as often count half, so that drawing at random gives 0.5 on average; 0 for an item
  that is not ranked.

  Args:
    counts: (V,) how often train has each.
    ranked: (V,) bool.
  """
  ordered = np.sort(counts[ranked])
  below, up_to = (np.searchsorted(ordered, counts, side) for side in ("left", "right"))
  return np.where(ranked, (below + up_to) / 2 / max(1, len(ordered)), 0.0)


def summary(outputs: dict, cutoffs, counts: np.ndarray, ranked: np.ndarray) -> dict[str, float]:
  """Returns the scores of a split by name.

  hr@k and ndcg@k for each cutoff, mrr; where "rank_incl_seen" differs from "rank" in its rule,
  hr@10_incl_seen and ndcg@10_incl_seen; coverage, the share of the ranked items that some list has;
  popularity, the mean percentile of what is in the lists (see `percentiles`), and
  popularity_of_targets, that of what was chosen.

  Args:
    outputs: "rank" (N,), "top" (N, K) rows of the item table, 0 where a list is shorter; "target"
      (N,).
    cutoffs: k.
    counts, ranked: as in `percentiles`.
  """
  names = [f"{kind}@{k}" for k in cutoffs for kind in ("hr", "ndcg")]
  found = {name: float(per_row(name, outputs["rank"]).mean()) for name in (*names, "mrr")}
  if "rank_incl_seen" in outputs:
    found |= {f"{name}_incl_seen": float(per_row(name, outputs["rank_incl_seen"]).mean())
              for name in ("hr@10", "ndcg@10")}
  popular, listed = percentiles(counts, ranked), np.asarray(outputs["top"])
  listed = listed[listed > 0]
  found["coverage"] = len(np.unique(listed)) / max(1, int(ranked.sum()))
  found["popularity"] = float(popular[listed].mean()) if len(listed) else float("nan")
  found["popularity_of_targets"] = float(popular[np.asarray(outputs["target"])].mean())
  return found


# ---- Recommendations without training ------------------------------------------------------------


class Neighbours:
  """What is chosen by whom, in train, and how alike that makes items.

  Args:
    histories: of each user (n,) rows of the item table.
    size: V.
  """

  def __init__(self, histories, size: int):
    self._chosen, self._size = matrix(histories, size), size
    self.counts = np.asarray(self._chosen.sum(0)).ravel()
    # Items that score alike, such as all those never chosen together, are put by popularity.
    self._tie = 1e-7 * self.counts / (1.0 + self.counts.max())
    self._near = {}

  def popularity(self, histories) -> np.ndarray:
    """Returns scores (N, V) float64: how many users chose each item."""
    return np.tile(self.counts.astype(np.float64), (len(histories), 1))

  def last_item(self, histories) -> np.ndarray:
    """Returns scores (N, V): how alike each item is to the last one of a history."""
    return self._similarity(np.array([items[-1] for items in histories])) + self._tie

  def items(self, histories, count: int) -> np.ndarray:
    """Returns scores (N, V): how alike each item is to those of a history, summed.

    Of each item of a history its `count` nearest take part (Deshpande & Karypis 2004).
    """
    return (matrix(histories, self._size) @ self._nearest(count)).toarray() + self._tie

  def _similarity(self, rows: np.ndarray) -> np.ndarray:
    """Returns (n, V) cosines of items' users with those of all items, 0 with themselves."""
    together = (self._chosen.T[rows] @ self._chosen).toarray().astype(np.float64)
    norms = np.sqrt(np.maximum(self.counts, 1))
    together /= norms[rows][:, None] * norms
    together[np.arange(len(rows)), rows] = 0
    return together

  def _nearest(self, count: int):
    """Returns (V, V), sparse: of each item the similarity of its nearest."""
    from scipy import sparse

    if count in self._near:
      return self._near[count]
    most, parts = min(count, self._size - 1), []
    for start in range(0, self._size, _CHUNK):
      near = self._similarity(np.arange(start, min(start + _CHUNK, self._size)))
      least = np.partition(near, -most, axis=1)[:, -most]
      parts.append(sparse.csr_matrix(np.where(near >= least[:, None], near, 0)))
    self._near[count] = sparse.vstack(parts).tocsr()
    return self._near[count]


def matrix(histories, size: int):
  """Returns (N, size), sparse: 1 where a history has an item."""
  from scipy import sparse

  rows = np.repeat(np.arange(len(histories)), [len(items) for items in histories])
  columns = np.concatenate(histories) if len(histories) else np.zeros(0, int)
  made = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(histories), size))
  made.data[:] = 1  # an item chosen twice is one that was chosen
  return made


def judged(score, rows: list[dict], ranked: np.ndarray, top: int, exclude: bool) -> dict:
  """Returns what a method recommends: "rank", "rank_incl_seen", "target" (N,), "top" (N, K).

  Args:
    score: histories -> (n, V).
    rows: {"history": (n,), "target": int} each.
    ranked: (V,) bool.
    top: K.
    exclude: whether a row's own history is left out of its ranking.
  """
  parts = []
  for start in range(0, len(rows), _CHUNK):
    part = rows[start:start + _CHUNK]
    histories, target = [row["history"] for row in part], np.array([row["target"] for row in part])
    scores = score(histories)
    out = np.broadcast_to(~ranked, scores.shape)
    blocked = out | (matrix(histories, len(ranked)).toarray() > 0) if exclude else out
    order = np.argsort(np.where(blocked, np.inf, -scores), axis=1, kind="stable")[:, :top]
    kept = ~np.take_along_axis(blocked, order, 1)
    found = {"rank": place(np, scores, target, blocked), "target": target,
             "top": np.where(kept, order, 0)}
    if exclude:
      found["rank_incl_seen"] = place(np, scores, target, out)
    parts.append(found)
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
