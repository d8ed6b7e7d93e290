"""EfficientNet-Lite 0 to 4: mobile image classifiers without squeeze-and-excitation, with ReLU6.

Papers: Tan & Le 2019, arXiv:1905.11946 (EfficientNet); Huang et al. 2016, arXiv:1603.09382
(stochastic depth). Reference implementation: package efficientnet-lite-pytorch 0.1.0, itself
converted from TensorFlow's official EfficientNet-Lite; see third_party/efficientnet.md.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ft import errors
from ft.models import base, convolution, layers
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "image"
MODEL_TYPES = ("efficientnet-lite",)
HEAD = ("params/classifier",)
SURGERY = {"channels": Surgery("num_channels", ("params/stem/conv/kernel",), axis=2)}

# What the pretrained weights expect of pixels from 0 to 255, in units of 255: (x - 127) / 128.
IMAGE_MEAN = (127 / 255,) * 3
IMAGE_STD = (128 / 255,) * 3

# Name -> (width, depth, image size, dropout).
VARIANTS = {
    "lite0": (1.0, 1.0, 224, 0.2),
    "lite1": (1.0, 1.1, 240, 0.2),
    "lite2": (1.1, 1.2, 260, 0.3),
    "lite3": (1.2, 1.4, 280, 0.3),
    "lite4": (1.4, 1.8, 300, 0.3),
}

# Stages: (blocks, kernel size, stride of the first block, expansion, features).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

NAMES = [
    Rule("_conv_stem.weight", "params/stem/conv/kernel", "conv"),
    Rule("_conv_head.weight", "params/head_conv/conv/kernel", "conv"),
    Rule("_blocks.{i}._expand_conv.weight", "params/blocks_{i}/expand/conv/kernel", "conv"),
    Rule("_blocks.{i}._depthwise_conv.weight", "params/blocks_{i}/depthwise/conv/kernel",
         "depthwise"),
    Rule("_blocks.{i}._project_conv.weight", "params/blocks_{i}/project/conv/kernel", "conv"),
    *(Rule(f"{theirs}.{their_leaf}", f"{collection}/{ours}/norm/{leaf}")
      for theirs, ours in (("_bn0", "stem"), ("_bn1", "head_conv"),
                           ("_blocks.{i}._bn0", "blocks_{i}/expand"),
                           ("_blocks.{i}._bn1", "blocks_{i}/depthwise"),
                           ("_blocks.{i}._bn2", "blocks_{i}/project"))
      for their_leaf, collection, leaf in (("weight", "params", "scale"),
                                           ("bias", "params", "bias"),
                                           ("running_mean", "batch_stats", "mean"),
                                           ("running_var", "batch_stats", "var"))),
    Rule("(_bn0|_bn1).num_batches_tracked", "", "keep"),
    Rule("_blocks.{i}.(_bn0|_bn1|_bn2).num_batches_tracked", "", "keep"),
    Rule("_fc.weight", "params/classifier/kernel", "transpose"),
    Rule("_fc.bias", "params/classifier/bias"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The model's shape. Stem and head keep their width, first and last stage their depth.

  Attributes:
    width: factor of all other stages' features, rounded to multiples of 8.
    depth: factor of all other stages' blocks, rounded up.
    image_size: height and width the weights were trained at; other sizes work too.
    stages: (blocks, kernel size, stride of the first block, expansion, features) each.
    stem_features: channels of the first convolution.
    head_features: D, channels of the last convolution, which the classifier reads.
    dropout: rate before the classifier.
    drop_connect: rate at which the last block's residual branch is dropped for a whole image; block
      i of n has i / n of it (stochastic depth).
    norm_momentum: share of a running statistic that a step keeps.
    norm_epsilon: added to variances.
    padding: "same" pads by the size that each layer's input has, as TensorFlow does, and the
      reference with image_size=None; "static" as an image of image_size would need, as the
      reference does otherwise. Equal for images of image_size.
    num_channels: of the input.
    image_mean, image_std: of the input's channels, in units of 255; for the data side.
  """

  width: float = 1.0
  depth: float = 1.0
  image_size: int = 224
  stages: tuple = STAGES
  stem_features: int = 32
  head_features: int = 1280
  dropout: float = 0.2
  drop_connect: float = 0.2
  norm_momentum: float = 0.99
  norm_epsilon: float = 1e-3
  padding: str = "same"
  num_channels: int = 3
  image_mean: tuple = IMAGE_MEAN
  image_std: tuple = IMAGE_STD
  num_labels: int = 1000
  head: str = "classify"

  PREFIXES = {"efficientnet-lite": "EfficientNetLite"}
  HEADS = {"none": ("{}Model",), "classify": ("{}ForImageClassification",)}
  # Hugging Face's EfficientNet keys where they have one.
  ALIASES = {
      "width": ("width_coefficient",),
      "depth": ("depth_coefficient",),
      "stem_features": ("stem_dim",),
      "head_features": ("hidden_dim",),
      "dropout": ("dropout_rate",),
      "drop_connect": ("drop_connect_rate",),
      "norm_momentum": ("batch_norm_momentum",),
      "norm_epsilon": ("batch_norm_eps",),
  }

  def __post_init__(self):
    super().__post_init__()
    if not self.num_labels:  # the defaults have a classifier
      object.__setattr__(self, "head", "none")

  @classmethod
  def variant(cls, name: str, **changes) -> "Config":
    """Returns the config of "lite0" … "lite4", with changes; UserError for another name."""
    return cls(**{**_variant(name), **changes})

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    """Returns a variant's numbers, and labels: files need not state that they have a classifier."""
    variant = _variant(hf["variant"]) if hf.get("variant") else {}
    id2label = hf.get("id2label") or {}
    count = hf.get("num_labels", len(id2label) or cls.num_labels)
    return {"head": "classify", "labels": base.read_labels(id2label),
            "num_labels": base.typed("num_labels", count, int),
            **{field: value for field, value in variant.items() if field not in values}}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "padding", ("same", "static"))
    if not all(isinstance(stage, tuple) and len(stage) == 5 and
               all(isinstance(n, int) and n > 0 for n in stage) for stage in self.stages):
      raise errors.UserError("config.json: stages should be lists of five positive numbers: "
                             "blocks, kernel size, stride, expansion, features")

  def to_hf(self) -> dict:
    """Returns what config.json holds; `from_hf` gives an equal Config back."""
    hf = {self.ALIASES.get(key, (key,))[0]: value for key, value in super().to_hf().items()}
    return hf if self.num_labels else {**hf, "num_labels": 0}  # files need not state the default

  def blocks(self) -> list:
    """Returns (kernel size, stride, expansion, inputs, features, drop rate) of each block."""
    shapes = []
    features = self.stem_features
    for number, (repeats, size, stride, expansion, out) in enumerate(self.stages):
      out = convolution.round_channels(out * self.width)
      if 0 < number < len(self.stages) - 1:
        repeats = math.ceil(self.depth * repeats)
      for i in range(repeats):
        shapes.append((size, stride if i == 0 else 1, expansion, features, out))
        features = out
    return [(*shape, self.drop_connect * i / len(shapes)) for i, shape in enumerate(shapes)]


def complete(hf: dict, folder) -> dict:
  """Returns config.json with its defaults filled in: checkpoints of this family may have none."""
  del folder
  filled = dataclasses.replace(Config.from_hf(hf), source="{}").to_hf()
  return {**filled, **hf}


def _variant(name: str) -> dict:
  if name not in VARIANTS:
    raise errors.UserError(f"efficientnet has no variant {name!r}: {', '.join(VARIANTS)}"
                           f"{errors.suggest(name, VARIANTS)}")
  return dict(zip(("width", "depth", "image_size", "dropout"), VARIANTS[name], strict=True))


class Block(nn.Module):
  """Mobile inverted bottleneck: expand (1x1), depthwise (k x k), project (1x1), skip if it fits.

  (B, H, W, C) -> (B, H', W', features). `padding` is that of the depthwise convolution.
  """

  config: Config
  shape: tuple  # one element of Config.blocks()
  padding: Any
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, gate=None):
    """`gate` (B,): what each image's branch is multiplied by; None where none is dropped."""
    size, stride, expansion, inputs, features, _ = self.shape
    y = x
    if expansion != 1:
      y = convolution.relu6(conv_norm(self.config, "expand", inputs * expansion, self.dtype)(y))
    depthwise = convolution.DepthwiseConv(
        inputs * expansion, size, stride, self.padding, self.dtype, parent=None)
    y = convolution.relu6(convolution.ConvNorm(depthwise, norm(self.config), name="depthwise")(y))
    y = conv_norm(self.config, "project", features, self.dtype)(y)
    if stride == 1 and inputs == features:
      y = x + (y if gate is None else y * gate[:, None, None, None].astype(y.dtype))
    return y


def norm(config: Config) -> convolution.BatchNorm:
  """Returns the model's batch normalisation, to be owned by the module that it is given to."""
  return convolution.BatchNorm(config.norm_momentum, config.norm_epsilon, parent=None)


def conv_norm(config, name, features, dtype, size=1, stride=1, padding="SAME"):
  """Returns a named convolution with batch normalisation."""
  conv = convolution.Conv(features, size, stride, padding, dtype, parent=None)
  return convolution.ConvNorm(conv, norm(config), name=name)


class Model(nn.Module):
  """EfficientNet-Lite: pixel_values (B, H, W, num_channels) -> a dict, see `__call__`.

  Dropout and stochastic depth act if and only if apply is given an rng stream "dropout"; batch
  statistics are the running ones unless "batch_stats" is mutable.
  """

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c = self.config
    paddings = self._paddings()
    self.stem = conv_norm(c, None, c.stem_features, self.compute.dtype, 3, 2, paddings[0])
    self.blocks = [Block(c, shape, padding, self.compute.dtype)
                   for shape, padding in zip(c.blocks(), paddings[1:], strict=True)]
    self.head_conv = conv_norm(c, None, c.head_features, self.compute.dtype)
    self.dropout = layers.Dropout(c.dropout)
    if c.num_labels:
      self.classifier = layers.Linear(c.num_labels, dtype=self.compute.dtype)

  def _paddings(self) -> list:
    """Returns the padding of the stem and of each block's depthwise convolution."""
    sizes = [(3, 2), *((size, stride) for size, stride, *_ in self.config.blocks())]
    if self.config.padding == "same":
      return ["SAME"] * len(sizes)
    paddings, edge = [], self.config.image_size
    for size, stride in sizes:
      paddings.append(convolution.same_padding((edge, edge), (size, size), stride))
      edge = -(-edge // stride)
    return paddings

  def _gates(self, batch: int) -> list:
    """Returns each block's gate (B,), 0 for dropped images, else 1 / (1 - rate); None: no drop."""
    rates = jnp.array([drop_rate for *_, drop_rate in self.config.blocks()])
    if not self.config.drop_connect or not self.has_rng("dropout"):
      return [None] * len(rates)
    draws = jax.random.uniform(self.make_rng("dropout"), (len(rates), batch))
    return list(jnp.where(draws < rates[:, None], 0, 1 / (1 - rates[:, None])))

  def __call__(self, pixel_values):
    """Applies the model.

    Args:
      pixel_values: (B, H, W, num_channels) floats, RGB, normalised as (x - 127) / 128 of pixels
        from 0 to 255 (config.image_mean and image_std, in units of 255). Any H and W.

    Returns:
      feature_maps, a tuple of the last block's output (B, h, w, features) at each resolution, from
      H / 2 on to H / 32; last_hidden_state (B, H / 32, W / 32, D), the last convolution's;
      features (B, D), its mean over positions; logits (B, C) float32 if config.num_labels > 0.
    """
    x = convolution.relu6(self.stem(pixel_values.astype(self.compute.dtype)))
    maps = []
    for block, gate in zip(self.blocks, self._gates(x.shape[0]), strict=True):
      if block.shape[1] > 1:
        maps.append(x)
      x = block(x, gate)
    maps.append(x)
    x = convolution.relu6(self.head_conv(x))
    features = x.mean((1, 2))
    outputs = {"last_hidden_state": x, "feature_maps": tuple(maps), "features": features}
    if self.config.num_labels:
      outputs["logits"] = self.head(features)
    return outputs

  def head(self, features):
    """Returns the logits (B, C), float32, of features (B, D): dropout and the classifier."""
    return self.classifier(self.dropout(features)).astype(jnp.float32)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, on which an export is compared with its reload."""
  return {"pixel_values": convolution.probe_images(config.image_size, config.num_channels)}
