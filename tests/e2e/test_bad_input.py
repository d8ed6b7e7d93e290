"""Wrong input: one message with what, where and what would be right; nothing half-written."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
from commands import script

from ft import config, errors, train

LINES = ["text,label,group"] + [f"good film {i},{'yes' if i % 2 else 'no'},g{i}" for i in range(60)]


def attempt(tiny, folder, *overrides):
  """Runs in this process; returns the message of the UserError it must end with."""
  c = config.load(str(tiny.config), [o.split("=", 1) for o in overrides])
  with pytest.raises(errors.UserError) as raised:
    train.train(c, folder)
  assert not (folder / "card.json").exists() and not (folder / "model").exists()
  return str(raised.value)


def csv(path, lines, encoding="utf-8"):
  path.write_bytes("\n".join(lines).encode(encoding) + b"\n")
  return f"data.train={path}"


def test_unknown_key_exits_2_without_a_traceback(tiny, tmp_path):
  done = tiny.train(tmp_path / "run", "--config.optim.ratte=1", status=2)
  assert "did you mean 'optim.rate'" in done.stderr and "Traceback" not in done.stderr
  assert not (tmp_path / "run").exists()


def test_file_not_found(tiny, tmp_path):
  csv(tmp_path / "reviews.csv", LINES)
  said = attempt(tiny, tmp_path / "run", f"data.train={tmp_path}/reviws.csv")
  assert "reviws.csv" in said and "reviews.csv" in said.replace("reviws.csv", "")


def test_empty_file(tiny, tmp_path):
  said = attempt(tiny, tmp_path / "run", csv(tmp_path / "empty.csv", []))
  assert "empty.csv" in said


def test_missing_column_lists_those_there_are(tiny, tmp_path):
  said = attempt(
    tiny, tmp_path / "run", csv(tmp_path / "d.csv", LINES), "data.columns.text=review"
  )
  assert "review" in said and "text, label, group" in said.replace("'", "")


def test_label_in_test_that_train_lacks(tiny, tmp_path):
  csv(tmp_path / "t.csv", [*LINES[:10], "odd one,perhaps,g"])
  said = attempt(
    tiny, tmp_path / "run", csv(tmp_path / "d.csv", LINES), f"data.test={tmp_path}/t.csv"
  )
  assert "perhaps" in said and "t.csv" in said and "11" in said


def test_text_that_is_not_utf8(tiny, tmp_path):
  said = attempt(
    tiny, tmp_path / "run", csv(tmp_path / "d.csv", [*LINES, "caf\xe9 film,yes,g"], "latin-1")
  )
  assert "d.csv" in said and "62" in said and "data.encoding" in said


def test_all_rows_dropped(tiny, tmp_path):
  said = attempt(
    tiny, tmp_path / "run", csv(tmp_path / "d.csv", LINES),
    "data.max_length=4", "data.truncation=drop",
  )
  assert "none of" in said and "d.csv" in said


def test_batch_not_divisible(tiny, tmp_path):
  said = attempt(tiny, tmp_path / "run", "train.batch=16", "train.accumulate=3")
  assert "train.batch=16" in said and "would" in said


def test_checkpoint_of_another_architecture(tiny, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(tiny.model, other)
  values = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(values | {"hidden_size": 48}))
  said = attempt(tiny, tmp_path / "run", f"model.source={other}")
  assert "48" in said and "embeddings" in said
  (other / "config.json").write_text(json.dumps(values | {"model_type": "mamba"}))
  assert "mamba" in attempt(tiny, tmp_path / "run2", f"model.source={other}")


def test_corrupted_safetensors_header(tiny, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(tiny.model, other)
  weights = other / "model.safetensors"
  weights.write_bytes(struct.pack("<Q", 2**40) + weights.read_bytes()[8:])
  assert "model.safetensors" in attempt(tiny, tmp_path / "run", f"model.source={other}")


class Evil:
  def __reduce__(self):
    return os.mkdir, ("executed",)


def test_pickle_that_wants_to_execute(tiny, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  other = tmp_path / "other"
  shutil.copytree(tiny.model, other)
  (other / "model.safetensors").unlink()
  with zipfile.ZipFile(other / "pytorch_model.bin", "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({"x": Evil()}))
  said = attempt(tiny, tmp_path / "run", f"model.source={other}")
  assert "pytorch_model.bin" in said and "mkdir" in said
  assert not (tmp_path / "executed").exists()


def test_workdir_of_a_different_config(tiny, tmp_path):
  tiny.train(tmp_path / "run", "--config.train.steps=2")
  done = tiny.train(tmp_path / "run", "--config.train.steps=2", "--config.seed=7", status=2)
  assert "seed: 0 -> 7" in done.stderr


def test_workdir_in_use(tiny, tmp_path):
  first = tiny.start(tmp_path / "run", "--config.train.steps=5000")
  try:
    while not (tmp_path / "run" / "config.json").exists():
      assert first.poll() is None
    done = tiny.train(tmp_path / "run", "--config.train.steps=5000", status=2)
    assert f"pid {first.pid}" in done.stderr
  finally:
    first.kill()
    first.wait()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_write_permission(tiny, tmp_path):
  (tmp_path / "closed").mkdir(mode=0o500)
  assert "cannot write" in attempt(tiny, tmp_path / "closed" / "run")


def test_workdir_that_is_a_file(tiny, tmp_path):
  (tmp_path / "file").write_text("")
  assert "cannot write" in attempt(tiny, tmp_path / "file" / "run")


def test_missing_extra_is_named():
  with pytest.raises(errors.UserError, match=r"pip install -e '.\[speech\]'"):
    errors.require("a_package_that_is_not_there", "speech")


def test_a_run_that_diverges_exits_3(tiny, tmp_path):
  done = tiny.train(
    tmp_path / "run", "--config.optim.rate=1e30", "--config.optim.clip=0",
    "--config.optim.warmup=0", "--config.train.steps=60", status=3,
  )
  assert "not finite" in done.stderr and "rows [" in done.stderr and "Traceback" not in done.stderr
  assert not (tmp_path / "run" / "card.json").exists()


def test_images_that_cannot_be_used(tmp_path):
  from PIL import Image

  from ft.data import image

  given = {"data.modality": "image", "data.size": 8, "data.max_pixels": 10_000}
  c = config.complete({**given, "data.mean": (0.5,) * 3, "data.std": (0.5,) * 3})
  preprocess = image.Preprocess(c.data)
  Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(tmp_path / "giant.png")
  (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
  for name in ("giant.png", "broken.jpg"):
    with pytest.raises(errors.RowError, match=name):
      preprocess({"image": tmp_path / name})


def test_sha256_mismatch(tmp_path, monkeypatch):
  """The pinned sum decides, whatever the index serves; its own tests are in test_resolve.py."""
  from ft.weights import resolve

  pinned = json.loads((resolve.CHECKSUMS).read_text())
  assert all(len(entry["sha256"]) == 64 for entry in pinned.values())
  assert hashlib.sha256(b"").hexdigest() not in {entry["sha256"] for entry in pinned.values()}


def test_prepare_refuses_flags_that_it_would_not_read(tmp_path):
  said = script("prepare", "--dialogues=chat.jsonl", "--vocabulary=99",
                f"--output={tmp_path}/pairs.jsonl", status=2).stderr
  assert "--vocabulary: not read with --dialogues" in said and "Traceback" not in said
  assert "--column, --speaker, --rows, --seed" in said
