"""Small models of real families, and what every method's test asks of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tune import toys

from ft import models, state, tune
from ft.models import bert, layers, llama, vit
from ft.weights import names

SCANNED = layers.Compute(scan=True, remat="full")


def pretrained(family, config, inputs, scanned=False, head=()):
  """Returns a model with random weights, large enough that every part matters."""
  module = family.Model(config, SCANNED if scanned else layers.Compute())
  shapes = tune.flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs)))
  rng = np.random.default_rng(2)
  variables = tune.unflatten({
    path: jnp.asarray(path.endswith("/scale") + 0.2 * rng.normal(size=leaf.shape), jnp.float32)
    for path, leaf in shapes.items()})
  return models.Pretrained(family.__name__.rpartition(".")[2], module, variables, names.Report(),
                           {}, config, family.MODALITY, head)


def ids(rows=3, length=6, size=30):
  return jax.random.randint(jax.random.key(1), (rows, length), 0, size)


def a_llama(scanned=False, **fields):
  config = llama.Config(**{**dict(
    vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24, max_position_embeddings=24, head="lm"), **fields})
  inputs = {"input_ids": ids(), "attention_mask": jnp.ones((3, 6), int).at[1, 4:].set(0)}
  return pretrained(llama, config, inputs, scanned), inputs


def a_bert(scanned=False, **fields):
  config = bert.Config(**{**dict(
    vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=16, num_labels=3), **fields})
  inputs = {"input_ids": ids(), "attention_mask": jnp.ones((3, 6), int).at[1, 4:].set(0),
            "token_type_ids": jnp.zeros((3, 6), int).at[:, 3:].set(1)}
  return pretrained(bert, config, inputs, scanned, ("params/classifier",)), inputs


def a_vit(scanned=False, **fields):
  config = vit.Config(**{**dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    image_size=8, patch_size=4, num_labels=3), **fields})
  inputs = {"pixel_values": jax.random.normal(jax.random.key(1), (2, 8, 8, 3))}
  return pretrained(vit, config, inputs, scanned, ("params/classifier",)), inputs


def init(method, model, **values):
  return toys.init(method, model.variables, model.head, tune.Context(model), **values)


def apply(model, tuned):
  """Returns jitted (trainable, inputs) -> outputs."""
  run = state.make_apply(model.module, tuned.interceptor, tuned.around)
  return jax.jit(lambda trainable, inputs: run(tuned.combine(tuned.frozen, trainable), inputs)[0])


def count(tuned) -> int:
  return sum(row.count for row in tuned.table)


def check_training(model, tuned, inputs):
  """Three steps move every trainable leaf and no bit of a frozen one."""
  run = state.make_apply(model.module, tuned.interceptor, tuned.around)
  tx = optax.adam(1e-2)

  @jax.jit
  def step(trainable, opt, frozen):
    def loss(trainable):
      logits = run(tuned.combine(frozen, trainable), inputs)[0]["logits"]
      return jnp.sum((logits - jnp.arange(float(logits.shape[-1]))) ** 2)

    updates, opt = tx.update(jax.grad(loss)(trainable), opt, trainable)
    return optax.apply_updates(trainable, updates), opt

  before = jax.tree.map(np.array, tuned.frozen)
  trainable, opt = tuned.trainable, tx.init(tuned.trainable)
  for _ in range(3):
    trainable, opt = step(trainable, opt, tuned.frozen)
  for path, leaf in tune.flatten(before).items():
    np.testing.assert_array_equal(tune.flatten(tuned.frozen)[path], leaf)
  for path, leaf in tune.flatten(tuned.trainable).items():
    assert np.any(np.asarray(tune.flatten(trainable)[path]) != leaf), path
  whole = tune.flatten(tuned.combine(tuned.frozen, trainable))
  for path, leaf in tune.flatten(model.variables).items():
    if path not in {row.path for row in tuned.table}:
      np.testing.assert_array_equal(whole[path], leaf)
