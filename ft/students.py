"""A small decoder that learns a frozen model's feature maps from the coarsest of them.

On what it has learnt from it gives the maps back; on what it never saw it does not. That is reverse
distillation (Deng and Li 2022, arXiv:2201.10703), with a few convolutions in place of a mirrored
ResNet, so that it fits every family of image models.

Shapes: B images, h x w cells, C_i channels of map i, D units within.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ft import anomalies


class Decoder(nn.Module):
  """Feature maps -> what the student takes them for, of the same shapes.

  Attributes:
    width: D, the bottleneck: too narrow to carry what is not learnt.
    dropout: share of the bottleneck that is dropped in training.
  """

  width: int
  dropout: float

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array], training: bool = False) -> list:
    """Returns float32 maps (B, h_i, w_i, C_i); with training it needs an rng stream "dropout".

    Args:
      maps: (B, h_i, w_i, C_i), fine to coarse, or all of one grid; the last alone is looked at.
    """
    x = jax.nn.standardize(maps[-1].astype(jnp.float32), axis=-1)
    x = nn.gelu(nn.Dense(self.width, name="bottleneck")(x))
    x = nn.Dropout(self.dropout, deterministic=not training)(x)
    made = []
    for i in reversed(range(len(maps))):
      shape = (x.shape[0], *maps[i].shape[1:3], self.width)
      x = x if x.shape == shape else jax.image.resize(x, shape, "bilinear")
      y = nn.Conv(self.width, (3, 3), name=f"mix_{i}")(nn.LayerNorm(name=f"norm_{i}")(x))
      x = x + nn.gelu(y)
      made.append(nn.Dense(maps[i].shape[-1], name=f"out_{i}")(x))
    return made[::-1]


def apart(teacher: Sequence, student: Sequence) -> list:
  """Returns 1 - cosine (B, h_i, w_i) of each cell of the teacher's maps and the student's."""
  return [anomalies.cosine(anomalies.unit(a.astype(jnp.float32)), anomalies.unit(b))
          for a, b in zip(teacher, student, strict=True)]


def joined(distances: Sequence):
  """Returns (B, h, w): distances (B, h_i, w_i) at the largest grid, added up."""
  largest = max((d.shape for d in distances), key=lambda shape: shape[1] * shape[2])
  return sum(d if d.shape == largest else jax.image.resize(d, largest, "bilinear")
             for d in distances)
