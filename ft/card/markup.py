"""Markup that is escaped by construction: text from data can never become a tag."""

import html

VOID = ("meta", "br", "hr", "col", "line", "circle", "rect", "path", "polyline", "img", "input")


class Markup(str):
  """Text that is markup already; every other str is escaped when it enters an element."""


def escape(text):
  """`text` as Markup; control characters that HTML forbids become U+FFFD."""
  shown = "".join(c if c in "\t\n" or ord(c) >= 32 and not 127 <= ord(c) < 160 else "\ufffd"
                  for c in str(text).encode("utf-8", "backslashreplace").decode())
  return Markup(html.escape(shown, quote=True))


def join(parts):
  """Concatenates parts; None is nothing, lists are flattened, plain values are escaped."""
  found = []
  for part in parts:
    if isinstance(part, (list, tuple)):
      found.append(join(part))
    elif part is not None:
      found.append(part if isinstance(part, Markup) else escape(part))
  return Markup("".join(found))


def h(tag, *children, **attributes):
  """An element. `cls` is class, `_` in attribute names is `-`; None attributes are left out."""
  text = "".join(f' {"class" if name == "cls" else name.replace("_", "-")}="{escape(value)}"'
                 for name, value in attributes.items() if value is not None)
  if tag in VOID:
    return Markup(f"<{tag}{text}/>")
  return Markup(f"<{tag}{text}>{join(children)}</{tag}>")


def name(text):
  """A name from the data, kept apart from the direction of the text around it."""
  return h("bdi", text)
