"""Contrastive learning of embeddings: pairs drawn from labels, and losses of pairs.

Shapes: B pairs of a batch, D size of an embedding, N rows. Embeddings are of length one, so that
their products are cosines. A batch is seen as a whole, whatever devices hold it: the texts of all
of them are each other's negatives (of one micro-batch, with train.accumulate).
"""

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors

STRATEGIES = ("oversampling", "undersampling", "unique")
MOST_ROWS = 5000  # whose pairs are listed: 12.5 million


# ---- Pairs -----------------------------------------------------------------------------------


def label_pairs(labels, strategy: str = "oversampling", iterations: int = 0, seed: int = 0):
  """SetFit's pairs: of one label (also a row with itself) and of two (Tunstall et al. 2022).

  All pairs are listed without regard to order: the sum over labels of n (n + 1) / 2 positives, and
  n m over pairs of labels negatives. Which and how many are used:

    oversampling   as many of each kind as there are of the larger one; the smaller is repeated
    undersampling  as many of each kind as there are of the smaller one
    unique         every pair once
    iterations     if above 0, iterations * N of each kind, whatever the strategy

  Args:
    labels: (N,) int.
    strategy: one of STRATEGIES.
    iterations: see above.
    seed: of the order in which pairs are taken.

  Returns:
    (first (M,), second (M,), same (M,) float32): two rows of each pair and 1.0 where the labels are
    equal; positives and negatives take turns as long as there are both.

  Raises:
    UserError: fewer than two labels, or too many rows.
  """
  labels = np.asarray(labels)
  if len(np.unique(labels)) < 2:
    raise errors.UserError("pairs from labels need rows of two labels or more in train, and there "
                           f"is {len(np.unique(labels))}")
  if len(labels) > MOST_ROWS:
    raise errors.UserError(f"pairs from labels are for few rows, and train has {len(labels):,}; "
                           f"set data.per_label, or data.limit to {MOST_ROWS} or less")
  first, second = np.triu_indices(len(labels))
  order = np.random.default_rng(seed).permutation(len(first))
  first, second = first[order], second[order]
  same = labels[first] == labels[second]
  kinds = [np.flatnonzero(same), np.flatnonzero(~same)]
  sizes = [len(kind) for kind in kinds]
  if iterations:
    sizes = [iterations * len(labels)] * 2
  elif strategy != "unique":
    sizes = [max(sizes) if strategy == "oversampling" else min(sizes)] * 2
  chosen = [np.resize(kind, size) for kind, size in zip(kinds, sizes, strict=True)]
  turns = np.concatenate([np.arange(size) + 0.5 * k for k, size in enumerate(sizes)])
  chosen = np.concatenate(chosen)[np.argsort(turns, kind="stable")]
  return first[chosen], second[chosen], same[chosen].astype(np.float32)


def positives(labels, seed: int = 0):
  """Returns (first (M,), second (M,)): each row with one other of its label, drawn by the seed.

  Rows that are alone with their label are left out.

  Raises:
    UserError: fewer than two labels that have two rows.
  """
  labels = np.asarray(labels)
  rng, first, second = np.random.default_rng(seed), [], []
  there = [np.flatnonzero(labels == label) for label in np.unique(labels)]
  there = [rng.permutation(rows) for rows in there if len(rows) > 1]
  if len(there) < 2:
    raise errors.UserError("pairs from labels need two labels or more with two rows each in train, "
                           f"and there {'is' if len(there) == 1 else 'are'} {len(there)}")
  for rows in there:
    first.append(rows)
    second.append(np.roll(rows, 1))
  return np.concatenate(first), np.concatenate(second)


class Pairs:
  """Examples that are two others side by side: every array of them gets an axis of 2 at axis 1.

  Attributes: those of `loader.Examples` that a loader reads; `indices` are of the first of the two.
    tokens: (M,) of both, padding not counted; None of examples without lengths.
    rows_each: rows in a pair.
  """

  rows_each = 2.0

  def __init__(self, examples, first, second, pad: dict, **more):
    """Makes pairs of examples.

    Args:
      examples: `loader.Examples` of variable length.
      first, second: (M,) positions among them.
      pad: key -> value that fills the shorter one up; other keys are stacked.
      more: key -> (M,), what the pair has beside its examples.
    """
    self._examples, self._pairs, self._pad = examples, np.stack([first, second], 1), pad
    self._more = more
    self.indices = examples.indices[first]
    lengths = examples.lengths
    self.lengths = None if lengths is None else lengths[self._pairs].max(1)
    self.tokens = None if lengths is None else lengths[self._pairs].sum(1)
    self.cached = examples.cached

  def __len__(self):
    return len(self._pairs)

  def __getitem__(self, i: int) -> dict:
    example = side_by_side([self._examples[int(j)] for j in self._pairs[i]], self._pad)
    return example | {key: values[i] for key, values in self._more.items()}


def side_by_side(examples: list[dict], pad: dict) -> dict:
  """Returns one example of S: arrays (T, S), filled up to the longest, of keys in `pad`, else (S,).

  Args:
    examples: S dicts of arrays with the same keys.
    pad: key -> value that fills up.
  """
  made = {}
  for key in examples[0]:
    parts = [np.asarray(example[key]) for example in examples]
    if key in pad:
      made[key] = np.full((max(map(len, parts)), len(parts)), pad[key], parts[0].dtype)
      for side, part in enumerate(parts):
        made[key][:len(part), side] = part
    else:
      made[key] = np.stack(parts, -1)
  return made


def sides(inputs: dict) -> tuple[dict, int]:
  """Returns inputs (B, T, S) as (B * S, T), the sides of a pair next to each other, and S."""
  count = next(iter(inputs.values())).shape[-1]
  cut = lambda x: jnp.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:-1])  # noqa: E731
  return {key: cut(value) for key, value in inputs.items()}, count


# ---- Losses ----------------------------------------------------------------------------------


def normalise(x):
  """Returns vectors (…, D) of length one, float32; zero stays zero."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))


def in_batch(anchors, others, group, weight, temperature: float, negatives=None):
  """Softmax cross-entropy of each anchor's own text among all of the batch: (B,) nats.

  InfoNCE (van den Oord et al. 2018) with cosines, which sentence-transformers calls
  MultipleNegativesRankingLoss (its scale is 1 / temperature). Texts of an anchor's own group and
  those that only fill the batch up are no negatives.

  Args:
    anchors, others: (B, D), of length one.
    group: (B,) int, equal where texts mean the same.
    weight: (B,), 0 for rows that fill up.
    temperature: of the softmax.
    negatives: (B, D) hard negatives of each row, which are negatives of all; or None.
  """
  logits = jnp.where(_apart(group, weight), anchors @ others.T / temperature, -jnp.inf)
  own = jnp.sum(anchors * others, -1) / temperature
  columns = [jnp.where(jnp.eye(len(group), dtype=bool), own[:, None], logits)]
  if negatives is not None:
    columns.append(jnp.where(weight[None] > 0, anchors @ negatives.T / temperature, -jnp.inf))
  return jax.nn.logsumexp(jnp.concatenate(columns, -1), -1) - own


def triplet(anchors, others, group, weight, margin: float, negatives=None):
  """max(0, margin - cos(anchor, own) + cos(anchor, negative)) of each row: (B,).

  The negative is the row's own where there is one, else the nearest of the batch (Schroff et al.
  2015, with cosines for distances); a row without any costs nothing. Arguments as in `in_batch`.
  """
  if negatives is None:
    away = jnp.max(jnp.where(_apart(group, weight), anchors @ others.T, -2.0), -1)
  else:
    away = jnp.sum(anchors * negatives, -1)
  near = jnp.sum(anchors * others, -1)
  return jnp.where(away > -2, jnp.maximum(0.0, margin - near + away), 0.0)


def cosine_error(anchors, others, score):
  """(cos(anchor, other) - score)² of each row: (B,); CosineSimilarityLoss elsewhere."""
  return jnp.square(jnp.sum(anchors * others, -1) - score)


def _apart(group, weight):
  """(B, B): whether column j is a real row that does not mean the same as row i."""
  return (group[:, None] != group[None]) & (weight[None] > 0)
