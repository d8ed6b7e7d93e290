"""Changes of a loaded model's shape: vocabulary, image size, input channels, depth.

A family says in `SURGERY` what each change touches:

    SURGERY = {
        "vocab_size": Surgery("vocab_size", ("params/embeddings/word/embedding",)),
        "image_size": Surgery("image_size", ("params/embeddings/position",), patch="patch_size",
                              extra=1),
        "channels": Surgery("num_channels", ("params/embeddings/patch/kernel",)),
        "depth": Surgery("num_hidden_layers", ("params/encoder",)),
    }
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.weights import stacking


@dataclasses.dataclass(frozen=True)
class Surgery:
  """What a change touches.

  Attributes:
    field: of the family's Config.
    paths: of the leaves, or (path, its axis); for "depth", of the modules that hold the layers.
    axis: of the rows or channels in those leaves.
    patch: image_size only: the Config's field with the patch's side.
    extra: image_size only: position vectors before those of patches (class token, registers), or
      the Config's field with their number.
  """

  field: str
  paths: tuple
  axis: int = 0
  patch: str = ""
  extra: int | str = 0


def apply(module, config, leaves: Mapping, changes: Mapping) -> tuple:
  """Returns (config, leaves, sentences) of a model after changes.

  Args:
    module: the family's.
    config: its Config.
    leaves: our path -> array, layers one by one.
    changes: "vocab_size" | "image_size" | "channels" | "depth" -> the new value; an image size is
      a side or (height, width).

  Raises:
    UserError: the family cannot change this, or not to that value.
  """
  table, said, leaves = getattr(module, "SURGERY", {}), [], dict(leaves)
  for name, value in changes.items():
    if name not in table:
      able = ", ".join(table) or "nothing"
      family = module.__name__.rpartition(".")[2]
      raise errors.UserError(f"model.{name}: {family} cannot change it; it can change {able}")
    surgery = table[name]
    old = getattr(config, surgery.field)
    value = _side(value) if name == "image_size" else int(value)
    if min(_pair(value)) < 1:
      raise errors.UserError(f"model.{name}={value} should be at least 1")
    if old == value:
      continue
    for path, leaf in _CHANGES[name](surgery, config, leaves, value).items():
      if leaf is None:
        del leaves[path]
      else:
        leaves[path] = leaf
    config = dataclasses.replace(config, **{surgery.field: value})
    said.append(f"{surgery.field} {old} -> {value}: {_SAYS[name]}")
  return config, leaves, said


def _rows(surgery, config, leaves, size):
  """Further rows are the mean of those there are (Hewitt 2021), so no new token is likely."""
  out = {}
  for path, axis in _present(surgery, leaves):
    table = jnp.moveaxis(leaves[path], axis, 0)
    if size > table.shape[0]:
      mean = table.astype(jnp.float32).mean(0, keepdims=True).astype(table.dtype)
      rows = jnp.broadcast_to(mean, (size - table.shape[0], *table.shape[1:]))
      table = jnp.concatenate([table, rows])
    out[path] = jnp.moveaxis(table[:size], 0, axis)
  return out


def _grid(surgery, config, leaves, size):
  """Position vectors of another grid: bicubic interpolation, without antialiasing, of the old."""
  patch = getattr(config, surgery.patch)
  new = [side // patch for side in _pair(size)]
  old = [side // patch for side in _pair(getattr(config, surgery.field))]
  if min(new) < 1:
    raise errors.UserError(f"model.image_size={size} is smaller than a patch of {patch}")
  extra, out = surgery.extra, {}
  extra = getattr(config, extra) if isinstance(extra, str) else extra
  for path, _ in _present(surgery, leaves):
    leaf = leaves[path]
    flat = leaf.reshape(-1, leaf.shape[-1]).astype(jnp.float32)
    first, grid = flat[:extra], flat[extra:]
    if math.prod(old) != grid.shape[0]:
      raise errors.UserError(f"{path} has {grid.shape[0]} positions, not a grid of {old}")
    grid = interpolate(grid.reshape(*old, -1), new).reshape(math.prod(new), -1)
    made = jnp.concatenate([first, grid]).astype(leaf.dtype)
    out[path] = made.reshape(*leaf.shape[:-2], *made.shape)
  return out


def interpolate(grid, size, scale=None):
  """Bicubic interpolation of (h, w, D) to (*size, D), as torch's with align_corners=False.

  Args:
    grid: (h, w, D).
    size: (new h, new w).
    scale: new over old side, per axis, that positions are computed with; their quotient if None.
  """
  for axis in (0, 1):
    ratio = size[axis] / grid.shape[axis] if scale is None else scale[axis]
    weights = jnp.asarray(_cubic(grid.shape[axis], size[axis], ratio))
    grid = jnp.moveaxis(jnp.tensordot(weights, grid, (1, axis), precision="highest"), 0, axis)
  return grid


def _cubic(old: int, new: int, ratio: float) -> np.ndarray:
  """Returns the weights (new, old) of cubic convolution with a = -0.75, edges repeated."""
  a, weights = -0.75, np.zeros((new, old), np.float32)
  for i in range(new):
    centre = (i + 0.5) / ratio - 0.5
    first = math.floor(centre)
    for tap in range(-1, 3):
      x = abs(centre - (first + tap))
      if x <= 1:
        value = ((a + 2) * x - (a + 3)) * x * x + 1
      else:
        value = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
      weights[i, min(max(first + tap, 0), old - 1)] += value
  return weights


def _channels(surgery, config, leaves, count):
  """Kernels for other channels, the old ones repeated or added up; a grey image gives the same.

  Copies of a channel share its weight; where there are fewer channels, one stands for several.
  """
  out = {}
  for path, axis in _present(surgery, leaves):
    kernel = leaves[path]
    old = kernel.shape[axis]
    share = np.equal.outer(np.arange(count) % min(old, count), np.arange(old) % min(old, count))
    share = share / share.sum(0) if count > old else share
    made = jnp.tensordot(jnp.asarray(share, jnp.float32), kernel.astype(jnp.float32), (1, axis),
                         precision="highest")
    out[path] = jnp.moveaxis(made, 0, axis).astype(kernel.dtype)
  return out


def _depth(surgery, config, leaves, count):
  """The first `count` layers; further ones are copies of the last."""
  old = getattr(config, surgery.field)
  out = {}
  for path, leaf in leaves.items():
    target, number = stacking.split(path)
    if number is None or not any(path.startswith(p + "/") for p in surgery.paths):
      continue
    if number >= count:
      out[path] = None
    elif number == old - 1:
      out |= {stacking.numbered(target, i): jax.numpy.array(leaf) for i in range(old, count)}
  return out


_CHANGES = {"vocab_size": _rows, "image_size": _grid, "channels": _channels, "depth": _depth}
_SAYS = {
    "vocab_size": "new rows are the mean of the old ones",
    "image_size": "position vectors were interpolated",
    "channels": "kernels of the input were repeated or added up",
    "depth": "layers were cut from the end, or the last one was repeated",
}


def _present(surgery, leaves) -> list:
  """Returns [(path, axis)] of the leaves that there are."""
  pairs = [p if isinstance(p, tuple) else (p, surgery.axis) for p in surgery.paths]
  return [(path, axis) for path, axis in pairs if path in leaves]


def _side(value):
  sides = tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),) * 2
  return sides[0] if len(set(sides)) == 1 else sides


def _pair(value) -> tuple:
  return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
