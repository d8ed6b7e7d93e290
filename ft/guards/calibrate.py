"""Calibration: does a confidence of 80 % mean right 80 times in 100, and does an interval hold?

Of classifiers, a temperature (and a factor and an offset a class) is fitted on validation; expected
calibration error (equal-width and equal-mass bins), log-loss, Brier score and the reliability table
are reported on test before and after. Conformal sets that are made on validation to hold the label
with a stated chance are counted on test; so are accuracies when only the rows of highest confidence
are answered. Of regressions the same chance is asked of conformal intervals, of forecasts of the
intervals that prediction gives.
Source: Guo et al., On Calibration of Modern Neural Networks (2017); see also `ft.conformal`.
"""

import numpy as np

from ft import conformal, forecasts, guards, stats
from ft.tasks import forecast

KEYS = {
    "on": (True, "measure calibration before and after a temperature"),
    "bins": (15, "bins of confidence of the expected calibration error", (2, 100)),
    "coverage": (0.9, "share of rows whose set of labels, or interval, should hold the truth",
                 (0.5, 0.999)),
    "warning": (0.05, "calibration error after the temperature that counts as a warning",
                (0.0, 1.0)),
    "alarm": (0.15, "calibration error after the temperature that counts as an alarm", (0.0, 1.0)),
    "missed": (0.05, "coverage of forecast intervals below that of validation by more than this is "
               "a warning", (0.0, 1.0)),
}

FEWEST = 30  # Below this many rows a calibration error is mostly noise.
PER_CLASS = 10  # Validation rows a class below which a factor for each would learn the noise.
RESAMPLES = 200  # Of the area under the abstention curve, which is sorted anew each time.


def measure(config, evidence):
  """The guard; numbers are what the card's calibration section shows.

  Of classifiers: temperature, fitted_on, n, bins; before, after and, with enough rows a class,
  vector (see `quality`); conformal: a dict a method with method, asked, coverage, interval, band
  (what chance explains), size and size_interval (labels a set), empty (share of sets without a
  label), threshold, n, classes: label, coverage, interval, n, lowest first; abstention: area,
  interval, n, curve (see `conformal.abstention`). Of regressions and forecasts: intervals: method,
  asked, coverage, interval, band (of regressions), width (in the unit of the target), fitted_on, n.
  """
  rows = {split: evidence.outputs.get(split, {}).get(guards.TUNED)
          for split in ("validation", "test")}
  for split, outputs in rows.items():
    if outputs is None:
      return guards.not_measured(f"no outputs of the {split} split were recorded")
    if len(next(iter(outputs.values()))) < FEWEST:
      count = len(next(iter(outputs.values())))
      return guards.not_measured(f"the {split} split has {count} rows, fewer than {FEWEST}")
  for kind, needs in ((_classes, ("logits", "label")), (_numbers, ("prediction", "target")),
                      (_forecasts, ("forecast", "target", "observed"))):
    if all(key in outputs for outputs in rows.values() for key in needs):
      return kind(config, evidence, rows["validation"], rows["test"])
  return guards.not_measured("the outputs hold no class scores, and no numbers with their targets, "
                             "of validation and test")


def _classes(config, evidence, validation, test):
  for split, outputs in (("validation", validation), ("test", test)):
    if not np.isfinite(outputs["logits"]).all():
      return guards.not_measured(f"class scores of the {split} split are not finite")
  temperature = stats.fit_temperature(validation["logits"], validation["label"])
  before = quality(test["logits"], test["label"], 1.0, config.bins)
  after = quality(test["logits"], test["label"], temperature, config.bins)
  numbers = {"temperature": temperature, "fitted_on": len(validation["label"]),
             "n": len(test["label"]), "bins": config.bins, "before": before, "after": after}
  error = after["ece"]
  verdict = "alarm" if error > config.alarm else "warning" if error > config.warning else "ok"
  words = (f"Confidence is off by {100 * before['ece']:.1f} points on average on test, "
           f"{100 * error:.1f} after temperature {temperature:.2f} (log-loss "
           f"{before['log_loss']:.3f} → {after['log_loss']:.3f}, n = {numbers['n']:,}).")
  if np.ndim(test["label"]) == 1:
    numbers |= _of_one_label(config, evidence.labels, validation, test, temperature)
    made = numbers["conformal"][0]
    words += (f" Sets of {made['size']:.2f} labels on average hold the right one "
              f"{100 * made['coverage']:.1f} % of the time (asked: {100 * made['asked']:.0f} %).")
    if made["coverage"] < made["band"][0] and verdict == "ok":
      verdict = "warning"
      words += " That is less than chance explains: test rows are unlike those of validation."
  return guards.result(verdict, words, numbers)


def _of_one_label(config, labels, validation, test, temperature) -> dict:
  """What needs one label a row: vector scaling, conformal sets, and the abstention curve."""
  logits, label = np.asarray(validation["logits"], np.float64), np.asarray(validation["label"])
  found = {}
  if len(label) >= PER_CLASS * logits.shape[1]:
    factor, offset = conformal.vector_scaling(logits, label, temperature)
    found["vector"] = quality(np.asarray(test["logits"], np.float64) * factor + offset,
                              test["label"], 1.0, config.bins)
  # At temperature 1: nothing about these probabilities was fitted on the rows that give the sets.
  known, new = stats.softmax(logits), stats.softmax(test["logits"])
  found["conformal"] = [_sets(method, labels, known, label, new, test["label"], config.coverage)
                        for method in conformal.METHODS]
  confidence = stats.softmax(np.asarray(test["logits"], np.float64) / temperature).max(axis=1)
  right = (new.argmax(axis=1) == test["label"]).astype(np.float64)
  interval = stats.bootstrap_metric(
      lambda confidence, right: conformal.abstention(confidence, right)["area"],
      (confidence, right), RESAMPLES)
  found["abstention"] = {**conformal.abstention(confidence, right), "interval": list(interval),
                         "n": len(right)}
  return found


def _sets(method, names, known, label, new, truth, asked) -> dict:
  """Numbers of one method's sets; see `measure`."""
  held, limit = conformal.sets(method, known, label, new, asked)
  truth = np.asarray(truth)
  right, size = held[np.arange(len(truth)), truth], held.sum(axis=1)
  classes = []
  for c in np.unique(truth):
    hits, n = int(right[truth == c].sum()), int((truth == c).sum())
    classes.append({"label": names[c] if c < len(names) else str(c), "coverage": hits / n,
                    "interval": list(stats.wilson(hits, n)), "n": n})
  return {"method": method, "asked": asked, "coverage": float(right.mean()),
          "interval": list(stats.wilson(int(right.sum()), len(right))),
          "band": list(conformal.band(len(label), len(right), asked)),
          "size": float(size.mean()), "size_interval": list(stats.bootstrap(size)),
          "empty": float((size == 0).mean()), "threshold": limit, "n": len(right),
          "classes": sorted(classes, key=lambda row: (row["coverage"], row["label"]))}


def _numbers(config, evidence, validation, test):
  """Split-conformal intervals of a regression: the prediction and as much to either side."""
  away, missed = (np.abs(np.asarray(part["prediction"], np.float64) - part["target"])
                  for part in (validation, test))
  half = conformal.threshold(away, config.coverage)
  right = missed <= half
  band = conformal.band(len(away), len(right), config.coverage)
  made = {"method": "split conformal, absolute residuals", "asked": config.coverage,
          "coverage": float(right.mean()), "fitted_on": len(away), "n": len(right),
          "interval": list(stats.wilson(int(right.sum()), len(right))), "band": list(band)}
  mean, unit = float(missed.mean()), None
  if evidence.metrics is not None and mean > 0:
    unit = evidence.metrics(test).get("mae")  # in the target's unit, the outputs are standardised
  made["width"] = 2 * half * (unit / mean if unit else 1.0)
  words = (f"Intervals of ± {made['width'] / 2:.3g} around the prediction hold "
           f"{100 * made['coverage']:.1f} % of test (asked: {100 * config.coverage:.0f} %, "
           f"n = {len(right):,}).")
  low = made["coverage"] < band[0]
  if low:
    words += " That is less than chance explains: test rows are unlike those of validation."
  return guards.result("warning" if low else "ok", words, {"intervals": made})


def _forecasts(config, evidence, validation, test):
  """Coverage of the intervals that prediction gives: of quantiles, or of errors on validation."""
  level = forecast.INTERVAL[1] - forecast.INTERVAL[0]
  if "quantiles" in test:
    low, high = np.asarray(test["quantiles"], np.float64)[:, [0, -1]].swapaxes(0, 1)
    stated = [key for key in evidence.metrics(test) if key.startswith("coverage_")]
    level = float(stated[0].removeprefix("coverage_")) / 100
    method = "outermost quantiles of the model"
  else:
    away = np.asarray(validation["target"], np.float64) - validation["forecast"]
    away = np.where(np.asarray(validation["observed"]) > 0, away, np.nan).swapaxes(0, 1)
    ends = np.nanquantile(away.reshape(len(away), -1), forecast.INTERVAL, axis=1)
    low, high = (test["forecast"] + end[:, None] for end in ends)
    method = "quantiles of the errors on validation, step by step"
  observed = np.asarray(test["observed"], np.float64)
  inside = ((test["target"] >= low) & (test["target"] <= high)) * observed
  sums = {"inside": inside.sum(axis=(1, 2)), "seen": observed.sum(axis=(1, 2))}
  interval = stats.bootstrap_metric(
      lambda part: part["inside"].sum() / max(part["seen"].sum(), 1e-9), sums,
      blocks=evidence.blocks and evidence.blocks(test))
  share = forecasts.covered(test["target"], low, high, observed)
  deviation = np.asarray(test["std"], np.float64)[:, None] if "std" in test else 1.0
  width = float(((high - low) * deviation * observed).sum() / max(observed.sum(), 1))
  made = {"method": method, "asked": level, "coverage": share, "interval": list(interval),
          "width": width, "fitted_on": len(validation["forecast"]), "n": len(observed)}
  words = (f"Intervals made to hold {100 * level:.0f} % of targets hold {100 * share:.1f} % "
           f"of test (n = {len(observed):,} windows).")
  low = interval[1] < level - config.missed
  return guards.result("warning" if low else "ok", words, {"intervals": made})


def quality(logits, labels, temperature, bins=15):
  """Calibration of logits (N, C) at one temperature.

  Returns:
    {"ece", "ece_equal_mass", "log_loss", "brier", "reliability": {"lo", "hi", "count",
    "confidence", "accuracy"}} where reliability holds lists of the bins that have rows.
  """
  scaled = np.asarray(logits, np.float64) / temperature
  probs = stats.sigmoid(scaled) if np.ndim(labels) == 2 else stats.softmax(scaled)
  table = stats.reliability(probs, labels, bins)
  full = table["count"] > 0
  return {"ece": stats.ece(probs, labels, bins),
          "ece_equal_mass": stats.ece(probs, labels, bins, equal_mass=True),
          "log_loss": stats.log_loss(probs, labels), "brier": stats.brier(probs, labels),
          "reliability": {key: value[full].tolist() for key, value in table.items()}}
