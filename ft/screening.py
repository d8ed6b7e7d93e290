"""What a test that tells positive from negative rows is worth: the measures of diagnosis.

Shapes: N rows; `scores` (N,), larger is more positive; `positive` (N,) bool; `flagged` (N,) bool,
the rows that the test calls positive. A row is flagged if its score reaches a threshold. What is
not defined (no positives, nothing flagged) is NaN.
"""

import dataclasses

import numpy as np

from ft import errors, stats

CURVE = np.arange(1, 20) / 20  # threshold probabilities of the decision curve


@dataclasses.dataclass(frozen=True)
class Screening:
  """Which class is positive, and what the test is asked for.

  Attributes:
    positive: index of the positive class.
    specificity: share of negatives that must stay unflagged.
    prevalence: share of positives where the test will be used; 0: as among the rows.
  """

  positive: int
  specificity: float
  prevalence: float = 0.0

  def measure(self, probabilities, labels) -> dict[str, float]:
    """Returns "sensitivity_at_specificity" on the rows' own ROC curve; see `sensitivity_at`.

    Args:
      probabilities: (N, C). labels: (N,) class indices.
    """
    scores, positive = self._split(probabilities, labels)
    return {"sensitivity_at_specificity": sensitivity_at(scores, positive, self.specificity)}

  def threshold(self, probabilities, labels) -> float:
    """Returns the probability from which rows are flagged; see the function of that name."""
    return threshold(*self._split(probabilities, labels), self.specificity)

  def account(self, probabilities, labels, at: float, resamples: int = 1000) -> dict:
    """Returns what flagging from probability `at` on does to the rows of a split.

    n, positives (share); prevalence that is used; sensitivity, specificity, ppv, npv and auroc,
    each with "<name>_interval" (Wilson for shares of rows, else 95 % bootstrap over rows); and
    "curve", see `decision_curve`.

    Args:
      probabilities: (N, C), calibrated. labels: (N,) class indices.
    """
    scores, positive = self._split(probabilities, labels)
    flagged = scores >= at
    share = float(positive.mean()) if len(positive) else float("nan")
    found = {"n": len(positive), "positives": share, "prevalence": self.prevalence or share}
    for name, hits in (("sensitivity", flagged[positive]), ("specificity", ~flagged[~positive])):
      found[name] = _mean(hits)
      found[f"{name}_interval"] = list(stats.wilson(int(hits.sum()), len(hits)))
    for place, name in enumerate(("ppv", "npv")):
      value = lambda f, p, place=place: predictive_values(f, p, self.prevalence)[place]  # noqa: E731
      found[name] = value(flagged, positive)
      found[f"{name}_interval"] = list(
        stats.bootstrap_metric(value, (flagged, positive), resamples))
    found["auroc"] = stats.auroc(scores, positive)
    found["auroc_interval"] = list(
      stats.bootstrap_metric(stats.auroc, (scores, positive), resamples))
    return {**found, "curve": decision_curve(scores, positive, self.prevalence)}

  def _split(self, probabilities, labels):
    return np.asarray(probabilities)[:, self.positive], np.asarray(labels) == self.positive


def settle(labels, positive: str, specificity: float, prevalence: float) -> Screening | None:
  """Returns what the keys of a task ask for; None where they ask for nothing.

  Args:
    labels: class names by index.
    positive: name of the positive class; "": the second of two.
    specificity, prevalence: see `Screening`; 0: not asked for.

  Raises:
    UserError: the positive class is not known, or a key has no effect.
  """
  if not specificity:
    if positive or prevalence:
      raise errors.UserError("task.positive and task.prevalence are read with task.specificity; "
                             "set it, to 0.9 say, or leave them empty")
    return None
  if not positive and len(labels) != 2:
    raise errors.UserError(f"task.specificity: of {len(labels)} classes one is positive and the "
                           f"rest are negative; name it in task.positive: {', '.join(labels)}")
  if positive and positive not in labels:
    raise errors.UserError(f"task.positive={positive!r}: there is no such label"
                           f"{errors.suggest(positive, labels)}; train has {', '.join(labels)}")
  return Screening(labels.index(positive) if positive else 1, specificity, prevalence)


def threshold(scores, positive, specificity: float) -> float:
  """Returns the lowest score of a row at which at least this share of negatives stays below it.

  infinity: no row's score does.
  """
  scores = np.asarray(scores, np.float64)
  negatives = np.sort(scores[~np.asarray(positive, bool)])
  candidates = np.unique(scores)
  kept = np.searchsorted(negatives, candidates, side="left")  # negatives below each candidate
  # A share of whole rows: what rounding takes from specificity * rows must not cost a row.
  enough = candidates[kept >= specificity * len(negatives) - 1e-9]
  return float(enough[0]) if len(enough) else float("inf")


def sensitivity_at(scores, positive, specificity: float) -> float:
  """Returns the largest share of positives that a threshold of at least this specificity flags."""
  positive = np.asarray(positive, bool)
  if positive.all() or not positive.any():
    return float("nan")
  return _mean(np.asarray(scores, np.float64)[positive] >= threshold(scores, positive, specificity))


def predictive_values(flagged, positive, prevalence: float = 0.0) -> tuple[float, float]:
  """Returns (PPV, NPV): the share of positives among the flagged, of negatives among the rest.

  By Bayes' rule from sensitivity and specificity, which do not depend on the prevalence (Altman and
  Bland 1994, BMJ 309:102).

  Args:
    prevalence: share of positives that they are stated for; 0: that of the rows.
  """
  flagged, positive = np.asarray(flagged, bool), np.asarray(positive, bool)
  sensitivity, specificity = _mean(flagged[positive]), _mean(~flagged[~positive])
  p = prevalence or _mean(positive)
  hits, alarms = sensitivity * p, (1 - specificity) * (1 - p)
  misses, passes = (1 - sensitivity) * p, specificity * (1 - p)
  return _ratio(hits, hits + alarms), _ratio(passes, passes + misses)


def decision_curve(scores, positive, prevalence: float = 0.0, thresholds=CURVE) -> list[dict]:
  """Returns the net benefit of acting on probabilities (Vickers and Elkin 2006).

  At threshold probability t an alarm costs t / (1 - t) of what a hit is worth:
  net benefit = sensitivity * p - (1 - specificity) * (1 - p) * t / (1 - t); of acting on nobody 0.

  Args:
    scores: (N,) probabilities of the positive class.
    prevalence: p; 0: that of the rows. The probabilities are taken as they are.
    thresholds: those that are looked at, below 1.

  Returns:
    A list of {"threshold", "model", "all"}: net benefit a row of acting on rows from the threshold
    on, and of acting on all.
  """
  scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
  p, curve = prevalence or _mean(positive), []
  for t in map(float, thresholds):
    flagged, odds = scores >= t, t / (1 - t)
    model = _mean(flagged[positive]) * p - _mean(flagged[~positive]) * (1 - p) * odds
    curve.append({"threshold": t, "model": model, "all": p - (1 - p) * odds})
  return curve


def _mean(values) -> float:
  return float(np.mean(values)) if len(values) else float("nan")


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else float("nan")
