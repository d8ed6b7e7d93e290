"""LoKr: the update is a Kronecker product of two small matrices, the second of low rank if large.

Source: Yeh et al., LyCORIS (2024), as the reference implementation `peft` has it: W + s kron(w1,
w2), s = alpha / r. With in = m n and out = l k (near square roots, or as `factor` says):
parameters of a layer are lokr_w1 (m, l) and lokr_w2 (n, k), or in place of either its factors
lokr_w1_b (m, r), lokr_w1_a (r, l) and lokr_w2_b (n, r), lokr_w2_a (r, k). The first starts at 0,
so training starts at the pretrained function. Of a convolution (h, w, in, out), lokr_w2 is
(h, w, n, k), and lokr_w2_b (h * w * n, r). A linear layer's update acts on its activations and
costs little beside the layer; a convolution's is added to its weights.
"""

import math

import jax.numpy as jnp
import numpy as np

from ft import errors, tune
from ft.tune import adapters, loha

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "rank": (8, "rank of factors that are large", (1, None)),
  "alpha": (8.0, "size of the updates; their scale is alpha / rank"),
  "factor": (-1, "side of the first matrix; -1: near the square root of the layer's", (-1, None)),
  "decompose_both": (False, "the first matrix is of low rank, too, where it is large"),
}
PEFT = "LOKR"


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns adapters and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, or the factor is 0.
  """
  del context
  if not config.factor:
    raise errors.UserError("tune.factor=0 divides nothing; use -1 (near square roots) or from 1 on")
  return adapters.init(Method(config), config, variables, rng, head)


def factorise(number: int, factor: int) -> tuple[int, int]:
  """Returns (m, n) with m * n = number and m <= n; m = factor where it divides (then m may be > n).

  Otherwise m is the largest divisor up to the factor (-1: no bound) and the number's square root.
  """
  if factor > 0 and number % factor == 0:
    return factor, number // factor
  most = math.isqrt(number) if factor < 0 else min(factor, math.isqrt(number))
  m = max(n for n in range(1, most + 1) if number % n == 0)
  return m, number // m


class Method(adapters.Adapter):
  """The update of one layer."""

  KINDS = (*adapters.LINEAR, "conv")

  def __init__(self, config):
    super().__init__(config)
    self.scale = config.alpha / config.rank

  def create(self, layer):
    rank, rng, space = self.config.rank, layer.rng, layer.shape[:-2]
    (m, n), (l, k) = (factorise(size, self.config.factor) for size in layer.shape[-2:])  # noqa: E741
    taps = int(np.prod(space)) * n
    made = {}
    if self.config.decompose_both and rank < max(l, m) / 2:
      made["lokr_w1_a"] = np.zeros((rank, l), np.float32)
      made["lokr_w1_b"] = adapters.kaiming(rng, (m, rank), m)
    else:
      made["lokr_w1"] = np.zeros((m, l), np.float32)
    if rank < max(k, n) / 2:
      made["lokr_w2_a"] = adapters.kaiming(rng, (rank, k), rank)
      made["lokr_w2_b"] = adapters.kaiming(rng, (taps, rank), taps)
    else:
      made["lokr_w2"] = adapters.kaiming(rng, (*space, n, k), taps)
    return made, {}

  def weights(self, p, kernel, bias, module):
    return self.merge(p, kernel, bias, None) if _convolves(module) else (kernel, bias)

  def adapt(self, p, x, y, module):
    if _convolves(module):
      return y
    w1 = _product(p, "lokr_w1").astype(x.dtype)
    m, l = w1.shape  # noqa: E741
    rows = x.reshape(-1, x.shape[-1] // m)
    for name in ("lokr_w2",) if "lokr_w2" in p else ("lokr_w2_b", "lokr_w2_a"):
      rows = rows @ p[name].astype(x.dtype)
    rows = jnp.einsum("bmk,ml->blk", rows.reshape(-1, m, rows.shape[-1]), w1)
    return y + (rows * self.scale).reshape(y.shape)

  def merge(self, p, kernel, bias, layer):
    w1, w2 = _product(p, "lokr_w1"), _product(p, "lokr_w2")
    w2 = w2.reshape(*kernel.shape[:-2], kernel.shape[-2] // w1.shape[0], w2.shape[-1])
    update = jnp.einsum("ml,...nk->...mnlk", w1, w2)
    return kernel + update.reshape(kernel.shape) * self.scale, bias

  def to_peft(self, p, layer):
    arrays = {name: np.asarray(value, np.float32) for name, value in p.items()}
    tensors = {name: a.T for name, a in arrays.items()}
    space = (1, 1) if layer.kind == "pointwise" else layer.shape[:-2]
    if "lokr_w2_b" in arrays:
      b = arrays["lokr_w2_b"]
      tensors["lokr_w2_b"] = loha.torch_rows(b, layer, b.shape[0] // math.prod(space)).T
    elif space:
      w2 = arrays["lokr_w2"].reshape(*space, *arrays["lokr_w2"].shape[-2:])
      tensors["lokr_w2"] = w2.transpose(3, 2, 0, 1)
    return tensors

  def from_peft(self, tensors, layer):
    if "lokr_t2" in tensors:
      raise errors.UserError(
        f"{layer.path}: LoKr files with use_effective_conv2d (tensor lokr_t2) are not supported; "
        "save the adapter without it")
    arrays = {name: np.asarray(a, np.float32) for name, a in tensors.items()}
    ours = {name: a.T for name, a in arrays.items()}
    if "lokr_w2_b" in arrays:
      b = ours["lokr_w2_b"]
      ours["lokr_w2_b"] = loha.our_rows(b, layer, b.shape[0] // math.prod(layer.shape[:-2]))
    elif arrays["lokr_w2"].ndim == 4:
      w2 = arrays["lokr_w2"].transpose(2, 3, 1, 0)
      ours["lokr_w2"] = w2.reshape(*layer.shape[:-2], *w2.shape[-2:])
    return {name: jnp.asarray(a) for name, a in ours.items()}, {}


METHOD = Method


def _convolves(module) -> bool:
  return getattr(module, "size", 1) > 1


def _product(p, name: str):
  """Returns a matrix of the Kronecker product, whole or from its factors."""
  if name in p:
    return p[name]
  return jnp.matmul(p[name + "_b"], p[name + "_a"], precision="highest")


def peft_config(config) -> dict:
  return {"r": config.rank, "alpha": config.alpha, "decompose_both": config.decompose_both,
          "decompose_factor": config.factor, "use_effective_conv2d": False,
          "rank_dropout": 0.0, "rank_dropout_scale": False, "module_dropout": 0.0,
          "init_weights": True, "rank_pattern": {}, "alpha_pattern": {}}


def peft_values(adapter_config: dict) -> dict:
  """Returns values of the section `tune`; UserError for ranks that differ between layers."""
  adapters.refuse_peft(adapter_config, "rank_pattern", "alpha_pattern")
  return {
    "rank": adapter_config.get("r", 8), "alpha": adapter_config.get("alpha", 8.0),
    "factor": adapter_config.get("decompose_factor", -1),
    "decompose_both": adapter_config.get("decompose_both", False),
  }
