"""A network for rows of a table: embedded categories beside standardised numbers, and layers.

The form is the MLP of Gorishniy et al. 2021, arXiv:2106.11959; without hidden layers it is logistic
regression. There is no upstream format: a folder has config.json, model.safetensors and table.json,
which lists the columns (see ft/data/table.py). `scripts/prepare.py --table=FILE` makes one.
Shapes: B rows, F numbers, G categories, D width.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import base, layers
from ft.weights.names import Rule

MODALITY = "table"
MODEL_TYPES = ("tabular",)
HEAD = ("params/classifier",)

NAMES = [
    Rule("embeddings.{i}.weight", "params/embedding_{i}/embedding"),
    *base.linear_rules("layers.{i}", "params/layer_{i}"),
    *base.linear_rules("classifier", "params/classifier", "head=classify"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """A network's shape.

  Attributes:
    numbers: F, columns of numbers.
    cardinalities: of each of the G categories, how many values it has, 0 (unknown) included.
    embedding_size: width of a category's vector; a category of fewer values has as many.
  """

  numbers: int = 0
  cardinalities: tuple[int, ...] = ()
  hidden_size: int = 64
  num_hidden_layers: int = 2
  embedding_size: int = 16
  hidden_act: str = "relu"
  hidden_dropout_prob: float = 0.1

  PREFIXES = {"tabular": "Tabular"}
  HEADS = {"none": ("{}Model",), "classify": ("{}ForSequenceClassification",)}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_act", layers.ACTIVATIONS)
    if self.numbers + len(self.cardinalities) < 1 or min(self.cardinalities, default=1) < 1:
      raise errors.UserError("config.json: numbers and cardinalities should count the columns and "
                             f"their values; they are {self.numbers} and {self.cardinalities}")

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with its dropout rate set."""
    return dataclasses.replace(self, hidden_dropout_prob=rate)


class Model(nn.Module):
  """Numbers and categories -> a dict, see `__call__`. Dropout acts iff there is a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, dtype = self.config, self.compute.dtype
    self.embedding = [
        layers.Embedding(size, min(size, c.embedding_size), dtype,
                         nn.initializers.normal(min(size, c.embedding_size)**-0.5))
        for size in c.cardinalities]
    self.layer = [layers.Linear(c.hidden_size, dtype=dtype, kernel_init=nn.initializers.he_normal())
                  for _ in range(c.num_hidden_layers)]
    self.dropout = layers.Dropout(c.hidden_dropout_prob)
    if c.num_labels:
      self.classifier = layers.Linear(c.num_labels, dtype=dtype,
                                      kernel_init=nn.initializers.normal(0.02))

  def __call__(self, numbers, categories):
    """Applies the model.

    Args:
      numbers: (B, 2 F) float: values, standardised, 0 where there is none; then 1 where there is
        none, else 0.
      categories: (B, G) int, 0 is unknown.

    Returns:
      features (B, D), what the label head reads; with one, logits (B, C) float32.
    """
    x = jnp.concatenate([numbers.astype(self.compute.dtype),
                         *(of(categories[:, i]) for i, of in enumerate(self.embedding))], -1)
    for layer in self.layer:
      x = self.dropout(layers.ACTIVATIONS[self.config.hidden_act](layer(x)))
    outputs = {"features": x}
    if self.config.num_labels:
      outputs["logits"] = self.head(x)
    return outputs

  def head(self, features):
    """Returns the logits (B, C) float32 of features (B, D)."""
    return self.classifier(features).astype(jnp.float32)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch on which an export is compared with its reload."""
  rng, groups = np.random.default_rng(0), len(config.cardinalities)
  categories = [rng.integers(0, size, 2) for size in config.cardinalities]
  return {"numbers": rng.normal(size=(2, 2 * config.numbers)).astype(np.float32),
          "categories": np.array(categories, np.int32).reshape(groups, 2).T}
