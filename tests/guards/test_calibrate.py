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


def measured(validation, test, **changes):
  config = guards.defaults("calibrate")
  vars(config).update(changes)
  rows = {"validation": {guards.TUNED: validation}, "test": {guards.TUNED: test}}
  return calibrate.measure(config, guards.Evidence(outputs=rows))


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
    (None, drawn(50), "validation split were recorded"),
    (drawn(50), {"label": np.zeros(40)}, "no class scores of the test"),
    (drawn(50), drawn(7), "the test split has 7 rows"),
    (drawn(50), {"logits": np.full((40, 2), np.nan), "label": np.zeros(40, int)}, "not finite")])
def test_missing_input_is_not_measured(validation, test, reason):
  found = measured(validation, test)
  assert found["verdict"] == "not measured" and reason in found["words"]
