"""What stands behind the guards' verdicts: one file a guard, found by the guard's name.

A file gives `TITLE`, the heading of its part of the page, and `section(numbers, record)`, which
makes it from the guard's numbers (never empty); see `elements.py`, `charts.py`, `markup.py`. Where
a guard has none, its words say why.
"""

import importlib
import pkgutil

from ft.card.markup import h


def sections() -> list[tuple]:
  """(guard, heading, record -> markup) of every guard that has a file here, by name."""
  found = []
  for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    part = importlib.import_module(f"{__name__}.{module.name}")
    found.append((module.name, part.TITLE, _builder(module.name, part.section)))
  return found


def _builder(name, section):
  def build(record):
    guard = (record.get("guards") or {}).get(name) or {}
    if guard.get("numbers"):
      return section(guard["numbers"], record)
    return h("p", guard["words"], cls="none") if guard.get("words") else None

  return build
