"""UPerNet: pooling against torch, scales of a pyramid, and that every level is heard."""

import jax
import numpy as np
import optax
import pytest
import torch

from ft import upernet


@pytest.mark.parametrize("size", upernet.POOLS)
@pytest.mark.parametrize("sides", [(7, 5), (12, 6), (1, 2)])
def test_pool_equals_torch(sides, size):
  x = np.random.default_rng(0).normal(size=(2, *sides, 3)).astype(np.float32)
  want = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(x).permute(0, 3, 1, 2), size)
  np.testing.assert_allclose(upernet.pool(x, size), want.permute(0, 2, 3, 1), atol=1e-6)


def test_pyramid():
  def grids(*shapes):
    return [y.shape[1:3] for y in upernet.pyramid([np.zeros((1, *s, 2), np.float32)
                                                   for s in shapes])]

  assert grids((8, 8), (4, 4)) == [(8, 8), (4, 4)]  # as they are
  assert grids((14, 10)) == [(28, 20), (14, 10), (7, 5)]
  assert grids(*[(6, 6)] * 4) == [(24, 24), (12, 12), (6, 6), (3, 3)]


def test_every_map_reaches_the_scores():
  rng = np.random.default_rng(0)
  maps = [rng.normal(size=(1, s, s, c)).astype(np.float32) for s, c in ((8, 4), (4, 6), (2, 8))]
  head = upernet.UPerNet(classes=3, width=5)
  params = head.init(jax.random.PRNGKey(0), maps)["params"]
  assert not np.asarray(head.apply({"params": params}, maps)).any()  # nothing is said yet
  params["classes"]["kernel"] = rng.normal(size=(5, 3)).astype(np.float32)
  made = head.apply({"params": params}, maps)
  assert made.shape == (1, 8, 8, 3)
  for i in range(3):
    other = [*maps]
    other[i] = rng.normal(size=maps[i].shape).astype(np.float32)
    assert np.abs(head.apply({"params": params}, other) - made).max() > 1e-3


def test_it_learns_where_squares_are():
  rng = np.random.default_rng(0)
  mask = np.zeros((24, 16, 16), np.int32)
  for one in mask:
    row, column = rng.integers(0, 12, 2)
    one[row:row + 4, column:column + 4] = 1
  fine = rng.normal(size=(24, 16, 16, 6)).astype(np.float32)
  fine[..., 0] += 3 * mask
  maps = [fine, fine.reshape(24, 8, 2, 8, 2, 6).mean((2, 4))]
  head, tx = upernet.UPerNet(classes=2, width=16), optax.adam(0.01)
  params = head.init(jax.random.PRNGKey(0), maps)["params"]

  def loss(params):
    scores = head.apply({"params": params}, maps)
    nats = optax.softmax_cross_entropy_with_integer_labels(scores, mask)
    return nats.mean(), (scores.argmax(-1) == mask).mean()

  @jax.jit
  def step(params, state):
    (_, right), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = tx.update(gradient, state)
    return optax.apply_updates(params, updates), state, right

  state = tx.init(params)
  for _ in range(150):
    params, state, right = step(params, state)
  assert right > 0.97  # the ground alone is 0.9375
