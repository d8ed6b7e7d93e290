"""Thresholds a group: a planted shift undone, the run that applies them, and what cannot be."""

import json
import types

import numpy as np
import pytest
from tasks.test_classify import make

from ft import config, errors, group_thresholds, predict, train
from ft.data import text

GROUPS = group_thresholds.GroupThresholds("sex", ("f", "m"))
SHIFT = 1.5


def planted(n, seed):
  """Rows whose logit tells the label, too low by SHIFT for f and too high by it for m."""
  rng = np.random.default_rng(seed)
  label, group = rng.integers(0, 2, n), rng.integers(0, 2, n)
  score = rng.normal(size=n) + 2.0 * (2 * label - 1) + SHIFT * (2 * group - 1)
  return {"logits": np.stack([np.zeros(n), score], 1), "label": label, "group": group}


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_a_planted_shift_is_undone():
  at = GROUPS.fit(planted(20_000, 0))
  # Equal rates at the best accuracy: where the two densities of each group cross.
  assert at["f"] == pytest.approx(sigmoid(-SHIFT), abs=0.06)
  assert at["m"] == pytest.approx(sigmoid(SHIFT), abs=0.06)
  found = GROUPS.account(planted(20_000, 1), at)
  # Φ(2 ± 1.5) are the rates before, Φ(2) is the accuracy after.
  assert found["equalised_odds_before"] == pytest.approx(0.99977 - 0.69146, abs=0.02)
  assert found["accuracy_before"] == pytest.approx((0.99977 + 0.69146) / 2, abs=0.01)
  assert found["equalised_odds"] < 0.02
  assert found["accuracy"] == pytest.approx(0.97725, abs=0.01)
  low, high = found["accuracy_interval"]
  assert low < 0.97725 < high and found["change"][1] > 0
  assert found["without"] == 0 and found["n"] == 20_000


def test_rows_of_no_group_are_counted_and_decided_as_ever():
  outputs = planted(400, 2)
  outputs["group"][:100] = -1
  outputs["label"][390:] = -1  # one of data.unknown
  at = GROUPS.fit(outputs)
  kept = {key: value[100:390] for key, value in outputs.items()}
  assert at == GROUPS.fit(kept)
  found = GROUPS.account(outputs, at)
  assert (found["n"], found["without"]) == (390, 100)
  right = (outputs["logits"][:100, 1] > 0) == outputs["label"][:100]
  scores = sigmoid(kept["logits"][:, 1])
  said = scores >= np.where(kept["group"] == 1, at["m"], at["f"])
  assert found["accuracy"] == pytest.approx((right.sum() + (said == kept["label"]).sum()) / 390)
  assert GROUPS.decide(outputs["logits"][0], -1, at) is None


def test_groups_with_few_rows_keep_one_half():
  outputs = planted(200, 3)
  outputs["label"][outputs["group"] == 0] = 1  # f has no negatives
  assert GROUPS.fit(outputs)["f"] == 0.5


def test_the_group_is_read_from_attributes_or_the_record():
  assert GROUPS.code({"attributes": {"sex": " m "}}) == 1
  assert GROUPS.code({"record": {"sex": "f", "age": 3}}) == 0
  for row in ({}, {"attributes": {"sex": "x"}}, {"record": {"sex": None}}):
    assert GROUPS.code(row) == -1


# ---- In a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run on a table whose x is shifted for one sex, which the model does not read."""
  folder = tmp_path_factory.mktemp("thresholds")
  made, lines = planted(1500, 4), ["x,noise,sex,label"]
  noise = np.random.default_rng(5).normal(size=1500)
  for score, other, group, label in zip(made["logits"][:, 1], noise, made["group"],
                                        made["label"], strict=True):
    lines.append(f"{score:.4f},{other:.4f},{'fm'[group]},{'no yes'.split()[label]}")
  (folder / "rows.csv").write_text("\n".join(lines) + "\n")
  made = config.complete({
    "model.source": "scratch:tabular", "data.modality": "table",
    "data.train": str(folder / "rows.csv"), "data.ignore": ("sex",), "data.attributes": ("sex",),
    "data.validation_fraction": 0.3, "data.test_fraction": 0.3, "task.thresholds": "sex",
    "optim.rate": 1e-2, "train.batch": 64, "train.steps": 60, "train.eval_every": 60,
    "train.baselines": False, "guard.overfit.resamples": 100})
  return folder, train.train(made, folder / "run")


def test_the_run_reports_what_the_thresholds_do(finished):
  folder, record = finished
  found = record["group_thresholds"]
  test = found["splits"]["test"]
  assert found["by"] == "sex" and found["positive"] == "yes" and test["n"] == 450
  assert test["equalised_odds"] < test["equalised_odds_before"] - 0.1
  assert test["accuracy"] > test["accuracy_before"]
  # The results of the card are the ordinary decisions', and the guard says the same of both.
  assert record["results"]["test"]["fine-tuned"]["metrics"]["accuracy"] == pytest.approx(
    test["accuracy_before"])
  by, = record["guards"]["bias"]["numbers"]["by"]
  assert by["thresholds"]["at"] == pytest.approx(found["at"])
  assert by["thresholds"]["equalised_odds"] == pytest.approx(test["equalised_odds"])
  assert "Thresholds by sex" in (folder / "run" / "card.html").read_text()


def test_predictions_are_decided_by_them(finished):
  folder, record = finished
  at = record["group_thresholds"]["at"]
  spec = json.loads((folder / "run/model/ft.json").read_text())
  assert spec["calibration"]["groups"] == pytest.approx(at)
  one, other = ("no", "yes")
  answers = {}
  for sex in ("f", "m", "x", None):
    lines = ["x,noise" + (",sex" if sex else "")]
    lines += [f"{x:.2f},0" + (f",{sex}" if sex else "") for x in np.linspace(-4, 4, 41)]
    path = folder / "new.csv"
    path.write_text("\n".join(lines) + "\n")
    predictor = predict.Predictor(folder / "run")
    answers[sex] = list(predictor(predictor.rows(str(path))))
  temperature = spec["calibration"]["temperature"]
  for sex, found in answers.items():
    for answer in found:
      chance = answer["probabilities"]["yes"]
      plain = sigmoid(temperature * np.log(chance / (1 - chance)))
      assert answer["label"] == (other if plain >= at.get(sex, 0.5) else one)
      assert answer["confidence"] == answer["probabilities"][answer["label"]]
      assert answer["group"] == (sex if sex in at else None)
  count = {sex: sum(a["label"] == "yes" for a in found) for sex, found in answers.items()}
  assert count["f"] > count["x"] == count[None] > count["m"]


def test_rows_of_text_bring_their_attributes(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text("text,sex,age\none,f,3\n")
  lines = tmp_path / "a.jsonl"
  lines.write_text('{"text": "one", "age": 3}\n{"text": "two"}\n')
  assert list(text.read_rows(str(path), None, ("sex",))) == [
    {"text": "one", "attributes": {"sex": "f"}}]
  assert list(text.read_rows(str(lines), None, ("sex", "age"))) == [
    {"text": "one", "attributes": {"age": "3"}}, {"text": "two"}]


def test_a_preprocessing_of_text_keeps_which(tiny):
  given = config.complete({"model.source": "m", "data.train": "x", "data.attributes": ("sex",),
                           "optim.rate": 1e-3}).data
  made = text.Preprocess(given, types.SimpleNamespace(folder=tiny.model, hf_config={}))
  again = text.Preprocess.from_spec(json.loads(json.dumps(made.spec())), tiny.model)
  assert again.attributes == ("sex",)


# ---- What cannot be ------------------------------------------------------------------------------


def data(values):
  rows = [{"attributes": {"sex": value}} for value in values]
  return types.SimpleNamespace(splits={"validation": type("R", (list,), {
    "attributes": ("sex",)})(rows)})


@pytest.mark.parametrize("by, labels, values, alone, message", [
  ("sxe", "ab", "fm", True, "task.thresholds='sxe': no such column.*did you mean 'sex'"),
  ("sex", "abc", "fm", True, "for two labels.*has 3"),
  ("sex", "ab", "ff", True, "it has 1 values in validation"),
  ("sex", "ab", "abcdefghijklm", True, "it has 13 values"),
  ("sex", "ab", "fm", False, "task.coverage both decide")])
def test_messages(by, labels, values, alone, message):
  with pytest.raises(errors.UserError, match=message):
    group_thresholds.settle(by, list(labels), data(values), alone)


def test_a_task_without_it_is_as_it_was():
  task = make(["a", "b"])
  assert task.spec()["thresholds"] is None and "thresholds" in task.spec()
  example = task.example({"text": "x", "label": "a"})
  assert "label" in example and "group" not in example
