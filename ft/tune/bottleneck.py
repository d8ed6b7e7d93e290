"""Bottleneck adapters: small two-layer networks with a residual, behind or beside frozen layers.

    sequential   y + s * up(act(down(y))), y the layer's output (Houlsby et al. 2019,
                 arXiv:1902.00751)
    parallel     y + s * up(act(down(x))), x the layer's input (He et al. 2022, arXiv:2110.04366)

The layers are those that end an attention or feed-forward part, by default. `up` starts at zero, so
training starts at the pretrained function. The network is not linear: plain weights cannot compute
it, and the adapters stay beside the model. Parameters of a layer (in, out), for I = out
(sequential) or in (parallel) and r units: bottleneck_down (I, r), bottleneck_down_bias (r,),
bottleneck_up (r, out), bottleneck_up_bias (out,).
"""

import math

import jax.numpy as jnp
import numpy as np

from ft import errors, tune
from ft.models import layers
from ft.tune import adapters

KEYS = {
  "targets": ((r"/(output|out_proj|o|wo|down|fc2|output_dense|project)$",),
              "expressions of adapted layers; as it is: the ends of attention and feed-forward"),
  "size": (64, "units of each bottleneck", (1, None)),
  "placement": ("sequential", "behind each layer's output, or from its input beside it",
                ["sequential", "parallel"]),
  "activation": ("gelu", "between the bottleneck's two layers", ["gelu", "relu", "silu", "tanh"]),
  "scale": (1.0, "factor of what the adapters add"),
}


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns adapters and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, or the bottleneck is no
      narrower than a layer.
  """
  del context
  return adapters.init(Bottleneck(config), config, variables, rng, head)


class Bottleneck(adapters.Adapter):
  """The network of one layer."""

  mergeable = False

  def create(self, layer):
    size, (inputs, outputs) = self.config.size, layer.shape
    read = outputs if self.config.placement == "sequential" else inputs
    if size >= min(read, outputs):
      raise errors.UserError(
        f"tune.size={size} is no bottleneck for {layer.path}, whose adapter would read {read} and "
        f"write {outputs} features; use less than {min(read, outputs)}, or leave that layer out "
        "of tune.targets")
    bound = 1 / math.sqrt(read)
    return {
      "bottleneck_down": layer.rng.uniform(-bound, bound, (read, size)).astype(np.float32),
      "bottleneck_down_bias": np.zeros(size, np.float32),
      "bottleneck_up": np.zeros((size, outputs), np.float32),
      "bottleneck_up_bias": np.zeros(outputs, np.float32),
    }, {}

  def adapt(self, p, x, y, module):
    read = y if self.config.placement == "sequential" else x
    hidden = layers.product(read, p["bottleneck_down"], p["bottleneck_down_bias"], y.dtype)
    hidden = layers.ACTIVATIONS[self.config.activation](hidden)
    added = layers.product(hidden, p["bottleneck_up"], p["bottleneck_up_bias"], y.dtype)
    return y + added * jnp.asarray(self.config.scale, y.dtype)
