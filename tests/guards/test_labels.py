"""The labels guard: planted wrong labels on real digits, and what cannot be judged."""

import numpy as np
import pytest
from sklearn import datasets, linear_model, model_selection

from ft import guards, stats
from ft.guards import labels


class Rows(list):
  """Rows as `data.sources.Rows` offers them."""

  roles = {"text": "text", "label": "label"}

  def where(self, i):
    return f"digits.csv: line {i + 2}"


def digits():
  data = datasets.load_digits()
  return data.data / 16.0, data.target


def flipped(label, share=0.1, seed=0, classes=10):
  """(labels of which a share was changed to another class at random, where)."""
  rng = np.random.default_rng(seed)
  wrong = rng.random(len(label)) < share
  changed = label.copy()
  changed[wrong] = (label[wrong] + rng.integers(1, classes, wrong.sum())) % classes
  return changed, wrong


def part(features, label):
  return {"features": np.asarray(features, np.float32), "label": label,
          "index": np.arange(len(label))}


def measured(splits, data=None, names=(), **changes):
  config = guards.defaults("labels")
  vars(config).update(changes)
  return labels.measure(config, guards.Evidence(features=splits, rows=data or {}, labels=names))


def quality(issues, split, wrong):
  """(recall, precision) of the rows listed for a split."""
  listed = np.zeros(len(wrong), bool)
  listed[[row["row"] for row in issues if row["split"] == split]] = True
  return (listed & wrong).sum() / wrong.sum(), (listed & wrong).sum() / max(listed.sum(), 1)


def test_flipped_labels_are_found_out_of_fold_and_on_test():
  features, truth = digits()
  given, wrong = flipped(truth)
  train, test = np.arange(len(truth)) % 3 != 0, np.arange(len(truth)) % 3 == 0
  found = measured({"train": part(features[train], given[train]),
                    "test": part(features[test], given[test])}, listed=1000)
  for split, rows in (("train", train), ("test", test)):
    recall, precision = quality(found["numbers"]["issues"], split, wrong[rows])
    assert recall >= 0.6 and precision >= 0.5, (split, recall, precision)
    row = next(row for row in found["numbers"]["splits"] if row["split"] == split)
    assert row["rate"] == pytest.approx(0.1, abs=0.035)
    assert row["rate_interval"][0] < row["rate"] < row["rate_interval"][1]
  assert found["verdict"] == "warning" and "of train labels look wrong" in found["words"]


def test_the_suggested_label_is_the_true_one():
  features, truth = digits()
  given, wrong = flipped(truth)
  names = tuple("zero one two three four five six seven eight nine".split())
  rows = Rows({"text": f"digit {i}", "label": names[k]} for i, k in enumerate(given))
  issues = measured({"train": part(features, given)}, {"train": rows}, names)["numbers"]["issues"]
  assert len(issues) == 50
  assert [row["confidence"] - row["given_confidence"] for row in issues] == sorted(
      (row["confidence"] - row["given_confidence"] for row in issues), reverse=True)
  right = [row["suggested"] == names[truth[row["row"]]] for row in issues if wrong[row["row"]]]
  assert len(right) > 40 and np.mean(right) > 0.95
  first = issues[0]
  assert first["place"] == f"digits.csv: line {first['row'] + 2}"
  assert first["text"] == f"digit {first['row']}" and first["given"] == names[given[first["row"]]]


def test_clean_labels_are_ok():
  features, truth = digits()
  found = measured({"train": part(features, truth)})
  assert found["verdict"] == "ok"
  assert found["numbers"]["splits"][0]["rate"] < 0.03
  assert found["numbers"]["accuracy"] > 0.93


def test_the_probe_is_logistic_regression():
  """Its answers are those of scikit-learn's, of the same penalty and solved to the end."""
  features, truth = digits()
  fold = np.arange(len(truth)) % labels.FOLDS
  probe = labels.Probe(features, truth, 10, fold)
  scaled = features - features.mean(axis=0)
  scaled /= np.sqrt((scaled**2).sum(axis=1).mean())
  theirs = model_selection.cross_val_predict(
      linear_model.LogisticRegression(C=1 / labels.PENALTY, max_iter=2000), scaled, truth,
      cv=model_selection.PredefinedSplit(fold), method="predict_proba")
  assert (theirs.argmax(axis=1) == probe.probs.argmax(axis=1)).mean() > 0.985
  assert probe.right.mean() == pytest.approx((theirs.argmax(axis=1) == truth).mean(), abs=0.01)
  assert stats.log_loss(probe.probs, truth) < stats.log_loss(theirs, truth) + 0.02


def test_suspects_follow_the_definition():
  """Northcutt et al.: the likeliest of the classes whose mean self-confidence a row reaches."""
  probs = np.array([[0.9, 0.1, 0.0], [0.3, 0.6, 0.1], [0.4, 0.4, 0.2], [0.1, 0.25, 0.65]])
  found = labels.suspects(probs, np.array([0.8, 0.5, 0.3]))
  assert found.tolist() == [0, 1, -1, 2]


@pytest.mark.parametrize("splits, reason", [
    ({}, "no features"),
    ({"train": {"features": np.zeros((40, 3, 2)), "label": np.zeros(40, int)}}, "one vector"),
    ({"train": {"features": np.zeros((40, 3))}}, "one label a row"),
    ({"train": {"pixels": np.zeros((40, 3))}}, "one vector"),
    ({"train": part(np.zeros((40, 3)), np.zeros((40, 2), int))}, "several labels"),
    ({"train": part(np.zeros((40, 3)), np.linspace(0, 1, 40))}, "measured values"),
    ({"train": part(np.full((40, 3), np.nan), np.arange(40) % 2)}, "not finite"),
    ({"train": part(np.zeros((40, 3)), np.arange(40))}, "no two classes have 5 training rows"),
    ({"train": part(np.zeros((40, 3)), np.zeros(40, int))}, "no two classes"),
    ({"train": part(np.zeros((20, 3)), np.arange(20) % 2)}, "fewer than 30")])
def test_missing_input_is_not_measured(splits, reason):
  found = measured(splits)
  assert found["verdict"] == "not measured" and reason in found["words"]


def test_rare_classes_and_unknown_labels_are_left_out():
  features, truth = digits()
  label = truth.copy()
  label[:3], label[3:6] = 10, -1
  numbers = measured({"train": part(features, label)})["numbers"]
  assert numbers["rare"] == {"10": 3} and numbers["classes"] == 10
  assert numbers["n"] == len(label) - 6 and numbers["of"] == len(label) - 3


def test_many_rows_are_sampled_and_the_number_is_said():
  features, truth = digits()
  found = measured({"train": part(features, truth)}, rows=900)
  assert found["numbers"]["n"] == 900
  assert "900 of 1,797 training rows judged" in found["words"]


def test_rows_of_a_group_share_a_fold():
  features, truth = digits()
  rows = Rows({"text": "", "group": i // 3} for i in range(len(truth)))
  rows.roles = {"group": "patient"}
  fold = labels._folds({"index": np.arange(len(truth)), "label": truth}, rows)
  assert len(np.unique(fold)) == labels.FOLDS
  assert (fold.reshape(-1, 3) == fold.reshape(-1, 3)[:, :1]).all()


def test_a_weak_probe_judges_no_labels():
  """Hard rows look like wrong ones to it: it lists them and gives no verdict."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, 2, 500)
  found = measured({"train": part(rng.normal(size=(500, 4)) + 0.3 * label[:, None], label)})
  assert found["verdict"] == "not measured" and "too badly" in found["words"]
  assert found["numbers"]["issues"] and 0.5 < found["numbers"]["accuracy"] < 0.75
  assert found["numbers"]["majority"] == pytest.approx(max(label.mean(), 1 - label.mean()))
