"""The optimizer: exact rates, masks and schedules, and one step of each rule by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict

from ft import errors, optim, tune
from ft.weights import stacking

HEAD = ("params/classifier",)


def config(**values):
  defaults = {name: entry[0] for name, entry in optim.KEYS.items()}
  return config_dict.ConfigDict({**defaults, "rate": 1e-2, **values})


def tree(paths):
  """{path: ndim} -> nested tree of ones with that many axes of length 2."""
  return tune.unflatten({path: jnp.ones((2,) * ndim) for path, ndim in paths.items()})


BERT = tree({
  "params/embeddings/word_embeddings/embedding": 2,
  "params/embeddings/norm/scale": 1,
  "params/encoder/layer_0/attention/query/kernel": 2,
  "params/encoder/layer_0/attention/query/bias": 1,
  "params/encoder/layer_1/output_norm/scale": 1,
  "params/encoder/layer_1/output/kernel": 2,
  "params/pooler/kernel": 2,
  "params/classifier/kernel": 2,
  "params/classifier/bias": 1,
})
EFFNET = tree({
  "params/stem/conv/kernel": 4,
  "params/stem/bn/scale": 1,
  "params/blocks_0/depthwise/kernel": 4,
  "params/blocks_0/bn_1/scale": 1,
  "params/blocks_2/expand/kernel": 4,
  "params/head/conv/kernel": 4,
  "params/classifier/kernel": 2,
})


def test_rate_factors_of_a_bert():
  factors = tune.flatten(optim.rate_factors(BERT, 0.5, 3.0, HEAD))
  assert factors == {
    "params/embeddings/word_embeddings/embedding": 0.125,
    "params/embeddings/norm/scale": 0.125,
    "params/encoder/layer_0/attention/query/kernel": 0.25,
    "params/encoder/layer_0/attention/query/bias": 0.25,
    "params/encoder/layer_1/output_norm/scale": 0.5,
    "params/encoder/layer_1/output/kernel": 0.5,
    "params/pooler/kernel": 1.0,
    "params/classifier/kernel": 3.0,
    "params/classifier/bias": 3.0,
  }


def test_rate_factors_of_an_efficientnet():
  factors = tune.flatten(optim.rate_factors(EFFNET, 0.5, 1.0, HEAD))
  assert factors == {
    "params/stem/conv/kernel": 1 / 16, "params/stem/bn/scale": 1 / 16,
    "params/blocks_0/depthwise/kernel": 1 / 8, "params/blocks_0/bn_1/scale": 1 / 8,
    "params/blocks_2/expand/kernel": 1 / 2,
    "params/head/conv/kernel": 1.0, "params/classifier/kernel": 1.0,
  }


def test_rate_factors_of_adapters():
  adapters = tree({"adapters/encoder/layer_0/query/lora_a": 2,
                   "adapters/encoder/layer_3/query/lora_b": 2, "params/classifier/bias": 1})
  assert list(tune.flatten(optim.rate_factors(adapters, 0.5, 2.0, HEAD)).values()) == [
    0.5**4, 0.5, 2.0]


def test_layer_decay_without_layers_is_an_error():
  with pytest.raises(errors.UserError, match="numbered layer"):
    optim.rate_factors(tree({"params/encoder/mixer/kernel": 3}), 0.9)


def test_stacked_layers_are_graded_and_decay_as_alone():
  stacked = {"params/encoder/layers/output/kernel": jnp.ones((3, 2, 2)),
             "params/encoder/layers/norm/gamma": jnp.ones((3, 2)),
             "params/embeddings/word": jnp.ones((2, 2))}
  alone = stacking.unstack(stacked)
  factors, want = (tune.flatten(optim.rate_factors(tune.unflatten(t), 0.5))
                   for t in (stacked, alone))
  for path, value in stacked.items():
    graded = stacking.unstack({path: value * factors[path]})
    for part, leaf in graded.items():
      np.testing.assert_array_equal(leaf, alone[part] * want[part])
  decays = tune.flatten(optim.decay_mask(tune.unflatten(stacked)))
  assert not decays["params/encoder/layers/norm/gamma"]
  assert decays["params/encoder/layers/output/kernel"]


def test_decay_masks():
  def decayed(tree_):
    return {path for path, flag in tune.flatten(optim.decay_mask(tree_)).items() if flag}
  assert decayed(BERT) == {
    "params/embeddings/word_embeddings/embedding", "params/encoder/layer_0/attention/query/kernel",
    "params/encoder/layer_1/output/kernel", "params/pooler/kernel", "params/classifier/kernel"}
  assert decayed(EFFNET) == {
    "params/stem/conv/kernel", "params/blocks_0/depthwise/kernel", "params/blocks_2/expand/kernel",
    "params/head/conv/kernel", "params/classifier/kernel"}
  stacked = tree({"params/layers/norm/scale": 2, "params/layers/ln_1/weight": 2,
                  "params/layers/query/bias": 2, "params/layers/query/kernel": 3})
  assert decayed(stacked) == {"params/layers/query/kernel"}


@pytest.mark.parametrize("warmup,steps", [(10, 10), (0.1, 10), (0.0, 0)])
@pytest.mark.parametrize("name,final", [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_schedules(name, final, warmup, steps):
  schedule = optim.make_schedule(
    config(rate=2.0, schedule=name, warmup=warmup, final_rate_fraction=0.1), 100)
  np.testing.assert_allclose(schedule(0), 2.0 / (steps + 1), rtol=1e-6)
  np.testing.assert_allclose(schedule(steps), 2.0, rtol=1e-6)
  np.testing.assert_allclose(schedule(100), 2.0 * final, rtol=1e-5)
  if steps:
    np.testing.assert_allclose(schedule(5), 2.0 * 6 / 11, rtol=1e-6)
  middle = {"cosine": 1.1, "linear": 1.1, "constant": 2.0}[name]
  np.testing.assert_allclose(schedule((100 + steps) // 2), middle, rtol=1e-5)


def one_step(trainable, grads, **values):
  values = {"warmup": 0, "schedule": "constant", "clip": 0.0, **values}
  tx, _ = optim.make(config(**values), trainable, 10, HEAD)
  updates, _ = tx.update(grads, tx.init(trainable), trainable)
  return tune.flatten(updates)


def test_first_steps_by_hand():
  p = tree({"params/encoder/layer_0/query/kernel": 2, "params/encoder/layer_0/query/bias": 1,
            "params/classifier/kernel": 2})
  g = jax.tree.map(lambda x: 3.0 * jnp.ones_like(x), p)
  w, b, h = ("params/encoder/layer_0/query/kernel", "params/encoder/layer_0/query/bias",
             "params/classifier/kernel")
  # Adam's and Lion's first update is the gradient's sign; decay 0.1 x 1 comes on top.
  for name in ("adamw", "lion"):
    u = one_step(p, g, name=name, rate=0.5, weight_decay=0.1, layer_decay=0.5, head_rate_factor=4.0)
    np.testing.assert_allclose(u[w], -0.5 * 0.5 * 1.1, rtol=1e-5)
    np.testing.assert_allclose(u[b], -0.5 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(u[h], -0.5 * 4.0 * 1.1, rtol=1e-5)
  u = one_step(p, g, name="sgd", rate=0.5, weight_decay=0.1)
  np.testing.assert_allclose(u[w], -0.5 * 3.1, rtol=1e-6)
  np.testing.assert_allclose(u[b], -0.5 * 3.0, rtol=1e-6)
  # Adafactor's first update is g / rms(g), clipped to an RMS of 1.
  u = one_step(p, g, name="adafactor", rate=0.5, weight_decay=0.0)
  np.testing.assert_allclose(u[w], -0.5, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_to_the_start(name):
  """p <- p - rate * factor * (update + decay * (p - start)); norms and biases have no decay."""
  rng = np.random.default_rng(0)
  start = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), BERT)
  now = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), jnp.float32), start)
  grads = jax.tree.map(jnp.ones_like, now)
  values = {"name": name, "rate": 0.5, "warmup": 0, "schedule": "constant", "clip": 0.0,
            "layer_decay": 0.5, "head_rate_factor": 3.0}

  def updates(p, **more):
    tx, _ = optim.make(config(**values, **more), p, 10, HEAD)
    return tune.flatten(tx.update(grads, tx.init(p), p, start=start)[0])

  pulled = updates(now, weight_decay=0.25, decay_to="start")
  free, at_start = updates(now, weight_decay=0.0), updates(start, weight_decay=0.25,
                                                           decay_to="start")
  decays, factors = tune.flatten(optim.decay_mask(now)), tune.flatten(
    optim.rate_factors(now, 0.5, 3.0, HEAD))
  assert any(decays.values()) and not all(decays.values())
  for path, moved in tune.flatten(now).items():
    pull = 0.25 * (moved - tune.flatten(start)[path]) if decays[path] else 0.0
    np.testing.assert_allclose(pulled[path], free[path] - 0.5 * factors[path] * pull, rtol=1e-5,
                               atol=1e-6)
    np.testing.assert_array_equal(at_start[path], free[path])  # nothing pulls at the start


def test_decay_to_the_start_of_half_precision_and_of_nothing_else():
  p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BERT)
  tx, _ = optim.make(config(weight_decay=0.5, decay_to="start", name="sgd"), p, 10)
  still, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p, start=p)
  assert not any(np.any(np.asarray(u, np.float32)) for u in jax.tree.leaves(still))


def test_rates_of_a_tuning_method():
  """`Tuned.rates` multiplies a leaf's whole step, decay included, and the other factors."""
  p = tree({"params/encoder/layer_0/query/kernel": 2, "params/encoder/layer_0/query/bias": 1,
            "params/classifier/kernel": 2})
  own = {"params/encoder/layer_0/query/kernel": 8.0, "params/classifier/kernel": 0.5}
  tuned = tune.build(p, {}, HEAD, rates=own)
  values = {"warmup": 0, "schedule": "constant", "clip": 0.0, "name": "sgd", "rate": 0.5,
            "weight_decay": 0.1, "layer_decay": 0.5, "head_rate_factor": 4.0}
  tx, _ = optim.make(config(**values), p, 10, HEAD, tuned)
  mine, _ = tx.update(p, tx.init(p), p)
  plain = one_step(p, p, **values)
  for path, update in tune.flatten(mine).items():
    np.testing.assert_allclose(update, plain[path] * own.get(path, 1.0), rtol=1e-6)


def test_layers_of_speech_and_other_names():
  """Feature extractors and positions stand at the bottom, whatever a family calls its layers."""
  factors = tune.flatten(optim.rate_factors(tree({
    "params/feature_extractor/conv_0/kernel": 3, "params/feature_projection/projection/kernel": 2,
    "params/encoder/position/direction": 3, "params/encoder/conv1/kernel": 3,
    "params/h_0/attention/kernel": 2, "params/h_1/attention/kernel": 2,
    "params/encoder/layer_norm/scale": 1}), 0.5))
  assert factors == {
    "params/encoder/conv1/kernel": 0.125, "params/encoder/layer_norm/scale": 1.0,
    "params/encoder/position/direction": 0.125, "params/feature_extractor/conv_0/kernel": 0.125,
    "params/feature_projection/projection/kernel": 0.125, "params/h_0/attention/kernel": 0.25,
    "params/h_1/attention/kernel": 0.5}


def test_adamw_equals_optax():
  p = jax.tree.map(lambda x: x * 0.3, BERT)
  values = {"weight_decay": 0.2, "clip": 0.5, "eps": 1e-6, "betas": (0.8, 0.95)}
  ours, schedule = optim.make(config(**values), p, 20)
  theirs = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(schedule, 0.8, 0.95, 1e-6, weight_decay=0.2, mask=optim.decay_mask(p)))
  states, params = [ours.init(p), theirs.init(p)], [p, p]
  for i in range(4):
    for k, tx in enumerate((ours, theirs)):
      grads = jax.tree.map(lambda x, i=i: jnp.sin(x * (i + 1)), params[k])
      updates, states[k] = tx.update(grads, states[k], params[k])
      params[k] = optax.apply_updates(params[k], updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *params)


def test_clip_is_over_all_trainables():
  p = tree({"params/a/kernel": 2, "params/b/kernel": 2})
  g = jax.tree.map(lambda x: jnp.full_like(x, 5.0), p)
  u = one_step(p, g, name="sgd", rate=1.0, weight_decay=0.0, momentum=0.0, clip=2.0)
  np.testing.assert_allclose(optax.global_norm(u), 2.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_half_precision(name):
  p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BERT)
  tx, _ = optim.make(config(name=name), p, 10, HEAD)
  state = jax.jit(tx.init)(p)
  assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
  for _ in range(3):
    updates, state = tx.update(jax.tree.map(jnp.ones_like, p), state, p)
    p = optax.apply_updates(p, updates)
  assert all(x.dtype == jnp.bfloat16 and jnp.isfinite(x).all() for x in jax.tree.leaves(p))


def test_messages():
  with pytest.raises(errors.UserError, match="optim.rate has to be set"):
    optim.make(config(rate=0.0), BERT, 10)
  with pytest.raises(errors.UserError, match="momentum=0.5 has no effect.*belongs to sgd"):
    optim.make(config(momentum=0.5), BERT, 10)
  with pytest.raises(errors.UserError, match="betas.*belongs to adamw, lion"):
    optim.make(config(name="sgd", betas=(0.9, 0.99)), BERT, 10)
  with pytest.raises(errors.UserError, match="two numbers"):
    optim.make(config(betas=(0.9,)), BERT, 10)
  with pytest.raises(errors.UserError, match="12 steps, but the run has 10"):
    optim.make(config(warmup=12), BERT, 10)
  with pytest.raises(errors.UserError, match="layer_decay=0"):
    optim.make(config(layer_decay=0.0), BERT, 10)
