"""A head for classes of pixels that joins feature maps of several scales, as UPerNet does.

Pyramid pooling on the coarsest map, then a feature pyramid from coarse to fine, then all of its
levels side by side (Xiao et al. 2018, arXiv:1807.10221). Small: one width, and a norm over
channels, which knows nothing of the batch, in place of batch norm.

Shapes: B images, h x w cells, D units, C classes.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

POOLS = (1, 2, 3, 6)  # cells on a side that the coarsest map is pooled to
LEVELS = 3  # fewest levels of a pyramid that is made of maps of one grid


class UPerNet(nn.Module):
  """Feature maps -> class scores of the cells of the finest.

  Attributes:
    classes: C.
    width: D.
  """

  classes: int
  width: int

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array]) -> jax.Array:
    """Returns (B, h, w, C) float32, zeros before training.

    Args:
      maps: (B, h_i, w_i, C_i), fine to coarse; those of one grid, as a ViT's, become a `pyramid`.
    """
    maps = pyramid([jax.nn.standardize(y.astype(jnp.float32), axis=-1) for y in maps])
    top = maps[-1]
    pooled = [resized(self._layer(pool(top, n), 1, f"pool_{n}"), top.shape[1:3]) for n in POOLS]
    x = self._layer(jnp.concatenate([top, *pooled], -1), 3, "context")
    levels = [x]
    for i in reversed(range(len(maps) - 1)):
      x = self._layer(maps[i], 1, f"lateral_{i}") + resized(x, maps[i].shape[1:3])
      levels.append(self._layer(x, 3, f"level_{i}"))
    levels = [resized(y, maps[0].shape[1:3]) for y in levels]
    x = self._layer(jnp.concatenate(levels, -1), 3, "join")
    return nn.Dense(self.classes, kernel_init=nn.initializers.zeros, name="classes")(x)

  def _layer(self, x, side: int, name: str):
    """Returns convolution, norm and ReLU of x: (…, D)."""
    x = nn.Conv(self.width, (side, side), use_bias=False, name=name)(x)
    return nn.relu(nn.LayerNorm(name=f"{name}_norm")(x))


def pyramid(maps: Sequence[jax.Array]) -> list:
  """Returns maps of scales that halve from one to the next; maps of several grids as they are.

  Of one grid, the last but one keeps it, as in ViTs under UPerNet; fewer than LEVELS are repeated.
  """
  if len({y.shape[1:3] for y in maps}) > 1:
    return list(maps)
  maps = [*[maps[0]] * (LEVELS - len(maps)), *maps]
  made = []
  for i, y in enumerate(maps):
    scale = 2.0 ** (len(maps) - 2 - i)
    made.append(resized(y, tuple(max(1, round(side * scale)) for side in y.shape[1:3])))
  return made


def resized(x, grid: tuple[int, int]):
  """Returns maps (B, h, w, D) at a grid, bilinear."""
  if x.shape[1:3] == tuple(grid):
    return x
  return jax.image.resize(x, (x.shape[0], *grid, x.shape[3]), "bilinear")


def pool(x, size: int):
  """Returns (B, size, size, D): means over areas that cover a map (B, h, w, D) evenly.

  Areas overlap where sides are no multiples of the size, as in torch's adaptive_avg_pool2d.
  """
  rows, columns = (_areas(side, size) for side in x.shape[1:3])
  return jnp.einsum("ih,jw,bhwd->bijd", rows, columns, x)


def _areas(side: int, size: int) -> np.ndarray:
  """Returns (size, side), the weights of each area's cells."""
  found = np.zeros((size, side), np.float32)
  for i in range(size):
    start, stop = i * side // size, -(-(i + 1) * side // size)
    found[i, start:stop] = 1 / (stop - start)
  return found
