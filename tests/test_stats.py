"""Statistics against sklearn, closed forms and simulated truth."""

import math

import numpy as np
import pytest
from sklearn import metrics

from ft import stats


@pytest.fixture
def rng():
  return np.random.default_rng(7)


def _problem(rng, n=400, classes=5, scale=2.0):
  labels = rng.integers(0, classes, n)
  logits = rng.normal(size=(n, classes)) + scale * np.eye(classes)[labels]
  return logits, labels


# ---- Metrics


@pytest.mark.parametrize("classes", [2, 3, 77])
def test_metrics_equal_sklearn(rng, classes):
  logits, labels = _problem(rng, classes=classes)
  probs, predicted = stats.softmax(logits), logits.argmax(axis=1)
  assert stats.accuracy(predicted, labels) == pytest.approx(
      metrics.accuracy_score(labels, predicted))
  assert stats.macro_f1(predicted, labels) == pytest.approx(
      metrics.f1_score(labels, predicted, average="macro", zero_division=0))
  assert stats.log_loss(probs, labels) == pytest.approx(
      metrics.log_loss(labels, probs, labels=range(classes)))
  np.testing.assert_array_equal(
      stats.confusion(predicted, labels, classes),
      metrics.confusion_matrix(labels, predicted, labels=range(classes)))


def test_macro_f1_leaves_out_classes_nobody_saw():
  predicted, labels = np.array([0, 4, 4, 0]), np.array([0, 4, 0, 0])
  assert stats.macro_f1(predicted, labels) == pytest.approx(
      metrics.f1_score(labels, predicted, average="macro"))


def test_auroc_with_ties_equals_sklearn(rng):
  scores, labels = np.round(rng.normal(size=300), 1), rng.integers(0, 2, 300)
  assert stats.auroc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores))


def test_auroc_macro_one_versus_rest_equals_sklearn(rng):
  logits, labels = _problem(rng)
  probs = stats.softmax(logits)
  assert stats.auroc(probs, labels) == pytest.approx(
      metrics.roc_auc_score(labels, probs, multi_class="ovr", average="macro"))


def test_auroc_of_two_columns_is_the_second_one(rng):
  logits, labels = _problem(rng, classes=2)
  probs = stats.softmax(logits)
  assert stats.auroc(probs, labels) == pytest.approx(metrics.roc_auc_score(labels, probs[:, 1]))


def test_auroc_needs_both_classes():
  assert math.isnan(stats.auroc(np.array([0.1, 0.9]), np.array([1, 1])))
  # Class 2 never occurs: the mean is over the other two.
  probs = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]])
  assert stats.auroc(probs, np.array([0, 1, 0])) == 1.0


def test_multi_label_metrics_equal_sklearn(rng):
  labels = rng.integers(0, 2, (200, 4))
  scores = rng.normal(size=(200, 4)) + labels
  predicted = (scores > 0.5).astype(int)
  assert stats.macro_f1(predicted, labels) == pytest.approx(
      metrics.f1_score(labels, predicted, average="macro", zero_division=0))
  assert stats.auroc(scores, labels) == pytest.approx(
      metrics.roc_auc_score(labels, scores, average="macro"))
  assert stats.accuracy(predicted, labels) == pytest.approx(
      metrics.accuracy_score(labels, predicted))
  probs = stats.sigmoid(scores)
  expected = np.mean([metrics.log_loss(labels[:, c], probs[:, c]) for c in range(4)])
  assert stats.log_loss(probs, labels) == pytest.approx(expected)


def test_brier_by_hand_and_sklearn(rng):
  assert stats.brier([[0.7, 0.3], [0.4, 0.6]], [0, 0]) == pytest.approx(
      (0.09 + 0.09 + 0.36 + 0.36) / 2)
  logits, labels = _problem(rng, classes=2)
  probs = stats.softmax(logits)
  # sklearn's binary score counts one column, ours sums both.
  assert stats.brier(probs, labels) == pytest.approx(
      2 * metrics.brier_score_loss(labels, probs[:, 1]))


def test_nothing_is_nan_not_an_error():
  empty = np.zeros(0, np.int64)
  probs = np.zeros((0, 3))
  for value in (stats.accuracy(empty, empty), stats.macro_f1(empty, empty),
                stats.log_loss(probs, empty), stats.brier(probs, empty), stats.ece(probs, empty),
                stats.auroc(probs, empty), *stats.bootstrap([]), *stats.paired_bootstrap([], []),
                *stats.wilson(0, 0), *stats.bootstrap_metric(stats.macro_f1, (empty, empty))):
    assert math.isnan(value)
  assert stats.fit_temperature(probs, empty) == 1.0


def test_softmax_survives_huge_logits():
  probs = stats.softmax(np.array([[1e4, 0.0], [-1e4, 0.0]]))
  np.testing.assert_allclose(probs, [[1, 0], [0, 1]])
  assert np.isfinite(stats.sigmoid(np.array([-1e4, 1e4]))).all()


# ---- Intervals


def test_bootstrap_is_seeded_and_near_the_normal_interval(rng):
  score = rng.random(2000) < 0.8
  lo, hi = stats.bootstrap(score)
  assert (lo, hi) == stats.bootstrap(score)
  assert (lo, hi) != stats.bootstrap(score, seed=1)
  half = 1.96 * score.std() / math.sqrt(score.size)
  assert lo == pytest.approx(score.mean() - half, abs=0.003)
  assert hi == pytest.approx(score.mean() + half, abs=0.003)


def test_bootstrap_of_few_and_of_many_values_agree(rng):
  score = (rng.random(500) < 0.7).astype(float)
  few = stats.bootstrap(score, n=5000)
  many = stats.bootstrap(score + rng.normal(size=500) * 1e-9, n=5000)
  np.testing.assert_allclose(few, many, atol=0.004)


def test_bootstrap_works_through_more_than_one_chunk(rng, monkeypatch):
  score = rng.normal(size=100)
  whole = stats.bootstrap(score, n=50)
  monkeypatch.setattr(stats, "_CHUNK", 700)
  assert stats.bootstrap(score, n=50) == pytest.approx(whole)


@pytest.mark.parametrize("draw", [
    lambda rng, n: (rng.random(n) < 0.7).astype(float),
    lambda rng, n: rng.exponential(size=n)])
def test_bootstrap_covers_the_truth(rng, draw):
  truth = draw(np.random.default_rng(0), 2_000_000).mean()
  inside = 0
  for trial in range(400):
    lo, hi = stats.bootstrap(draw(rng, 200), n=400, seed=trial)
    inside += lo <= truth <= hi
  assert 0.91 <= inside / 400 <= 0.98


def test_paired_bootstrap_is_narrower_than_unpaired_and_covers(rng):
  inside = 0
  for trial in range(400):
    easy = rng.random(300)
    a, b = (easy < 0.80).astype(float), (easy < 0.75).astype(float)  # truth: +0.05
    flip = rng.random(300) < 0.1
    a[flip], b[flip] = 1 - a[flip], 1 - b[flip]  # truth: +0.04
    difference, lo, hi = stats.paired_bootstrap(a, b, n=400, seed=trial)
    assert lo <= difference <= hi
    inside += lo <= 0.04 <= hi
  assert 0.91 <= inside / 400 <= 0.98
  assert hi - lo < 0.6 * (np.subtract(*stats.bootstrap(a)[::-1]) * math.sqrt(2))


def test_paired_bootstrap_refuses_different_rows():
  with pytest.raises(ValueError, match="3 against 2"):
    stats.paired_bootstrap([1, 1, 0], [1, 0])


def test_bootstrap_metric_of_a_mean_is_the_bootstrap(rng):
  labels = rng.integers(0, 3, 400)
  predicted = np.where(rng.random(400) < 0.8, labels, (labels + 1) % 3)
  direct = stats.bootstrap(predicted == labels, n=2000)
  np.testing.assert_allclose(
      stats.bootstrap_metric(stats.accuracy, (predicted, labels), n=2000), direct, atol=0.006)
  by_name = stats.bootstrap_metric(
      lambda x: stats.accuracy(x["p"], x["y"]), {"p": predicted, "y": labels}, n=2000)
  np.testing.assert_allclose(by_name, direct, atol=0.006)


def test_bootstrap_metric_skips_undefined_resamples():
  scores, labels = np.array([0.1, 0.4, 0.8]), np.array([0, 0, 1])
  lo, hi = stats.bootstrap_metric(stats.auroc, (scores, labels), n=200)
  assert (lo, hi) == (1.0, 1.0)


def test_paired_bootstrap_metric_of_accuracy_is_the_paired_bootstrap(rng):
  labels = rng.integers(0, 3, 300)
  a = np.where(rng.random(300) < 0.85, labels, (labels + 1) % 3)
  b = np.where(rng.random(300) < 0.75, labels, (labels + 1) % 3)
  np.testing.assert_allclose(
      stats.paired_bootstrap_metric(stats.accuracy, (a, labels), (b, labels), n=2000),
      stats.paired_bootstrap(a == labels, b == labels, n=2000), atol=0.01)


def test_wilson_known_values():
  assert stats.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
  assert stats.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
  assert stats.wilson(10, 10)[1] == 1.0


# ---- Calibration


def test_ece_by_hand():
  probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
  assert stats.ece(probs, np.array([0, 1, 0, 0]), bins=10) == pytest.approx(0.4)
  table = stats.reliability(probs, np.array([0, 1, 0, 0]), bins=10)
  assert table["count"].tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 2, 0]
  assert table["accuracy"][5] == 1.0 and table["accuracy"][8] == 0.5
  assert np.isnan(table["accuracy"][0])


def test_ece_does_not_depend_on_the_order_of_rows(rng):
  logits, labels = _problem(rng)
  probs, order = stats.softmax(logits), rng.permutation(400)
  assert stats.ece(probs, labels) == pytest.approx(stats.ece(probs[order], labels[order]))


def test_equal_mass_bins_hold_the_same_number_of_rows(rng):
  logits, labels = _problem(rng, n=150)
  table = stats.reliability(stats.softmax(logits), labels, equal_mass=True)
  assert table["count"].tolist() == [10] * 15
  assert (table["lo"] <= table["hi"]).all()
  short = stats.reliability(stats.softmax(logits[:4]), labels[:4], equal_mass=True)
  assert short["count"].sum() == 4
  assert 0 <= stats.ece(stats.softmax(logits[:4]), labels[:4], equal_mass=True) <= 1


def test_perfectly_calibrated_rows_have_little_ece(rng):
  probs = stats.softmax(rng.normal(size=(50_000, 3)) * 2)
  labels = (probs.cumsum(axis=1) > rng.random((50_000, 1))).argmax(axis=1)
  assert stats.ece(probs, labels) < 0.01
  assert stats.ece(probs, labels, equal_mass=True) < 0.01
  assert stats.fit_temperature(np.log(probs), labels) == pytest.approx(1.0, abs=0.03)
  assert stats.fit_temperature(np.log(probs) * 2.5, labels) == pytest.approx(2.5, abs=0.08)


def test_temperature_is_the_minimum(rng):
  logits, labels = _problem(rng, n=300, scale=1.0)
  best = stats.fit_temperature(logits * 3, labels)
  grid = np.exp(np.linspace(np.log(0.05), np.log(20), 4000))
  smooth, hot = 1 / 301, np.eye(logits.shape[1])[labels]
  targets = hot * (1 - smooth) + smooth / logits.shape[1]
  losses = [-(targets * np.log(stats.softmax(logits * 3 / t))).sum(axis=1).mean() for t in grid]
  assert best == pytest.approx(grid[int(np.argmin(losses))], rel=3e-3)


def test_temperature_of_separated_rows_does_not_claim_certainty():
  labels = np.arange(200) % 3
  found = stats.fit_temperature(np.eye(3)[labels] * 10, labels)
  confidence = stats.softmax(np.eye(3) * 10 / found).max()
  # The smoothed share of the right class: 1 - (2 / 3) / 201.
  assert confidence == pytest.approx(1 - 2 / 603, abs=1e-4)


def test_temperature_multi_label(rng):
  probs = rng.random((20_000, 2))
  labels = (rng.random((20_000, 2)) < probs).astype(int)
  logits = 3 * (np.log(probs) - np.log1p(-probs))
  assert stats.fit_temperature(logits, labels) == pytest.approx(3.0, rel=0.05)
  assert stats.ece(probs, labels) < 0.02


def test_blocks_are_resampled_together():
  rng = np.random.default_rng(0)
  independent = rng.normal(size=200)
  score, blocks = np.repeat(independent, 9), np.repeat(rng.permutation(200), 9)
  naive, whole = stats.bootstrap(score, 4000), stats.bootstrap(score, 4000, blocks=blocks)
  alone = stats.bootstrap(independent, 4000)
  # Copies of a row tell nothing new: with blocks the interval is that of the rows themselves.
  assert np.ptp(whole) == pytest.approx(np.ptp(alone), rel=0.05)
  assert np.ptp(naive) == pytest.approx(np.ptp(alone) / 3, rel=0.05)
  uneven = np.concatenate([blocks[:5], np.arange(200, 1995)])
  assert np.ptp(stats.bootstrap(score, 2000, blocks=uneven)) < np.ptp(whole)
  mean = lambda x: float(np.mean(x))  # noqa: E731
  by_metric = stats.bootstrap_metric(mean, (score,), 2000, blocks=blocks)
  assert by_metric == pytest.approx(whole, abs=0.03)
  other = score + rng.normal(size=200).repeat(9)
  found = stats.paired_bootstrap(other, score, 2000, blocks=blocks)
  assert found[0] == pytest.approx((other - score).mean())
  again = stats.paired_bootstrap_metric(mean, (other,), (score,), 2000, blocks=blocks)
  assert again == pytest.approx(found, abs=0.03)
  assert np.ptp(stats.bootstrap(score, 500, blocks=np.zeros(1800))) < 1e-12
