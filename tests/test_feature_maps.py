"""Feature maps side by side: against pooling and interpolation of torch."""

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from ft import feature_maps


def test_patches_equal_pooling_and_interpolation_of_torch():
  rng = np.random.default_rng(0)
  maps = [rng.normal(size=(2, side, side, c)).astype(np.float32) for side, c in ((8, 3), (4, 5))]
  found = feature_maps.patches([jnp.asarray(y) for y in maps], 3)
  pooled = [F.avg_pool2d(torch.tensor(y.transpose(0, 3, 1, 2)), 3, 1, 1) for y in maps]
  pooled[1] = F.interpolate(pooled[1], size=(8, 8), mode="bilinear")
  want = torch.cat(pooled, 1).numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(found, want, atol=1e-5)
  np.testing.assert_array_equal(feature_maps.patches(maps[:1], 1), maps[0])


def test_maps_that_are_taken():
  maps = [np.zeros((1, side, side, 1)) for side in (125, 63, 32, 16, 8)]
  assert feature_maps.choose(maps, 250, (8, 16)) == (2, 3)
  assert feature_maps.choose([np.zeros((1, 16, 16, 1))], 224, (8,)) == (0,)
