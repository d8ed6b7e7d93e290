"""Abstaining: thresholds, and telling known rows from unknown ones."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from ft import abstaining


def outputs(seed=0, rows=200):
  rng = np.random.default_rng(seed)
  logits, labels = rng.normal(size=(rows, 4)) * 2, rng.integers(-1, 4, rows)
  logits[labels >= 0, labels[labels >= 0]] += 2
  return logits, labels


def test_confidence_and_energy_equal_scipy():
  logits, _ = outputs()
  np.testing.assert_allclose(abstaining.confidence(logits, 2.0),
                             special.softmax(logits / 2, axis=1).max(1))
  np.testing.assert_allclose(abstaining.energy(logits), special.logsumexp(logits, axis=1))


def test_unknown_rows_are_told_as_scikit_learn_says():
  logits, labels = outputs()
  found = abstaining.measure(logits, labels)
  known = labels >= 0
  assert found["unknown_auroc"] == pytest.approx(
    metrics.roc_auc_score(known, special.softmax(logits, axis=1).max(1)))
  assert found["unknown_auroc_energy"] == pytest.approx(
    metrics.roc_auc_score(known, special.logsumexp(logits, axis=1)))
  sure = np.argsort(-abstaining.confidence(logits), kind="stable")[:known.sum()]
  assert found["accuracy_at_coverage"] == pytest.approx(
    np.mean(logits.argmax(1)[sure] == labels[sure]))


def test_the_threshold_is_reached_by_the_share_that_was_asked_for():
  logits, labels = outputs()
  seen = logits[labels >= 0]
  threshold = abstaining.threshold(seen, 1.5, 0.9)
  assert np.mean(abstaining.confidence(seen, 1.5) >= threshold) == pytest.approx(0.9, abs=0.01)


def test_the_account_of_a_split_by_hand():
  sure, unsure = [4.0, 0.0], [0.1, 0.0]
  logits = np.array([sure, sure, unsure, sure, unsure])
  labels = np.array([0, 1, 0, -1, -1])
  found = abstaining.account(logits, labels, {"temperature": 1.0, "threshold": 0.9})
  assert found["answered"] == pytest.approx(2 / 3)
  assert found["accuracy_answered"] == pytest.approx(1 / 3)
  assert found["unknown_refused"] == 0.5 and found["n"] == 5
  low, high = found["unknown_auroc_interval"]
  assert found["unknown_auroc"] == pytest.approx((2 * 0.75 + 0.25) / 3)
  assert low <= found["unknown_auroc"] <= high
  assert abstaining.account(logits[:3], labels[:3], {"temperature": 1.0, "threshold": 0.9})[
    "unknown_refused"] is None
