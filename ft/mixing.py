"""Mixed images: mixup and CutMix, with the labels mixed by the same shares.

Shapes: B batch, H, W height and width, C classes.
"""

import jax
import jax.numpy as jnp

from ft import errors

MIXED = "pixel_values"


def mix(inputs: dict, hot, weight, rng, alpha: float = 0.0, cut: float = 0.0) -> tuple:
  """Mixes each image with that of the reversed batch, and so their labels.

  Mixup adds the two up by a share from Beta(alpha, alpha) (Zhang et al. 2018, arXiv:1710.09412).
  CutMix puts a box of the other in whose area is 1 - Beta(cut, cut), and counts the pixels that it
  covers (Yun et al. 2019, arXiv:1905.04899). Where both are on, a batch gets either with equal
  chance. Rows whose partner is padding stay as they are.

  Args:
    inputs: "pixel_values" (B, H, W, 3) float, after normalisation.
    hot: targets (B, C) float32. weight: (B,).
    rng: a key.
    alpha, cut: of the Beta distributions; 0: off. One of them is on.

  Returns:
    (inputs, hot), mixed.

  Raises:
    UserError: the inputs are cached features.
  """
  if "features" in inputs:
    raise errors.UserError(
      "task.mixup and task.cutmix mix images, but this run trains the head on features computed "
      "once; set task.mixup=0 and task.cutmix=0, or train more than the head"
    )
  pixels = inputs[MIXED]
  # Its own stream, so that the dropout masks are those of a run without mixup.
  rng = jax.random.fold_in(rng, 0x6D6978)
  share = own = None
  if alpha:
    share = jax.random.beta(rng, alpha, alpha, weight.shape)
    own = share[:, None, None]
  if cut:
    outside = _outside(jax.random.fold_in(rng, 1), cut, pixels.shape)
    cuts = jax.random.bernoulli(jax.random.fold_in(rng, 2)) if alpha else True
    own = jnp.where(cuts, outside, own) if alpha else outside
    share = jnp.where(cuts, outside.mean((1, 2)), share) if alpha else outside.mean((1, 2))
  paired = weight[::-1] > 0
  share = jnp.where(paired, share, 1.0).astype(jnp.float32)
  own = jnp.where(paired[:, None, None], own, 1.0)[..., None].astype(pixels.dtype)
  mixed = pixels * own + pixels[::-1] * (1 - own)
  return {**inputs, MIXED: mixed}, hot * share[:, None] + hot[::-1] * (1 - share[:, None])


def _outside(rng, alpha: float, shape):
  """Returns (B, H, W) float32: 0 within a random box of each image, 1 outside.

  Boxes have the image's proportions and their centre anywhere in it; what hangs over is cut off.
  """
  rows, height, width = shape[:3]
  share, place = jax.random.split(rng)
  side = jnp.sqrt(1 - jax.random.beta(share, alpha, alpha, (rows, 1)))
  centre = jax.random.uniform(place, (2, rows, 1))

  def within(middle, size):
    at = (jnp.arange(size) + 0.5) / size
    return jnp.abs(at[None] - middle) <= side / 2

  return 1.0 - (within(centre[0], height)[:, :, None] * within(centre[1], width)[:, None, :])
