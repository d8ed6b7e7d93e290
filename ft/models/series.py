"""What the families of time series share: scaling, cutting into patches, positions.

Shapes: B series, T steps, C channels, P patches, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import base
from ft.weights.names import Rule


def batch_norm_rules(theirs: str, ours: str, only: str = "") -> list[Rule]:
  """Returns the rules of a torch batch normalisation; `ours` without the collection's name."""
  leaves = (("weight", "params", "scale"), ("bias", "params", "bias"),
            ("running_mean", "batch_stats", "mean"), ("running_var", "batch_stats", "var"))
  return [*(Rule(f"{theirs}.{leaf}", f"{collection}/{ours}/{name}", only=only)
            for leaf, collection, name in leaves),
          Rule(f"{theirs}.num_batches_tracked", "", "keep", only)]


def check_series(config, hf: dict) -> None:
  """Raises UserError for a context or a way of scaling that `scaled` and `patches` do not serve."""
  base.one_of(config, "scaling", ("std", "mean", True, False, None))
  for key, value in (("scaling_dim", 1), ("keepdim", True), ("default_scale", None),
                     ("minimum_scale", None)):
    base.only(hf, key, value)
  if config.context_length <= config.patch_length:
    raise errors.UserError(f"config.json: context_length {config.context_length} should be more "
                           f"than patch_length {config.patch_length}")


def scaled(values, observed, scaler: str):
  """Scales each channel by statistics of what was observed of it, as upstream's three scalers do.

  Args:
    values: (B, T, C); missing ones as 0.
    observed: (B, T, C), nonzero for values that were observed; None: all were.
    scaler: "std", mean and standard deviation; "mean", mean of magnitudes; "", not at all.

  Returns:
    (values (B, T, C), loc (B, 1, C), scale (B, 1, C)), float32: (given - loc) / scale.
  """
  values = values.astype(jnp.float32)
  observed = jnp.ones_like(values) if observed is None else (observed != 0).astype(jnp.float32)
  count = observed.sum(1, keepdims=True)
  if scaler == "std":
    count = jnp.maximum(count, 1.0)
    loc = (values * observed).sum(1, keepdims=True) / count
    variance = jnp.square((values - loc) * observed).sum(1, keepdims=True) / count
    scale = jnp.sqrt(variance + 1e-5)
    return (values - loc) / scale, loc, scale
  loc = jnp.zeros_like(count)
  if not scaler:
    return values, loc, jnp.ones_like(count)
  total = jnp.abs(values * observed).sum(1, keepdims=True)
  # A channel of which nothing was observed is scaled as it is in the rest of the batch.
  others = total.sum(0, keepdims=True) / jnp.maximum(count.sum(0, keepdims=True), 1.0)
  scale = jnp.where(count > 0, total / jnp.maximum(count, 1.0), others)
  scale = jnp.maximum(scale, 1e-10)
  return values / scale, loc, scale


def standardised(x, seen):
  """Returns x (B, T) less its mean, over its deviation, and both (B, 1), of what is seen (B, T)."""
  count = seen.sum(1, keepdims=True)
  some = jnp.maximum(count, 1)
  loc = jnp.where(seen, x, 0.0).sum(1, keepdims=True) / some
  centred = jnp.where(seen, x - loc, 0.0)
  scale = jnp.sqrt(jnp.square(centred).sum(1, keepdims=True) / some)
  scale = jnp.where(count == 0, 1.0, jnp.where(scale == 0, 1e-5, scale))
  return centred / scale, loc, scale


def windows(x, size: int, stride: int):
  """Returns x (B, T) as windows (B, P, size), after zeros that make T a multiple of `size`."""
  x = jnp.pad(x, ((0, 0), (-x.shape[1] % size, 0)))
  if size == stride:
    return x.reshape(x.shape[0], -1, size)
  first = jnp.arange(0, x.shape[1] - size + 1, stride)
  return x[:, first[:, None] + jnp.arange(size)]


def patches(values, length: int, stride: int):
  """Cuts (B, T, C) into patches (B, C, P, length), the last of which ends with the series."""
  count = (values.shape[1] - length) // stride + 1
  first = values.shape[1] - (length + stride * (count - 1))
  steps = first + stride * np.arange(count)[:, None] + np.arange(length)
  return jnp.moveaxis(values[:, steps], 3, 1)


def sincos(rng, shape, dtype=jnp.float32):
  """Returns the fixed position vectors (P, D): sines and cosines, centred, of deviation 0.1."""
  del rng
  angles = np.arange(shape[0])[:, None] * np.exp(
      np.arange(0, shape[1], 2) * -(np.log(10000.0) / shape[1]))
  table = np.zeros(shape, np.float32)
  table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)
  table -= table.mean()
  return jnp.asarray(table / (table.std(ddof=1) * 10), dtype)


def positions(module: nn.Module, kind: str, shape):
  """Returns a module's parameter `positions` (P, D); that of kind "sincos" is not trained."""
  init = sincos if kind == "sincos" else nn.initializers.normal(1.0)
  table = module.param("positions", init, shape)
  return jax.lax.stop_gradient(table) if kind == "sincos" else table


def probe_series(length: int, channels: int) -> dict:
  """Returns two random walks (2, T, C), of which some values are missing."""
  rng = np.random.default_rng(0)
  shape = (2, length, channels)
  observed = np.ones(shape, np.float32)
  observed[1, :length // 4] = 0
  return {"past_values": np.cumsum(rng.normal(size=shape), 1).astype(np.float32) * observed,
          "past_observed_mask": observed}
