"""Classification: losses against formulas and torch, metrics, baselines and what users see."""

import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from ft import errors, mixing, probes, stats
from ft.tasks import classify

LOGITS = np.float32([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-1.0, 3.0, 0.0], [0.0, 0.0, 5.0]])


@dataclasses.dataclass
class Rows:
  name: str
  values: list

  def __len__(self):
    return len(self.values)

  def __getitem__(self, i):
    return {"text": f"row {i}", "label": self.values[i]}

  def where(self, i):
    return f"{self.name}.csv: line {i + 2}"

  @functools.cached_property
  def labels(self):
    return self.values


@dataclasses.dataclass
class Data:
  splits: dict
  columns: dict


class Preprocess:
  def __call__(self, row):
    return {"input_ids": np.arange(3, dtype=np.int32)}

  def finish(self, batch):
    return {key: 2 * value for key, value in batch.items()}


def make(train, *, columns=("text",), splits=None, **values):
  defaults = {name: entry[0] for name, entry in classify.KEYS.items()}
  everything = {"train": train, **(splits or {})}
  data = Data({n: Rows(n, v) for n, v in everything.items()}, dict.fromkeys(columns, "x"))
  return classify.Task(config_dict.ConfigDict({**defaults, **values}), data, Preprocess())


def constant(logits, seen=None):
  """An apply that returns these logits and keeps what it was called with."""
  def apply(variables, inputs, rng):
    if seen is not None:
      seen.append((variables, inputs, rng))
    return {"logits": jnp.asarray(logits), "features": jnp.ones((len(logits), 2))}
  return apply


def batch(label, weight=None):
  n = len(label)
  return {"input_ids": np.ones((n, 3), np.int32), "label": np.asarray(label),
          "weight": np.ones(n, np.float32) if weight is None else np.asarray(weight, np.float32),
          "index": np.arange(n, dtype=np.int32)}


ABC = ["a", "b", "c", "c"]


# ---- Labels ----


def test_labels_are_sorted_and_integers_by_value():
  assert make(["dog", "cat", "dog"]).labels == ["cat", "dog"]
  assert make([10, 9, 2]).labels == ["2", "9", "10"]
  assert make(["10", "9"], splits={"test": [9, 10]}).labels == ["9", "10"]
  task = make(["a|b", "b", ["c", "a"], ""], labels_kind="multi")
  assert task.labels == ["a", "b", "c"]
  assert task.model_args == {"num_labels": 3, "labels": ["a", "b", "c"]}


def test_examples():
  example = make(ABC).example({"label": "b"})
  assert example["label"] == 1 and example["label"].dtype == np.int32
  assert example["label"].shape == () and "input_ids" in example
  example = make(["a|b", "c"], labels_kind="multi").example({"label": ["c", "a"]})
  np.testing.assert_array_equal(example["label"], np.float32([1, 0, 1]))


@pytest.mark.parametrize("values,kwargs,message", [
  (["a", "b"], {"splits": {"test": ["a", "B"]}}, "test.csv: line 3: label 'B' of test does not "
                                                  "occur in train.*train has a, b"),
  (["spam", "ham"], {"splits": {"test": ["spamm"]}}, "did you mean 'spam'"),
  (["a", "a"], {}, "label a only"),
  (["a", None], {}, "train.csv: line 3: the label is missing"),
  ([0.5, 1], {}, "line 2: the label 0.5 is a measured value.*binarize"),
  ([["a", "b"], "c"], {}, "labels_kind='multi'"),
  (ABC, {"mixup": 0.2}, "mixup mixes images"),
])
def test_messages(values, kwargs, message):
  with pytest.raises(errors.UserError, match=message):
    make(values, **kwargs)


def test_no_label_column():
  rows = Rows("train", None)
  rows.table = type("Table", (), {"columns": ("text", "intent")})
  defaults = {name: entry[0] for name, entry in classify.KEYS.items()}
  with pytest.raises(errors.UserError, match="data.columns.label, one of text, intent"):
    classify.Task(config_dict.ConfigDict(defaults), Data({"train": rows}, {"text": "text"}), None)


# ---- Loss ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_single_loss_equals_torch(smoothing, weights):
  torch = pytest.importorskip("torch")
  task = make(ABC, label_smoothing=smoothing, class_weights=weights)
  label = np.array([0, 1, 2, 2])
  total, weight, aux = task.loss(constant(LOGITS), {}, batch(label), None)
  classes = {"none": None, "balanced": torch.tensor([4 / 3, 4 / 3, 2 / 3])}[weights]
  reference = torch.nn.CrossEntropyLoss(weight=classes, label_smoothing=smoothing)(
    torch.tensor(LOGITS), torch.tensor(label))
  # torch spreads smoothing with the weights of all classes; without weights both are the same.
  if not (smoothing and classes is not None):
    np.testing.assert_allclose(total / weight, reference, rtol=1e-6)
  rows = np.ones(4) if classes is None else np.array([4 / 3, 4 / 3, 2 / 3, 2 / 3])
  np.testing.assert_allclose(weight, rows.sum(), rtol=1e-6)
  np.testing.assert_allclose(aux["accuracy"], rows[[0, 3]].sum(), rtol=1e-6)


def test_padding_is_masked_and_sums_add_up():
  task = make(ABC, class_weights="balanced", label_smoothing=0.1)
  whole = task.loss(constant(LOGITS), {}, batch([0, 1, 2, 2], [1, 1, 1, 0]), None)
  parts = [task.loss(constant(LOGITS[i:i + 1]), {}, batch([y]), None)
           for i, y in enumerate([0, 1, 2])]
  np.testing.assert_allclose(whole[0], sum(p[0] for p in parts), rtol=1e-6)
  np.testing.assert_allclose(whole[1], sum(p[1] for p in parts), rtol=1e-6)
  np.testing.assert_allclose(whole[2]["accuracy"], sum(p[2]["accuracy"] for p in parts), rtol=1e-6)


def test_logit_adjustment_adds_the_log_prior_in_training_only():
  task, plain = make(ABC, logit_adjustment=1.5), make(ABC)
  adjusted = LOGITS + 1.5 * np.log([0.25, 0.25, 0.5]).astype(np.float32)
  b = batch([0, 1, 2, 2])
  np.testing.assert_allclose(task.loss(constant(LOGITS), {}, b, None)[0],
                             plain.loss(constant(adjusted), {}, b, None)[0], rtol=1e-6)
  np.testing.assert_array_equal(task.predict(constant(LOGITS), {}, b)["logits"], LOGITS)


def test_multi_loss_equals_torch():
  torch = pytest.importorskip("torch")
  task = make(["a|b", "b", "", "c"], labels_kind="multi")
  hot = np.float32([[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
  total, weight, aux = task.loss(constant(LOGITS), {}, batch(hot), None)
  reference = torch.nn.BCEWithLogitsLoss()(torch.tensor(LOGITS), torch.tensor(hot))
  np.testing.assert_allclose(total / weight, reference, rtol=1e-6)
  assert aux["accuracy"] == 1  # only the last row has all three decisions right


def test_multi_balanced_weighs_both_sides_alike():
  task = make(["a", "a", "a", ""], labels_kind="multi", class_weights="balanced")
  share = 3.5 / 5
  total, weight, _ = task.loss(constant(np.zeros((2, 1))), {}, batch(np.float32([[1], [0]])), None)
  np.testing.assert_allclose(weight, 0.5 / share + 0.5 / (1 - share), rtol=1e-6)
  np.testing.assert_allclose(total / weight, np.log(2), rtol=1e-6)


def test_gradient_is_finite_for_extreme_logits():
  task = make(ABC)
  grad = jax.grad(lambda x: task.loss(constant(x), {}, batch([0, 1, 2, 2]), None)[0])(1e4 * LOGITS)
  assert np.isfinite(grad).all()


def test_apply_gets_finished_inputs_or_features_alone():
  seen, task = [], make(ABC)
  task.loss(constant(LOGITS, seen), {"params": 1}, batch([0, 1, 2, 2]), jax.random.key(0))
  variables, inputs, rng = seen.pop()
  assert variables == {"params": 1} and list(inputs) == ["input_ids"] and rng is not None
  np.testing.assert_array_equal(inputs["input_ids"], 2 * np.ones((4, 3)))  # finish ran
  cached = {"features": np.ones((4, 2), np.float32), **batch([0, 1, 2, 2])}
  task.predict(constant(LOGITS, seen), {}, cached)
  assert list(seen[0][1]) == ["features"] and seen[0][2] is None
  found = task.features(constant(LOGITS), {}, batch([0, 1, 2, 2]))
  assert found["features"].shape == (4, 2)
  np.testing.assert_array_equal(found["label"], [0, 1, 2, 2])
  assert "label" not in task.predict(constant(LOGITS), {}, {"input_ids": np.ones((4, 3))})


# ---- Mixup ----


def test_mixup():
  pixels = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 2, 2, 3))
  hot, weight = jnp.eye(4), jnp.array([1.0, 1.0, 1.0, 0.0])
  inputs, mixed = mixing.mix({"pixel_values": pixels}, hot, weight, jax.random.key(0), alpha=1.0)
  np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-6)
  np.testing.assert_array_equal(inputs["pixel_values"][0], pixels[0])  # its partner is padding
  for i, j in ((1, 2), (2, 1)):
    share = mixed[i, i]
    assert 0 < share < 1 and mixed[i, j] == 1 - share
    np.testing.assert_allclose(inputs["pixel_values"][i], share * i + (1 - share) * j, rtol=1e-5)


def test_mixup_acts_in_training_only():
  task = make([0, 1, 1], columns=("image",), mixup=0.5)
  images = {**batch([0, 0, 1, 1]), "pixel_values": np.ones((4, 2, 2, 3), np.float32)}
  del images["input_ids"]
  seen = []
  apply = constant(LOGITS[:, :2], seen)
  soft = [float(task.loss(apply, {}, images, rng)[0])
          for rng in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))]
  assert soft[1] == soft[2] and len(set(soft)) == 3
  np.testing.assert_allclose(seen[0][1]["pixel_values"], 2 * images["pixel_values"])
  cached = {"features": np.ones((4, 2), np.float32), **batch([0, 1, 1, 0])}
  with pytest.raises(errors.UserError, match="set task.mixup=0"):
    task.loss(apply, {}, cached, jax.random.key(0))


# ---- Metrics ----


def outputs(n=200, classes=3, seed=0):
  rng = np.random.default_rng(seed)
  label = rng.integers(0, classes, n)
  logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[label]
  return {"logits": logits.astype(np.float32), "label": label}


def test_metrics_equal_sklearn():
  metrics = pytest.importorskip("sklearn.metrics")
  out, task = outputs(), make(ABC)
  found = task.metrics(out)
  p, said = stats.softmax(out["logits"]), out["logits"].argmax(1)
  np.testing.assert_allclose(found["accuracy"], metrics.accuracy_score(out["label"], said))
  f1 = metrics.f1_score(out["label"], said, average="macro")
  np.testing.assert_allclose(found["macro_f1"], f1)
  np.testing.assert_allclose(found["log_loss"], metrics.log_loss(out["label"], p), rtol=1e-6)
  np.testing.assert_allclose(
    found["auroc"], metrics.roc_auc_score(out["label"], p, multi_class="ovr"))
  recalls = metrics.recall_score(out["label"], said, average=None)
  np.testing.assert_allclose([found[f"recall/{name}"] for name in "abc"], recalls)
  assert 0 <= found["ece"] <= 1
  assert task.score(out).mean() == pytest.approx(found["accuracy"])


def test_top_five_equals_sklearn():
  metrics = pytest.importorskip("sklearn.metrics")
  out, names = outputs(classes=7), list("abcdefg")
  found = make(names).metrics(out)["top5_accuracy"]
  np.testing.assert_allclose(
    found, metrics.top_k_accuracy_score(out["label"], out["logits"], k=5, labels=range(7)))
  assert "top5_accuracy" not in make(names[:5]).metrics(outputs(classes=5))


def test_binary_auroc_is_of_the_last_label():
  metrics = pytest.importorskip("sklearn.metrics")
  out = outputs(classes=2)
  np.testing.assert_allclose(
    make(["no", "yes"]).metrics(out)["auroc"],
    metrics.roc_auc_score(out["label"], out["logits"][:, 1] - out["logits"][:, 0]))


def test_multi_metrics_equal_sklearn():
  metrics = pytest.importorskip("sklearn.metrics")
  rng = np.random.default_rng(0)
  hot = (rng.random((100, 3)) < 0.4).astype(np.float32)
  out = {"logits": rng.normal(size=(100, 3)) + hot, "label": hot}
  found = make(["a|b|c", "a", "b"], labels_kind="multi").metrics(out)
  said = out["logits"] > 0
  np.testing.assert_allclose(found["accuracy"], metrics.accuracy_score(hot, said))
  np.testing.assert_allclose(found["macro_f1"], metrics.f1_score(hot, said, average="macro"))
  np.testing.assert_allclose(found["auroc"], metrics.roc_auc_score(hot, out["logits"]))
  np.testing.assert_allclose([found[f"recall/{name}"] for name in "abc"],
                             metrics.recall_score(hot, said, average=None))


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "auroc"])
@pytest.mark.parametrize("multi", [False, True])
def test_value_is_the_selection_metric(metric, multi):
  kind = "multi" if multi else "single"
  task, out = make(ABC, metric=metric, labels_kind=kind), outputs()
  if multi:
    out["label"] = np.eye(3)[out["label"]]
  assert task.metric == (metric, "max")
  assert task.value(out) == pytest.approx(task.metrics(out)[metric], abs=1e-12)


def test_metrics_of_logits_that_are_not_finite_are_nan():
  out = outputs()
  out["logits"][0, 0] = np.nan
  assert all(np.isnan(value) for value in make(ABC).metrics(out).values())


def test_absent_classes_have_no_recall():
  found = make(ABC).metrics({"logits": LOGITS[:2], "label": np.array([0, 0])})
  assert "recall/a" in found and "recall/b" not in found


# ---- Calibration, description, saving ----


def test_describe_is_json_and_calibrated():
  task = make(ABC)
  answer = task.describe({"logits": LOGITS[0]}, {"temperature": 2.0})
  json.dumps(answer)
  assert answer["label"] == "a"
  np.testing.assert_allclose(list(answer["probabilities"].values()), stats.softmax(LOGITS[0] / 2))
  assert answer["confidence"] == max(answer["probabilities"].values())


def test_describe_multi():
  task = make(["a|b", "c"], labels_kind="multi")
  answer = task.describe({"logits": np.array([3.0, -1.0, 0.5])}, {"temperature": 1.0})
  assert answer["label"] == ["a", "c"]
  assert answer["confidence"] == pytest.approx(stats.sigmoid(0.5))
  assert task.describe({"logits": np.full(3, -9.0)}, {"temperature": 1.0})["label"] == []


def test_calibrate_undoes_overconfidence():
  out = outputs(2000)
  base = make(ABC).calibrate(out)["temperature"]
  hot = make(ABC).calibrate({**out, "logits": 4 * out["logits"]})["temperature"]
  assert hot == pytest.approx(4 * base, rel=1e-3)


def test_a_saved_task_predicts_and_describes_the_same():
  task = make(ABC, metric="macro_f1")
  again = classify.Task.from_spec(json.loads(json.dumps(task.spec())), Preprocess())
  assert again.labels == task.labels and again.metric == task.metric
  logits = again.predict(constant(LOGITS), {}, {"input_ids": np.ones((4, 3))})["logits"]
  one = {"logits": np.asarray(logits[0])}
  assert again.describe(one, {"temperature": 1.0}) == task.describe(one, {"temperature": 1.0})


def test_evidence():
  out = outputs()
  found = make(ABC).evidence({"test": out, "validation": out}, {})["confusion"]
  assert found["labels"] == ["a", "b", "c"] and np.sum(found["matrix"]) == 200
  assert make(ABC).evidence({"validation": out}, {}) == {}


# ---- Baselines ----


def features(task, n=300, dimension=8, noise=1.0, seed=0):
  rng = np.random.default_rng(seed)
  classes = len(task.labels)
  centres = np.random.default_rng(9).normal(size=(classes, dimension))
  label = rng.integers(0, classes, n)
  return {"features": (5 + centres[label] + noise * rng.normal(size=(n, dimension))
                       ).astype(np.float32), "label": label}


@pytest.mark.parametrize("values", [ABC, ["x", "y", "y"]])
def test_baselines(values):
  linear_model = pytest.importorskip("sklearn.linear_model")
  task = make(values)
  parts = {name: features(task, seed=i) for i, name in enumerate(("train", "validation", "test"))}
  found = task.baselines(parts)
  assert set(found) == {"majority", "probe"}
  for rows in found.values():
    for split, out in rows.items():
      assert out["logits"].shape == (300, len(task.labels))
      np.testing.assert_array_equal(out["label"], parts[split]["label"])
  most = max(set(values), key=values.count)
  assert (found["majority"]["test"]["logits"].argmax(1) == task.labels.index(most)).all()
  reference = linear_model.LogisticRegression(max_iter=1000).fit(
    parts["train"]["features"], parts["train"]["label"])
  best = reference.score(parts["test"]["features"], parts["test"]["label"])
  assert task.value(found["probe"]["test"]) >= best - 0.02


def test_probe_without_noise_agrees_with_sklearn_at_the_same_strength():
  linear_model = pytest.importorskip("sklearn.linear_model")
  part = features(make(["x", "y"]), noise=2.0)
  x = part["features"] - part["features"].mean(0)
  x = x / np.sqrt((x**2).sum(1).mean())
  for strength, logits in zip(probes.STRENGTHS, probes.probes(
      part["features"], part["label"], 2), strict=True):
    model = linear_model.LogisticRegression(C=strength, tol=1e-8).fit(x, part["label"])
    got = logits(part["features"])
    np.testing.assert_allclose(got[:, 1] - got[:, 0], model.decision_function(x), atol=2e-3)


def test_multi_label_probe():
  task = make(["a|b", "b", "c|d", "d"], labels_kind="multi")
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 5)).astype(np.float32)
  hot = np.float32(np.stack([x[:, 0] > 0, x[:, 1] > 0, x[:, 2] > 1, np.ones(300)], 1))
  part = {"features": x, "label": hot}
  found = task.baselines({"train": part, "validation": part, "test": part})["probe"]["test"]
  assert stats.macro_f1(found["logits"] > 0, hot) > 0.9  # the label all rows have is among them


@pytest.mark.slow
def test_probe_is_quick():
  rng = np.random.default_rng(0)
  for n, classes, limit in ((7500, 2, 5), (10000, 77, 40)):
    label = rng.integers(0, classes, n)
    x = (rng.normal(size=(classes, 384))[label] + 3 * rng.normal(size=(n, 384))).astype(np.float32)
    start = time.monotonic()
    assert len(list(probes.probes(x, label, classes))) == len(probes.STRENGTHS)
    assert time.monotonic() - start < limit


# ---- CutMix ----


def test_cutmix_pastes_a_box_and_counts_its_pixels():
  side, rows = 16, 6
  pixels = jnp.arange(1.0, rows + 1)[:, None, None, None] * jnp.ones((rows, side, side, 3))
  hot, weight = jnp.eye(rows), jnp.array([1.0] * (rows - 1) + [0.0])
  cut = jax.jit(lambda key: mixing.mix({"pixel_values": pixels}, hot, weight, key, cut=1.0))
  shares = []
  for seed in range(20):
    inputs, mixed = cut(jax.random.key(seed))
    images = np.array(inputs["pixel_values"])
    np.testing.assert_array_equal(images[0], pixels[0])  # its partner is padding
    for i in range(1, rows - 1):
      own, other = images[i, :, :, 0] == i + 1, images[i, :, :, 0] == rows - i
      assert np.all(own | other)
      ys, xs = np.nonzero(other)
      if len(ys):  # what is pasted is one box
        assert other[ys.min():ys.max() + 1, xs.min():xs.max() + 1].all()
      assert mixed[i, i] == pytest.approx(own.mean(), abs=1e-6)
      assert mixed[i, rows - 1 - i] == pytest.approx(other.mean(), abs=1e-6)
      shares.append(own.mean())
  assert np.min(shares) < 0.3 and np.max(shares) > 0.9
  both = jax.jit(lambda key: mixing.mix(
    {"pixel_values": pixels}, hot, weight, key, alpha=1.0, cut=1.0)[0]["pixel_values"])
  whole = [len(np.unique(np.array(both(jax.random.key(seed)))[2])) == 1 for seed in range(20)]
  assert 3 <= sum(whole) <= 17  # mixup leaves an image of one colour so, CutMix as a rule does not


# ---- Against the base ----


def test_divergence_and_drift_equal_their_formulas():
  task = make([0, 1, 2, 2], class_weights="balanced")
  other = np.float32([[0.3, 0.1, 0.0], [2.0, 0.2, -1.0], [0.0, 0.5, 0.0], [1.0, 0.0, 1.0]])
  outputs = {"ours": {"logits": LOGITS, "features": LOGITS[:, :2]},
             "base": {"logits": other, "features": other[:, :2] + 1}}
  apply = lambda variables, inputs, rng: jax.tree.map(jnp.asarray, outputs[variables])  # noqa: E731
  rows = {**batch([0, 1, 2, 2]), "weight": np.float32([1, 1, 1, 0])}
  total, weight = task.divergence(apply, "ours", "base", rows, 2.0)
  p, q = stats.softmax(other / 2), stats.softmax(LOGITS / 2)
  each = 4 * (p * np.log(p / q)).sum(1)
  counts = np.array([4 / 3, 4 / 3, 2 / 3, 0])  # balanced classes, as in the loss
  np.testing.assert_allclose([total, weight], [(each * counts).sum(), counts.sum()], rtol=1e-5)
  np.testing.assert_allclose(task.loss(constant(LOGITS), {}, rows, None)[1], weight, rtol=1e-6)
  total, weight = task.drift(apply, "ours", "base", rows)
  far = ((LOGITS[:, :2] - other[:, :2] - 1)**2).sum(1) / ((other[:, :2] + 1)**2).sum(1)
  np.testing.assert_allclose([total, weight], [(far * counts).sum(), counts.sum()], rtol=1e-5)
  unlabelled = {key: value for key, value in rows.items() if key != "label"}
  assert task.divergence(apply, "ours", "base", unlabelled)[1] == 3


def test_divergence_of_several_labels_is_that_of_each():
  task = make(["a", "b", "a|b", "c"], labels_kind="multi")
  other = -LOGITS
  apply = lambda variables, inputs, rng: {"logits": jnp.asarray(variables)}  # noqa: E731
  total, _ = task.divergence(apply, LOGITS, other, {
    "input_ids": np.ones((4, 3)), "weight": np.ones(4, np.float32)})
  p, q = stats.sigmoid(np.float64(other)), stats.sigmoid(np.float64(LOGITS))
  each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
  assert float(total) == pytest.approx(each.mean(1).sum(), rel=1e-4)


def test_classes_that_train_lacks():
  splits = {"test": ["a", "d", "b"]}
  with pytest.raises(errors.UserError, match="'d' of test does not occur in train"):
    make(ABC, splits=splits)
  task = make(ABC, splits=splits, unseen="class", neighbours=3, class_weights="balanced",
              logit_adjustment=1.0)
  assert task.labels == ["a", "b", "c", "d"]
  total, weight, _ = task.loss(constant(np.eye(4)), {}, batch([0, 1, 2, 2]), None)
  assert np.isfinite(total) and weight > 0
  train = features(make(ABC))
  test = {"features": train["features"][:50], "label": np.where(np.arange(50) < 5, 3, 0)}
  found = task.baselines({"train": train, "test": test})
  for row in found.values():
    assert row["test"]["logits"].shape == (50, 4) and np.isfinite(row["test"]["logits"]).all()
    assert (row["test"]["logits"].argmax(1) < 3).all()
  # What is said of the classes that train has does not change.
  plain = make(ABC).baselines({"train": train, "test": test})["probe"]["test"]["logits"]
  np.testing.assert_allclose(found["probe"]["test"]["logits"][:, :3], plain, atol=1e-5)
  with pytest.raises(errors.UserError, match="the label a only"):
    make(["a", "a"], splits=splits, unseen="class")
