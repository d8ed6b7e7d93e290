"""What a card says in sentences: one wording for the page and for the terminal."""

import math

from ft import guards
from ft.guards import overfit

_WEIGHT = ("alarm", "warning", "ok", "not measured")
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


def by_use(splits):
  """A dict by split in the order of their use: train, validation, test, then the others by name."""
  first = [key for key in ("train", "validation", "test") if key in splits]
  return {key: splits[key] for key in first + sorted(set(splits) - set(first))}


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


def subject(record):
  """What gained or lost: fine-tuning, but of runs in which no weights train, such as a bank."""
  return "The run" if (record.get("model") or {}).get("trainable") == 0 else "Fine-tuning"


def verdict(record, split):
  """One sentence: what was gained on a split over the frozen probe, with the interval."""
  baseline, row = headline(record, split)
  who = subject(record)
  if row is None:
    return f"{who} on {split}: not measured, no baseline was compared on the same rows."
  found = judge(record, row)
  if found == "not measured":
    return f"{who} on {split}: not measured, the interval is not defined (n = {row['n']})."
  return (f"{who} {found} on {split}: {amount(row)} over the {row_name(baseline)} "
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
  baseline, row = headline(record, "test")
  who = subject(record)
  asked = f"Whether {who[0].lower()}{who[1:]} gained anything on test was not measured"
  if row is None:
    return f"{asked}."
  found = judge(record, row)
  if found == "not measured":
    text = f"{asked} (n = {row['n']:,})"
  else:
    text = f"{who} {found} on test: {_against(record, baseline, row)}"
  parts = [f"{word} on {_listed(splits)}" for word, splits in _elsewhere(record, most=4).items()]
  return f"{text}. Elsewhere it {', '.join(parts)}." if parts else f"{text}."


def elsewhere(record):
  """The outcome on the splits beside test in a sentence with their differences, or ""."""
  parts = []
  for word, splits in _elsewhere(record, most=3, differences=True).items():
    parts.append(f"{word}: {', '.join(splits)}")
  return f"Elsewhere, {'; '.join(parts)}." if parts else ""


def by_weight(record):
  """[(guard name, its result)], gravest first."""
  return sorted((record.get("guards") or {}).items(),
                key=lambda item: (_WEIGHT.index(item[1]["verdict"]), item[0]))


def tally(record):
  """Verdict -> names of the guards that found it, gravest first; verdicts of none left out."""
  found = {}
  for name, guard in by_weight(record):
    found.setdefault(guard["verdict"], []).append(name)
  return found


def shortened(text, most):
  """A sentence on one line, cut after a word where it is longer than `most` characters."""
  text = " ".join(text.split())
  return text if len(text) <= most else text[:most].rsplit(" ", 1)[0].rstrip(",;:.") + " …"


def _against(record, baseline, row):
  """"accuracy 86.5 % against 78.3 % of the frozen probe (+8.1 points [6.9, 9.4], n = 2,001)"."""
  entries, metric = (record.get("results") or {}).get("test") or {}, row["metric"]
  values = [(entries.get(name) or {}).get("metrics", {}).get(metric)
            for name in (guards.TUNED, baseline)]
  if not all(finite(value) for value in values):
    return f"{amount(row)} over the {row_name(baseline)} (n = {row['n']:,})"
  first, second = (number(value, metric) + " %" * is_share(metric) for value in values)
  better = "lower is better, " if (record["task"].get("mode") or "max") == "min" else ""
  return (f"{metric_name(metric)} {first} against {second} of the {row_name(baseline)} "
          f"({better}{overfit.signed(row, metric)}, n = {row['n']:,})")


def _elsewhere(record, most, differences=False):
  """Outcome -> the splits beside test that have it, at most `most` of them by name."""
  found = {}
  for split, word, _ in verdicts(record):
    if split != "test":
      row = headline(record, split)[1]
      known = differences and word != "not measured"
      shown = " " + overfit.signed(row, row["metric"]).replace(" points", "") if known else ""
      found.setdefault(word, []).append(split + shown)
  found = {word: found[word] for word in _ORDER if word in found}
  return {word: splits if len(splits) <= most else
          [*splits[:most - 1], f"{len(splits) - most + 1} more"] for word, splits in found.items()}


def _listed(names):
  """"a", "a and b", "a, b and c"."""
  return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
