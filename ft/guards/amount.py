"""Amount: is there enough data?

A probe is solved on growing subsets of the training rows, over the features that the untuned model
gives, and a power law with a floor is fitted to its errors (`ft/learning_curve.py`). What it says
of twice and four times the rows holds for that probe; a tuned model usually starts lower and is
steeper or flatter, but rows that no probe gains from are seldom what a tuned model lacks.

By default the probe is solved in closed form (a linear discriminant of classes, a ridge regression
of numbers or several labels): seconds for 10,000 rows of 384 features. `probe=logistic` is the
card's own, and takes minutes. `scripts/curve.py` does more.
"""

import numpy as np

from ft import duplicates, guards, learning_curve

KEYS = {
    "on": (True, "ask whether more training rows would help"),
    "probe": ("closed", "what is solved: in closed form in seconds, or the card's own in minutes",
              ["closed", "logistic"]),
    "sizes": (5, "subsets of the training rows, each half the next", (4, 12)),
    "draws": (3, "draws of each subset", (3, 100)),
    "rows": (10_000, "most rows of a split that are used, drawn at random", (100, None)),
    "gain": (0.01, "fall of the error by twice the rows that counts as a warning", (0.0, None)),
    "similar": (0.95, "cosine of features above which rows are near-duplicates", (0.0, 1.0)),
}

FEWEST_JUDGED = 30
ALIKE = 0.01  # share of random pairs above `similar` from which it tells no duplicates apart
FRESH = 4  # epochs; up to them repeated rows are about as good as new (Muennighoff et al. 2023)
RESAMPLES = 200

# Rows a class up to which a method suits; see `suggest`.
METHODS = (
    (2, "nearest neighbours or class prototypes on frozen features"),
    (16, "a linear probe, or contrastive pairs (task.name=few_shot)"),
    (1000, "LoRA, or the head first and then everything (tune.method=lora, staged)"),
)
MOST = "full fine-tuning with lower rates for lower layers (tune.method=full, optim.layer_decay)"


def gather(config, context):
  """What passes over the rows are counted from: {"batch", of rows; "rows"}."""
  del config
  return {"batch": context.run.config.train.batch * context.rows_each,
          "rows": len(context.examples["train"])}


def measure(config, evidence):
  """The guard; numbers are what the card's section on the amount of data shows.

  Numbers: rows, used (in the curve), per_class {min, median, max}; unit ("share of errors",
  "share of wrong labels" or "standard deviations of the target"), probe, judged {split, n};
  points [{n, error, lo, hi, draws}]; fit {a, b, c, b_interval, c_interval, residual} of
  error(n) = a n^-b + c; curve [{n, error, lo, hi}] from the smallest subset to 4 times the rows;
  predicted [{times, n, error, lo, hi, gain, gain_interval}] for 2 and 4 times all rows, none that
  are more than 4 times those in the curve; doubled {n, gain, interval}, the fall of the error from
  n/2 to n rows: twice all of them, or the furthest there is;
  per_100 {gain, interval}, the fall of the error by the next 100 labels, None beyond the furthest;
  effective {n, of, share, similar} after near-duplicates, or {missing: reason};
  method, suggested for these rows a class; passes over the training rows.
  """
  parts = prepared(evidence.features, config.rows)
  if isinstance(parts, str):
    return guards.not_measured(parts)
  rows, (train, validation, judged) = len(evidence.features["train"]["index"]), parts
  smallest = max(learning_curve.SMALLEST, classes(train.target))
  ns = learning_curve.sizes(len(train.target), smallest, config.sizes)
  if len(ns) < learning_curve.FEWEST_SIZES:
    return guards.not_measured(
        f"train has {len(train.target):,} rows, too few for {learning_curve.FEWEST_SIZES} subsets, "
        f"each half the next, of at least {smallest} rows (one of each class)")
  try:
    named, solve = learning_curve.probe(config.probe, train.target)
  except ValueError as error:
    return guards.not_measured(f"guard.amount.probe=logistic: {error}")
  curve = learning_curve.measure(*learning_curve.narrowed([train, validation, judged]), ns,
                                 config.draws, solve)
  numbers = {"rows": rows, "used": len(train.target), "probe": named,
             "unit": unit(train.target), "judged": {"split": "test", "n": len(judged.target)},
             **account(curve, rows),
             "effective": effective(train.features, config.similar)}
  if train.target.dtype.kind in "iu":
    counts = np.bincount(np.unique(evidence.features["train"]["label"], return_inverse=True)[1])
    middle = int(np.sort(counts)[(len(counts) - 1) // 2])  # of two classes, the smaller
    numbers["per_class"] = {"min": int(counts.min()), "median": middle, "max": int(counts.max())}
    numbers["method"] = suggest(middle, rows)
  told = evidence.gathered.get("amount")
  if told and evidence.history:
    numbers["passes"] = evidence.history[-1]["step"] * told["batch"] / max(told["rows"], 1)
  more = numbers["doubled"]["gain"] > config.gain
  if more and not numbers["predicted"]:
    return guards.result("not measured", unreached(numbers), numbers)
  return guards.result("warning" if more else "ok", words(numbers, more), numbers)


def prepared(features, most: int):
  """(train, validation, test) as `learning_curve.Part`s of at most `most` rows, or why not (str).

  Args:
    features: of `guards.Evidence`, or of `run.extract_features`.
  """
  found, labels = [], None
  for split in ("train", "validation", "test"):
    part = features.get(split) or {}
    target = part.get("label", part.get("target"))
    if target is None or "features" not in part or np.ndim(part["features"]) != 2:
      return f"the untuned model's features of the {split} rows, one vector a row, are not recorded"
    x, target = np.asarray(part["features"], np.float32), np.asarray(target)
    if target.dtype.kind in "iu" and target.ndim == 1:
      labels = np.unique(target[target >= 0]) if labels is None else labels
      if len(labels) < 2:
        return "train has one class only, and telling classes apart takes two"
      known = np.isin(target, labels)  # -1 stands for a label that is not trained
      x, target = x[known], np.searchsorted(labels, target[known])
    if not np.isfinite(x).all():
      return f"features of the {split} rows are not finite"
    if split == "test" and len(x) < FEWEST_JUDGED:
      return f"the test split has {len(x)} rows, fewer than {FEWEST_JUDGED}"
    if not len(x):
      return f"the {split} split has no rows"
    rows = np.arange(len(x))
    if len(x) > most:
      rows = np.sort(np.random.default_rng(0).permutation(len(x))[:most])
    found.append(learning_curve.Part(x, target).rows(rows))
  if labels is not None:
    seen = np.unique(found[0].target)
    if len(seen) < len(labels):
      return f"guard.amount.rows={most} rows do not hold each of the {len(labels)} classes"
  return found


def classes(target) -> int:
  """How many rows hold one of each class; 1 where rows have no single class."""
  return len(np.unique(target)) if target.ndim == 1 and target.dtype.kind in "iu" else 1


def unit(target) -> str:
  """What an error is, in words."""
  if target.ndim == 2:
    return "share of wrong labels"
  return "share of errors" if target.dtype.kind in "iu" else "standard deviations of the target"


def account(curve, rows: int, resamples: int = RESAMPLES) -> dict:
  """Parts of `measure`, points to per_100, for a run of `rows` training rows.

  Args:
    curve: `learning_curve.Curve`. rows: that predictions are multiples of; never beyond 4 times
      the largest subset. resamples: of the bootstrap.
  """
  found = learning_curve.fit(curve.n, curve.errors)
  errors, fits = learning_curve.resampled(curve, resamples)
  mean = curve.errors.mean(axis=1)
  furthest = learning_curve.FURTHEST * int(curve.n[-1])

  def at(n):
    lo, hi = learning_curve.interval([float(one(n)) for one in fits])
    return {"n": int(n), "error": float(found(n)), "lo": lo, "hi": hi}

  def fall(n, start=rows):
    pair = learning_curve.interval([float(one(start) - one(n)) for one in fits])
    return {"gain": float(found(start) - found(n)), "interval": pair}

  points = [{"n": int(n), "error": float(e), "draws": curve.errors.shape[1],
             **dict(zip(("lo", "hi"), learning_curve.interval(errors[:, s]), strict=True))}
            for s, (n, e) in enumerate(zip(curve.n, mean, strict=True))]
  points[-1]["draws"] = points[-1]["draws"] if points[-1]["n"] < rows else 1
  predicted = [{"times": times, **at(times * rows),
                **dict(zip(("gain", "gain_interval"), fall(times * rows).values(), strict=True))}
               for times in (2, 4) if times * rows <= furthest]
  doubled = min(2 * rows, furthest)
  return {
      "points": points,
      "fit": {"a": found.a, "b": found.b, "c": found.c,
              "b_interval": learning_curve.interval([one.b for one in fits]),
              "c_interval": learning_curve.interval([one.c for one in fits]),
              "residual": float(np.sqrt(np.mean(np.square(found(curve.n) - mean))))},
      "curve": [at(n) for n in np.geomspace(curve.n[0], furthest, 25).round()],
      "predicted": predicted, "doubled": {"n": doubled, **fall(doubled, doubled // 2)},
      "per_100": fall(rows + 100) if rows + 100 <= furthest else None}


def effective(features, similar: float) -> dict:
  """{"n", "of", "share", "similar"}: rows left when each like an earlier one is left out."""
  unit = duplicates.units(features)
  alike = duplicates.stray(unit, similar)
  if alike > ALIKE:
    return {"missing": f"{100 * alike:.0f} % of random pairs of rows have a cosine above "
                       f"{similar:g}: these features do not tell near-duplicates from other rows"}
  kept = len(unit) - len(duplicates.cosine(unit, unit, similar, inside=True).query)
  return {"n": kept, "of": len(features), "share": kept / len(features), "similar": similar}


def suggest(per_class: float, rows: int) -> str:
  """The method that usually suits so many rows a class (median) and in all.

  Source: probes and SetFit up to 16 rows a class (Tunstall et al. 2022), LoRA in the range above,
  full fine-tuning where there are more than 1,000 a class and 5,000 in all: rules of thumb.
  """
  for most, method in METHODS:
    if per_class <= most:
      return method
  return MOST if rows > 5000 else METHODS[-1][1]


def words(numbers, more: bool) -> str:
  """The sentences of the verdict; they say that the curve is the probe's."""
  share = numbers["unit"] != "standard deviations of the target"
  text = (f"{'More rows would help' if more else 'More rows would help little'}: a "
          f"{numbers['probe']} on the untuned features errs "
          f"{'on ' if share else 'by '}{amount(numbers['points'][-1], share)} with "
          f"{numbers['points'][-1]['n']:,} rows")
  text += "".join(f", {amount(row, share)} {interval(row, share)} predicted with "
                  f"{row['times']} times as many" for row in numbers["predicted"])
  if not numbers["predicted"]:
    furthest = numbers["doubled"]["n"]
    text += (f" of {numbers['rows']:,}; going from {furthest // 2:,} to {furthest:,} would gain "
             f"{gained(numbers, share)}, and later doublings no more")
  if share and numbers["per_100"]:
    text += (f"; the next 100 labels are worth {100 * numbers['per_100']['gain']:.2f} points")
  text += "."
  effective_ = numbers["effective"]
  if "n" in effective_:
    text += (f" {effective_['of']:,} rows count as {effective_['n']:,} without near-duplicates.")
  if "method" in numbers:
    text += (f" {numbers['per_class']['median']:,.0f} rows a class suggest {numbers['method']}.")
  if numbers.get("passes", 0) > FRESH:
    text += (f" Training went over the rows {numbers['passes']:.1f} times; beyond {FRESH}, "
             "repeated rows teach less and less.")
  return text


def unreached(numbers) -> str:
  """Why nothing is said of twice the rows: the curve is of too few, and still falls."""
  share = numbers["unit"] != "standard deviations of the target"
  return (f"Not measured: the curve is of {numbers['used']:,} of {numbers['rows']:,} rows, and is "
          f"followed to {numbers['doubled']['n']:,}, where it still falls by "
          f"{gained(numbers, share)} as rows double; raise guard.amount.rows to "
          f"{-(-2 * numbers['rows'] // learning_curve.FURTHEST):,} or more.")


def gained(numbers, share: bool) -> str:
  """"0.8 points" of what doubled rows gain, else three decimals."""
  gain = numbers["doubled"]["gain"]
  return f"{100 * gain:.1f} points" if share else f"{gain:.3f}"


def amount(row, share: bool) -> str:
  """"8.4 %" of a share, else three decimals."""
  return f"{100 * row['error']:.1f} %" if share else f"{row['error']:.3f}"


def interval(row, share: bool) -> str:
  """"[7.1, 8.1]" of a row's lo and hi."""
  scale, digits = (100, 1) if share else (1, 3)
  return f"[{scale * row['lo']:.{digits}f}, {scale * row['hi']:.{digits}f}]"
