"""SSF: the outputs of frozen layers are scaled and shifted by trained vectors.

Source: Lian et al., Scaling & Shifting Your Features (2022). Parameters of a layer: ssf_scale
(out,), from 1, and ssf_shift (out,), from 0, so training starts at the pretrained function. The
shift is left out where the layer has no bias, so that both always merge into kernel and bias. The
paper scales norms, too, which have a scale and a bias of their own: `also_train=("norm",)` trains
those. Usual rates are those of a head, 1e-3 to 1e-2. `peft` has no such method, so there is no
adapter file of it.
"""

import numpy as np

from ft import tune
from ft.tune import adapters

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
}


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns scales, shifts and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted.
  """
  del context
  return adapters.init(Method(config), config, variables, rng, head)


class Method(adapters.Adapter):
  """The scale and shift of one layer."""

  KINDS = (*adapters.LINEAR, "conv")

  def create(self, layer):
    made = {"ssf_scale": np.ones(layer.shape[-1], np.float32)}
    if layer.bias:
      made["ssf_shift"] = np.zeros(layer.bias, np.float32)
    return made, {}

  def adapt(self, p, x, y, module):
    y = y * p["ssf_scale"].astype(y.dtype)
    return y + p["ssf_shift"].astype(y.dtype) if "ssf_shift" in p else y

  def merge(self, p, kernel, bias, layer):
    if bias is not None:
      bias = bias * p["ssf_scale"] + p["ssf_shift"]
    return kernel * p["ssf_scale"], bias
