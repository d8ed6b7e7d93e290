"""What vision transformers are built from: patches with positions, layers, attention pooling.

The config that all of them read is that of ft.models.vit, which says whom they follow; the layers
serve the text towers of CLIP and SigLIP too.
Shapes: B images, H and W pixels, h and w patches, N tokens, D hidden size.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import attention, convolution, layers
from ft.models.surgery import interpolate


class Embeddings(nn.Module):
  """Patches, the tokens before them, and positions: (B, H, W, channels) -> (B, N, D)."""

  config: Any  # of ft.models.vit
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, pixel_values, bool_masked_pos, interpolate_pos_encoding: bool):
    c, dtype, init = self.config, self.compute.dtype, normal(self.config)
    batch, height, width, channels = pixel_values.shape
    if channels != c.num_channels:
      raise errors.UserError(f"images of {channels} channels; the model reads {c.num_channels}")

    def token(name, *shape):
      value = self.param(name, init, shape).astype(dtype).reshape(1, -1, c.hidden_size)
      return jnp.broadcast_to(value, (batch, *value.shape[1:]))

    size, padding = c.patch_size, ((0, 0), (0, 0))
    patch = convolution.Conv(c.hidden_size, size, size, padding, dtype, init, not c.clip,
                             name="patch")
    x = patch(pixel_values).reshape(batch, -1, c.hidden_size)
    mask_token = token("mask_token", 1, c.hidden_size) if c.dino and c.use_mask_token else None
    if bool_masked_pos is not None:
      if mask_token is None:
        raise errors.UserError("bool_masked_pos: the model has no mask token")
      x = jnp.where(bool_masked_pos[..., None], mask_token, x)
    if c.positions_before:
      one = (c.hidden_size,) if c.clip else (1, 1, c.hidden_size)
      x = jnp.concatenate([token("cls_token", *one), x], 1)
    if c.model_type == "deit":
      x = jnp.concatenate([x[:, :1], token("distillation_token", *one), x[:, 1:]], 1)
    x = x + self._positions((height, width), interpolate_pos_encoding).astype(dtype)
    if c.num_register_tokens:
      registers = token("register_tokens", 1, c.num_register_tokens, c.hidden_size)
      x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], 1)
    return layers.Dropout(c.hidden_dropout_prob)(x)

  def _positions(self, sides, interpolated):
    """Returns the position vectors (N, D) of an image of these sides."""
    c, old, new = self.config, self.config.grid(), self.config.grid(sides)
    rows = (c.positions_before + math.prod(old), c.hidden_size)
    shape = rows if c.tower else (1, *rows)
    table = self.param("position", normal(c), shape).reshape(rows)
    if sides != c.sides() and not (c.dino or interpolated):
      raise errors.UserError(
          f"an image of {sides[0]} x {sides[1]}; the model has positions for "
          f"{c.sides()[0]} x {c.sides()[1]}: set model.image_size, or interpolate_pos_encoding")
    if new == old:
      return table
    if min(new) < 1:
      raise errors.UserError(f"an image of {sides[0]} x {sides[1]} is smaller than a patch of "
                             f"{c.patch_size}")
    grid = table[c.positions_before:].astype(jnp.float32).reshape(*old, -1)
    # Upstream smooths where it shrinks the grid of a model with registers, and nowhere else.
    grid = (resample if c.num_register_tokens else interpolate)(grid, new)
    return jnp.concatenate([table[:c.positions_before], grid.reshape(-1, c.hidden_size)])


def resample(grid, size):
  """Bicubic interpolation with antialiasing of (h, w, D) to (*size, D), as torch's."""
  for axis in (0, 1):
    weights = jnp.asarray(_smooth(grid.shape[axis], size[axis]))
    grid = jnp.moveaxis(jnp.tensordot(weights, grid, (1, axis), precision="highest"), 0, axis)
  return grid


def _smooth(old: int, new: int) -> np.ndarray:
  """Returns the weights (new, old) of cubic convolution with a = -0.5, widened to shrink."""
  a, scale = -0.5, old / new
  widening = max(scale, 1.0)
  centres = (np.arange(new)[:, None] + 0.5) * scale
  x = np.abs(np.arange(old)[None, :] + 0.5 - centres) / widening
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
  return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


class Attention(nn.Module):
  """Self-attention: x (B, N, D) -> (B, N, D)."""

  config: Any  # of ft.models.vit
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask):
    c = self.config
    qkv = [linear(c, self.compute, c.hidden_size, name, c.qkv_bias)
           for name in ("query", "key", "value")]
    heads = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
    q, k, v = (y.reshape(*x.shape[:2], *heads) for y in layers.fused(qkv, x))
    y = attention.attention(q, k, v, mask, drop=layers.Dropout(c.attention_probs_dropout_prob),
                            implementation=self.compute.attention)
    return linear(c, self.compute, c.hidden_size, "output")(y.reshape(x.shape))


class Mlp(nn.Module):
  """The two-layer network of a layer, or SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

  config: Any  # of ft.models.vit
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, size = self.config, self.config.width()
    make = functools.partial(linear, c, self.compute)
    if not (c.dino and c.use_swiglu_ffn):
      return make(c.hidden_size, "fc2")(layers.ACTIVATIONS[c.hidden_act](make(size, "fc1")(x)))
    if c.gate_apart:
      gate, up = layers.fused([make(size, "gate"), make(size, "up")], x)
    else:
      gate, up = jnp.split(make(2 * size, "gate_up")(x), 2, axis=-1)
    return make(c.hidden_size, "down")(jax.nn.silu(gate) * up)


class Layer(nn.Module):
  """Attention and a two-layer network, each a branch with a norm before it."""

  config: Any  # of ft.models.vit
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask=None):
    for place, branch in (("before", Attention(self.config, self.compute, name="attention")),
                          ("after", Mlp(self.config, self.compute, name="mlp"))):
      y = norm(self.config, self.compute, f"norm_{place}")(x)
      y = branch(y, mask) if place == "before" else branch(y)
      x = x + self._leave_out(y, place)
    return x

  def _leave_out(self, y, place):
    """Returns a branch's output, scaled in DINOv2, after dropout and stochastic depth."""
    c = self.config
    if not c.dino:
      return layers.DropPath(c.drop_path_rate)(layers.Dropout(c.hidden_dropout_prob)(y))
    start = nn.initializers.constant(c.layerscale_value)
    y = y * self.param(f"scale_{place}", start, (c.hidden_size,)).astype(y.dtype)
    return layers.DropPath(c.drop_path_rate)(y)


class Encoder(nn.Module):
  """The stack of layers: x (B, N, D) -> (x, what each layer gave, if `keep`)."""

  config: Any  # of ft.models.vit
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask=None, keep: bool = False):
    layer = functools.partial(Layer, self.config, self.compute)
    out = layers.run_layers(layer, self.config.num_hidden_layers, self.compute, x, mask, keep=keep)
    return out if keep else (out, ())


class AttentionPool(nn.Module):
  """SigLIP's pooling: a learned query attends to all tokens, (B, N, D) -> (B, D)."""

  config: Any  # of ft.models.vit
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, size = self.config, self.config.hidden_size
    heads = (c.num_attention_heads, size // c.num_attention_heads)
    project = linear(c, self.compute, 3 * size, "in_proj")
    probe = self.param("probe", normal(c), (1, 1, size)).astype(x.dtype)
    q = project(probe)[..., :size].reshape(1, 1, *heads)
    _, k, v = (y.reshape(*x.shape[:2], *heads) for y in jnp.split(project(x), 3, axis=-1))
    y = attention.attention(jnp.broadcast_to(q, (x.shape[0], 1, *heads)), k, v,
                            implementation=self.compute.attention)
    y = linear(c, self.compute, size, "output")(y.reshape(x.shape[0], size))
    return y + Mlp(c, self.compute, name="mlp")(norm(c, self.compute, "norm")(y))


def normal(config):
  """Returns the initialiser of weights."""
  return nn.initializers.normal(config.initializer_range)


def linear(config, compute: layers.Compute, features: int, name: str | None = None,
           use_bias: bool = True) -> layers.Linear:
  """Returns a linear layer that starts as the config says."""
  return layers.Linear(features, use_bias, compute.dtype, normal(config), name=name)


def norm(config, compute: layers.Compute, name: str | None = None) -> layers.LayerNorm:
  """Returns a layer norm with the config's epsilon."""
  return layers.LayerNorm(config.layer_norm_eps, compute.dtype, name=name)
