"""Evidence of the labels guard: the estimated share of wrong labels, and the rows to look at."""

from ft.card import charts, words
from ft.card import elements as el
from ft.card.markup import h, join, name

TITLE = "Labels"

_SHARE = "recall"  # the format of shares
_MOST = 25  # rows of a split on the page; card.json has all that are listed
_PAIRS = 12


def section(numbers, record):
  """The guard's numbers, see `ft/guards/labels.py`, as a part of the page."""
  del record
  splits = numbers.get("splits") or []
  issues = numbers.get("issues") or []
  parts = [h("p", _explained(numbers), cls="soft"), _rates(splits),
           _pairs(numbers.get("pairs") or [])]
  for row in splits:
    parts.append(_rows(row["split"], [i for i in issues if i["split"] == row["split"]],
                       row["flagged"]))
  return join(parts)


def _explained(numbers):
  lo, hi = (words.number(value, _SHARE) for value in numbers["accuracy_interval"])
  right = words.number(numbers["accuracy"], _SHARE)
  text = ("A label looks wrong where another class is more likely than it usually is among its own "
          f"rows (confident learning). The likelihoods come from a {numbers['probe']}, on the "
          "features of the model before tuning; for train it is made of "
          f"{numbers['folds']} folds, each judged by the others. It is right on {right} % "
          f"[{lo}, {hi}] of {numbers['n']:,} rows, and can be wrong: look before you relabel.")
  rare = numbers.get("rare") or {}
  if rare:
    text += (f" Left out: {sum(rare.values()):,} rows of {len(rare):,} classes with fewer than "
             f"{numbers['folds']} rows.")
  return text


def _rates(splits):
  if not splits:
    return None
  high = max((row["rate_interval"] or [0, 0])[1] or 0 for row in splits) * 1.05 or 0.01
  shown = [(row["split"], row["rate"], row["rate_interval"], row["split"] == "train")
           for row in splits]
  said = "; ".join(f"{split} {words.number(rate, _SHARE)} %" for split, rate, *_ in shown)
  chart = el.figure(h("b", "Labels that look wrong, %"),
                    charts.intervals(shown, _SHARE, 0.0, high, f"Labels that look wrong: {said}"))
  table = el.table(
      "Labels that look wrong; the share is of the rows that are confidently of some class",
      ["split", ("rows", "n"), ("look wrong", "n"), ("confident rows", "n"), ("share, %", "n"),
       ("probe right, %", "n")],
      [[name(row["split"]), (f"{row['n']:,}", "n"), (f"{row['flagged']:,}", "n"),
        (f"{row['confident']:,}", "n"),
        (join([words.number(row["rate"], _SHARE),
               h("small", words.interval(row["rate_interval"], _SHARE))]), "n"),
        (words.number(row["accuracy"], _SHARE), "n")] for row in splits])
  return join([h("div", chart, cls="figures"), table])


def _pairs(rows):
  rows = [row for row in rows if row["split"] == "train"][:_PAIRS]
  if not rows:
    return None
  body = [[name(row["given"]), name(row["suggested"]), (f"{row['rows']:,}", "n")] for row in rows]
  return el.table("Which labels look wrong most often in train",
                  ["labelled", "looks like", ("rows", "n")], body)


def _rows(split, rows, flagged):
  if not rows:
    return None
  shown = rows[:_MOST]
  seen = any(row.get("picture") for row in shown)
  body = [[name((row["place"] or f"row {row['row']}").rsplit("/", 1)[-1]),
           _look(row) if seen else (name(row["text"] or "–"), "long"),
           name(row["given"]), name(row["suggested"]),
           (words.number(row["confidence"], _SHARE), "n"),
           (words.number(row["given_confidence"], _SHARE), "n")] for row in shown]
  table = el.table(f"Labels of {split} that look wrong, the surest first",
                   ["row", "", "labelled", "looks like", ("sure, %", "n"),
                    ("of its label, %", "n")], body, "stack")
  return el.details(f"{split}: {len(shown):,} of {flagged:,} rows to look at", table)


def _look(row):
  if not row.get("picture"):
    return "–"
  return h("img", src=row["picture"], alt=f"labelled {row['given']}", width=72)
