"""ConvNeXt: convolutional image networks with the layer of a transformer.

Papers: Liu et al. 2022, arXiv:2201.03545 (ConvNeXt); Woo et al. 2023, arXiv:2301.00808 (version 2,
global response normalisation); Huang et al. 2016, arXiv:1603.09382 (stochastic depth). Follows
transformers' `models/convnext/modeling_convnext.py` and `models/convnextv2/modeling_convnextv2.py`
(Apache-2.0) in names, defaults and order of operations; see third_party/convnext.md.
Shapes: B images, h and w positions, C channels, D those of the last stage.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import base, convolution, layers
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "image"
MODEL_TYPES = ("convnext", "convnextv2")
HEAD = ("params/classifier",)
SURGERY = {"channels": Surgery("num_channels", ("params/embeddings/patch/kernel",), axis=2)}

_NORM_EPSILON = 1e-6  # of all norms but the last; upstream does not configure it
_BODY = "[convnext.|convnextv2.]"
_STAGE, _OURS = _BODY + "encoder.stages.{s}.", "params/encoder/stage_{s}/"
_LAYER, _OUR_LAYER = _STAGE + "layers.{i}.", _OURS + "layer_{i}/"


def _weights(theirs: str, ours: str, transform: str, kernel: str = "kernel") -> list[Rule]:
  return [Rule(theirs + ".weight", f"{ours}/{kernel}", transform),
          Rule(theirs + ".bias", ours + "/bias")]


_norm = functools.partial(_weights, transform="same", kernel="scale")

NAMES = [
    *_weights(_BODY + "embeddings.patch_embeddings", "params/embeddings/patch", "conv"),
    *_norm(_BODY + "embeddings.layernorm", "params/embeddings/norm"),
    *_norm(_STAGE + "downsampling_layer.0", _OURS + "downsample_norm"),
    *_weights(_STAGE + "downsampling_layer.1", _OURS + "downsample", "conv"),
    *_weights(_LAYER + "dwconv", _OUR_LAYER + "depthwise", "depthwise"),
    *_norm(_LAYER + "layernorm", _OUR_LAYER + "norm"),
    *_weights(_LAYER + "pwconv1", _OUR_LAYER + "expand", "transpose"),
    *_weights(_LAYER + "pwconv2", _OUR_LAYER + "project", "transpose"),
    Rule(_LAYER + "layer_scale_parameter", _OUR_LAYER + "layer_scale"),
    Rule(_LAYER + "grn.weight", _OUR_LAYER + "response_norm/scale", "spatial"),
    Rule(_LAYER + "grn.bias", _OUR_LAYER + "response_norm/bias", "spatial"),
    *_norm(_BODY + "layernorm", "params/norm"),
    *_weights("classifier", "params/classifier", "transpose"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' ConvNextConfig and ConvNextV2Config that matter here."""

  num_channels: int = 3
  patch_size: int = 4
  num_stages: int = 4
  hidden_sizes: tuple = (96, 192, 384, 768)
  depths: tuple = (3, 3, 9, 3)
  hidden_act: str = "gelu"
  initializer_range: float = 0.02
  layer_norm_eps: float = 1e-12
  layer_scale_init_value: float = 1e-6
  drop_path_rate: float = 0.0
  image_size: int | tuple = 224

  PREFIXES = {"convnext": "ConvNext", "convnextv2": "ConvNextV2"}
  HEADS = {"none": ("{}Model",), "classify": ("{}ForImageClassification",)}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_act", layers.ACTIVATIONS)
    if not self.num_stages == len(self.hidden_sizes) == len(self.depths):
      raise errors.UserError(f"config.json: num_stages {self.num_stages}, hidden_sizes "
                             f"{list(self.hidden_sizes)} and depths {list(self.depths)} should "
                             "be of one length")
    stated = (hf.get("architectures") or [""])[0]
    if stated.endswith("Backbone"):
      raise errors.UserError(f"config.json: {stated} is not supported: it has norms of its own "
                             "instead of the model's; load the whole model, of which feature_maps "
                             "are an output")

  def has_layer_scale(self) -> bool:
    """Returns whether layers have a learned factor a channel; version 2 has none."""
    return self.model_type == "convnext" and self.layer_scale_init_value > 0

  def drop_rates(self) -> list:
    """Returns each layer's rate of stochastic depth, by stage: from 0 to drop_path_rate."""
    rates = np.linspace(0, self.drop_path_rate, sum(self.depths)).tolist()
    ends = np.cumsum(self.depths)
    return [rates[end - depth:end] for end, depth in zip(ends, self.depths, strict=True)]

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with the last layer's rate of stochastic depth set."""
    return dataclasses.replace(self, drop_path_rate=rate)


class ResponseNorm(nn.Module):
  """Global response normalisation: x (B, h, w, C) -> (B, h, w, C).

  Each channel's norm over positions, divided by the mean of these norms, scales that channel.
  Parameters: scale (C,), bias (C,); both start at zero, which makes it the identity.
  """

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],)).astype(x.dtype)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(x.dtype)
    squares = jnp.square(x.astype(jnp.float32)).sum((1, 2), keepdims=True)
    # The root has no gradient at zero, a channel that is not active at all; torch's is zero.
    active = squares > 0
    norms = jnp.where(active, jnp.sqrt(jnp.where(active, squares, 1.0)), 0.0)
    relative = (norms / (norms.mean(-1, keepdims=True) + _NORM_EPSILON)).astype(x.dtype)
    return x * (scale * relative + 1) + bias


class Layer(nn.Module):
  """Depthwise 7x7, norm, and a two-layer network, beside a residual: x (B, h, w, C), the same."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, rate=0.0):
    c, dtype, channels = self.config, self.compute.dtype, x.shape[-1]
    y = convolution.DepthwiseConv(channels, 7, padding=((3, 3), (3, 3)), dtype=dtype, use_bias=True,
                                  kernel_init=nn.initializers.normal(c.initializer_range),
                                  name="depthwise")(x)
    y = layers.LayerNorm(_NORM_EPSILON, dtype, name="norm")(y)
    y = layers.ACTIVATIONS[c.hidden_act](linear(c, 4 * channels, dtype, "expand")(y))
    if c.model_type == "convnextv2":
      y = ResponseNorm(name="response_norm")(y)
    y = linear(c, channels, dtype, "project")(y)
    if c.has_layer_scale():
      start = nn.initializers.constant(c.layer_scale_init_value)
      y = y * self.param("layer_scale", start, (channels,)).astype(dtype)
    return x + layers.DropPath(rate)(y)


class Embeddings(nn.Module):
  """Patches of the image and their norm: (B, H, W, num_channels) -> (B, h, w, C)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, pixel_values):
    c, dtype = self.config, self.compute.dtype
    x = patches(c, c.hidden_sizes[0], c.patch_size, dtype, "patch")(pixel_values)
    return layers.LayerNorm(_NORM_EPSILON, dtype, name="norm")(x)


class Stage(nn.Module):
  """The layers of one width; all stages but the first begin by halving the positions."""

  config: Config
  compute: layers.Compute
  number: int

  @nn.compact
  def __call__(self, x):
    c, dtype = self.config, self.compute.dtype
    if self.number:
      x = layers.LayerNorm(_NORM_EPSILON, dtype, name="downsample_norm")(x)
      x = patches(c, c.hidden_sizes[self.number], 2, dtype, "downsample")(x)
    each = {"rate": c.drop_rates()[self.number]} if c.drop_path_rate else None
    layer = functools.partial(Layer, c, self.compute)
    return layers.run_layers(layer, c.depths[self.number], self.compute, x, each=each)


class Encoder(nn.Module):
  """The stages; returns what each of them gives."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    maps = []
    for number in range(self.config.num_stages):
      x = Stage(self.config, self.compute, number, name=f"stage_{number}")(x)
      maps.append(x)
    return tuple(maps)


class Model(nn.Module):
  """ConvNeXt: images -> a dict, see `__call__`. Layers are dropped iff there is a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c = self.config
    self.embeddings = Embeddings(c, self.compute)
    self.encoder = Encoder(c, self.compute)
    self.norm = layers.LayerNorm(c.layer_norm_eps, self.compute.dtype)
    if c.num_labels:
      self.classifier = linear(c, c.num_labels, self.compute.dtype)

  def __call__(self, pixel_values):
    """Applies the model.

    Args:
      pixel_values: (B, H, W, num_channels) floats, normalised as the checkpoint's preprocessor
        says. Rows and columns beyond the last whole patch are not read, in each stage.

    Returns:
      feature_maps, a tuple of one (B, h, w, C) a stage, h and w being H and W over patch_size,
      halved from stage to stage; last_hidden_state (B, h, w, D), the last of them; features (B, D),
      its normalised mean over positions; logits (B, labels) float32 if config.num_labels > 0.
    """
    maps = self.encoder(self.embeddings(pixel_values.astype(self.compute.dtype)))
    pooled = maps[-1].mean((1, 2), dtype=jnp.float32)
    outputs = {"last_hidden_state": maps[-1], "feature_maps": maps, "features": self.norm(pooled)}
    if self.config.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    return outputs

  def head(self, features):
    """Returns the logits (B, labels), float32, of features (B, D)."""
    return self.classifier(features).astype(jnp.float32)


def linear(config, features, dtype, name=None) -> layers.Linear:
  """Returns a linear layer that starts as the config says."""
  init = nn.initializers.normal(config.initializer_range)
  return layers.Linear(features, dtype=dtype, kernel_init=init, name=name)


def patches(config, features, size, dtype, name) -> convolution.Conv:
  """Returns a convolution of patches that do not overlap."""
  init = nn.initializers.normal(config.initializer_range)
  return convolution.Conv(features, size, size, ((0, 0), (0, 0)), dtype, init, use_bias=True,
                          name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, on which an export is compared with its reload."""
  return {"pixel_values": convolution.probe_images(config.image_size, config.num_channels)}
