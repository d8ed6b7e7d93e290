"""The step: accumulation, skipped steps, and frozen weights that cost nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft import state, tune

WIDTH, ROWS = 256, 16


class Net(nn.Module):
  """Two wide layers and a narrow head."""

  @nn.compact
  def __call__(self, x):
    for i in range(4):
      x = nn.tanh(nn.Dense(WIDTH, name=f"layer_{i}")(x))
    return {"logits": nn.Dense(2, name="classifier")(x)}


def loss(apply, variables, batch, rng):
  logits = apply(variables, {"x": batch["x"]}, rng)["logits"]
  each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
  return jnp.sum(each * batch["weight"]), jnp.sum(batch["weight"]), {}


def data(seed=0):
  rng = np.random.default_rng(seed)
  weight = np.where(np.arange(ROWS) % 5 == 4, 0.0, 1.0 + np.arange(ROWS) % 3)
  return {
    "x": rng.standard_normal((ROWS, WIDTH), dtype=np.float32),
    "label": rng.integers(0, 2, ROWS),
    "weight": weight.astype(np.float32),
  }


def make(trainable, frozen, accumulate=1, tx=None):
  tx = tx or optax.adamw(1e-3)
  step = state.make_train_step(loss, state.make_apply(Net()), tune.combine, tx, accumulate)
  return step, state.create(trainable, {}, tx, 0), frozen


@pytest.fixture(scope="module")
def split():
  variables = Net().init(jax.random.PRNGKey(0), jnp.zeros((1, WIDTH)))
  everything = jax.tree.map(np.asarray, variables)
  head = {"params": {"classifier": everything["params"]["classifier"]}}
  body = {"params": {k: v for k, v in everything["params"].items() if k != "classifier"}}
  return everything, head, body


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_equals_one_big_batch(split, accumulate):
  everything, _, _ = split
  tx = optax.sgd(0.1)
  one, many = (
    make(jax.tree.map(jnp.asarray, everything), {}, k, tx) for k in (1, accumulate)
  )
  after = [step(now, frozen, data())[0].trainable for step, now, frozen in (one, many)]
  for a, b in zip(*map(jax.tree.leaves, after), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing(split):
  everything, _, _ = split
  step, now, frozen = make(jax.tree.map(jnp.asarray, everything), {})
  good, _ = step(now, frozen, data())
  before = jax.tree.map(np.array, (good.trainable, good.opt))
  bad = data()
  bad["x"][0, 0] = np.nan
  after, metrics = step(good, frozen, bad)
  assert metrics["bad"] == 1 and int(after.step) == 2
  same = zip(*map(jax.tree.leaves, (before, (after.trainable, after.opt))), strict=True)
  assert all(np.array_equal(a, b) for a, b in same)
  again, metrics = step(after, frozen, data())
  assert metrics["bad"] == 0


def test_frozen_weights_cost_no_gradient_no_state_no_copy(split):
  everything, head, body = split

  def analysis(trainable, frozen):
    step, now, frozen = make(jax.tree.map(jnp.asarray, trainable), frozen)
    compiled = step.lower(now, frozen, data()).compile()
    return compiled, now

  full, full_state = analysis(everything, {})
  part, part_state = analysis(head, body)
  matrix = WIDTH * WIDTH * 4
  bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
  assert bytes_of(part_state.opt) <= 2 * bytes_of(head) + 16
  assert bytes_of(full_state.opt) >= 2 * 4 * matrix
  memory = part.memory_analysis()
  # Neither a gradient nor a copy of any frozen matrix: temporaries are activations only.
  assert memory.temp_size_in_bytes < matrix
  assert memory.output_size_in_bytes < matrix
  assert full.memory_analysis().temp_size_in_bytes > matrix
  assert part.cost_analysis()["flops"] < 0.4 * full.cost_analysis()["flops"]
