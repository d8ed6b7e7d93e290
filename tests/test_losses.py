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


# p = (1/2, 1/2), q = (1/4, 3/4), by hand: KL(p || q) = ln(4/3) / 2, and so on.
BY_HAND = {
  0.0: np.log(4 / 3) / 2,
  1.0: np.log(1 / 2) / 4 + 3 * np.log(3 / 2) / 4,
  0.5: np.log(16 / 15) / 4 + np.log(2 / 3) / 8 + 3 * np.log(6 / 5) / 8,  # m = (3/8, 5/8)
  # m = (1/2, 1/2) / 4 + (1/4, 3/4) 3 / 4 = (5/16, 11/16)
  0.25: ((np.log(8 / 5) + np.log(8 / 11)) / 8
         + 3 * (np.log(4 / 5) / 4 + 3 * np.log(12 / 11) / 4) / 4),
}


@pytest.mark.parametrize("beta", BY_HAND)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_worked_out_by_hand(beta, temperature):
  base = temperature * np.log(np.array([0.5, 0.5])) + 3.0  # a constant is no part of it
  logits = temperature * np.log(np.array([0.25, 0.75]))
  found = losses.apart(base, logits, temperature, beta)
  assert float(found) == pytest.approx(temperature**2 * BY_HAND[beta], rel=1e-5)
  assert float(losses.apart(base, base, temperature, beta)) == pytest.approx(0, abs=1e-6)


def test_jensen_shannon_tends_to_the_two_kls():
  """As beta goes to 0 it is beta KL(p || q), at the other end (1 - beta) KL(q || p)."""
  rng = np.random.default_rng(0)
  base, logits = rng.normal(size=(2, 5, WORDS)).astype(np.float32)
  for near, at, slope in ((0.01, 0.0, 0.01), (0.99, 1.0, 0.01)):
    np.testing.assert_allclose(losses.apart(base, logits, 1.0, near) / slope,
                               losses.apart(base, logits, 1.0, at), rtol=0.1)


def test_what_is_certain_or_impossible_is_finite():
  base, logits = np.array([0.0, -1e4]), np.array([-1e4, 0.0])
  for beta in (0.1, 0.5, 0.9):
    found, slope = jax.value_and_grad(lambda x, b=beta: losses.apart(base, x, 1.0, b))(logits)
    want = -beta * np.log(beta) - (1 - beta) * np.log1p(-beta)  # the entropy of the mixture's coin
    assert float(found) == pytest.approx(want, rel=1e-4) and np.all(np.isfinite(slope))


@pytest.mark.parametrize("steps", [3, LENGTH])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_distillation_is_both_losses_of_one_pass(steps, smoothing):
  hidden, kernel, targets, weights = inputs()
  base_hidden, base_kernel, *_ = inputs(1)

  def both(hidden, kernel, base_kernel):
    found = losses.distillation(by(kernel), by(base_kernel), hidden, base_hidden, targets, weights,
                                2.0, 0.3, smoothing, block=steps * ROWS * WORDS)
    return jnp.sum(0.4 * found["loss"] + 0.6 * found["apart"]), found

  def apiece(hidden, kernel, base_kernel):
    base = jax.lax.stop_gradient(base_hidden @ base_kernel)
    apart = jnp.sum(losses.apart(base, hidden @ kernel, 2.0, 0.3) * weights, -1)
    return jnp.sum(0.4 * plain(hidden, kernel, targets, weights, smoothing) + 0.6 * apart), apart

  (got, found), grads = jax.value_and_grad(both, (0, 1, 2), has_aux=True)(
    hidden, kernel, base_kernel)
  (want, apart), expected = jax.value_and_grad(apiece, (0, 1, 2), has_aux=True)(
    hidden, kernel, base_kernel)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(found["apart"], apart, rtol=1e-4)
  np.testing.assert_allclose(found["nll"], plain(hidden, kernel, targets, weights), rtol=1e-5)
  np.testing.assert_allclose(
    found["base_nll"], plain(base_hidden, base_kernel, targets, weights), rtol=1e-5)
  for a, b in zip(grads, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  assert not np.any(grads[2])  # the teacher's head gets no gradient


def test_hits_are_the_tokens_with_the_largest_logit():
  hidden, kernel, targets, weights = inputs()
  targets[:, ::2] = (hidden @ kernel).argmax(-1)[:, ::2]
  found = losses.cross_entropy(by(kernel), hidden, targets, weights, hits=True,
                               block=3 * ROWS * WORDS)["hits"]
  right = (hidden @ kernel).argmax(-1) == targets
  np.testing.assert_allclose(found, (right * weights).sum(-1))
  assert found.sum() > 0


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
@pytest.mark.parametrize("distils", [False, True])
def test_memory_does_not_hold_the_logits(distils):
  rows, length, width, words, block = 4, 512, 16, 8192, 1 << 18
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, length, width), (width, words))]

  def peak(block):
    def loss(hidden, kernel):
      targets, ones = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))
      if distils:
        found = losses.distillation(by(kernel), by(kernel + 1), hidden, hidden + 1, targets, ones,
                                    2.0, 0.5, block=block)
        return found["loss"].sum() + found["apart"].sum()
      return losses.cross_entropy(by(kernel), hidden, targets, ones, block=block)["loss"].sum()

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
