"""The control from random weights: what is drawn, what it is compared with, and its resuming."""

import json

import jax
import numpy as np
import pytest

from ft import card, config, control, errors, models, stats, train, tune

QUICK = [("train.steps", "6"), ("train.eval_every", "3"), ("guard.overfit.resamples", "100"),
         ("guard.cost.scratch", "True")]


def test_random_weights_are_those_of_no_checkpoint(tiny):
  read = models.load(str(tiny.model))
  made = models.load(str(tiny.model), random=True, rng=jax.random.key(5), num_labels=2)
  first, second = (tune.flatten(one.variables) for one in (read, made))
  path = "params/encoder/layer_0/intermediate/kernel"
  assert first[path].shape == second[path].shape
  assert not np.allclose(first[path], second[path])
  assert made.report.matched == [] and set(made.report.initialised) == set(second)
  assert made.files == read.files and made.config.hidden_size == read.config.hidden_size


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("control") / "run"
  made = config.load(str(tiny.config), QUICK)
  train.train(made, folder)
  return folder, control.from_scratch(folder)


def test_the_control_is_on_the_card(run):
  folder, found = run
  record, other = card.read(folder), card.read(folder / "scratch")
  assert record["cost"]["scratch"] == json.loads(json.dumps(found))
  assert other["config"]["model"]["random"] and not record["config"]["model"]["random"]
  for key in ("optim", "data", "tune"):
    assert other["config"][key] == record["config"][key]
  assert other["data"]["splits"] == record["data"]["splits"]
  a, b = (np.array([c == "1" for c in one["results"]["test"]["fine-tuned"]["scores"]], float)
          for one in (record, other))
  assert found["value"] == pytest.approx(b.mean())
  assert (found["difference"], found["lo"], found["hi"]) == pytest.approx(
    stats.paired_bootstrap(a, b))
  assert "From random weights the same training reached accuracy" in (
    record["guards"]["cost"]["words"])
  assert "The same training from random weights" in (folder / "card.html").read_text()
  assert not (folder / "scratch" / "model").exists()
  assert other["guards"]["forget"]["words"].startswith("Not measured: switched off")


def test_a_control_that_is_on_the_card_is_left_alone(run):
  folder, _ = run
  before = (folder / "card.json").read_bytes()
  assert control.from_scratch(folder) is None
  assert (folder / "card.json").read_bytes() == before


def test_the_control_of_a_race_has_the_winner_s_settings(tiny, tmp_path, monkeypatch):
  asked = config.load(str(tiny.config), [*QUICK, ("auto", "True")])
  won = config.changed(asked, {"auto": False, "optim.rate": 3e-4, "train.steps": 7})
  numbers = {"seconds": 1.0}
  known = {**record("accuracy", "max", [0.5], 0.5), "config": config.to_json(won),
           "guards": {"cost": {"numbers": numbers, "words": "Cost."}}}
  trained = []
  monkeypatch.setattr(control.card, "read", lambda folder: known)
  monkeypatch.setattr(control.card, "write", lambda *_: None)
  monkeypatch.setattr(control.train, "train", lambda made, folder: trained.append(made))
  monkeypatch.setattr(control.compare, "paired", lambda *_: (None, None))
  control.from_scratch(tmp_path)
  made, = trained
  assert (made.optim.rate, made.train.steps, made.auto) == (3e-4, 7, False)
  assert made.model.random and not made.guard.cost.scratch


def test_several_processes_are_refused_before_anything_trains(tiny, monkeypatch):
  made = config.load(str(tiny.config), QUICK)
  control.check(made)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(errors.UserError, match="this one has 2; leave it at False"):
    control.check(made)
  made.guard.cost.scratch = False
  control.check(made)


def record(metric, mode, values, best):
  return {
    "task": {"name": "x", "metric": metric, "mode": mode},
    "best": {"metric": metric, "value": best},
    "history": [{"step": i, f"validation/{metric}": v} for i, v in enumerate(values)],
    "results": {"test": {"fine-tuned": {"metrics": {metric: best}, "interval": {metric: [0, 1]},
                                        "n": 40}}},
    "cost": {"phases": {"training": 3.0}}}


@pytest.mark.parametrize("mode, values, best, other, step", [
  ("max", [0.2, 0.5, 0.7], 0.7, 0.45, 1), ("min", [3.0, 2.0, 1.0], 1.0, 2.5, 1),
  ("max", [0.2, 0.5], 0.5, 0.9, None)])
def test_when_the_pretrained_run_was_as_good(mode, values, best, other, step):
  found = control.compared(record("score", mode, values, best),
                           record("score", mode, [other, other], other))
  assert found["reached_at"] == step and found["steps"] == len(values) - 1
  assert ("never was as good" in control.said(found)) == (step is None)
