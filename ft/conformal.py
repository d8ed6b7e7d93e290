"""Sets and intervals that hold the truth with a stated chance, and what abstaining gains (numpy).

Split conformal prediction (Vovk et al. 2005; Angelopoulos & Bates 2021, arXiv:2107.07511): scores
of n rows that the model was not fitted to give a threshold, and a new row like them lies below it
with a chance of at least `coverage`. Given these n rows, the chance itself is drawn from
Beta(k, n + 1 - k) with k = ceil((n + 1) coverage).

Shapes: N rows, C classes. A quantity that the data does not define is NaN.
"""

import math

import numpy as np


def rank(n: int, coverage: float) -> int:
  """Returns k = ceil((n + 1) coverage), the place of the threshold among n sorted scores."""
  return math.ceil((n + 1) * coverage - 1e-9)


def threshold(scores, coverage: float) -> float:
  """Returns the k-th smallest of the scores (N,); inf where so few rows can promise nothing."""
  scores = np.sort(np.asarray(scores, np.float64))
  k = rank(len(scores), coverage)
  return float(scores[k - 1]) if k <= len(scores) else float("inf")


def band(n: int, m: int, coverage: float, level: float = 0.95) -> tuple[float, float]:
  """Returns between which shares the coverage of m new rows lies, by chance alone.

  Args:
    n: rows that the threshold was taken of.
    m: new rows.
    coverage: that was asked for.
    level: chance of the band.
  """
  from scipy import stats

  k = rank(n, coverage)
  if k > n or not m:
    return (1.0, 1.0) if m else (float("nan"), float("nan"))
  drawn = stats.betabinom(m, k, n + 1 - k)
  return float(drawn.ppf((1 - level) / 2)) / m, float(drawn.ppf((1 + level) / 2)) / m


def least_ambiguous(probs, seed: int = 0) -> np.ndarray:
  """Returns scores (N, C) of sets that are smallest on average (LAC; Sadinle et al. 2019).

  A label's score is one less its probability: rows that are hard get larger sets only as far as
  their probabilities are low, and may get none.
  """
  del seed
  return 1 - np.asarray(probs, np.float64)


def adaptive(probs, seed: int = 0) -> np.ndarray:
  """Returns scores (N, C) of adaptive prediction sets (APS; Romano et al. 2020, arXiv:2006.02544).

  A label's score is the probability of all labels before it, from the likeliest on, and a random
  share of its own: hard rows get larger sets, so that coverage is about the same for all.
  """
  probs = np.asarray(probs, np.float64)
  order = np.argsort(-probs, axis=1, kind="stable")
  ranked = np.take_along_axis(probs, order, 1)
  share = np.random.default_rng(seed).random((len(probs), 1))
  scores = np.empty_like(probs)
  np.put_along_axis(scores, order, ranked.cumsum(1) - ranked + share * ranked, 1)
  return scores


METHODS = {"LAC": least_ambiguous, "APS": adaptive}


def sets(method: str, known, labels, new, coverage: float) -> tuple[np.ndarray, float]:
  """Returns (N, C) which labels the set of each new row holds, and the threshold.

  Args:
    method: of METHODS.
    known: (n, C) probabilities of rows with labels (n,).
    new: (N, C) probabilities of the rows to answer.
    coverage: share of rows whose set should hold the label.
  """
  score = METHODS[method]
  of_truth = score(known, seed=1)[np.arange(len(labels)), labels]
  limit = threshold(of_truth, coverage)
  return score(new, seed=2) <= limit, limit


def abstention(confidence, right, points: int = 20) -> dict:
  """Returns what is gained by answering only the rows of highest confidence.

  Args:
    confidence, right: (N,).
    points: of the curve.

  Returns:
    "area": mean accuracy over all shares of rows answered (1 less the area under the risk-coverage
    curve, Geifman & El-Yaniv 2017); "curve": one dict a point with "answered" (share), "accuracy",
    "confidence" (of the least confident row answered) and "n".
  """
  confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
  order = np.argsort(-confidence, kind="stable")
  accuracy = right[order].cumsum() / np.arange(1, len(order) + 1)
  curve = []
  counts = np.unique(np.ceil(np.arange(1, points + 1) / points * len(order)).astype(int))
  for at in counts[counts > 0]:
    curve.append({"answered": at / len(order), "accuracy": float(accuracy[at - 1]),
                  "confidence": float(confidence[order[at - 1]]), "n": int(at)})
  return {"area": float(accuracy.mean()) if len(order) else float("nan"), "curve": curve}


def vector_scaling(logits, labels, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
  """Fits a factor and an offset a class: softmax(factor · logits + offset) (Guo et al. 2017).

  Targets are smoothed by 1 / (N + 1), as in `stats.fit_temperature`; L-BFGS from a temperature.

  Args:
    logits: (N, C). labels: (N,). temperature: where it starts.

  Returns:
    (factor (C,), offset (C,)).
  """
  from scipy import optimize

  logits, classes = np.asarray(logits, np.float64), np.shape(logits)[1]
  smooth = 1 / (len(labels) + 1)
  target = np.full(logits.shape, smooth / classes)
  target[np.arange(len(labels)), labels] += 1 - smooth

  def loss(x):
    scaled = logits * x[:classes] + x[classes:]
    peak = scaled.max(axis=1, keepdims=True)
    log_norm = np.log(np.exp(scaled - peak).sum(axis=1, keepdims=True)) + peak
    away = (np.exp(scaled - log_norm) - target) / len(labels)
    gradient = np.concatenate([(away * logits).sum(axis=0), away.sum(axis=0)])
    return float((log_norm[:, 0] - (target * scaled).sum(axis=1)).mean()), gradient

  start = np.concatenate([np.full(classes, 1 / temperature), np.zeros(classes)])
  found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
  return found[:classes], found[classes:]
