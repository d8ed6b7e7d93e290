"""k nearest neighbours: the labels of the training rows whose features point most the same way.

Shapes: N rows, M training rows, D features, C classes.
"""

import numpy as np

BLOCK = 4_000_000  # similarities held at once: 16 MB


def logits(features, known, label, k: int, prior) -> np.ndarray:
  """Returns (N, C) float32: log votes of the k neighbours by cosine.

  Each neighbour has one vote, and the shares of the training rows have one together: they decide
  between equals, and a label without a neighbour keeps a chance above 0.

  Args:
    features: (N, D). known: (M, D) features of the training rows.
    label: (M,) int, or (M, C) multi-hot; then the logits are log odds, label by label.
    k: at most M count.
    prior: (C,) log shares of the training rows; of multi-hot labels their log odds.
  """
  known, features = _unit(known), _unit(features)
  k, label, prior = min(k, len(known)), np.asarray(label), np.asarray(prior, np.float64)
  hot = label if label.ndim > 1 else np.eye(len(prior))[label]
  share = 1 / (1 + np.exp(-prior)) if label.ndim > 1 else np.exp(prior)
  size, votes = max(1, BLOCK // len(known)), [np.zeros((0, len(prior)))]
  for start in range(0, len(features), size):
    away = -features[start:start + size] @ known.T
    near = np.argpartition(away, k - 1, axis=1)[:, :k]
    votes.append(sum(hot[column] for column in near.T))
  chance = (np.concatenate(votes) + share) / (k + 1)
  found = np.log(chance) - (np.log1p(-chance) if label.ndim > 1 else 0)
  return found.astype(np.float32)


def _unit(x) -> np.ndarray:
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
