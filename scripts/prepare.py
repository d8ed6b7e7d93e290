"""Makes a small untrained translation model, with a tokenizer learnt from texts of both languages.

    python scripts/prepare.py --texts=train.en.gz,train.de.gz --output=DIR

The folder is a checkpoint like any other: name it in a config's model.source.
"""

from absl import flags, logging

from ft import cli

flags.DEFINE_list("texts", [], "files with a text a line, which may be compressed by gzip")
flags.DEFINE_string("output", "", "folder to be made")
flags.DEFINE_integer("vocabulary", 4000, "most tokens", lower_bound=16)
flags.DEFINE_integer("width", 256, "width of the model", lower_bound=2)
flags.DEFINE_integer("layers", 2, "layers of the encoder, and of the decoder", lower_bound=1)
flags.DEFINE_integer("heads", 4, "heads of each attention", lower_bound=1)
flags.DEFINE_integer("positions", 256, "most tokens of a text", lower_bound=8)
flags.DEFINE_integer("seed", 0, "seed of the weights")


def main(_):
  from ft import errors, results, scratch

  f = flags.FLAGS
  if not f.texts or not f.output:
    raise errors.UserError("--texts=FILE,… and --output=DIR are needed; see --help")
  made = scratch.write(f.output, f.texts, f.vocabulary, f.width, f.layers, f.heads, f.positions,
                       f.seed)
  logging.info("%s: %d tokens, %s parameters, none of them trained", f.output,
               made.config.vocab_size, f"{results.count(made.variables):,}")


if __name__ == "__main__":
  cli.run(main, __doc__)
