"""Calibration: the reliability plot, sets and intervals by what they hold, the abstention curve."""

from ft.card import charts, words
from ft.card import elements as el
from ft.card.markup import h, join, name

TITLE = "Calibration"
_CLASSES = 10  # of lowest coverage, on the page


def section(numbers, record):
  """The part of one valid record; see `guards.calibrate.measure` for the numbers."""
  del record
  return join([_reliability(numbers), _sets(numbers.get("conformal") or []),
               _intervals(numbers.get("intervals")), _abstention(numbers.get("abstention"))])


def _reliability(found):
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
  if found.get("vector"):
    kinds.append(("after vector scaling", found["vector"], None))
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


def _sets(found):
  if not found:
    return None
  asked = words.number(found[0]["asked"], "accuracy")
  rows = [[made["method"], _cell(made["coverage"], made["interval"], "accuracy"),
           (words.interval(made["band"], "accuracy"), "n"),
           _cell(made["size"], made["size_interval"], ""),
           (words.number(made["empty"], "accuracy"), "n")] for made in found]
  said = ("Instead of one label, a set of labels may be answered that holds the right one with a "
          f"stated chance, here {asked} %. Thresholds are taken on validation (split conformal); "
          "LAC makes the smallest sets, APS larger ones for harder rows.")
  return join([
      h("h3", "Sets of labels"), h("p", said, cls="soft"),
      el.table(f"Sets on test, n = {found[0]['n']:,}; per cent with 95 % interval",
               ["", ("held", "n"), ("by chance", "n"), ("labels a set", "n"), ("empty", "n")],
               rows),
      el.details("By label, lowest first", [_by_class(made) for made in found])])


def _by_class(made):
  rows = [[name(row["label"]), _cell(row["coverage"], row["interval"], "accuracy"),
           (f"{row['n']:,}{' *' if row['n'] < 30 else ''}", "n")]
          for row in made["classes"][:_CLASSES]]
  few = any(row["n"] < 30 for row in made["classes"][:_CLASSES])
  return el.table(f"{made['method']}: share of test rows whose set holds their label, per cent"
                  + (" (* fewer than 30 rows)" if few else ""),
                  ["label", ("held", "n"), ("rows", "n")], rows)


def _intervals(made):
  if not made:
    return None
  rows = [["asked", (words.number(made["asked"], "accuracy"), "n")],
          ["held on test", _cell(made["coverage"], made["interval"], "accuracy")],
          ["mean width", (f"{made['width']:.4g}" if words.finite(made["width"]) else "–", "n")],
          ["n", (f"{made['n']:,}", "n")]]
  if made.get("band"):
    rows.insert(2, ["by chance", (words.interval(made["band"], "accuracy"), "n")])
  return el.table(f"Intervals ({made['method']}), per cent with 95 % interval; width in the "
                  "target's unit", None, rows)


def _abstention(found):
  if not found or not found["curve"]:
    return None
  curve = [(100 * row["answered"], row["accuracy"]) for row in found["curve"]]
  at = {round(100 * row["answered"]): row for row in found["curve"]}
  said = "; ".join(f"{words.number(row['accuracy'], 'accuracy')} % right where {share} % are "
                   f"answered (confidence from {row['confidence']:.2f})"
                   for share, row in sorted(at.items()) if share in (50, 80, 90, 100))
  area = (f"Mean over all shares: {words.number(found['area'], 'accuracy')} % "
          f"{words.interval(found['interval'], 'accuracy')}, n = {found['n']:,}.")
  svg = charts.lines([("accuracy", curve, "one")], f"Accuracy by share of rows answered: {said}",
                     None, "accuracy", "% of rows answered")
  return join([h("h3", "If unsure rows go to a person"), h("p", f"{said}. {area}", cls="soft"),
               h("div", el.figure([h("b", "Accuracy, %"), " of the rows answered, most confident "
                                   "first"], svg), cls="figures")])


def _cell(value, pair, metric):
  said = words.interval(pair, metric)
  return (join([words.number(value, metric), h("small", said) if said else None]), "n")
