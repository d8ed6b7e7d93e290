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
import numpy as np

from ft import errors
from ft.models import convolution
from ft.models import layers
from ft.weights.names import Rule

MODALITY = "image"
MODEL_TYPES = ("efficientnet-lite",)
HEAD = ("params/classifier",)

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
class Config:
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
    padding: "same" pads by the size that each layer's input has, as TensorFlow does and the reference
      with image_size=None; "static" as an image of image_size would need, as the reference does
      otherwise. Equal for images of image_size.
    image_mean, image_std: of the input's channels, in units of 255; for the data side.
    num_labels: C, labels of the classifier; 0 for none.
    labels: their names, if known.
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
  image_mean: tuple = IMAGE_MEAN
  image_std: tuple = IMAGE_STD
  num_labels: int = 1000
  labels: tuple = ()

  @classmethod
  def variant(cls, name: str, **changes) -> "Config":
    """Returns the config of "lite0" … "lite4", with changes; UserError for another name."""
    if name not in VARIANTS:
      raise errors.UserError(f"efficientnet has no variant {name!r}: {', '.join(VARIANTS)}"
                             f"{errors.suggest(name, VARIANTS)}")
    width, depth, image_size, dropout = VARIANTS[name]
    return dataclasses.replace(
        cls(width=width, depth=depth, image_size=image_size, dropout=dropout), **changes)
