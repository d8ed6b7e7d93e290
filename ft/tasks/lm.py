"""Causal language modelling: each token is predicted from those before it.

A row is a text, or a conversation (`turns`), which the checkpoint's chat template makes a text of;
all of its tokens count, whoever said them. The tokenizer's own special tokens are kept and none are
added: the first token, the beginning-of-sequence token where the tokenizer sets one, is read and
not predicted. Longer texts are cut as data.truncation says. With task.packing, a row of a training
step holds several texts that do not see each other; evaluation takes them one by one.

Shapes: B batch, T tokens, N rows of a split, V vocabulary, D hidden size. Logits (B, T, V) are
never made as a whole, see `ft.losses`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors, losses, models
from ft.data import packing

KEYS = {
  "label_smoothing": (0.0, "share of the target spread over the vocabulary", (0.0, 0.99)),
  "packing": ("none", "put rows of train together in rows of data.max_length tokens",
              ["none", "best-fit"]),
}

# What a batch holds beside the model's inputs.
BOOKKEEPING = ("bytes", "loss_mask", "weight", "index", "stop")


class Task:
  """Loss, predictions and metrics of a causal language model; pure functions, no loop.

  Everywhere `apply(variables, inputs, rng)` returns the model's outputs, of which
  "last_hidden_state" (B, T, D) is used; inputs {"hidden": (B, t, D)} give {"logits": (B, t, V)}.
  rng None is evaluation.

  Attributes:
    metric: nats_per_token, nats over tokens of the whole split: lower is better.
    model_args: what the model has to be loaded with.
    needs: roles that a row has to have beside the model's inputs: none.
    head_features: False: `features` are no head's inputs, and are not made of train.
    score: None: the metric is a ratio of sums, no mean over rows.
    packs: whether steps go over packed rows.
  """

  metric = ("nats_per_token", "min")
  model_args = {"head": "lm"}
  needs = ()
  head_features = False
  score = None
  packs = False
  _smoothing = 0.0  # in predictions

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data` whose rows have a text or turns.
      preprocess: the modality's, row -> example.

    Raises:
      UserError: the rows are no texts, or pairs of them; or the model's cannot be packed.
    """
    need_text(data, "lm")
    self._settle(preprocess, {})
    self._train_on(config)

  def _train_on(self, config) -> None:
    """Sets what training alone needs."""
    preprocess, self._smoothing = self.preprocess, float(config.label_smoothing)
    self.packs = config.packing != "none"
    if self.packs:
      if hasattr(models.family_module(preprocess.info.family).Model, "decode"):
        raise errors.UserError(f"task.packing={config.packing} is for decoder-only models; set it "
                               "to none")
      preprocess.pad = {**preprocess.pad, **dict.fromkeys(packing.KEYS_ADDED, 0)}

  def training(self, examples):
    """Returns what steps go over: the examples of train, packed where task.packing says so."""
    if not self.packs:
      return examples
    return packing.pack(examples, self.preprocess.pad, self.preprocess.max_length)

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return self._spec

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can predict and describe (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(preprocess, spec)
    return task

  def _settle(self, preprocess, spec: Mapping) -> None:
    """Sets what training and prediction share."""
    self.preprocess, self._spec = preprocess, dict(spec)

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    return {"mode": self.metric[1]}

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns preprocess(row) with "bytes": () int32, UTF-8 bytes of the text that is predicted."""
    text, encoding = self.preprocess.encode(row)
    if len(encoding.ids) < 2:
      raise errors.RowError("a text of one token: there is nothing to predict")
    size = self.preprocess.text_bytes(text, encoding, first=1)
    return {**self.preprocess.arrays(encoding), "bytes": np.asarray(size, np.int32)}

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over the batch's tokens: (total nats, tokens, {"nats_per_token": nats}).

    Padding and rows of weight 0 are masked. The total has the label smoothing, the aux has not.
    """
    found, weights = self._cross_entropy(apply, variables, batch, rng, self._smoothing)
    return jnp.sum(found["loss"]), jnp.sum(weights), {"nats_per_token": jnp.sum(found["nll"])}

  def divergence(self, apply: Callable, variables, base_variables, batch: dict,
                 temperature: float = 1.0) -> tuple:
    """Returns sums over the batch's tokens: (Σ T² KL(base || model), tokens).

    Both are evaluated without dropout and pass gradients on. See `losses.divergence`.
    """
    hidden, _, weights = self._states(apply, variables, batch, None)
    base_hidden, _, _ = self._states(apply, base_variables, batch, None)
    total = losses.divergence(
      _head(apply, variables, None), _head(apply, base_variables, None), hidden, base_hidden,
      weights, temperature)
    return jnp.sum(total), jnp.sum(weights)

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"nll", "tokens": (B,) float32} and, where the batch has them, "bytes" (B,) int32.

    nll is the negative log-likelihood of a row in nats, over its tokens but the first.
    """
    found, weights = self._cross_entropy(apply, variables, batch, None, 0.0)
    size = {"bytes": batch["bytes"]} if "bytes" in batch else {}
    return {"nll": found["nll"], "tokens": jnp.sum(weights, -1), **size}

  # What baselines are made of: here the pretrained model's own predictions.
  features = predict

  def _cross_entropy(self, apply, variables, batch, rng, smoothing) -> tuple:
    """Returns ({"loss", "nll"}: (B,) sums, weights (B, T))."""
    hidden, targets, weights = self._states(apply, variables, batch, rng)
    head = _head(apply, variables, rng)
    return losses.cross_entropy(head, hidden, targets, weights, smoothing), weights

  def _states(self, apply, variables, batch, rng) -> tuple:
    """Returns hidden (B, T, D), the tokens they should predict (B, T), and which count (B, T)."""
    inputs = {key: value for key, value in batch.items() if key not in BOOKKEEPING}
    inputs = self.preprocess.finish(inputs)
    outputs = apply(variables, inputs, rng)
    if "last_hidden_state" not in outputs:
      raise errors.UserError("this task tunes decoder-only models; this one encodes its input and "
                             "decodes another text")
    targets = _next(inputs["input_ids"])
    weights = _next(self._counted(batch)) * batch["weight"][:, None]
    if "segment_ids" in batch:  # the first token of a text does not follow from the text before
      weights *= batch["segment_ids"] == _next(batch["segment_ids"])
    return outputs["last_hidden_state"], targets, weights.astype(jnp.float32)

  def _counted(self, batch: dict):
    """Returns (B, T), 1 for tokens that carry loss, where there is one before them."""
    return batch["attention_mask"]

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the metrics of a split: nats_per_token, perplexity and bits_per_byte.

    Each is of the split as one text: sums over sums, so that long rows count for more.

    Args:
      outputs: "nll", "tokens" and, for bits_per_byte, "bytes", each (N,).
    """
    nats = _ratio(outputs["nll"], outputs["tokens"])
    found = {"nats_per_token": nats, "perplexity": float(np.exp(nats))}
    if "bytes" in outputs:
      found["bits_per_byte"] = _ratio(outputs["nll"], outputs["bytes"]) / float(np.log(2))
    return found

  def value(self, outputs: dict) -> float:
    """Returns nats_per_token of a split."""
    return _ratio(outputs["nll"], outputs["tokens"])

  def calibrate(self, outputs: dict) -> dict:
    """Returns {}: no temperature is fitted."""
    del outputs
    return {}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one row as JSON types: nats_per_token (None for one token), tokens."""
    del calibration
    tokens = int(outputs["tokens"])
    return {"nats_per_token": float(outputs["nll"]) / tokens if tokens else None, "tokens": tokens}

  def evidence(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the card's further fields about the tuned outputs: none."""
    del outputs, calibration
    return {}

  def baselines(self, features: dict) -> dict:
    """Returns {"zero-shot": split -> what the pretrained model gives}."""
    return {"zero-shot": features}


def need_text(data, name: str) -> None:
  """Raises UserError in the name of a task where rows are no texts, or pairs of them."""
  if not {"text", "turns"} & set(data.columns):
    raise errors.UserError(f"task.name={name} models text, and the data has no column of that "
                           "role; set data.modality=text and data.columns.text")
  if "text_b" in data.columns:
    raise errors.UserError(f"task.name={name} models one text a row; column "
                           f"{data.columns['text_b']} makes it a pair: give it another role, or "
                           "join the two")


def _head(apply: Callable, variables, rng) -> Callable:
  """Returns (hidden (B, t, D), number of the block) -> logits (B, t, V), the model's own head."""
  def head(hidden, number):
    key = None if rng is None else jax.random.fold_in(rng, number + 1)
    return apply(variables, {"hidden": hidden}, key)["logits"]

  return head


def _next(x):
  """Returns x (B, T) of the token after each; 0 after the last."""
  return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _ratio(total, count) -> float:
  count = np.sum(count, dtype=np.float64)
  return float(np.sum(total, dtype=np.float64) / count) if count else float("nan")
