"""Cost: where the time went, and what the run took."""

from ft.card import elements as el
from ft.card import words
from ft.card.markup import h, join, name
from ft.guards import cost, overfit

TITLE = "Cost"


def section(numbers, record):
  """The part of one valid record; see `guards.cost.measure` for the numbers."""
  del record
  phases = numbers.get("phases") or {}
  total = sum(phases.values())
  parts = []
  if total:
    rows = [[name(phase), (cost.duration(seconds), "n"), (f"{100 * seconds / total:.0f} %", "n")]
            for phase, seconds in sorted(phases.items(), key=lambda item: -item[1])]
    rows.append((["in all", (cost.duration(total), "n"), ("", "n")], "tuned"))
    parts.append(el.table("Wall time by phase", ["phase", ("time", "n"), ("share", "n")], rows))
  parts += [_beside(numbers.get("beside") or []), _scratch(numbers.get("scratch"))]
  facts = [(label, form(numbers[key])) for key, label, form in _COSTS
           if words.finite(numbers.get(key))]
  if numbers.get("flops_by"):
    facts.append(("counted by", numbers["flops_by"]))
  if energy := numbers.get("energy"):
    kind = "energy" if energy["measured"] else "energy, an estimate"
    facts += [(kind, cost.watt_hours(energy["joules"])), ("energy by", energy["source"])]
  parts.append(el.facts(facts))
  return join(parts)


def _beside(found):
  """What fine-tuning cost and reached beside what needs none."""
  if not found:
    return None
  metric = found[0]["metric"]
  rows = [([words.row_name(row["name"]), (words.number(row["value"], metric), "n"),
            (cost.duration(row["seconds"]) if words.finite(row["seconds"]) else "–", "n"),
            (row["what"], "long")], "tuned" if row["name"] == "fine-tuned" else None)
          for row in found]
  return el.table(f"What each reached on test, n = {found[0]['n']:,}, and took",
                  ["", (words.unit(metric), "n"), ("time", "n"), "for"], rows)


def _scratch(found):
  """What the same training reached from random weights."""
  if not found:
    return None
  metric = found["metric"]
  at = found.get("reached_at")
  facts = [(f"{words.unit(metric)} on test, n = {found['n']:,}",
            f"{words.number(found['value'], metric)} {words.interval(found['interval'], metric)}"),
           ("training", cost.duration(found["seconds"])),
           ("from pretrained weights as good on validation",
            f"by step {at:,} of {found['steps']:,}" if at is not None else "never")]
  if "difference" in found:
    row = {key: found[key] for key in ("difference", "lo", "hi")}
    facts.insert(1, ("pretrained minus random weights", overfit.signed(row, metric)))
  return join([h("h3", "The same training from random weights"),
               h("p", "Same model, steps and rates, which were chosen for pretrained weights.",
                 cls="soft"), el.facts(facts)])


_COSTS = (
    ("examples", "training examples seen", "{:,}".format),
    ("steps", "training steps", "{:,}".format),
    ("examples_per_second", "examples per second", "{:.1f}".format),
    ("tokens", "training tokens seen, without padding", "{:,}".format),
    ("tokens_per_second", "tokens per second", "{:,.0f}".format),
    ("flops", "operations of training", cost.operations),
    ("utilisation", "share of the device's peak", cost.percent),
    ("compile_seconds", "compilation", cost.duration),
    ("data_wait_share", "waiting for data", lambda share: f"{100 * share:.1f} % of the loop"),
    ("peak_host_bytes", "peak host memory", cost.size),
    ("peak_bytes", "peak device memory", cost.size),
    ("checkpoint_bytes", "checkpoint", cost.size),
    ("devices", "devices", "{:,}".format),
)
