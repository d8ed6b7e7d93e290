"""Statistics of predictions: metrics, calibration and how sure a number is (numpy, float64).

Shapes: N examples, C classes. `labels` are class indices (N,), or multi-hot (N, C) for multi-label
problems. A quantity that the data does not define (no rows, one class only) is NaN, never an error.
"""

import statistics

import numpy as np

LEVEL = 0.95
# A resample over few distinct values is a multinomial draw of their counts: same distribution,
# no (resamples x N) table. 0/1 scores and their paired differences always take this way.
_FEW_VALUES = 32
_CHUNK = 4_000_000  # indices drawn at once, which bounds memory to about 64 MiB


def softmax(logits, axis=-1):
  """Returns softmax(logits) in float64, same shape."""
  logits = np.asarray(logits, np.float64)
  shifted = np.exp(logits - logits.max(axis=axis, keepdims=True))
  return shifted / shifted.sum(axis=axis, keepdims=True)


def sigmoid(logits):
  """Returns the logistic function of logits in float64, same shape."""
  return 0.5 * (1 + np.tanh(0.5 * np.asarray(logits, np.float64)))


# ---- Intervals -----------------------------------------------------------------------------------


def bootstrap(score, n=1000, seed=0, level=LEVEL, blocks=None):
  """Percentile bootstrap interval of the mean of per-example scores.

  Args:
    score: (N,) contribution of each example, e.g. 1.0 where the prediction is right.
    n: number of resamples.
    seed: of the resampling; the same seed gives the same interval.
    level: coverage, 0.95 by default.
    blocks: (N,) numbers; examples of one number depend on each other (windows that overlap, images
      of one patient) and are resampled together. None: each example is one of its own.

  Returns:
    (lo, hi) floats; (nan, nan) without examples.
  """
  score = np.asarray(score, np.float64).reshape(-1)
  rng = np.random.default_rng(seed)
  if blocks is not None and score.size:
    _, block = np.unique(blocks, return_inverse=True)
    sums, counts = np.bincount(block, score), np.bincount(block)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=n)
    return _percentiles(drawn @ sums / (drawn @ counts), level)
  return _percentiles(_resampled_means(score, n, rng), level)


def paired_bootstrap(a, b, n=1000, seed=0, level=LEVEL, blocks=None):
  """Mean difference a - b over the same examples, with its paired bootstrap interval.

  Args:
    a: (N,) scores of one model. b: (N,) scores of the other on the same rows, same order.
    n: number of resamples. seed: of the resampling. level: coverage. blocks: see `bootstrap`.

  Returns:
    (difference, lo, hi) floats in the unit of the scores.

  Raises:
    ValueError: the two score lists have different lengths.
  """
  a, b = np.asarray(a, np.float64).reshape(-1), np.asarray(b, np.float64).reshape(-1)
  if a.shape != b.shape:
    raise ValueError(f"paired scores must be over the same rows: {a.size} against {b.size}")
  difference = a - b
  lo, hi = bootstrap(difference, n, seed, level, blocks)
  return (float(difference.mean()) if a.size else float("nan")), lo, hi


def bootstrap_metric(fn, arrays, n=1000, seed=0, level=LEVEL, blocks=None):
  """Percentile bootstrap interval of a metric that is no mean of per-example scores (F1, AUROC).

  Args:
    fn: called as fn(*arrays), or fn(arrays) when arrays is a dict, with resampled rows; -> float.
    arrays: tuple, list or dict of arrays that share their first axis, N.
    n: number of resamples. seed: of the resampling. level: coverage. blocks: see `bootstrap`.

  Returns:
    (lo, hi) floats over the resamples in which the metric is defined; (nan, nan) if in none.
  """
  values = [fn_value for fn_value, in _resampled(fn, (arrays,), n, seed, blocks)]
  return _percentiles(np.asarray(values), level)


def paired_bootstrap_metric(fn, a, b, n=1000, seed=0, level=LEVEL, blocks=None):
  """As `bootstrap_metric`, of fn(a) - fn(b) where a and b hold the same rows in the same order.

  Returns:
    (difference, lo, hi) floats.
  """
  pairs = np.asarray(_resampled(fn, (a, b), n, seed, blocks)).reshape(-1, 2)
  lo, hi = _percentiles(pairs[:, 0] - pairs[:, 1], level)
  return float(_call(fn, a) - _call(fn, b)), lo, hi


def wilson(hits, n, level=LEVEL):
  """Wilson score interval of a share of `hits` among `n`; honest near 0 and 1 and for small n.

  Returns:
    (lo, hi) floats in [0, 1]; (nan, nan) when n is 0. Source: Wilson, JASA 22 (1927).
  """
  if n <= 0:
    return float("nan"), float("nan")
  z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
  share = hits / n
  centre = (share + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def _resampled_means(score, n, rng):
  """(n,) means of resamples of score (N,)."""
  size = score.size
  if size == 0 or not np.isfinite(score).all():
    return np.full(n, np.nan)
  values, counts = np.unique(score, return_counts=True)
  if values.size <= _FEW_VALUES:
    return rng.multinomial(size, counts / size, size=n) @ values / size
  rows = max(1, _CHUNK // size)
  chunks = [score[rng.integers(0, size, (min(rows, n - start), size))].mean(axis=1)
            for start in range(0, n, rows)]
  return np.concatenate(chunks)


def _resampled(fn, groups, n, seed, blocks=None):
  """[(fn(group resampled) for group in groups)] * n, all groups with the same rows."""
  first = groups[0]
  size = len(next(iter(first.values() if isinstance(first, dict) else first)))
  if size == 0:
    return [(float("nan"),) * len(groups)]
  rng = np.random.default_rng(seed)
  draw = lambda: rng.integers(0, size, size)  # noqa: E731
  if blocks is not None:
    _, block = np.unique(blocks, return_inverse=True)
    order = np.argsort(block, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(block[order])) + 1)
    draw = lambda: np.concatenate(  # noqa: E731
        [members[i] for i in rng.integers(0, len(members), len(members))])
  return [tuple(_call(fn, _take(group, rows)) for group in groups)
          for rows in (draw() for _ in range(n))]


def _take(group, rows):
  if isinstance(group, dict):
    return {key: np.asarray(value)[rows] for key, value in group.items()}
  return [np.asarray(value)[rows] for value in group]


def _call(fn, group):
  return float(fn(group) if isinstance(group, dict) else fn(*group))


def _percentiles(values, level):
  values = values[np.isfinite(values)]
  if values.size == 0:
    return float("nan"), float("nan")
  lo, hi = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
  return float(lo), float(hi)


# ---- Metrics -------------------------------------------------------------------------------------


def accuracy(predicted, labels):
  """Share of rows whose prediction equals the label (all C decisions, when multi-label)."""
  same = np.asarray(predicted) == np.asarray(labels)
  return float(same.reshape(len(same), -1).all(axis=1).mean()) if len(same) else float("nan")


def confusion(predicted, labels, classes=None):
  """(C, C) int64 counts: row = true class, column = predicted class."""
  predicted, labels = np.asarray(predicted, np.int64), np.asarray(labels, np.int64)
  classes = classes or 1 + int(max(predicted.max(initial=-1), labels.max(initial=-1)))
  return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def macro_f1(predicted, labels):
  """Mean F1 over classes; equals sklearn's f1_score(average="macro", zero_division=0).

  Args:
    predicted: (N,) class indices, or (N, C) 0/1 decisions when multi-label.
    labels: as predicted. Single-label classes that occur in neither are left out of the mean.
  """
  predicted, labels = np.asarray(predicted), np.asarray(labels)
  if len(labels) == 0:
    return float("nan")
  if labels.ndim == 2:
    hits = (predicted.astype(bool) & labels.astype(bool)).sum(axis=0)
    total = predicted.astype(bool).sum(axis=0) + labels.astype(bool).sum(axis=0)
    return float(np.where(total > 0, 2 * hits / np.maximum(total, 1), 0.0).mean())
  table = confusion(predicted, labels)
  hits, total = np.diag(table), table.sum(axis=0) + table.sum(axis=1)
  return float((2 * hits[total > 0] / total[total > 0]).mean())


def auroc(scores, labels):
  """Area under the ROC curve by the rank formula, ties counted as one half.

  Args:
    scores: (N,) score of the positive class, or (N, C) one score a class.
    labels: (N,) of 0/1 or class indices, or (N, C) multi-hot.

  Returns:
    The area; for C > 2 classes the plain mean of one-versus-rest areas over the classes that have
    both positives and negatives (NaN where none has). Two columns count as their second.
  """
  scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
  if scores.ndim == 2 and labels.ndim == 1:
    if scores.shape[1] == 2:
      return _binary_auroc(scores[:, 1], labels == 1)
    labels = labels[:, None] == np.arange(scores.shape[1])
  if scores.ndim == 2:
    areas = [_binary_auroc(scores[:, c], labels[:, c].astype(bool))
             for c in range(scores.shape[1])]
    areas = [area for area in areas if np.isfinite(area)]
    return float(np.mean(areas)) if areas else float("nan")
  return _binary_auroc(scores, labels.astype(bool))


def _binary_auroc(scores, positive):
  positives, negatives = int(positive.sum()), int((~positive).sum())
  if not positives or not negatives or not np.isfinite(scores).all():
    return float("nan")
  _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
  ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of each tie, from 1
  above = ranks[positive].sum() - positives * (positives + 1) / 2
  return float(above / (positives * negatives))


def log_loss(probs, labels):
  """Mean negative log-likelihood in nats of probs (N, C); mean over cells when multi-label."""
  probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
  if len(labels) == 0:
    return float("nan")
  tiny = np.finfo(np.float64).tiny
  if labels.ndim == 2:
    right = np.where(labels.astype(bool), probs, 1 - probs)
  else:
    right = probs[np.arange(len(labels)), labels]
  return float(-np.log(np.maximum(right, tiny)).mean())


def brier(probs, labels):
  """Mean squared error of probs (N, C) against one-hot labels, summed over C (0 best, 2 worst).

  For multi-label it is the mean over the N x C decisions (0 best, 1 worst).
  """
  probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
  if len(labels) == 0:
    return float("nan")
  if labels.ndim == 2:
    return float(((probs - labels) ** 2).mean())
  hot = labels[:, None] == np.arange(probs.shape[1])
  return float(((probs - hot) ** 2).sum(axis=1).mean())


# ---- Calibration ---------------------------------------------------------------------------------


def reliability(probs, labels, bins=15, equal_mass=False):
  """Confidence against accuracy by bin of confidence.

  Args:
    probs: (N, C) probabilities; the confidence of a row is its largest one. With multi-hot labels
      each of the N x C cells is a decision of its own with confidence probs and outcome labels.
    labels: (N,) or multi-hot (N, C).
    bins: number of bins over [0, 1].
    equal_mass: bins that hold the same number of rows, in place of bins of the same width.

  Returns:
    {"lo", "hi", "count", "confidence", "accuracy"}: arrays (bins,), NaN means in empty bins.
  """
  confidence, right = _decisions(probs, labels)
  if equal_mass and confidence.size:
    order = np.argsort(confidence, kind="stable")
    index = np.empty(confidence.size, np.int64)
    index[order] = np.arange(confidence.size) * bins // confidence.size
  else:
    # Bins are (lo, hi], as in Guo et al. 2017; a confidence of exactly 0 falls in the first.
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
  count = np.bincount(index, minlength=bins)
  with np.errstate(invalid="ignore"):
    means = [np.bincount(index, weights=x, minlength=bins) / count for x in (confidence, right)]
  lo, hi = np.arange(bins) / bins, (np.arange(bins) + 1) / bins
  if equal_mass and confidence.size:
    lo, hi = np.full(bins, np.nan), np.full(bins, np.nan)
    for b in np.flatnonzero(count):
      lo[b], hi[b] = confidence[index == b].min(), confidence[index == b].max()
  return {"lo": lo, "hi": hi, "count": count, "confidence": means[0], "accuracy": means[1]}


def ece(probs, labels, bins=15, equal_mass=False):
  """Expected calibration error: mean |confidence - accuracy| over bins, weighted by their rows.

  Source: Guo et al., On Calibration of Modern Neural Networks (2017). Arguments as `reliability`.
  """
  table = reliability(probs, labels, bins, equal_mass)
  full = table["count"] > 0
  if not full.any():
    return float("nan")
  gap = np.abs(table["confidence"] - table["accuracy"])[full]
  return float((gap * table["count"][full]).sum() / table["count"].sum())


def fit_temperature(logits, labels, lo=0.05, hi=20.0):
  """The temperature T in [lo, hi] whose softmax(logits / T) has the least log-loss.

  Golden section over log T; the loss is convex in 1/T, so it has one valley. Multi-hot labels take
  a sigmoid. Accuracy is unchanged by T. Fit on validation rows, never on test.

  Targets are smoothed by 1 / (N + 1), as in Platt (1999): rows that are all right do not prove
  certainty, and without it one wrong row of test would cost dearly.

  Args:
    logits: (N, C). labels: (N,) or multi-hot (N, C).

  Returns:
    T as float; 1.0 without rows.
  """
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
  if len(labels) == 0:
    return 1.0
  left, right, golden = np.log(lo), np.log(hi), (np.sqrt(5) - 1) / 2
  points = [right - golden * (right - left), left + golden * (right - left)]
  losses = [_nll(logits, labels, np.exp(x)) for x in points]
  while right - left > 1e-5:
    if losses[0] <= losses[1]:
      right, points[1], losses[1] = points[1], points[0], losses[0]
      points[0] = right - golden * (right - left)
      losses[0] = _nll(logits, labels, np.exp(points[0]))
    else:
      left, points[0], losses[0] = points[0], points[1], losses[1]
      points[1] = left + golden * (right - left)
      losses[1] = _nll(logits, labels, np.exp(points[1]))
  return float(np.exp((left + right) / 2))


def _nll(logits, labels, temperature):
  """Mean smoothed negative log-likelihood at a temperature, from logits: nothing underflows."""
  scaled, smooth = logits / temperature, 1 / (len(labels) + 1)
  if labels.ndim == 2:
    targets = labels * (1 - smooth) + smooth / 2
    return float((np.logaddexp(0, scaled) - targets * scaled).mean())
  peak = scaled.max(axis=1)
  total = np.log(np.exp(scaled - peak[:, None]).sum(axis=1)) + peak
  target = (1 - smooth) * scaled[np.arange(len(labels)), labels] + smooth * scaled.mean(axis=1)
  return float((total - target).mean())


def _decisions(probs, labels):
  """(confidence, right) of every decision, both (N,) or (N * C,) float64."""
  probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
  if labels.ndim == 2:
    return probs.reshape(-1), labels.reshape(-1).astype(np.float64)
  if len(labels) == 0:
    return np.zeros(0), np.zeros(0)
  return probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(np.float64)
