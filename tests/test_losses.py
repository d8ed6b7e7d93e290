"""Losses over large vocabularies: against the plain formulas, their gradients, their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft import losses

ROWS, LENGTH, WIDTH, WORDS = 3, 11, 8, 40


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
  kernel = rng.normal(size=(WIDTH, WORDS)).astype(np.float32)
  targets = rng.integers(0, WORDS, (ROWS, LENGTH)).astype(np.int32)
  weights = (rng.random((ROWS, LENGTH)) < 0.7).astype(np.float32)
  return hidden, kernel, targets, weights


def by(kernel):
  return lambda hidden, number: hidden @ kernel


def plain(hidden, kernel, targets, weights, smoothing=0.0):
  hot = optax.smooth_labels(jax.nn.one_hot(targets, WORDS), smoothing)
  return jnp.sum(optax.softmax_cross_entropy(hidden @ kernel, hot) * weights, -1)


@pytest.mark.parametrize("steps", [1, 4, LENGTH])  # 4 leaves a last block to be filled up
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_gradient_equal_the_plain_form(steps, smoothing):
  hidden, kernel, targets, weights = inputs()

  def blocked(hidden, kernel):
    found = losses.cross_entropy(by(kernel), hidden, targets, weights, smoothing,
                                 block=steps * ROWS * WORDS)
    return jnp.sum(found["loss"] * jnp.arange(1, ROWS + 1)), found

  def whole(hidden, kernel):
    found = plain(hidden, kernel, targets, weights, smoothing)
    return jnp.sum(found * jnp.arange(1, ROWS + 1)), found

  gradient = lambda f: jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, kernel)  # noqa: E731
  ((_, got), got_grads), ((_, want), want_grads) = gradient(blocked), gradient(whole)
  np.testing.assert_allclose(got["loss"], want, rtol=1e-5)
  np.testing.assert_allclose(got["nll"], plain(hidden, kernel, targets, weights), rtol=1e-5)
  for a, b in zip(got_grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [2, LENGTH])
def test_divergence_and_gradient_equal_the_plain_form(steps):
  hidden, kernel, _, weights = inputs()
  base_hidden, base_kernel, *_ = inputs(1)

  def blocked(hidden, kernel, base_hidden, base_kernel):
    return jnp.sum(losses.divergence(by(kernel), by(base_kernel), hidden, base_hidden, weights, 2.0,
                                     block=steps * ROWS * WORDS))

  def whole(hidden, kernel, base_hidden, base_kernel):
    p = jax.nn.softmax(base_hidden @ base_kernel / 2)
    q = jax.nn.softmax(hidden @ kernel / 2)
    return 4 * jnp.sum(jnp.sum(p * (jnp.log(p) - jnp.log(q)), -1) * weights)

  got, grads = jax.value_and_grad(blocked, (0, 1, 2, 3))(hidden, kernel, base_hidden, base_kernel)
  want, expected = jax.value_and_grad(whole, (0, 1, 2, 3))(
    hidden, kernel, base_hidden, base_kernel)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(grads, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_divergence_from_itself_is_zero():
  hidden, kernel, _, weights = inputs()
  same = losses.divergence(by(kernel), by(kernel), hidden, hidden, weights)
  np.testing.assert_allclose(same, 0, atol=1e-5)


def test_masked_tokens_have_no_influence():
  hidden, kernel, targets, weights = inputs()
  changed = np.where(weights[..., None] > 0, hidden, 50.0)
  found = [losses.cross_entropy(by(kernel), h, targets, weights, block=3 * ROWS * WORDS)["loss"]
           for h in (hidden, changed)]
  np.testing.assert_array_equal(*found)


def test_half_precision_logits_are_summed_in_float32():
  hidden, kernel, targets, weights = inputs()
  head = lambda hidden, number: (hidden @ kernel).astype(jnp.bfloat16)  # noqa: E731
  found = losses.cross_entropy(head, hidden, targets, weights)
  assert found["loss"].dtype == found["nll"].dtype == jnp.float32


def test_the_head_is_told_the_number_of_the_block():
  hidden, kernel, targets, weights = inputs()
  seen = lambda hidden, number: hidden @ kernel + 100.0 * number * jnp.eye(WORDS)[0]  # noqa: E731
  found = losses.cross_entropy(seen, hidden, 0 * targets + 1, 0 * weights + 1,
                               block=ROWS * WORDS)["loss"]
  assert np.all(found > 100 * sum(range(LENGTH)) * 0.9)


@pytest.mark.optimised
def test_memory_does_not_hold_the_logits():
  rows, length, width, words, block = 4, 512, 16, 8192, 1 << 18
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, length, width), (width, words))]

  def peak(block):
    def loss(hidden, kernel):
      targets = jnp.zeros((rows, length), jnp.int32)
      found = losses.cross_entropy(by(kernel), hidden, targets, jnp.ones((rows, length)),
                                   block=block)
      return found["loss"].sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * rows * length * words
  assert peak(logits) >= logits  # in one piece they are all there
  assert peak(block) < logits / 4


def test_tokens_that_do_not_count_never_meet_the_head():
  hidden, kernel, targets, weights = inputs()
  weights[:] = 0
  weights[0, [1, 9]], weights[1, 4], weights[2, [0, 5, 10]] = 1, 0.5, 1
  met = []

  def head(hidden, number):
    jax.debug.callback(lambda x: met.append(np.asarray(x)), hidden)
    return hidden @ kernel

  found = jax.jit(lambda w: losses.cross_entropy(head, hidden, targets, w, block=2 * ROWS * WORDS)[
    "loss"])(weights)
  jax.effects_barrier()
  np.testing.assert_allclose(found, plain(hidden, kernel, targets, weights), rtol=1e-5)
  assert len(met) == 2  # of six blocks of two steps: the longest row has three tokens that count
  seen = {row.tobytes() for block in met for row in block.reshape(-1, WIDTH)}
  assert {hidden[place].tobytes() for place in zip(*np.nonzero(weights), strict=True)} <= seen
