"""Runs on sound from end to end: transcription and voice commands of tiny models."""

import json

import numpy as np
import pytest
from tasks import speech_models

from ft import config as configs
from ft import predict, speech, train

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("jiwer")
PATTERN = r"(?P<text>\d)_(?P<speaker>[a-z]+)_"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whisper")
  speech_models.export_whisper(folder, multilingual=True)
  return folder


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
  folder = tmp_path_factory.mktemp("letters")
  speech_models.export_letters(folder)
  return folder




@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
  return speech_models.write(tmp_path_factory.mktemp("data") / "recordings")


def run(folder, recordings, model, **given):
  config = configs.complete({
    "model.source": str(model), "data.modality": "audio", "data.train": str(recordings),
    "data.pattern": PATTERN, "data.group": "speaker", "data.seconds": 0.6, "data.noise": (20, 40),
    "data.shift": 0.1, "data.time_masks": 1, "data.stratify": False, "optim.rate": 1e-2,
    "train.batch": 8, "train.train_sample": 8, "train.eval_every": 1.0, "train.log_every": 20,
    "guard.overfit.resamples": 100, **given})
  return train.train(config, folder)


def answers(folder, source) -> list[dict]:
  predictor = predict.Predictor(folder, batch=4)
  return list(predictor(predictor.rows(str(source))))


@pytest.mark.parametrize("kind", ["whisper", pytest.param("letters", marks=pytest.mark.slow)])
def test_a_run_of_transcription(kind, request, recordings, tmp_path):
  model = request.getfixturevalue(kind)
  given = {"task.language": "en"} if kind == "whisper" else {"data.clip_buckets": (0.42, 0.45)}
  record = run(tmp_path / "run", recordings, model, **{
    "task.name": "transcribe", "task.spell_digits": True, "task.max_target": 8,
    "train.steps": 60, **given})
  test = record["results"]["test"]
  before, after = (test[name]["metrics"] for name in ("zero-shot", "fine-tuned"))
  assert after["nats_per_token"] < before["nats_per_token"] and after["wer"] < before["wer"]
  assert set(after) >= {"wer", "cer", "word_insertions"} and record["task"]["metric"] == "wer"
  lines = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
  speakers = {line["split"]: set() for line in lines}
  for line in lines:
    speakers[line["split"]].add(line["sound"].split("_")[-2])
  assert not speakers["validation"] & speakers["test"]
  measures = speech.Measures("english", True)
  of_test = [line for line in lines if line["split"] == "test"]
  said, written = ([line["target"] for line in of_test],
                   [line["answers"]["fine-tuned"] for line in of_test])
  assert measures.value("wer", measures.statistics(said, written)) == pytest.approx(after["wer"])
  (tmp_path / "in").mkdir()
  first = sorted(recordings.iterdir())[0]
  (tmp_path / "in/a.wav").write_bytes(first.read_bytes())
  (tmp_path / "in/b.wav").write_bytes(b"nothing")
  soundfile.write(tmp_path / "in/c.wav", np.random.default_rng(0).normal(size=3000) / 9, 2205 * 2)
  found = answers(tmp_path / "run", tmp_path / "in")
  assert isinstance(found[0]["text"], str) and isinstance(found[2]["text"], str)
  assert "unreadable sound" in found[1]["error"]


@pytest.mark.parametrize("kind", ["whisper", pytest.param("letters", marks=pytest.mark.slow)])
def test_a_run_of_voice_commands(kind, request, recordings, tmp_path):
  """Classes of sounds, by an encoder whose head is new."""
  model = request.getfixturevalue(kind)
  record = run(tmp_path / "run", recordings, model, **{
    "data.pattern": PATTERN.replace("text", "label"), "data.stratify": True, "train.steps": 60})
  test = record["results"]["test"]
  assert set(test) == {"majority", "probe", "fine-tuned"}
  assert test["fine-tuned"]["metrics"]["accuracy"] > test["majority"]["metrics"]["accuracy"]
  assert record["data"]["counts"]["train, from a lower rate"] == record["data"]["splits"]["train"][
    "rows"]
  found = answers(tmp_path / "run", recordings)
  assert len(found) == 60 and set(found[0]["probabilities"]) == set("0123")
