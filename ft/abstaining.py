"""Knowing what one does not know: answers that are held back when confidence is low.

Shapes: N rows, C classes; logits (N, C), labels (N,), -1 where no class is right. A row's
confidence is its largest softmax probability (Hendrycks and Gimpel 2017).
"""

import numpy as np

from ft import stats


def confidence(logits, temperature: float = 1.0) -> np.ndarray:
  """Returns (N,) the largest probability of each row."""
  return stats.softmax(np.asarray(logits, np.float64) / temperature).max(axis=1)


def energy(logits) -> np.ndarray:
  """Returns (N,) log Σ exp(logits), the negative energy (Liu et al. 2020): larger is more known."""
  logits = np.asarray(logits, np.float64)
  peak = logits.max(axis=1)
  return peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))


def threshold(logits, temperature: float, coverage: float) -> float:
  """Returns the confidence that a share `coverage` of the rows reaches."""
  return float(np.quantile(confidence(logits, temperature), 1 - coverage))


def measure(logits, labels) -> dict[str, float]:
  """Returns how well known rows are told from unknown ones.

  unknown_auroc and unknown_auroc_energy: chance that a known row has more confidence, or less
  energy, than an unknown one. accuracy_at_coverage: accuracy of the most confident rows, as many as
  are known; it is 1 where all of these are known and right.
  """
  labels, sure = np.asarray(labels), confidence(logits)
  known = labels >= 0
  order = np.argsort(-sure, kind="stable")[:known.sum()]
  right = np.argmax(logits, axis=1) == labels
  return {"unknown_auroc": stats.auroc(sure, known),
          "unknown_auroc_energy": stats.auroc(energy(logits), known),
          "accuracy_at_coverage": float(right[order].mean()) if len(order) else float("nan")}


def account(logits, labels, calibration) -> dict:
  """Returns what abstaining below a threshold does to a split.

  answered: share of known rows above it; accuracy_answered: of all rows above it, an unknown one
  being wrong; unknown_refused: share of unknown rows below it; and, where there are unknown rows,
  unknown_auroc and unknown_auroc_energy with their 95 % bootstrap intervals.

  Args:
    calibration: "temperature" and "threshold".
  """
  labels = np.asarray(labels)
  known, right = labels >= 0, np.argmax(logits, axis=1) == labels
  above = confidence(logits, calibration["temperature"]) >= calibration["threshold"]

  def share(of):
    return float(of.mean()) if len(of) else None

  found = {"answered": share(above[known]), "accuracy_answered": share(right[above]),
           "unknown_refused": share(~above[~known]), "n": len(labels)}
  if not known.all():
    for name, score in (("unknown_auroc", confidence(logits)),
                        ("unknown_auroc_energy", energy(logits))):
      found[name] = stats.auroc(score, known)
      found[f"{name}_interval"] = list(stats.bootstrap_metric(stats.auroc, (score, known)))
  return found
