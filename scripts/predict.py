"""Predicts with a finished run: one JSON object a row.

    python scripts/predict.py --run=DIR --input=FILE|FOLDER|- --output=FILE

Text comes as lines, CSV, TSV, JSONL or standard input; images as files or folders. A row that
cannot be read gets an `error` field and stops nothing.
"""

import json
import sys

from absl import flags

from ft import cli

flags.DEFINE_string("run", "", "folder of a finished run, or of an exported model")
flags.DEFINE_string("input", "-", "file or folder with rows; - is standard input")
flags.DEFINE_string("output", "-", "file for the JSON lines; - is standard output")
flags.DEFINE_integer("batch", 32, "rows computed together", lower_bound=1)


def main(_):
  from ft import compilation, errors, predict

  compilation.cache()
  if not flags.FLAGS.run:
    raise errors.UserError("--run=DIR is missing: the folder of a finished run")
  predictor = predict.Predictor(flags.FLAGS.run, flags.FLAGS.batch)
  rows = predictor.rows(flags.FLAGS.input)
  try:
    out = sys.stdout if flags.FLAGS.output == "-" else open(flags.FLAGS.output, "w")
  except OSError as error:
    raise errors.UserError(f"--output={flags.FLAGS.output}: {error.strerror}") from None
  with out:
    for answer in predictor(rows):
      print(json.dumps(answer, ensure_ascii=False), file=out, flush=True)


if __name__ == "__main__":
  cli.run(main, __doc__)
