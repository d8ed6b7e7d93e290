"""Small encoders with the layers' hooks, one unrolled and one scanned with remat, for the tests."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from ft import tune
from ft.models import layers

HEAD = ("params/classifier",)
# Whether layers are stacked; the quick suite takes the harder case alone.
SCANNED = (pytest.param(False, marks=pytest.mark.slow), True)


class Block(nn.Module):
  width: int

  def setup(self):
    self.query = layers.Linear(self.width)
    self.key = layers.Linear(self.width)
    self.inner = layers.Linear(4 * self.width)
    self.output = layers.Linear(self.width)
    self.norm = layers.LayerNorm()

  def __call__(self, x, _=None):
    q, k = layers.fused([self.query, self.key], x)
    x = x + nn.tanh(q) * k
    return self.norm(x + self.output(nn.gelu(self.inner(x)))), None


class Body(nn.Module):
  """Numbered layers `layer_0`, …, or one scanned stack `layers`."""

  depth: int
  width: int
  scanned: bool = False

  @nn.compact
  def __call__(self, x):
    if self.scanned:
      stack = nn.scan(
        nn.remat(Block, prevent_cse=False), length=self.depth,
        variable_axes={True: 0}, split_rngs={"params": True, "dropout": True},
      )
      return stack(self.width, name="layers")(x, None)[0]
    for i in range(self.depth):
      x, _ = Block(self.width, name=f"layer_{i}")(x)
    return x


class Encoder(nn.Module):
  """ids (B, T) -> logits (B, 2); holds batch statistics that never train."""

  depth: int = 2
  width: int = 8
  vocabulary: int = 11
  scanned: bool = False

  def setup(self):
    self.embeddings = layers.Embedding(self.vocabulary, self.width)
    self.encoder = Body(self.depth, self.width, self.scanned)
    self.mean = self.variable("batch_stats", "mean", jnp.zeros, (self.width,))
    self.classifier = layers.Linear(2)

  def __call__(self, ids):
    features = self.encoder(self.embeddings(ids)).mean(1) - self.mean.value
    return {"features": features, "logits": self.classifier(features)}


def make(**fields):
  """Returns (module, variables, ids) with weights large enough that every layer matters."""
  module = Encoder(**fields)
  ids = jax.random.randint(jax.random.key(1), (4, 5), 0, module.vocabulary)
  variables = jax.jit(module.init)(jax.random.key(0), ids)
  params = shaken(variables["params"], seed=2, size=0.2)
  return module, {"params": params, "batch_stats": variables["batch_stats"]}, ids


def config(method, **values):
  """The section `tune` of a config with a method's defaults and these values."""
  import importlib

  keys = {**tune.KEYS, **importlib.import_module(f"ft.tune.{method}").KEYS}
  defaults = {name: entry[0] for name, entry in keys.items()}
  return config_dict.ConfigDict({"method": method, **defaults, **values})


def init(method, variables, head=HEAD, context=None, **values):
  return tune.init(config(method, **values), variables, jax.random.key(3), head, context)


def forward(module, tuned, variables, ids, **rngs):
  call = tuned.interceptor or (lambda f, args, kwargs, _: f(*args, **kwargs))

  @jax.jit
  def run(variables):
    with nn.intercept_methods(call):
      return module.apply(variables, ids, rngs=rngs)["logits"]

  return run(variables)


def loss(module, tuned, trainable, frozen, ids):
  """A sum of squares that is nowhere flat."""
  logits = forward(module, tuned, tuned.combine(frozen, trainable), ids)
  return jnp.sum((logits - jnp.arange(2.0)) ** 2)


def shaken(tree, seed=4, size=0.1):
  """The tree moved by noise, so that zero-initialised leaves take part."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(x + size * rng.normal(size=x.shape), x.dtype), tree)
