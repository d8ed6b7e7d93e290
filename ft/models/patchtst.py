"""PatchTST (Nie et al. 2022, arXiv:2211.14730): a transformer over patches of each channel.

Follows transformers' `models/patchtst/modeling_patchtst.py` (Apache-2.0) in names, defaults and the
places of dropout. Shapes: B series, T steps of context, C channels, P positions (patches, and the
class token where there is one), L steps of a patch, D width, H steps of the forecast.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ft import errors
from ft.models import attention, base, convolution, layers, series
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "series"
MODEL_TYPES = ("patchtst",)
HEAD = ("params/classifier", "params/projection")
SURGERY = {"depth": Surgery("num_hidden_layers", ("params/encoder", "batch_stats/encoder"))}

_LAYER, _OURS = "[model.]encoder.layers.{i}.", "params/encoder/layer_{i}/"
_BATCH, _LAYERNORM = "norm_type=batchnorm", "norm_type=layernorm"


def _norm(theirs: str, ours: str) -> list[Rule]:
  theirs, ours = _LAYER + theirs, _OURS + ours
  return [*series.batch_norm_rules(theirs + ".batchnorm", ours.removeprefix("params/"), _BATCH),
          Rule(theirs + ".weight", ours + "/scale", only=_LAYERNORM),
          Rule(theirs + ".bias", ours + "/bias", only=_LAYERNORM)]


NAMES = [
    *base.linear_rules("[model.]encoder.embedder.input_embedding", "params/encoder/embedding"),
    *base.linear_rules("[model.]encoder.embedder.input_embedding.{c}",
                  "params/encoder/embedding/channel_{c}"),
    Rule("[model.]encoder.positional_encoder.cls_token", "params/encoder/class_token"),
    Rule("[model.]encoder.positional_encoder.position_enc", "params/encoder/positions"),
    *base.linear_rules(_LAYER + "self_attn.q_proj", _OURS + "attention/query"),
    *base.linear_rules(_LAYER + "self_attn.k_proj", _OURS + "attention/key"),
    *base.linear_rules(_LAYER + "self_attn.v_proj", _OURS + "attention/value"),
    *base.linear_rules(_LAYER + "self_attn.out_proj", _OURS + "attention/output"),
    *_norm("norm_sublayer1", "attention_norm"),
    *_norm("norm_sublayer2", "channel_norm"),
    *_norm("norm_sublayer3", "mlp_norm"),
    *base.linear_rules(_LAYER + "ff.0", _OURS + "intermediate"),
    *base.linear_rules(_LAYER + "ff.3", _OURS + "output"),
    *base.linear_rules("head.projection", "params/projection", "head=forecast|regress"),
    *base.linear_rules("head.projections.{c}", "params/projection/channel_{c}", "head=forecast"),
    # The head of pre-training, which rebuilds patches, has the same name.
    *base.linear_rules("head.linear", "params/classifier", "head=classify&pretraining=False"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' PatchTSTConfig that matter here.

  Attributes:
    num_targets: how many classes (head "classify") or values (head "regress").
    pretraining: whether the checkpoint has the head of pre-training, which is not read.
  """

  num_input_channels: int = 1
  context_length: int = 32
  patch_length: int = 1
  patch_stride: int = 1
  num_hidden_layers: int = 3
  d_model: int = 128
  num_attention_heads: int = 4
  share_embedding: bool = True
  channel_attention: bool = False
  ffn_dim: int = 512
  norm_type: str = "batchnorm"
  norm_eps: float = 1e-5
  attention_dropout: float = 0.0
  positional_dropout: float = 0.0
  path_dropout: float = 0.0
  ff_dropout: float = 0.0
  bias: bool = True
  activation_function: str = "gelu"
  pre_norm: bool = True
  positional_encoding_type: str = "sincos"
  use_cls_token: bool = False
  init_std: float = 0.02
  share_projection: bool = True
  scaling: str | bool | None = "std"
  pooling_type: str | None = "mean"
  head_dropout: float = 0.0
  prediction_length: int = 24
  num_targets: int = 1
  output_range: tuple | None = None
  loss: str | None = "mse"
  pretraining: bool = False

  PREFIXES = {"patchtst": "PatchTST"}
  HEADS = {"none": ("{}Model", "{}ForPretraining"), "forecast": ("{}ForPrediction",),
           "classify": ("{}ForClassification",), "regress": ("{}ForRegression",)}
  OURS = ("pretraining",)

  def __post_init__(self):
    super().__post_init__()
    if self.num_labels:
      object.__setattr__(self, "num_targets", self.num_labels)

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    # A null of these keys is a choice of its own, not the default.
    nullable = ("scaling", "pooling_type", "loss")
    out = {key: None for key in nullable if key in hf and hf[key] is None}
    out["pretraining"] = "PatchTSTForPretraining" in (hf.get("architectures") or ())
    if values["head"] == "classify":
      count = values.get("num_targets", cls.num_targets)
      out["num_labels"] = count
      out["labels"] = values["labels"] if len(values["labels"]) == count else ()
    return out

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "loss", ("mse",))  # others predict a distribution's parameters
    base.one_of(self, "norm_type", ("batchnorm", "layernorm"))
    base.one_of(self, "activation_function", layers.ACTIVATIONS)
    base.one_of(self, "positional_encoding_type", ("sincos", "random"))
    base.one_of(self, "pooling_type", ("mean", "max", None))
    base.multiple(self, "d_model", "num_attention_heads")
    if self.d_model % 2 and self.positional_encoding_type == "sincos":
      raise errors.UserError(f"config.json: d_model {self.d_model} should be even for the "
                             "positional_encoding_type 'sincos'")
    series.check_series(self, hf)

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, attention_dropout=rate, positional_dropout=rate,
                               ff_dropout=rate, path_dropout=rate, head_dropout=rate)

  @property
  def scaler(self) -> str:
    """What the context is scaled by: "std", "mean" or ""."""
    return "mean" if self.scaling is True else self.scaling or ""

  @property
  def num_patches(self) -> int:
    return (self.context_length - self.patch_length) // self.patch_stride + 1


def linear(config, features, dtype, name=None, use_bias=True) -> layers.Linear:
  """Returns a linear layer that starts as the config says."""
  init = nn.initializers.normal(config.init_std)
  return layers.Linear(features, use_bias, dtype, init, name=name)


class ChannelLinear(nn.Module):
  """A linear layer for each channel: (B, C, …, in) -> (B, C, …, features)."""

  config: Config
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    return jnp.stack([linear(self.config, self.features, self.dtype, f"channel_{i}")(x[:, i])
                      for i in range(self.config.num_input_channels)], 1)


def channel_linear(config, features, dtype, shared: bool, name=None):
  """Returns one linear layer for all channels, or one for each of them."""
  if shared:
    return linear(config, features, dtype, name)
  return ChannelLinear(config, features, dtype, name=name)


def _norm_layer(config, dtype, name):
  if config.norm_type == "layernorm":
    return layers.LayerNorm(config.norm_eps, dtype, name=name)
  return convolution.BatchNorm(momentum=0.9, epsilon=config.norm_eps, name=name)


class Attention(nn.Module):
  """Self-attention over the last axis but one: (B, C, P, D) -> the same."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, dtype = self.config, self.compute.dtype
    qkv = [linear(c, c.d_model, dtype, name) for name in ("query", "key", "value")]
    shape = (c.num_attention_heads, c.d_model // c.num_attention_heads)
    q, k, v = (y.reshape(-1, x.shape[-2], *shape) for y in layers.fused(qkv, x))
    y = attention.attention(q, k, v, drop=layers.Dropout(c.attention_dropout),
                            implementation=self.compute.attention)
    return linear(c, c.d_model, dtype, "output")(y.reshape(x.shape))


class Layer(nn.Module):
  """Attention over patches, over channels where the config says so, and a two-layer network."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, dtype = self.config, self.compute.dtype
    attend = Attention(c, self.compute, name="attention")  # channels share it with patches
    x = self._residual(x, attend, "attention_norm")
    if c.channel_attention:
      x = self._residual(x.swapaxes(1, 2), attend, "channel_norm").swapaxes(1, 2)

    def network(x):
      y = layers.ACTIVATIONS[c.activation_function](
          linear(c, c.ffn_dim, dtype, "intermediate", c.bias)(x))
      return linear(c, c.d_model, dtype, "output", c.bias)(layers.Dropout(c.ff_dropout)(y))

    return self._residual(x, network, "mlp_norm")

  def _residual(self, x, function, name):
    norm = _norm_layer(self.config, self.compute.dtype, name)
    drop = layers.Dropout(self.config.path_dropout)
    if self.config.pre_norm:
      return x + drop(function(norm(x)))
    return norm(x + drop(function(x)))


class Encoder(nn.Module):
  """Embeds patches (B, C, P, L), adds positions, runs the layers: -> (B, C, P, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, dtype = self.config, self.compute.dtype
    x = channel_linear(c, c.d_model, dtype, c.share_embedding, "embedding")(x)
    first = int(c.use_cls_token)
    table = series.positions(self, c.positional_encoding_type, (c.num_patches + first, c.d_model))
    x = layers.Dropout(c.positional_dropout)(x + table[first:].astype(dtype))
    if c.use_cls_token:
      token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, 1, c.d_model))
      token = (token + table[:1]).astype(dtype)
      x = jnp.concatenate([jnp.broadcast_to(token, (*x.shape[:2], 1, c.d_model)), x], 2)
    layer = functools.partial(Layer, c, self.compute)
    return layers.run_layers(layer, c.num_hidden_layers, self.compute, x)


class Model(nn.Module):
  """PatchTST: contexts of series -> a dict, see `__call__`.

  Dropout acts iff apply is given a "dropout" rng; batch statistics move iff "batch_stats" is
  mutable. The masking of pre-training is not done.
  """

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, dtype = self.config, self.compute.dtype
    self.encoder = Encoder(c, self.compute)
    self.dropout = layers.Dropout(c.head_dropout)
    if c.head == "forecast":
      self.projection = channel_linear(c, c.prediction_length, dtype, c.share_projection)
    if c.head == "regress":
      self.projection = linear(c, c.num_targets, dtype)
    if c.num_labels:
      self.classifier = linear(c, c.num_labels, dtype)

  def __call__(self, past_values, past_observed_mask=None):
    """Applies the model.

    Args:
      past_values: (B, T, C), T = config.context_length; missing values as 0.
      past_observed_mask: (B, T, C), 1 for observed values and 0 for missing ones; None: all are
        observed.

    Returns:
      last_hidden_state (B, C, P, D); loc and scale (B, 1, C), float32, of the context; features
      (B, C * D), the class token or pooled patches of each channel; by head, all float32:
      prediction_outputs (B, H, C) on the scale of past_values, regression_outputs (B, targets) or
      logits (B, classes).

    Raises:
      UserError: a context of another length, or channels that the model has no parameters for.
    """
    c = self.config
    self._check(past_values)
    values, loc, scale = series.scaled(past_values, past_observed_mask, c.scaler)
    patches = series.patches(values, c.patch_length, c.patch_stride)
    x = self.encoder(patches.astype(self.compute.dtype))
    pooled = self._pooled(x, c.pooling_type or "mean")
    features = pooled.reshape(x.shape[0], -1)
    outputs = {"last_hidden_state": x, "loc": loc, "scale": scale, "features": features}
    if c.head == "forecast":
      whole = not (c.pooling_type or c.use_cls_token)
      y = self.projection(self.dropout(x.reshape(*x.shape[:2], -1) if whole else pooled))
      outputs["prediction_outputs"] = y.astype(jnp.float32).swapaxes(1, 2) * scale + loc
    if c.head == "regress":
      outputs["regression_outputs"] = self._regress(features)
    if c.num_labels:
      outputs["logits"] = self.head(features)
    return outputs

  def head(self, features):
    """Returns the logits (B, classes) of features (B, C * D): dropout and the classifier."""
    return self.classifier(self.dropout(features)).astype(jnp.float32)

  def _check(self, values):
    c, (_, length, channels) = self.config, values.shape
    if isinstance(length, int) and length != c.context_length:
      raise errors.UserError(f"a context of {length} steps; the model reads {c.context_length}")
    shared = c.share_embedding and (c.head == "none" or c.head == "forecast" and c.share_projection)
    if not shared and channels != c.num_input_channels:
      raise errors.UserError(f"a series of {channels} channels; the model has parameters for "
                             f"{c.num_input_channels}")

  def _pooled(self, x, pooling):
    if self.config.use_cls_token:
      return x[:, :, 0]
    if pooling == "max":
      # Not x.max(2): its gradient is 0/0 where a compiler computes x twice and rounds differently.
      return jnp.take_along_axis(x, x.argmax(2, keepdims=True), 2)[:, :, 0]
    return x.astype(jnp.float32).mean(2).astype(x.dtype)

  def _regress(self, features):
    y = self.projection(self.dropout(features)).astype(jnp.float32)
    if self.config.output_range is None:
      return y
    low, high = self.config.output_range
    return nn.sigmoid(y) * (high - low) + low


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with missing values, on which an export is compared."""
  return series.probe_series(config.context_length, config.num_input_channels)
