"""For whom the model fails: groups, classes and clusters with their intervals."""

from ft.card import charts, elements, words
from ft.card.markup import h, join, name

TITLE = "For whom it fails"
DRAWN = 12  # rows of a figure
LISTED = 40  # rows of a table


def section(numbers, record):
  """The part of the page: a figure and a table an attribute, then classes and clusters."""
  return join([_rows(numbers) if "metric" in numbers else None,
               _applied(record.get("group_thresholds")), _probes(numbers)])


def _rows(numbers):
  """By attribute, class and cluster of the test rows."""
  metric = numbers["metric"]
  parts = [h("p", _intro(numbers))]
  for found in numbers["by"]:
    parts.append(_part(f"By {found['by']}", found["groups"], "group", "value", metric,
                       found["worst"]))
    parts.append(_apart(found))
  if numbers["classes"]:
    parts.append(_part("By class", numbers["classes"], "label", "recall", "accuracy",
                       numbers["worst_class"]))
  clusters = numbers["clusters"]
  if clusters:
    parts.append(h("p", f"Clusters are rows that look alike to the model before tuning (k-means on "
                   f"{clusters['n']:,} test rows); the label is the most frequent one."))
    parts.append(_part("By cluster", clusters["groups"], "group", "value", metric,
                       clusters["worst"]))
  return join(parts)


def _applied(found):
  """What the thresholds that predictions are made with do, a column a split."""
  if not found:
    return None
  at = ", ".join(f"{group} {words.number(value, '')}" for group, value in found["at"].items())
  said = (f"Predictions are {found['positive']} from a probability that depends on {found['by']}: "
          f"{at} (task.thresholds, fitted on validation; a group with few rows of either label "
          "keeps 0.5). Results, and the groups above, are by one threshold for all.")
  splits = found["splits"]
  rows = [["rows", *[(f"{one['n']:,}", "n") for one in splits.values()]],
          [f"of them without a known {found['by']}",
           *[(f"{one['without']:,}", "n") for one in splits.values()]]]
  for key, label in (("accuracy_before", "accuracy, one threshold"),
                     ("accuracy", "accuracy, one a group"),
                     ("equalised_odds_before", "equalised-odds difference, one threshold"),
                     ("equalised_odds", "equalised-odds difference, one a group")):
    rows.append([label, *[_cell(one[key], one[f"{key}_interval"], "accuracy")
                          for one in splits.values()]])
  table = elements.table("In per cent and points, with 95 % intervals",
                         ["", *[(name(split), "n") for split in splits]], rows)
  return join([h("h3", f"Thresholds by {found['by']}"), h("p", said), table])


def _probes(numbers):
  """What a language model finds likelier, before and after tuning: a table a probe."""
  parts = []
  for probe in numbers.get("probes", ()):
    plain = [row for row in probe["measures"] if "interval" in row]
    single = [row for row in probe["measures"] if "interval" not in row]
    left = f" {probe['left_out']:,} rows were too long." if probe["left_out"] else ""
    head = ["measure", ("rows", "n"), ("even", "n"), ("before", "n"), ("after", "n"),
            ("change", "n")]
    parts += [h("h3", f"{probe['probe']}: before and after tuning"),
              h("p", f"Both models were asked the same {probe['n']:,} rows of {probe['source']}; "
                f"even is without stereotypes.{left}"),
              elements.table("All, then by group", head, [_probe_row(row) for row in plain])]
    if single:
      parts.append(elements.details(f"{single[0]['measure']}, by occupation", elements.table(
        "By occupation", head, [_probe_row(row) for row in single])))
  if "metric" not in numbers and numbers.get("missing"):
    parts.append(h("p", f"Not measured: {'; '.join(numbers['missing'])}."))
  return join(parts)


def _probe_row(row):
  """A measure's cells."""
  metric = "" if row["even"] == 0 or "interval" not in row else "accuracy"
  few = " (few)" if row["few"] and "interval" in row else ""
  return [f"{row['group']}: {row['measure']}", (f"{row['n']:,}{few}", "n"),
          (words.number(row["even"], metric), "n"),
          *[_cell(row[key], row.get(f"{key}_interval"), metric) for key in ("before", "after")],
          _cell(row["difference"], row.get("interval"), metric)]


def _intro(numbers):
  text = (f"Test rows: {numbers['n']:,}. Intervals are 95 %. Groups with too few rows are flagged "
          "and in no difference. There always is a worst group: p says how often one as bad comes "
          "about by chance.")
  missing = f" Not measured: {'; '.join(numbers['missing'])}." if numbers["missing"] else ""
  return text + missing


def _part(title, rows, key, value, metric, worst):
  """A figure of the weakest rows, and a table of all."""
  drawn = [(_short(row[key]), row[value], row["interval"], bool(worst and row[key] ==
                                                                worst["group"]))
           for row in rows[:DRAWN]]
  points = [v for row in rows[:DRAWN] for v in (row[value], *row["interval"]) if words.finite(v)]
  low, high = charts.span(points)
  if all(0 <= v <= 1 for v in points):
    low, high = max(low, 0.0), min(high, 1.0)
  label = f"{title}: {words.metric_name(metric)} with 95 % intervals"
  extra = [column for column in ("label", "tpr", "fpr", "selected", "ece")
           if column != key and any(column in row for row in rows)]
  heads = {"label": "label", "tpr": "true positive rate", "fpr": "false positive rate",
           "selected": "decided positive", "ece": "calibration error"}
  body = []
  for row in rows[:LISTED]:
    cells = [name(row[key]), (f"{row['n']:,}" + (" (few)" if row["few"] else ""), "n"),
             _cell(row[value], row["interval"], metric)]
    cells += [name(row.get(column, "")) if column == "label"
              else _cell(row.get(column), row.get(f"{column}_interval"), "accuracy")
              for column in extra]
    body.append(cells)
  more = f", the first {LISTED} of {len(rows)}" if len(rows) > LISTED else ""
  table = elements.table(f"{title}{more}", [title.removeprefix("By "), ("rows", "n"),
                                            (words.metric_name(metric), "n"),
                                            *[heads[column] for column in extra]], body)
  return join([h("h3", title), elements.figure(label, charts.intervals(
      drawn, metric, low, high, label)) if points else None, _worst(worst, metric), table])


def _worst(worst, metric):
  if not worst:
    return h("p", "Fewer than two have enough rows to be compared.")
  return h("p", f"Worst: {worst['group']}, {words.number(worst['value'], metric)} against "
           f"{words.number(worst['average'], metric)} on average (n = {worst['n']:,}, "
           f"p = {worst['p']:.3f}).")


def _apart(found):
  """Differences between the groups' error rates."""
  if not words.finite(found.get("equalised_odds")):
    return None
  facts = [("positive label", found["positive"]),
           ("equalised-odds difference", words.number(found["equalised_odds"], "accuracy")),
           ("by chance it stays below", words.number(found["chance"], "accuracy")),
           ("demographic-parity difference",
            words.number(found["demographic_parity"], "accuracy"))]
  mended = found.get("thresholds")
  if mended and words.finite(mended["equalised_odds"]):
    facts.append(("with a threshold a group, fitted on validation",
                  f"{words.number(mended['equalised_odds'], 'accuracy')}, at an accuracy of "
                  f"{words.number(mended['accuracy'], 'accuracy')} (before: "
                  f"{words.number(mended['accuracy_before'], 'accuracy')})"))
  if found.get("untold"):
    facts.append(("with a threshold a group", f"not measured: {found['untold']}"))
  return join([elements.facts(facts), h("p", "In points. Equalised odds: the larger of the "
                                       "differences in true and in false positive rates.")])


def _cell(value, pair, metric):
  if not words.finite(value):
    return ("–", "n")
  shown = words.interval(pair, metric) if pair and all(map(words.finite, pair)) else None
  return (join([words.number(value, metric), h("small", shown) if shown else None]), "n")


def _short(text):
  text = str(text)
  return text if len(text) <= 14 else text[:13] + "…"
