"""Frozen probes: logistic regressions on features, as many as there are strengths of their penalty.

Shapes: N rows, D features, C classes.
"""

import numpy as np

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # of the probe: inverse regularisation


def probes(features, label, classes: int, strengths=STRENGTHS):
  """Yields logistic regressions from strong to weak regularisation, each started at the last.

  Features are centred and divided by one number, so that the strengths mean the same for every
  model and the penalty keeps its shape.

  Args:
    features: (N, D). label: (N,) or multi-hot (N, C). classes: C. strengths: in this order.
  """
  features, label = np.asarray(features, np.float32), np.asarray(label)
  centre = features.mean(axis=0, dtype=np.float64).astype(np.float32)
  size = np.sqrt(np.square(features - centre).sum(axis=1).mean()) or np.float32(1)
  scaled = (features - centre) / size
  targets = [label] if label.ndim == 1 else [label[:, i] for i in range(classes)]
  models = [_regression(target) for target in targets]
  for strength in strengths:
    parts = [_fit(model, scaled, target, strength)
             for model, target in zip(models, targets, strict=True)]
    kernel = np.concatenate([kernel for kernel, _ in parts], axis=1)
    bias = np.concatenate([bias for _, bias in parts])
    if label.ndim == 1 and kernel.shape[1] == 1:
      kernel, bias = np.concatenate([0 * kernel, kernel], axis=1), np.concatenate([0 * bias, bias])
    if label.ndim == 1 and kernel.shape[1] < classes:
      kernel, bias = _spread(kernel, bias, np.unique(label), classes)
    yield Linear(centre, size, kernel, bias)


def _spread(kernel, bias, seen, classes: int) -> tuple:
  """Returns (kernel (D, C), bias (C,)) of those of the classes seen; the rest are very unlikely."""
  wide = np.zeros((len(kernel), classes), kernel.dtype), np.full(classes, bias.min() - 10.0)
  wide[0][:, seen], wide[1][seen] = kernel, bias
  return wide


class Linear:
  """features (N, D) -> logits (N, C) float32: kernel (D, C), bias (C,)."""

  def __init__(self, centre, size, kernel, bias):
    self.kernel, self.bias = kernel / size, bias - centre @ kernel / size

  def __call__(self, features):
    return (np.asarray(features, np.float32) @ self.kernel + self.bias).astype(np.float32)


def _regression(target):
  """Returns an estimator; None where the target is constant and there is nothing to fit."""
  from sklearn import linear_model

  classes = len(np.unique(target))
  if classes < 2:
    return None
  solver = "newton-cholesky" if classes == 2 else "lbfgs"
  return linear_model.LogisticRegression(solver=solver, max_iter=300, tol=1e-5, warm_start=True)


def _fit(model, features, target, strength: float) -> tuple:
  """Returns (kernel (D, C or 1), bias (C or 1,)) for a target with C classes or 2."""
  if model is None:
    return np.zeros((features.shape[1], 1)), np.where(target[:1] > 0, 10.0, -10.0)
  import warnings

  import threadpoolctl
  from sklearn import exceptions

  # One thread: on a busy machine threads that wait for each other are ten times slower than one.
  with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
    # The last thousandth of the loss does not move the baseline, and would take most of the time.
    warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
    # Few rows of many classes are meant.
    warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
    model.set_params(C=strength).fit(features, target)
  return model.coef_.T, model.intercept_
