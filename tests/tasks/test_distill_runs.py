"""Runs of distillation: a language model, a chat model, a classifier that learns from a run."""

import json
import types

import jax
import numpy as np
import pytest
from tasks import chat_models, test_distill
from tasks import test_lm as language

from ft import config, errors, models, predict, teaching, train


def test_a_language_model_comes_closer_to_its_teacher(tmp_path):
  test_distill.export(tmp_path / "student")
  test_distill.export(tmp_path / "teacher", seed=5, width=32, depth=2)
  rng = np.random.default_rng(0)
  lines = [" ".join(rng.choice(language.WORDS[4:], rng.integers(4, 9))) for _ in range(90)]
  (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
  made = {
    "model.source": str(tmp_path / "student"), "data.train": str(tmp_path / "texts.txt"),
    "data.max_length": 12, "data.buckets": (), "task.name": "distill",
    "task.teacher": str(tmp_path / "teacher"), "task.alpha": 1.0, "task.hidden": 0.1,
    "task.on_policy": 0.25, "task.max_new_tokens": 4, "optim.rate": 1e-2, "train.batch": 16,
    "train.steps": 24, "train.eval_every": 12, "train.train_sample": 0, "train.log_every": 1,
    "guard.overfit.resamples": 100}
  train.train(config.complete(made), tmp_path / "out")
  card = json.loads((tmp_path / "out" / "card.json").read_text())
  test = card["results"]["test"]
  assert set(test) == {"zero-shot", "teacher", "fine-tuned"}
  kl = {name: row["metrics"]["kl_to_teacher"] for name, row in test.items()}
  assert kl["teacher"] == 0 and kl["fine-tuned"] < 0.7 * kl["zero-shot"]
  assert card["task"]["teacher"] == str(tmp_path / "teacher")
  count = sum(leaf.size for leaf in jax.tree.leaves(
    models.load(str(tmp_path / "student")).variables))
  assert card["model"]["parameters"] == count + 16 * 32  # and a projection
  # The student alone is exported and predicts; neither it nor a checkpoint knows of the teacher.
  again = models.load(str(tmp_path / "out" / "model"))
  assert set(again.variables) == {"params"} and not again.report.ignored
  answers = list(predict.Predictor(tmp_path / "out")([{"text": "the film is good"}]))
  assert answers[0]["nats_per_token"] > 0
  lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().split("\n")
           if line]
  assert {line["train/on_policy"] for line in lines if "train/on_policy" in line} == {0.0, 1.0}
  saved = b"".join(p.read_bytes() for p in (tmp_path / "out" / "checkpoints").rglob("*")
                   if p.is_file() and "metadata" in p.name.lower())
  assert b"projections" in saved and b"teacher" not in saved
  # A teacher that is the folder of a run.
  found = teaching.Teacher.find(str(tmp_path / "out"), types.SimpleNamespace(
    tokenizer=language.preprocess(tmp_path / "student").tokenizer))
  assert found.folder == str(tmp_path / "out" / "model")


@pytest.mark.slow
def test_a_chat_model_learns_replies_and_writes_its_own(tmp_path):
  chat_models.export(tmp_path / "model")
  rows = [{"turns": chat_models.TALK[i % 3 * 2:]} for i in range(60)]
  (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  made = {
    "model.source": str(tmp_path / "model"), "data.train": str(tmp_path / "talk.jsonl"),
    "data.keep_duplicates_together": False, "data.max_length": 64, "data.buckets": (),
    "task.name": "distill", "task.of": "chat", "task.teacher": str(tmp_path / "model"),
    "task.own": {"generate_rows": 2, "max_reply": 4}, "task.on_policy": 0.5,
    "task.max_new_tokens": 4, "optim.rate": 1e-3, "train.batch": 8, "train.steps": 4,
    "train.eval_every": 4, "train.log_every": 1, "train.train_sample": 0,
    "guard.overfit.resamples": 100}
  train.train(config.complete(made), tmp_path / "out")
  card = json.loads((tmp_path / "out" / "card.json").read_text())
  assert card["results"]["test"]["zero-shot"]["metrics"]["kl_to_teacher"] == pytest.approx(
    0, abs=1e-4)  # it is its own teacher before training
  assert len(card["samples"]) == 2


@pytest.mark.slow
def test_a_classifier_learns_from_a_run(tiny, tmp_path):
  """The teacher is a finished run, its labels in another order than those of the file."""
  train.train(config.load(str(tiny.config), [("guard.overfit.resamples", "100")]),
              tmp_path / "teacher")
  words = [("task.name", "distill"), ("task.of", "classify"), ("model.depth", "1"),
           ("task.teacher", str(tmp_path / "teacher")), ("task.alpha", "0.9"),
           ("task.hidden", "0.1"), ("task.own.label_smoothing", "0.1"), ("task.temperature", "2"),
           ("guard.overfit.resamples", "100"), ("train.log_every", "5")]
  train.train(config.load(str(tiny.config), words), tmp_path / "out")
  card = json.loads((tmp_path / "out" / "card.json").read_text())
  test = card["results"]["test"]
  assert set(test) == {"majority", "probe", "teacher", "fine-tuned"}
  before = json.loads((tmp_path / "teacher" / "card.json").read_text())["results"]["test"]
  assert test["teacher"]["metrics"]["accuracy"] == before["fine-tuned"]["metrics"]["accuracy"]
  kl = [step["validation/kl_to_teacher"] for step in card["history"]]
  assert kl[-1] < 0.7 * kl[0]
  line = next(predict.Predictor(tmp_path / "out")([{"text": "a good film"}]))
  assert line["label"] in ("positive", "negative")


def test_labels_have_to_be_the_same(tiny, tmp_path):
  model = models.load(str(tiny.model), labels=("bad", "good"))
  models.export(model, tmp_path / "named")
  words = [("task.name", "distill"), ("task.of", "classify"),
           ("task.teacher", str(tmp_path / "named"))]
  with pytest.raises(errors.UserError, match="knows the labels bad, good, and the student learns"):
    train.train(config.load(str(tiny.config), words), tmp_path / "out")
