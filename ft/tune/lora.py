"""LoRA: frozen linear layers y = x W + b get a trained update, y + s (x A) B, of low rank.

Source: Hu et al., LoRA (2021); the scale alpha/sqrt(r): Kalajdzievski, rsLoRA (2023). A starts as
in the reference implementation `peft` (Kaiming uniform), B at zero, so training starts at the
pretrained function. Parameters of a layer: lora_a (in, r), lora_b (r, out). W + A B is never formed
in training.
"""

import math

import jax.numpy as jnp
import numpy as np

from ft import tune
from ft.tune import adapters

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "rank": (16, "rank of each update", (1, None)),
  "alpha": (32.0, "size of the updates; the scale is a function of it and the rank"),
  "scale": ("alpha/r", "how alpha and rank give the scale", ["alpha/r", "alpha/sqrt(r)"]),
  "dropout": (0.0, "share of an update's inputs set to zero in training", (0.0, 0.99)),
}


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns adapters and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, or the rank is larger than
      the smaller side of a layer.
  """
  del context
  return adapters.init(Lora(config), config, variables, rng, head)


class Lora(adapters.Adapter):
  """The update of one layer."""

  def __init__(self, config):
    super().__init__(config)
    root = math.sqrt(config.rank) if config.scale == "alpha/sqrt(r)" else config.rank
    self.scale = config.alpha / root

  def create(self, layer):
    adapters.check_rank(self.config.rank, layer)
    inputs, outputs = layer.shape
    bound = 1 / math.sqrt(inputs)
    a = layer.rng.uniform(-bound, bound, (inputs, self.config.rank)).astype(np.float32)
    return {"lora_a": a, "lora_b": np.zeros((self.config.rank, outputs), np.float32)}, {}

  def adapt(self, p, x, y, module):
    rows = adapters.dropout(module, x.reshape(-1, x.shape[-1]), self.config.dropout)
    # Two thin products over 2-D operands; the scale goes on the (rows, r) side, the smallest.
    delta = (rows @ p["lora_a"].astype(rows.dtype) * self.scale) @ p["lora_b"].astype(rows.dtype)
    return y + delta.reshape(y.shape)

  def merge(self, p, kernel, bias, layer):
    return kernel + jnp.matmul(p["lora_a"], p["lora_b"], precision="highest") * self.scale, bias
