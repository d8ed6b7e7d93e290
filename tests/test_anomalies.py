"""Banks of patches: against anomalib's formula in torch, brute force and worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ft import anomalies


def anomalib(embedding, bank, neighbours):
  """anomalib's PatchcoreModel from embeddings (B, P, D) on: (scores (B,), distances (B, P)).

  Written out from its `nearest_neighbors` and `compute_anomaly_score` (version 1.1).
  """
  distances = torch.cdist(embedding, bank[None])
  patch_scores, locations = distances.min(-1)
  if neighbours == 1:
    return patch_scores.amax(1), patch_scores
  images = torch.arange(len(embedding))
  max_patches = patch_scores.argmax(1)
  features = embedding[images, max_patches]
  score = patch_scores[images, max_patches]
  nn_sample = bank[locations[images, max_patches]]
  support = torch.cdist(nn_sample, bank).topk(min(neighbours, len(bank)), largest=False).indices
  distances = torch.cdist(features[:, None], bank[support]).squeeze(1)
  weights = (1 - F.softmax(distances, 1))[..., 0]
  return weights * score, patch_scores


@pytest.mark.parametrize("neighbours", [1, 2, 9, 40])
def test_scores_equal_those_of_anomalib(neighbours):
  rng = np.random.default_rng(0)
  bank = rng.normal(3, 1, (30, 6)).astype(np.float32)
  images = rng.normal(3, 2, (4, 3, 5, 6)).astype(np.float32)
  want, distances = anomalib(torch.tensor(images.reshape(4, 15, 6)), torch.tensor(bank), neighbours)
  score, maps = anomalies.score(jnp.asarray(images), jnp.asarray(bank), distance="euclidean",
                                how="patchcore", neighbours=neighbours)
  np.testing.assert_allclose(score, want, atol=1e-4)
  np.testing.assert_allclose(maps.reshape(4, 15), distances, atol=1e-4)


def test_the_formula_by_hand():
  # Bank 0, 1, 5 on a line; patches .2 and 7. The second is farthest: 2 from 5, whose neighbours are
  # 5 and 1, 2 and 6 from it: (1 - e^2 / (e^2 + e^6)) * 2.
  bank, image = jnp.float32([[0], [1], [5]]), jnp.float32([[[[0.2], [7]]]])
  score, maps = anomalies.score(image, bank, distance="euclidean", how="patchcore", neighbours=2)
  np.testing.assert_allclose(score, [2 * (1 - 1 / (1 + np.exp(4)))], rtol=1e-6)
  np.testing.assert_allclose(maps, [[[0.2, 2]]], rtol=1e-6)


def test_cosine_and_the_tail():
  rng = np.random.default_rng(1)
  bank, images = rng.normal(size=(8, 5)), rng.normal(size=(2, 15, 20, 5)).astype(np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  want = np.sort((1 - unit(images) @ unit(bank).T).min(-1).reshape(2, -1))[:, -3:].mean(1)
  score, _ = anomalies.score(jnp.asarray(images), anomalies.unit(jnp.float32(bank)),
                             distance="cosine", how="tail", neighbours=1)
  np.testing.assert_allclose(score, want, rtol=1e-4)
  score, maps = anomalies.score(jnp.asarray(images), anomalies.unit(jnp.float32(bank)),
                                distance="cosine", how="mean", neighbours=1)
  np.testing.assert_allclose(score, np.mean(maps, (1, 2)), rtol=1e-5)


def test_coreset_is_greedy_k_centre():
  points = np.random.default_rng(2).normal(5, 1, (60, 4)).astype(np.float32)
  chosen = [7]
  while len(chosen) < 12:
    away = np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(1)
    chosen.append(int(away.argmax()))
  np.testing.assert_array_equal(anomalies.coreset(points, 12, 7), chosen)


def test_selection_covers_better_than_chance_also_when_projected():
  rng = np.random.default_rng(3)
  points = np.concatenate([rng.normal(size=(500, 40)) * 0.1, rng.normal(4, 1, (10, 40))])
  for projection in (0, 16):
    kept = anomalies.select(points, 20, projection, seed=0)
    assert len(set(kept)) == 20 and (kept >= 500).sum() == 10  # all of the rare ones
  np.testing.assert_array_equal(anomalies.select(points[:5], 9, 0, seed=0), np.arange(5))
  same = anomalies.select(np.ones((6, 3)), 4, 0, seed=1)
  assert len(set(same)) == 4  # equal points are not taken twice


def test_region_overlap_by_hand():
  # Two regions, of 4 pixels and of 1; ten nominal pixels.
  mask, score = np.zeros((1, 3, 5), int), np.zeros((1, 3, 5))
  mask[0, :2, :2], mask[0, 2, 4] = 1, 1
  score[0, :2, :2] = [[9, 8], [7, 0]]
  score[0, 2, 4], score[0, 0, 4] = 5, 6
  # Share found (mean of both) by false alarms: 3/8 at 0, the small region at .1: 7/8; the rest,
  # all at score 0, up to (1, 1) on a straight line.
  at = lambda x: 7 / 8 + (x - 0.1) / 0.9 / 8  # noqa: E731
  want = (0.1 * 3 / 8 + 0.2 * (7 / 8 + at(0.3)) / 2) / 0.3
  assert anomalies.region_overlap(score, mask) == pytest.approx(want)
  assert anomalies.region_overlap(mask, mask) == pytest.approx(1.0)
  assert np.isnan(anomalies.region_overlap(score, 0 * mask))


def test_maps_are_enlarged_to_the_images():
  large = anomalies.enlarge(np.full((2, 4, 5), 3.0), (40, 50))
  assert large.shape == (2, 40, 50) and np.allclose(large, 3.0)
  one = np.zeros((1, 4, 4))
  one[0, 3, 0] = 1
  assert np.unravel_index(anomalies.enlarge(one, (32, 32))[0].argmax(), (32, 32)) == (31, 0)


def test_scoring_compiles_into_one_program():
  score = jax.jit(lambda x, bank: anomalies.score(x, bank, distance="euclidean", how="max",
                                                  neighbours=1)[0])
  found = score(jnp.ones((2, 2, 2, 3)), jnp.zeros((4, 3)))
  np.testing.assert_allclose(found, np.full(2, 3**0.5), rtol=1e-6)
