"""Writes the tuned model of a finished run for use elsewhere, and checks what was written.

    python scripts/export.py --run=DIR --format=hf|merged|peft|stablehlo --output=DIR

hf and merged: a Hugging Face folder of plain weights, adapters folded in. peft: the adapter alone,
as `peft.PeftModel.from_pretrained(base_model, DIR)` opens it. stablehlo: one file that
`jax.export.deserialize(...).call(**inputs)` runs without any code of ft, batch size free. With each
goes the run's card as README.md in the form of the Hugging Face Hub.
"""

import pathlib

from absl import flags, logging

from ft import cli

flags.DEFINE_string("run", "", "folder of a finished run, or of an exported model")
flags.DEFINE_enum("format", "hf", ["hf", "merged", "peft", "stablehlo"], "form to write")
flags.DEFINE_string("output", "", "folder to write; must not exist or be empty")


def main(_):
  from ft import card, compilation, errors, models, predict, stablehlo
  from ft.card import readme
  from ft.tune import peft, saving

  f = flags.FLAGS
  compilation.cache()
  if not f.run or not f.output:
    raise errors.UserError("--run=DIR and --output=DIR are needed")
  output = pathlib.Path(f.output)
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise errors.UserError(f"--output={output}: is there already; choose a new or empty folder")
  folder = pathlib.Path(f.run)
  if f.format == "peft":
    peft.export(folder, output)
  else:
    model = predict.exported(folder)
    if saving.is_adapter(model):
      raise errors.UserError(
        f"--format={f.format}: {model} holds an adapter of a method that plain weights cannot "
        "compute; --format=peft writes it where PEFT has the method"
      )
    pretrained = models.load(str(model))
    if f.format == "stablehlo":
      stablehlo.write(pretrained, output)
    else:
      models.export(pretrained, output)
  readme.follow(folder, output, card.read)
  logging.info("%s: written and checked", output)


if __name__ == "__main__":
  cli.run(main, __doc__)
