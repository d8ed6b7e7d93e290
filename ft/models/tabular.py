"""Networks over rows of a table: numbers and categories in, from linear to wide and deep.

The label head reads the row itself (numbers, and a 1 for each category) beside what a multi-layer
perceptron makes of it: Cheng et al. 2016, Wide & Deep Learning, arXiv:1606.07792. Without layers it
is a linear model. The perceptron's last layer starts at zero, so that before training `features`
say what the row says and no more: a frozen probe on them is logistic regression on the table.
There are no pretrained ones: `model.source=scratch:tabular`.
Shapes: B rows, n numbers, k columns of categories, D = n + Σ cardinalities + hidden_size.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import base, layers

MODALITY = "table"
MODEL_TYPES = ("tabular",)
SCRATCH = True
HEAD = ("params/classifier",)
NAMES = [
    *base.linear_rules("layer.{i}", "params/layer_{i}"),
    *base.linear_rules("output", "params/output"),
    *base.linear_rules("classifier", "params/classifier", "head=classify"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """A table's shape and a network's.

  Attributes:
    numbers: n.
    cardinalities: (k,) categories of each column, numbered from 1; 0 is one that was never seen.
    hidden_size: width of the layers.
    num_hidden_layers: of the perceptron; 0: a linear model.
    hidden_act: between them.
    dropout: rate behind each layer.
  """

  numbers: int = 0
  cardinalities: tuple = ()
  hidden_size: int = 64
  num_hidden_layers: int = 2
  hidden_act: str = "relu"
  dropout: float = 0.0

  PREFIXES = {"tabular": "Tabular"}
  HEADS = {"none": ("{}Model",), "classify": ("{}ForClassification",)}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_act", layers.ACTIVATIONS)
    known = {f.name for f in dataclasses.fields(self)} | {"architectures", "id2label", "label2id"}
    for key in hf:
      if key not in known:
        raise errors.UserError(f"model.shape.{key}: a tabular model has no such field"
                               f"{errors.suggest(key, self.upstream())}")
    if not self.numbers and not self.cardinalities:
      raise errors.UserError("a tabular model needs numbers or categories to read")
    if self.num_hidden_layers < 0 or self.hidden_size < 1:
      raise errors.UserError("model.shape: num_hidden_layers should be 0 or more, hidden_size 1 or "
                             "more")


class Model(nn.Module):
  """A network over rows of a table; dropout acts iff apply is given a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, dtype = self.config, self.compute.dtype
    if c.num_hidden_layers:
      init = nn.initializers.he_normal()
      self.layer = [layers.Linear(c.hidden_size, dtype=dtype, kernel_init=init)
                    for _ in range(c.num_hidden_layers)]
      self.output = layers.Linear(c.hidden_size, dtype=dtype, kernel_init=nn.initializers.zeros)
    self.dropout = layers.Dropout(c.dropout)
    if c.num_labels:
      self.classifier = layers.Linear(c.num_labels, dtype=dtype)

  def __call__(self, numbers, categories):
    """Applies the model.

    Args:
      numbers: (B, n) float, standardised.
      categories: (B, k) int, 0 for what was never seen: it counts for nothing.

    Returns:
      features (B, D); logits (B, C) float32 with a label head.
    """
    c, dtype = self.config, self.compute.dtype
    hot = [jax.nn.one_hot(categories[:, i] - 1, size, dtype=dtype)
           for i, size in enumerate(c.cardinalities)]
    x = jnp.concatenate([numbers.astype(dtype), *hot], -1)
    features = x
    if c.num_hidden_layers:
      y = x
      for layer in self.layer:
        y = self.dropout(layers.ACTIVATIONS[c.hidden_act](layer(y)))
      features = jnp.concatenate([x, self.output(y)], -1)
    outputs = {"features": features}
    if c.num_labels:
      outputs["logits"] = self.head(features)
    return outputs

  def head(self, features):
    """Returns the logits (B, C) of features (B, D)."""
    return self.classifier(features).astype(jnp.float32)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  most = np.array(config.cardinalities, np.int64) + 1
  return {"numbers": rng.normal(size=(2, config.numbers)).astype(np.float32),
          "categories": rng.integers(0, most, (2, len(most))).astype(np.int32)}
