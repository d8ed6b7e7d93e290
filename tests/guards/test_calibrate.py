"""The calibration guard on logits of known over-confidence."""

import numpy as np
import pytest

from ft import guards, stats
from ft.guards import calibrate


def drawn(n, sharper=1.0, seed=0, classes=4):
  """Rows whose labels are drawn from softmax(logits / sharper)."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(n, classes)) * 2
  labels = (stats.softmax(logits).cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
  return {"logits": logits * sharper, "label": labels}


def measured(validation, test, evidence=None, **changes):
  config = guards.defaults("calibrate")
  vars(config).update(changes)
  rows = {"validation": {guards.TUNED: validation}, "test": {guards.TUNED: test}}
  return calibrate.measure(config, guards.Evidence(outputs=rows, **(evidence or {})))


def test_over_confidence_is_found_and_mended():
  found = measured(drawn(4000, 2.5), drawn(4000, 2.5, seed=1))
  numbers = found["numbers"]
  assert numbers["temperature"] == pytest.approx(2.5, rel=0.1)
  assert numbers["before"]["ece"] > 0.1
  assert numbers["after"]["ece"] < 0.04
  assert numbers["after"]["log_loss"] < numbers["before"]["log_loss"]
  assert numbers["after"]["brier"] < numbers["before"]["brier"]
  assert found["verdict"] == "ok" and "after temperature 2." in found["words"]


def test_the_bins_are_those_that_hold_rows():
  bins = measured(drawn(200), drawn(300, seed=1))["numbers"]["after"]["reliability"]
  assert sum(bins["count"]) == 300 and min(bins["count"]) > 0
  assert len(bins["confidence"]) == len(bins["accuracy"]) == len(bins["count"])
  assert all(isinstance(value, float) for value in bins["accuracy"])


def test_limits_make_the_verdict():
  wrong = drawn(500, seed=1)
  wrong["label"] = (wrong["label"] + 1) % 4  # Test rows unlike those of validation.
  assert measured(drawn(500), wrong)["verdict"] == "alarm"
  assert measured(drawn(500), wrong, alarm=1.0)["verdict"] == "warning"


def test_multi_label():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2000, 3))
  rows = {"logits": logits, "label": (rng.random((2000, 3)) < stats.sigmoid(logits)).astype(int)}
  assert measured(rows, rows)["numbers"]["temperature"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("validation, test, reason", [
    (None, drawn(50), "no outputs of the validation split"),
    (drawn(50), {"label": np.zeros(40)}, "hold no class scores"),
    (drawn(50), drawn(7), "the test split has 7 rows"),
    (drawn(50), {"logits": np.full((40, 2), np.nan), "label": np.zeros(40, int)}, "not finite")])
def test_missing_input_is_not_measured(validation, test, reason):
  found = measured(validation, test)
  assert found["verdict"] == "not measured" and reason in found["words"]


def test_sets_of_labels_hold_what_was_asked_and_test_unlike_validation_is_told():
  found = measured(drawn(1000), drawn(2000, seed=1), {"labels": ("a", "b", "c", "d")},
                   coverage=0.8)
  lac, aps = found["numbers"]["conformal"]
  for made in (lac, aps):
    assert made["band"][0] <= made["coverage"] <= made["band"][1] and made["asked"] == 0.8
    assert made["n"] == 2000 == sum(row["n"] for row in made["classes"])
    assert made["coverage"] == pytest.approx(
        sum(row["coverage"] * row["n"] for row in made["classes"]) / 2000)
    assert [row["coverage"] for row in made["classes"]] == sorted(
        row["coverage"] for row in made["classes"])
  assert lac["size"] < aps["size"]  # LAC is the smallest on average
  assert "labels on average hold the right one" in found["words"] and found["verdict"] == "ok"
  other = measured(drawn(1000), drawn(2000, 1.6, seed=1), warning=1.0, alarm=1.0)
  assert other["verdict"] == "warning" and "unlike those of validation" in other["words"]


def test_vector_scaling_mends_what_one_temperature_cannot():
  factor, offset = np.array([0.5, 1.0, 2.0, 1.0]), np.array([0.0, 1.5, -1.0, 0.0])

  def bent(seed):
    rows = drawn(4000, seed=seed)
    return {**rows, "logits": rows["logits"] / factor - offset}

  numbers = measured(bent(0), bent(1))["numbers"]
  true = stats.log_loss(stats.softmax(drawn(4000, seed=1)["logits"]), bent(1)["label"])
  assert numbers["vector"]["log_loss"] == pytest.approx(true, abs=0.01)
  assert numbers["after"]["log_loss"] > true + 0.05
  assert "vector" not in measured(drawn(35), drawn(60, seed=1))["numbers"]  # too few rows a class


def test_intervals_of_a_regression():
  rng = np.random.default_rng(0)

  def rows(n, sd=1.0):
    target = rng.normal(size=n)
    return {"target": target, "prediction": target + sd * rng.normal(size=n)}

  evidence = {"metrics": lambda part: {
      "mae": 7 * np.abs(part["prediction"] - part["target"]).mean()}}
  found = measured(rows(3000), rows(3000), evidence)
  made = found["numbers"]["intervals"]
  assert found["verdict"] == "ok" and made["band"][0] <= made["coverage"] <= made["band"][1]
  assert made["width"] == pytest.approx(7 * 2 * 1.645, rel=0.05)  # of the normal distribution
  assert measured(rows(3000), rows(3000, 1.5), evidence)["verdict"] == "warning"


@pytest.mark.parametrize("quantiles", [False, True])
def test_intervals_of_forecasts(quantiles):
  rng = np.random.default_rng(0)

  def rows(n, sd=1.0):
    shape = (n, 4, 2)
    made = {"forecast": np.zeros(shape), "target": sd * rng.normal(size=shape),
            "observed": np.ones(shape), "std": np.full((n, 2), 3.0), "block": np.arange(n) // 5}
    if quantiles:
      made["quantiles"] = np.stack([np.full(shape, end) for end in (-1.2816, 0.0, 1.2816)], 1)
    return made

  evidence = {"metrics": lambda part: {"coverage_80": 0.0} if quantiles else {},
              "blocks": lambda part: part["block"]}
  found = measured(rows(500), rows(500), evidence)
  made = found["numbers"]["intervals"]
  assert made["coverage"] == pytest.approx(0.8, abs=0.03) and made["asked"] == pytest.approx(0.8)
  assert made["width"] == pytest.approx(3 * 2 * 1.2816, rel=0.06) and found["verdict"] == "ok"
  assert made["interval"][0] < made["coverage"] < made["interval"][1]
  assert measured(rows(500), rows(500, 1.6), evidence)["verdict"] == "warning"
