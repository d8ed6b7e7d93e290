"""kNN against scikit-learn's, over blocks, for one and for several labels a row."""

import numpy as np
import pytest
from sklearn import neighbors
from tasks.test_classify import ABC, features, make

from ft import neighbours, stats


def rows(n, seed, classes=4, dimension=6):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, dimension)).astype(np.float32), rng.integers(0, classes, n)


@pytest.mark.parametrize("block", [200, 4_000_000])
@pytest.mark.parametrize("k", [1, 7, 50, 80])
def test_votes_equal_scikit_learn(k, block, monkeypatch):
  monkeypatch.setattr(neighbours, "BLOCK", block)
  (known, label), (new, _) = rows(50, 0), rows(33, 1)
  share = np.bincount(label) / len(label)
  found = stats.softmax(neighbours.logits(new, known, label, k, np.log(share)))
  k = min(k, 50)
  theirs = neighbors.KNeighborsClassifier(k, metric="cosine").fit(known, label)
  np.testing.assert_allclose(found, (k * theirs.predict_proba(new) + share) / (k + 1), rtol=1e-5)


def test_several_labels_a_row():
  (known, _), (new, _) = rows(40, 0), rows(9, 1)
  hot = (np.random.default_rng(2).random((40, 3)) < 0.4).astype(np.float32)
  share = (hot.sum(0) + 0.5) / 41
  found = stats.sigmoid(neighbours.logits(new, known, hot, 5, np.log(share / (1 - share))))
  theirs = neighbors.KNeighborsRegressor(5, metric="cosine").fit(known, hot).predict(new)
  np.testing.assert_allclose(found, (5 * theirs + share) / 6, rtol=1e-5)


def test_the_row_is_there_when_asked_for():
  task = make(ABC)
  parts = {"train": features(task), "test": features(task, n=100, noise=0.3, seed=1)}
  assert set(task.baselines(parts)) == {"majority", "probe"}
  task = make(ABC, neighbours=9)
  found = task.baselines(parts)["knn"]["test"]
  assert task.metrics(found)["accuracy"] > 0.9 and np.isfinite(found["logits"]).all()
