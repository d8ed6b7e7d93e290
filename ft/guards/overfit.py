"""Overfitting: did the run learn what carries over, and did it gain anything over no training?

Train metric in evaluation mode against validation (gap and its slope), best step by metric and by
loss, and the paired bootstrap of tuned - baseline on test and on every further split.
"""

import numpy as np

from ft import guards, stats

KEYS = {
    "on": (True, "measure overfitting and the gain over the baselines"),
    "resamples": (1000, "bootstrap resamples behind each interval", (100, None)),
    "gap": (0.1, "train minus validation metric at the best step that counts as a warning",
            (0.0, None)),
}

# Percentage points are how people speak of these metrics; any other is given in its own unit.
SHARES = ("accuracy", "top5_accuracy", "macro_f1", "auroc", "entity_f1", "entity_precision",
          "entity_recall", "mrr", "ndcg@10", "hr@10", "recall@1", "recall@5", "recall@10",
          "unknown_auroc", "unknown_auroc_energy", "accuracy_at_coverage",
          "likelihood_accuracy", "win_rate", "sensitivity_at_specificity", "f1", "precision",
          "recall", "false_alarms", "pixel_auroc", "pro", "miou", "pixel_accuracy", "mean_recall")
UNITS = {"nats_per_token": " nats/token"}
MOST_VALUES = 20_000  # Rows whose scores are recorded one by one where they are not 0 or 1.


def measure(config, evidence):
  """The guard; see `ft.guards`."""
  chosen, mode = evidence.selection or (evidence.metric, evidence.mode)
  curve = curves(evidence.history, chosen, mode)
  compared = differences(evidence, config.resamples)
  if not curve and not compared:
    return guards.not_measured("no evaluation history and no test outputs were recorded")
  verdicts, words = [], []
  if "gap" in curve:
    words.append(_gap_words(curve, chosen))
    verdicts.append("warning" if curve["gap"] > config.gap else "ok")
  elif "best_step" in curve:
    words.append(f"best {chosen} at step {curve['best_step']}, "
                 "train metric not recorded in evaluation mode")
  for split, name, row in _headlines(compared, evidence.mode):
    words.append(f"{split} {row['verdict']} over the {guards.NAMES.get(name, name)} "
                 f"({signed(row, row['metric'])})")
    verdicts.append(_severity(split, row["verdict"]))
  worst = max(verdicts, key=guards.VERDICTS.index, default="ok")
  text = "; ".join(words) + "."
  return guards.result(worst, text[0].upper() + text[1:], {**curve, "differences": compared})


def curves(history, metric, mode="max"):
  """Numbers of the evaluation history: {} when there is none.

  Returns:
    best_step, best, last; when the loss was evaluated too best_step_by_loss; when the train metric
    was too train, validation, gap (>= 0 means train is better, at the best step) and gap_slope (its
    least-squares rise per evaluation).
  """
  sign = 1 if mode == "max" else -1
  key = f"validation/{metric}"
  rows = [row for row in history if _finite(row.get(key))]
  if not rows:
    return {}
  best = max(rows, key=lambda row: sign * row[key])  # The first of equals, as keep-best has it.
  numbers = {"evaluations": len(rows), "best_step": best["step"], "best": best[key],
             "last": rows[-1][key]}
  for loss in ("validation/loss", "validation/log_loss"):
    losses = [row for row in rows if _finite(row.get(loss))]
    if losses:
      numbers["best_step_by_loss"] = min(losses, key=lambda row: row[loss])["step"]
      break
  train = f"train/{metric}"
  both = [row for row in rows if _finite(row.get(train))]
  if both:
    at = best if _finite(best.get(train)) else both[-1]
    gaps = [sign * (row[train] - row[key]) for row in both]
    numbers |= {"train": at[train], "validation": at[key], "gap": sign * (at[train] - at[key])}
    if len(gaps) > 1:
      numbers["gap_slope"] = float(np.polyfit(np.arange(len(gaps)), gaps, 1)[0])
  return numbers


def results(evidence, resamples=1000):
  """Metrics of every row of every split, the selection metric with its bootstrap interval.

  Returns:
    split -> row name -> {"metrics": {name: float}, "interval": {metric: [lo, hi]}, "n": N,
    and, for paired comparisons with other runs, "scores": str of 0/1 in row order where every score
    is 0 or 1; else, of the tuned model on up to MOST_VALUES rows, "values": the scores as str with
    a space between them; with "blocks" of the same form where rows depend on each other}.
  """
  table = {}
  for split, rows in evidence.outputs.items():
    table[split] = {}
    for name, outputs in rows.items():
      entry = {"metrics": dict(evidence.metrics(outputs)), "n": _judged(evidence, outputs)}
      lo, hi = _interval(evidence, outputs, resamples)
      entry["interval"] = {evidence.metric: [lo, hi]}
      if evidence.score is not None:
        score = np.asarray(evidence.score(outputs), np.float64)
        if score.size and np.isin(score, (0, 1)).all():
          entry["scores"] = (score.astype(np.uint8) + ord("0")).tobytes().decode("ascii")
        elif name == guards.TUNED and 0 < score.size <= MOST_VALUES:
          entry["values"] = " ".join(f"{value:.6g}" for value in score)
        if ("scores" in entry or "values" in entry) and evidence.blocks and name == guards.TUNED:
          entry["blocks"] = " ".join(str(block) for block in evidence.blocks(outputs))
      table[split][name] = entry
  return table


def differences(evidence, resamples=1000):
  """Fine-tuned minus each baseline, paired over the rows, for every split that has both.

  Returns:
    split -> "fine-tuned - <baseline>" -> {"metric", "difference", "lo", "hi", "n", "verdict"} with
    verdict "gained", "did not gain" (interval holds zero) or "lost".
  """
  table = {}
  for split, rows in evidence.outputs.items():
    if split in ("train", "validation") or guards.TUNED not in rows:
      continue
    tuned = rows[guards.TUNED]
    for name, outputs in rows.items():
      if name == guards.TUNED or _count(outputs) != _count(tuned):
        continue
      difference, lo, hi = _paired(evidence, tuned, outputs, resamples)
      table.setdefault(split, {})[f"{guards.TUNED} - {name}"] = {
          "metric": evidence.metric, "difference": difference, "lo": lo, "hi": hi,
          "n": _judged(evidence, tuned), "verdict": judge(lo, hi, evidence.mode)}
  return table


def judge(lo, hi, mode="max"):
  """"gained", "did not gain" or "lost", by whether the interval of the difference is clear of 0."""
  if mode == "min":
    lo, hi = -hi, -lo
  return "gained" if lo > 0 else "lost" if hi < 0 else "did not gain"


def signed(row, metric):
  """"+8.1 points [6.5, 9.9]" of a difference row; shares in points, others in their own unit."""
  scale, unit, digits = _unit(metric)
  values = [row[key] for key in ("difference", "lo", "hi")]
  if not all(_finite(value) for value in values):
    return "interval not defined"
  # A value that rounds to zero is written without a sign, and minus is the real minus sign.
  shown = [round(scale * value, digits) + 0.0 for value in values]
  text = [f"{value:.{digits}f}".replace("-", "−") for value in shown]
  plus = "+" if shown[0] > 0 else ""
  return f"{plus}{text[0]}{unit} [{text[1]}, {text[2]}]"


def _unit(metric):
  """(factor, unit, decimals) that a difference of a metric is written with."""
  return (100, " points", 1) if metric in SHARES else (1, UNITS.get(metric, ""), 3)


def _count(outputs):
  """How many rows the outputs (arrays that share their first axis) are of."""
  return len(next(iter(outputs.values())))


def _judged(evidence, outputs):
  """How many rows the metric is of."""
  return _count(outputs) if evidence.count is None else evidence.count(outputs)


def _decomposes(evidence, outputs):
  """Whether the metric is the mean of per-example scores (accuracy is, macro-F1 is not)."""
  if evidence.score is None:
    return False
  if evidence.metrics is None:
    return True
  mean = float(np.mean(evidence.score(outputs)))
  value = evidence.metrics(outputs).get(evidence.metric, float("nan"))
  return bool(np.isclose(mean, value, rtol=1e-6, atol=1e-6))


def _interval(evidence, outputs, resamples):
  if not _count(outputs):
    return float("nan"), float("nan")
  blocks = evidence.blocks and evidence.blocks(outputs)
  if _decomposes(evidence, outputs):
    return stats.bootstrap(evidence.score(outputs), resamples, blocks=blocks)
  return stats.bootstrap_metric(_metric(evidence), outputs, resamples, blocks=blocks)


def _paired(evidence, tuned, baseline, resamples):
  if not _count(tuned):
    return (float("nan"),) * 3
  blocks = evidence.blocks and evidence.blocks(tuned)
  if _decomposes(evidence, tuned) and _decomposes(evidence, baseline):
    return stats.paired_bootstrap(evidence.score(tuned), evidence.score(baseline), resamples,
                                  blocks=blocks)
  return stats.paired_bootstrap_metric(_metric(evidence), tuned, baseline, resamples,
                                       blocks=blocks)


def _metric(evidence):
  """outputs -> the selection metric, by the short way where the task has one."""
  return evidence.value or (lambda outputs: evidence.metrics(outputs)[evidence.metric])


def headline(rows, mode="max"):
  """(baseline, difference row) a verdict is about: the baseline that is hardest to beat.

  Args:
    rows: "fine-tuned - <baseline>" -> difference row, not empty.
    mode: "max" or "min", what is better.
  """
  prefix, sign = f"{guards.TUNED} - ", 1 if mode == "max" else -1

  def gain(key):
    difference = rows[key]["difference"]
    return (key.removeprefix(prefix) in guards.REFERENCES,
            sign * difference if _finite(difference) else np.inf)

  key = min((key for key in rows if key.startswith(prefix)), key=gain)
  return key.removeprefix(prefix), rows[key]


def _headlines(compared, mode):
  """(split, baseline, row) of each split."""
  for split, rows in compared.items():
    yield split, *headline(rows, mode)


def _severity(split, verdict):
  if verdict == "gained":
    return "ok"
  return "alarm" if split == "test" and verdict == "lost" else "warning"


def _gap_words(curve, metric):
  scale, unit, digits = _unit(metric)
  words = (f"train {metric} {scale * curve['train']:.{digits}f} against validation "
           f"{scale * curve['validation']:.{digits}f} at step {curve['best_step']}, "
           f"a gap of {scale * curve['gap']:.{digits}f}{unit}").replace("-", "−")
  other = curve.get("best_step_by_loss", curve["best_step"])
  if other != curve["best_step"]:
    words += f" (the loss was lowest at step {other})"
  return words


def _finite(value):
  return isinstance(value, (int, float, np.number)) and bool(np.isfinite(value))
