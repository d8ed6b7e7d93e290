"""Measures a finished run on further labelled data: metrics with 95 % bootstrap intervals.

    python scripts/evaluate.py --run=DIR --data=reviews.csv

The data is read with the columns, format and encoding of the run's config; every row counts once.
"""

import json

from absl import flags

from ft import cli

flags.DEFINE_string("run", "", "folder of a finished run")
flags.DEFINE_string("data", "", "source of labelled rows, as in the config's data.train")
flags.DEFINE_integer("batch", 32, "rows computed together", lower_bound=1)


def main(_):
  from ft import compilation, errors, judge

  run = cli.run_folder(flags.FLAGS.run)
  if not flags.FLAGS.data:
    raise errors.UserError("--data=SOURCE is missing: a file, a folder, pypi:… or tfds:…")
  compilation.cache()
  print(json.dumps(judge.judge(run, flags.FLAGS.data, flags.FLAGS.batch), indent=1))


if __name__ == "__main__":
  cli.run(main, __doc__)
