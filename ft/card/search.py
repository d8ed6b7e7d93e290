"""The account of a search for settings: a page with every trial, and lines for the terminal."""

from ft.card import charts, words
from ft.card import elements as el
from ft.card.markup import h, join, name
from ft.guards import cost

_MOST_PANELS = 8


def page(record):
  """The whole HTML document of what `sweep.Sweep.record` gives."""
  metric, rows = record["metric"], ranked(record)
  head = h("header", h("p", "Search for settings", cls="eyebrow"), h("h1", name(record["title"])),
           h("p", conclusion(record), cls="conclusion"),
           h("p", "Everything here is of validation. The test rows are judged for the winner "
             "alone, on its own card.", cls="soft"))
  keys = list(dict.fromkeys(key for row in rows for key in row.get("point", {})))
  table = el.table(
      "Trials, best first", ["trial", (words.unit(metric), "n"), "", *keys, ("step", "n"),
                             ("time", "n")],
      [([str(row["number"]), (words.number(row["value"], metric), "n"), _state(row),
         *[_setting(row, key) for key in keys], (str(row.get("best_step", "–")), "n"),
         (cost.duration(row["seconds"]) if row.get("seconds") else "–", "n")],
        "tuned" if row["number"] == record["best"] else None) for row in rows])
  figures = [*_panels(record, rows, keys, metric), _progress(record, metric)]
  sections = [h("section", h("h2", "Settings and what they gave"),
                h("div", [figure for figure in figures if figure], cls="figures")),
              h("section", h("h2", "Trials"), table)]
  return el.document(record["title"], join([head, h("main", sections)]))


def lines(record, most=12):
  """The best trials as lines of text."""
  metric = record["metric"]
  found = [f"{'trial':>5}  validation {words.unit(metric)}"]
  for row in ranked(record)[:most]:
    said = " ".join(f"{key}={_short(value)}" for key, value in row.get("point", {}).items())
    found.append(f"{row['number']:>5}  {words.number(row['value'], metric):>8}  "
                 f"{row['state']:<8}  {said}".rstrip())
  return "\n".join(found)


def ranked(record):
  """The trials, those that went to their end first, each kind by its value."""
  sign = 1 if record["mode"] == "max" else -1
  return sorted(record["trials"], key=lambda row: (
      row["state"] != "complete", row["value"] is None, -sign * (row["value"] or 0), row["number"]))


def conclusion(record):
  """What won, in a sentence."""
  best = next((row for row in record["trials"] if row["number"] == record["best"]), None)
  whole = sum(row["state"] == "complete" for row in record["trials"])
  counted = f"{len(record['trials'])} trials, {whole} to their end"
  if best is None:
    return f"No trial has gone to its end yet ({counted})."
  said = ", ".join(f"{key} {_short(value)}" for key, value in best["point"].items())
  return (f"{said or 'The config as it is'}: validation {words.metric_name(record['metric'])} "
          f"{words.number(best['value'], record['metric'])} ({counted}).")


def _state(row):
  return h("span", row["state"], cls="none", title=row.get("reason"))


def _setting(row, key):
  value = row.get("point", {}).get(key)
  return "–" if value is None else _short(value)


def _short(value):
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def _panels(record, rows, keys, metric):
  """A figure a key: its values against what they gave."""
  found = []
  for key in keys:
    told = [(row["point"][key], row["value"], row["number"] == record["best"]) for row in rows
            if key in row.get("point", {}) and words.finite(row["value"])]
    if len({value for value, *_ in told}) < 2 or len(found) == _MOST_PANELS:
      continue
    said = "; ".join(f"{words.number(result, metric)} at {_short(value)}"
                     for value, result, _ in told)
    label = f"validation {words.unit(metric)} by {key}: {said}"
    if all(words.finite(value) for value, *_ in told):
      log = "log=True" in record["space"].get(key, "")
      svg = charts.scatter(told, label, metric, key, log)
    else:
      svg = _choices(told, label, metric, record["mode"])
    found.append(el.figure([h("b", key), f" validation {words.unit(metric)}"], svg))
  return found


def _choices(told, label, metric, mode):
  """The best of each value of a choice, with the span of all that it gave."""
  values = {}
  for value, result, strong in told:
    values.setdefault(str(value), []).append((result, strong))
  best = max if mode == "max" else min
  rows = [(value, best(found)[0], (min(found)[0], max(found)[0]), any(s for _, s in found))
          for value, found in values.items()]
  low, high = charts.span([result for _, result, _ in told])
  return charts.intervals(rows, metric, low, high, label)


def _progress(record, metric):
  """The best so far by trial."""
  better = max if record["mode"] == "max" else min
  done = [row for row in record["trials"] if row["state"] == "complete"]
  if len(done) < 2:
    return None
  curve, best = [], done[0]["value"]
  for row in done:
    best = better(best, row["value"])
    curve.append((row["number"], best))
  said = f"best validation {words.unit(metric)} so far, from {words.number(curve[0][1], metric)} " \
         f"to {words.number(curve[-1][1], metric)}"
  svg = charts.lines([("best so far", curve, "one")], said, None, metric, "trial")
  return el.figure([h("b", "Best so far"), f" validation {words.unit(metric)}"], svg)
