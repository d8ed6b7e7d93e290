"""The page's results: every row of every split, what else was scored, and how it was taken."""

from ft.card import charts, seeds, words
from ft.card import elements as el
from ft.card.markup import h, join, name


def section(record):
  """The results of one valid record; None where there are none."""
  results, metric = record.get("results") or {}, record["task"]["metric"]
  splits = words.splits_in_order(record)
  if not splits:
    return None
  low, high = _scale([entry for split in splits for entry in results[split].values()], metric)
  unit = words.unit(metric)
  panels = [_panel(split, results[split], metric, low, high) for split in splits]
  signatures = record["task"].get("signatures")
  scored = el.details("How it was scored", el.tree_facts(signatures)) if signatures else None
  return join([h("div", panels, cls="figures"), _table(record, splits, unit), _resampled(record),
               seeds.section(record), _more_metrics(record), scored, _origin(record),
               _tradeoff(record)])


def _panel(split, entries, metric, low, high):
  rows = [(words.row_name(key), entries[key]["metrics"].get(metric),
           (entries[key].get("interval") or {}).get(metric), key == "fine-tuned")
          for key in words.rows_in_order(entries)]
  said = "; ".join(f"{label} {words.number(value, metric)} {words.interval(pair, metric)}"
                   for label, value, pair, _ in rows)
  count, unit = max(entry["n"] for entry in entries.values()), words.unit(metric)
  return el.figure([h("b", name(split)), f" {unit}, n = {count:,}"],
                   charts.intervals(rows, metric, low, high, f"{split}, {unit}: {said}"))


def _scale(entries, metric):
  """Ends of the shared scale of all interval panels."""
  values = [entry["metrics"].get(metric) for entry in entries]
  values += [v for entry in entries for v in (entry.get("interval") or {}).get(metric) or []]
  values = [v for v in values if words.finite(v)] or [0.0, 1.0]
  low, high = charts.span(values)
  return (max(low, 0.0), min(high, 1.0)) if words.is_share(metric) else (low, high)


def _table(record, splits, unit):
  results, metric = record["results"], record["task"]["metric"]
  names = words.rows_in_order({key: 0 for split in splits for key in results[split]})
  rows = []
  for key in names:
    cells = [el.cell(results[split].get(key), metric) for split in splits]
    rows.append(([words.row_name(key), *cells], "tuned" if key == "fine-tuned" else None))
  counts = [(f"{max(entry['n'] for entry in results[split].values()):,}", "n")
            for split in splits]
  rows.append((["rows (n)", *counts], "none"))
  return el.table(f"By split: {unit}, with 95 % interval",
                  ["", *[(name(split), "n") for split in splits]], rows)


def _more_metrics(record):
  rows = record["results"].get("test") or {}
  names = list(dict.fromkeys(key for entry in rows.values() for key in entry["metrics"]))
  names = sorted((key for key in names if "/" not in key),
                 key=lambda key: (key != record["task"]["metric"], key))
  if not names:
    return None
  order = words.rows_in_order(rows)
  body = [[words.metric_name(key), *[(words.number(rows[row]["metrics"].get(key), key), "n")
                                     for row in order]] for key in names]
  count = max(entry["n"] for entry in rows.values())
  return el.table(f"All metrics on test, n = {count:,} (shares in per cent)",
                  ["", *[(words.row_name(row), "n") for row in order]], body)


def _resampled(record):
  """How the metric was taken, what its intervals resample, and what those of forecasts hold."""
  said, made = [], record.get("intervals") or {}
  if record["task"].get("protocol"):
    said.append(f"Protocol: {record['task']['protocol']}.")
  if record["task"].get("resampled"):
    said.append(f"Intervals of scores resample {record['task']['resampled']}.")
  for split, share in (made.get("coverage") or {}).items():
    said.append(f"Forecast intervals that hold {100 * made['level']:.0f} % of validation hold "
                f"{100 * share:.1f} % of {split}.")
  return h("p", " ".join(said), cls="soft") if said else None


def _origin(record):
  """What every number of the page was computed from, for who checks it line by line."""
  config, best = record.get("config") or {}, record.get("best") or {}
  splits = (record.get("data") or {}).get("splits") or {}
  rows = {split: f"{splits[split]['rows']:,} rows" for split in ("train", "validation", "test")
          if split in splits}
  chosen = None
  if "step" in best:
    metric = best.get("metric", record["task"]["metric"])
    chosen = (f"step {best['step']:,}, the best of validation "
              f"({rows.get('validation', 'rows not recorded')}) by {words.metric_name(metric)}")
  drawn = (config.get("guard") or {}).get("overfit") or {}
  return el.details("Where these numbers come from", el.facts([
      ("trained on", rows.get("train")),
      ("chosen", chosen),
      ("judged on", ", ".join(filter(None, ["test", rows.get("test")]))
       + ", used once, after that choice"),
      ("rows' fingerprint", (splits.get("test") or {}).get("fingerprint")),
      ("intervals", "95 % percentile bootstrap over "
       + (record["task"].get("resampled") or "rows")
       + (f", {drawn['resamples']:,} resamples" if "resamples" in drawn else "")
       + "; differences are paired over the same rows"),
      ("seed of the run", config.get("seed"))]))


def _tradeoff(record):
  """Curves between pretrained and tuned weights, a panel a split, where a run measured them."""
  rows = record.get("tradeoff") or []
  metric = (record.get("best") or {}).get("metric", record["task"]["metric"])
  if not rows:
    return None
  chosen = next(row["alpha"] for row in rows if row["chosen"])
  panels = []
  for split in dict.fromkeys(key for row in rows for key in row["values"]):
    curve = [(row["alpha"], row["values"][split]) for row in rows
             if words.finite(row["values"].get(split))]
    if curve:
      said = ", ".join(f"{words.number(value, metric)} at {alpha:g}" for alpha, value in curve)
      svg = charts.lines([(split, curve, "one")], f"{split}, {words.unit(metric)}: {said}",
                         (chosen, f"chosen: {chosen:g}"), metric, "share of the tuned weights")
      panels.append(el.figure([h("b", name(split)), f" {words.unit(metric)}"], svg))
  return join([
    h("h3", "Between the pretrained and the tuned weights"),
    h("p", "The weights are mixed in each share (WiSE-FT); the share that is best on validation "
      "was judged on test and exported. Further splits show what was kept.", cls="soft"),
    h("div", panels, cls="figures")])
