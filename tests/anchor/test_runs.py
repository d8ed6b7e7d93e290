"""Remedies by config words alone: a classifier with several at once, a language model with its own
texts, and input that is wrong."""

import json

import numpy as np
import pytest
from tasks import test_lm as language

from ft import config, errors, train

QUICK = [("train.steps", "4"), ("train.eval_every", "4"), ("train.log_every", "2"),
         ("train.baselines", "false"), ("train.export", "false"),
         ("guard.overfit.resamples", "100")]


def logged(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [line for line in lines if "train/loss" in line and "train/rate" in line]


@pytest.mark.slow
def test_many_remedies_at_once_on_a_classifier(tiny, tmp_path):
  words = [*QUICK, ("data.train", f"{tiny.csv}[60:]"), ("anchor.ewc.source", f"{tiny.csv}[:20]"),
           ("anchor.ewc.weight", "100"), ("anchor.kl.weight", "0.5"), ("anchor.mixout.p", "0.3"),
           ("anchor.replay.source", f"{tiny.csv}[20:60]"), ("anchor.replay.loss", "kl"),
           ("anchor.replay.share", "0.5"), ("regularise.rdrop.weight", "1"),
           ("regularise.neftune.alpha", "5"), ("regularise.sam.rho", "0.05"),
           ("train.accumulate", "2")]
  train.train(config.load(str(tiny.config), words), tmp_path / "run")
  lines = logged(tmp_path / "run")
  assert len(lines) == 2
  for line in lines:
    assert line["train/rdrop"] > 0 and line["train/kl"] >= 0
    assert np.isfinite(line["train/grad_norm"])
    assert line["train/loss"] == pytest.approx(
      line["train/own_loss"] + line["train/replay_loss"] + line["train/penalty"], rel=1e-4)
  assert lines[-1]["train/penalty"] > 0 and lines[-1]["train/replay_loss"] > 0


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
  """(config file of a random language model, folder)."""
  folder = tmp_path_factory.mktemp("talker")
  language.export(folder / "model")
  rng = np.random.default_rng(0)
  lines = [" ".join(rng.choice(language.WORDS[4:], 8)) for _ in range(48)]
  (folder / "texts.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
  (folder / "talker.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(folder / "model")!r}),
    data=dict(train={str(folder / "texts.jsonl")!r}, max_length=32, buckets=(32,)),
    task=dict(name="lm"), optim=dict(rate=1e-3), train=dict(batch=8, train_sample=8),
  )
""")
  return folder / "talker.py", folder


def test_a_language_model_replays_texts_of_its_own(talker, tmp_path):
  words = [*QUICK, ("anchor.replay.source", "self"), ("anchor.replay.loss", "kl"),
           ("anchor.replay.rows", "32"), ("anchor.replay.max_new_tokens", "10"),
           ("anchor.kl.weight", "0.1"), ("regularise.neftune.alpha", "1")]
  made = config.load(str(talker[0]), words)
  train.train(made, tmp_path / "run")
  texts = (tmp_path / "run" / "replay.jsonl").read_text().splitlines()
  assert len(texts) == 32 and len(set(texts)) > 6
  assert all(set(json.loads(text)["text"].split()) <= set(language.WORDS) for text in texts)
  lines = logged(tmp_path / "run")
  assert lines[-1]["train/replay_loss"] > 0 and lines[-1]["train/kl"] > 0
  # A second process reads what was drawn, and draws nothing.
  before = (tmp_path / "run" / "replay.jsonl").stat().st_mtime_ns
  (tmp_path / "run" / "card.json").unlink()
  train.train(made, tmp_path / "run")
  assert (tmp_path / "run" / "replay.jsonl").stat().st_mtime_ns == before
  assert logged(tmp_path / "run") == lines


@pytest.mark.parametrize("words, says", [
  ([("anchor.ewc.weight", "1")], "EWC without a source"),
  ([("anchor.l2sp.alpha", "1"), ("tune.method", "lora"), ("tune.rank", "2")],
   "nothing that trains has a pretrained point with tune.method=lora"),
  ([("anchor.replay.source", "self")], "only a language model can draw texts"),
  ([("anchor.replay.source", "{csv}"), ("anchor.replay.share", "0.3")], "4.8 rows beside"),
  ([("anchor.replay.source", "nowhere.csv")], "nowhere.csv"),
  ([("average.wise", "0,2")], "expected numbers from 0"),
  ([("task.cutmix", "1")], "task.cutmix mixes images"),
  ([("model.drop_path", "0.1")], "bert has no stochastic depth"),
])
def test_wrong_input_is_told_before_training(tiny, tmp_path, words, says):
  words = [(key, text.format(csv=tiny.csv)) for key, text in words]
  with pytest.raises(errors.UserError, match=says):
    train.train(config.load(str(tiny.config), [*QUICK, *words]), tmp_path / "run")
  assert not (tmp_path / "run" / "card.json").exists()
