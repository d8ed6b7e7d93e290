"""Several runs side by side on one page, paired wherever their test rows are the same."""

import numpy as np

from ft import stats
from ft.card import elements as el
from ft.card import words
from ft.card.markup import h, join, name

_OUTCOMES = {"gained": ("better", "good"), "lost": ("worse", "bad"),
             "did not gain": ("not told apart", "none"), "not measured": ("not measured", "none")}


def page(runs):
  """Several cards side by side.

  Args:
    runs: [(name, valid record)], at least two; the first is what the others are compared with.

  Returns:
    A whole HTML document (str).
  """
  title = f"Comparison of {len(runs)} runs"
  sections = [("verdict", "Verdict", _compared_pairs(runs)),
              ("guards", "Guards", _compared_guards(runs)),
              ("results", "Results", _compared_results(runs)),
              ("settings", "What was set differently", _compared_configs(runs))]
  head = h("header", h("p", "Fine-tuning card", cls="eyebrow"), h("h1", title),
           h("p", join([join([", " if i else "", name(record["title"]), " (", h("code", run), ")"])
                        for i, (run, record) in enumerate(runs)]), cls="soft"))
  body = [h("section", h("h2", text, id=f"{key}-title"), content, id=key,
            aria_labelledby=f"{key}-title") for key, text, content in sections]
  return el.document(title, join([head, h("main", body), el.footer(runs[0][1])]), "verdict")


def _compared_guards(runs):
  found = [record.get("guards") or {} for _, record in runs]
  labels = dict.fromkeys(label for guards in found for label in guards)
  rows = [[name(label), *[el.word(guards[label]["verdict"]) if label in guards else "–"
                          for guards in found]] for label in sorted(labels)]
  if not rows:
    return h("p", "No run has measured a risk.", cls="none")
  return el.table("What each guard found; the runs' own cards say why",
                  ["guard", *[name(run) for run, _ in runs]], rows)


def _compared_results(runs):
  splits = list(dict.fromkeys(s for _, record in runs for s in words.splits_in_order(record)))
  parts = []
  for metric in dict.fromkeys(record["task"]["metric"] for _, record in runs):
    rows = []
    for run, record in runs:
      if record["task"]["metric"] != metric:
        continue
      results = record.get("results") or {}
      for key in words.rows_in_order({k: 0 for s in splits for k in results.get(s) or {}}):
        cells = [el.cell((results.get(split) or {}).get(key), metric) for split in splits]
        rows.append(([name(run), words.row_name(key), *cells],
                     "tuned" if key == "fine-tuned" else None))
    unit = words.unit(metric)
    parts.append(el.table(f"By run and split: {unit}, with 95 % interval",
                          ["run", "", *[(name(split), "n") for split in splits]], rows))
  return join(parts) if splits else h("p", "No run has recorded results.", cls="none")


def _compared_pairs(runs):
  first = runs[0]
  rows = []
  for run in runs[1:]:
    for split in words.splits_in_order(run[1]):
      difference, reason = paired(run[1], first[1], split)
      if difference is None:
        rows.append([name(run[0]), name(split), el.word("not measured"), (reason, "long")])
      else:
        judged = words.judge(run[1], difference)
        shown, tone = _OUTCOMES[judged]
        rows.append([name(run[0]), name(split),
                     h("span", shown, cls=f"word {tone}"),
                     (f"{el.difference(difference)}, n = {difference['n']:,}", "long")])
  if not rows:
    return h("p", "Nothing to compare.", cls="none")
  caption = f"Fine-tuned model of each run minus that of {first[0]}, over the same rows"
  return el.table(caption, ["run", "split", "outcome", "difference or why there is none"], rows,
                  "stack")


def paired(record, other, split):
  """(difference row, None) of two runs' fine-tuned models on one split, or (None, why not)."""
  prints = [((r.get("data") or {}).get("splits") or {}).get(split, {}).get("fingerprint")
            for r in (record, other)]
  entries = [((r.get("results") or {}).get(split) or {}).get("fine-tuned") or {}
             for r in (record, other)]
  metrics = {r["task"]["metric"] for r in (record, other)}
  if len(metrics) > 1:
    return None, "the runs were selected by different metrics"
  if not all(entries):
    return None, "one of the runs has no result on this split"
  if not all(prints):
    return None, "the rows' fingerprint is not recorded, so they cannot be called the same"
  if prints[0] != prints[1]:
    return None, "the rows differ between the runs; compare the intervals above instead"
  scores = [_scores(entry) for entry in entries]
  if any(score is None for score in scores) or len(scores[0]) != len(scores[1]):
    return None, "the rows are the same, but scores by row are not recorded"
  if entries[0].get("blocks") != entries[1].get("blocks"):
    return None, "the rows are the same, but what is resampled together is not"
  metric = metrics.pop()
  if not all(np.isclose(score.mean(), _value(entry, metric), rtol=1e-5, atol=1e-6)
             for score, entry in zip(scores, entries, strict=True)):
    return None, f"{words.metric_name(metric)} is no mean over rows; scores by row cannot give it"
  blocks = entries[0].get("blocks")
  blocks = np.array(blocks.split(), np.float64) if blocks else None
  difference, lo, hi = stats.paired_bootstrap(*scores, blocks=blocks)
  return {"metric": metric, "difference": difference, "lo": lo, "hi": hi,
          "n": len(scores[0])}, None


def _scores(entry):
  """(N,) score of each row as it was recorded, or None; see `guards.overfit.results`."""
  if entry.get("scores"):
    return np.frombuffer(entry["scores"].encode(), np.uint8).astype(np.float64) - ord("0")
  return np.array(entry["values"].split(), np.float64) if entry.get("values") else None


def _value(entry, metric):
  value = entry["metrics"].get(metric)
  return value if words.finite(value) else np.nan


def _compared_configs(runs):
  flat = [dict(el.flat(record.get("config") or {})) for _, record in runs]
  keys = [key for key in dict.fromkeys(key for config in flat for key in config)
          if len({el.value(config.get(key)) for config in flat}) > 1]
  if not keys:
    return h("p", "The configs are the same.")
  rows = [[h("code", key), *[h("code", el.value(config[key]) if key in config else "–")
                             for config in flat]] for key in keys]
  return el.table("Config keys that differ", ["key", *[name(run) for run, _ in runs]], rows)

