"""Partial tuning: what each word selects, its count, its cost, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tune import toys

from ft import config, errors, optim, tune
from ft.models import convnext, t5

BLOCK = 2 * (8 * 8 + 8) + 8 * 32 + 32 + 32 * 8 + 8 + 2 * 8  # of a toy layer of width 8
HEAD = 8 * 2 + 2


def paths(tuned):
  return {row.path for row in tuned.table}


def count(tuned):
  return sum(row.count for row in tuned.table)


def gradient(module, variables, ids):
  """The probe gradient of the toys' loss."""
  def loss(params):
    logits = module.apply({**variables, "params": params}, ids)["logits"]
    return jnp.sum((logits - jnp.arange(2.0)) ** 2)
  return tune.Context(None, lambda: {"params": jax.grad(loss)(variables["params"])})


def test_regex_is_the_default():
  _, variables, _ = toys.make()
  tuned = toys.init("freeze", variables, train=("layer_1/output",))
  assert count(tuned) == 32 * 8 + 8 + HEAD


@pytest.mark.parametrize("layers", [1, 2])
def test_last_layers(layers):
  _, variables, _ = toys.make(depth=3)
  tuned = toys.init("freeze", variables, select="last", layers=layers)
  assert count(tuned) == layers * BLOCK + HEAD
  numbers = {path.split("/")[2] for path in paths(tuned) if "encoder" in path}
  assert numbers == {f"layer_{i}" for i in range(3 - layers, 3)}
  alone = toys.init("freeze", variables, select="last", layers=layers, train_head=False)
  assert paths(tuned) - paths(alone) == {"params/classifier/kernel", "params/classifier/bias"}


@pytest.mark.parametrize("scanned", [False, True])
def test_biases_and_norms(scanned):
  _, variables, _ = toys.make(depth=3, scanned=scanned)
  biases = toys.init("freeze", variables, select="bias")
  assert count(biases) == 3 * (8 + 8 + 32 + 8 + 8) + HEAD
  norms = toys.init("freeze", variables, select="norms")
  assert count(norms) == 3 * 2 * 8 + HEAD
  assert all("/norm/" in path or "classifier" in path for path in paths(norms))


def leaves(module, c):
  variables = jax.eval_shape(lambda: module.Model(c).init(
    jax.random.key(0), **module.probe_inputs(c)))
  return {"params": variables["params"]}


def test_last_of_an_encoder_and_a_decoder_and_of_stages():
  c = t5.Config(vocab_size=20, d_model=8, d_kv=4, num_heads=2, d_ff=16, num_layers=3,
                num_decoder_layers=2)
  tuned = toys.init("freeze", leaves(t5, c), select="last", layers=2)
  assert {"/".join(path.split("/")[1:3]) for path in paths(tuned)} == {
    "encoder/layer_1", "encoder/layer_2", "decoder/layer_0", "decoder/layer_1"}
  c = convnext.Config(depths=(1, 1, 2, 1), hidden_sizes=(4, 4, 8, 8), num_labels=2)
  tuned = toys.init("freeze", leaves(convnext, c), select="last", layers=2)
  body = {path for path in paths(tuned) if not tune.under(path, toys.HEAD)}
  assert {path.split("/")[2] for path in body} == {"stage_2", "stage_3"}


def test_surgical_takes_the_largest_relative_gradient():
  module, variables, ids = toys.make(depth=3)
  context = gradient(module, variables, ids)
  steep, large = tune.flatten(context.gradient()), tune.flatten(variables)

  def share(prefix):
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(np.float64(leaf)))  # noqa: E731
                                    for path, leaf in tree.items() if path.startswith(prefix)))
    return norm(steep) / norm(large)

  prefixes = ["params/embeddings", *(f"params/encoder/layer_{i}/" for i in range(3))]
  ranked = sorted(prefixes, key=share, reverse=True)
  for layers in (1, 2):
    tuned = toys.init("freeze", variables, select="surgical", layers=layers, context=context)
    want = {path for path in large if path.startswith(("params/classifier", *ranked[:layers]))}
    assert paths(tuned) == want


def test_surgical_ties_go_to_the_lower_layer():
  _, variables, _ = toys.make(depth=11)
  same = jax.tree.map(jnp.ones_like, variables)
  equal = tune.Context(None, lambda: {"params": same["params"]})
  tuned = toys.init("freeze", same, select="surgical", layers=4, context=equal)
  body = {path.split("/")[2] for path in paths(tuned) if "encoder" in path}
  assert body == {"layer_0", "layer_1", "layer_2"} and "params/embeddings/embedding" in paths(tuned)
  steep = tune.unflatten({path: leaf * (2 if "layer_10/" in path or "layer_2/" in path else 1)
                          for path, leaf in tune.flatten(same).items()})
  context = tune.Context(None, lambda: {"params": steep["params"]})
  tuned = toys.init("freeze", same, select="surgical", layers=2, context=context)
  assert {path.split("/")[2] for path in paths(tuned) if "encoder" in path} == {
    "layer_2", "layer_10"}


def test_messages():
  module, variables, ids = toys.make()
  _, stacked, _ = toys.make(scanned=True)
  for select in ("last", "surgical"):
    with pytest.raises(errors.UserError, match="model.scan=False"):
      toys.init("freeze", stacked, select=select, context=gradient(module, variables, ids))
  with pytest.raises(errors.UserError, match="layers=3: this model has 2 layers"):
    toys.init("freeze", variables, select="last", layers=3)
  with pytest.raises(errors.UserError, match="probe batch"):
    toys.init("freeze", variables, select="surgical")
  with pytest.raises(errors.UserError, match="has 3 layers, its embeddings"):
    toys.init("freeze", variables, select="surgical", layers=4,
              context=gradient(module, variables, ids))
  with pytest.raises(errors.UserError, match="leaves nothing frozen.*tune.method='full'"):
    toys.init("freeze", variables, select="surgical", layers=3,
              context=gradient(module, variables, ids))
  nan = tune.Context(None, lambda: {
    "params": jax.tree.map(lambda x: x * jnp.nan, variables["params"])})
  with pytest.raises(errors.UserError, match="not finite"):
    toys.init("freeze", variables, select="surgical", context=nan)
  with pytest.raises(errors.UserError, match="tune.train: nothing reads it.*select=bias"):
    toys.init("freeze", variables, select="bias", train=("layer_1",))
  with pytest.raises(errors.UserError, match="tune.layers: nothing reads it.*select=norms"):
    toys.init("freeze", variables, select="norms", layers=2)
  bare = {"params": {"classifier": variables["params"]["classifier"],
                     "embeddings": variables["params"]["embeddings"]}}
  for select in ("bias", "norms"):
    with pytest.raises(errors.UserError, match="finds nothing"):
      toys.init("freeze", bare, select=select)
  with pytest.raises(errors.UserError, match="no numbered layers"):
    toys.init("freeze", bare, select="last")
  with pytest.raises(errors.UserError, match="tune.select"):
    config.complete({"tune.method": "freeze", "tune.select": "lasst"})


def step_of(module, tuned, ids):
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

  def step(trainable, opt, frozen):
    grads = jax.grad(lambda t: toys.loss(module, tuned, t, frozen, ids))(trainable)
    updates, opt = tx.update(grads, opt, trainable)
    return optax.apply_updates(trainable, updates), opt

  return jax.jit(step), tx.init(tuned.trainable)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("select", ["bias", "norms", "last"])
def test_frozen_leaves_stay_bitwise(select, scanned):
  if scanned and select == "last":
    pytest.skip("refused, see test_messages")
  module, variables, ids = toys.make(scanned=scanned)
  tuned = toys.init("freeze", variables, select=select)
  step, opt = step_of(module, tuned, ids)
  trainable = tuned.trainable
  for _ in range(3):
    trainable, opt = step(trainable, opt, tuned.frozen)
  after = tune.flatten(tuned.combine(tuned.frozen, trainable))
  for path, leaf in tune.flatten(variables).items():
    assert np.array_equal(after[path], leaf) != (path in paths(tuned)), path


def test_cost_of_frozen_layers():
  """The last of 12 layers costs one layer's gradient; biases no gradient of any matrix."""
  module, variables, _ = toys.make(depth=12, width=64, vocabulary=50)
  ids = jax.random.randint(jax.random.key(1), (2, 4), 0, 50)
  flops = {}
  for name, method, values in (("full", "full", {}), ("bias", "freeze", {"select": "bias"}),
                               ("last", "freeze", {"select": "last"})):
    tuned = toys.init(method, variables, **values)
    step, opt = step_of(module, tuned, ids)
    flops[name] = step.lower(tuned.trainable, opt, tuned.frozen).cost_analysis()["flops"]
  # Forward 1, backward to activations 1, to weights 1 (plus the optimizer, of what trains).
  assert flops["bias"] < 0.72 * flops["full"]
  assert flops["last"] < 0.42 * flops["full"]


def test_layer_decay_is_graded_from_the_top_of_what_trains():
  _, variables, _ = toys.make(depth=3)
  tuned = toys.init("freeze", variables, select="last", layers=2)
  factors = tune.flatten(optim.rate_factors(tuned.trainable, 0.5, 1.0, toys.HEAD))
  assert {f for p, f in factors.items() if "layer_1/" in p} == {0.25}
  assert {f for p, f in factors.items() if "layer_2/" in p} == {0.5}
