"""LoRA: the update is the right one, its gradient too, and bad targets are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tune import toys

from ft import errors, tune
from ft.tune import adapters


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("scale", ["alpha/r", "alpha/sqrt(r)"])
def test_gradient_is_that_through_merged_weights(scanned, scale):
  module, variables, ids = toys.make(scanned=scanned)
  tuned = toys.init("lora", variables, rank=2, alpha=3.0, scale=scale)
  trainable = toys.shaken(tuned.trainable)

  def through_merged(trainable):
    logits = module.apply(tuned.merge(tuned.frozen, trainable), ids)["logits"]
    return jnp.sum((logits - jnp.arange(2.0)) ** 2)

  adapted = jax.jit(jax.grad(lambda t: toys.loss(module, tuned, t, tuned.frozen, ids)))(trainable)
  merged = jax.jit(jax.grad(through_merged))(trainable)
  for path, leaf in tune.flatten(merged).items():
    assert np.abs(leaf).max() > 0, path
    np.testing.assert_allclose(tune.flatten(adapted)[path], leaf, rtol=1e-4, atol=2e-4)


def test_scanned_equals_merged_and_stacks():
  module, variables, ids = toys.make(depth=3, scanned=True)
  tuned = toys.init("lora", variables, rank=2)
  shapes = {row.path: row.shape for row in tuned.table}
  assert shapes["adapters/encoder/layers/inner/lora_a"] == (3, 8, 2)
  assert shapes["adapters/encoder/layers/inner/lora_b"] == (3, 2, 32)
  trainable = toys.shaken(tuned.trainable)
  np.testing.assert_allclose(
    jax.jit(module.apply)(tuned.merge(tuned.frozen, trainable), ids)["logits"],
    toys.forward(module, tuned, tuned.combine(tuned.frozen, trainable), ids), rtol=1e-5, atol=1e-5)


def test_starts_at_the_pretrained_function():
  module, variables, ids = toys.make()
  tuned = toys.init("lora", variables, rank=2)
  adapted = toys.forward(module, tuned, tuned.combine(tuned.frozen, tuned.trainable), ids)
  plain = jax.jit(module.apply)(variables, ids)["logits"]
  np.testing.assert_array_equal(adapted, plain)


def test_initial_values():
  _, variables, _ = toys.make(width=64)
  tuned = toys.init("lora", variables, rank=8)
  flat = tune.flatten(tuned.trainable)
  a = np.asarray(flat["adapters/encoder/layer_0/output/lora_a"])
  assert a.shape == (256, 8) and np.abs(a).max() <= 1 / 16
  np.testing.assert_allclose(a.std(), 1 / 16 / np.sqrt(3), rtol=0.05)  # uniform
  assert not np.asarray(flat["adapters/encoder/layer_0/output/lora_b"]).any()
  assert np.any(a != np.asarray(flat["adapters/encoder/layer_1/output/lora_a"]))
  # A layer's start does not depend on which others are adapted.
  alone = toys.init("lora", variables, rank=8, targets=("layer_0/output",))
  np.testing.assert_array_equal(
    tune.flatten(alone.trainable)["adapters/encoder/layer_0/output/lora_a"], a)


def test_merge_by_formula_and_purity():
  _, variables, _ = toys.make()
  tuned = toys.init("lora", variables, rank=4, alpha=6.0, scale="alpha/sqrt(r)",
                    targets=("layer_1/key",))
  trainable = toys.shaken(tuned.trainable)
  flat, path = tune.flatten(trainable), "encoder/layer_1/key"
  a, b = (np.asarray(flat[f"adapters/{path}/lora_{x}"], np.float64) for x in "ab")
  before = tune.flatten(variables)
  merged = tune.flatten(tuned.merge(tuned.frozen, trainable))
  np.testing.assert_allclose(
    merged[f"params/{path}/kernel"], before[f"params/{path}/kernel"] + 3.0 * a @ b, rtol=1e-6)
  for name, leaf in merged.items():
    if path not in name and "classifier" not in name:
      assert leaf is before[name]


def test_dropout_only_with_its_stream():
  module, variables, ids = toys.make(depth=1)
  tuned = toys.init("lora", variables, rank=2, dropout=0.5)
  state = tuned.combine(tuned.frozen, toys.shaken(tuned.trainable))
  still = toys.init("lora", variables, rank=2)
  plain = toys.forward(module, still, state, ids)
  np.testing.assert_array_equal(toys.forward(module, tuned, state, ids), plain)
  dropped = [toys.forward(module, tuned, state, ids, dropout=jax.random.key(i)) for i in (0, 0, 1)]
  np.testing.assert_array_equal(dropped[0], dropped[1])
  assert np.any(dropped[0] != dropped[2]) and np.any(dropped[0] != plain)


def test_dropout_is_unbiased_and_on_the_adapter_alone():
  class Stream:
    path = ()

    def has_rng(self, name):
      return name == "dropout"

    def make_rng(self, name):
      return jax.random.key(0)

  rows = adapters.dropout(Stream(), jnp.ones((200, 200)), 0.25)
  assert set(np.unique(rows).tolist()) == {0.0, np.float32(1 / 0.75)}
  np.testing.assert_allclose(rows.mean(), 1.0, atol=0.02)


def test_half_precision_keeps_its_dtype():
  module, variables, ids = toys.make()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  tuned = toys.init("lora", half, rank=2)
  trainable = toys.shaken(tuned.trainable)
  assert tune.flatten(trainable)["adapters/encoder/layer_0/key/lora_a"].dtype == jnp.float32
  merged = tuned.merge(tuned.frozen, trainable)
  assert tune.flatten(merged)["params/encoder/layer_0/key/kernel"].dtype == jnp.bfloat16
  state = tuned.combine(tuned.frozen, trainable)
  assert jnp.isfinite(toys.forward(module, tuned, state, ids)).all()


def test_targets():
  _, variables, _ = toys.make()
  tuned = toys.init("lora", variables, rank=2, targets=("query$", "layer_0/inner"))
  modules = {row.path.rpartition("/")[0] for row in tuned.table if "lora_a" in row.path}
  assert modules == {f"adapters/encoder/{m}"
                     for m in ("layer_0/query", "layer_1/query", "layer_0/inner")}


def test_messages():
  _, variables, _ = toys.make()
  with pytest.raises(errors.UserError, match="(?s)'q_proj' matches no layer.*layer_0/query"):
    toys.init("lora", variables, targets=("q_proj",))
  with pytest.raises(errors.UserError, match="rank=9 is larger.*8 x 32"):
    toys.init("lora", variables, rank=9)
  with pytest.raises(errors.UserError, match="matches no layer"):  # the head trains in full
    toys.init("lora", variables, rank=2, targets=("classifier",))
  with pytest.raises(errors.UserError, match="is empty"):
    toys.init("lora", variables, rank=2, targets=())
  with pytest.raises(errors.UserError, match="no regular expression"):
    toys.init("lora", variables, rank=2, targets=("(",))


def test_convolutions():
  kernel, point = jnp.ones((3, 3, 8)), jnp.ones((1, 1, 8, 16))
  variables = {"params": {"depthwise": {"kernel": kernel}, "expand": {"kernel": point}}}
  tuned = toys.init("lora", variables, rank=2, head=())
  assert [row.shape for row in tuned.table] == [(8, 2), (2, 16)]
  trainable = toys.shaken(tuned.trainable)
  merged = tuned.merge(tuned.frozen, trainable)["params"]["expand"]["kernel"]
  assert merged.shape == point.shape and np.any(merged != point)
  with pytest.raises(errors.UserError, match="depthwise.*3x3x8"):
    toys.init("lora", variables, rank=2, targets=("depthwise",), head=())


def test_an_adapter_that_acts_on_nothing_is_told(caplog):
  module, variables, ids = toys.make()
  tuned = toys.init("lora", variables, rank=2)
  stray = {"adapters": {"elsewhere": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 8))}}}
  state = tuned.combine(tuned.combine(tuned.frozen, tuned.trainable), stray)
  with caplog.at_level("WARNING", logger="absl"):
    toys.forward(module, tuned, state, ids)
  assert "1 adapters act on nothing" in caplog.text and "elsewhere" in caplog.text
