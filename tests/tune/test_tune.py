"""What every method promises: a lossless split, frozen leaves untouched, nothing paid for them."""

import jax
import numpy as np
import optax
import pytest
from tune import toys

from ft import errors, tune

CASES = {
  "full": {},
  "head": {},
  "freeze": {"train": ("layer_1/output", "norm/bias$")},
  "lora": {"rank": 2},
  "sparse": {"rank": 1},
  "staged": {},
}


@pytest.mark.parametrize("method", CASES)
def test_split_is_complete_and_without_overlap(method):
  _, variables, _ = toys.make()
  tuned = toys.init(method, variables, **CASES[method])
  whole = tune.flatten(tuned.combine(tuned.frozen, tuned.trainable))
  trainable, frozen = tune.flatten(tuned.trainable), tune.flatten(tuned.frozen)
  assert not trainable.keys() & frozen.keys()
  for path, leaf in tune.flatten(variables).items():
    assert whole[path] is leaf  # a structural join: no leaf is copied
  assert any(path.startswith("batch_stats/") for path in frozen)
  assert not any(path.startswith("batch_stats/") for path in trainable)
  assert sum(row.count for row in tuned.table) == sum(x.size for x in trainable.values())
  assert [row.path for row in tuned.table] == sorted(trainable)


@pytest.mark.parametrize("method", CASES)
def test_combine_refuses_overlap(method):
  _, variables, _ = toys.make()
  tuned = toys.init(method, variables, **CASES[method])
  with pytest.raises(ValueError, match="both trainable and frozen"):
    tuned.combine(tuned.trainable, tuned.trainable)


@pytest.mark.parametrize("method", CASES)
def test_training_moves_every_trainable_and_no_frozen_leaf(method):
  module, variables, ids = toys.make()
  tuned = toys.init(method, variables, **CASES[method])
  before = jax.tree.map(np.asarray, variables)
  tx = optax.adam(1e-2)

  @jax.jit
  def step(trainable, opt, frozen):
    grads = jax.grad(lambda t: toys.loss(module, tuned, t, frozen, ids))(trainable)
    updates, opt = tx.update(grads, opt, trainable)
    return optax.apply_updates(trainable, updates), opt

  trainable, opt = tuned.trainable, tx.init(tuned.trainable)
  for _ in range(3):
    trainable, opt = step(trainable, opt, tuned.frozen)
  after = tune.flatten(tuned.combine(tuned.frozen, trainable))
  names = {row.path for row in tuned.table}
  for path, leaf in tune.flatten(before).items():
    if path in names:
      assert np.any(np.asarray(after[path]) != leaf), path
    else:
      np.testing.assert_array_equal(after[path], leaf)
  assert optax.tree.size(opt) == 2 * sum(row.count for row in tuned.table) + 1


@pytest.mark.parametrize("method", CASES)
def test_merged_is_the_tuned_model(method):
  module, variables, ids = toys.make()
  tuned = toys.init(method, variables, **CASES[method])
  trainable = toys.shaken(tuned.trainable)
  plain = tuned.merge(tuned.frozen, trainable)
  assert jax.eval_shape(lambda: plain) == jax.eval_shape(lambda: variables)
  np.testing.assert_allclose(
    jax.jit(module.apply)(plain, ids)["logits"],
    toys.forward(module, tuned, tuned.combine(tuned.frozen, trainable), ids), rtol=1e-5, atol=1e-5)


def test_counts():
  _, variables, _ = toys.make(depth=2, width=8, vocabulary=11)
  block = 2 * (8 * 8 + 8) + 8 * 32 + 32 + 32 * 8 + 8 + 2 * 8
  count = {m: sum(row.count for row in toys.init(m, variables, **v).table)
           for m, v in CASES.items()}
  assert count["full"] == 11 * 8 + 2 * block + 8 * 2 + 2
  assert count["head"] == 8 * 2 + 2
  assert count["freeze"] == (32 * 8 + 8) + 2 * 8 + 8 * 2 + 2
  # rank x (in + out) for each linear layer: query, key, inner, output.
  assert count["lora"] == 2 * 2 * (2 * (8 + 8) + 2 * (8 + 32)) + 8 * 2 + 2
  assert count["sparse"] == 2 * (2 * (8 + 8) + 2 * (8 + 32)) + 8 * 2 + 2
  assert count["staged"] == count["full"]


def test_only_head():
  _, variables, _ = toys.make()
  assert toys.init("head", variables).only_head
  assert toys.init("freeze", variables, train=("classifier/bias",), train_head=False).only_head
  assert not toys.init("freeze", variables, train=("layer_1/norm",)).only_head
  assert not toys.init("full", variables).only_head
  assert not toys.init("lora", variables, rank=2).only_head
  assert not toys.init("staged", variables).only_head


def test_unknown_method():
  _, variables, _ = toys.make()
  config = toys.config("full")
  config.method = "lorra"
  with pytest.raises(errors.UserError, match="did you mean 'lora'"):
    tune.init(config, variables, jax.random.key(0))


def test_head_needs_a_head():
  _, variables, _ = toys.make()
  with pytest.raises(errors.UserError, match="has none"):
    toys.init("head", variables, head=())


def test_freeze_messages():
  _, variables, _ = toys.make()
  with pytest.raises(errors.UserError, match="(?s)'layer_7' finds none.*params/encoder"):
    toys.init("freeze", variables, train=("layer_1", "layer_7"))
  with pytest.raises(errors.UserError, match="leaves nothing frozen.*tune.method='full'"):
    toys.init("freeze", variables, train=(".",))
  with pytest.raises(errors.UserError, match="needs tune.train"):
    toys.init("freeze", variables)
  with pytest.raises(errors.UserError, match="no regular expression"):
    toys.init("freeze", variables, train=("(",))


def test_freeze_searches_and_anchors():
  _, variables, _ = toys.make()
  tuned = toys.init("freeze", variables, train=("^params/encoder/layer_0/.*bias$",),
                    train_head=False)
  assert [row.path for row in tuned.table] == [
    f"params/encoder/layer_0/{name}/bias" for name in ("inner", "key", "norm", "output", "query")]


def test_describe():
  _, variables, _ = toys.make(depth=3)
  text = tune.describe(toys.init("freeze", variables, train=("layer_[02]/norm",)))
  lines = [line.split() for line in text.splitlines()]
  assert lines[0] == ["trains", "parameters", "share"]
  assert ["params/encoder/layer_{0,2}/norm", "32", "1.43", "%"] in lines
  assert lines[-2][:5] == ["all", "that", "trains", "50", "2.23"]
  ranges = tune.describe(toys.init("full", variables))
  assert "params/encoder/layer_{0-2}/norm" in ranges and "100.00 %" in ranges


def _step(method, depth, **values):
  """(tuned, lowered step, bytes of optimizer state) of an encoder with few activations."""
  module, variables, _ = toys.make(depth=depth, width=64, vocabulary=50)
  ids = jax.random.randint(jax.random.key(1), (2, 4), 0, 50)
  tuned = toys.init(method, variables, **values)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

  def step(trainable, opt, frozen, ids):
    grads = jax.grad(lambda t: toys.loss(module, tuned, t, frozen, ids))(trainable)
    updates, opt = tx.update(grads, opt, trainable)
    return optax.apply_updates(trainable, updates), opt

  opt = tx.init(tuned.trainable)
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(tuned.trainable, opt, tuned.frozen, ids)
  return tuned, lowered, sum(x.nbytes for x in jax.tree.leaves(opt))


@pytest.mark.optimised
@pytest.mark.parametrize("method,values", [("lora", {"rank": 4}), ("head", {})])
def test_frozen_leaves_cost_no_gradient_state_or_copy(method, values):
  tuned, lowered, state = _step(method, 4, **values)
  count = sum(row.count for row in tuned.table)
  frozen = sum(x.nbytes for x in jax.tree.leaves(tuned.frozen))
  assert state <= 8 * count + 16
  memory = lowered.compile().memory_analysis()
  # Out come the trainables and their moments only, in place of those that went in.
  assert memory.output_size_in_bytes <= 12 * count + 4096
  assert memory.argument_size_in_bytes <= frozen + 12 * count + 8192
  # A gradient or a copy of the frozen leaves would add their size to the temporaries, as in full.
  assert memory.temp_size_in_bytes < 0.5 * frozen


@pytest.mark.optimised
def test_memory_of_full_shows_what_a_gradient_would_add():
  tuned, lowered, state = _step("full", 4)
  size = sum(x.nbytes for x in jax.tree.leaves(tuned.trainable))
  assert state >= 2 * size
  assert lowered.compile().memory_analysis().temp_size_in_bytes > size


@pytest.mark.slow
def test_flops_without_frozen_gradients():
  flops = {method: _step(method, 12, **values)[1].cost_analysis()["flops"]
           for method, values in (("full", {}), ("lora", {"rank": 4}), ("head", {}))}
  assert flops["lora"] < 0.72 * flops["full"]
  assert flops["head"] < 0.36 * flops["full"]
