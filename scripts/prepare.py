"""Makes what a run starts from, where it is not at hand.

A small untrained translation model, with a tokenizer learnt from texts of both languages:

    python scripts/prepare.py --texts=train.en.gz,train.de.gz --output=DIR

The folder is a checkpoint like any other: name it in a config's model.source. Or synthetic
preference pairs from conversations (see ft/synthetic.py), a JSON object a line:

    python scripts/prepare.py --dialogues=chat.jsonl --speaker=SYSTEM --output=pairs.jsonl
"""

from absl import flags, logging

from ft import cli

flags.DEFINE_list("texts", [], "files with a text a line, which may be compressed by gzip")
flags.DEFINE_string("output", "", "folder or file to be made")
flags.DEFINE_integer("vocabulary", 4000, "most tokens", lower_bound=16)
flags.DEFINE_integer("width", 256, "width of the model", lower_bound=2)
flags.DEFINE_integer("layers", 2, "layers of the encoder, and of the decoder", lower_bound=1)
flags.DEFINE_integer("heads", 4, "heads of each attention", lower_bound=1)
flags.DEFINE_integer("positions", 256, "most tokens of a text", lower_bound=8)
flags.DEFINE_integer("seed", 0, "seed of the weights, or of what pairs draw")
flags.DEFINE_string("dialogues", "", "file of conversations, to make preference pairs of")
flags.DEFINE_string("column", "turns", "dialogues: its column with the turns")
flags.DEFINE_string("speaker", "assistant", "dialogues: whose replies are compared")
flags.DEFINE_integer("rows", 0, "dialogues: the first so many; 0: all", lower_bound=0)


def main(_):
  from ft import errors, results, scratch, synthetic

  f = flags.FLAGS
  if not f.output or bool(f.texts) == bool(f.dialogues):
    raise errors.UserError("--output and --texts=FILE,… or --dialogues=FILE are needed; see --help")
  if f.dialogues:
    count = synthetic.write(f.output, f.dialogues, f.column, f.speaker, f.rows, f.seed)
    logging.info("%s: %d pairs", f.output, count)
    return
  made = scratch.write(f.output, f.texts, f.vocabulary, f.width, f.layers, f.heads, f.positions,
                       f.seed)
  logging.info("%s: %d tokens, %s parameters, none of them trained", f.output,
               made.config.vocab_size, f"{results.count(made.variables):,}")


if __name__ == "__main__":
  cli.run(main, __doc__)
