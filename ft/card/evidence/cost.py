"""Cost: where the time went, and what the run took."""

from ft.card import elements as el
from ft.card import words
from ft.card.markup import join, name
from ft.guards import cost

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
