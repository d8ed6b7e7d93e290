"""What a card says in sentences: one wording for the page and for the terminal."""

import math

from ft import guards
from ft.guards import overfit

_ORDER = ("gained", "did not gain", "lost", "not measured")
METRICS = {"top5_accuracy": "top-5 accuracy", "macro_f1": "macro-F1", "auroc": "AUROC",
           "log_loss": "log-loss", "ece": "ECE",
           "nats_per_token": "nats/token", "bits_per_byte": "bits/byte",
           "bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2",
           "rouge_l": "ROUGE-L", "kl_to_reference": "KL to the reference, nats/token (estimate)",
           "entity_f1": "entity F1", "mrr": "MRR", "ndcg@10": "nDCG@10", "hr@10": "HR@10",
           "sensitivity_at_specificity": "sensitivity at the asked specificity, on its own ROC",
           "f1": "F1 at the threshold", "pixel_auroc": "AUROC of pixels", "pro": "PRO up to 30 %",
           "miou": "mean IoU",
           "mae": "MAE", "rmse": "RMSE", "mse": "MSE", "mase": "MASE", "crps": "CRPS",
           "wql": "WQL", "mape": "MAPE, %", "mae_original": "MAE, own units",
           "rmse_original": "RMSE, own units", "r2": "R²", "spearman": "Spearman's ρ",
           "unknown_auroc": "AUROC of known against unknown (softmax)",
           "unknown_auroc_energy": "AUROC of known against unknown (energy)"}


def row_name(name):
  """Name of a results row as a reader sees it."""
  return guards.NAMES.get(name, name)


def metric_name(name):
  """Name of a metric as a reader sees it."""
  return METRICS.get(name, name.replace("_", " "))


def is_share(metric):
  """Whether a metric is a share that is shown in per cent."""
  return metric in overfit.SHARES or metric.startswith(("recall", "hr@", "ndcg@"))


def unit(metric):
  """A metric's name with its unit: "accuracy, %"."""
  return f"{metric_name(metric)}, %" if is_share(metric) else metric_name(metric)


def number(value, metric):
  """A metric's value: "86.5" for shares (per cent), three decimals otherwise, "–" for none."""
  if not finite(value):
    return "–"
  text = f"{100 * value:.1f}" if is_share(metric) else f"{value:.3f}"
  return text.replace("-", "−")


def interval(pair, metric):
  """"[84.9, 88.0]", or "" where there is none."""
  if not pair or not all(finite(value) for value in pair):
    return ""
  return f"[{number(pair[0], metric)}, {number(pair[1], metric)}]"


def finite(value):
  """Whether value is a number that can be shown."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def rows_in_order(rows):
  """Row names of a results table: majority, probe, other baselines, fine-tuned."""
  first = [name for name in (guards.MAJORITY, guards.PROBE) if name in rows]
  last = [guards.TUNED] if guards.TUNED in rows else []
  return first + [name for name in rows if name not in first + last] + last


def splits_in_order(record):
  """Splits of the results for show: test first, then the rest; train and validation are left out.

  A choice was made on validation and the model saw train, so neither is evidence of a gain.
  """
  splits = [name for name in record.get("results") or {} if name not in ("train", "validation")]
  return sorted(splits, key=lambda name: name != "test")


def headline(record, split):
  """(baseline name, difference row) that the verdict of a split is about, or (None, None)."""
  rows = (record.get("differences") or {}).get(split) or {}
  rows = {key: row for key, row in rows.items() if key.startswith(f"{guards.TUNED} - ")}
  mode = (record.get("task") or {}).get("mode") or "max"
  return overfit.headline(rows, mode) if rows else (None, None)


def judge(record, row):
  """The verdict of a difference row, "not measured" where its interval is not defined."""
  if not finite(row["lo"]) or not finite(row["hi"]):
    return "not measured"
  mode = (record.get("task") or {}).get("mode") or "max"
  return row.get("verdict") or overfit.judge(row["lo"], row["hi"], mode)


def verdict(record, split):
  """One sentence: what was gained on a split over the frozen probe, with the interval."""
  baseline, row = headline(record, split)
  if row is None:
    return f"Fine-tuning on {split}: not measured, no baseline was compared on the same rows."
  found = judge(record, row)
  if found == "not measured":
    return f"Fine-tuning on {split}: not measured, the interval is not defined (n = {row['n']})."
  return (f"Fine-tuning {found} on {split}: {amount(row)} over the {row_name(baseline)} "
          f"(n = {row['n']:,}).")


def amount(row):
  """A difference row's difference and interval with what they are of: "+8.1 points [6.5, 9.9] of
  accuracy", "−0.412 nats/token [−0.440, −0.391]"."""
  metric = row["metric"]
  said = overfit.signed(row, metric)
  return said if metric in overfit.UNITS else f"{said} of {metric_name(metric)}"


def verdicts(record):
  """[(split, verdict word, sentence)] for every split shown."""
  found = []
  for split in splits_in_order(record):
    row = headline(record, split)[1]
    word = judge(record, row) if row else "not measured"
    found.append((split, word, verdict(record, split)))
  return found


def conclusion(record):
  """The whole verdict in a sentence or two: test first, then the other splits by outcome."""
  test = headline(record, "test")
  if test[1] is None:
    return "Whether fine-tuning gained anything on test was not measured."
  baseline, row = test
  change, found = amount(row), judge(record, row)
  text = f"Fine-tuning {found} {change} on test over the {row_name(baseline)}"
  if found == "did not gain":
    text = f"Fine-tuning did not gain on test over the {row_name(baseline)}: {change}"
  elif found == "not measured":
    text = "Whether fine-tuning gained anything on test was not measured"
  parts = {}
  for split, word, _ in verdicts(record):
    if split != "test":
      row = headline(record, split)[1]
      shown = "" if word == "not measured" else " " + overfit.signed(row, row["metric"])
      parts.setdefault(word, []).append(split + shown.replace(" points", ""))
  if not parts:
    return text + "."
  elsewhere = "; ".join(f"{word}: {', '.join(parts[word])}" for word in _ORDER if word in parts)
  return f"{text}. Elsewhere, {elsewhere}."
