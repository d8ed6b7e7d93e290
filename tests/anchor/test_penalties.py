"""Penalties: exact gradients, on weights with a pretrained point and on no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anchor.conftest import Setting, batch, flat, moved, settings

from ft import errors
from ft.anchor import ewc, l2sp

HEAD = "params/classifier/"


def test_l2sp_gradient_is_alpha_times_the_distance(toy):
  part = l2sp.make(settings(l2sp, alpha=0.3, beta=0.2), toy.context)
  assert part.start
  start, now = toy.tuned.trainable, moved(toy.tuned.trainable)
  grads = flat(jax.grad(part.penalty)(now, {"start": start}))
  for path, grad in grads.items():
    leaf, origin = flat(now)[path], flat(start)[path]
    want = 0.2 * leaf if path.startswith(HEAD) else jnp.float32(0.3) * (leaf - origin)
    np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-9)
  assert part.penalty(start, {"start": start}) == pytest.approx(
    0.1 * sum(float(jnp.sum(leaf**2)) for path, leaf in flat(start).items()
              if path.startswith(HEAD)), rel=1e-5)


def test_l2sp_of_the_head_alone_keeps_no_copy(toy):
  assert l2sp.make(settings(l2sp), toy.context) is None
  part = l2sp.make(settings(l2sp, beta=0.2), toy.context)
  assert not part.start and part.penalty(toy.tuned.trainable, {}) > 0


def test_adapters_have_no_pretrained_point():
  setting = Setting(method="lora", rank=2)
  assert not setting.context.known
  with pytest.raises(errors.UserError, match="nothing that trains has a pretrained point.*lora"):
    l2sp.make(settings(l2sp, alpha=0.1), setting.context)


def test_stacked_layers_that_were_initialised_are_fresh(toy):
  report = type(toy.run.pretrained.report)(initialised=["params/encoder/layer_0/inner/kernel"])
  toy.run.pretrained.report, kept = report, toy.run.pretrained.report
  try:
    context = type(toy.context)(toy.run, toy.tuned, {}, {}, toy.apply)
    assert context.fresh == {"params/encoder/layer_0/inner/kernel"}
    leaf = toy.tuned.trainable["params"]["encoder"]["layer_0"]["inner"]["kernel"]
    stacked = {"params": {"encoder": {"layers": {"inner": {"kernel": leaf[None]}}}}}
    tuned = type(toy.tuned)(stacked, {}, None, None)
    context = type(toy.context)(toy.run, tuned, {}, {}, toy.apply)
    assert context.fresh == {"params/encoder/layers/inner/kernel"} and not context.known
  finally:
    toy.run.pretrained.report = kept


def test_fisher_equals_squared_gradients_of_each_row(toy):
  known = toy.context.known
  found = ewc.fisher(toy.task.loss, toy.apply, toy.tuned.combine, toy.tuned.trainable,
                     toy.tuned.frozen, known, [batch(0, 4), batch(1, 4, padding=2)])
  rows = [{key: value[i:i + 1] for key, value in batch(seed, 4).items()}
          for seed, i in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1))]

  @jax.jit
  def square(row):
    value = lambda t: toy.task.loss(  # noqa: E731
      toy.call, toy.tuned.combine(toy.tuned.frozen, t), row, None)[0]
    return jax.tree.map(jnp.square, jax.grad(value)(toy.tuned.trainable))

  want = jax.tree.map(lambda *parts: sum(parts) / 6, *[square(row) for row in rows])
  assert set(flat(found)) == known and not any(path.startswith(HEAD) for path in flat(found))
  for path, value in flat(found).items():
    np.testing.assert_allclose(value, flat(want)[path], rtol=2e-4, atol=1e-9)
  assert max(float(value.max()) for value in flat(found).values()) > 1e-4


def test_ewc_penalty_is_the_weighted_distance(toy):
  start, now = toy.tuned.trainable, moved(toy.tuned.trainable)
  held = {"params": {"embeddings": {"embedding": jnp.full_like(
    start["params"]["embeddings"]["embedding"], 0.7)}}}
  fixed = {"start": start, "fisher": held}
  grads = flat(jax.grad(ewc.penalty(4.0))(now, fixed))
  for path, grad in grads.items():
    distance = flat(now)[path] - flat(start)[path]
    want = 4.0 * 0.7 * distance if path == "params/embeddings/embedding" else 0 * distance
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-9)


def test_ewc_without_a_source(toy):
  assert ewc.make(settings(ewc), toy.context) is None
  with pytest.raises(errors.UserError, match="EWC without a source: set anchor.ewc.source"):
    ewc.make(settings(ewc, weight=10.0), toy.context)
