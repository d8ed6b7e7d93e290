"""The drift guard: shifts that were planted, splits at random, and published definitions."""

import numpy as np
import pytest
from scipy import special, stats
from sklearn import datasets

from ft import guards
from ft.data import formats, sources
from ft.guards import drift


def part(features, label=None):
  found = {"features": np.asarray(features, np.float32), "index": np.arange(len(features))}
  return found if label is None else {**found, "label": np.asarray(label)}


def measured(features=None, rows=None, labels=(), **changes):
  config = guards.defaults("drift")
  vars(config).update(changes)
  return drift.measure(config, guards.Evidence(features=features or {}, rows=rows or {},
                                               labels=labels))


def texts(name, values):
  records = [{"text": value} for value in values]
  table = formats.Table(f"{name}.csv", ("text",), records, lambda i: f"{name}.csv: line {i + 2}")
  return sources.Rows(name, table, {"text": "text"}, np.arange(len(records)))


def row(found, key, split="test"):
  return next(r for r in found["numbers"][key] if r["split"] == split)


def test_a_random_split_is_ok():
  data, label = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(data))
  train, test = order[:1200], order[1200:]
  found = measured({"train": part(data[train], label[train]),
                    "test": part(data[test], label[test])})
  assert found["verdict"] == "ok"
  priors, features = row(found, "priors"), row(found, "features")
  assert priors["kl"] < priors["kl_null"] and priors["n"] == len(test)
  assert features["auroc_interval"][0] < 0.5 < features["auroc_interval"][1] + 0.03
  assert features["mmd"] < features["mmd_null"] and features["p"] > 0.05
  assert features["n"] == len(test) and features["of"] == "features"


def test_a_class_that_is_cut_in_train_is_an_alarm():
  """As in the pneumonia set: 10 % of train and 37.5 % of test are normal."""
  rng = np.random.default_rng(0)
  made = {}
  for name, normal, ill in (("train", 388, 3494), ("test", 234, 390)):
    label = np.repeat([0, 1], [normal, ill])
    made[name] = part(rng.normal(size=(len(label), 8)) + label[:, None], label)
  found = measured(made, labels=("normal", "pneumonia"))
  assert found["verdict"] == "alarm"
  priors = row(found, "priors")
  assert priors["label"] == "normal" and priors["change"] == pytest.approx(234 / 624 - 388 / 3882)
  assert priors["change_interval"][0] > 0.23 and priors["kl"] > 50 * priors["kl_null"]
  assert found["words"].startswith("Class normal is 10.0 % of train and 37.5 % of test")
  features = row(found, "features")
  assert features["auroc"] > 0.6  # the shares alone tell the splits apart,
  assert features["auroc_matched"] == pytest.approx(0.5, abs=0.06)  # and nothing else
  assert features["n_matched"] >= 100


def test_features_that_moved_are_flagged():
  rng = np.random.default_rng(0)
  train, test = rng.normal(size=(700, 300)), rng.normal(size=(600, 300))
  test[:, :30] += 0.6
  found = measured({"train": part(train), "test": part(test), "twin": part(train[:300])})
  assert found["verdict"] == "alarm" and "classifier tells train from test rows" in found["words"]
  features = row(found, "features")
  assert features["auroc_interval"][0] > 0.8 and features["mmd"] > features["mmd_null"]
  assert features["p"] == pytest.approx(1 / 201)
  assert [r["split"] for r in found["numbers"]["features"]] == ["test", "twin"]


def test_texts_are_compared_by_their_words():
  rng = np.random.default_rng(0)
  words = np.array([f"w{chr(97 + i % 26)}{i}" for i in range(200)])
  draw = lambda n, first: [" ".join(rng.choice(words[first:first + 120], 12))  # noqa: E731
                           for _ in range(n)]
  same = measured(rows={"train": texts("train", draw(400, 0)), "test": texts("test", draw(300, 0))})
  assert same["verdict"] == "ok" and row(same, "features")["of"] == "words"
  assert "by their words" in same["words"]
  moved = measured(rows={"train": texts("train", draw(400, 0)),
                         "test": texts("test", draw(300, 80))})
  assert moved["verdict"] == "alarm"
  reasons = {r["part"]: r["reason"] for r in moved["numbers"]["missing"]}
  assert "no single class" in reasons["class shares"]


def test_kl_and_total_variation_are_the_definitions():
  train, other = ["a"] * 60 + ["b"] * 40, ["a"] * 20 + ["b"] * 25 + ["c"] * 5
  found = drift.shares(train, other)
  p, q = np.array([60.5, 40.5, 0.5]), np.array([20.5, 25.5, 5.5])
  assert found["kl"] == pytest.approx(special.rel_entr(q / q.sum(), p / p.sum()).sum())
  assert found["total_variation"] == pytest.approx((0.2 + 0.1 + 0.1) / 2)
  assert (found["label"], found["change"]) == ("a", pytest.approx(-0.2))


def test_the_threshold_of_kl_holds_without_drift():
  rng = np.random.default_rng(0)
  chance = rng.dirichlet(np.ones(12))
  above = 0
  for _ in range(200):
    train, other = (rng.choice(12, n, p=chance).tolist() for n in (900, 300))
    found = drift.shares(train, other)
    above += found["kl"] > found["kl_null"]
  assert stats.binom.cdf(above, 200, 0.05) < 0.999


def test_the_interval_of_a_change_is_newcombes():
  """Example (a) of Newcombe (1998), table II, method 10: 56/70 against 48/80."""
  lo, hi = drift._newcombe(48, 80, 56, 70)
  assert (lo, hi) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


def test_mmd_is_the_unbiased_estimate():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(40, 3)), rng.normal(1, 1, size=(30, 3))
  both = (np.concatenate([a, b]) - np.concatenate([a, b]).mean(0)) / np.concatenate([a, b]).std(0)
  far = ((both[:, None] - both[None]) ** 2).sum(-1)
  kernel = np.exp(-far / np.median(far[np.triu_indices(70, 1)]))
  pairs = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
  known = pairs(kernel[:40, :40]) + pairs(kernel[40:, 40:]) - 2 * kernel[:40, 40:].mean()
  value, null, p = drift.distance(a.astype(np.float32), b.astype(np.float32), 100)
  assert value == pytest.approx(known, rel=1e-4)
  assert value > null and p < 0.05


class Series:
  name, season = "sensor", 24

  def __init__(self, values):
    self.actual, self.observed = values, np.ones_like(values)


class Windows:
  labels = classes = None
  roles = ()

  def __init__(self, values, part):
    self.series, self.parts, self.places = (Series(values),), np.array([part]), np.zeros((9, 2))

  def __len__(self):
    return 9

  def __getitem__(self, i):
    return {"window": i}


@pytest.mark.parametrize("shift, verdict", [(0.0, "ok"), (2.5, "warning")])
def test_series_that_moved(shift, verdict):
  rng = np.random.default_rng(0)
  values = rng.normal(size=(900, 2))
  values[600:, 1] += shift
  rows = {"train": Windows(values, (0, 600)), "test": Windows(values, (600, 900))}
  found = measured(rows=rows)
  assert found["verdict"] == verdict
  level = row(found, "levels")
  assert level["level"] == pytest.approx(shift, abs=0.15)
  assert level["n"] == 300 and level["level_interval"][0] < shift + 0.1


@pytest.mark.parametrize("features, reason", [
    ({}, "neither features"),
    ({"train": {"pixels": np.zeros((40, 2))}, "test": {"pixels": np.zeros((40, 2))}}, "neither"),
    ({"train": part(np.zeros((20, 2))), "test": part(np.zeros((60, 2)))}, "20 rows, fewer than 30"),
    ({"train": part(np.zeros((40, 2))), "test": part(np.zeros((8, 2)))}, "no split beside train"),
    ({"train": part(np.full((40, 2), np.nan)), "test": part(np.zeros((40, 2)))}, "not finite")])
def test_missing_input_is_not_measured(features, reason):
  found = measured(features)
  assert found["verdict"] == "not measured" and reason in found["words"]


def test_several_labels_a_row_have_no_class_shares():
  label = np.zeros((60, 3), int)
  rng = np.random.default_rng(0)
  found = measured({"train": part(rng.normal(size=(60, 4)), label),
                    "test": part(rng.normal(size=(60, 4)), label)})
  assert not found["numbers"]["priors"] and found["numbers"]["features"]


def test_a_train_split_of_one_class_has_no_class_shares():
  """As where defects are sought, which train has none of."""
  rng = np.random.default_rng(0)
  found = measured({"train": part(rng.normal(size=(60, 4)), np.zeros(60, int)),
                    "test": part(rng.normal(size=(60, 4)), np.arange(60) % 2)})
  assert not found["numbers"]["priors"]
  assert "one class only" in found["numbers"]["missing"][0]["reason"]


@pytest.mark.parametrize("values", [1, 3])
def test_equal_scores_tell_nothing_apart(values):
  """As of texts of one digit each: the order of rows must not tell them apart."""
  rng = np.random.default_rng(0)
  found = measured({name: part(rng.integers(0, values, (300, 1)).astype(float))
                    for name in ("train", "test")})
  seen = row(found, "features")
  assert found["verdict"] == "ok" and abs(seen["auroc"] - 0.5) < 0.06
  assert seen["auroc_interval"][0] <= 0.5 <= seen["auroc_interval"][1]
