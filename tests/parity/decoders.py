"""What the tests of decoder-only families share: the cache, packed rows, one-token steps."""

import jax
import jax.numpy as jnp
import numpy as np
from parity import harness

torch = harness.torch


def positions(mask):
  """Returns each token's place among the real tokens of its row."""
  return np.maximum(np.cumsum(mask, 1) - 1, 0)


def steps(pretrained, inputs, prompt):
  """Returns the logits (B, T, V) of prefill with `prompt` tokens and one-token steps after it."""
  module, mask = pretrained.module, jnp.asarray(inputs["attention_mask"])
  ids, where = jnp.asarray(inputs["input_ids"]), jnp.asarray(positions(inputs["attention_mask"]))

  def run(variables, cache, ids, where, index):
    return module.apply({**variables, **cache}, ids, mask, where, cache_index=index,
                        mutable=["cache"])

  shapes = jax.eval_shape(run, pretrained.variables, {}, ids, where, 0)[1]
  # What is in slots that are not filled yet must not matter.
  cache = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0, leaf.dtype), shapes)
  step = jax.jit(run)
  out, cache = step(pretrained.variables, cache, ids[:, :prompt], where[:, :prompt], 0)
  logits = [out["logits"]]
  for i in range(prompt, ids.shape[1]):
    out, cache = step(pretrained.variables, cache, ids[:, i:i + 1], where[:, i:i + 1], i)
    logits.append(out["logits"])
  return np.concatenate(logits, axis=1)


def check_cache(pretrained, inputs, prompt=8) -> None:
  """Asserts that prefill and one-token steps give the logits of a full pass, at real tokens."""
  mask = inputs["attention_mask"]
  run = jax.jit(lambda v: pretrained.module.apply(v, **inputs, position_ids=positions(mask)))
  want = np.where(mask[..., None], run(pretrained.variables)["logits"], 0)
  got = np.where(mask[..., None], steps(pretrained, inputs, prompt), 0)
  assert harness.difference(got, want) < 5e-6


def check_packed(pretrained, model, vocab, first=5, second=8) -> None:
  """Asserts that a packed row's second document never sees the first, and parity of both."""
  rng, length = np.random.default_rng(0), first + second
  ids, other = (rng.integers(3, vocab, (2, length), np.int32) for _ in range(2))
  other[:, first:] = ids[:, first:]
  where = np.tile([*range(first), *range(second)], (2, 1)).astype(np.int32)
  documents = np.tile([1] * first + [2] * second, (2, 1)).astype(np.int32)
  run = jax.jit(lambda ids: pretrained.module.apply(
      pretrained.variables, ids, position_ids=where, segment_ids=documents)["logits"])
  np.testing.assert_array_equal(run(ids)[:, first:], run(other)[:, first:])
  assert not np.array_equal(run(ids)[:, :first], run(other)[:, :first])
  with torch.no_grad():  # transformers sees from the positions where documents start
    want = model(torch.tensor(ids).long(), position_ids=torch.tensor(where).long(),
                 use_cache=False).logits
  assert harness.difference(run(ids), want) < harness.TOLERANCE


def opened(cls, folder):
  """Returns the transformers model of a folder, which has to fit it key by key."""
  model, info = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
  for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[key], (key, info[key])
  return model.eval()


def check_logits(pretrained, model, inputs) -> None:
  """Asserts equal logits, of a language model at real tokens."""
  got = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["logits"]
  want = model(**harness.as_torch(inputs)).logits.detach().numpy()
  mask = inputs["attention_mask"][..., None] if want.ndim == 3 else 1
  assert harness.difference(got * mask, want * mask) < harness.TOLERANCE
