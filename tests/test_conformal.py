"""Conformal sets against the distribution of their coverage; abstention against scikit-learn."""

import numpy as np
import pytest
from scipy import special
from scipy import stats as distributions
from sklearn import linear_model

from ft import conformal, stats


def drawn(rng, n, classes=5):
  """Probabilities that are none (too sharp), and labels drawn from what they were made of."""
  logits = 1.5 * rng.normal(size=(n, classes))
  labels = (special.softmax(logits, axis=1).cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
  return special.softmax(2 * logits, axis=1), labels


@pytest.mark.parametrize("method", sorted(conformal.METHODS))
def test_coverage_of_200_draws_is_distributed_as_theory_says(method):
  rng, n, m, asked = np.random.default_rng(0), 99, 400, 0.9
  found = []
  for _ in range(200):
    known, labels = drawn(rng, n)
    new, truth = drawn(rng, m)
    score = conformal.METHODS[method]
    limit = conformal.threshold(
        score(known, rng.integers(1 << 31))[np.arange(n), labels], asked)
    held = score(new, rng.integers(1 << 31)) <= limit
    found.append(int(held[np.arange(m), truth].sum()))
  theory = distributions.betabinom(m, 90, 10)  # k = ceil(100 x 0.9)
  assert np.mean(found) / m == pytest.approx(0.9, abs=4 * theory.std() / m / 200**0.5)
  low, high = conformal.band(n, m, asked)
  inside = np.mean([low <= hits / m <= high for hits in found])
  assert inside >= 0.95 - 3 * (0.05 * 0.95 / 200)**0.5
  # The distribution as a whole, not its mean alone.
  assert np.std(found) == pytest.approx(theory.std(), rel=0.2)


def test_the_threshold_is_the_right_order_statistic():
  scores = np.arange(1, 10)[::-1] / 10
  assert conformal.threshold(scores, 0.8) == 0.8  # ceil(10 x 0.8) = 8th smallest
  assert conformal.threshold(scores, 0.9) == 0.9
  assert conformal.threshold(scores, 0.95) == np.inf  # 9 rows cannot promise 95 %
  held, _ = conformal.sets("LAC", np.full((5, 2), 0.5), np.zeros(5, int), [[0.9, 0.1]], 0.99)
  assert held.all()


def test_adaptive_scores_by_hand():
  probs = np.array([[0.2, 0.7, 0.1]])
  share = np.random.default_rng(3).random()
  np.testing.assert_allclose(conformal.adaptive(probs, 3), [[
      0.7 + 0.2 * share, 0.7 * share, 0.9 + 0.1 * share]])


def test_sets_of_the_harder_rows_are_larger_with_aps_and_lac_is_smallest():
  rng = np.random.default_rng(0)
  known, labels = drawn(rng, 4000)
  new, _ = drawn(rng, 4000)
  sizes = {m: conformal.sets(m, known, labels, new, 0.9)[0].sum(axis=1) for m in conformal.METHODS}
  assert sizes["LAC"].mean() < sizes["APS"].mean()
  assert np.corrcoef(sizes["APS"], new.max(axis=1))[0, 1] < -0.5


def test_abstaining_from_the_unsure():
  found = conformal.abstention([0.9, 0.6, 0.8, 0.7], [1, 0, 1, 0], points=4)
  assert [row["accuracy"] for row in found["curve"]] == [1, 1, pytest.approx(2 / 3), 0.5]
  assert [row["answered"] for row in found["curve"]] == [0.25, 0.5, 0.75, 1]
  assert found["curve"][2]["confidence"] == 0.7
  assert found["area"] == pytest.approx((1 + 1 + 2 / 3 + 0.5) / 4)
  assert np.isnan(conformal.abstention([], [])["area"])


def test_vector_scaling_finds_what_was_planted_and_beats_a_temperature():
  rng = np.random.default_rng(0)
  factor, offset = np.array([0.5, 1.0, 2.0]), np.array([0.0, 0.8, -0.8])
  logits = rng.normal(size=(20_000, 3)) * 2
  probs = stats.softmax(logits * factor + offset)
  labels = (probs.cumsum(axis=1) > rng.random((len(logits), 1))).argmax(axis=1)
  found, shift = conformal.vector_scaling(logits, labels)
  np.testing.assert_allclose(found, factor, atol=0.06)
  np.testing.assert_allclose(shift - shift.mean(), offset, atol=0.06)
  vector = stats.log_loss(stats.softmax(logits * found + shift), labels)
  temperature = stats.fit_temperature(logits, labels)
  assert vector < stats.log_loss(stats.softmax(logits / temperature), labels) - 0.05
  # A regression that is free to mix classes can hardly do better than the truth.
  free = linear_model.LogisticRegression(C=1e6).fit(logits, labels)
  assert vector == pytest.approx(stats.log_loss(free.predict_proba(logits), labels), abs=2e-3)


def test_a_planted_temperature_is_recovered():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(20_000, 4)) * 2
  labels = (stats.softmax(logits).cumsum(axis=1) > rng.random((len(logits), 1))).argmax(axis=1)
  for planted in (0.4, 1.7, 5.0):
    assert stats.fit_temperature(logits * planted, labels) == pytest.approx(planted, rel=0.03)
