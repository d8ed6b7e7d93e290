"""The card as one self-contained page: no network, no script, readable on paper and on a phone.

Every section is always there; what a run did not record is said in its place.
"""

import math

from absl import logging

from ft import stats
from ft.card import charts, evidence, pictures, results, samples, screening, verdict, words
from ft.card import elements as el
from ft.card.markup import h, join, name
from ft.guards import cost

FEW_LABELS = 20  # Up to here the confusion matrix is drawn in full.
_LONGEST_EXAMPLE = 4000
_LONGEST_LIST = 200


def page(record):
  """The card of one valid, normalised record as a whole HTML document (str)."""
  sections = [("results", "Results", results.section),
              ("learning", "Learning curves", _learning), ("errors", "Where it errs", _errors),
              ("samples", "Samples", _samples),
              *evidence.sections(),
              ("data", "Data", _data),
              ("trained", "What was trained", _trained), ("loading", "What was loaded", _loading),
              ("reproduce", "Reproduce", _reproduce)]
  top = verdict.section(record, [key for key, *_ in sections])
  body = [_section(record, *section) for section in sections]
  return el.document(record["title"], join([
      _header(record), h("main", top, _contents(sections), body), el.footer(record)]), "verdict")


def _section(record, key, title, build):
  """One section; results and what a guard raised start unfolded."""
  found = verdict.sections_of_guards(record).get(key)
  guard = (record.get("guards") or {}).get(key) or {}
  content = _built(record, key, build)
  if not content or guard and not guard.get("numbers"):  # Then its words are all there is.
    said = guard.get("words") or "Not recorded in this run."
    return h("section", h("h2", title, id=f"{key}-title"), h("p", said, cls="none"), id=key,
             aria_labelledby=f"{key}-title", cls="empty")
  unfolded = key == "results" or found is not None and verdict.raised(found)
  return el.folded(key, title, content, unfolded, el.word(found) if found else None)


def _built(record, key, build):
  """What stands in a section; a fault in drawing it must not cost the user a finished run."""
  try:
    return build(record)
  except Exception as error:  # noqa: BLE001
    logging.exception("the section %s of the card failed", key)
    return h("p", f"This part could not be drawn ({type(error).__name__}: {error}); its numbers "
             "are in card.json.", cls="note")


def _contents(sections):
  """Links to the sections, and the switch that unfolds all of them by style sheet alone."""
  links = [h("li", h("a", title, href=f"#{key}")) for key, title, _ in sections]
  switch = h("label", h("input", type="checkbox", id="all"), " Unfold everything", cls="all")
  return h("nav", h("ul", links), switch, aria_label="Evidence")


def _header(record):
  model, task, numbers = record.get("model") or {}, record["task"], _cost_numbers(record)
  facts = [model.get("source"), model.get("family"),
           task["name"] + (f", {len(task['labels'])} labels" if task.get("labels") else ""),
           (record.get("created") or "")[:16].replace("T", " "),
           cost.duration(numbers["wall_seconds"]) if numbers.get("wall_seconds") else None]
  shown = [fact for fact in facts if fact]
  return h("header", h("p", "Fine-tuning card", cls="eyebrow"), h("h1", name(record["title"])),
           h("p", join([[" · " if i else "", name(fact)] for i, fact in enumerate(shown)]),
             cls="soft"),
           [h("p", note, cls="note", role="note") for note in record.get("notes") or []])


def _samples(record):
  """What was written for rows of test, and what was seen on them."""
  parts = [part for part in (samples.section(record), pictures.section(record)) if part]
  return join(parts) if parts else None


# ---- Learning, errors ----------------------------------------------------------------------------


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
  return join([h("div", panels, cls="figures"), kept, _gap(record, metric)])


def _gap(record, metric):
  """How far train and validation are apart, and which step each measure would keep."""
  found = ((record.get("guards") or {}).get("overfit") or {}).get("numbers") or {}
  if not words.finite(found.get("gap")):
    return None
  rows = [[label, (words.number(found.get(key), metric), "n")] for key, label in (
      ("train", "train at the best step"), ("validation", "validation at the best step"),
      ("gap", "gap at the best step"), ("gap_slope", "growth of the gap at each evaluation"))]
  rows += [[f"best step by {label}", (f"{found[key]:,}", "n")] for key, label in (
      ("best_step", words.metric_name(metric)), ("best_step_by_loss", "loss")) if key in found]
  return el.table(f"Train against validation, {words.unit(metric)}, both in evaluation mode",
                  None, rows)


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


# ---- Data, model ---------------------------------------------------------------------------------


def _data(record):
  data = record.get("data") or {}
  splits = words.by_use(data.get("splits") or {})
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
