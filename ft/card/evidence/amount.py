"""Whether more training rows would help: the probe's learning curve and what the rows are worth."""

from ft.card import charts, words
from ft.card import elements as el
from ft.card.markup import h, join

TITLE = "Amount of data"


def section(numbers, record):
  """The part of the page; see `ft.guards.amount.measure` for the numbers."""
  del record
  share = numbers["unit"] != "standard deviations of the target"
  metric = "accuracy" if share else ""
  unit = f"{numbers['unit']}, %" if share else numbers["unit"]
  points, predicted, made = numbers["points"], numbers["predicted"], numbers["fit"]
  said = "; ".join(f"{words.number(row['error'], metric)} at {row['n']:,} rows"
                   for row in [*points, *predicted])
  svg = charts.growth(points, numbers["curve"], f"Error of the probe, {unit}: {said}", metric)
  return join([
      h("p", f"The curve is that of a {numbers['probe']} on the untuned model's features, not of "
        "the tuned model. It shows what rows of this kind still add. Dots are measured on "
        f"{numbers['judged']['n']:,} rows of {numbers['judged']['split']}, the dashed line is "
        "predicted, the band holds 95 % of resampled draws and rows.", cls="soft"),
      h("div", el.figure([h("b", "Learning curve"), f" {unit}"], svg), cls="figures"),
      _table(points, predicted, unit, metric),
      el.facts(_facts(numbers, made, share, metric))])


def _table(points, predicted, unit, metric):
  rows = [[f"{row['n']:,}", f"measured, {row['draws']} draw{'s' * (row['draws'] > 1)}",
           _cell(row, metric)] for row in points]
  rows += [[f"{row['n']:,}", f"predicted, {row['times']} times the rows", _cell(row, metric)]
           for row in predicted]
  return el.table(f"Error of the probe by training rows ({unit}), with 95 % interval",
                  ["rows", "", ("error", "n")], rows)


def _cell(row, metric):
  pair = words.interval([row["lo"], row["hi"]], metric)
  return (join([words.number(row["error"], metric), h("small", pair) if pair else None]), "n")


def _facts(numbers, made, share, metric):
  per, effective = numbers["per_100"], numbers["effective"]
  scale, ending = (100, " points") if share else (1, "")
  yield "Fitted", (f"error(n) = {made['a']:.3g} · n^−{made['b']:.3g} + {made['c']:.3g}; exponent "
                   f"{_pair(made['b_interval'])}, floor {_pair(made['c_interval'])}")
  if per:
    yield "Next 100 labels", (f"{scale * per['gain']:.3f}{ending} "
                              f"{_pair([scale * value for value in per['interval']])}")
  yield "Without near-duplicates", effective.get("missing") or (
      f"{effective['n']:,} of {effective['of']:,} rows have no earlier one with a cosine "
      f"above {effective['similar']:g}")
  if "per_class" in numbers:
    counts = numbers["per_class"]
    yield "Rows a class", (f"{counts['min']:,} at least, {counts['median']:,.0f} in the middle, "
                           f"{counts['max']:,} at most")
  if "method" in numbers:
    yield "Usually suits so many", numbers["method"]
  if "passes" in numbers:
    yield "Passes over the rows", f"{numbers['passes']:.1f}"
  if numbers["used"] < numbers["rows"]:
    yield "Sample", f"the curve is of {numbers['used']:,} of {numbers['rows']:,} rows"


def _pair(pair):
  return f"[{pair[0]:.3g}, {pair[1]:.3g}]".replace("-", "−")
