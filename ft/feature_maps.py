"""Feature maps of image models, at several resolutions, as vectors of the places in an image."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors


def choose(maps: Sequence, height: int, strides: tuple[int, ...]) -> tuple[int, ...]:
  """Returns which of a model's maps (B, h, w, C) to take.

  Args:
    height: of the images, pixels.
    strides: pixels a cell of the maps that are wanted; where the model has none such, its last.
  """
  found = tuple(i for i, y in enumerate(maps) if round(height / y.shape[1]) in strides)
  return found or (len(maps) - 1,)


def pick(maps: Sequence, given: Sequence[int], height: int, strides: tuple[int, ...]) -> list:
  """Returns the maps that `task.maps` names, or those of `choose` where it is empty."""
  chosen = tuple(given) or choose(maps, height, strides)
  if max(chosen) >= len(maps) or min(chosen) < 0:
    raise errors.UserError(f"task.maps={list(chosen)}: the model has maps 0 to {len(maps) - 1}")
  return [maps[i] for i in chosen]


def patches(maps: Sequence, size: int):
  """Returns (B, h, w, D): maps (B, h', w', C) averaged locally, at the largest grid, side by side.

  Args:
    maps: at least one.
    size: side of the neighbourhood that cells are the average of, odd; 1: themselves. Zeros around
      the map count, as in anomalib.
  """
  reach = (size - 1) // 2
  averaged = [jax.lax.reduce_window(
    y.astype(jnp.float32), 0.0, jax.lax.add, (1, size, size, 1), (1, 1, 1, 1),
    ((0, 0), (reach, reach), (reach, reach), (0, 0))) / size**2 for y in maps]
  grid = max((y.shape[1:3] for y in averaged), key=np.prod)
  return jnp.concatenate([
    y if y.shape[1:3] == grid else
    jax.image.resize(y, (y.shape[0], *grid, y.shape[3]), "bilinear") for y in averaged], -1)
