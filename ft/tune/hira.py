"""HiRA: each weight is multiplied by one plus an element of a low-rank matrix, W * (1 + A B).

Source: Huang et al., HiRA (2025), as the reference implementation `peft` has it. The update has
high rank, so it acts on the weights: unlike LoRA, training pays for the kernel's dense gradient.
Parameters of a layer: hira_a (in, r), Kaiming uniform, and hira_b (r, out), from 0, so training
starts at the pretrained function. The update is relative to small weights: rates are higher than
LoRA's, 1e-3 to 1e-2.
"""

import jax.numpy as jnp
import numpy as np

from ft import tune
from ft.tune import adapters

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "rank": (32, "rank of the factor that multiplies the weights", (1, None)),
}
PEFT = "HIRA"


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns factors and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, or the rank is larger than
      the smaller side of a layer.
  """
  del context
  return adapters.init(Method(config), config, variables, rng, head)


class Method(adapters.Adapter):
  """The factor of one layer."""

  def create(self, layer):
    adapters.check_rank(self.config.rank, layer)
    inputs, outputs = layer.shape
    return {"hira_a": adapters.kaiming(layer.rng, (inputs, self.config.rank), inputs),
            "hira_b": np.zeros((self.config.rank, outputs), np.float32)}, {}

  def weights(self, p, kernel, bias, module):
    return kernel * (1 + jnp.matmul(p["hira_a"], p["hira_b"], precision="highest")), bias

  def merge(self, p, kernel, bias, layer):
    return self.weights(p, kernel, bias, None)

  def to_peft(self, p, layer):
    a, b = (np.asarray(p[name], np.float32).T for name in ("hira_a", "hira_b"))
    ones = (1, 1) if layer.kind == "pointwise" else ()
    return {"hira_A": a.reshape(*a.shape, *ones), "hira_B": b.reshape(*b.shape, *ones)}

  def from_peft(self, tensors, layer):
    a, b = (jnp.asarray(tensors[name], jnp.float32) for name in ("hira_A", "hira_B"))
    return {"hira_a": a.reshape(a.shape[:2]).T, "hira_b": b.reshape(b.shape[:2]).T}, {}


METHOD = Method


def peft_config(config) -> dict:
  return {"r": config.rank, "hira_dropout": 0.0, "init_weights": True, "rank_pattern": {}}


def peft_values(adapter_config: dict) -> dict:
  """Returns values of the section `tune`; UserError for ranks that differ between layers."""
  adapters.refuse_peft(adapter_config, "rank_pattern")
  return {"rank": adapter_config.get("r", 32)}
