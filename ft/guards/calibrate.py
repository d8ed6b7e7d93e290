"""Calibration: does a confidence of 80 % mean right 80 times in 100?

A temperature is fitted on validation; expected calibration error (equal-width and equal-mass bins),
log-loss, Brier score and the reliability table are reported on test before and after it.
Source: Guo et al., On Calibration of Modern Neural Networks (2017).
"""

import numpy as np

from ft import guards, stats

KEYS = {
    "on": (True, "measure calibration before and after a temperature"),
    "bins": (15, "bins of confidence of the expected calibration error", (2, 100)),
    "warning": (0.05, "calibration error after the temperature that counts as a warning",
                (0.0, 1.0)),
    "alarm": (0.15, "calibration error after the temperature that counts as an alarm", (0.0, 1.0)),
}

FEWEST = 30  # Below this many rows a calibration error is mostly noise.


def measure(config, evidence):
  """The guard; numbers are what the card's calibration section shows."""
  rows = {split: evidence.outputs.get(split, {}).get(guards.TUNED)
          for split in ("validation", "test")}
  for split, outputs in rows.items():
    if outputs is None or "logits" not in outputs or "label" not in outputs:
      return guards.not_measured(f"no class scores of the {split} split were recorded")
    if len(outputs["label"]) < FEWEST:
      return guards.not_measured(
          f"the {split} split has {len(outputs['label'])} rows, fewer than {FEWEST}")
    if not np.isfinite(outputs["logits"]).all():
      return guards.not_measured(f"class scores of the {split} split are not finite")
  validation, test = rows["validation"], rows["test"]
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
  return guards.result(verdict, words, numbers)


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
