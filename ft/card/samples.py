"""Texts that were written for a few rows of test, beside what they should say."""

from ft.card import elements as el
from ft.card import words
from ft.card.markup import h, join, name

_LONGEST = 2000  # characters of a text that are shown


def section(record):
  """The section of one valid record; None where no text was written."""
  samples = record.get("samples") or []
  if not samples:
    return None
  parts = [h("p", "The first rows of test that texts were written for; all of them are in "
             "samples.jsonl.", cls="soft")]
  for sample in samples:
    rows = [(key, text) for key, text in sample.items()
            if key not in ("split", "where", "answers")]
    rows += [(words.row_name(key), text) for key, text in (sample.get("answers") or {}).items()]
    parts.append(el.table(sample.get("where", ""), ["", "text"],
                          [[name(key), (_shown(text), "long")] for key, text in rows]))
  return join(parts)


def _shown(text):
  return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
