"""Speech to text: Whisper, which decodes a text, and wav2vec2 and HuBERT, whose frames are letters.

A row has a sound (role `audio`) and what is said in it (`text`). Whisper's loss is the
cross-entropy of the text's tokens and of the one that ends it; the start, with language, task and
whether there are times, is given and not learnt (see ft/data/transcripts.py). Letters have the CTC
loss (Graves et al. 2006). Both are in nats per token. Rows whose sound is longer than a clip are
left out, as their text would be of more than the clip; at prediction such a sound is cut where it
is quiet, and the parts' texts are joined.

The best checkpoint is chosen by nats per token of validation; texts are written and compared once,
at the end (`generate_rows`), greedily or by beams.

Shapes: B batch, T tokens of a text, K frames of letters, N rows of a split, V vocabulary.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
import optax

from ft import ctc, errors, losses, models, speech
from ft.data import audio, sounds, transcripts
from ft.models import generate
from ft.tasks import writing

KEYS = {
  "label_smoothing": (0.0, "share of the target spread over the vocabulary; not with CTC",
                      (0.0, 0.99)),
  "max_target": (128, "most tokens of a text; of Whisper also of what it writes", (2, None)),
  "language": ("", "code of what is spoken, such as en, of multilingual Whisper models"),
  "output": ("transcribe", "Whisper: as it is spoken, or in English", ["transcribe", "translate"]),
  "timestamps": (False, "Whisper: texts have marks of time, such as <|1.20|>; where a row's text "
                 "has none it gets those of start and end"),
  "metric": ("wer", "what verdicts are about; the best step is by nats_per_token",
             ["nats_per_token", "wer", "cer"]),
  "normaliser": ("english", "how texts are made alike before they are compared, see ft/speech.py",
                 ["english", "basic", "none"]),
  "spell_digits": (False, "digits that stand alone count as their words: 7 is taught as seven"),
  "generate_rows": (200, "rows of a split that texts are written for, at the end; 0: none",
                    (0, None)),
  "num_beams": (1, "beams of the search for a text; 1: greedy", (1, 64)),
}


class Task(writing.Task):
  """Loss, texts and metrics of transcription.

  Attributes:
    metric: what the best checkpoint is chosen by.
    judged: what results and verdicts are about.
    generate_rows: most rows of a split that texts are written for; see `ft.generation`.
    max_prompt: most samples of a clip.
    write: of CTC, (apply, variables, batch) -> what was written, in one pass; else None.
  """

  needs = ("text",)
  statistics = speech.STATISTICS

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data` whose rows have audio and text.
      preprocess: audio.Preprocess.

    Raises:
      UserError: no such rows, a model that writes no text, or keys that do not fit it.
    """
    for role in ("audio", "text"):
      if role not in data.columns:
        raise errors.UserError(f"task.name=transcribe needs {role}, and the data has no column of "
                               f"that role; set data.modality=audio and data.columns.{role}")
    if config.metric != "nats_per_token" and not config.generate_rows:
      raise errors.UserError(f"task.metric={config.metric} is of written texts, and "
                             "task.generate_rows=0 writes none")
    kept = ("metric", "normaliser", "spell_digits", "generate_rows", "num_beams", "max_target")
    spec = {key: config[key] for key in kept}
    self._settle(preprocess, {**spec, **_kind(config, preprocess)})
    self._smoothing = float(config.label_smoothing)
    if self._ctc and self._smoothing:
      raise errors.UserError("task.label_smoothing is of models that decode a text; this one has a "
                             "CTC loss and reads its letters off the frames")

  def _settle(self, preprocess, spec: Mapping) -> None:
    self._spec, self.preprocess, folder = dict(spec), preprocess, preprocess.info.folder
    self._ctc = "convolutions" in spec
    self.model_args = {"head": "ctc" if self._ctc else "lm"}
    self.judged, self.max_prompt = (spec["metric"], "min"), preprocess.samples
    self.generate_rows, self._size = spec["generate_rows"], spec["max_target"]
    if self._ctc:
      self.write = self._write_letters
      self.words = transcripts.Letters.of(folder, {"pad_token_id": spec["blank"]})
    else:
      self.write = None
      layout = {**spec["layout"], "prompt": tuple(spec["layout"]["prompt"])}
      self.words = transcripts.Tokens(transcripts.read_tokenizer(folder),
                                      transcripts.Layout(**layout))

  @functools.cached_property
  def _measures(self) -> speech.Measures:
    """The rates; only measuring needs their library, writing texts does not."""
    return speech.Measures(self._spec["normaliser"], self._spec["spell_digits"])

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return self._spec

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can write and be measured (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(preprocess, {**spec, "generate_rows": max(1, spec["generate_rows"])})
    task._smoothing = 0.0
    return task

  def show(self, example: dict) -> str:
    """Returns an example's sound, and the text that carries loss."""
    labels = [int(i) for i in example["labels"] if i >= 0]
    return f"{self.preprocess.show(example)}: {self.decode(labels)} ({len(labels)} tokens)"

  # On the host: rows to examples.

  def example(self, row: dict) -> dict:
    """Returns the example of a row with "labels": (max_target,) int32, filled up with -1.

    Raises:
      RowError: no text, one of too many tokens, or a sound too long or too short for it.
    """
    sound, rate = self.preprocess.sound(row), self.preprocess.rate
    if len(sound) > self.preprocess.samples:
      raise errors.RowError(f"a recording of {len(sound) / rate:.1f} s, and clips have "
                            f"{self.preprocess.samples / rate:.1f} s: cut it, with its text")
    text = (row.get("text") or "").strip()
    text = speech.spelt(text) if self._spec["spell_digits"] else text
    if not text:
      raise errors.RowError("no text to go with the sound")
    ids = self.words.encode(text) if self._ctc else self.words.encode(text, len(sound) / rate)
    if len(ids) > self._size:
      raise errors.RowError(f"a text of {len(ids)} tokens, more than task.max_target={self._size}: "
                            f"{text[:60]!r}")
    if self._ctc and (not ids or self._frames(len(sound)) < transcripts.needed_frames(ids)):
      raise errors.RowError(f"a recording of {len(sound) / rate:.2f} s is too short for its "
                            f"{len(ids)} letters: {text[:60]!r}")
    labels = np.full(self._size, -1, np.int32)
    labels[:len(ids)] = ids
    return {**self.preprocess.clip(sound), "labels": labels}

  def prompt(self, row: dict) -> dict:
    """Returns the example of a row without its text, to write it."""
    made = self.preprocess.clip(self.preprocess.sound(row))
    if self._ctc and self._frames(len(made["audio"])) < 1:
      raise errors.RowError(f"a sound of {len(made['audio'])} samples, too short for the model")
    return made

  def parts(self, row: dict) -> list[dict]:
    """Returns the rows, of a clip's length at most, that a row is read in; with "start", seconds.

    See `sounds.windows`.
    """
    sound, rate = self.preprocess.sound(row), self.preprocess.rate
    found = sounds.windows(sound, self.preprocess.samples, rate)
    return [{"audio": {"array": sound[start:end], "sampling_rate": rate}, "start": start / rate}
            for start, end in found]

  def joined(self, parts: list[dict], answers: list[dict]) -> dict:
    """Returns the answer for a row from those for its parts."""
    made = {"text": self.words.join([answer["text"] for answer in answers])}
    if all("segments" in answer for answer in answers):
      made["segments"] = [
        {**segment, **{key: round(segment[key] + part["start"], 2) for key in ("start", "end")
                       if segment[key] is not None}}
        for part, answer in zip(parts, answers, strict=True) for segment in answer["segments"]]
    return made

  # On the device.

  def _inputs(self, batch: dict) -> dict:
    return self.preprocess.finish({key: batch[key] for key in audio.BATCH if key in batch})

  def _states(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns hidden (B, T, D), the tokens they should predict (B, T), and which count (B, T)."""
    prompt, labels = self.words.layout.prompt, batch["labels"]
    before = jnp.where(labels < 0, self.words.layout.end, labels)[:, :-1]
    start = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (labels.shape[0], len(prompt)))
    inputs = {**self._inputs(batch), "decoder_input_ids": jnp.concatenate([start, before], axis=1)}
    hidden = apply(variables, inputs, rng)["last_hidden_state"][:, len(prompt) - 1:]
    weights = (labels >= 0) * batch["weight"][:, None]
    return hidden, jnp.maximum(labels, 0), weights.astype(jnp.float32)

  def _cross_entropy(self, apply, variables, batch, rng, smoothing) -> tuple:
    """Returns ({"loss", "nll"}: (B,) sums, weights (B, T))."""
    if not self._ctc:
      return super()._cross_entropy(apply, variables, batch, rng, smoothing)
    logits, real = self._letters(apply, variables, batch, rng)
    empty = (batch["labels"] < 0).astype(jnp.float32)
    nll = optax.ctc_loss(logits, 1.0 - real, jnp.maximum(batch["labels"], 0), empty,
                         blank_id=self.words.blank) * batch["weight"]
    return {"loss": nll, "nll": nll}, (1.0 - empty) * batch["weight"][:, None]

  def divergence(self, apply: Callable, variables, base_variables, batch: dict,
                 temperature: float = 1.0) -> tuple:
    """Returns sums over tokens, of CTC over frames: (Σ T² KL(base || model), count).

    See `lm.Task.divergence`.
    """
    if not self._ctc:
      return super().divergence(apply, variables, base_variables, batch, temperature)
    ours, real = self._letters(apply, variables, batch, None)
    base, _ = self._letters(apply, base_variables, batch, None)
    weight = real * batch["weight"][:, None]
    return jnp.sum(losses.apart(base, ours, temperature) * weight), jnp.sum(weight)

  def _letters(self, apply, variables, batch, rng) -> tuple:
    """Returns logits (B, K, V), and which frames are of real samples (B, K) float32."""
    logits = apply(variables, self._inputs(batch), rng)["logits"].astype(jnp.float32)
    count = jnp.maximum(self._frames(self.preprocess.sounds(batch)[1]), 1)
    return logits, (jnp.arange(logits.shape[1]) < count[:, None]).astype(jnp.float32)

  def _frames(self, samples):
    """Returns how many frames a model of letters makes of so many samples: ints or arrays."""
    for width, stride in self._spec["convolutions"]:
      samples = (samples - width) // stride + 1
    return samples

  # Texts, see `ft.generation`.

  def decoding(self, pretrained) -> generate.Settings:
    """Returns how Whisper's texts are written: greedily or by beam search.

    Tokens that are never written are those of generation_config.json, or else of config.json.
    """
    changes = {}
    if "generation_config.json" not in pretrained.files:
      stated = json.loads(pretrained.config.source)
      changes = {key: tuple(stated[key]) for key in ("suppress_tokens", "begin_suppress_tokens")
                 if stated.get(key)}
    return generate.Settings.of(
      pretrained, do_sample=False, num_beams=self._spec["num_beams"], max_new_tokens=self._size,
      **changes)

  def prompts(self, batch: dict) -> tuple:
    """Returns what generation reads of a batch, and what the decoder starts with."""
    return self._inputs(batch), list(self.words.layout.prompt)

  def _write_letters(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"answer": (B, K) ids, "answer_length": (B,)}: what `ctc` reads off the frames."""
    logits, real = self._letters(apply, variables, batch, None)
    size = max(logits.shape[1], self._frames(self.preprocess.samples))  # one width for all batches
    blank, width = self.words.blank, self._spec["num_beams"]
    answer, length = (ctc.greedy(logits, real, blank, size) if width == 1 else
                      ctc.beams(logits, real, blank, size, width))
    return {"answer": answer, "answer_length": length}

  def decode(self, ids) -> str:
    """Returns the text of token ids (T,)."""
    return self.words.decode(ids)

  def compare(self, rows, index, written: list[str]) -> dict[str, np.ndarray]:
    """Returns statistics (n, …) of texts that were written for some of the rows.

    Args:
      rows: sources.Rows with texts.
      index: (n,) which of them.
      written: (n,) texts.
    """
    return self._measures.statistics([rows[int(i)]["text"] for i in index], written)

  def sample(self, row: dict) -> dict[str, str]:
    """Returns what a reader compares a written text with."""
    return {"sound": str(row["audio"])[-80:], "target": row["text"]}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one row as JSON types: its text and, with times, its segments."""
    del calibration
    ids = outputs["answer"][:int(outputs["answer_length"])]
    made = {"text": self.decode(ids)}
    if not self._ctc and self.words.layout.times:
      made["segments"] = [{"start": start, "end": end, "text": text.strip()}
                          for start, end, text in self.words.segments(ids)]
    return made


def _kind(config, preprocess) -> dict:
  """Returns what tells Whisper's texts and letters apart, and how each is written, as JSON."""
  folder, hf = preprocess.info.folder, preprocess.info.hf_config
  family = models.family_module(preprocess.info.family)
  heads = family.Config.HEADS
  if "ctc" in heads:
    own = family.Config.from_hf(hf)
    pairs = zip(own.conv_kernel, own.conv_stride, strict=True)
    letters = transcripts.Letters.of(folder, hf)
    if config.language or config.timestamps or config.output != "transcribe":
      raise errors.UserError("task.language, task.output and task.timestamps are Whisper's; this "
                             "model writes the letters that it hears")
    return {"convolutions": [list(pair) for pair in pairs], "blank": letters.blank}
  if "lm" not in heads:
    raise errors.UserError("task.name=transcribe needs a model that writes text, such as Whisper")
  layout = transcripts.Layout.of(
    folder, hf, transcripts.read_tokenizer(folder), config.language, config.output,
    config.timestamps)
  most = family.Config.from_hf(hf).max_target_positions - len(layout.prompt)
  if config.max_target > most:
    raise errors.UserError(f"task.max_target={config.max_target}: the model has room for {most} "
                           "tokens behind the start; set it to that or less")
  return {"layout": dataclasses.asdict(layout)}
