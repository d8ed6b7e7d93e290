"""Sparse updates: a few elements of each frozen kernel move, W + s D, D zero off a fixed support.

SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): a layer (in, out) gets rank * (in + out) values, as
many as LoRA of that rank has, at places drawn at random, at the kernel's largest or smallest
elements, or where the gradient on a probe batch is largest. Such an update has full rank, changes
little of what was known, and merges exactly: what is off the support keeps its bits.
Parameters of a layer: shira_weight (k,), shira_indices (2, k) int32, rows out, columns in, as in
`peft`. Unlike LoRA's, the gradient is picked from the kernel's own, so that the backward pass
costs as much as in full fine-tuning; optimizer state and checkpoints stay small.
"""

import jax.numpy as jnp
import numpy as np

from ft import errors, tune
from ft.tune import adapters
from ft.weights import stacking

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "rank": (16, "gives the number of values of a layer: rank * (in + out)", (1, None)),
  "support": ("random", "which elements move: random, largest, smallest, or of largest gradient",
              ["random", "magnitude", "small", "gradient"]),
  "scale": (1.0, "factor of the updates", (1e-6, None)),
}
PEFT = "SHIRA"


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the values and the head as trainable, everything else frozen; see `ft.tune.init`.

  The support is a function of the seed, the module path and the pretrained kernel, except that
  "gradient" also reads the probe batches: a run that goes on has to do so on equal devices.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, the rank asks for more
      values than a layer has, or there is no probe batch.
  """
  gradient = None
  if config.support == "gradient":
    if not (context and context.gradient):
      raise errors.UserError("tune.support='gradient' needs a probe batch, but no data is given")
    gradient = tune.flatten(context.gradient())
  return adapters.init(Sparse(config, gradient), config, variables, rng, head)


class Sparse(adapters.Adapter):
  """The update of one layer."""

  def __init__(self, config, gradient=None):
    super().__init__(config)
    self.gradient = gradient

  def create(self, layer):
    size, count = int(np.prod(layer.shape)), self.config.rank * sum(layer.shape)
    if count > size:
      raise errors.UserError(
        f"tune.rank={self.config.rank} asks for {count} values of {layer.path}, which has {size}; "
        f"use at most {size // sum(layer.shape)}, or leave that layer out of tune.targets")
    if self.config.support == "random":
      places = layer.rng.choice(size, count, replace=False, shuffle=False)
    else:
      places = largest(self._score(layer), count)
    rows, columns = np.unravel_index(np.sort(places), layer.shape)
    indices = np.stack([columns, rows]).astype(np.int32)
    return {"shira_weight": np.zeros(count, np.float32)}, {"shira_indices": indices}

  def _score(self, layer) -> np.ndarray:
    """What the support has the largest of: (in, out)."""
    if self.config.support == "gradient":
      path = f"params/{layer.path}/kernel"
      stack, number = stacking.split(path)
      kernel = self.gradient[path] if path in self.gradient else self.gradient[stack][number]
      return np.abs(np.asarray(kernel, np.float32).reshape(layer.shape))
    size = np.abs(np.asarray(layer.kernel(), np.float32))
    return -size if self.config.support == "small" else size

  def weights(self, p, kernel, bias, module):
    # The sum is taken in float32: a bfloat16 kernel would swallow small updates one by one.
    return self._moved(p, kernel.astype(jnp.float32)), bias

  def merge(self, p, kernel, bias, layer):
    return self._moved(p, kernel), bias

  def _moved(self, p, kernel):
    outputs, inputs = p["shira_indices"]
    update = self.config.scale * p["shira_weight"].astype(kernel.dtype)
    return kernel.at[inputs, outputs].add(update, unique_indices=True, mode="promise_in_bounds")

  def to_peft(self, p, layer):
    return {"shira_weight": self.config.scale * np.asarray(p["shira_weight"], np.float32),
            "shira_indices": np.asarray(p["shira_indices"], np.int32)}

  def from_peft(self, tensors, layer):
    values = np.asarray(tensors["shira_weight"], np.float32)
    indices = np.asarray(tensors["shira_indices"]).astype(np.int32)
    shape = np.asarray(layer.shape[::-1])[:, None]
    if indices.shape != (2, *values.shape) or (indices < 0).any() or (indices >= shape).any():
      raise errors.UserError(
        f"shira_indices {indices.shape} of {layer.path}: expected (2, {len(values)}) places in "
        f"({layer.shape[1]}, {layer.shape[0]})")
    if len(np.unique(np.ravel_multi_index(indices, layer.shape[::-1]))) != len(values):
      raise errors.UserError(f"shira_indices of {layer.path}: a place is there twice")
    return {"shira_weight": values / self.config.scale}, {"shira_indices": indices}


METHOD = Sparse


def largest(score: np.ndarray, count: int) -> np.ndarray:
  """Returns flat positions of the `count` largest elements; of equal ones the first."""
  flat = score.ravel()
  threshold = np.partition(flat, flat.size - count)[flat.size - count]
  above = np.flatnonzero(flat > threshold)
  level = np.flatnonzero(flat == threshold)[:count - above.size]
  return np.concatenate([above, level])


def peft_config(config) -> dict:
  """Returns SHiRA's own keys of adapter_config.json; the places stand in the file of tensors."""
  return {"r": config.rank, "mask_type": "random", "random_seed": None, "init_weights": True}


def peft_values(adapter_config: dict) -> dict:
  """Returns the `tune` keys of an adapter that `peft` wrote; whatever chose its places."""
  return {"rank": adapter_config["r"], "scale": 1.0}
