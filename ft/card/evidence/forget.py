"""Forgetting: what the pretrained and the tuned model make of the same rows."""

from ft.card import elements as el
from ft.card import words
from ft.card.markup import h, join, name
from ft.guards import overfit

TITLE = "What was forgotten"
_SHOWN = 40  # layers of the table


def section(numbers, record):
  """The part of one valid record; see `guards.forget.measure` for the numbers."""
  del record
  if numbers.get("only_head"):
    return h("p", "Only the head trained: the body is the pretrained one, bit for bit.")
  parts = [_before_after(numbers), _layers(numbers), _divergence(numbers.get("divergence"))]
  if numbers.get("tradeoff"):
    parts.append(h("p", "What mixing in the pretrained weights would keep: see the curves between "
                   "the pretrained and the tuned weights under Results.", cls="soft"))
  missing = numbers.get("missing") or []
  if missing:
    parts.append(el.details("Not measured", h("ul", [h("li", reason) for reason in missing])))
  if words.finite(numbers.get("seconds")):
    parts.append(h("p", f"Asking both models took {numbers['seconds']:.1f} s.", cls="soft"))
  return join(parts)


def _before_after(numbers):
  """A row for everything that has a number before and after training."""
  rows, text, probe = [], numbers.get("text"), numbers.get("probe")
  if text:
    rows.append(_row(f"general text ({text['source']}), nats/token", text, "nats_per_token",
                     f"{text['n']:,} texts, {text['tokens']:,} tokens"))
  if probe:
    rows.append(_row(f"frozen probe of another task ({probe['source']}), accuracy, %", probe,
                     "accuracy", f"{probe['n']:,} rows"))
  for one in numbers.get("retention") or []:
    rows.append(_row(join([name(one["split"]), f", {words.unit(one['metric'])}"]),
                     {**one, "interval": [one["lo"], one["hi"]]}, one["metric"],
                     f"{one['n']:,} rows"))
  if not rows:
    return None
  return el.table("Before and after tuning, paired over the same rows, with 95 % interval",
                  ["", ("before", "n"), ("after", "n"), ("change", "n"), "n"], rows)


def _row(label, found, metric, count):
  row = {"difference": found["difference"], "lo": found["interval"][0],
         "hi": found["interval"][1]}
  return [label, (words.number(found["before"], metric), "n"),
          (words.number(found["after"], metric), "n"), (overfit.signed(row, metric), "n"), count]


def _layers(numbers):
  """Similarity and change of weights, layer by layer."""
  similar = numbers.get("cka") or {}
  moved = {row["layer"]: row["relative"] for row in numbers.get("weights") or []}
  alike = {row["layer"]: row["cka"] for row in similar.get("layers") or []}
  if not moved and not alike:
    return None
  order = list(dict.fromkeys([*moved, *alike]))
  rows = [[name(_readable(layer)), (_two(alike.get(layer)), "n"),
           (f"{100 * moved[layer]:.2g} %" if words.finite(moved.get(layer)) else "–", "n")]
          for layer in order]
  said = []
  if similar:
    said.append(f"Similarity is linear CKA of what both models make of {similar['n']:,} "
                f"{similar['inputs']}: 1 is the same up to rotation and scale, "
                f"{_two(similar['chance'])} is chance with so many rows.")
  said.append("The change of weights is the length of the difference over that of the pretrained.")
  head = ["part", ("similarity", "n"), ("change of weights", "n")]
  table = el.table("How far each part of the model went", head, rows[:_SHOWN])
  rest = el.details(f"{len(rows) - _SHOWN} more parts",
                    el.table("The other parts", head, rows[_SHOWN:])) if rows[_SHOWN:] else None
  return join([h("h3", "Inside the model"), h("p", " ".join(said), cls="soft"), table, rest])


def _divergence(apart):
  if not apart:
    return None
  lo, hi = apart["interval"]
  what = ("The features that the head reads" if apart["kind"] == "features"
          else "The answers (forward KL divergence from the pretrained model's)")
  return h("p", f"{what} went {_number(apart['value'])} [{_number(lo)}, {_number(hi)}] "
           f"{apart['unit']} away on {apart['n']:,} validation rows.")


def _readable(layer):
  return layer.replace("/", " · ").replace("_", " ")


def _two(value):
  return f"{value:.2f}" if words.finite(value) else "–"


def _number(value):
  return f"{value:.3g}" if words.finite(value) else "–"
