"""The top of the page: what the run gained, and one line a risk, gravest first."""

from ft.card import elements as el
from ft.card import words
from ft.card.markup import h, join, name


def section(record, shown):
  """The verdicts of one valid record.

  Args:
    record: see `schema.py`.
    shown: keys of the page's sections; a guard of that name is linked to its evidence.
  """
  parts = [h("p", words.conclusion(record), cls="conclusion"), _tally(record)]
  gains = _gains(record)
  if gains:
    caption = "Fine-tuned minus baseline on the same rows, with its 95 % interval"
    parts.append(el.table(caption, ["split", "outcome", "difference", "baseline", ("rows", "n")],
                          gains, "stack"))
  found = [[_linked(label, shown), el.word(guard["verdict"]), (guard["words"], "long")]
           for label, guard in words.by_weight(record)]
  if found:
    parts.append(el.table("Guards: one risk of fine-tuning each",
                          ["guard", "verdict", "why"], found, "stack"))
  return h("section", h("h2", "Verdict", id="verdict-title"), join(parts), id="verdict",
           aria_labelledby="verdict-title")


def sections_of_guards(record):
  """Section key -> verdict of the guard whose evidence it holds."""
  found = record.get("guards") or {}
  return {_SHOWN_IN.get(label, label): guard["verdict"] for label, guard in found.items()}


def raised(verdict):
  """Whether a guard's verdict asks for a look at its evidence."""
  return verdict in ("warning", "alarm")


_SHOWN_IN = {"overfit": "learning"}  # The other guards have a section of their own.


def _linked(label, shown):
  key = _SHOWN_IN.get(label, label)
  return h("a", name(label), href=f"#{key}") if key in shown else name(label)


def _tally(record):
  """How many guards found what, the worst named."""
  parts = []
  for verdict, labels in words.tally(record).items():
    named = f" ({', '.join(labels)})" if raised(verdict) else ""
    many = "s" if raised(verdict) and len(labels) > 1 else ""
    parts.append([", " if parts else "Guards: ", h("b", f"{len(labels)} {verdict}{many}",
                  cls=f"word {el.TONE.get(verdict, 'none')}"), named])
  return h("p", join(parts), ".", cls="tally") if parts else None


def _gains(record):
  rows = []
  for split, word, _ in words.verdicts(record):
    baseline, row = words.headline(record, split)
    if row is None:
      rows.append([name(split), el.word(word), ("no baseline on the same rows", "long"), "–",
                   ("–", "n")])
    else:
      rows.append([name(split), el.word(word), (el.difference(row), "long"),
                   f"over the {words.row_name(baseline)}",
                   (h("span", h("span", "n = ", cls="aside"), f"{row['n']:,}"), "n")])
  return rows
