"""adapter/ of a run: written, read back, predicted with, exported; and what can go wrong."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from commands import script
from tune import toys

from ft import config as config_lib
from ft import errors, models, tune
from ft.tune import saving

SPEC = {"modality": "text"}
CASES = {
  "lora": dict(rank=2),
  "prompt": dict(length=3),
  "freeze": dict(select="norms"),
  "vera": dict(rank=3),
}


@pytest.fixture(scope="module")
def base(tiny):
  """The section `model` of the tiny encoder, and it loaded as a classifier."""
  section = config_lib.complete({"model.source": str(tiny.model)}).model
  return saving.Base(config_lib.to_json(section), {"num_labels": 3, "labels": ["a", "b", "c"]}, 5)


@pytest.fixture(scope="module")
def loaded(base):
  """Whether scanned -> (base, model)."""
  pairs = {}
  for scan in (False, True):
    changed = dataclasses.replace(base, model={**base.model, "scan": scan})
    pairs[scan] = changed, changed.load()
  return pairs


def split(base, pretrained, method):
  config = toys.config(method, **CASES[method])
  return tune.init(config, pretrained.variables, jax.random.PRNGKey(base.seed), pretrained.head,
                   tune.Context(pretrained))


@pytest.mark.parametrize("method,scan", [*((method, False) for method in CASES), ("vera", True)])
def test_save_and_load_give_the_same(loaded, tmp_path, method, scan):
  base, pretrained = loaded[scan]
  tuned = split(base, pretrained, method)
  trainable = toys.shaken(tuned.trainable)
  # `save` compares values and outputs itself, and the base is not needed in memory for it.
  bare = dataclasses.replace(pretrained, variables=None)
  saving.save(tmp_path / "adapter", bare, tuned, tuned.frozen, trainable, base, SPEC)
  again, tuning, changed = saving.load(tmp_path / "adapter")
  was, now = tune.flatten(trainable), tune.flatten(changed)
  assert was.keys() == now.keys()
  assert all(np.array_equal(was[path], now[path]) for path in was)
  assert tune.flatten(tuning.frozen).keys() == tune.flatten(tuned.frozen).keys()
  stored = saving.read(tmp_path / "adapter")
  kept = {"adapters/vera_a", "adapters/vera_b"} if method == "vera" else set()
  assert {path for path in stored if "layers/" in path} == set()
  assert sum(np.prod(t.shape) for path, t in stored.items() if path not in kept) == sum(
    row.count for row in tuned.table)
  assert json.loads((tmp_path / "adapter" / "ft.json").read_text())["modality"] == "text"
  assert (tmp_path / "adapter" / "tokenizer.json").is_file()
  assert [path.name for path in tmp_path.iterdir()] == ["adapter"]  # nothing unfinished


def test_a_run_starts_from_an_adapter_of_another_form(loaded, tmp_path):
  """Written unrolled, read by a scanned model, whose settings it brings."""
  base, pretrained = loaded[False]
  tuned = split(base, pretrained, "lora")
  trainable = toys.shaken(tuned.trainable)
  saving.save(tmp_path / "adapter", pretrained, tuned, tuned.frozen, trainable, base, SPEC)
  scanned = loaded[True][1]
  config = toys.config("lora", init=str(tmp_path / "adapter"), rank=7)
  again = tune.init(config, scanned.variables, jax.random.PRNGKey(0), scanned.head,
                    tune.Context(scanned))
  assert again.settings.rank == 2 and config.rank == 7
  want = saving.probe(pretrained, tuned, tuned.combine(tuned.frozen, trainable))
  got = saving.probe(scanned, again, again.combine(again.frozen, again.trainable))
  assert saving.difference(want, got) < 1e-5


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
  folder = tmp_path_factory.mktemp("adapter") / "adapter"
  pretrained = base.load()
  tuned = split(base, pretrained, "lora")
  saving.save(folder, pretrained, tuned, tuned.frozen, tuned.trainable, base, SPEC)
  return folder


def altered(adapter, folder, change):
  """A copy of an adapter whose ft.json is another."""
  folder.mkdir()
  for path in adapter.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  spec = json.loads((folder / "ft.json").read_text())
  change(spec)
  (folder / "ft.json").write_text(json.dumps(spec))
  return folder


def test_bad_folders(base, adapter, tmp_path):
  gone = altered(adapter, tmp_path / "gone", lambda spec: spec["base"].update(
    path="/nowhere/model", model={**spec["base"]["model"], "source": "nowhere/model"}))
  with pytest.raises(errors.UserError, match="nowhere/model, is not at /nowhere/model any more"):
    saving.load(gone)
  other = altered(adapter, tmp_path / "other", lambda spec: spec["base"].update(fingerprint="0"))
  with pytest.raises(errors.UserError, match="another model than the one"):
    saving.load(other)
  ranks = altered(adapter, tmp_path / "ranks", lambda spec: spec["tune"].update(rank=3))
  with pytest.raises(errors.UserError, match=r"lora_a: has \(32, 2\), needs \(32, 3\)"):
    saving.load(ranks)
  (ranks / "ft.json").write_text("{")
  with pytest.raises(errors.UserError, match="ft.json: not the description of an adapter"):
    saving.load(ranks)
  with pytest.raises(errors.UserError, match="was tuned by lora: set tune.method=lora"):
    toys.init("head", base.load().variables, init=str(adapter),
              context=tune.Context(models.load(base.source())))


def test_another_folder_is_left_alone(base, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes").write_text("x")
  pretrained = base.load()
  tuned = split(base, pretrained, "lora")
  with pytest.raises(errors.UserError, match="is not an exported adapter"):
    saving.save(tmp_path / "mine", pretrained, tuned, tuned.frozen, tuned.trainable, base, SPEC)


def test_a_changed_file_fails_the_run(base, tmp_path, monkeypatch):
  pretrained = base.load()
  tuned = split(base, pretrained, "lora")
  written = saving.tensors.write_safetensors

  def broken(path, arrays, *rest):
    first = sorted(arrays)[0]
    written(path, {**arrays, first: arrays[first] + 1}, *rest)

  monkeypatch.setattr(saving.tensors, "write_safetensors", broken)
  with pytest.raises(errors.TrainingFailed, match="reads back with other values of adapters/"):
    saving.save(tmp_path / "adapter", pretrained, tuned, tuned.frozen, tuned.trainable, base, SPEC)
  assert list(tmp_path.iterdir()) == []


def test_a_run_that_plain_weights_cannot_compute(tiny, tmp_path):
  """Its adapter/ alone evaluates and predicts as the run did, and exports where PEFT has it."""
  run = tmp_path / "run"
  tiny.train(run, "--config.tune.method=prompt", "--config.tune.length=3",
             "--config.train.steps=12", "--config.data.max_length=64")
  assert not (run / "model").exists() and (run / "adapter" / "ft_adapter.safetensors").is_file()
  rows = tmp_path / "rows.csv"
  rows.write_text("text\na great warm film\ndull and grim plot\n")
  answers = script("predict", f"--run={run}", f"--input={rows}").stdout.splitlines()
  assert len(answers) == 2 and all("label" in json.loads(line) for line in answers)
  measured = json.loads(script("evaluate", f"--run={run}", f"--data={tiny.csv}").stdout)
  assert measured["n"] == 180
  failed = script("export", f"--run={run}", "--format=merged",
                  f"--output={tmp_path / 'hf'}", status=2)
  assert "--format=peft writes it" in failed.stderr
  script("export", f"--run={run}", "--format=peft", f"--output={tmp_path / 'peft'}")
  conf = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
  assert conf["peft_type"] == "PROMPT_TUNING" and conf["task_type"] == "SEQ_CLS"
