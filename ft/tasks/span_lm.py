"""Span corruption: spans of a text are replaced by sentinels, and written in their order.

T5's pretraining (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4 and figure 2), continued on
texts of one's own: of "Thank you for inviting me to your party last week" the model may read "Thank
you <extra_id_0> me to your party <extra_id_1> week" and write "<extra_id_0> for inviting
<extra_id_1> last <extra_id_2>". How many tokens and spans a text loses follows from its length, as
in t5's `random_spans_noise_mask` (Apache-2.0), and where is a random partition; the text's last
token is kept, so that the last span is closed as in the figure. Training draws anew for each row in
each epoch, from the run's seed, the epoch and the row alone; evaluation replaces the same spans of
a text whenever it is read.

Shapes: B batch, T tokens of a target, S tokens of the input, D hidden size.
"""

import zlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ft import errors, models
from ft.tasks import lm

KEYS = {
  "label_smoothing": (0.0, "share of the target spread over the vocabulary", (0.0, 0.99)),
  "noise_rate": (0.15, "share of the tokens that are replaced and written", (0.01, 0.9)),
  "mean_span": (3.0, "mean tokens of a span", (1.0, None)),
}
_SENTINEL = "<extra_id_{}>"


class Task(lm.Task):
  """Loss, predictions and metrics of span corruption; the sums are those of `lm.Task`."""

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data` whose rows have a text or turns.
      preprocess: text.Preprocess.

    Raises:
      UserError: the rows are no texts, or the model is no encoder-decoder with sentinels.
    """
    lm.need_text(data, "span_lm")
    info, sentinels = preprocess.info, []
    if not hasattr(models.family_module(info.family).Model, "decode"):
      raise errors.UserError(f"task.name=span_lm: {info.family} models are no encoder-decoders; "
                             "use task.name=lm or masked_lm")
    find = preprocess.tokenizer.token_to_id
    while (number := find(_SENTINEL.format(len(sentinels)))) is not None:
      sentinels.append(int(number))
    hf = info.hf_config or {}
    start = hf.get("decoder_start_token_id", hf.get("pad_token_id"))
    if len(sentinels) < 2:
      raise errors.UserError(f"task.name=span_lm: the tokenizer in {info.folder} has no sentinels "
                             "(<extra_id_0>, …); use a T5, or task.name=seq2seq with pairs")
    if start is None or hf.get("eos_token_id") is None:
      raise errors.UserError(f"{info.folder}: config.json has no decoder_start_token_id, or no "
                             "eos_token_id")
    self._settle(preprocess, {
      "sentinels": sentinels, "start": int(start), "end": int(np.ravel(hf["eos_token_id"])[0]),
      "noise_rate": config.noise_rate, "mean_span": config.mean_span})
    self._smoothing = float(config.label_smoothing)

  def _settle(self, preprocess, spec: Mapping) -> None:
    super()._settle(preprocess, spec)
    preprocess.pad = {**preprocess.pad, "labels": -1}

  # Examples.

  def example(self, row: dict) -> dict:
    """Returns int32 arrays: input_ids and attention_mask (S,), and "labels" (T,), the spans.

    Equal texts lose equal spans.

    Raises:
      RowError: a text of fewer than two tokens, or one that has a sentinel in it.
    """
    text, encoding = self.preprocess.encode(row)
    ids = np.array(encoding.ids, np.int32)
    ids = ids[np.array(encoding.special_tokens_mask) == 0]
    if len(ids) < 2:
      raise errors.RowError("a text of one token: there is nothing to predict it from")
    if np.isin(ids, self._spec["sentinels"]).any():
      raise errors.RowError(f"a text with a sentinel such as <extra_id_0> in it: {text[:60]!r}")
    return self._corrupted(ids, np.random.default_rng(zlib.crc32(ids.tobytes())))

  unlabelled = example

  def augment(self, example: dict, rng: np.random.Generator) -> dict:
    """Returns the example with other spans replaced, for a step of training."""
    read, labels = example["input_ids"][:-1], example["labels"][:-1]
    return self._corrupted(restore(read, labels, self._spec["sentinels"]), rng)

  def _corrupted(self, ids, rng) -> dict:
    noise = spans(len(ids), *self._size(len(ids)), rng)
    end = np.array([self._spec["end"]], np.int32)
    read, labels = corrupt(ids, noise, self._spec["sentinels"])
    read = np.concatenate([read, end])
    return {"input_ids": read, "attention_mask": np.ones_like(read),
            "labels": np.concatenate([labels, end])}

  def _size(self, length: int) -> tuple[int, int]:
    """Returns how many tokens and spans a text of this length loses."""
    tokens = min(max(round(length * self._spec["noise_rate"]), 1), length - 1)
    count = max(round(tokens / self._spec["mean_span"]), 1)
    return tokens, min(count, tokens, length - tokens, len(self._spec["sentinels"]) - 1)

  def show(self, example: dict) -> str:
    """Returns an example as the model reads it, and what it should write in ⟦ ⟧."""
    wanted = self.preprocess.tokenizer.decode(example["labels"].tolist(), skip_special_tokens=False)
    return f"{self.preprocess.show(example)} ⟦{wanted}⟧"

  # On the device.

  def _states(self, apply, variables, batch, rng) -> tuple:
    """Returns hidden (B, T, D), the tokens they should predict (B, T), and which count (B, T)."""
    labels = batch["labels"][:, :self._longest(batch["labels"].shape[1])]
    before = jnp.maximum(labels[:, :-1], 0)
    start = jnp.full_like(labels[:, :1], self._spec["start"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
              "decoder_input_ids": jnp.concatenate([start, before], axis=1)}
    hidden = apply(variables, self.preprocess.finish(inputs), rng)["last_hidden_state"]
    weights = (labels >= 0) * batch["weight"][:, None]
    return hidden, jnp.maximum(labels, 0), weights.astype(jnp.float32)

  def _longest(self, width: int) -> int:
    """Returns the most labels of a text whose input and labels fit a width that both fill up to."""
    found = 1
    for length in range(2, self.preprocess.max_length + 1):
      tokens, count = self._size(length)
      if max(length - tokens, tokens + 1) + count + 1 <= width:
        found = max(found, tokens + count + 2)
    return found


def spans(length: int, tokens: int, count: int, rng: np.random.Generator) -> np.ndarray:
  """Returns which of `length` tokens are in a span (length,); the last one is not.

  Args:
    length: of the text.
    tokens: in spans, all together.
    count: of spans; at most tokens, and at most length - tokens.
    rng: of the draw.
  """
  def partition(total, parts):
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total])

  kept = partition(length - tokens + 1, count + 1)
  kept[0] -= 1  # a text may begin with a span
  sizes = np.zeros(2 * count + 1, np.int64)
  sizes[::2], sizes[1::2] = kept, partition(tokens, count)
  return np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)


def corrupt(ids, noise, sentinels) -> tuple[np.ndarray, np.ndarray]:
  """Returns (input, labels) of ids (T,): each span a sentinel, and sentinels with their spans.

  Args:
    ids: (T,).
    noise: (T,) which of them are in a span; the last is not.
    sentinels: ids, of the first span first; one more than there are spans.
  """
  first = noise & ~np.concatenate([[False], noise[:-1]])
  count, marks = int(first.sum()), np.asarray(sentinels, np.int32)
  read = np.where(noise, marks[np.cumsum(first) - 1], ids)[~noise | first]
  begins = (np.cumsum(noise) - 1)[first]  # among the tokens that are in spans
  labels = np.append(np.insert(ids[noise], begins, marks[:count]), marks[count])
  return read.astype(np.int32), labels.astype(np.int32)


def restore(read, labels, sentinels) -> np.ndarray:
  """Returns the ids that `corrupt` made these of."""
  parts = np.split(labels, np.flatnonzero(np.isin(labels, sentinels)))[1:]
  known = {int(part[0]): part[1:] for part in parts}
  return np.concatenate([known.get(int(token), [token]) for token in read]).astype(np.int32)
