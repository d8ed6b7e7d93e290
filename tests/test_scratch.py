"""Small untrained checkpoints: read by transformers, their tokenizer gives texts back."""

import gzip
import types

import jax
import numpy as np
import pytest

from ft import errors, models, scratch
from ft.data import text

LINES = ["Zwei Männer sitzen dort.", "Two men are sitting there, talking!",
         "A dog runs (fast)."] * 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("scratch")
  (folder / "a.en").write_text("\n".join(LINES))
  (folder / "b.de.gz").write_bytes(gzip.compress("\n".join(LINES).encode()))
  names = [str(folder / "a.en"), str(folder / "b.de.gz")]
  scratch.write(folder / "model", names, vocabulary=120, width=16, layers=1, heads=2, positions=32)
  return folder, names


def test_transformers_computes_the_same(made):
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  folder = made[0] / "model"
  net = transformers.MarianMTModel.from_pretrained(folder, dtype=torch.float32).eval()
  ids = np.array([[5, 9, 7, 0], [8, 4, 0, 2]])
  inputs = {"input_ids": ids, "attention_mask": (ids != 2).astype(int),
            "decoder_input_ids": np.array([[2, 6, 5], [2, 4, 9]])}
  with torch.no_grad():
    want = net(**{key: torch.tensor(value) for key, value in inputs.items()}).logits.numpy()
  pretrained = models.load(str(folder))
  got = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["logits"]
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_texts_come_back_and_end(made):
  config = {key: default for key, (default, *_) in text.KEYS.items()} | {"max_length": 32}
  preprocess = text.Preprocess(types.SimpleNamespace(**config),
                               models.inspect(str(made[0] / "model")))
  for line in LINES[:3]:
    ids = preprocess({"text": line})["input_ids"]
    assert ids[-1] == 0 and 1 not in ids
    assert preprocess.decode(ids) == line
  assert preprocess.pad["input_ids"] == 2


def test_what_is_there_is_left_alone(made):
  with pytest.raises(errors.UserError, match="is there already"):
    scratch.write(made[0] / "model", made[1])
  with pytest.raises(errors.UserError, match="absent"):
    scratch.write(made[0] / "other", [str(made[0] / "absent.en")])
  assert not (made[0] / "other").exists()
