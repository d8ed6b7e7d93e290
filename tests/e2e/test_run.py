"""One run from end to end: train, evaluate, predict, export, card; then a second start."""

import json

import jax
import numpy as np
import pytest
from commands import script
from huggingface_hub import ModelCard

ROWS = ["a great warm film", "dull and grim plot"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "run"
  done = tiny.train(folder, "--config.train.steps=60")
  return folder, done


def test_the_folder_holds_what_was_promised(run):
  folder, done = run
  names = ("config.json", "metrics.jsonl", "card.json", "card.html", "model/config.json",
           "model/model.safetensors", "model/tokenizer.json", "model/ft.json", "model/README.md")
  assert all((folder / name).is_file() for name in names)
  assert list(folder.glob("events.out.tfevents.*"))
  assert "fine-tuned" in done.stderr and "scripts/predict.py" in done.stderr


def test_the_card_counts_every_row_once(run):
  folder, _ = run
  card = json.loads((folder / "card.json").read_text())
  splits = {name: part["rows"] for name, part in card["data"]["splits"].items()}
  assert sum(splits.values()) == 180
  assert card["results"]["test"]["fine-tuned"]["n"] == splits["test"]
  assert set(card["results"]["test"]) == {"majority", "probe", "fine-tuned"}


def test_a_finished_run_says_so_and_does_nothing(tiny, run):
  folder, _ = run
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
  done = tiny.train(folder, "--config.train.steps=60")
  assert "finished" in done.stderr
  assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}


def test_predict_from_stdin_and_csv_agree(tiny, run, tmp_path):
  folder, _ = run
  lines = script("predict", f"--run={folder}", "--input=-", given="\n".join(ROWS)).stdout
  first = [json.loads(line) for line in lines.splitlines()]
  table = tmp_path / "rows.csv"
  table.write_text("text\n" + "\n".join(ROWS) + "\n")
  script("predict", f"--run={folder}", f"--input={table}", f"--output={tmp_path / 'o'}")
  second = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
  assert [a["label"] for a in first] == [a["label"] for a in second]
  for answer in first:
    assert answer["label"] in ("positive", "negative")
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert answer["confidence"] == pytest.approx(max(answer["probabilities"].values()), abs=1e-6)


def test_a_row_that_cannot_be_read_stops_nothing(tiny, run, tmp_path):
  folder, _ = run
  rows = tmp_path / "rows.jsonl"
  rows.write_text('{"text": "good film"}\n{"text": 3\n{"text": "bad film"}\n')
  out = script("predict", f"--run={folder}", f"--input={rows}").stdout
  answers = [json.loads(line) for line in out.splitlines()]
  assert ["error" in a for a in answers] == [False, True, False]


def test_evaluate_on_the_same_rows_gives_the_same_numbers(tiny, run, tmp_path):
  folder, _ = run
  out = json.loads(script("evaluate", f"--run={folder}", f"--data={tiny.csv}").stdout)
  assert out["n"] == 180
  low, high = out["interval"]["accuracy"]
  assert low <= out["metrics"]["accuracy"] <= high


def test_export_hf_is_bitwise_and_stablehlo_runs_without_ft(tiny, run, tmp_path):
  folder, _ = run
  script("export", f"--run={folder}", "--format=hf", f"--output={tmp_path / 'hf'}")
  weights = [p / "model.safetensors" for p in (folder / "model", tmp_path / "hf")]
  assert weights[0].read_bytes() == weights[1].read_bytes()
  script("export", f"--run={folder}", "--format=stablehlo", f"--output={tmp_path / 's'}")
  found = [ModelCard.load(p / "README.md").data for p in (tmp_path / "hf", tmp_path / "s")]
  assert [data.library_name for data in found] == ["transformers", "ft"]
  assert found[0].eval_results and found[0].eval_results == found[1].eval_results
  program = jax.export.deserialize(bytearray((tmp_path / "s" / "model.stablehlo").read_bytes()))
  for batch, length in ((1, 5), (3, 9)):
    ids = np.full((batch, length), 5, np.int32)
    kept = json.loads((tmp_path / "s" / "inputs.json").read_text())
    inputs = {key: ids if key == "input_ids" else np.ones_like(ids) * (key != "token_type_ids")
              for key in kept}
    assert program.call(inputs)["logits"].shape == (batch, 2)


@pytest.mark.parametrize("method", [
  "lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("freeze", "head"))])
def test_other_methods_run_to_the_end(tiny, tmp_path, method):
  flags = [f"--config.tune.method={method}"]
  if method == "freeze":
    flags.append("--config.tune.train=layer_1")
  if method == "lora":
    flags.append("--config.tune.rank=4")
  tiny.train(tmp_path / "run", *flags, "--config.train.steps=12")
  card = json.loads((tmp_path / "run" / "card.json").read_text())
  assert card["model"]["trainable"] < card["model"]["parameters"]
