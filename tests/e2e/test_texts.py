"""A run of text to text: texts are written, judged and kept, the same on two devices."""

import json

import numpy as np
import pytest
from commands import script
from tasks import text_models

WORDS = text_models.WORDS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run that learns to copy words, from two files of parallel lines."""
  folder = tmp_path_factory.mktemp("run")
  text_models.export(folder / "marian", "marian", scale=0.3)
  rng = np.random.default_rng(0)
  lines = [" ".join(rng.choice(WORDS[9:], rng.integers(2, 5))) for _ in range(90)]
  (folder / "all.en").write_text("\n".join(lines) + "\n")
  (folder / "all.de").write_text("\n".join(lines) + "\n")
  (folder / "short.de").write_text("\n".join(lines[:-1]) + "\n")
  (folder / "tiny.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(folder / 'marian')!r}),
    data=dict(train="{folder}/all.en,{folder}/all.de", max_length=16, buckets=(8,)),
    task=dict(name="seq2seq", metric="chrf", max_target=8, generate_rows=12),
    optim=dict(rate=1e-2), guard=dict(overfit=dict(resamples=100)),
    train=dict(batch=8, steps=12, eval_every=6, log_every=5, train_sample=8),
  )
""")
  script("train", f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'out'}")
  return folder


def test_a_run_writes_texts_and_judges_them(run):
  out = run / "out"
  card = json.loads((out / "card.json").read_text())
  assert card["task"]["metric"] == "chrf" and card["best"]["metric"] == "nats_per_token"
  assert "nrefs:1" in card["task"]["signatures"]["bleu"]
  test = card["results"]["test"]
  assert {row["n"] for row in test.values()} == {12}
  assert card["differences"]["test"]["fine-tuned - zero-shot"]["n"] == 12
  assert set(test) == {"zero-shot", "copy-source", "fine-tuned"}
  assert test["copy-source"]["metrics"]["chrf"] == pytest.approx(100)  # the target is the source
  lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
  of_test = [line for line in lines if line["split"] == "test"]
  assert len(of_test) == len({line["where"] for line in of_test}) == 12
  import sacrebleu
  for name in ("zero-shot", "fine-tuned"):
    said, wanted = zip(*((s["answers"][name], s["target"]) for s in of_test), strict=True)
    for metric, score in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
      assert test[name]["metrics"][metric] == pytest.approx(
        score.corpus_score(said, [wanted]).score, abs=1e-9)
    low, high = test[name]["interval"]["chrf"]
    assert low <= test[name]["metrics"]["chrf"] <= high
  assert set(card["differences"]["test"]) == {"fine-tuned - zero-shot", "fine-tuned - copy-source"}
  assert card["samples"] == of_test[:5]
  assert of_test[0]["source"] in (out / "card.html").read_text()
  assert not (out / "answers.npz").exists()


@pytest.mark.slow
def test_the_same_texts_on_several_devices(run):
  script("train", f"--config={run / 'tiny.py'}", f"--workdir={run / 'two'}",
         XLA_FLAGS="--xla_force_host_platform_device_count=2")
  one, two = ([json.loads(line) for line in (run / name / "samples.jsonl").read_text().splitlines()]
              for name in ("out", "two"))
  assert [line["where"] for line in one] == [line["where"] for line in two]
  untuned = [[line["answers"]["zero-shot"] for line in lines if line["split"] == "test"]
             for lines in (one, two)]
  assert untuned[0] == untuned[1] and len(set(untuned[0])) > 1


def test_predict_and_evaluate_a_run(run):
  done = script("predict", f"--run={run / 'out'}", "--input=-", given="the film\n\n")
  first, second = map(json.loads, done.stdout.splitlines())
  assert isinstance(first["text"], str) and "error" in second
  found = json.loads(script("evaluate", f"--run={run / 'out'}",
                            f"--data={run}/all.en,{run}/all.de[:20]").stdout)
  assert found["n"] == 20 and np.isfinite(found["metrics"]["chrf"])
  low, high = found["interval"]["chrf"]
  assert low <= found["metrics"]["chrf"] <= high


def test_files_of_different_length(run):
  done = script("train", f"--config={run / 'tiny.py'}", f"--workdir={run / 'bad'}",
                f"--config.data.train={run}/all.en,{run}/short.de", status=2)
  assert "all.en has 90 lines" in done.stderr and "short.de has 89" in done.stderr
