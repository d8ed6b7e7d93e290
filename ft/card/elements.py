"""Pieces that every page is made of: the document, tables, facts, words with a tone, values."""

from ft.card import words
from ft.card.markup import Markup, h, join, name
from ft.card.style import STYLE
from ft.guards import overfit

MOST_ROWS = 300  # of a table; the rest is in card.json
_LONGEST_VALUE = 4000  # characters of a value or of a cell

TONE = {"gained": "good", "ok": "good", "did not gain": "warn", "warning": "warn", "lost": "bad",
        "alarm": "bad"}


def document(title, body, skip=None):
  """The whole HTML document (str) around a body; `skip` is the id that its first link leads to."""
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
  head = h("head", h("meta", charset="utf-8"),
           h("meta", name="viewport", content="width=device-width, initial-scale=1"),
           # Even a hole in the escaping could load or run nothing.
           h("meta", http_equiv="Content-Security-Policy", content=policy),
           h("meta", name="color-scheme", content="light dark"),
           h("title", title), h("style", Markup(STYLE)))
  skip = h("a", f"Skip to the {skip}", href=f"#{skip}", cls="skip") if skip else None
  return "<!doctype html>\n" + h("html", head, h("body", skip, body), lang="en") + "\n"


def folded(key, title, content, unfolded=False, status=None):
  """A section that folds without any script; paper shows it open.

  Args:
    key: its id. A link to it opens it, as the id is on what is folded.
    title, content: of the section. unfolded: whether it starts open.
    status: what stands beside the title, or None.
  """
  head = h("summary", h("h2", title, id=f"{key}-title"), status)
  return h("section", h("details", head, h("div", content, id=key, cls="evidence"),
                        open="" if unfolded else None), aria_labelledby=f"{key}-title")


def footer(record):
  """What every number on a page is and where it comes from."""
  return h("footer", f"Schema {record['schema']}. Every number here is in card.json beside this "
           "page. Intervals are 95 % percentile bootstrap over test rows; differences are paired "
           "over the same rows.")


def table(caption, head, rows, cls=None):
  """A table that scrolls sideways by itself where the page is narrow; it ends at MOST_ROWS.

  Args:
    caption: text. head: cells of the head row, or None.
    rows: lists of cells, the first being the row's header; or (list of cells, class of the row).
      A cell is its content or (content, class).
    cls: class of the table; "stack" puts the cells of a row under each other on a phone.
  """
  body = []
  for row in rows[:MOST_ROWS]:
    cells, kind = row if isinstance(row, tuple) else (row, None)
    body.append(h("tr", _cell("th", cells[0], "row"), [_cell("td", c) for c in cells[1:]],
                  cls=kind))
  top = h("thead", h("tr", [_cell("th", c, "col") for c in head])) if head else None
  if len(rows) > MOST_ROWS:
    rest = f"{len(rows) - MOST_ROWS:,} more rows are in card.json"
    body.append(h("tr", h("td", rest, colspan=len(rows[0]) if head is None else len(head),
                          cls="none")))
  return scroll(caption, h("table", h("caption", caption), top, h("tbody", body), cls=cls))


def scroll(label, content):
  """A region that scrolls sideways, within reach of the keyboard."""
  return h("div", content, cls="scroll", tabindex=0, role="group", aria_label=label)


def _cell(tag, content, scope=None):
  content, cls = content if isinstance(content, tuple) else (content, None)
  if content == "" and scope == "col":  # A corner heads nothing.
    return h("td")
  return h(tag, clip(content), cls=cls, scope=scope)


def clip(text, most=_LONGEST_VALUE):
  """Text cut to a length; markup as it is."""
  if not isinstance(text, str) or isinstance(text, Markup) or len(text) <= most:
    return text
  return text[:most] + "…"


def facts(pairs):
  """A list of name and value; pairs without a value are left out."""
  shown = [[h("dt", key), h("dd", value)] for key, value in pairs if value not in (None, "")]
  return h("dl", shown, cls="facts") if shown else None


def details(summary, *content):
  """Content folded under a summary (paper shows it)."""
  return h("details", h("summary", summary), content)


def figure(caption, svg):
  """A figure with its caption above."""
  return h("figure", h("figcaption", caption), svg)


def word(text):
  """A verdict word in its tone; the word alone says it, colour only helps."""
  return h("span", text, cls=f"word {TONE.get(text, 'none')}")


def cell(entry, metric):
  """Cell of a results table: the metric with its interval underneath."""
  if entry is None:
    return ("–", "n")
  pair = words.interval((entry.get("interval") or {}).get(metric), metric)
  return (join([words.number(entry["metrics"].get(metric), metric),
                h("small", pair) if pair else None]), "n")


def difference(row):
  """"+8.1 points [6.5, 9.9]" of a differences row."""
  return overfit.signed(row, row["metric"])


def tree_facts(tree):
  """A nested dict as a list of names and values."""
  return facts([(name(key), value(item)) for key, item in flat(tree)])


def flat(tree, path=""):
  """[("a.b", value)] of a nested dict; an empty dict is a value."""
  for key, item in tree.items():
    where = f"{path}.{key}" if path else key
    if isinstance(item, dict) and item:
      yield from flat(item, where)
    else:
      yield where, item


def value(item):
  """Any JSON value as text."""
  if isinstance(item, int) and not isinstance(item, bool):
    return f"{item:,}" if abs(item) >= 10_000 else str(item)
  return clip(repr(item) if isinstance(item, (list, dict, float, bool)) or item == ""
              else str(item))
