"""Search: how well queries find what is relevant, and what a search by words would find.

Shapes: Q queries, M documents. All is numpy, float64 where it is summed.
"""

import numpy as np

CUTS = (1, 5, 10)
BEST = 10  # depth of nDCG
_CHUNK = 256  # queries ranked at once


def measure(similarity, relevant, size: int, documents: int) -> dict[str, np.ndarray]:
  """Returns how well each query finds its documents: name -> (Q,).

  mrr: one over the rank of the first relevant one. ndcg@10: gain 1 a relevant one, discounted by
  log2 (Järvelin and Kekäläinen 2002). recall@1, @5, @10: relevant ones found, over as many as could
  be. All are 0 for a query to which nothing is relevant. Ties are broken by a fixed order that has
  nothing to do with the rows'.

  Args:
    similarity: rows of queries (slice) -> (q, M); -inf leaves a document out for a query.
    relevant: rows of queries (slice) -> (q, M) bool.
    size: Q.
    documents: M.
  """
  mixed = np.random.default_rng(0).permutation(documents)
  parts = []
  for start in range(0, size, _CHUNK):
    rows = slice(start, min(start + _CHUNK, size))
    near, wanted = similarity(rows)[:, mixed], relevant(rows)[:, mixed]
    order = np.argsort(-near, axis=1, kind="stable")
    parts.append(_of_ranked(np.take_along_axis(wanted, order, 1)))
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _of_ranked(hits) -> dict[str, np.ndarray]:
  """The measures of (q, M) bool: whether the document at each rank is relevant."""
  total = hits.sum(1)
  some = np.maximum(total, 1)
  discounts = 1 / np.log2(np.arange(2, 2 + min(BEST, hits.shape[1])))
  ideal = np.cumsum(discounts)[np.minimum(some, len(discounts)) - 1]
  found = {"mrr": np.where(total > 0, 1 / (hits.argmax(1) + 1), 0.0),
           f"ndcg@{BEST}": hits[:, :len(discounts)] @ discounts / ideal}
  for cut in CUTS:
    found[f"recall@{cut}"] = hits[:, :cut].sum(1) / np.minimum(some, cut)
  return found


def bm25(queries: list[str], documents: list[str], k1: float = 1.5, b: float = 0.75):
  """Returns queries (Q, V) and documents (M, V), sparse, whose product is how well words agree.

  Okapi BM25 (Robertson and Zaragoza 2009) with the inverse document frequency of Lucene, which is
  never negative: log(1 + (M - df + 0.5) / (df + 0.5)). Words are as scikit-learn cuts them.
  """
  from scipy import sparse
  from sklearn.feature_extraction import text

  counter = text.CountVectorizer(token_pattern=r"(?u)\b\w+\b")
  counts = counter.fit_transform([*documents, *queries]).astype(np.float64)
  counts, asked = counts[:len(documents)], counts[len(documents):]
  length = np.asarray(counts.sum(1)).ravel()
  frequency = np.asarray((counts > 0).sum(0)).ravel()
  idf = np.log1p((len(documents) - frequency + 0.5) / (frequency + 0.5))
  weights = counts.tocoo()
  room = k1 * (1 - b + b * length / max(length.mean(), 1e-9))
  data = idf[weights.col] * weights.data * (k1 + 1) / (weights.data + room[weights.row])
  weighed = sparse.csr_matrix((data, (weights.row, weights.col)), shape=counts.shape)
  return asked, weighed
