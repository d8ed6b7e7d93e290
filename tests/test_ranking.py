"""Search: measures against scikit-learn and by hand, BM25 by hand."""

import numpy as np
import pytest
from sklearn import metrics

from ft import ranking


def test_measures_equal_scikit_learn():
  rng = np.random.default_rng(0)
  near, wanted = rng.normal(size=(300, 40)), rng.random((300, 40)) < 0.1
  wanted[0] = False
  found = ranking.measure(lambda rows: near[rows], lambda rows: wanted[rows], 300, 40)
  some = np.flatnonzero(wanted.any(1))
  want = [metrics.ndcg_score(wanted[i:i + 1], near[i:i + 1], k=10) for i in some]
  np.testing.assert_allclose(found["ndcg@10"][some], want, atol=1e-9)
  order = np.argsort(-near, 1)
  hits = np.take_along_axis(wanted, order, 1)
  np.testing.assert_allclose(found["mrr"][some], [1 / (hits[i].argmax() + 1) for i in some])
  for cut in (1, 5, 10):
    np.testing.assert_allclose(
      found[f"recall@{cut}"][some],
      [hits[i, :cut].sum() / min(cut, hits[i].sum()) for i in some])
  assert all(values[0] == 0 for values in found.values())  # nothing is relevant to query 0


def test_ties_do_not_favour_the_row_itself():
  """A search that tells nothing finds its own row as often as chance would have it."""
  size = 400
  found = ranking.measure(lambda rows: np.zeros((size, size))[rows],
                          lambda rows: np.eye(size, dtype=bool)[rows], size, size)
  assert found["recall@10"].sum() == 10 and found["recall@1"].sum() == 1


def test_bm25_by_hand():
  documents = ["the cat sat", "the dog", "a bird sang the song of the cat"]
  asked, weighed = ranking.bm25(["cat", "the the", "fish"], documents)
  scores = (asked @ weighed.T).toarray()
  length, mean = np.array([3, 2, 8]), 13 / 3
  idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))  # two of three documents have a cat
  want = [idf * 2.5 / (1 + 1.5 * (0.25 + 0.75 * n / mean)) for n in length]
  np.testing.assert_allclose(scores[0], [want[0], 0, want[2]], rtol=1e-12)
  idf = np.log(1 + 0.5 / 3.5)
  count = np.array([1, 1, 2])
  want = 2 * idf * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * length / mean))
  np.testing.assert_allclose(scores[1], want, rtol=1e-12)
  assert not scores[2].any()


def test_bm25_orders_as_rank_bm25_does():
  library = pytest.importorskip("rank_bm25")
  rng = np.random.default_rng(1)
  words = [f"word{i}" for i in range(60)]
  documents = [" ".join(rng.choice(words, rng.integers(3, 12))) for _ in range(200)]
  asked, weighed = ranking.bm25(documents[:5], documents)
  reference = library.BM25Okapi([text.split() for text in documents])
  for i, scores in enumerate((asked @ weighed.T).toarray()):
    want = reference.get_scores(documents[i].split())
    # its inverse document frequency lacks the 1 in the logarithm: alike, where words are rare
    assert np.corrcoef(scores, want)[0, 1] > 0.99
