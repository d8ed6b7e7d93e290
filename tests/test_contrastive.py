"""Contrastive learning: pairs counted by hand as setfit counts them, losses against torch."""

import jax.numpy as jnp
import numpy as np
import pytest

from ft import contrastive, errors

LABELS = np.array([0, 0, 0, 1, 1, 2])  # 3, 2 and 1 rows of a label
# By hand: positives 3·4/2 + 2·3/2 + 1·2/2 = 10, negatives 3·2 + 3·1 + 2·1 = 11; 21 = 6·7/2 pairs.


@pytest.mark.parametrize("strategy,iterations,counts", [
  ("unique", 0, (10, 11)), ("oversampling", 0, (11, 11)), ("undersampling", 0, (10, 10)),
  ("oversampling", 5, (30, 30)), ("unique", 2, (12, 12))])
def test_as_many_pairs_as_setfit_draws(strategy, iterations, counts):
  first, second, same = contrastive.label_pairs(LABELS, strategy, iterations)
  assert (int(same.sum()), int((1 - same).sum())) == counts
  np.testing.assert_array_equal(same, LABELS[first] == LABELS[second])
  positives = [(a, b) for a, b, s in zip(first, second, same, strict=True) if s]
  assert len(set(positives)) == 10  # every one is there, repeats come after all were taken
  assert len(set(positives[:10])) == 10
  np.testing.assert_array_equal(same[:20], [1, 0] * 10)  # taking turns


def test_pairs_are_all_pairs_and_a_function_of_the_seed():
  first, second, _ = contrastive.label_pairs(LABELS, "unique")
  assert sorted(zip(first, second, strict=True)) == [(i, j) for i in range(6) for j in range(i, 6)]
  again = contrastive.label_pairs(LABELS, "unique")
  other = contrastive.label_pairs(LABELS, "unique", seed=1)
  np.testing.assert_array_equal(first, again[0])
  assert not np.array_equal(first, other[0])


def test_positives_are_another_row_of_the_label():
  first, second = contrastive.positives(LABELS)
  assert sorted(first) == [0, 1, 2, 3, 4]
  assert (first != second).all() and (LABELS[first] == LABELS[second]).all()


@pytest.mark.parametrize("draw,labels,message", [
  (contrastive.label_pairs, [3, 3, 3], "two labels or more in train, and there is 1"),
  (contrastive.positives, [0, 0, 1], "two rows each in train, and there is 1"),
  (contrastive.label_pairs, np.arange(6000) % 2, "train has 6,000; set data.per_label")])
def test_labels_that_make_no_pairs(draw, labels, message):
  with pytest.raises(errors.UserError, match=message):
    draw(labels)


def vectors(seed, shape=(5, 7)):
  return contrastive.normalise(jnp.asarray(np.random.default_rng(seed).normal(size=shape)))


def test_in_batch_loss_equals_torch():
  """MultipleNegativesRankingLoss: cross-entropy of scaled cosines, hard negatives behind."""
  torch = pytest.importorskip("torch")
  a, b, n = vectors(0), vectors(1), vectors(2)
  group, weight = jnp.arange(5), jnp.ones(5)
  for negatives in (None, n):
    documents = b if negatives is None else jnp.concatenate([b, n])
    scores = torch.nn.functional.cosine_similarity(
      torch.tensor(np.array(a))[:, None], torch.tensor(np.array(documents))[None], dim=-1) * 20
    want = torch.nn.functional.cross_entropy(scores, torch.arange(5), reduction="none")
    found = contrastive.in_batch(a, b, group, weight, 0.05, negatives)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_rows_that_mean_the_same_or_fill_up_are_no_negatives():
  a, b = vectors(0), vectors(1)
  weight = jnp.array([1.0, 1, 1, 1, 0])
  found = contrastive.in_batch(a, b, jnp.array([0, 1, 2, 0, 3]), weight, 0.1)
  cosines = np.array(a @ b.T, np.float64) / 0.1
  for i, columns in enumerate([(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3), (1, 2, 3)]):
    want = np.log(np.exp(cosines[i, list(columns)]).sum()) - cosines[i, i]
    assert float(found[i]) == pytest.approx(want, rel=1e-4)


def test_triplets_equal_torch_and_take_the_nearest_of_the_batch():
  torch = pytest.importorskip("torch")
  a, b, n = vectors(0), vectors(1), vectors(2)
  group, weight = jnp.arange(5), jnp.ones(5)
  cosine = lambda x, y: 1 - torch.nn.functional.cosine_similarity(x, y)  # noqa: E731
  want = torch.nn.functional.triplet_margin_with_distance_loss(
    *(torch.tensor(np.array(x)) for x in (a, b, n)), distance_function=cosine, margin=0.3,
    reduction="none")
  np.testing.assert_allclose(contrastive.triplet(a, b, group, weight, 0.3, n), want, atol=1e-5)
  near = np.array(a @ b.T)
  away = np.where(np.eye(5, dtype=bool), -2, near).max(1)
  np.testing.assert_allclose(contrastive.triplet(a, b, group, weight, 0.3),
                             np.maximum(0, 0.3 - np.diag(near) + away), atol=1e-6)
  alone = contrastive.triplet(a, b, jnp.zeros(5, int), weight, 0.3)
  np.testing.assert_array_equal(alone, np.zeros(5))


def test_cosine_error_equals_torch():
  torch = pytest.importorskip("torch")
  a, b, score = vectors(0), vectors(1), np.float32([1, 0, 0.5, 1, 0])
  near = torch.nn.functional.cosine_similarity(*(torch.tensor(np.array(x)) for x in (a, b)))
  want = torch.nn.functional.mse_loss(near, torch.tensor(score), reduction="none")
  np.testing.assert_allclose(contrastive.cosine_error(a, b, score), want, atol=1e-6)


def test_sides_stand_next_to_each_other():
  parts = [{"ids": np.array([1, 2, 3]), "n": np.int32(4)}, {"ids": np.array([5]), "n": np.int32(6)}]
  made = contrastive.side_by_side(parts, {"ids": 9})
  np.testing.assert_array_equal(made["ids"], [[1, 5], [2, 9], [3, 9]])
  np.testing.assert_array_equal(made["n"], [4, 6])
  batch = {"ids": jnp.asarray(np.stack([made["ids"], made["ids"] + 10]))}
  cut, count = contrastive.sides(batch)
  np.testing.assert_array_equal(cut["ids"], [[1, 2, 3], [5, 9, 9], [11, 12, 13], [15, 19, 19]])
  assert count == 2
