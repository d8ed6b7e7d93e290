"""Layers: equal to plain formulas, hooks that tuning can intercept, dropout's statistics."""

import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft.models import attention, layers


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Three(nn.Module):
  """Three linear layers of one input, fused or not."""

  fuse: bool = True
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    sizes = {"a": 3, "b": 5, "c": 2}
    made = [layers.Linear(n, self.use_bias, name=name) for name, n in sizes.items()]
    return layers.fused(made, x) if self.fuse else [layer(x) for layer in made]


@pytest.mark.parametrize("use_bias", [True, False])
def test_fused_is_separate(use_bias):
  x = random(4, 7, 6)
  variables = Three(use_bias=use_bias).init(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, variables["params"]["b"])["kernel"] == (6, 5)
  assert ("bias" in variables["params"]["b"]) is use_bias
  for fuse in (True, False):
    got = Three(fuse, use_bias).apply(variables, x)
    for name, y in zip("abc", got, strict=True):
      p = variables["params"][name]
      np.testing.assert_allclose(y, x @ p["kernel"] + p.get("bias", 0), atol=1e-5)


@pytest.mark.parametrize("fuse", [True, False])
def test_hooks_see_every_linear_layer(fuse):
  x = random(4, 6)
  variables = Three(fuse).init(jax.random.key(0), x)
  plain = Three(fuse).apply(variables, x)
  seen = []

  def interceptor(call, args, kwargs, context):
    if isinstance(context.module, layers.Linear) and context.method_name == "adapt":
      seen.append(context.module.path)
      return call(*args, **kwargs) + args[0].sum(-1, keepdims=True)
    if isinstance(context.module, layers.Linear) and context.method_name == "weights":
      kernel, bias = call(*args, **kwargs)
      return 2 * kernel, bias
    return call(*args, **kwargs)

  with nn.intercept_methods(interceptor):
    got = Three(fuse).apply(variables, x)
  assert seen == [("a",), ("b",), ("c",)]
  for y, before in zip(got, plain, strict=True):
    np.testing.assert_allclose(y, 2 * before + x.sum(-1, keepdims=True), atol=1e-5)


def test_linear_computes_in_its_dtype():
  x = random(2, 3, 4)
  layer = layers.Linear(5, dtype=jnp.bfloat16)
  variables = layer.init(jax.random.key(0), x)
  assert variables["params"]["kernel"].dtype == jnp.float32
  assert layer.apply(variables, x).dtype == jnp.bfloat16


def test_layer_norm():
  x = random(3, 8) * 5 + 2
  layer = layers.LayerNorm(1e-5)
  variables = {"params": {"scale": random(8, seed=1), "bias": random(8, seed=2)}}
  want = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
  want = want * variables["params"]["scale"] + variables["params"]["bias"]
  np.testing.assert_allclose(layer.apply(variables, x), want, atol=1e-5)


def test_embedding_of_an_unknown_id_is_not_a_number():
  layer = layers.Embedding(5, 3)
  variables = layer.init(jax.random.key(0), jnp.array([0]))
  y = layer.apply(variables, jnp.array([4, 5]))
  assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


@pytest.mark.parametrize("name,function", [
    ("gelu", lambda x: jax.nn.gelu(x, approximate=False)),
    ("gelu_new", lambda x: 0.5 * x * (1 + jnp.tanh((2 / jnp.pi)**0.5 * (x + 0.044715 * x**3)))),
])
def test_activations(name, function):
  x = jnp.linspace(-6, 6, 101)
  np.testing.assert_allclose(layers.ACTIVATIONS[name](x), function(x), atol=2e-6)


def test_attention_is_the_library_s():
  q, k, v = random(2, 5, 3, 4), random(2, 7, 3, 4, seed=1), random(2, 7, 3, 4, seed=2)
  mask = jnp.array([[1] * 7, [1] * 4 + [0] * 3])
  want = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :].astype(bool))
  got = attention.attention(q, k, v, attention.Mask(padding=mask))
  np.testing.assert_allclose(got, want, atol=1e-5)
  # Padding has no influence at all, and a row without a token is finite.
  other = attention.attention(q, k.at[1, 4:].add(9.0), v.at[1, 4:].add(9.0),
                              attention.Mask(padding=mask))
  assert np.array_equal(got, other)
  assert np.isfinite(attention.attention(q, k, v, attention.Mask(padding=0 * mask))).all()


def test_dropout_acts_only_with_its_rng():
  x = random(64, 64)
  assert np.array_equal(layers.Dropout(0.5).apply({}, x), x)
  rngs = {"dropout": jax.random.key(1)}
  assert np.array_equal(layers.Dropout(0.0).apply({}, x, rngs=rngs), x)
  y = layers.Dropout(0.5).apply({}, x, rngs=rngs)
  kept = np.asarray(y) != 0
  assert 0.4 < kept.mean() < 0.6
  assert np.array_equal(np.asarray(y)[kept], 2 * np.asarray(x)[kept])
  assert np.array_equal(y, layers.Dropout(0.5).apply({}, x, rngs=rngs))
  other = layers.Dropout(0.5).apply({}, x, rngs={"dropout": jax.random.key(2)})
  assert (np.asarray(y) != np.asarray(other)).any()
  with pytest.raises(ValueError, match="outside"):
    layers.Dropout(1.0).apply({}, x, rngs=rngs)


def test_dropout_in_bfloat16_is_unbiased():
  x = jnp.ones((512, 512), jnp.bfloat16)
  y = layers.Dropout(0.1).apply({}, x, rngs={"dropout": jax.random.key(1)})
  assert y.dtype == jnp.bfloat16
  assert abs(np.asarray(y, np.float64).mean() - 1) < 5e-3


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_masks_are_as_random_as_they_should_be(rate):
  """Rates, and correlations along axes, between keys and between neighbours, within 5 sigma."""
  shape = (64, 128, 128)
  masks = [np.asarray(layers.keep_mask(jax.random.key(seed), shape, rate), np.float64)
           for seed in (0, 1)]
  sigma = (rate * (1 - rate))**0.5
  for mask in masks:
    assert abs(mask.mean() - (1 - rate)) < 5 * sigma / mask.size**0.5
    for axis in range(3):  # sums over all other axes are binomial
      sums = mask.mean(tuple(a for a in range(3) if a != axis))
      scaled = (sums - (1 - rate)) / sigma * (mask.size / shape[axis])**0.5
      assert np.abs(scaled).max() < 5 and 0.6 < scaled.std() < 1.4
  centred = [(mask - (1 - rate)) / sigma for mask in masks]
  pairs = [(centred[0], centred[1])]
  for lag in (1, 2, 3, 4, 8, 127, 128, 129, 4096, 16384):
    flat = centred[0].ravel()
    pairs.append((flat[lag:], flat[:-lag]))
  for a, b in pairs:
    assert abs((a * b).mean()) * a.size**0.5 < 5


def test_masks_of_many_keys_are_independent():
  masks = np.asarray(jax.vmap(lambda key: layers.keep_mask(key, (4096,), 0.5))(
      jax.random.split(jax.random.key(0), 256)), np.float64) * 2 - 1
  correlations = (masks @ masks.T / 4096)[np.triu_indices(256, 1)] * 4096**0.5
  assert np.abs(correlations).max() < 6 and abs(correlations.std() - 1) < 0.05


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ft.models import bert
assert jax.device_count() == 8
config = bert.Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                     intermediate_size=64, num_labels=3, hidden_dropout_prob=0.3,
                     attention_probs_dropout_prob=0.3)
model = bert.Model(config)
inputs = {"input_ids": np.arange(16 * 12).reshape(16, 12) % 50,
          "attention_mask": np.ones((16, 12), np.int32)}
variables = model.init(jax.random.key(0), **inputs)

@jax.jit
def step(variables, inputs):
  def loss(v):
    out = model.apply(v, **inputs, rngs={"dropout": jax.random.key(7)})
    return (out["logits"] ** 2).sum(), out["logits"]
  return jax.value_and_grad(loss, has_aux=True)(variables)

results = []
for count in (1, 2, 8):
  mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,),
                       devices=jax.devices()[:count])
  placed = jax.device_put(inputs, NamedSharding(mesh, P("data")))
  (_, logits), grads = step(jax.device_put(variables, NamedSharding(mesh, P())), placed)
  results.append((np.asarray(logits), jax.tree.map(np.asarray, grads)))
for logits, grads in results[1:]:
  np.testing.assert_allclose(logits, results[0][0], rtol=1e-5, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
               grads, results[0][1])
"""


def test_dropout_is_the_same_on_any_number_of_devices():
  root = pathlib.Path(__file__).resolve().parents[2]
  env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
         "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
  done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
