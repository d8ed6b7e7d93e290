"""OFTv2: what enters frozen layers is rotated, block by block, by trained orthogonal matrices.

Source: Qiu et al., Orthogonal Finetuning Made Scalable (2025), as the reference implementation
`peft` has it. The input is rotated, x R, never the kernel, so that no step costs a product of
matrices as large as the layer's. Each block's R comes from a skew-symmetric Q: Cayley's transform
by its Neumann series, I + 2Q + 2Q^2 + … + Q^(terms-1), or exactly, (I - Q)(I + Q)^-1 (the sign of Q
differs between the two in `peft`, and its files are meant so). Parameter of a layer: oft_r
(blocks, b(b-1)/2), the upper triangles of Q row by row, from 0, the pretrained function.
"""

import jax.numpy as jnp
import numpy as np

from ft import errors, tune
from ft.tune import adapters

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "block_size": (32, "side of the blocks; the nearest divisor of a layer's inputs", (2, None)),
  "blocks": (0, "blocks of a layer, in place of block_size; 0: as block_size says", (0, None)),
  "neumann": (5, "terms of the series that stands for the inverse; 0: exact", (0, None)),
}
PEFT = "OFT"


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns rotations and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, blocks of one input, or a
      series of one term.
  """
  del context
  if config.neumann == 1:
    raise errors.UserError("tune.neumann=1 is the identity and never trains; use 5, or 0 for exact")
  return adapters.init(Method(config), config, variables, rng, head)


def nearest_divisor(number: int, wanted: int) -> int:
  """Returns the divisor of `number` nearest to `wanted`, the smaller of two; as `peft` has it."""
  divisors = [n for n in range(1, number + 1) if number % n == 0]
  return min(divisors, key=lambda n: (abs(n - wanted), n))


def rotations(triangles, neumann: int):
  """Returns the blocks' matrices (blocks, b, b) float32 of upper triangles (blocks, b(b-1)/2)."""
  size = round((1 + (1 + 8 * triangles.shape[-1])**0.5) / 2)
  rows, columns = np.triu_indices(size, 1)
  upper = jnp.zeros((triangles.shape[0], size, size), jnp.float32)
  upper = upper.at[:, rows, columns].set(triangles.astype(jnp.float32))
  skew, eye = upper - upper.mT, jnp.eye(size)
  if not neumann:
    return jnp.linalg.solve((eye + skew).mT, (eye - skew).mT).mT
  power, total = skew, eye + 2 * skew
  for _ in range(2, max(neumann, 4) - 1 if neumann > 2 else 0):  # of 3 terms, peft makes 4
    power = jnp.matmul(power, skew, precision="highest")
    total = total + 2 * power
  return total + jnp.matmul(power, skew, precision="highest") if neumann > 2 else total


class Method(adapters.Adapter):
  """The rotation of one layer's input."""

  def create(self, layer):
    inputs, config = layer.shape[0], self.config
    if config.blocks:
      size = inputs // nearest_divisor(inputs, config.blocks)
    else:
      size = nearest_divisor(inputs, config.block_size)
    if size == 1:
      raise errors.UserError(
        f"tune.method=oft: {layer.path} has {inputs} inputs, which blocks of nearly "
        f"{'the size' if not config.blocks else 'the number'} wanted divide only one by one, and "
        f"such blocks do not rotate; use tune.block_size={inputs}, or leave it out of tune.targets")
    return {"oft_r": np.zeros((inputs // size, size * (size - 1) // 2), np.float32)}, {}

  def prepare(self, p, x, module):
    matrices = rotations(p["oft_r"], self.config.neumann).astype(x.dtype)
    rows = x.reshape(-1, *matrices.shape[:2])
    return jnp.einsum("nrk,rkc->nrc", rows, matrices).reshape(x.shape)

  def merge(self, p, kernel, bias, layer):
    matrices = rotations(p["oft_r"], self.config.neumann)
    rows = kernel.reshape(*matrices.shape[:2], -1)
    rotated = jnp.einsum("rkc,rco->rko", matrices, rows, precision="highest")
    return rotated.reshape(kernel.shape), bias

  def to_peft(self, p, layer):
    return {"oft_R.weight": np.asarray(p["oft_r"], np.float32)}

  def from_peft(self, tensors, layer):
    return {"oft_r": jnp.asarray(tensors["oft_R.weight"], jnp.float32)}, {}


METHOD = Method


def peft_config(config) -> dict:
  return {
    "r": config.blocks, "oft_block_size": 0 if config.blocks else config.block_size,
    "use_cayley_neumann": config.neumann > 0,
    "num_cayley_neumann_terms": config.neumann or KEYS["neumann"][0],
    "coft": False, "block_share": False, "module_dropout": 0.0, "init_weights": True,
  }


def peft_values(adapter_config: dict) -> dict:
  """Returns values of the section `tune`; UserError for constrained or shared rotations."""
  adapters.refuse_peft(adapter_config, "coft", "block_share")
  neumann = adapter_config.get("use_cayley_neumann", True)
  return {
    "blocks": adapter_config.get("r", 0),
    "block_size": adapter_config.get("oft_block_size", 32) or KEYS["block_size"][0],
    "neumann": adapter_config.get("num_cayley_neumann_terms", 5) if neumann else 0,
  }
