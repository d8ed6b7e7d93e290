"""The overfit guard on outputs with planted gains, and the guards' runner."""

import math
import types

import numpy as np
import pytest

from ft import guards, stats
from ft.guards import overfit


def outputs(rate, n=600, classes=3, seed=0):
  """Outputs of a model that is right on the easiest `rate` of the rows."""
  rng = np.random.default_rng(seed)
  labels, ease = rng.integers(0, classes, n), rng.random(n)
  predicted = np.where(ease < rate, labels, (labels + 1) % classes)
  return {"label": labels, "logits": 3.0 * np.eye(classes)[predicted]}


def score(rows):
  return (rows["logits"].argmax(axis=1) == rows["label"]).astype(float)


def metrics(rows):
  predicted = rows["logits"].argmax(axis=1)
  return {"accuracy": stats.accuracy(predicted, rows["label"]),
          "macro_f1": stats.macro_f1(predicted, rows["label"]),
          "auroc": stats.auroc(stats.softmax(rows["logits"]), rows["label"])}


def evidence(**changes):
  fields = {
      "metric": "accuracy", "score": score, "metrics": metrics, "extra": ("tweets", "reviews"),
      "history": [
          {"step": 0, "train/accuracy": 0.5, "validation/accuracy": 0.5, "validation/loss": 0.7},
          {"step": 10, "train/loss": 0.6},
          {"step": 50, "train/accuracy": 0.8, "validation/accuracy": 0.78,
           "validation/loss": 0.4},
          {"step": 100, "train/accuracy": 0.95, "validation/accuracy": 0.80,
           "validation/loss": 0.6}],
      "outputs": {
          "validation": {guards.TUNED: outputs(0.8)},
          "test": {"majority": outputs(0.35), "probe": outputs(0.70), "fine-tuned": outputs(0.80)},
          "tweets": {"probe": outputs(0.70), "fine-tuned": outputs(0.70)},
          "reviews": {"probe": outputs(0.70), "fine-tuned": outputs(0.60)}}}
  return guards.Evidence(**(fields | changes))


def config(**changes):
  return types.SimpleNamespace(**(vars(guards.defaults("overfit")) | changes))


def test_verdict_of_each_split():
  table = overfit.differences(evidence())
  assert list(table) == ["test", "tweets", "reviews"]  # validation chose the step: no claim there
  rows = {split: table[split]["fine-tuned - probe"] for split in table}
  assert [rows[s]["verdict"] for s in rows] == ["gained", "did not gain", "lost"]
  assert rows["test"]["difference"] == pytest.approx(0.10, abs=0.03)
  assert rows["test"]["lo"] < rows["test"]["difference"] < rows["test"]["hi"]
  assert rows["test"]["n"] == 600
  assert table["test"]["fine-tuned - majority"]["verdict"] == "gained"


def test_gap_slope_and_best_steps():
  numbers = overfit.curves(evidence().history, "accuracy")
  assert (numbers["best_step"], numbers["best_step_by_loss"]) == (100, 50)
  assert numbers["gap"] == pytest.approx(0.15)
  assert numbers["gap_slope"] == pytest.approx(0.075)
  assert numbers["evaluations"] == 3


def test_words_carry_the_numbers():
  found = overfit.measure(config(), evidence())
  assert found["verdict"] == "warning"
  assert "gap of 15.0 points (the loss was lowest at step 50)" in found["words"]
  assert "tweets did not gain over the frozen probe (0.0 points [0.0, 0.0])" in found["words"]
  assert "reviews lost over the frozen probe (−" in found["words"]
  assert found["words"].startswith("Train accuracy 95.0 against validation 80.0 at step 100")


def test_losing_on_test_is_an_alarm_and_a_clean_run_is_ok():
  worse = {"test": {"probe": outputs(0.8), guards.TUNED: outputs(0.6)}}
  assert overfit.measure(config(), evidence(outputs=worse))["verdict"] == "alarm"
  better = {"test": {"probe": outputs(0.6), guards.TUNED: outputs(0.8)}}
  assert overfit.measure(config(gap=0.2), evidence(outputs=better))["verdict"] == "ok"
  assert overfit.measure(config(gap=0.1), evidence(outputs=better))["verdict"] == "warning"


def test_a_metric_that_is_better_when_smaller():
  assert overfit.judge(-0.3, -0.1, "min") == "gained"
  assert overfit.judge(0.1, 0.3, "min") == "lost"
  assert overfit.judge(-0.1, 0.1, "min") == "did not gain"
  history = [{"step": s, "train/mae": t, "validation/mae": v}
             for s, t, v in ((0, 2.0, 2.0), (5, 1.0, 1.5), (9, 0.5, 1.6))]
  numbers = overfit.curves(history, "mae", "min")
  assert numbers["best_step"] == 5 and numbers["gap"] == pytest.approx(0.5)


def test_nats_per_token_are_a_ratio_of_sums_with_a_unit():
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 200, 80).astype(float)
  noise = rng.normal(0, 0.05, 80)
  rows = lambda rate: {"nll": (rate + noise) * tokens, "tokens": tokens}  # noqa: E731
  value = lambda out: out["nll"].sum() / out["tokens"].sum()  # noqa: E731
  found = evidence(
    metric="nats_per_token", mode="min", score=None, value=value,
    metrics=lambda out: {"nats_per_token": value(out)}, extra=("general",), history=[],
    outputs={"test": {"zero-shot": rows(3.0), guards.TUNED: rows(2.0)},
             "general": {"zero-shot": rows(4.0), guards.TUNED: rows(4.4)}})
  table = overfit.results(found, resamples=200)["test"]["zero-shot"]
  low, high = table["interval"]["nats_per_token"]
  assert table["n"] == 80 and low < value(rows(3.0)) < high and "scores" not in table
  said = overfit.measure(config(resamples=200), found)["words"]
  assert said == ("Test gained over the pretrained model (−1.000 nats/token [−1.000, −1.000]); "
                  "general lost over the pretrained model (+0.400 nats/token [0.400, 0.400]).")


@pytest.mark.parametrize("metric", ["macro_f1", "auroc"])
def test_metrics_that_are_no_mean_are_resampled_whole(metric):
  calls = []

  def value(rows):
    calls.append(1)
    return metrics(rows)[metric]

  quick = overfit.results(evidence(metric=metric, value=value), resamples=200)
  assert len(calls) >= 200
  table = overfit.results(evidence(metric=metric), resamples=200)
  assert quick == table
  row = table["test"][guards.TUNED]
  lo, hi = row["interval"][metric]
  assert lo < row["metrics"][metric] < hi and hi - lo < 0.15
  difference = overfit.differences(evidence(metric=metric), 200)["test"]["fine-tuned - probe"]
  assert difference["verdict"] == "gained"
  assert difference["difference"] == pytest.approx(
      row["metrics"][metric] - table["test"]["probe"]["metrics"][metric])


def test_results_hold_metrics_intervals_and_row_scores():
  row = overfit.results(evidence())["test"][guards.TUNED]
  assert row["n"] == 600 and set(row["metrics"]) == {"accuracy", "macro_f1", "auroc"}
  assert row["interval"]["accuracy"][0] < row["metrics"]["accuracy"]
  assert len(row["scores"]) == 600
  assert row["scores"].count("1") / 600 == pytest.approx(row["metrics"]["accuracy"])


def test_an_empty_extra_split_is_not_an_error():
  empty = {"label": np.zeros(0, np.int64), "logits": np.zeros((0, 3))}
  table = overfit.differences(evidence(outputs={"x": {"probe": empty, guards.TUNED: empty}}))
  row = table["x"]["fine-tuned - probe"]
  assert math.isnan(row["difference"]) and row["verdict"] == "did not gain"
  assert overfit.signed(row, "accuracy") == "interval not defined"


def test_nothing_recorded_is_not_measured():
  found = overfit.measure(config(), guards.Evidence())
  assert found["verdict"] == "not measured" and "no evaluation history" in found["words"]


def test_half_recorded_says_so():
  history = [{"step": 3, "validation/accuracy": 0.5}]
  found = overfit.measure(config(), evidence(history=history, outputs={}))
  assert "train metric not recorded" in found["words"]


def test_every_guard_runs_and_none_crashes(monkeypatch):
  found = guards.measure(None, evidence())
  assert set(found) == set(guards.names()) >= {"overfit", "calibrate", "cost"}
  assert all(value["verdict"] in guards.VERDICTS for value in found.values())
  assert all(value["verdict"] == "not measured"
             for value in guards.measure(None, guards.Evidence()).values())
  off = types.SimpleNamespace(overfit=config(on=False))
  assert "switched off" in guards.measure(off, evidence())["overfit"]["words"]

  def fail(*_):
    raise ZeroDivisionError("planted")

  monkeypatch.setattr(overfit, "measure", fail)
  found = guards.measure(None, evidence())["overfit"]
  assert found["verdict"] == "not measured" and "planted" in found["words"]


def test_keys_can_be_read_without_import():
  import ast
  import pathlib

  for name in ("overfit", "calibrate", "cost"):
    tree = ast.parse((pathlib.Path(guards.__file__).parent / f"{name}.py").read_text())
    keys, = [ast.literal_eval(node.value) for node in tree.body
             if isinstance(node, ast.Assign) and node.targets[0].id == "KEYS"]
    assert all(isinstance(meaning, str) for _, meaning, *_ in keys.values())


def test_the_verdict_is_about_the_baseline_that_is_hardest_to_beat():
  rows = {"fine-tuned - a": {"difference": -0.4}, "fine-tuned - b": {"difference": 0.1},
          "fine-tuned - c": {"difference": float("nan")}}
  assert overfit.headline(rows, "min")[0] == "b" and overfit.headline(rows, "max")[0] == "a"
  rows["fine-tuned - probe"] = {"difference": -9.0}
  assert overfit.headline(rows, "min")[0] == "b"
  rows["fine-tuned - teacher"] = {"difference": 9.0}
  assert overfit.headline(rows, "min")[0] == "b"
  assert overfit.headline({"fine-tuned - teacher": {"difference": 9.0}}, "min")[0] == "teacher"
