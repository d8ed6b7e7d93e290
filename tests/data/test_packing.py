"""Packing: bins by hand, and the loss of packed rows against that of rows one by one."""

import types

import jax
import numpy as np
import pytest

from ft import state
from ft.data import loader as loaders
from ft.data import packing
from ft.models import gemma, gpt2, llama
from ft.tasks import chat, lm

SIZE, WORDS = 16, 40
KEYS = ("input_ids", "attention_mask", "loss_mask")


def test_best_fit_by_hand():
  assert packing.best_fit([3, 7, 5, 5, 10], 10) == [[4], [0, 1], [2, 3]]
  assert packing.best_fit([4, 6, 5, 1, 4], 10) == [[0, 1], [2, 3, 4]]  # 6+4, 5+4+1
  assert packing.best_fit([2, 2, 2], 4) == [[0, 1], [2]]


def test_best_fit_holds_every_row_once_and_wastes_little():
  lengths = np.random.default_rng(0).integers(1, 101, 2000)
  bins = packing.best_fit(lengths, 128)
  assert sorted(i for one in bins for i in one) == list(range(2000))
  assert all(lengths[one].sum() <= 128 for one in bins)
  least = -(-lengths.sum() // 128)
  assert least <= len(bins) <= 11 / 9 * least + 1  # Johnson 1974


def examples(count=11, seed=0):
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(count):
    size = int(rng.integers(2, 10))
    mask = rng.integers(0, 2, size).astype(np.int32)
    mask[0], mask[-1] = 0, 1
    made.append({"input_ids": rng.integers(3, WORDS, size).astype(np.int32),
                 "attention_mask": np.ones(size, np.int32), "loss_mask": mask,
                 "bytes": np.int32(size)})
  return made


def preprocess(pad):
  return types.SimpleNamespace(pad=dict.fromkeys(pad, 0), finish=lambda batch: batch,
                               length=lambda example: len(example["input_ids"]), max_length=SIZE)


def test_packed_rows_hold_whole_examples_side_by_side():
  made = examples()
  packed = packing.pack(loaders.from_examples(made, preprocess(KEYS)), KEYS, SIZE)
  assert packed.cached and packed.lengths.max() <= SIZE and len(packed) < len(made)
  seen = []
  for i in range(len(packed)):
    row = packed[i]
    assert set(row) == {*KEYS, *packing.KEYS_ADDED}
    for document in range(1, row["segment_ids"].max() + 1):
      part = row["segment_ids"] == document
      assert row["position_ids"][part].tolist() == list(range(part.sum()))
      seen.append(tuple(row["input_ids"][part]))
  assert sorted(seen) == sorted(tuple(one["input_ids"]) for one in made)


COMMON = dict(vocab_size=WORDS, pad_token_id=0, head="lm", initializer_range=0.4)
WIDE = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32)
FAMILIES = {
  "llama": (llama, llama.Config(**WIDE, **COMMON)),
  "gpt2": (gpt2, gpt2.Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0,
                             embd_pdrop=0.0, attn_pdrop=0.0, **COMMON)),
  "gemma": (gemma, gemma.Config(**WIDE, head_dim=8, sliding_window=4, **COMMON)),
}


@pytest.mark.parametrize("family,kind", [
  ("llama", chat.Task), ("gpt2", chat.Task), ("gemma", chat.Task), ("llama", lm.Task)])
def test_losses_and_gradients_are_those_of_rows_one_by_one(family, kind):
  file, config = FAMILIES[family]
  module = file.Model(config)
  variables = module.init(jax.random.PRNGKey(1), **file.probe_inputs(config))
  task = kind.__new__(kind)
  task.preprocess, task._smoothing = preprocess((*KEYS, *packing.KEYS_ADDED)), 0.0
  one_by_one = loaders.from_examples(examples(), task.preprocess)
  packed = packing.pack(one_by_one, KEYS, SIZE)
  apply = state.make_apply(module)
  loss = jax.jit(jax.value_and_grad(
    lambda variables, batch: task.loss(
      lambda *args: apply(*args)[0], variables, batch, None)[:2], has_aux=True))

  def whole(of):
    batch = loaders.Loader(of, len(of), pad=task.preprocess.pad, buckets=(SIZE,)).batch(0)
    return loss(variables, batch)

  (want, count), gradient = whole(one_by_one)
  (got, same), packed_gradient = whole(packed)
  tokens = sum((one["loss_mask"] if kind is chat.Task else one["attention_mask"])[1:].sum()
               for one in examples())
  assert int(count) == int(same) == tokens
  assert abs(float(got - want)) / tokens < 1e-5
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
               packed_gradient, gradient)
