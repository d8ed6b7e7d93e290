r"""Rebuilds a run's card.html from its card.json, or sets several runs side by side.

  python scripts/card.py --run=DIR                                   DIR/card.html
  python scripts/card.py --run=DIR --run=DIR --output=compare.html   one page, paired on equal rows
  python scripts/card.py --run=DIR --png=card.png                    and a picture of its top
"""

import pathlib

from absl import flags

from ft import card, cli, errors
from ft.card import compare, html, screenshot

_RUN = flags.DEFINE_multi_string("run", [], "folder of a finished run; give it several times")
_OUTPUT = flags.DEFINE_string("output", "", "page to write; needed for several runs")
_PNG = flags.DEFINE_string("png", "", "picture of the page's top, taken by Chromium where it is")


def build(runs, output):
  """Writes the page of the run or runs and returns its path."""
  if not runs:
    raise errors.UserError("--run is missing: give the folder of a finished run")
  records = [card.read(run) for run in runs]
  if len(runs) == 1:
    folder = pathlib.Path(runs[0])
    folder = folder if folder.is_dir() else folder.parent
    return card.write_text(output or folder / card.HTML, html.page(records[0]))
  if not output:
    raise errors.UserError("--output is missing: the page that shows the runs side by side")
  return card.write_text(output, compare.page(list(zip(_names(runs), records, strict=True))))


def _names(runs):
  """The shortest ends of the folders' paths that tell the runs apart."""
  parts = [pathlib.Path(run).resolve().parts for run in runs]
  for depth in range(1, max(len(p) for p in parts)):
    names = ["/".join(p[-depth:]) for p in parts]
    if len(set(names)) == len(set(parts)):
      return names
  return list(runs)


def main(_):
  page = build(_RUN.value, _OUTPUT.value)
  print(page)
  if _PNG.value:
    screenshot.take(page, _PNG.value)
    print(_PNG.value)


if __name__ == "__main__":
  cli.run(main, __doc__)
