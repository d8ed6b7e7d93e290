"""What flagging rows as positive does: sensitivity, specificity, predictive values, net benefit."""

from ft.card import charts, words
from ft.card import elements as el
from ft.card.markup import h, join, name

_SHOWN = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV",
          "auroc": "AUROC"}


def section(record):
  """The part of one valid record; None where nothing was flagged."""
  found = record.get("screening") or {}
  if not found.get("splits"):
    return None
  positive, splits = found["positive"], found["splits"]
  said = [f"A row is flagged as {positive} from a probability of "
          f"{words.number(found['threshold'], '')} on: the lowest at which validation keeps a "
          f"specificity of {_percent(found['asked'])}. Its share of positives is "
          f"{_percent(found['validation'])}."]
  for split, one in splits.items():
    said.append(f" {split} has {_percent(one['positives'])}; its predictive values and net benefit "
                f"are for {_percent(one['prevalence'])}.")
  rows = [[label, *[_cell(one, key) for one in splits.values()]] for key, label in _SHOWN.items()]
  table = el.table("Flagged rows, in per cent with 95 % interval",
                   ["", *[(name(split), "n") for split in splits]], rows)
  figures = [_curve(split, one["curve"]) for split, one in splits.items()]
  return join([h("h3", "As a screening test"), h("p", "".join(said), cls="soft"), table,
               h("div", figures, cls="figures")])


def _cell(one, key):
  pair = words.interval(one.get(f"{key}_interval"), "accuracy")
  return join([words.number(one.get(key), "accuracy"), h("small", pair) if pair else None]), "n"


def _curve(split, curve):
  """Net benefit by threshold probability; acting on all is drawn while it is worth something."""
  curve = [point for point in curve if words.finite(point["model"])]
  if not curve:
    return None
  model = [(point["threshold"], point["model"]) for point in curve]
  everyone = [(point["threshold"], max(point["all"], 0.0)) for point in curve]
  said = "; ".join(f"{words.number(value, '')} at {t:g}" for t, value in model)
  svg = charts.lines([("act on all or none", everyone, "two"), ("act on flagged", model, "one")],
                     f"Net benefit on {split} by threshold probability: {said}", None, "",
                     "threshold probability")
  return el.figure([h("b", "Net benefit"), f" a row of {split}"], svg)


def _percent(share):
  return f"{words.number(share, 'accuracy')} %"
