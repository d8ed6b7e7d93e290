"""Makes what a run starts from, where it is not at hand.

A small untrained translation model, with a tokenizer learnt from texts of both languages:

    python scripts/prepare.py --texts=train.en.gz,train.de.gz --output=DIR

The folder is a checkpoint like any other: name it in a config's model.source. A recommender for the
items of a table, untrained, or with the transformer of a run on another domain (--start=RUN):

    python scripts/prepare.py --interactions=clicks.csv --output=DIR

Or synthetic preference pairs from conversations (see ft/synthetic.py), a JSON object a line:

    python scripts/prepare.py --dialogues=chat.jsonl --speaker=SYSTEM --output=pairs.jsonl

Or images of what scikit-learn brings along (see ft/scenes.py): its handwritten digits, a folder a
class; or 900 scenes to train on with masks, digits pasted on crops of two photographs:

    python scripts/prepare.py --digits --output=DIR
    python scripts/prepare.py --scenes=900 --output=DIR

Or a table that scikit-learn brings along, as CSV with a label:

    python scripts/prepare.py --sklearn=breast_cancer --output=breast_cancer.csv
"""

from absl import flags

from ft import cli, errors

flags.DEFINE_list("texts", [], "files with a text a line, which may be compressed by gzip")
flags.DEFINE_string("output", "", "folder or file to be made")
flags.DEFINE_integer("vocabulary", 4000, "most tokens", lower_bound=16)
flags.DEFINE_integer("width", None, "width of the model; 256, of a recommender 64", lower_bound=2)
flags.DEFINE_integer("layers", 2, "layers of the encoder, and of the decoder", lower_bound=1)
flags.DEFINE_integer("heads", None, "heads of each attention; 4, of a recommender 2", lower_bound=1)
flags.DEFINE_integer("positions", None, "most tokens of a text, 256, or items of a history, 50",
                     lower_bound=2)
flags.DEFINE_integer("seed", 0, "seed of the weights, or of what is drawn")
flags.DEFINE_string("interactions", "", "table of (user, item, time), to make a recommender for")
flags.DEFINE_string("item", "", "interactions: its column with the items, if its name does not say")
flags.DEFINE_enum("kind", "sasrec", ["sasrec", "bert4rec"], "interactions: the recommender")
flags.DEFINE_float("dropout", 0.5, "interactions: rate of dropout", lower_bound=0, upper_bound=0.9)
flags.DEFINE_string("start", "", "interactions: recommender or run whose transformer is taken")
flags.DEFINE_string("dialogues", "", "file of conversations, to make preference pairs of")
flags.DEFINE_enum("sklearn", None, ["breast_cancer", "iris", "wine"], "table of scikit-learn")
flags.DEFINE_string("column", "turns", "dialogues: its column with the turns")
flags.DEFINE_string("speaker", "assistant", "dialogues: whose replies are compared")
flags.DEFINE_bool("digits", False, "write handwritten digits as images by class")
flags.DEFINE_integer("scenes", 0, "write so many scenes with masks to train on", lower_bound=0)
flags.DEFINE_integer("side", 96, "scenes: pixels of a side", lower_bound=32)
flags.DEFINE_integer("rows", 0, "dialogues: the first so many; 0: all", lower_bound=0)


# What is made -> the flags it reads beside --output and its own.
READS = {
  "texts": ("vocabulary", "width", "layers", "heads", "positions", "seed"),
  "interactions": ("item", "kind", "dropout", "start", "width", "layers", "heads", "positions",
                   "seed"),
  "dialogues": ("column", "speaker", "rows", "seed"),
  "digits": (),
  "scenes": ("side", "seed"),
  "sklearn": (),
}


def check(f):
  """Raises UserError where not one thing is asked for, or with a flag that it would not read."""
  asked = [name for name in READS if f[name].value]
  if not f.output or len(asked) != 1:
    raise errors.UserError("--output and one of --texts, --interactions, --dialogues, --digits, "
                           "--scenes and --sklearn are needed; see --help")
  every = {name for names in READS.values() for name in names}
  idle = sorted(name for name in every - {*READS[asked[0]]} if f[name].present)
  if idle:
    reads = ", ".join(f"--{name}" for name in READS[asked[0]]) or "--output alone"
    raise errors.UserError(f"--{', --'.join(idle)}: not read with --{asked[0]}, which reads "
                           f"{reads}")


def main(_):
  from ft import bundled, results, scenes, scratch, synthetic

  f = flags.FLAGS
  check(f)
  if f.dialogues:
    count = synthetic.write(f.output, f.dialogues, f.column, f.speaker, f.rows, f.seed)
    print(f"{f.output}: {count} pairs")
    return
  if f.digits or f.scenes:
    count = (scenes.write_digits(f.output) if f.digits
             else scenes.write(f.output, f.scenes, f.side, f.seed))
    print(f"{f.output}: {count} images")
    return
  if f.sklearn:
    print(f"{f.output}: {bundled.write(f.output, f.sklearn)} rows")
    return
  if f.interactions:
    made = scratch.write_recommender(
      f.output, f.interactions, {"item": f.item} if f.item else None, f.kind, f.width or 64,
      f.layers, f.heads or 2, f.positions or 50, f.dropout, f.start, f.seed)
    how = f"the transformer of {f.start}" if f.start else "none of them trained"
    print(f"{f.output}: {made.config.vocab_size} rows of items, "
          f"{results.count(made.variables):,} parameters, {how}")
    return
  made = scratch.write(f.output, f.texts, f.vocabulary, f.width or 256, f.layers, f.heads or 4,
                       f.positions or 256, f.seed)
  print(f"{f.output}: {made.config.vocab_size} tokens, {results.count(made.variables):,} "
        "parameters, none of them trained")


if __name__ == "__main__":
  cli.run(main, __doc__)
