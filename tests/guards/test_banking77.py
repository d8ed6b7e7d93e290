"""The guards about data on real rows and features: Banking77 with MiniLM, PneumoniaMNIST."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from ft import config, guards, run, tune
from ft.guards import drift, labels, leak

BANKING77 = "configs/classify_text.py:data=banking77,tune=lora,folder={}"
PNEUMONIA = "configs/medical_image.py:folder={}"


def features_of(path, folder):
  """(task, data, split -> features of the model before tuning) of a config."""
  given = config.load(path)
  made, examples = run.prepare(given, folder, lambda: None)
  tuned = tune.init(given.tune, made.pretrained.variables, jax.random.PRNGKey(0),
                    made.pretrained.head, tune.Context(made.pretrained, None, report=False))
  frozen, mutable = dict(tuned.frozen), {}
  if given.model.batch_stats == "train" and "batch_stats" in frozen:
    mutable = {"batch_stats": frozen.pop("batch_stats")}
  return made.task, made.data, run.extract_features(made, examples, frozen, mutable, tuned)


def evidence(task, rows, features, known=None):
  """Evidence of a run whose tuned model is the frozen probe, which `known` features are for."""
  outputs = task.baselines(known or features)["probe"]
  return guards.Evidence(
    metric="accuracy", score=task.score, metrics=task.metrics, value=task.value, rows=rows,
    features=features, labels=tuple(task.labels),
    outputs={split: {guards.TUNED: {**part, "index": features[split]["index"]},
                     guards.PROBE: part} for split, part in outputs.items()
             if split != "train" and split in features})


@pytest.fixture(scope="module")
def banking77(shared, tmp_path_factory):
  """All 10,003 training rows against the 3,080 of test."""
  path = BANKING77.format(shared / "data")
  task, data, found = features_of(path, tmp_path_factory.mktemp("banking77"))
  train, validation = (data.splits[name] for name in ("train", "validation"))
  whole = dataclasses.replace(train, indices=np.concatenate([train.indices, validation.indices]))
  features = {"test": found["test"], "train": {
    key: np.concatenate([found["train"][key], found["validation"][key]])
    for key in ("features", "label")}}
  features["train"]["index"] = np.arange(len(whole))
  return evidence(task, {"train": whole, "test": data.splits["test"]}, features, found)


def limits(name, **given):
  section = guards.defaults(name)
  vars(section).update(given)
  return section


def entry(numbers, key, **given):
  return next(r for r in numbers[key] if all(r[k] == v for k, v in given.items()))


@pytest.mark.slow
def test_near_duplicates_of_banking77_are_the_published_share(banking77):
  began = time.process_time()
  numbers = leak.measure(limits("leak"), banking77)["numbers"]
  assert time.process_time() - began < 20
  exact = entry(numbers, "between", split="test", method="exact")
  near = entry(numbers, "between", split="test", method="embedding")
  assert exact["share"] == pytest.approx(0.0036, abs=2e-4)
  assert near["share"] == pytest.approx(0.306, abs=0.002)
  assert near["same_label"] == pytest.approx(0.975, abs=0.003)
  assert numbers["settings"]["features"] == "raw"
  both = entry(numbers, "halves", split="test", method="any", model=guards.TUNED)
  assert both["leaked"]["n"] + both["clean"]["n"] == 3080
  assert both["leaked"]["lo"] > both["clean"]["hi"]


@pytest.mark.slow
def test_accuracy_of_both_halves_of_banking77(banking77):
  """.970 of rows with a cosine above .90, .867 of the rest, by a probe."""
  numbers = leak.measure(limits("leak", cosine=0.9), banking77)["numbers"]
  half = entry(numbers, "halves", split="test", method="embedding", model=guards.PROBE)
  assert half["leaked"]["value"] == pytest.approx(0.970, abs=0.01)
  assert half["clean"]["value"] == pytest.approx(0.867, abs=0.015)


@pytest.mark.slow
def test_flipped_labels_of_banking77_are_found(banking77):
  rng = np.random.default_rng(0)
  train = banking77.features["train"]
  wrong = rng.random(len(train["label"])) < 0.1
  given = np.where(wrong, (train["label"] + rng.integers(1, 77, len(wrong))) % 77, train["label"])
  found = dataclasses.replace(banking77, features={"train": {**train, "label": given}})
  began = time.process_time()
  numbers = labels.measure(limits("labels", listed=10_000), found)["numbers"]
  assert time.process_time() - began < 20
  listed = np.zeros(len(wrong), bool)
  listed[[row["row"] for row in numbers["issues"]]] = True
  assert (listed & wrong).sum() >= 0.6 * wrong.sum()
  assert (listed & wrong).sum() >= 0.5 * listed.sum()
  assert numbers["splits"][0]["rate"] == pytest.approx(0.1, abs=0.03)


@pytest.mark.slow
def test_banking77_has_few_wrong_labels_and_no_drift(banking77):
  assert entry(labels.measure(limits("labels"), banking77)["numbers"], "splits",
               split="train")["rate"] < 0.04
  assert drift.measure(limits("drift"), banking77)["verdict"] == "ok"


@pytest.mark.slow
def test_the_pneumonia_set_is_flagged(shared, tmp_path):
  task, data, features = features_of(PNEUMONIA.format(shared / "data"), tmp_path)
  made = evidence(task, data.splits, features)
  found = drift.measure(limits("drift"), made)
  assert found["verdict"] == "alarm"
  priors = entry(found["numbers"], "priors", split="test")
  assert priors["train"] == pytest.approx(388 / 3882) and priors["share"] == 234 / 624
  assert entry(found["numbers"], "features", split="test")["mmd"] > 3 * entry(
    found["numbers"], "features", split="test")["mmd_null"]
  numbers = leak.measure(limits("leak"), made)["numbers"]
  # Three finders that know nothing of each other find the same repeated images.
  repeats = {row["rows"] for row in numbers["inside"] if row["split"] == "train"}
  assert repeats == {17}
