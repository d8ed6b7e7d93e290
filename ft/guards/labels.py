"""Labels: which of them are likely wrong, and about how many are?

Confident learning: a row whose label another class contradicts with more confidence than that class
usually has. Confidences are out of fold: of a logistic regression on the features of the model
before tuning, with a temperature, that never saw the row. Rows of validation, test and further
splits are judged by the one of all training rows.
Source: Northcutt, Jiang and Chuang, Confident Learning, JAIR 70 (2021).
"""

import numpy as np

from ft import duplicates, guards, stats

KEYS = {
    "on": (True, "look for labels that are likely wrong"),
    "rows": (20000, "most training rows that are judged; a sample where there are more",
             (100, None)),
    "listed": (50, "likely wrong labels listed of each split, the surest first", (0, 1000)),
    "warning": (0.05, "share of wrong training labels, surely above which is a warning",
                (0.0, 1.0)),
    "alarm": (0.15, "share of wrong training labels, surely above which is an alarm", (0.0, 1.0)),
}

FOLDS = 5
FEWEST = 30  # Below this many rows a share of wrong labels is mostly noise.
PENALTY, STEPS = 0.3, 20  # of the probe, whose features have a mean square length of 1
_PICTURES = 15  # of rows of a split that are shown
_APART = 0.02  # how much less it may be right on test before test counts as unlike train
_SKILL = 0.5  # share of the majority class's errors that the probe has to avoid to judge labels
_SURE = 0.8  # share of rows that it is right on, below which the words warn of hard rows


def measure(config, evidence):
  """The guard.

  Returns numbers:
    n, of: training rows judged, of all. folds. seed of the folds. classes.
    rare: {label: rows} of classes with fewer rows than folds, which are left out. probe: how the
      confidences were made. accuracy, accuracy_interval: of the probe on rows it did not see;
      majority: of the most frequent label.
    temperature, penalty of the probe.
    splits: [{"split", "n", "flagged", "rate", "rate_interval", "confident", "accuracy"}]: rate is
      the share of wrong labels estimated from the `confident` rows, flagged the rows that look
      wrong, accuracy the probe's.
    pairs: [{"split", "given", "suggested", "rows"}], the most frequent of train first.
    issues: [{"split", "row", "place", "given", "suggested", "confidence", "given_confidence",
      "text", "picture": of the first ones, a data URI}], the surest first; row counts from 0
      within the split.
  """
  missing = _missing(evidence)
  if missing:
    return guards.not_measured(missing)
  parts = {name: _known(part) for name, part in evidence.features.items()}
  train, kept, rare = _judged(parts["train"], config.rows)
  if len(kept) < 2:
    return guards.not_measured(
        f"no two classes have {FOLDS} training rows, one for each of {FOLDS} folds")
  if len(train["label"]) < FEWEST:
    return guards.not_measured(f"train has {len(train['label'])} rows, fewer than {FEWEST}")
  names = [_name(evidence.labels, label) for label in kept]
  probe = Probe(train["features"], np.searchsorted(kept, train["label"]), len(kept),
              _folds(train, evidence.rows.get("train")))
  accuracy = float(probe.right.mean())
  numbers = {
      "n": len(train["label"]), "of": len(parts["train"]["label"]), "folds": FOLDS, "seed": 0,
      "classes": len(kept), "rare": {_name(evidence.labels, k): n for k, n in rare.items()},
      "probe": f"logistic regression, {STEPS} accelerated steps, with a temperature",
      "accuracy": accuracy, "majority": float(np.unique(
          train["label"], return_counts=True)[1].max() / len(train["label"])),
      "accuracy_interval": stats.wilson(int(probe.right.sum()), len(probe.right)),
      "temperature": probe.temperature, "penalty": PENALTY,
      "splits": [], "pairs": [], "issues": []}
  parts["train"] = train
  for split, part in parts.items():
    place = np.isin(part["label"], kept)
    part = {key: value[place] for key, value in part.items()}
    if len(part["label"]) < FEWEST:
      continue
    given = np.searchsorted(kept, part["label"])
    probs = probe.probs if split == "train" else probe(part["features"])
    _account(numbers, split, part["index"], given, probs, probe.thresholds, names,
             evidence.rows.get(split), config.listed)
  numbers["pairs"].sort(key=lambda row: (row["split"] != "train", -row["rows"]))
  numbers["pairs"] = numbers["pairs"][:200]
  if accuracy - numbers["majority"] < _SKILL * (1 - numbers["majority"]):
    return guards.result("not measured", _weak_words(numbers), numbers)
  return guards.result(_verdict(config, numbers), _words(numbers), numbers)


class Probe:
  """Logistic regression of features, its confidences out of fold, and confident learning's limits.

  Twenty accelerated steps with one fixed curvature, the bound of Böhning, so that the costly part
  is solved once; a temperature is fitted to what each fold's regression says of the fold.
  Source: Böhning, Multinomial Logistic Regression Algorithm (1992).

  Args:
    features: (N, D). label: (N,) of 0 … classes - 1. classes: C. fold: (N,) number of each row's.

  Attributes:
    probs: (N, C) of rows by the regression on the other folds. right: (N,) bool, its answers.
    thresholds: (C,) mean confidence of the rows of a class in it.
    temperature: fitted out of fold.
  """

  def __init__(self, features, label, classes, fold):
    features = np.asarray(features, np.float32)
    self._centre = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    self._size = np.sqrt(np.square(features - self._centre).sum(axis=1).mean()) or np.float32(1)
    x, hot = self._design(features), np.eye(classes, dtype=np.float32)[label]
    gram, scores = x.T @ x, np.empty((len(x), classes), np.float32)
    for k in np.unique(fold):
      out = fold == k
      kernel = _regression(x[~out], hot[~out], gram - x[out].T @ x[out])
      scores[out] = x[out] @ kernel
    self._kernel = _regression(x, hot, gram)
    self.temperature = stats.fit_temperature(scores, label)
    self.probs = stats.softmax(scores / self.temperature)
    self.right = scores.argmax(axis=1) == label
    self.thresholds = np.array([self.probs[label == c, c].mean() for c in range(classes)])

  def __call__(self, features):
    """Returns (n, C) probabilities of rows (n, D) that were not learnt from."""
    scores = self._design(np.asarray(features, np.float32)) @ self._kernel
    return stats.softmax(scores / self.temperature)

  def _design(self, features):
    centred = (features - self._centre) / self._size
    return np.concatenate([centred, np.full((len(features), 1), 1, np.float32)], axis=1)


def _regression(x, hot, gram):
  """(D, C) kernel of a penalised logistic regression on x (N, D) and one-hot labels (N, C)."""
  from scipy import linalg

  factor = linalg.cho_factor(0.5 * gram.astype(np.float64) + PENALTY * np.eye(len(gram)))
  kernel = ahead = np.zeros((x.shape[1], hot.shape[1]), np.float32)
  speed = 1.0
  for _ in range(STEPS):
    scores = x @ ahead
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    slope = x.T @ (hot - chances) - np.float32(PENALTY) * ahead
    before, kernel = kernel, ahead + linalg.cho_solve(factor, slope).astype(np.float32)
    faster = (1 + np.sqrt(1 + 4 * speed**2)) / 2
    ahead = kernel + np.float32((speed - 1) / faster) * (kernel - before)
    speed = faster
  return kernel


def suspects(probs, thresholds):
  """What confident learning makes of rows.

  Args:
    probs: (N, C) out of fold. thresholds: (C,) mean confidence of the rows of a class in it.

  Returns:
    (N,) the likeliest of the classes whose threshold the row reaches, -1 where it reaches none; a
    label is likely wrong where it is another one.
  """
  reached = np.where(probs >= thresholds, probs, -1.0)
  best = reached.argmax(axis=1)
  return np.where(reached[np.arange(len(probs)), best] >= 0, best, -1)


def _account(numbers, split, index, given, probs, thresholds, names, rows, listed):
  """Adds what was found in a split to the numbers."""
  suggested = suspects(probs, thresholds)
  wrong = np.flatnonzero((suggested >= 0) & (suggested != given))
  confident = int((suggested >= 0).sum())
  numbers["splits"].append({
      "split": split, "n": len(given), "flagged": len(wrong), "confident": confident,
      "accuracy": float((probs.argmax(axis=1) == given).mean()),
      "rate": len(wrong) / confident if confident else float("nan"),
      "rate_interval": list(stats.wilson(len(wrong), confident))})
  cells, counts = np.unique(np.stack([given[wrong], suggested[wrong]], 1), axis=0,
                            return_counts=True)
  numbers["pairs"] += [{"split": split, "given": names[i], "suggested": names[j], "rows": int(n)}
                       for (i, j), n in zip(cells, counts, strict=True)]
  margin = probs[wrong, suggested[wrong]] - probs[wrong, given[wrong]]
  for count, at in enumerate(wrong[np.argsort(-margin, kind="stable")][:listed]):
    row = int(index[at])
    shown = rows is not None and count < _PICTURES
    numbers["issues"].append({
        "split": split, "row": row, "place": rows.where(row) if rows is not None else "",
        "given": names[given[at]], "suggested": names[suggested[at]],
        "confidence": float(probs[at, suggested[at]]),
        "given_confidence": float(probs[at, given[at]]),
        "text": duplicates.excerpt(rows[row]) if rows is not None else "",
        "picture": duplicates.thumbnail(rows[row]) if shown else ""})


def _missing(evidence):
  """Why nothing can be measured; "" where it can."""
  train = evidence.features.get("train")
  if train is None:
    return ("no features of the model before tuning were recorded (the task has none, or "
            "train.baselines is False)")
  if np.ndim(train.get("features")) != 2 or "label" not in train:
    return "the features are not one vector and one label a row"
  label = np.asarray(train["label"])
  if label.ndim != 1:
    return "rows have several labels each, and confident learning is of one"
  if not np.issubdtype(label.dtype, np.integer):
    return "labels are measured values, not classes"
  if not np.isfinite(train["features"]).all():
    return "the features of train are not finite"
  return ""


def _known(part):
  """The features, labels and places of the rows whose class is known."""
  label = np.asarray(part["label"])
  keys = {"features": part["features"], "label": label,
          "index": part.get("index", np.arange(len(label)))}
  return {key: np.asarray(value)[label >= 0] for key, value in keys.items()}


def _judged(train, most):
  """(rows judged, sorted classes (C,), {class left out: rows}) of the training rows."""
  if len(train["label"]) > most:
    chosen = np.sort(np.random.default_rng(0).choice(len(train["label"]), most, replace=False))
    train = {key: value[chosen] for key, value in train.items()}
  classes, counts = np.unique(train["label"], return_counts=True)
  kept = classes[counts >= FOLDS]
  rare = {int(c): int(n) for c, n in zip(classes, counts, strict=True) if n < FOLDS}
  inside = np.isin(train["label"], kept)
  return {key: value[inside] for key, value in train.items()}, kept, rare


def _folds(train, rows):
  """(N,) fold of each row: classes dealt evenly; rows of one group, where there are, together."""
  rng = np.random.default_rng(0)
  if rows is not None and "group" in getattr(rows, "roles", ()):
    _, group = np.unique([str(rows[int(i)]["group"]) for i in train["index"]],
                         return_inverse=True)
    if group.max() >= FOLDS:
      return (rng.permutation(group.max() + 1) % FOLDS)[group]
  order = np.lexsort([rng.random(len(train["label"])), train["label"]])
  fold = np.empty(len(order), int)
  fold[order] = np.arange(len(order)) % FOLDS
  return fold


def _name(labels, index):
  return labels[index] if 0 <= index < len(labels) else str(index)


def _verdict(config, numbers):
  train = next((row for row in numbers["splits"] if row["split"] == "train"), None)
  surely = train["rate_interval"][0] if train and train["confident"] else 0.0
  return "alarm" if surely > config.alarm else "warning" if surely > config.warning else "ok"


def _words(numbers):
  of = {row["split"]: row for row in numbers["splits"]}
  text = (f"About {_percent(of['train'])} of train labels look wrong ({of['train']['flagged']:,} "
          f"of {of['train']['n']:,} rows), by a probe that is right on "
          f"{100 * numbers['accuracy']:.1f} % of rows it did not see")
  if numbers["accuracy"] < _SURE:
    text += ", so that rows that are merely hard count too"
  if numbers["n"] < numbers["of"]:
    text += f"; {numbers['n']:,} of {numbers['of']:,} training rows judged"
  test = of.get("test")
  if test:
    text += f"; about {_percent(test)} of test labels ({test['flagged']:,} of {test['n']:,} rows)"
    if test["accuracy"] < numbers["accuracy_interval"][0] - _APART:
      text += (f", on which the probe is right on {100 * test['accuracy']:.1f} %, so that rows "
               "unlike those of train count too")
  return text + "."


def _weak_words(numbers):
  flagged = sum(row["flagged"] for row in numbers["splits"])
  return (f"Not measured: the features tell the classes apart too badly to say which labels are "
          f"wrong (a probe is right on {100 * numbers['accuracy']:.1f} % of rows it did not see, "
          f"the most frequent label on {100 * numbers['majority']:.1f} %); {flagged:,} rows "
          "that it doubts are listed.")


def _percent(row):
  lo, hi = row["rate_interval"]
  return f"{100 * row['rate']:.1f} % [{100 * lo:.1f}, {100 * hi:.1f}]"
