"""Text to text: translation, summaries, rewriting; on encoder-decoders and on decoder-only models.

A row has a source (role `text`) and a `target`. Encoder-decoders (T5, BART, Marian, mBART, M2M100)
read the one and decode the other; decoder-only models get the source as a user's turn in the
checkpoint's chat template and answer with the target. The loss is of the target's tokens alone, the
one that ends it included. See ft/data/pairs.py for the tokens, ft/texts.py for the metrics.

The best checkpoint is chosen by nats per token of validation; the texts themselves are written and
compared once, at the end (`generate_rows`). task.metric says what the verdicts are about.

Shapes: B batch, T tokens of a target, S tokens of the input, N rows of a split, D hidden size.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from ft import errors, models, texts
from ft.data import pairs
from ft.models import generate
from ft.tasks import writing

KEYS = {
  "label_smoothing": (0.0, "share of the target spread over the vocabulary", (0.0, 0.99)),
  "prefix": ("", "text before every source: T5's task, or what a chat model is asked to do"),
  "max_target": (64, "most tokens of a target, and of what is written, special ones included",
                 (2, None)),
  "source_language": ("", "token of the source's language, of mBART, M2M100 and NLLB"),
  "target_language": ("", "token of the target's language, of mBART, M2M100 and NLLB"),
  "metric": ("nats_per_token", "what verdicts are about; the best step is by nats_per_token",
             ["nats_per_token", "bleu", "chrf", "rouge1", "rouge2", "rouge_l"]),
  "scores": (("bleu", "chrf", "rouge"), "what written texts are scored by: bleu, chrf, rouge",
             "list"),
  "bleu_tokenizer": ("13a", "sacrebleu's tokenizer for BLEU",
                     ["13a", "intl", "char", "zh", "none"]),
  "rouge_stemming": (True, "whether ROUGE compares stems of English words"),
  "glossary": ("", "file of lines `source term<TAB>target term`, which texts should keep"),
  "lead": (0, "baseline of the source's first sentences; 0: the source as it is", (0, None)),
  "generate_rows": (200, "rows of a split that texts are written for, at the end; 0: none",
                    (0, None)),
  "num_beams": (1, "beams of the search for a text; 1: greedy", (1, 64)),
  "length_penalty": (None, "beams: above 0 favours long texts; empty: as the checkpoint says",
                     "float"),
  "no_repeat_ngram_size": (None, "no n-gram twice in a text; empty: as the checkpoint says", "int"),
}


class Task(writing.Task):
  """Loss, texts and metrics of text to text; losses and nats are those of `lm.Task`.

  Attributes:
    metric: what the best checkpoint is chosen by.
    judged: what results and verdicts are about.
    generate_rows: most rows of a split that texts are written for; see `ft.generation`.
    max_prompt: most tokens of a source, with what stands around it.
  """

  needs = ("target",)
  statistics = texts.STATISTICS

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data` whose rows have a text and a target.
      preprocess: text.Preprocess.

    Raises:
      UserError: no such rows, a layout that does not fit the model, or a metric without its texts.
    """
    for role, what in (("text", "source"), ("target", "target")):
      if role not in data.columns:
        raise errors.UserError(
          f"task.name=seq2seq needs a {what}, and the data has no column of that role; name it in "
          f"data.columns.{role}, or give two files of parallel lines: train=a.en,b.de")
    if config.metric != "nats_per_token" and not config.generate_rows:
      raise errors.UserError(f"task.metric={config.metric} is of written texts, and "
                             "task.generate_rows=0 writes none")
    family = models.family_module(preprocess.info.family)
    layout = pairs.Layout.of(config, preprocess, not hasattr(family.Model, "decode"))
    preprocess.columns = {"text": data.columns["text"]}
    self._settle(preprocess, {
      "layout": dataclasses.asdict(layout), "glossary": texts.glossary(config.glossary),
      **{key: config[key] for key in (
        "metric", "scores", "bleu_tokenizer", "rouge_stemming", "lead", "generate_rows",
        "num_beams", "length_penalty", "no_repeat_ngram_size")}})
    self._smoothing, self._rows = float(config.label_smoothing), data.splits
    if self.generate_rows and config.metric not in ("nats_per_token", *self._measures.names):
      raise errors.UserError(f"task.metric={config.metric} is not among task.scores="
                             f"{','.join(config.scores)}")

  def _settle(self, preprocess, spec: Mapping) -> None:
    super()._settle(preprocess, spec)
    layout = {**spec["layout"], "ends": tuple(spec["layout"]["ends"])}
    self.pairs = pairs.Pairs(preprocess, pairs.Layout(**layout))
    self.judged = (spec["metric"], "min" if spec["metric"] == "nats_per_token" else "max")
    self.generate_rows, self.max_prompt = spec["generate_rows"], self.pairs.max_source
    self._lead = texts.Lead(spec["lead"])
    if not self.pairs.layout.decoder_only:
      preprocess.pad = {**preprocess.pad, "labels": -1}

  @functools.cached_property
  def _measures(self) -> texts.Measures:
    """The scores; only measuring needs their libraries, writing texts does not."""
    s = self._spec
    return texts.Measures(s["scores"], s["bleu_tokenizer"], s["rouge_stemming"], s["glossary"])

  def show(self, example: dict) -> str:
    """Returns an example as the model reads it, and what of it carries loss."""
    return self.pairs.show(example)

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns the example of a row with a target; see `pairs.Pairs.example`."""
    return self.pairs.example(row)

  def prompt(self, row: dict) -> dict:
    """Returns the example of a row without one, to write its text."""
    return self.pairs.prompt(row)

  def _states(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns hidden (B, T, D), the tokens they should predict (B, T), and which count (B, T)."""
    read = {key: batch[key] for key in ("input_ids", "attention_mask")}
    take = self._continued if self.pairs.layout.decoder_only else self._decoded
    hidden, targets, weights = take(apply, variables, batch, read, rng)
    return hidden, targets, (weights * batch["weight"][:, None]).astype(jnp.float32)

  def _decoded(self, apply, variables, batch, read, rng):
    layout = self.pairs.layout
    labels = batch["labels"][:, :layout.max_target]  # filled up to the source's length
    before = jnp.where(labels < 0, layout.pad, labels)[:, :-1]
    start = jnp.full_like(labels[:, :1], layout.start)
    inputs = {**read, "decoder_input_ids": jnp.concatenate([start, before], axis=1)}
    hidden = apply(variables, self.preprocess.finish(inputs), rng)["last_hidden_state"]
    return hidden, jnp.maximum(labels, 0), labels >= 0

  def _continued(self, apply, variables, batch, read, rng):
    hidden = apply(variables, self.preprocess.finish(read), rng)["last_hidden_state"]
    # The states before the target's tokens only: most of a row is the source, and the logits of a
    # large vocabulary are most of the work.
    width = read["input_ids"].shape[1]
    size = min(self.pairs.layout.max_target, width - 1)
    wanted = batch["prompt"][:, None] + jnp.arange(size)
    place = jnp.clip(wanted, 1, width - 1)
    targets, real = (jnp.take_along_axis(read[key], place, axis=1)
                     for key in ("input_ids", "attention_mask"))
    hidden = jnp.take_along_axis(hidden, place[..., None] - 1, axis=1)
    return hidden, targets, real * (wanted < width)

  # Texts, see `ft.generation`.

  def decoding(self, pretrained) -> generate.Settings:
    """Returns how texts are written: greedily or by beam search, ended as targets are."""
    changes = {key: self._spec[key] for key in ("length_penalty", "no_repeat_ngram_size")
               if self._spec[key] is not None}
    if forced := self.pairs.layout.forced:
      changes["forced_bos_token_id"] = self.preprocess.tokenizer.token_to_id(forced)
    settings = generate.Settings.of(
      pretrained, do_sample=False, num_beams=self._spec["num_beams"],
      max_new_tokens=self.pairs.layout.max_target, **changes)
    ends = (*settings.eos_token_id, *self.pairs.ends)
    return dataclasses.replace(settings, eos_token_id=tuple(dict.fromkeys(ends)))

  def prompts(self, batch: dict) -> tuple:
    """Returns what generation reads of a batch, and what the decoder starts with."""
    read = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if not self.pairs.layout.decoder_only:
      return read, [self.pairs.layout.start]
    source = jnp.arange(read["input_ids"].shape[1]) < batch["prompt"][:, None]
    return {**read, "attention_mask": read["attention_mask"] * source}, None

  def compare(self, rows, index, written: list[str]) -> dict[str, np.ndarray]:
    """Returns statistics (n, …) of texts that were written for some of the rows.

    Args:
      rows: sources.Rows with targets.
      index: (n,) which of them.
      written: (n,) texts.
    """
    chosen = [rows[int(i)] for i in index]
    return self._measures.statistics([row["text"] for row in chosen],
                                     [row["target"].strip() for row in chosen], written)

  def sample(self, row: dict) -> dict[str, str]:
    """Returns what a reader compares a written text with."""
    return {"source": row["text"], "target": row["target"]}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one row as JSON types: the text that was written."""
    del calibration
    return {"text": self.preprocess.decode(outputs["answer"][:int(outputs["answer_length"])])}

  # On the host, over whole splits.

  def baselines(self, features: dict) -> dict:
    """Returns what no fine-tuning gets: the pretrained model, and the source or its beginning.

    Args:
      features: split -> what the pretrained model gives, texts included.
    """
    found = {"zero-shot": features}
    if self._written:
      found[self._lead.name] = {split: self._of_source(self._rows[split], part)
                                for split, part in features.items() if "generated" in part}
    return found

  def _of_source(self, rows, part: dict) -> dict:
    index = part["index"][np.asarray(part["generated"]) > 0]
    written = [self._lead(rows[int(i)]["text"]) for i in index]
    return texts.spread(part["index"], index, self.compare(rows, index, written))
