"""The card as one self-contained page: no network, no script, readable on paper and on a phone.

Every section is always there; what a run did not record is said in its place.
"""

import math

from ft import stats
from ft.card import charts, evidence, pictures, samples, screening, seeds, words
from ft.card import elements as el
from ft.card.markup import h, join, name
from ft.guards import cost

FEW_LABELS = 20  # Up to here the confusion matrix is drawn in full.
_LONGEST_EXAMPLE = 4000
_LONGEST_LIST = 200

_WEIGHT = ("alarm", "warning", "ok", "not measured")


def page(record):
  """The card of one valid, normalised record as a whole HTML document (str)."""
  sections = [("verdict", "Verdict", _verdict), ("results", "Results", _results),
              ("learning", "Learning curves", _learning), ("errors", "Where it errs", _errors),
              ("samples", "Samples", _samples),
              ("calibration", "Calibration", _calibration), *evidence.sections(),
              ("data", "Data", _data),
              ("trained", "What was trained", _trained), ("loading", "What was loaded", _loading),
              ("cost", "Cost", _cost), ("reproduce", "Reproduce", _reproduce)]
  links = h("nav", h("ul", [h("li", h("a", title, href=f"#{key}")) for key, title, _ in sections]),
            aria_label="Sections of this card")
  body = [h("section", h("h2", title, id=f"{key}-title"),
            build(record) or h("p", "Not recorded in this run.", cls="none"),
            id=key, aria_labelledby=f"{key}-title") for key, title, build in sections]
  return el.document(record["title"], join([_header(record, links), h("main", body),
                                            el.footer(record)]))


def _header(record, links):
  model, task, numbers = record.get("model") or {}, record["task"], _cost_numbers(record)
  facts = [model.get("source"), model.get("family"),
           task["name"] + (f", {len(task['labels'])} labels" if task.get("labels") else ""),
           (record.get("created") or "")[:16].replace("T", " "),
           cost.duration(numbers["wall_seconds"]) if numbers.get("wall_seconds") else None]
  shown = [fact for fact in facts if fact]
  return h("header", h("p", "Fine-tuning card", cls="eyebrow"), h("h1", name(record["title"])),
           h("p", join([[" · " if i else "", name(fact)] for i, fact in enumerate(shown)]),
             cls="soft"),
           [h("p", note, cls="note", role="note") for note in record.get("notes") or []], links)


# ---- Verdict and results -------------------------------------------------------------------------


def _verdict(record):
  rows = []
  for split, word, _ in words.verdicts(record):
    baseline, row = words.headline(record, split)
    if row is None:
      rows.append([name(split), el.word(word), ("no baseline on the same rows", "long")])
      continue
    rows.append([name(split), el.word(word), (el.difference(row), "long"),
                 (f"over the {words.row_name(baseline)}", ""), (f"n = {row['n']:,}", "none")])
  parts = [h("p", words.conclusion(record), cls="conclusion")]
  if rows:
    caption = "Fine-tuned minus baseline on the same rows, with its 95 % interval"
    parts.append(el.table(caption, None, rows, "stack"))
  by_weight = sorted((record.get("guards") or {}).items(),
                     key=lambda item: (_WEIGHT.index(item[1]["verdict"]), item[0]))
  found = [[label, el.word(guard["verdict"]), (guard["words"], "long")]
           for label, guard in by_weight]
  if found:
    parts.append(el.table("Guards: one risk of fine-tuning each", None, found, "stack"))
  return join(parts)


def _results(record):
  results, metric = record.get("results") or {}, record["task"]["metric"]
  splits = words.splits_in_order(record)
  if not splits:
    return None
  low, high = _scale([entry for split in splits for entry in results[split].values()], metric)
  unit = words.unit(metric)
  panels = []
  for split in splits:
    rows = [(words.row_name(key), results[split][key]["metrics"].get(metric),
             (results[split][key].get("interval") or {}).get(metric), key == "fine-tuned")
            for key in words.rows_in_order(results[split])]
    said = "; ".join(f"{label} {words.number(value, metric)} {words.interval(pair, metric)}"
                     for label, value, pair, _ in rows)
    count = max(entry["n"] for entry in results[split].values())
    panels.append(el.figure([h("b", name(split)), f" {unit}, n = {count:,}"],
                          charts.intervals(rows, metric, low, high, f"{split}, {unit}: {said}")))
  signatures = record["task"].get("signatures")
  scored = el.details("How it was scored", el.tree_facts(signatures)) if signatures else None
  return join([h("div", panels, cls="figures"), _results_table(record, splits, unit),
               seeds.section(record), _more_metrics(record), _resampled(record), scored,
               _tradeoff(record)])


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


def _scale(entries, metric):
  """Ends of the shared scale of all interval panels."""
  values = [entry["metrics"].get(metric) for entry in entries]
  values += [v for entry in entries for v in (entry.get("interval") or {}).get(metric) or []]
  values = [v for v in values if words.finite(v)] or [0.0, 1.0]
  low, high = charts.span(values)
  return (max(low, 0.0), min(high, 1.0)) if words.is_share(metric) else (low, high)


def _results_table(record, splits, unit):
  results, metric = record["results"], record["task"]["metric"]
  names = words.rows_in_order({key: 0 for split in splits for key in results[split]})
  rows = []
  for key in names:
    cells = [el.cell(results[split].get(key), metric) for split in splits]
    rows.append(([words.row_name(key), *cells], "tuned" if key == "fine-tuned" else None))
  return el.table(f"{unit[0].upper()}{unit[1:]} with 95 % interval, by split",
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
  return el.table("All metrics on test (shares in per cent)",
                  ["", *[(words.row_name(row), "n") for row in order]], body)


def _samples(record):
  """What was written for rows of test, and what was seen on them."""
  parts = [part for part in (samples.section(record), pictures.section(record)) if part]
  return join(parts) if parts else None


# ---- Learning, errors, calibration ---------------------------------------------------------------


def _learning(record):
  history, best = record.get("history") or [], record.get("best") or {}
  metric = best.get("metric", record["task"]["metric"])
  mark = (best["step"], f"kept: {best['step']:,}") if "step" in best else None
  kinds = {"loss": ("loss", "log_loss"), metric: (metric,)}
  panels = [_learning_panel(history, label, keys, mark) for label, keys in kinds.items()]
  panels = [panel for panel in panels if panel]
  if not panels:
    return None
  kept = None
  if mark:
    kept = h("p", f"The checkpoint of step {best['step']:,} was kept, where validation "
             f"{words.metric_name(metric)} was best ({words.number(best.get('value'), metric)}).",
             cls="soft")
  return join([h("div", panels, cls="figures"), kept])


def _learning_panel(history, label, keys, mark):
  series = [(split, _curve(history, [f"{split}/{key}" for key in keys]), cls)
            for split, cls in (("train", "two"), ("validation", "one"))]
  series = [(split, curve, cls) for split, curve, cls in series if curve]
  if not series:
    return None
  said = "; ".join(f"{split} from {words.number(curve[0][1], label)} at step {curve[0][0]} to "
                   f"{words.number(curve[-1][1], label)} at step {curve[-1][0]}"
                   for split, curve, _ in series)
  said = f"{words.metric_name(label)} by step: {said}"
  return el.figure(h("b", words.unit(label)), charts.lines(series, said, mark, label))


def _curve(history, keys, most=300):
  """[(step, value)] of the first key that occurs, thinned to about `most` points."""
  for key in keys:
    points = [(row["step"], row[key]) for row in history
              if words.finite(row.get(key)) and words.finite(row.get("step"))]
    if points:
      stride = math.ceil(len(points) / most)
      return points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
  return []


def _errors(record):
  confusion = record.get("confusion") or {}
  labels, matrix = confusion.get("labels") or [], confusion.get("matrix") or []
  total = sum(sum(row) for row in matrix)
  if not total:
    return screening.section(record)
  parts = [_matrix(labels, matrix)] if len(labels) <= FEW_LABELS else []
  pairs = sorted(((count, t, p) for t, row in enumerate(matrix) for p, count in enumerate(row)
                  if t != p and count), reverse=True)
  if pairs and len(labels) > 2:
    rows = [[name(labels[t]), (name(labels[p]), "long"), (f"{count:,}", "n"),
             (f"{100 * count / sum(matrix[t]):.0f} %", "n")] for count, t, p in pairs[:12]]
    parts.append(el.table("Most frequent confusions on test",
                          ["true label", "predicted", ("rows", "n"), ("of its label", "n")], rows))
  if not pairs:
    parts.append(h("p", f"No error on {total:,} test rows."))
  parts += [_recalls(labels, matrix), screening.section(record)]
  return join(parts)


def _matrix(labels, matrix):
  rows = []
  for label, counts in zip(labels, matrix, strict=True):
    total = sum(counts) or 1
    cells = [h("td", f"{count:,}", style=f"--s:{count / total:.3f}") for count in counts]
    rows.append(h("tr", h("th", name(label), scope="row"), cells))
  caption = "Test rows by true label (down) and predicted label (across); shade is share of the row"
  head = h("tr", h("th", "true \\ predicted", scope="col", cls="none"),
           [h("th", name(label), scope="col") for label in labels])
  table = h("table", h("caption", caption), h("thead", head), h("tbody", rows), cls="matrix")
  return el.scroll(caption, table)


def _recalls(labels, matrix, most=10):
  rows = []
  for i, counts in enumerate(matrix):
    if sum(counts):
      rows.append((counts[i] / sum(counts), labels[i], stats.wilson(counts[i], sum(counts)),
                   sum(counts)))
  rows = sorted(rows, key=lambda row: (row[0], row[1]))
  body = [[name(label), (f"{100 * share:.1f}", "n"),
           (f"[{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]", "n"),
           (join([f"{n:,}", " *" if n < 30 else ""]), "n")]
          for share, label, pair, n in rows[:most]]
  few = any(n < 30 for *_, n in rows[:most])
  which = f"the {most} hardest of {len(rows)} labels" if len(rows) > most else "every label"
  return el.table(f"Recall on test, {which}, in per cent with Wilson interval"
                  + (" (* fewer than 30 rows)" if few else ""),
                  ["label", ("recall", "n"), ("95 %", "n"), ("rows", "n")], body)


def _calibration(record):
  found = record.get("calibration") or {}
  if not found:
    guard = (record.get("guards") or {}).get("calibrate") or {}
    found = guard.get("numbers") or {}
    if not found:
      return h("p", guard["words"], cls="none") if guard.get("words") else None
  kinds = [(label, found[key], cls) for label, key, cls in
           (("as trained", "before", "two"), ("after temperature", "after", "one"))
           if found.get(key)]
  if not kinds:
    return None
  tables = [(label, kind["reliability"], cls) for label, kind, cls in kinds
            if kind.get("reliability")]
  said = "; ".join(f"{label}: calibration error {words.number(kind.get('ece'), 'accuracy')} points"
                   for label, kind, _ in kinds)
  parts = []
  if tables:
    caption = [h("b", "Accuracy, %"), " by confidence on test; on the dashed line the two agree"]
    parts.append(h("div", el.figure(caption, charts.reliability(tables, f"Reliability. {said}")),
                   cls="figures"))
  rows = [[label, *[(words.number(kind.get(key), unit), "n") for key, unit in
                    (("ece", "accuracy"), ("ece_equal_mass", "accuracy"), ("log_loss", ""),
                     ("brier", ""))]] for label, kind, _ in kinds]
  temperature = found.get("temperature")
  caption = "Calibration on test" + (f"; temperature {temperature:.3f}, fitted on validation"
                                     if words.finite(temperature) else "")
  parts.append(el.table(caption, ["", ("ECE, points", "n"), ("ECE, equal mass", "n"),
                                  ("log-loss", "n"), ("Brier", "n")], rows))
  if tables:
    parts.append(el.details("Bins of the plot", [_bins(*table[:2]) for table in tables]))
  return join(parts)


def _bins(label, table):
  rows = [[(words.number(c, "accuracy"), "n"), (words.number(a, "accuracy"), "n"), (f"{n:,}", "n")]
          for c, a, n in zip(table["confidence"], table["accuracy"], table["count"], strict=True)]
  return el.table(f"Bins of confidence, {label} (per cent)",
                  [("confidence", "n"), ("accuracy", "n"), ("rows", "n")], rows)


# ---- Data, model, cost ---------------------------------------------------------------------------


def _data(record):
  data = record.get("data") or {}
  splits = _canonical(data.get("splits") or {})
  parts = []
  if splits:
    parts.append(_split_table(splits, record["task"].get("labels") or []))
  if data.get("counts"):
    parts += [h("h3", "Rows changed or left out"), el.tree_facts(data["counts"])]
  example = data.get("first_example")
  if example:
    shown = example[:_LONGEST_EXAMPLE]
    cut = f" (first {_LONGEST_EXAMPLE:,} characters)" if len(example) > len(shown) else ""
    parts += [h("h3", f"First training example, as the model sees it{cut}"),
              h("pre", shown, dir="auto")]
  if data.get("report"):
    parts.append(el.details("What loading the data found", el.tree_facts(data["report"])))
  return join(parts) if parts else None


def _canonical(splits):
  """Splits in the order of their use: train, validation, test, then the others by name."""
  first = [key for key in ("train", "validation", "test") if key in splits]
  return {key: splits[key] for key in first + sorted(set(splits) - set(first))}


def _split_table(splits, known):
  counted = {label for split in splits.values() for label in split.get("labels") or {}}
  labels = [label for label in known if label in counted] + sorted(counted - set(known))
  head = ["", *[(name(split), "n") for split in splits]]
  rows = [["rows", *[(f"{split['rows']:,}", "n") for split in splits.values()]]]
  by_label = [[name(label), *[(f"{(split.get('labels') or {}).get(label, 0):,}", "n")
                              for split in splits.values()]] for label in labels]
  if len(labels) <= FEW_LABELS:
    return el.table("Rows of each split, and of each label in it", head, rows + by_label)
  for kind, pick in (("smallest label", min), ("largest label", max)):
    rows.append([kind, *[(f"{pick(split['labels'].values()):,}" if split.get("labels") else "–",
                          "n") for split in splits.values()]])
  return join([el.table(f"Rows of each split, {len(labels)} labels", head, rows),
               el.details(f"Rows of each of the {len(labels)} labels",
                          el.table("Rows by label", head, by_label))])


def _trained(record):
  model = record.get("model") or {}
  parameters, trainable = model.get("parameters"), model.get("trainable")
  share = model.get("share")
  if share is None and parameters and trainable is not None:
    share = trainable / parameters
  facts = el.facts([
      ("model", name(model["source"]) if model.get("source") else None),
      ("family", name(model["family"]) if model.get("family") else None),
      ("parameters", f"{parameters:,}" if parameters is not None else None),
      ("trained", f"{trainable:,}" if trainable is not None else None),
      ("share", cost.percent(share) if words.finite(share) else None)])
  rows = [_trained_row(row) for row in (model.get("table") or [])[:_LONGEST_LIST]]
  table = None
  if rows:
    table = el.details(f"Trained parameter arrays ({len(model['table']):,})",
                       el.table("Trained parameters", ["path", "shape", ("count", "n")], rows))
  return join([facts, table]) if facts or table else None


def _trained_row(row):
  path, shape, count = ((row.get("path"), row.get("shape"), row.get("count"))
                        if isinstance(row, dict) else (*row, None, None)[:3])
  shape = " × ".join(str(side) for side in shape) if isinstance(shape, list) else shape
  return [h("code", path), shape if shape not in (None, "") else "scalar",
          (f"{count:,}" if isinstance(count, int) else "", "n")]


def _loading(record):
  report = (record.get("model") or {}).get("load_report") or {}
  if not report:
    return None
  parts = [el.facts([(key, f"{len(value):,}" if isinstance(value, (list, dict)) else value)
                   for key, value in report.items()])]
  parts += [el.details(f"{key} ({len(value):,})",
                       h("pre", "\n".join(_line(item) for item in list(value)[:_LONGEST_LIST])
                         + ("\n…" if len(value) > _LONGEST_LIST else "")))
            for key, value in report.items() if isinstance(value, (list, dict)) and value]
  return join(parts)


def _line(item):
  return " ↔ ".join(str(part) for part in item) if isinstance(item, list) else str(item)


def _cost_numbers(record):
  guard = (record.get("guards") or {}).get("cost") or {}
  return record.get("cost") or guard.get("numbers") or {}


def _cost(record):
  numbers = _cost_numbers(record)
  if not numbers:
    return None
  phases = numbers.get("phases") or {}
  total = sum(phases.values())
  parts = []
  if total:
    rows = [[name(phase), (cost.duration(seconds), "n"), (f"{100 * seconds / total:.0f} %", "n")]
            for phase, seconds in sorted(phases.items(), key=lambda item: -item[1])]
    rows.append((["in all", (cost.duration(total), "n"), ("", "n")], "tuned"))
    parts.append(el.table("Wall time by phase", ["phase", ("time", "n"), ("share", "n")], rows))
  parts.append(el.facts([(label, form(numbers[key])) for key, label, form in _COSTS
                       if words.finite(numbers.get(key))]))
  return join(parts)


_COSTS = (
    ("examples", "training examples seen", "{:,}".format),
    ("steps", "training steps", "{:,}".format),
    ("examples_per_second", "examples per second", "{:.1f}".format),
    ("compile_seconds", "compilation", cost.duration),
    ("data_wait_share", "waiting for data", lambda share: f"{100 * share:.1f} % of the loop"),
    ("peak_host_bytes", "peak host memory", cost.size),
    ("peak_bytes", "peak device memory", cost.size),
    ("checkpoint_bytes", "checkpoint", cost.size),
    ("devices", "devices", "{:,}".format),
)


def _reproduce(record):
  parts = []
  if record.get("command"):
    parts += [h("h3", "Command"), h("pre", record["command"])]
  if record.get("versions"):
    parts += [h("h3", "Versions"), el.tree_facts(record["versions"])]
  if record.get("config"):
    rows = [[h("code", key), (h("code", el.value(value)), "long")]
            for key, value in el.flat(record["config"])]
    parts.append(el.details("Config, defaults included",
                            el.table("Config", ["key", "value"], rows)))
  if record.get("missing"):
    parts.append(el.details("Numbers without a value", el.tree_facts(record["missing"])))
  return join(parts) if parts else None
