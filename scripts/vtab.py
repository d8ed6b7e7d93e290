r"""Makes the table of a suite of runs, such as configs/vtab.py's: tasks, methods, means over tasks.

  python scripts/vtab.py --run=runs/vtab/1 --run=runs/vtab/2 [--output=table.md]
"""

import pathlib

from absl import flags

from ft import card, cli, errors
from ft.card import suite

_RUN = flags.DEFINE_multi_string("run", [], "folder of a finished run; give it several times")
_OUTPUT = flags.DEFINE_string("output", "", "file to write in place of standard output")


def main(_):
  if not _RUN.value:
    raise errors.UserError("--run is missing: give the folders of finished runs")
  text = suite.table([card.read(run) for run in _RUN.value])
  if _OUTPUT.value:
    print(card.write_text(pathlib.Path(_OUTPUT.value), text + "\n"))
  else:
    print(text)


if __name__ == "__main__":
  cli.run(main, __doc__)
