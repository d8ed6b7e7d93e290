"""Images on the card, beside what was found on them."""

from ft.card import elements as el
from ft.card.markup import h, join, name


def section(record):
  """The pictures of one valid record; None where there are none."""
  shown = record.get("pictures") or []
  if not shown:
    return None
  parts = [h("p", "Images of test from the highest score to the lowest; all heat maps have one "
             "scale.", cls="soft")]
  for one in shown:
    images = [h("img", src=source, alt=f"{label}, {one['words']}")
              for label, source in one["images"].items() if source.startswith("data:image/png;")]
    parts.append(el.figure([h("b", name(one["words"])), " ", h("small", name(one["where"]))],
                           join(images)))
  return h("div", parts[0], h("div", parts[1:], cls="figures"))
