"""ResNet and BiT: residual convolutional image networks.

Papers: He et al. 2015, arXiv:1512.03385 (ResNet); He et al. 2016, arXiv:1603.05027 (activation
before the convolution); Kolesnikov et al. 2019, arXiv:1912.11370 (BiT); Qiao et al. 2019,
arXiv:1903.10520 (weight standardisation); Wu & He 2018, arXiv:1803.08494 (group normalisation).
Follows transformers' `models/resnet/modeling_resnet.py` and `models/bit/modeling_bit.py`
(Apache-2.0) in names, defaults and order of operations; see third_party/resnet.md.
Shapes: B images, h and w positions, C channels, D those of the last stage.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ft import errors
from ft.models import base, convolution, layers
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "image"
MODEL_TYPES = ("resnet", "bit")
HEAD = ("params/classifier",)
SURGERY = {"channels": Surgery("num_channels", ("params/stem/conv/kernel",
                                                "params/stem/raw_kernel"), axis=2)}

_MOMENTUM, _EPSILON = 0.9, 1e-5  # torch's defaults, which upstream does not configure
_KERNEL_EPSILON = 1e-8  # added to the variance of a kernel that is standardised
_STAGE, _BLOCK = "encoder.stages.{s}.layers.{i}.", "params/encoder/stage_{s}/block_{i}/"


def _conv_norm(conv: str, norm: str, ours: str) -> list[Rule]:
  theirs = f"[resnet.]{norm}.normalization."
  stats = ours.replace("params", "batch_stats", 1) + "/norm/"
  return [
      Rule(f"[resnet.]{conv}.convolution.weight", ours + "/conv/kernel", "conv"),
      Rule(theirs + "weight", ours + "/norm/scale"),
      Rule(theirs + "bias", ours + "/norm/bias"),
      Rule(theirs + "running_mean", stats + "mean"),
      Rule(theirs + "running_var", stats + "var"),
      Rule(theirs + "num_batches_tracked", transform="keep"),
  ]


def _group_norm(theirs: str, ours: str) -> list[Rule]:
  return [Rule(f"[bit.]{theirs}.weight", ours + "/scale"),
          Rule(f"[bit.]{theirs}.bias", ours + "/bias")]


NAMES = [
    *_conv_norm("embedder.embedder", "embedder.embedder", "params/stem"),
    *_conv_norm(_STAGE + "layer.{j}", _STAGE + "layer.{j}", _BLOCK + "conv_{j}"),
    *_conv_norm(_STAGE + "shortcut", _STAGE + "shortcut", _BLOCK + "shortcut"),
    Rule("[bit.]embedder.convolution.weight", "params/stem/raw_kernel", "conv"),
    *_group_norm("embedder.norm", "params/stem_norm"),
    Rule("[bit.]" + _STAGE + "conv{j}.weight", _BLOCK + "conv_{j}/raw_kernel", "conv"),
    *_group_norm(_STAGE + "norm{j}", _BLOCK + "norm_{j}"),
    Rule("[bit.]" + _STAGE + "downsample.conv.weight", _BLOCK + "shortcut/raw_kernel", "conv"),
    *_group_norm(_STAGE + "downsample.norm", _BLOCK + "shortcut_norm"),
    *_group_norm("norm", "params/norm"),
    Rule("classifier.1.weight", "params/classifier/kernel", "transpose"),
    Rule("classifier.1.bias", "params/classifier/bias"),
]


@dataclasses.dataclass(frozen=True)
class Shape:
  """One block: its input and output channels, stride and dilation of its 3x3 convolution.

  Attributes:
    first: whether it is the first of its stage.
    rate: of its stochastic depth.
  """

  inputs: int
  features: int
  stride: int
  dilation: int
  first: bool
  rate: float


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' ResNetConfig and, from global_padding on, of BitConfig alone."""

  num_channels: int = 3
  embedding_size: int = 64
  hidden_sizes: tuple = (256, 512, 1024, 2048)
  depths: tuple = (3, 4, 6, 3)
  layer_type: str = "bottleneck"
  hidden_act: str = "relu"
  downsample_in_first_stage: bool = False
  downsample_in_bottleneck: bool = False
  image_size: int | tuple = 224
  global_padding: str | None = None
  num_groups: int = 32
  drop_path_rate: float = 0.0
  embedding_dynamic_padding: bool = False
  output_stride: int = 32
  width_factor: int = 1

  PREFIXES = {"resnet": "ResNet", "bit": "Bit"}
  DEFAULTS = {"bit": {"layer_type": "preactivation"}}
  # A backbone has the tensors of the body; which of its feature maps are used is not ours to say.
  HEADS = {"none": ("{}Model", "{}Backbone"), "classify": ("{}ForImageClassification",)}

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    padding = values.get("global_padding")
    return {"global_padding": padding.upper() if padding else None}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_act", layers.ACTIVATIONS)
    if len(self.hidden_sizes) != len(self.depths) or not self.depths:
      raise errors.UserError(f"config.json: hidden_sizes {list(self.hidden_sizes)} and depths "
                             f"{list(self.depths)} should be of one length")
    if self.model_type != "bit":
      base.one_of(self, "layer_type", ("basic", "bottleneck"))
      return
    base.one_of(self, "layer_type", ("preactivation", "bottleneck"))
    base.one_of(self, "global_padding", (None, "SAME"))
    base.only(hf, "width_factor", 1)
    inner = [convolution.round_channels(size / 4) for size in self.hidden_sizes]
    for size in (self.embedding_size, *self.hidden_sizes, *inner):
      if size % self.num_groups:
        raise errors.UserError(f"config.json: {size} channels, of the model or within a block, do "
                               f"not divide into num_groups {self.num_groups}")
    if any(size % 8 for size in self.hidden_sizes):  # upstream's last norm would not fit its blocks
      raise errors.UserError(f"config.json: hidden_sizes {list(self.hidden_sizes)} should be "
                             "multiples of 8")

  @property
  def has_drop_path(self) -> bool:
    """Whether the model has stochastic depth: BiT does."""
    return self.model_type == "bit"

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with the last block's rate of stochastic depth set; BiT only."""
    if not self.has_drop_path:
      raise errors.UserError("model.dropout: resnet has no dropout")
    return dataclasses.replace(self, drop_path_rate=rate)

  def stages(self) -> list:
    """Returns the Shapes of each stage's blocks."""
    bit, inputs, reduced, dilation = self.model_type == "bit", self.embedding_size, 4, 1
    rates = iter(np.linspace(0, self.drop_path_rate if bit else 0.0, sum(self.depths)).tolist())
    stages = []
    for number, (features, depth) in enumerate(zip(self.hidden_sizes, self.depths, strict=True)):
      stride = 2 if number or self.downsample_in_first_stage and not bit else 1
      own = dilation
      if bit:
        if reduced >= self.output_stride:
          dilation, stride = dilation * stride, 1
        reduced *= stride
        own = 1 if dilation in (1, 2) else 2
      blocks = [Shape(inputs, features, stride, own, True, next(rates))]
      blocks += [Shape(features, features, 1, dilation, False, next(rates))
                 for _ in range(depth - 1)]
      stages.append(blocks)
      inputs = features
    return stages


class Block(nn.Module):
  """ResNet's: two or three convolutions beside a shortcut, activation after the sum."""

  config: Config
  shape: Shape
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    c, s = self.config, self.shape
    conv = functools.partial(conv_norm, self.dtype)
    # Upstream configures the last activation only.
    if c.layer_type == "basic":
      y = jax.nn.relu(conv("conv_0", s.features, 3, s.stride)(x))
      y = conv("conv_1", s.features, 3)(y)
    else:
      strides = (s.stride, 1) if c.downsample_in_bottleneck else (1, s.stride)
      y = jax.nn.relu(conv("conv_0", s.features // 4, 1, strides[0])(x))
      y = jax.nn.relu(conv("conv_1", s.features // 4, 3, strides[1])(y))
      y = conv("conv_2", s.features)(y)
    if s.stride != 1 or s.inputs != s.features:
      x = conv("shortcut", s.features, 1, s.stride)(x)
    return layers.ACTIVATIONS[c.hidden_act](x + y)


class BitBlock(nn.Module):
  """BiT's: three standardised convolutions, each with a group norm before or after it."""

  config: Config
  shape: Shape
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    c, s = self.config, self.shape
    inner = convolution.round_channels(s.features / 4)
    conv = functools.partial(standardised, c, self.dtype)
    norm = functools.partial(GroupNorm, c.num_groups, c.hidden_act, self.dtype)
    drop = layers.DropPath(s.rate)
    if c.layer_type == "preactivation":
      y = norm(name="norm_1")(x)
      if s.first:
        x = conv("shortcut", s.features, 1, s.stride)(y)
      y = norm(name="norm_2")(conv("conv_1", inner)(y))
      y = norm(name="norm_3")(conv("conv_2", inner, 3, s.stride)(y))
      return drop(conv("conv_3", s.features)(y)) + x
    y = norm(name="norm_1")(conv("conv_1", inner)(x))
    y = norm(name="norm_2")(conv("conv_2", inner, 3, s.stride, s.dilation)(y))
    plain = functools.partial(GroupNorm, c.num_groups, "", self.dtype)
    y = plain(name="norm_3")(conv("conv_3", s.features)(y))
    if s.first:
      x = plain(name="shortcut_norm")(conv("shortcut", s.features, 1, s.stride)(x))
    return layers.ACTIVATIONS[c.hidden_act](drop(y) + x)


class StandardisedConv(convolution.Conv):
  """Convolution whose kernel is standardised, for each output channel, before it is used.

  Parameter: raw_kernel (k, k, C, features). It is not named kernel, for a low-rank update of it
  would not be one of what is used.
  """

  @nn.compact
  def weights(self, in_features: int):
    """Returns (standardised kernel (k, k, in_features, features), None)."""
    raw = self.param("raw_kernel", self.kernel_init, self.kernel_shape(in_features))
    raw = raw.astype(jnp.float32)
    centred = raw - raw.mean((0, 1, 2))
    variance = jnp.square(centred).mean((0, 1, 2))
    return centred * lax.rsqrt(variance + _KERNEL_EPSILON), None


class GroupNorm(nn.Module):
  """Normalises groups of channels over positions, then activates: x (B, h, w, C), the same.

  Parameters: scale (C,), bias (C,). Statistics in float32. No activation if its name is empty.
  """

  groups: int
  activation: str = ""
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, channels // self.groups)
    y = y - y.mean((1, 3), keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + _EPSILON)
    y = (y.reshape(x.shape) * scale + bias).astype(self.dtype)
    return layers.ACTIVATIONS[self.activation](y) if self.activation else y


class Stage(nn.Module):
  """Blocks, one after another."""

  config: Config
  shapes: tuple
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    block = BitBlock if self.config.model_type == "bit" else Block
    for i, shape in enumerate(self.shapes):
      x = block(self.config, shape, self.dtype, name=f"block_{i}")(x)
    return x


class Encoder(nn.Module):
  """The stages; returns what each of them gives."""

  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    maps = []
    for number, shapes in enumerate(self.config.stages()):
      x = Stage(self.config, tuple(shapes), self.dtype, name=f"stage_{number}")(x)
      maps.append(x)
    return tuple(maps)


class Model(nn.Module):
  """ResNet or BiT: images -> a dict, see `__call__`.

  ResNet's batch statistics are the running ones unless "batch_stats" is mutable. BiT's blocks are
  dropped iff apply is given a "dropout" rng.
  """

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, dtype = self.config, self.compute.dtype
    if c.model_type != "bit":
      self.stem = conv_norm(dtype, None, c.embedding_size, 7, 2)
    else:
      self.stem = standardised(c, dtype, None, c.embedding_size, 7, 2)
      norm = functools.partial(GroupNorm, c.num_groups, c.hidden_act, dtype)
      if c.layer_type == "preactivation":
        self.norm = norm()
      else:
        self.stem_norm = norm()
    self.encoder = Encoder(c, dtype)
    if c.num_labels:
      self.classifier = layers.Linear(c.num_labels, dtype=dtype)

  def __call__(self, pixel_values):
    """Applies the model.

    Args:
      pixel_values: (B, H, W, num_channels) floats, normalised as the checkpoint's preprocessor
        says. Any H and W.

    Returns:
      feature_maps, a tuple of one (B, h, w, C) a stage, the first a quarter of H and W, halved from
      stage to stage; last_hidden_state (B, h, w, D), the last of them, in BiT with activation
      first ("preactivation") normalised; features (B, D), its mean over positions; logits
      (B, labels) float32 if config.num_labels > 0.
    """
    x = self.stem(pixel_values.astype(self.compute.dtype))
    maps = self.encoder(self._pooled(x))
    x = maps[-1]
    if hasattr(self, "norm"):
      x = self.norm(x)
    features = x.mean((1, 2), dtype=jnp.float32).astype(x.dtype)
    outputs = {"last_hidden_state": x, "feature_maps": maps, "features": features}
    if self.config.num_labels:
      outputs["logits"] = self.head(features)
    return outputs

  def _pooled(self, x):
    """Returns what the stem's pooling makes of its convolution."""
    c, around = self.config, ((1, 1), (1, 1))
    if c.model_type != "bit":
      return convolution.max_pool(layers.ACTIVATIONS[c.hidden_act](x), 3, 2, around)
    if c.global_padding is None:
      x = _pad(x, around)
    if hasattr(self, "stem_norm"):
      x = self.stem_norm(x)  # its statistics include the padding, as upstream's
    if c.embedding_dynamic_padding:
      x = _pad(x, convolution.same_padding(x.shape[1:3], (3, 3), 2))
    return convolution.max_pool(x, 3, 2)

  def head(self, features):
    """Returns the logits (B, labels), float32, of features (B, D)."""
    return self.classifier(features).astype(jnp.float32)


def _pad(x, padding):
  return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _around(size, dilation=1) -> tuple:
  return ((size // 2 * dilation,) * 2,) * 2


def conv_norm(dtype, name, features, size=1, stride=1) -> convolution.ConvNorm:
  """Returns a convolution with batch normalisation, padded by half its size."""
  conv = convolution.Conv(features, size, stride, _around(size), dtype, parent=None)
  norm = convolution.BatchNorm(_MOMENTUM, _EPSILON, parent=None)
  return convolution.ConvNorm(conv, norm, name=name)


def standardised(config, dtype, name, features, size=1, stride=1, dilation=1) -> StandardisedConv:
  """Returns a convolution with standardised kernel, padded as the config says."""
  # With stride 2 upstream's formula counts (stride - 1) in and halves the sum: the same, as the
  # kernels are odd.
  padding = config.global_padding or _around(size, dilation)
  return StandardisedConv(features, size, stride, padding, dtype, dilation=dilation, name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, on which an export is compared with its reload."""
  return {"pixel_values": convolution.probe_images(config.image_size, config.num_channels)}
