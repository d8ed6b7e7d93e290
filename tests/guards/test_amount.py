"""Is there enough data: planted curves and duplicates are found, probes are scikit-learn's."""

import types

import numpy as np
import pytest
from sklearn import discriminant_analysis, linear_model

from ft import duplicates, guards, learning_curve
from ft.card.evidence import amount as page
from ft.guards import amount
from ft.learning_curve import Part


def blobs(n, classes=6, seed=0, apart=1.6, width=24):
  """Part of classes whose centres are the same for every seed."""
  centres = np.random.default_rng(99).normal(size=(classes, width)) * apart / np.sqrt(2)
  rng = np.random.default_rng(seed)
  target = rng.permutation(np.arange(n) % classes)
  return Part((centres[target] + rng.normal(size=(n, width)) * 1.5).astype(np.float32), target)


def features(**parts):
  key = "label" if next(iter(parts.values())).target.dtype.kind in "iu" else "target"
  return {split: {"features": part.features, key: part.target, "index": np.arange(len(part.target))}
          for split, part in parts.items()}


def measured(evidence, **given):
  config = types.SimpleNamespace(**vars(guards.defaults("amount")) | given)
  return guards.measure(types.SimpleNamespace(amount=config), evidence, ["amount"])["amount"]


# ---- The fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("a,b,c", [(2.0, 0.5, 0.05), (0.9, 0.25, 0.0), (30.0, 1.1, 0.2)])
def test_planted_curves_are_recovered(a, b, c):
  n = np.array([100, 200, 400, 800, 1600])
  found = learning_curve.fit(n, a * n**-b + c)
  assert found.a == pytest.approx(a, rel=0.01)
  assert found.b == pytest.approx(b, rel=0.01)
  assert found.c == pytest.approx(c, abs=1e-3)


def test_a_planted_curve_lies_in_its_band():
  n, rng = np.array([100, 200, 400, 800, 1600, 3200]), np.random.default_rng(1)
  truth = 3 * n**-0.6 + 0.08
  wrong = (rng.random((6, 4, 4000)) < truth[:, None, None]).astype(np.float32)
  told = amount.account(learning_curve.Curve(n, wrong), 3200)
  for row in told["predicted"]:
    assert row["n"] in (6400, 12800)
    assert row["lo"] < 3 * row["n"]**-0.6 + 0.08 < row["hi"]
    assert row["hi"] - row["lo"] < 0.05
  assert told["fit"]["c_interval"][0] < 0.08 < told["fit"]["c_interval"][1]
  slope = 3 * 3200**-0.6 - 3 * 3300**-0.6
  assert told["per_100"]["interval"][0] < slope < told["per_100"]["interval"][1]


def test_three_sizes_carry_no_three_parameters():
  with pytest.raises(ValueError, match="3 sizes cannot carry three parameters"):
    learning_curve.fit([100, 200, 400], [0.3, 0.2, 0.15])


def test_nothing_is_predicted_beyond_four_times_the_rows_of_the_curve():
  wrong = np.stack([np.full((3, 50), e, np.float32) for e in (0.4, 0.3, 0.25, 0.22)])
  told = amount.account(learning_curve.Curve(np.array([50, 100, 200, 400]), wrong), 800)
  assert [row["n"] for row in told["predicted"]] == [1600]  # of 800 rows, 400 in the curve
  assert max(row["n"] for row in told["curve"]) == 1600


@pytest.mark.parametrize("rows", [900, 5000])
def test_nothing_is_said_beyond_four_times_what_was_measured(rows):
  """Of 900 rows twice as many, of 5,000 rows even these, are out of reach of a curve of 400."""
  wrong = np.stack([np.full((3, 50), e, np.float32) for e in (0.4, 0.3, 0.25, 0.22)])
  told = amount.account(learning_curve.Curve(np.array([50, 100, 200, 400]), wrong), rows)
  assert told["predicted"] == [] and told["doubled"]["n"] == 1600
  fit = told["fit"]
  want = fit["a"] * (800**-fit["b"] - 1600**-fit["b"])
  assert told["doubled"]["gain"] == pytest.approx(want, abs=1e-6)
  assert (told["per_100"] is None) == (rows == 5000)


# ---- Subsets and probes --------------------------------------------------------------------------


def test_beginnings_of_the_order_hold_every_class_in_proportion():
  strata = np.repeat([7, 3, 5], [600, 300, 12])
  rows = learning_curve.order(strata, np.random.default_rng(0))
  assert sorted(rows) == list(range(912))
  assert set(strata[rows[:3]]) == {3, 5, 7}
  share = np.mean(strata[rows[:152]] == 7)
  assert share == pytest.approx(600 / 912, abs=0.02)
  assert not np.array_equal(rows, learning_curve.order(strata, np.random.default_rng(1)))


def test_the_discriminant_is_that_of_scikit_learn(monkeypatch):
  train, other = blobs(400), blobs(300, seed=1)
  # scikit-learn shrinks to (1 - s) S + s mean(S) I; ours is S + t mean(S) I: t = s / (1 - s).
  monkeypatch.setattr(learning_curve, "SHRINK", (0.25 / 0.75,))
  ours = learning_curve.discriminant(train, other)(other.features)
  model = discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.25)
  theirs = model.fit(train.features, train.target).decision_function(other.features)
  assert np.mean(ours.argmax(1) == theirs.argmax(1)) > 0.99


def test_ridge_is_that_of_scikit_learn(monkeypatch):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 10)).astype(np.float32)
  y = (x @ rng.normal(size=10) + 3 + rng.normal(size=200)).astype(np.float32)
  monkeypatch.setattr(learning_curve, "RIDGE", (0.1,))
  ours = learning_curve.ridge(Part(x, y), Part(x, y))(x)[:, 0]
  size = learning_curve._scale(x)[1]
  theirs = linear_model.Ridge(alpha=0.1 * 200 * size**2).fit(x, y).predict(x)
  np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_errors_by_kind_of_target():
  assert learning_curve.errors(np.array([[1, 0], [1, 0]]), np.array([0, 1])).tolist() == [0, 1]
  multi = learning_curve.errors(np.array([[1, -1, 1, -1.0]]), np.array([[1, 0, 0, 0.0]]))
  assert multi.tolist() == [0.25]
  assert learning_curve.errors(np.array([[2.0]]), np.array([0.5])).tolist() == [1.5]


def test_wide_features_keep_what_tells_classes_apart():
  train = blobs(300, width=600, apart=0.6)
  narrow, = learning_curve.narrowed([train])
  assert narrow.features.shape == (300, learning_curve.WIDEST)
  before, after = (np.linalg.norm(x - x.mean(0)) for x in (train.features, narrow.features))
  assert after == pytest.approx(before, rel=1e-3)  # 300 rows span fewer than 512 dimensions


# ---- Near-duplicates -----------------------------------------------------------------------------


def test_planted_duplicates_are_left_out_across_blocks(monkeypatch):
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(70, 40)).astype(np.float32)
  copies = rows[rng.integers(0, 70, 50)] + 0.02 * rng.normal(size=(50, 40)).astype(np.float32)
  mixed = np.concatenate([rows, copies])[rng.permutation(120)]
  assert amount.effective(mixed, 0.95)["n"] == 70
  monkeypatch.setattr(duplicates, "_BLOCK", (16, 16))
  assert amount.effective(mixed, 0.95)["n"] == 70


def test_features_that_are_all_alike_tell_no_duplicates():
  rows = 10 + np.random.default_rng(0).normal(size=(200, 20)).astype(np.float32)
  assert "do not tell near-duplicates" in amount.effective(rows, 0.95)["missing"]


# ---- The guard -----------------------------------------------------------------------------------


def test_classes_give_a_falling_curve_and_every_number():
  evidence = guards.Evidence(
      features=features(train=blobs(1600), validation=blobs(200, seed=1), test=blobs(900, seed=2)),
      history=[{"step": 500}], gathered={"amount": {"batch": 32, "rows": 1600}})
  found = measured(evidence)
  numbers = found["numbers"]
  assert found["verdict"] in ("ok", "warning")
  assert [row["n"] for row in numbers["points"]] == [100, 200, 400, 800, 1600]
  errors = [row["error"] for row in numbers["points"]]
  assert errors[0] > errors[2] > errors[-1]
  assert all(row["lo"] <= row["error"] <= row["hi"] for row in numbers["points"])
  assert numbers["passes"] == 10.0
  assert "10.0 times" in found["words"]
  assert "linear discriminant" in found["words"]
  assert numbers["per_class"]["median"] == pytest.approx(1600 / 6, abs=1)
  assert "LoRA" in numbers["method"]
  assert numbers["points"][-1]["draws"] == 1


def test_more_rows_than_the_curve_is_of():
  evidence = guards.Evidence(features=features(
      train=blobs(1000), validation=blobs(100, seed=1), test=blobs(300, seed=2)))
  found = measured(evidence, rows=400, gain=0.5)
  assert found["verdict"] == "ok"
  assert "with 400 rows of 1,000; going from 800 to 1,600" in found["words"]
  found = measured(evidence, rows=400, gain=-1.0)
  assert found["verdict"] == "not measured"
  assert "raise guard.amount.rows to 500 or more" in found["words"]
  assert "predicted, 4 times" not in page.section(found["numbers"], {})
  found = measured(evidence, rows=200, gain=0.5)
  assert found["numbers"]["per_100"] is None and "next 100 labels" not in found["words"]
  assert "Next 100 labels" not in page.section(found["numbers"], {})


def test_one_class_is_not_measured():
  one = Part(np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32),
             np.zeros(400, int))
  found = measured(guards.Evidence(features=features(train=one, validation=one, test=one)))
  assert found["verdict"] == "not measured" and "one class only" in found["words"]


def test_the_words_follow_the_gain_asked_for():
  evidence = guards.Evidence(features=features(
      train=blobs(320), validation=blobs(100, seed=1), test=blobs(300, seed=2)))
  assert measured(evidence, gain=0.0)["verdict"] == "warning"
  assert measured(evidence, gain=0.5)["verdict"] == "ok"


def test_numbers_are_judged_in_standard_deviations():
  rng = np.random.default_rng(0)
  weight = rng.normal(size=12) / np.sqrt(12)

  def part(n):
    x = rng.normal(size=(n, 12)).astype(np.float32)
    return Part(x, (x @ weight + 0.3 * rng.normal(size=n)).astype(np.float32))

  found = measured(guards.Evidence(features=features(train=part(800), validation=part(100),
                                                     test=part(300))))
  last = found["numbers"]["points"][-1]["error"]
  assert last == pytest.approx(0.3 * np.sqrt(2 / np.pi), rel=0.15)  # the noise's mean |x|
  assert found["numbers"]["unit"] == "standard deviations of the target"
  assert "method" not in found["numbers"]


def test_several_labels_a_row():
  rng = np.random.default_rng(0)
  weight = rng.normal(size=(12, 3))

  def part(n):
    x = rng.normal(size=(n, 12)).astype(np.float32)
    return Part(x, (x @ weight + rng.normal(size=(n, 3)) > 0).astype(np.float32))

  given = {split: {"features": p.features, "label": p.target, "index": np.arange(len(p.target))}
           for split, p in dict(train=part(400), validation=part(100), test=part(200)).items()}
  numbers = measured(guards.Evidence(features=given))["numbers"]
  assert numbers["unit"] == "share of wrong labels"
  assert numbers["probe"] == "ridge regression"
  assert numbers["points"][-1]["error"] < 0.2


@pytest.mark.parametrize("sizes,reason", [
    ((1600, 200, 20), "test split has 20 rows, fewer than 30"),
    ((40, 200, 100), "train has 40 rows, too few for 4 subsets"),
    ((1600, 0, 100), "the validation split has no rows"),
])
def test_too_few_rows_are_not_measured(sizes, reason):
  parts = [blobs(n, seed=i) for i, n in enumerate(sizes)]
  found = measured(guards.Evidence(features=features(
      train=parts[0], validation=parts[1], test=parts[2])))
  assert found["verdict"] == "not measured"
  assert reason in found["words"]


def test_subsets_smaller_than_the_classes_are_not_measured():
  many = [blobs(n, classes=60, seed=i) for i, n in enumerate((300, 120, 120))]
  found = measured(guards.Evidence(features=features(
      train=many[0], validation=many[1], test=many[2])))
  assert "of at least 60 rows (one of each class)" in found["words"]


def test_no_features_are_not_measured():
  assert "are not recorded" in measured(guards.Evidence())["words"]
  flat = {split: {"features": np.zeros((50, 3, 4)), "label": np.zeros(50, int)}
          for split in ("train", "validation", "test")}
  assert "one vector a row" in measured(guards.Evidence(features=flat))["words"]


def test_logistic_regression_of_numbers_is_not_measured():
  part = Part(np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32),
              np.zeros(200, np.float32))
  found = measured(guards.Evidence(features=features(train=part, validation=part, test=part)),
                   probe="logistic")
  assert "the target is a number" in found["words"]


@pytest.mark.parametrize("per_class,rows,word", [
    (2, 20, "nearest"), (8, 80, "few_shot"), (120, 10_000, "LoRA"), (1001, 4_000, "LoRA"),
    (3000, 6_000, "full")])
def test_the_method_for_so_many_rows(per_class, rows, word):
  assert word in amount.suggest(per_class, rows)


def test_the_page_shows_measured_and_predicted():
  evidence = guards.Evidence(features=features(
      train=blobs(320), validation=blobs(100, seed=1), test=blobs(300, seed=2)))
  numbers = measured(evidence)["numbers"]
  numbers["method"] = "<script>"
  shown = page.section(numbers, {})
  assert shown.count("<circle") == len(numbers["points"])
  assert 'class="band"' in shown
  assert "predicted, 4 times the rows" in shown
  assert "<script>" not in shown
