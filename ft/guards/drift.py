"""Drift: are the rows the model is tested on like those it learnt from?

Class shares (KL divergence, total variation and the largest change), the distance of the features
(maximum mean discrepancy against permutations) and a classifier that tells train rows from rows of
another split (C2ST). Without features, texts are described by lengths and hashed words, series by
their level and spread.
Sources: Gretton et al., A Kernel Two-Sample Test, JMLR 13 (2012); Lopez-Paz and Oquab, Revisiting
Classifier Two-Sample Tests (2017); Rabanser et al., Failing Loudly (2019).
"""

import collections

import numpy as np

from ft import duplicates, guards, stats

KEYS = {
    "on": (True, "compare the rows of train with those of test"),
    "rows": (1000, "most rows of each split whose features are compared", (50, None)),
    "permutations": (200, "permutations behind the threshold of the features' distance",
                     (20, None)),
    "share": (0.05, "change of a class's share, surely above which is a warning", (0.0, 1.0)),
    "share_alarm": (0.15, "change of a class's share, surely above which is an alarm", (0.0, 1.0)),
    "auroc": (0.6, "AUROC of telling train from test, surely above which is a warning", (0.5, 1.0)),
    "auroc_alarm": (0.8, "AUROC of telling train from test, surely above which is an alarm",
                    (0.5, 1.0)),
    "level": (1.0, "change of a series' level, in standard deviations of train, surely above which "
              "is a warning", (0.0, None)),
}

FEWEST = 30  # Below this many rows of a split nothing can be told.
FOLDS = 5
_DRAWS = 1000  # of class shares, under no drift
_WORDS = 256  # hashed words that describe a text
_WIDE = 256  # features a row, at most, that the two-sample classifier is given


def measure(config, evidence):
  """The guard; train is compared with every other split.

  Returns numbers:
    priors: [{"split", "n", "kl", "kl_null": what it stays below without drift (95 %),
      "total_variation", "label", "train", "share", "change", "change_interval": of the class whose
      share changes most, "classes": [{"label", "train", "share"}]}].
    features: [{"split", "n": rows of each of the two, "of": "features" or "words", "mmd",
      "mmd_null": its 95 % quantile under permutation, "p", "auroc", "auroc_interval",
      "auroc_matched": of train rows drawn with the class shares of the split, "n_matched"}].
    levels: [{"split", "series", "n": steps, "level", "level_interval", "spread"}] of the channel
      of a series that moved most: mean and standard deviation where train has 0 and 1.
    missing: [{"part", "reason"}].
  """
  numbers = {"priors": [], "features": [], "levels": [], "missing": []}
  for part, look in (("class shares", _priors), ("features", _features), ("levels", _levels)):
    try:
      rows = look(config, evidence)
    except guards.Missing as reason:
      numbers["missing"].append({"part": part, "reason": str(reason)})
      continue
    numbers[{"class shares": "priors"}.get(part, part)] = rows
  if not any(numbers[key] for key in ("priors", "features", "levels")):
    reasons = "; ".join(row["reason"] for row in numbers["missing"])
    return guards.not_measured(reasons or "there is no split to compare train with")
  verdict, words = _judge(config, numbers)
  return guards.result(verdict, words, numbers)


# ---- Class shares --------------------------------------------------------------------------------


def _priors(config, evidence):
  known = _classes(evidence)
  train = known.pop("train", None)
  if train is None or not known:
    raise guards.Missing("rows have no single class")
  if len(set(train)) < 2:
    raise guards.Missing("train has rows of one class only")
  found = []
  for split, labels in known.items():
    if len(labels) < FEWEST:
      continue
    found.append({"split": split, **shares(train, labels)})
  if not found:
    raise guards.Missing(f"no split has {FEWEST} rows with a class")
  return found


def shares(train, other) -> dict:
  """How the shares of classes (lists of labels) differ; see `measure`.

  The KL divergence is of `other` from `train`, in nats, with half a row added to every count.
  """
  names = sorted(set(train) | set(other))
  counts = np.array([[collections.Counter(part)[name] for name in names]
                     for part in map(list, (train, other))], float)
  sizes = counts.sum(axis=1)
  p, q = counts / sizes[:, None]
  pooled = counts.sum(axis=0) / counts.sum()
  rng = np.random.default_rng(0)
  null = [_kl(*(rng.multinomial(int(size), pooled, _DRAWS) for size in sizes))]
  at = int(np.abs(q - p).argmax())
  return {"n": int(sizes[1]), "kl": float(_kl(*counts[:, None])[0]),
          "kl_null": float(np.quantile(null, 0.95)),
          "total_variation": float(np.abs(q - p).sum() / 2), "label": names[at],
          "train": p[at], "share": q[at], "change": q[at] - p[at],
          "change_interval": _newcombe(counts[0, at], sizes[0], counts[1, at], sizes[1]),
          "classes": [{"label": name, "train": float(a), "share": float(b)}
                      for name, a, b in zip(names, p, q, strict=True)]}


def _kl(train, other):
  """(B,) KL of counts (B, C) of another split from those of train, in nats."""
  p, q = ((counts + 0.5) / (counts + 0.5).sum(axis=1, keepdims=True) for counts in (train, other))
  return (q * np.log(q / p)).sum(axis=1)


def _newcombe(a, n, b, m):
  """95 % interval of b / m - a / n by Wilson's of each; Newcombe, Statist. Med. 17 (1998)."""
  p, q = a / n, b / m
  (lo_p, hi_p), (lo_q, hi_q) = stats.wilson(a, n), stats.wilson(b, m)
  return [q - p - float(np.hypot(q - lo_q, hi_p - p)), q - p + float(np.hypot(hi_q - q, p - lo_p))]


def _classes(evidence):
  """split -> list of class names, of the splits that have them."""
  found = {}
  for split, rows in evidence.rows.items():
    classes = getattr(rows, "classes", None)
    if classes and not any(isinstance(label, (list, tuple)) for label in classes[:50]):
      found[split] = [str(label) for label in classes]
  if not found:
    for split, part in evidence.features.items():
      label = np.asarray(part.get("label", np.zeros((0, 0))))
      if label.ndim == 1 and np.issubdtype(label.dtype, np.integer):
        names = evidence.labels
        found[split] = [names[k] if 0 <= k < len(names) else str(k) for k in label.tolist()]
  return found


# ---- Features ------------------------------------------------------------------------------------


def _features(config, evidence):
  kind, parts = describe(evidence, config.rows)
  train = parts.pop("train")
  found = []
  for split, (x, label) in parts.items():
    if len(x) < FEWEST:
      continue
    n = min(len(train[0]), len(x))
    x, a = x[:n], train[0][:n]
    mmd, null, p = distance(a, x, config.permutations)
    area, interval = apart(a, x)
    row = {"split": split, "n": n, "of": kind, "mmd": mmd, "mmd_null": null, "p": p,
           "auroc": area, "auroc_interval": interval, "auroc_matched": None, "n_matched": 0}
    matched = _matched(train[1], None if label is None else label[:n])
    if matched is not None and len(matched[0]) >= FEWEST:
      row["auroc_matched"] = apart(train[0][matched[0]], x[matched[1]], paired=True)[0]
      row["n_matched"] = len(matched[0])
    found.append(row)
  if not found:
    raise guards.Missing(f"no split beside train has {FEWEST} rows")
  return found


def describe(evidence, most: int) -> tuple[str, dict]:
  """What rows are compared by.

  Returns:
    ("features" or "words", split -> (float32 (n, D), labels (n,) or None) of up to `most` rows,
    drawn at random and in random order).

  Raises:
    guards.Missing: rows have neither features nor text, or train has too few.
  """
  found, kind = {}, "features"
  vectors = {split: part for split, part in evidence.features.items()
             if np.ndim(part.get("features")) == 2}
  if "train" in vectors:
    for split, part in vectors.items():
      chosen = _drawn(len(part["features"]), most)
      label = np.asarray(part["label"])[chosen] if "label" in part else None
      label = label if label is not None and label.dtype.kind in "iu" and label.ndim == 1 else None
      found[split] = np.asarray(part["features"], np.float32)[chosen], label
  else:
    kind = "words"
    for split, rows in evidence.rows.items():
      texts = [duplicates.text(rows[int(i)]) or "" for i in _drawn(len(rows), most)]
      if any(texts):
        found[split] = spelled(texts), None
  if "train" not in found:
    raise guards.Missing("there are neither features, one vector a row, nor texts")
  if len(found["train"][0]) < FEWEST:
    raise guards.Missing(f"train has {len(found['train'][0])} rows, fewer than {FEWEST}")
  if not all(np.isfinite(x).all() for x, _ in found.values()):
    raise guards.Missing("features are not finite")
  return kind, found


def spelled(texts) -> np.ndarray:
  """Returns (N, 262) float32: lengths, kinds of characters and hashed words of texts."""
  from sklearn.feature_extraction import text

  words = text.HashingVectorizer(n_features=_WORDS, norm="l2").transform(texts).toarray()
  kinds = np.zeros((len(texts), 6))
  for i, value in enumerate(texts):
    tokens, size = value.split(), max(len(value), 1)
    kinds[i] = (np.log1p(len(value)), np.log1p(len(tokens)), len(set(tokens)) / max(len(tokens), 1),
                sum(map(str.isupper, value)) / size, sum(map(str.isdigit, value)) / size,
                sum(not (c.isalnum() or c.isspace()) for c in value) / size)
  return np.concatenate([kinds, words], axis=1).astype(np.float32)


def distance(a, b, permutations: int) -> tuple[float, float, float]:
  """Unbiased squared maximum mean discrepancy of rows a (n, D) and b (m, D).

  The kernel is Gaussian, of the median distance between rows of both.

  Returns:
    (its value, the 95 % quantile under permutation of the rows, the share of permutations that
    reach it, itself counted as one).
  """
  both = _scaled(np.concatenate([a, b]))
  squares = np.square(both).sum(axis=1)
  far = np.maximum(squares[:, None] + squares[None] - 2 * both @ both.T, 0)
  width = np.median(far[np.triu_indices(len(far), 1)]) or np.float32(1)
  kernel = np.exp(-far / width)
  np.fill_diagonal(kernel, 0)
  rng, n, m = np.random.default_rng(0), len(a), len(b)
  member = np.zeros((permutations + 1, n + m), np.float32)
  member[0, :n] = 1
  for row in member[1:]:
    row[rng.permutation(n + m)[:n]] = 1
  inside = np.einsum("pi,pi->p", member @ kernel, member)
  other = np.einsum("pi,pi->p", (1 - member) @ kernel, 1 - member)
  total = kernel.sum(dtype=np.float64)
  values = inside / (n * (n - 1)) + other / (m * (m - 1)) - (total - inside - other) / (n * m)
  return (float(values[0]), float(np.quantile(values[1:], 0.95)),
          float((1 + (values[1:] >= values[0]).sum()) / (permutations + 1)))


def apart(a, b, paired=False) -> tuple[float, list[float]]:
  """How well a logistic regression tells rows a (n, D) from rows b (m, D) that it did not see.

  Args:
    paired: rows of one place go to the same fold. Where they are of one class this keeps the
      shares of the classes equal in every fold: else what a fold lacks, the others have too much
      of, and the regression does worse than chance.

  Returns:
    (AUROC, its 95 % bootstrap interval); .5 where they are alike.
  """
  import warnings

  import threadpoolctl
  from scipy.stats import rankdata
  from sklearn import exceptions, linear_model

  x = _narrow(_scaled(np.concatenate([a, b])))
  label = np.repeat([0, 1], [len(a), len(b)])
  rng = np.random.default_rng(0)
  fold = rng.permutation(len(a)) % FOLDS
  fold = np.concatenate([fold, fold if paired else rng.permutation(len(b)) % FOLDS])
  scores = np.empty(len(x))
  # One thread: on a busy machine threads that wait for each other are slower.
  with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
    warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
    for k in range(FOLDS):
      model = linear_model.LogisticRegression(C=0.1, solver="newton-cholesky", max_iter=30)
      model.fit(x[fold != k], label[fold != k])
      scores[fold == k] = model.decision_function(x[fold == k])
  # Scores of different folds are of different regressions: ranks within a fold are compared, and
  # equal scores share one, or the order of the rows would tell them apart.
  ranks = np.empty(len(x))
  for k in range(FOLDS):
    ranks[fold == k] = rankdata(scores[fold == k]) / (fold == k).sum()
  return (stats.auroc(ranks, label),
          list(stats.bootstrap_metric(stats.auroc, (ranks, label), n=500)))


def _scaled(x):
  """Rows less their mean, every feature divided by its standard deviation."""
  spread = x.std(axis=0)
  return (x - x.mean(axis=0)) / np.where(spread > 1e-6, spread, 1)


def _narrow(x):
  """(N, at most _WIDE): the directions in which rows vary most, each of variance 1."""
  if x.shape[1] <= _WIDE:
    return x
  values, vectors = np.linalg.eigh(x.T @ x / len(x))
  kept = values > 1e-6 * values[-1]
  kept[:-_WIDE] = False
  return x @ vectors[:, kept] / np.sqrt(values[kept])


def _matched(train, other):
  """(places in train, in other) of pairs of one class each; None without classes."""
  if train is None or other is None:
    return None
  pairs = []
  for label in np.unique(other):
    a, b = np.flatnonzero(train == label), np.flatnonzero(other == label)
    n = min(len(a), len(b))
    pairs.append((a[:n], b[:n]))
  return [np.concatenate(side) for side in zip(*pairs, strict=True)]


def _drawn(size, most):
  return np.random.default_rng(0).permutation(size)[:most]


# ---- Series --------------------------------------------------------------------------------------


def _levels(config, evidence):
  train = evidence.rows.get("train")
  if not hasattr(train, "parts") or not hasattr(train, "series"):
    raise guards.Missing("rows are no windows of series")
  return [_level(split, rows) for split, rows in evidence.rows.items() if split != "train"]


def _level(split, rows):
  """The channel of the series of a split that moved most; see `measure`."""
  best = None
  for series, (low, high) in zip(rows.series, rows.parts, strict=True):
    values, seen = series.actual[low:high], series.observed[low:high]
    blocks = np.arange(len(values)) // max(int(series.season), 1)
    for c in range(values.shape[1]):
      ok = seen[:, c] > 0
      if ok.sum() < FEWEST:
        continue
      mean = float(values[ok, c].mean())
      if best is None or abs(mean) > abs(best["level"]):
        best = {"split": split, "series": f"{series.name or 'channel'} {c + 1}",
                "n": int(ok.sum()), "level": mean, "spread": float(values[ok, c].std()),
                "level_interval": list(stats.bootstrap(values[ok, c], 500, blocks=blocks[ok]))}
  if best is None:
    raise guards.Missing(f"no series of {split} has {FEWEST} observed steps")
  return best


# ---- Verdict -------------------------------------------------------------------------------------


def _judge(config, numbers):
  """(verdict, words), about test, or about the last split where there is none."""
  split = next((s for s in ("test",) if any(
      row["split"] == s for key in ("priors", "features", "levels") for row in numbers[key])), None)
  of = {key: next((row for row in numbers[key] if split in (None, row["split"])), None)
        for key in ("priors", "features", "levels")}
  verdicts, words = ["ok"], []
  if of["priors"]:
    row = of["priors"]
    least = max(row["change_interval"][0], -row["change_interval"][1], 0.0)
    real = row["kl"] > row["kl_null"]
    verdicts.append("alarm" if real and least > config.share_alarm else
                    "warning" if real and least > config.share else "ok")
    lo, hi = (f"{100 * value:.1f}" for value in row["change_interval"])
    words.append(f"class {row['label']} is {100 * row['train']:.1f} % of train and "
                 f"{100 * row['share']:.1f} % of {row['split']}, the largest change of a class "
                 f"({100 * row['change']:+.1f} points [{lo}, {hi}], KL {row['kl']:.3f} nats)")
  if of["features"]:
    row = of["features"]
    least = row["auroc_interval"][0]
    verdicts.append("alarm" if least > config.auroc_alarm else
                    "warning" if least > config.auroc else "ok")
    words.append(f"a classifier tells train from {row['split']} rows by their {row['of']} with "
                 f"AUROC {row['auroc']:.2f} [{row['auroc_interval'][0]:.2f}, "
                 f"{row['auroc_interval'][1]:.2f}] (.5: alike; n = {row['n']:,} of each)")
    if row["auroc_matched"] is not None and verdicts != ["ok"] * len(verdicts):
      words[-1] += f", {row['auroc_matched']:.2f} at equal class shares"
  if of["levels"]:
    row = of["levels"]
    least = max(row["level_interval"][0], -row["level_interval"][1], 0.0)
    verdicts.append("warning" if least > config.level else "ok")
    words.append(f"the mean of {row['series']} moved by {row['level']:+.2f} standard deviations of "
                 f"train in {row['split']} [{row['level_interval'][0]:.2f}, "
                 f"{row['level_interval'][1]:.2f}]")
  text = "; ".join(words).replace("-", "−")
  return max(verdicts, key=guards.VERDICTS.index), text[0].upper() + text[1:] + "."
