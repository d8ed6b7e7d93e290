"""Masked language modelling: some tokens are hidden, and predicted from those on both sides.

BERT's pretraining (Devlin et al. 2018, arXiv:1810.04805), continued on texts of one's own: of the
tokens that are chosen, most become the mask token, some another word, and some stay (80, 10 and 10
in a hundred); with task.whole_words all pieces of a word are chosen together. Draws are those of
transformers' DataCollatorForLanguageModeling for the same generator. Training draws anew for each
row in each epoch, from the run's seed, the epoch and the row alone; evaluation hides the same
tokens of a text whenever it is read, so that numbers of one split can be compared.

A checkpoint without a masked-word head, such as a sentence encoder, gets a new one, which has to be
learnt before its numbers mean much: the baseline "unigram" says how far word counts of train go.

Shapes: B batch, T tokens, N rows of a split, D hidden size. The tokens that are chosen are the only
ones that meet the head, see `ft.losses`.
"""

import json
import zlib
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from ft import errors, losses, models
from ft.tasks import lm

KEYS = {
  "label_smoothing": (0.0, "share of the target spread over the vocabulary", (0.0, 0.99)),
  "mask_rate": (0.15, "share of the tokens, or words, that are predicted", (0.01, 0.9)),
  "hidden_share": (0.8, "of those, the share that the mask token stands for", (0.0, 1.0)),
  "random_share": (0.1, "and the share that any other token stands for; the rest stay",
                   (0.0, 1.0)),
  "whole_words": (False, "whether all pieces of a word are predicted together"),
}
BOOKKEEPING = ("labels", "words", *lm.BOOKKEEPING)
_COUNTED = 20_000  # most rows of train whose words are counted
_MASKS = ("[MASK]", "<mask>")  # where no file says what the mask token is


class Task(lm.Task):
  """Loss, predictions and metrics of a masked language model; the sums are those of `lm.Task`."""

  model_args = {"head": "mlm"}

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data` whose rows have a text or turns.
      preprocess: text.Preprocess.

    Raises:
      UserError: the rows are no texts, the model has no masked-word head, its tokenizer no mask
        token, or the shares are more than everything.
    """
    lm.need_text(data, "masked_lm")
    family = preprocess.info.family
    if "mlm" not in models.family_module(family).Config.HEADS:
      raise errors.UserError(f"task.name=masked_lm: {family} models have no masked-word head; use "
                             "an encoder such as BERT, or task.name=lm or span_lm")
    if config.hidden_share + config.random_share > 1:
      raise errors.UserError(f"task.hidden_share={config.hidden_share:g} and task.random_share="
                             f"{config.random_share:g} are more than 1 together")
    self._settle(preprocess, {
      "mask": mask_token(preprocess),
      **{key: config[key] for key in ("mask_rate", "hidden_share", "random_share", "whole_words")}})
    self._smoothing, self._rows = float(config.label_smoothing), data.splits

  def _settle(self, preprocess, spec: Mapping) -> None:
    super()._settle(preprocess, spec)
    preprocess.pad = {**preprocess.pad, "labels": -1, "words": -1}

  # Examples.

  def example(self, row: dict) -> dict:
    """Returns int32 arrays (tokens,): the model's inputs, "labels" and "words".

    labels are the tokens that are predicted, -1 elsewhere; words number the words that tokens
    belong to, -1 for special tokens. Equal texts hide equal tokens.

    Raises:
      RowError: a text of fewer than two tokens.
    """
    _, encoding = self.preprocess.encode(row)
    example = self.preprocess.arrays(encoding)
    words = numbered(encoding) if self._spec["whole_words"] else np.arange(len(encoding.ids))
    words = np.where(encoding.special_tokens_mask, -1, words).astype(np.int32)
    if np.sum(words >= 0) < 2:
      raise errors.RowError("a text of one token: there is nothing to predict it from")
    rng = np.random.default_rng(zlib.crc32(example["input_ids"].tobytes()))
    return self._hidden({**example, "words": words}, rng)

  unlabelled = example

  def augment(self, example: dict, rng: np.random.Generator) -> dict:
    """Returns the example with other tokens hidden, for a step of training."""
    ids, labels = example["input_ids"], example["labels"]
    return self._hidden({**example, "input_ids": np.where(labels < 0, ids, labels)}, rng)

  def _hidden(self, example: dict, rng) -> dict:
    """Returns an example of whole input_ids with some of them hidden, one at the least."""
    spec, ids, words = self._spec, example["input_ids"], example["words"]
    size = self.preprocess.tokenizer.get_vocab_size()
    chosen = choose(words, spec["mask_rate"], spec["whole_words"], rng)
    hidden = replace(ids, chosen, spec["mask"], size, spec["hidden_share"], spec["random_share"],
                     rng)
    return {**example, "input_ids": hidden.astype(np.int32),
            "labels": np.where(chosen, ids, -1).astype(np.int32)}

  def show(self, example: dict) -> str:
    """Returns an example as the model reads it, and what it should predict in ⟦ ⟧."""
    labels = example["labels"][example["labels"] >= 0]
    wanted = self.preprocess.tokenizer.decode(labels.tolist(), skip_special_tokens=False)
    return f"{self.preprocess.show(example)} ⟦{wanted}⟧"

  # On the device.

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"nll", "tokens", "hits"}: (B,) float32 sums over the tokens that are predicted.

    nll is their negative log-likelihood in nats, hits those whose likeliest token is the right one.
    """
    hidden, targets, weights = self._states(apply, variables, batch, None)
    head = lambda hidden, number: apply(variables, {"hidden": hidden}, None)["logits"]  # noqa: E731
    found = losses.cross_entropy(head, hidden, targets, weights, hits=True)
    return {"nll": found["nll"], "tokens": jnp.sum(weights, -1), "hits": found["hits"]}

  features = predict

  def _states(self, apply, variables, batch, rng) -> tuple:
    """Returns hidden (B, T, D), the tokens they should predict (B, T), and which count (B, T)."""
    inputs = {key: value for key, value in batch.items() if key not in BOOKKEEPING}
    hidden = apply(variables, self.preprocess.finish(inputs), rng)["last_hidden_state"]
    labels = batch["labels"]
    weights = (labels >= 0) * batch["weight"][:, None]
    return hidden, jnp.maximum(labels, 0), weights.astype(jnp.float32)

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the metrics of a split over the tokens that are predicted.

    nats_per_token, its exponential perplexity, and masked_accuracy, the share of right tokens.
    """
    found = super().metrics(outputs)
    if "hits" in outputs:
      found["masked_accuracy"] = lm._ratio(outputs["hits"], outputs["tokens"])
    return found

  def baselines(self, features: dict) -> dict:
    """Returns "zero-shot", what the pretrained model gives, and "unigram", word counts of train."""
    labels = {split: [self.example(self._rows[split][int(i)])["labels"] for i in part["index"]]
              for split, part in features.items()}
    counts = np.ones(self.preprocess.tokenizer.get_vocab_size())  # one each, for those never seen
    rows = self._rows["train"]
    for i in range(min(len(rows), _COUNTED)):
      try:
        np.add.at(counts, self.preprocess(rows[i])["input_ids"], 1)
      except errors.RowError:
        continue
    nats = -np.log(counts / counts.sum())
    best = int(counts.argmax())
    unigram = {split: {
      "nll": np.array([nats[row[row >= 0]].sum() for row in of]),
      "tokens": np.array([np.sum(row >= 0) for row in of], np.float64),
      "hits": np.array([np.sum(row == best) for row in of], np.float64),
      "index": features[split]["index"]} for split, of in labels.items()}
    return {"zero-shot": features, "unigram": unigram}


def mask_token(preprocess) -> int:
  """Returns the id of a tokenizer's mask token; UserError where there is none."""
  folder, named = preprocess.info.folder, []
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / name).is_file():
      token = json.loads((folder / name).read_text(encoding="utf-8")).get("mask_token")
      named.append(token.get("content") if isinstance(token, dict) else token)
  for token in (*filter(None, named), *_MASKS):
    number = preprocess.tokenizer.token_to_id(token)
    if number is not None:
      return int(number)
  raise errors.UserError(f"task.name=masked_lm: the tokenizer in {folder} has no mask token, such "
                         "as [MASK] or <mask>; use task.name=lm, or an encoder that was pretrained "
                         "with one")


def numbered(encoding) -> np.ndarray:
  """Returns the number of each token's word (T,), what stands between white space and marks."""
  words = [-1 if word is None else word for word in encoding.word_ids]
  return np.array(words, np.int32)


def choose(words, rate: float, whole: bool, rng: np.random.Generator) -> np.ndarray:
  """Returns which tokens (T,) are predicted, one at the least.

  Args:
    words: (T,) the number of each token's word; -1 is never chosen.
    rate: chance of each token; with `whole`, of each word.
    whole: whether tokens of a word are chosen together.
    rng: of the draw.
  """
  able = words >= 0
  if whole:
    names, place = np.unique(words, return_inverse=True)
    chosen = (rng.random(len(names)) < rate)[place] & able
  else:
    chosen = rng.binomial(1, np.where(able, rate, 0.0)).astype(bool)
  if not chosen.any():  # a row without targets teaches nothing, and has no nats
    one = rng.choice(np.flatnonzero(able))
    chosen = (words == words[one]) & able if whole else np.arange(len(words)) == one
  return chosen


def replace(ids, chosen, mask: int, size: int, hidden: float, other: float,
            rng: np.random.Generator) -> np.ndarray:
  """Returns ids (T,) in which chosen tokens are the mask, another token, or as they were.

  Args:
    ids, chosen: (T,).
    mask: id of the mask token.
    size: of the vocabulary, from all of which other tokens are drawn.
    hidden, other: shares of the chosen that become the mask, or another token.
    rng: of the draw.
  """
  masked = rng.binomial(1, hidden, size=ids.shape).astype(bool) & chosen
  found = np.where(masked, mask, ids)
  if hidden == 1 or other == 0:
    return found
  drawn = rng.binomial(1, other / (1 - hidden), size=ids.shape).astype(bool) & chosen & ~masked
  found[drawn] = rng.integers(0, size, size=int(drawn.sum()))
  return found
