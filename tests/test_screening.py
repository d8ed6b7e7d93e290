"""Measures of diagnosis: against scikit-learn and numbers worked by hand."""

import math

import numpy as np
import pytest
from card import fake_runs
from sklearn import metrics as reference
from tasks.test_classify import make

from ft import card, config, errors, screening

# Ten rows by hand: negatives .1 .2 .3 .4 .5 .7, positives .35 .6 .8 .9.
SCORES = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.35, 0.6, 0.8, 0.9])
POSITIVE = np.arange(10) >= 6


def test_sensitivity_and_threshold_by_hand():
  # At 0.6 five of six negatives lie below, and three of four positives are reached.
  assert screening.threshold(SCORES, POSITIVE, 5 / 6) == 0.6
  assert screening.sensitivity_at(SCORES, POSITIVE, 5 / 6) == 0.75
  assert screening.sensitivity_at(SCORES, POSITIVE, 1.0) == 0.5
  assert screening.sensitivity_at(SCORES, POSITIVE, 0.1) == 1.0
  assert screening.threshold(SCORES[:6], POSITIVE[:6], 1.0) == math.inf
  assert math.isnan(screening.sensitivity_at(SCORES[:6], POSITIVE[:6], 0.9))


@pytest.mark.parametrize("specificity", [0.5, 0.8, 0.9, 0.95, 1.0])
def test_sensitivity_equals_scikit_learn_also_with_ties(specificity):
  rng = np.random.default_rng(0)
  positive = rng.random(400) < 0.3
  scores = np.round(rng.normal(size=400) + positive, 1)
  fpr, tpr, _ = reference.roc_curve(positive, scores, drop_intermediate=False)
  want = tpr[1 - fpr >= specificity - 1e-9].max()
  assert screening.sensitivity_at(scores, positive, specificity) == pytest.approx(want)


def test_predictive_values():
  flagged = SCORES >= 0.6  # 3 hits, 1 miss, 1 alarm, 5 passes
  ppv, npv = screening.predictive_values(flagged, POSITIVE)
  assert ppv == pytest.approx(reference.precision_score(POSITIVE, flagged))
  assert npv == pytest.approx(reference.precision_score(~POSITIVE, ~flagged))
  # Bayes at one in a hundred: .75 * .01 / (.75 * .01 + 1/6 * .99), and 5/6 * .99 / (… + .25 * .01).
  ppv, npv = screening.predictive_values(flagged, POSITIVE, 0.01)
  assert ppv == pytest.approx(0.0075 / 0.1725) and npv == pytest.approx(0.825 / 0.8275)
  assert math.isnan(screening.predictive_values(SCORES > 2, POSITIVE)[0])


def test_decision_curve_by_hand():
  half, quarter = screening.decision_curve(SCORES, POSITIVE, thresholds=(0.5, 0.25))
  # At .5: 3 hits and 2 alarms of 10 rows, odds 1. At .25: 4 hits, 4 alarms, odds 1/3.
  assert half["model"] == pytest.approx(0.3 - 0.2) and half["all"] == pytest.approx(0.4 - 0.6)
  assert quarter["model"] == pytest.approx(0.4 - 0.4 / 3)
  assert quarter["all"] == pytest.approx(0.4 - 0.6 / 3)
  # At a prevalence of .1: .75 * .1 - 2/6 * .9.
  stated, = screening.decision_curve(SCORES, POSITIVE, 0.1, (0.5,))
  assert stated["model"] == pytest.approx(0.075 - 0.3)


def logits(scores):
  return np.stack([np.zeros(len(scores)), np.log(scores / (1 - scores))], 1)


def test_classify_flags_by_the_threshold_of_validation(tmp_path):
  task = make(["healthy", "ill"], specificity=0.8, prevalence=0.01)
  validation = {"logits": logits(SCORES), "label": POSITIVE.astype(int)}
  test = {"logits": logits(SCORES[::2]), "label": POSITIVE[::2].astype(int)}
  assert task.metrics(validation)["sensitivity_at_specificity"] == 0.75
  calibration = task.calibrate(validation)
  chances = 1 / (1 + np.exp(-logits(SCORES)[:, 1] / calibration["temperature"]))
  assert calibration["flag"] == pytest.approx(chances[7])  # the row of 0.6
  found = task.evidence({"validation": validation, "test": test}, calibration)["screening"]
  # Of rows .1 .3 .5 | .35 .8 one positive of two is flagged and no negative.
  of_test = found["splits"]["test"]
  assert (of_test["sensitivity"], of_test["specificity"]) == (0.5, 1.0)
  assert of_test["positives"] == 0.4 and of_test["prevalence"] == 0.01
  assert of_test["ppv"] == 1.0 and of_test["npv"] == pytest.approx(0.99 / 0.995)
  assert found["positive"] == "ill" and found["validation"] == 0.4
  page = card.write(fake_runs.sentiment(screening=found), tmp_path)[1].read_text()
  assert "As a screening test" in page
  assert "a specificity of 80.0 %. Its share of positives is 40.0 %. test has 40.0 %" in page
  # And so does what was saved, row by row.
  again = type(task).from_spec(task.spec(), None)
  flagged = [again.describe({"logits": row}, calibration)["flagged"] for row in logits(SCORES)]
  assert flagged == (SCORES >= 0.6).tolist()


@pytest.mark.parametrize("labels,values,message", [
  (["a", "b", "c"], {"specificity": 0.9}, "name it in task.positive: a, b, c"),
  (["a", "b"], {"specificity": 0.9, "positive": "B"}, "task.positive='B': there is no such label"),
  (["a", "b"], {"prevalence": 0.1}, "read with task.specificity"),
  (["a", "b"], {"specificity": 0.9, "labels_kind": "multi"}, "for one label an example"),
])
def test_messages(labels, values, message):
  with pytest.raises(errors.UserError, match=message):
    make(labels, **values)


@pytest.mark.parametrize("prevalence", [-0.1, 1.5])
def test_a_prevalence_is_a_share(prevalence):
  with pytest.raises(errors.UserError, match=r"task.prevalence.*0.*1"):
    config.complete({"model.source": "m", "data.train": "x.csv", "optim.rate": 1e-3,
                     "task.prevalence": prevalence})
