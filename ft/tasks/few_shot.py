"""Classification of texts from a few rows a label, by contrastive pairs (SetFit).

Source: Tunstall et al. (2022), arXiv:2209.11055. The encoder learns from pairs of training rows
whose cosine should be 1 where the labels are equal and 0 where they are not; a logistic head learns
the labels of the same rows beside it, and passes no gradient on to the encoder. That is SetFit with
its two phases at once: the model is a classifier at every step. All else is as in
`ft.tasks.classify`.

Shapes: B pairs, D features, C classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from ft import contrastive, errors
from ft.tasks import classify

KEYS = {
  "pairs": ("oversampling", "which pairs are drawn: as many of both kinds, or each once",
            ["oversampling", "undersampling", "unique"]),
  "iterations": (0, "pairs of each kind a row; 0: as task.pairs says", (0, None)),
  "metric": ("accuracy", "what the best checkpoint is chosen by",
             ["accuracy", "macro_f1", "auroc"]),
}


class Task(classify.Task):
  """`classify.Task` whose steps go over pairs of training rows."""

  def __init__(self, config, data, preprocess):
    """Makes the task of a run; see `classify.Task`.

    Raises:
      UserError: the rows are no texts, too, or not of two labels.
    """
    if "text" not in data.columns:
      raise errors.UserError("task.name=few_shot needs texts; name their column in "
                             "data.columns.text")
    plain = {key: entry[0] for key, entry in classify.KEYS.items()}
    plain["metric"] = config.metric
    super().__init__(config_dict.ConfigDict(plain), data, preprocess)
    self._pairs, self._iterations = config.pairs, config.iterations

  def training(self, examples):
    """Returns pairs of the examples: keys of the tokens (T, 2), "label" (2,), "same" () float32.

    Cached features, which only a head learns from, stay as they are.
    """
    if examples.lengths is None:
      return examples
    labels = np.array([int(examples[i]["label"]) for i in range(len(examples))])
    first, second, same = contrastive.label_pairs(labels, self._pairs, self._iterations)
    return contrastive.Pairs(examples, first, second, self.preprocess.pad, same=same)

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over the batch's pairs: (total, weight, {"accuracy", "cosine_error"}).

    The total is the squared error of the cosine and the mean cross-entropy of the two rows, whose
    features are held still.
    """
    if "same" not in batch:
      return super().loss(apply, variables, batch, rng)
    rows = _rows(batch)
    features = apply(variables, self._inputs(rows), rng)["features"]
    vectors = contrastive.normalise(features).reshape(len(batch["same"]), 2, -1)
    apart = contrastive.cosine_error(vectors[:, 0], vectors[:, 1], batch["same"])
    logits = apply(variables, {"features": jax.lax.stop_gradient(features)}, rng)["logits"]
    hot = self._hot(rows["label"])
    nats = self._losses(logits.astype(jnp.float32), hot)[0].reshape(-1, 2).mean(-1)
    right = self._right(logits, hot).reshape(-1, 2).mean(-1)
    weight = batch["weight"]
    return (jnp.sum((apart + nats) * weight), jnp.sum(weight),
            {"accuracy": jnp.sum(right * weight), "cosine_error": jnp.sum(apart * weight)})

  def divergence(self, apply: Callable, variables, base_variables, batch: dict,
                 temperature: float = 1.0) -> tuple:
    """Returns what `classify.Task.divergence` does, of the rows of the pairs."""
    return super().divergence(apply, variables, base_variables, _rows(batch), temperature)

  def drift(self, apply: Callable, variables, base_variables, batch: dict) -> tuple:
    """Returns what `classify.Task.drift` does, of the rows of the pairs."""
    return super().drift(apply, variables, base_variables, _rows(batch))


def _rows(batch: dict) -> dict:
  """Returns the rows of a batch of pairs next to each other; any other batch as it is."""
  if "same" not in batch:
    return batch
  doubled = {key: jnp.repeat(batch[key], 2) for key in ("weight", "index") if key in batch}
  inputs = {key: value for key, value in batch.items() if key not in (*doubled, "same", "stop")}
  return {**contrastive.sides(inputs)[0], **doubled}
