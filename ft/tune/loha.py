"""LoHa: the update is the elementwise product of two low-rank matrices, so its rank is up to r^2.

Source: Hyeon-Woo et al., FedPara (2022), as the reference implementation `peft` has it:
W + s (B1 A1) * (B2 A2), s = alpha / r. Parameters of a layer: loha_w1_b, loha_w2_b (in, r) and
loha_w1_a, loha_w2_a (r, out), all Kaiming uniform except loha_w2_b, from 0, so training starts at
the pretrained function. Of a convolution (h, w, in, out), `in` stands for h * w * in.

The elementwise product is also one plain product of rank r^2, of the columnwise Kronecker products.
Where that is thin it acts on the activations and no dense gradient of the kernel is formed;
elsewhere, as in convolutions, the update is formed and added to the weights.
"""

import jax.numpy as jnp
import numpy as np

from ft import errors, tune
from ft.tune import adapters

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "rank": (8, "rank of each of the two matrices", (1, None)),
  "alpha": (8.0, "size of the updates; their scale is alpha / rank"),
}
PEFT = "LOHA"
_NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns adapters and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, or the rank is larger than
      the smaller side of a layer.
  """
  del context
  return adapters.init(Method(config), config, variables, rng, head)


class Method(adapters.Adapter):
  """The update of one layer."""

  KINDS = (*adapters.LINEAR, "conv")

  def __init__(self, config):
    super().__init__(config)
    self.scale = config.alpha / config.rank

  def create(self, layer):
    rank, outputs = self.config.rank, layer.shape[-1]
    adapters.check_rank(rank, layer)
    inputs = int(np.prod(layer.shape[:-1]))
    return {
      "loha_w1_a": adapters.kaiming(layer.rng, (rank, outputs), rank),
      "loha_w1_b": adapters.kaiming(layer.rng, (inputs, rank), inputs),
      "loha_w2_a": adapters.kaiming(layer.rng, (rank, outputs), rank),
      "loha_w2_b": np.zeros((inputs, rank), np.float32),
    }, {}

  def weights(self, p, kernel, bias, module):
    if _is_thin(p, module):
      return kernel, bias
    return self.merge(p, kernel, bias, None)

  def adapt(self, p, x, y, module):
    if not _is_thin(p, module):
      return y
    rows = x.reshape(-1, x.shape[-1])
    a1, b1, a2, b2 = (p[f"loha_{name}"] for name in _NAMES)
    b = (b1[:, :, None] * b2[:, None, :]).reshape(b1.shape[0], -1).astype(rows.dtype)
    a = (a1[:, None, :] * a2[None, :, :]).reshape(-1, a1.shape[1]).astype(rows.dtype)
    return y + ((rows @ b * self.scale) @ a).reshape(y.shape)

  def merge(self, p, kernel, bias, layer):
    first, second = (jnp.matmul(p[f"loha_w{i}_b"], p[f"loha_w{i}_a"], precision="highest")
                     for i in (1, 2))
    return kernel + (first * second * self.scale).reshape(kernel.shape), bias

  def to_peft(self, p, layer):
    arrays = {name: np.asarray(p[f"loha_{name}"], np.float32) for name in _NAMES}
    return {f"hada_{name}": torch_rows(a, layer).T if name.endswith("b") else a.T
            for name, a in arrays.items()}

  def from_peft(self, tensors, layer):
    if "hada_t1" in tensors:
      raise errors.UserError(
        f"{layer.path}: LoHa files with use_effective_conv2d (tensors hada_t1, hada_t2) are not "
        "supported; save the adapter without it")
    arrays = {name: np.asarray(tensors[f"hada_{name}"], np.float32).T for name in _NAMES}
    return {f"loha_{name}": jnp.asarray(our_rows(a, layer) if name.endswith("b") else a)
            for name, a in arrays.items()}, {}


METHOD = Method


def _is_thin(p, module) -> bool:
  """Whether acting on activations costs less than the dense gradient of the kernel would."""
  inputs, rank = p["loha_w1_b"].shape
  outputs = p["loha_w1_a"].shape[1]
  return getattr(module, "size", 1) == 1 and 3 * rank**2 * (inputs + outputs) < inputs * outputs


def torch_rows(rows, layer, inputs: int = 0):
  """Returns rows (h * w * in, r) in torch's order, in * h * w; a linear layer's are the same."""
  if layer.kind != "conv":
    return rows
  inputs = inputs or layer.shape[2]
  return rows.reshape(*layer.shape[:2], inputs, -1).transpose(2, 0, 1, 3).reshape(rows.shape)


def our_rows(rows, layer, inputs: int = 0):
  """The inverse of `torch_rows`."""
  if layer.kind != "conv":
    return rows
  inputs = inputs or layer.shape[2]
  return rows.reshape(inputs, *layer.shape[:2], -1).transpose(1, 2, 0, 3).reshape(rows.shape)


def peft_config(config) -> dict:
  return {"r": config.rank, "alpha": config.alpha, "use_effective_conv2d": False,
          "rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True,
          "rank_pattern": {}, "alpha_pattern": {}}


def peft_values(adapter_config: dict) -> dict:
  """Returns values of the section `tune`; UserError for ranks that differ between layers."""
  adapters.refuse_peft(adapter_config, "rank_pattern", "alpha_pattern")
  return {"rank": adapter_config.get("r", 8), "alpha": adapter_config.get("alpha", 8.0)}
