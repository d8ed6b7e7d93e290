"""Learning curves: what a probe on fixed features gains from more rows, and what more would give.

The probe is solved on growing stratified subsets of the training rows, and a power law that ends
at a floor, error(n) = a n^-b + c, is fitted to its errors on rows it never saw (Hestness et al.
2017, arXiv:1712.00409). Without the floor c, the fit promises too much; beyond `FURTHEST` times the
rows there are, nothing is predicted.

Shapes: N training rows, D features, C classes, S subset sizes, K draws, M judged rows, R resamples.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from ft import probes, stats

FURTHEST = 4  # times the rows there are
WIDEST = 512  # features; of more, their first principal components
FEWEST_SIZES, FEWEST_DRAWS = 4, 3
SMALLEST = 16  # rows; a probe of fewer says nothing
RIDGE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # penalties, of features whose mean squared norm is 1
SHRINK = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)  # added to variances, times their mean
_BOUNDS = ((0.0, 0.01, 0.0), (np.inf, 3.0, np.inf))  # of a at the largest n, b, c


@dataclasses.dataclass(frozen=True)
class Part:
  """Rows of one split: features (N, D) float32; target (N,) int classes, (N,) float or (N, C)."""

  features: np.ndarray
  target: np.ndarray

  def rows(self, index) -> "Part":
    return Part(self.features[index], self.target[index])


@dataclasses.dataclass(frozen=True)
class Curve:
  """Errors of the probe: n (S,) ascending, wrong (S, K, M), each judged row's error."""

  n: np.ndarray
  wrong: np.ndarray

  @property
  def errors(self) -> np.ndarray:
    """(S, K) mean errors."""
    return self.wrong.mean(axis=2)


@dataclasses.dataclass(frozen=True)
class Fit:
  """error(n) = a n^-b + c; called with n it gives the error."""

  a: float
  b: float
  c: float

  def __call__(self, n):
    return self.a * np.asarray(n, np.float64)**-self.b + self.c


def sizes(total: int, smallest: int, most: int) -> list[int]:
  """At most `most` subset sizes, ascending, each half the next, none below `smallest`."""
  found = [total]
  while len(found) < most and found[-1] // 2 >= smallest:
    found.append(found[-1] // 2)
  return found[::-1]


def order(strata, rng) -> np.ndarray:
  """(N,) a random order of rows whose every beginning holds the strata in their proportion.

  The first rows are one of each stratum, so a beginning as long as their number holds all.

  Args:
    strata: (N,) numbers. rng: numpy generator.
  """
  _, stratum, counts = np.unique(strata, return_inverse=True, return_counts=True)
  shuffled = rng.permutation(len(stratum))
  by_stratum = shuffled[np.argsort(stratum[shuffled], kind="stable")]
  rank = np.arange(len(stratum)) - np.repeat(np.cumsum(counts) - counts, counts)
  share = rank / np.repeat(counts, counts)  # 0 of the first of each
  return by_stratum[np.lexsort((rng.random(len(share)), share))]


def measure(train: Part, validation: Part, judged: Part, ns, draws: int, solve: Callable,
            seed: int = 0, show: Callable = lambda n, draw, error: None) -> Curve:
  """Solves the probe on nested stratified subsets and judges each.

  Args:
    train, validation, judged: rows to learn from, to choose the penalty on, and to judge on.
    ns: sizes, ascending; one of all rows is solved once, as there is one such subset.
    draws: K, orders of the rows.
    solve: (train, validation) -> (features -> scores), such as `ridge`.
    seed: of the draws.
    show: called with (size, number of the draw, mean error) as they come.
  """
  strata = train.target if train.target.dtype.kind in "iu" else np.zeros(len(train.target))
  wrong = np.empty((len(ns), draws, len(judged.target)), np.float32)
  for k in range(draws):
    rows = order(strata, np.random.default_rng((seed, k)))
    for s, n in enumerate(ns):
      if n == len(rows) and k:
        wrong[s, k] = wrong[s, 0]
        continue
      wrong[s, k] = errors(solve(train.rows(rows[:n]), validation)(judged.features), judged.target)
      show(n, k, float(wrong[s, k].mean()))
  return Curve(np.asarray(ns), wrong)


def errors(scores, target) -> np.ndarray:
  """(N,) errors of scores: wrong classes (0 or 1), shares of wrong labels, or absolute errors.

  Args:
    scores: (N, C), or (N, 1) of a number.
    target: (N,) int classes, (N, C) multi-hot, whose scores are positive for yes, or (N,) floats.
  """
  if target.ndim == 2:
    return ((scores > 0) != (target > 0.5)).mean(axis=1)
  if target.dtype.kind in "iu":
    return (scores.argmax(axis=1) != target).astype(np.float32)
  return np.abs(scores[:, 0] - target)


def probe(name: str, target) -> tuple[str, Callable]:
  """(its name in words, solve) of a kind of probe for a kind of target.

  Args:
    name: "closed", solved in closed form, or "logistic".
    target: of `Part`.

  Raises:
    ValueError: logistic regression of numbers.
  """
  numbers = target.ndim == 1 and target.dtype.kind == "f"
  if name == "logistic":
    if numbers:
      raise ValueError("logistic regression is for classes, and the target is a number")
    return "logistic regression", logistic
  if numbers or target.ndim == 2:
    return "ridge regression", ridge
  return "linear discriminant", discriminant


def ridge(train: Part, validation: Part) -> Callable:
  """Least squares on the target, its penalty the best on validation.

  Returns:
    features (N, D) -> scores (N, C), or (N, 1) of a number.
  """
  centre, size = _scale(train.features)
  x, y = (train.features - centre) / size, _columns(train.target)
  mean = y.mean(axis=0)
  values, vectors = np.linalg.eigh(x.T @ x / len(x))
  inner = vectors.T @ (x.T @ (y - mean) / len(x))

  def probes():
    for penalty in RIDGE:
      kernel = vectors @ (inner / (np.maximum(values, 0) + penalty)[:, None]) / size
      yield _linear(kernel, mean - centre @ kernel)

  return _best(probes(), validation)


def discriminant(train: Part, validation: Part) -> Callable:
  """Fisher's linear discriminant with a shrunken covariance, its shrinkage best on validation.

  Of many classes it errs far less than least squares, at the same price (Hastie et al., The
  Elements of Statistical Learning, 4.3).

  Returns:
    features (N, D) -> scores (N, C).
  """
  centre, size = _scale(train.features)
  x, y = (train.features - centre) / size, train.target
  counts = np.bincount(y).astype(np.float32)
  means = _columns(y).T @ x / counts[:, None]
  inside = x - means[y]
  values, vectors = np.linalg.eigh(inside.T @ inside / len(x))
  turned, prior = vectors.T @ means.T, np.log(counts / len(x))

  def probes():
    for share in SHRINK:
      variance = np.maximum(values, 0) + max(share * float(values.mean()), 1e-9)
      kernel = vectors @ (turned / variance[:, None])
      bias = prior - 0.5 * (means.T * kernel).sum(axis=0)
      yield _linear(kernel / size, bias - centre @ kernel / size)

  return _best(probes(), validation)


def logistic(train: Part, validation: Part) -> Callable:
  """The card's probe: logistic regression, its strength best on validation; of classes only."""
  classes = train.target.shape[1] if train.target.ndim == 2 else 1 + int(train.target.max())
  return _best(probes.probes(train.features, train.target, classes), validation)


def fit(n, error) -> Fit:
  """The least-squares fit of a n^-b + c with a, c >= 0.

  Args:
    n: (S,) sizes. error: (S,) mean errors, or (S, K).

  Raises:
    ValueError: fewer than `FEWEST_SIZES` sizes; three parameters need them.
  """
  n, error = np.asarray(n, np.float64), np.asarray(error, np.float64).reshape(len(n), -1)
  if len(n) < FEWEST_SIZES:
    raise ValueError(f"{len(n)} sizes cannot carry three parameters; {FEWEST_SIZES} can")
  return _fit(n, error.mean(axis=1), None)


def resampled(curve: Curve, resamples: int = 200, seed: int = 0) -> tuple[np.ndarray, list[Fit]]:
  """Errors (R, S) and fits of bootstrap resamples, of whole draws and of judged rows together.

  Both are resampled: few draws alone would make the judged rows look like all there are.
  """
  rng, (_, draws, judged) = np.random.default_rng(seed), curve.wrong.shape
  n, start = np.asarray(curve.n, np.float64), fit(curve.n, curve.errors)
  found = []
  for _ in range(resamples):
    weight = rng.multinomial(judged, np.full(judged, 1 / judged)) / judged
    picked = rng.integers(0, draws, draws)
    found.append((curve.wrong @ weight.astype(np.float32))[:, picked].mean(axis=1))
  return np.array(found), [_fit(n, np.float64(row), start) for row in found]


def interval(values, level: float = stats.LEVEL) -> list[float]:
  """[lo, hi] of (R,) resampled values."""
  return [float(v) for v in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def narrowed(parts: list[Part]) -> list[Part]:
  """The parts with at most `WIDEST` features: principal components of the first part's rows."""
  x = parts[0].features
  if x.shape[1] <= WIDEST:
    return parts
  centre = x.mean(axis=0)
  _, vectors = np.linalg.eigh((x - centre).T @ (x - centre))
  return [Part((part.features - centre) @ vectors[:, -WIDEST:], part.target) for part in parts]


def _fit(n, error, start: Fit | None) -> Fit:
  """Fits from one start, or from several exponents; n is scaled for a well-conditioned problem."""
  from scipy import optimize

  top, low, high = n[-1], *map(np.array, _BOUNDS)
  scale, spread = n / top, max(float(error[0] - error[-1]), 1e-6)
  high[2] = max(float(error.min()), 1e-9)  # the floor is not above what was reached

  def residuals(p):
    return p[0] * scale**-p[1] + p[2] - error

  def slopes(p):
    power = scale**-p[1]
    return np.stack([power, -p[0] * power * np.log(scale), np.ones_like(power)], axis=1)

  if start is None:
    exponents = (0.1, 0.3, 0.6, 1.0, 2.0)
    starts = [(spread / (scale[0]**-b - 1), b, 0.5 * high[2]) for b in exponents]
  else:
    starts = [(start.a * top**-start.b, start.b, start.c)]
  found = [optimize.least_squares(residuals, np.clip(p, low + 1e-9, high - 1e-10), slopes,
                                  bounds=(low, high)) for p in starts]
  a, b, c = min(found, key=lambda result: result.cost).x
  return Fit(float(a * top**b), float(b), float(c))


def _columns(target) -> np.ndarray:
  """(N, C) float32 least-squares targets, such that a score above 0 means a label is there."""
  if target.ndim == 2:
    return target.astype(np.float32) - np.float32(0.5)
  if target.dtype.kind in "iu":
    return (target[:, None] == np.arange(1 + target.max())).astype(np.float32)
  return target[:, None].astype(np.float32)


def _scale(features) -> tuple:
  """(mean (D,), root mean squared distance to it), so that penalties mean the same anywhere."""
  centre = features.mean(axis=0)
  return centre, np.sqrt(np.square(features - centre).sum(axis=1).mean()) or np.float32(1)


def _linear(kernel, bias) -> Callable:
  return lambda features: features @ kernel + bias


def _best(probes, validation: Part) -> Callable:
  """The first of the probes that err least on validation."""
  return min(probes, key=lambda one: errors(one(validation.features), validation.target).mean())
