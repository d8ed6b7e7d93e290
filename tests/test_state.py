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


@pytest.mark.optimised
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


# ---- What is minimised beside the loss ----


def extended(split, extras, accumulate=1, tx=None, average=0.0):
  """(step, fresh state) of a model whose head alone trains; both are cheap to compile."""
  _, head, body = split
  tx = tx or optax.sgd(0.1)
  step = state.make_train_step(
    loss, state.make_apply(Net()), tune.combine, tx, accumulate, extras=extras)
  now = state.create(jax.tree.map(jnp.array, head), {}, tx, 0, average)
  return lambda now, batch, fixed=None: step(now, body, batch, fixed), now


def mean_loss(split, batch):
  """The mean loss as a function of the head."""
  _, _, body = split
  apply = lambda variables, inputs, rng: Net().apply(variables, **inputs)  # noqa: E731

  def value(head):
    total, weight, _ = loss(apply, tune.combine(body, head), batch, None)
    return total / weight

  return value


def close(tree, other, rtol=1e-5):
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_term_is_the_mean_over_rows_of_its_own(split, accumulate):
  lifted = lambda apply, variables, batch, rng, base: loss(apply, variables, batch, rng)  # noqa: E731
  more = {key: value[:8] for key, value in data(seed=1).items()}
  extras = state.Extras(terms=(state.Term(lifted, "replay", 0.5),))
  step, now = extended(split, extras, accumulate)
  _, head, _ = split
  after, metrics = step(now, {**data(), "replay": more})
  own, other = mean_loss(split, data()), mean_loss(split, more)
  grads = jax.grad(lambda p: own(p) + 0.5 * other(p))(head)
  close(after.trainable, jax.tree.map(lambda p, g: p - 0.1 * g, head, grads))
  assert metrics["own_loss"] == pytest.approx(float(own(head)), rel=1e-5)
  assert metrics["replay_loss"] == pytest.approx(float(other(head)), rel=1e-5)
  assert metrics["loss"] == pytest.approx(float(own(head) + 0.5 * other(head)), rel=1e-5)


def test_a_penalty_counts_once_a_step_however_the_batch_is_cut(split):
  _, head, _ = split
  square = lambda trainable, fixed: 3.0 * sum(  # noqa: E731
    jnp.sum((p - s) ** 2) for p, s in
    zip(jax.tree.leaves(trainable), jax.tree.leaves(fixed["start"]), strict=True))
  start = jax.tree.map(lambda p: p + 0.01, head)
  grads = jax.grad(lambda p: mean_loss(split, data())(p) + square(p, {"start": start}))(head)
  for accumulate in (1, 4):
    step, now = extended(split, state.Extras(penalty=square), accumulate)
    after, metrics = step(now, data(), {"start": start})
    close(after.trainable, jax.tree.map(lambda p, g: p - 0.1 * g, head, grads))
    assert metrics["penalty"] == pytest.approx(float(square(head, {"start": start})), rel=1e-5)


def test_sharpness_aware_steps_take_the_gradient_of_the_highest_point(split):
  _, head, _ = split
  value = mean_loss(split, data())
  first = jax.grad(value)(head)
  size = optax.tree.norm(first)
  second = jax.grad(value)(jax.tree.map(lambda p, g: p + 0.05 * g / size, head, first))
  step, now = extended(split, state.Extras(rho=0.05))
  after, metrics = step(now, data())
  close(after.trainable, jax.tree.map(lambda p, g: p - 0.1 * g, head, second))
  assert metrics["loss"] == pytest.approx(float(value(head)), rel=1e-5)
  plain = jax.tree.map(lambda p, g: p - 0.1 * g, head, first)
  assert any(np.abs(a - b).max() > 1e-5 for a, b in
             zip(jax.tree.leaves(after.trainable), jax.tree.leaves(plain), strict=True))


def test_the_running_mean_follows_its_formula_and_skips_bad_steps(split):
  step, now = extended(split, state.Extras(average=0.3), average=0.3)
  mean = jax.tree.map(np.array, now.trainable)
  for number in range(4):
    now, _ = step(now, data(number))
    keep = min(0.3, (1 + number) / (10 + number))
    mean = jax.tree.map(lambda m, x, k=keep: k * m + (1 - k) * np.array(x), mean, now.trainable)
    close(now.average, mean)
  bad = data()
  bad["x"][:] = np.nan
  before = jax.tree.map(np.array, now.average)
  now, _ = step(now, bad)
  assert all(np.array_equal(a, b) for a, b in zip(
    jax.tree.leaves(before), jax.tree.leaves(now.average), strict=True))
  close(state.averaged(now).trainable, mean)
  assert state.averaged(now.replace(average=None)).trainable is now.trainable


def test_the_optimizer_sees_the_start_and_the_loss_the_base(split):
  _, head, _ = split
  seen = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(),
    lambda updates, _, params, *, start, **more: (
      jax.tree.map(lambda p, s: s - p, params, start), _))
  start = jax.tree.map(lambda p: p + 1.0, head)
  step, now = extended(split, state.Extras(), tx=seen)
  close(step(now, data(), {"start": start})[0].trainable, start)

  def wrap(loss):
    def apart(apply, variables, batch, rng, base):
      ours, theirs = (apply(v, {"x": batch["x"]})["logits"] for v in (variables, base()))
      return jnp.sum((ours - theirs) ** 2), jnp.float32(len(batch["x"])), {}
    return apart

  step, now = extended(split, state.Extras(wrap=wrap))
  assert step(now, data(), {"start": jax.tree.map(jnp.array, head)})[1]["loss"] == 0
  step, now = extended(split, state.Extras(wrap=wrap))
  assert step(now, data(), {"start": start})[1]["loss"] > 0
