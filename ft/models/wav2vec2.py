"""wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477) and HuBERT (Hsu et al., arXiv:2106.07447).

Speech to letters by connectionist temporal classification (CTC), and classification of speech.
Follows transformers' `models/wav2vec2/modeling_wav2vec2.py` and `models/hubert/modeling_hubert.py`
(Apache-2.0) in names, defaults and the places of dropout. What they read is the waveform,
normalised if preprocessor_config.json says so: `ft.models.audio.Waveform`.
Shapes: B batch, N samples, T frames, D width, V vocabulary, P projected width, C labels.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import attention, audio, base, layers
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "audio"
MODEL_TYPES = ("wav2vec2", "hubert")
HEAD = ("params/classifier",)
OPTIONAL = ("params/projector", "params/layer_weights", "params/lm_head")
SURGERY = {
    "vocab_size": Surgery("vocab_size", ("params/lm_head/kernel", "params/lm_head/bias"), axis=-1),
    "depth": Surgery("num_hidden_layers", ("params/encoder",)),
}

_EPSILON = 1e-5  # of the norms between convolutions; no config states it
_BODY = "[wav2vec2.|hubert.]"
_LAYER, _OURS = _BODY + "encoder.layers.{i}.", "params/encoder/layer_{i}/"
_POSITION = _BODY + "encoder.pos_conv_embed.conv."


NAMES = [
    Rule(_BODY + "masked_spec_embed", "params/masked_spec_embed"),
    Rule(_BODY + "feature_extractor.conv_layers.{i}.conv.weight",
         "params/feature_extractor/conv_{i}/kernel", "conv1d"),
    Rule(_BODY + "feature_extractor.conv_layers.{i}.conv.bias",
         "params/feature_extractor/conv_{i}/bias"),
    *base.norm_rules(_BODY + "feature_extractor.conv_layers.{i}.layer_norm",
                     "params/feature_extractor/norm_{i}"),
    *base.norm_rules(_BODY + "feature_projection.layer_norm",
                     "params/feature_projection/layer_norm"),
    *base.linear_rules(_BODY + "feature_projection.projection",
                       "params/feature_projection/projection"),
    # Weight normalisation has other names since torch 2.1.
    Rule(_POSITION + "(parametrizations.weight.original0|weight_g)",
         "params/encoder/position/gain", "conv1d"),
    # Weight normalisation has other names since torch 2.1.
    Rule(_POSITION + "(parametrizations.weight.original1|weight_v)",
         "params/encoder/position/direction", "conv1d"),
    Rule(_POSITION + "bias", "params/encoder/position/bias"),
    *base.norm_rules(_BODY + "encoder.layer_norm", "params/encoder/layer_norm"),
    *base.linear_rules(_LAYER + "attention.q_proj", _OURS + "attention/q_proj"),
    *base.linear_rules(_LAYER + "attention.k_proj", _OURS + "attention/k_proj"),
    *base.linear_rules(_LAYER + "attention.v_proj", _OURS + "attention/v_proj"),
    *base.linear_rules(_LAYER + "attention.out_proj", _OURS + "attention/out_proj"),
    *base.norm_rules(_LAYER + "layer_norm", _OURS + "layer_norm"),
    *base.linear_rules(_LAYER + "feed_forward.intermediate_dense", _OURS + "intermediate_dense"),
    *base.linear_rules(_LAYER + "feed_forward.output_dense", _OURS + "output_dense"),
    *base.norm_rules(_LAYER + "final_layer_norm", _OURS + "final_layer_norm"),
    *base.norm_rules(_LAYER + "adapter_layer.norm", _OURS + "adapter/norm"),
    *base.linear_rules(_LAYER + "adapter_layer.linear_1", _OURS + "adapter/linear_1"),
    *base.linear_rules(_LAYER + "adapter_layer.linear_2", _OURS + "adapter/linear_2"),
    *base.linear_rules("lm_head", "params/lm_head", "head=ctc"),
    *base.linear_rules("projector", "params/projector", "head=classify"),
    Rule("layer_weights", "params/layer_weights", only="head=classify"),
    *base.linear_rules("classifier", "params/classifier", "head=classify"),
    # Of pre-training; carried along by a body without a head.
    Rule("quantizer.codevectors", transform="keep", only="head=none"),
    Rule("(quantizer.weight_proj|project_hid|project_q).(weight|bias)", transform="keep",
         only="head=none"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' Wav2Vec2Config and HubertConfig that matter here.

  What config.json may state and training does not compute: SpecAugment (apply_spec_augment, mask_*)
  and the dropping of whole layers (layerdrop). Neither acts in evaluation, upstream either.

  Attributes:
    masked_spec: whether the file has masked_spec_embed, the vector that SpecAugment puts in place
      of a frame. It is carried along and nothing reads it.
  """

  vocab_size: int | None = 32
  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  intermediate_size: int = 3072
  hidden_act: str = "gelu"
  hidden_dropout: float = 0.1
  activation_dropout: float = 0.1
  attention_dropout: float = 0.1
  feat_proj_dropout: float = 0.0
  final_dropout: float = 0.1
  initializer_range: float = 0.02
  layer_norm_eps: float = 1e-5
  feat_extract_norm: str = "group"
  feat_extract_activation: str = "gelu"
  feat_proj_layer_norm: bool = True
  conv_dim: tuple = (512, 512, 512, 512, 512, 512, 512)
  conv_stride: tuple = (5, 2, 2, 2, 2, 2, 2)
  conv_kernel: tuple = (10, 3, 3, 3, 3, 2, 2)
  conv_bias: bool = False
  num_conv_pos_embeddings: int = 128
  num_conv_pos_embedding_groups: int = 16
  do_stable_layer_norm: bool = False
  use_weighted_layer_sum: bool = False
  classifier_proj_size: int = 256
  adapter_attn_dim: int | None = None
  pad_token_id: int | None = 0
  ctc_loss_reduction: str = "sum"
  ctc_zero_infinity: bool = False
  masked_spec: bool = True

  PREFIXES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert"}
  HEADS = {"none": ("{}Model",), "ctc": ("{}ForCTC",), "classify": ("{}ForSequenceClassification",)}
  OURS = ("masked_spec",)

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_act", layers.ACTIVATIONS)
    base.one_of(self, "feat_extract_activation", layers.ACTIVATIONS)
    base.one_of(self, "feat_extract_norm", ("group", "layer"))
    base.multiple(self, "hidden_size", "num_attention_heads")
    base.multiple(self, "hidden_size", "num_conv_pos_embedding_groups")
    base.only(hf, "add_adapter", False)
    base.only(hf, "conv_pos_batch_norm", False)
    if self.model_type == "wav2vec2":
      base.only(hf, "feat_proj_layer_norm", True)
    if not len(self.conv_dim) == len(self.conv_stride) == len(self.conv_kernel) > 0:
      raise errors.UserError("config.json: conv_dim, conv_stride and conv_kernel should have equal "
                             f"lengths, have {len(self.conv_dim)}, {len(self.conv_stride)}, "
                             f"{len(self.conv_kernel)}")

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, hidden_dropout=rate, activation_dropout=rate,
                               attention_dropout=rate, feat_proj_dropout=rate, final_dropout=rate)

  def frames(self, samples):
    """Returns how many frames the feature extractor makes of so many samples: ints or arrays."""
    for width, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
      samples = (samples - width) // stride + 1
    return samples

  def samples(self, frames: int) -> int:
    """Returns the least number of samples that gives so many frames."""
    for width, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
      frames = (frames - 1) * stride + width
    return frames


class TimeNorm(nn.Module):
  """Each channel of x (B, T, C) normalised over time, padding included, as upstream.

  Parameters: scale (C,), bias (C,). Statistics in float32.
  """

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
    centred = x.astype(jnp.float32)
    centred = centred - centred.mean(1, keepdims=True)
    variance = jnp.square(centred).mean(1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + _EPSILON) * scale + bias).astype(x.dtype)


class FeatureExtractor(nn.Module):
  """Convolutions over the waveform: (B, N) -> (B, T, last of config.conv_dim)."""

  config: Config
  compute: layers.Compute

  @nn.compact
  def __call__(self, input_values):
    c, dtype = self.config, self.compute.dtype
    act, x = layers.ACTIVATIONS[c.feat_extract_activation], input_values[..., None]
    sizes = zip(c.conv_dim, c.conv_kernel, c.conv_stride, strict=True)
    for i, (features, width, stride) in enumerate(sizes):
      x = audio.Conv1d(features, width, stride, 0, c.conv_bias, dtype, name=f"conv_{i}")(x)
      if c.feat_extract_norm == "layer":
        x = layers.LayerNorm(_EPSILON, dtype, name=f"norm_{i}")(x)
      elif i == 0:
        x = TimeNorm(name="norm_0")(x)
      x = act(x)
    return x


class FeatureProjection(nn.Module):
  """Norm and projection of the convolutions' output: (B, T, C) -> (B, T, D)."""

  config: Config
  compute: layers.Compute

  @nn.compact
  def __call__(self, x):
    c, dtype = self.config, self.compute.dtype
    if c.feat_proj_layer_norm:
      x = layers.LayerNorm(c.layer_norm_eps, dtype, name="layer_norm")(x)
    x = _dense(c, c.hidden_size, dtype, "projection")(x)
    return layers.Dropout(c.feat_proj_dropout)(x)


class Position(nn.Module):
  """Position embeddings by a grouped convolution of the frames: x (B, T, D) -> (B, T, D).

  Parameters: direction (k, D / groups, D), gain (k, 1, 1), bias (D,); each tap of the kernel is its
  direction at the length of its gain (weight normalisation, arXiv:1602.07868).
  """

  config: Config

  @nn.compact
  def __call__(self, x):
    c = self.config
    width, groups, size = c.num_conv_pos_embeddings, c.num_conv_pos_embedding_groups, x.shape[-1]
    std = 2 / math.sqrt(width * size)
    direction = self.param("direction", nn.initializers.normal(std), (width, size // groups, size))
    length = nn.initializers.constant(std * size / math.sqrt(groups))
    gain = self.param("gain", length, (width, 1, 1)).astype(jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (size,))
    direction = direction.astype(jnp.float32)
    kernel = direction * (gain / jnp.sqrt(jnp.square(direction).sum((1, 2), keepdims=True)))
    y = audio.convolve_grouped(x, kernel.astype(x.dtype), groups) + bias.astype(x.dtype)
    return layers.ACTIVATIONS[c.feat_extract_activation](y)


class Attention(nn.Module):
  """Self-attention: x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute

  @nn.compact
  def __call__(self, x, mask):
    c, dtype = self.config, self.compute.dtype
    qkv = [_dense(c, c.hidden_size, dtype, name) for name in ("q_proj", "k_proj", "v_proj")]
    q, k, v = (y.reshape(*y.shape[:2], c.num_attention_heads, -1) for y in layers.fused(qkv, x))
    y = attention.attention(q, k, v, mask, drop=layers.Dropout(c.attention_dropout),
                            implementation=self.compute.attention)
    return _dense(c, c.hidden_size, dtype, "out_proj")(y.reshape(x.shape))


class Adapter(nn.Module):
  """The small network after a layer by which MMS tells languages apart (arXiv:2305.13516)."""

  config: Config
  compute: layers.Compute

  @nn.compact
  def __call__(self, x):
    c, dtype = self.config, self.compute.dtype
    y = layers.LayerNorm(_EPSILON, dtype, name="norm")(x)
    y = jax.nn.relu(_dense(c, c.adapter_attn_dim, dtype, "linear_1")(y))
    return _dense(c, c.hidden_size, dtype, "linear_2")(y)


class Layer(nn.Module):
  """Attention and a two-layer network with residuals; norms before them if stable, else after."""

  config: Config
  compute: layers.Compute

  @nn.compact
  def __call__(self, x, mask):
    c, dtype = self.config, self.compute.dtype
    first, last = (layers.LayerNorm(c.layer_norm_eps, dtype, name=name)
                   for name in ("layer_norm", "final_layer_norm"))
    before, after = (lambda norm, x: x), (lambda norm, x: norm(x))
    if c.do_stable_layer_norm:
      before, after = after, before
    y = Attention(c, self.compute, name="attention")(before(first, x), mask)
    x = after(first, x + layers.Dropout(c.hidden_dropout)(y))
    y = _dense(c, c.intermediate_size, dtype, "intermediate_dense")(before(last, x))
    y = layers.Dropout(c.activation_dropout)(layers.ACTIVATIONS[c.hidden_act](y))
    y = _dense(c, c.hidden_size, dtype, "output_dense")(y)
    x = after(last, x + layers.Dropout(c.hidden_dropout)(y))
    if c.do_stable_layer_norm and c.adapter_attn_dim is not None:
      x = x + Adapter(c, self.compute, name="adapter")(x)
    return x


class Encoder(nn.Module):
  """Positions and layers: x (B, T, D) -> (x (B, T, D), states: before and after each layer).

  The states after layers are there with `keep` only.
  """

  config: Config
  compute: layers.Compute

  @nn.compact
  def __call__(self, x, mask, keep: bool = False):
    c = self.config
    norm = layers.LayerNorm(c.layer_norm_eps, self.compute.dtype, name="layer_norm")
    if mask.padding is not None:  # the convolution over positions shall not see it
      x = jnp.where(mask.padding[..., None], x, jnp.zeros_like(x))
    x = x + Position(c, name="position")(x)
    x = x if c.do_stable_layer_norm else norm(x)
    x = layers.Dropout(c.hidden_dropout)(x)
    first, layer = x, functools.partial(Layer, c, self.compute)
    out = layers.run_layers(layer, c.num_hidden_layers, self.compute, x, mask, keep=keep)
    x, kept = out if keep else (out, [])
    return norm(x) if c.do_stable_layer_norm else x, [first, *kept]


class Model(nn.Module):
  """wav2vec 2.0: waveform -> a dict. Dropout acts iff apply is given a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, dtype = self.config, self.compute.dtype
    if c.masked_spec:
      self.masked_spec_embed = self.param("masked_spec_embed", nn.initializers.uniform(1.0),
                                          (c.hidden_size,))
    self.feature_extractor = FeatureExtractor(c, self.compute)
    self.feature_projection = FeatureProjection(c, self.compute)
    self.encoder = Encoder(c, self.compute)
    if c.head == "ctc":
      self.dropout = layers.Dropout(c.final_dropout)
      self.lm_head = _dense(c, c.vocab_size, dtype)
    if c.head == "classify":
      self.projector = _dense(c, c.classifier_proj_size, dtype)
      if c.use_weighted_layer_sum:
        count = c.num_hidden_layers + 1
        start = nn.initializers.constant(1 / count)
        self.layer_weights = self.param("layer_weights", start, (count,))
      if c.num_labels:
        self.classifier = _dense(c, c.num_labels, dtype)

  def __call__(self, input_values, attention_mask=None):
    """Applies the model.

    Args:
      input_values: (B, N), see audio.Waveform; padded at the right.
      attention_mask: (B, N), 1 for real samples; None: all are. Models whose feat_extract_norm is
        "group" were trained without one, their padding being zeros.

    Returns:
      last_hidden_state (B, T, D); frame_mask (B, T) int32, 1 for frames of real samples; features:
      with head "classify" (B, P), else (B, D), the mean over real frames; logits float32: (B, T, V)
      with head "ctc", (B, C) with head "classify" if config.num_labels > 0.

    Raises:
      UserError: fewer samples than a frame needs.
    """
    c, samples = self.config, input_values.shape[1]
    if isinstance(samples, int) and samples < c.samples(1):
      raise errors.UserError(f"a sound of {samples} samples; the model needs {c.samples(1)}")
    x = self.feature_projection(self.feature_extractor(input_values))
    frames, mask = self._frame_mask(x, attention_mask)
    weighted = c.head == "classify" and c.use_weighted_layer_sum
    x, states = self.encoder(x, attention.Mask(padding=mask), keep=weighted)
    outputs = {"last_hidden_state": x, "frame_mask": frames}
    if c.head == "ctc":
      outputs["logits"] = self.lm_head(self.dropout(x)).astype(jnp.float32)
    if weighted:
      weights = jax.nn.softmax(self.layer_weights.astype(jnp.float32)).astype(x.dtype)
      x = sum(weight * state for weight, state in zip(weights, states, strict=True))
    if c.head == "classify":
      x = self.projector(x)
    outputs["features"] = _mean(x, frames)
    if c.head == "classify" and c.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    return outputs

  def head(self, features):
    """Returns the logits (B, C) of features (B, P): the classifier."""
    return self.classifier(features).astype(jnp.float32)

  def _frame_mask(self, x, attention_mask):
    """Returns (frame_mask, the same as boolean, None where there is no padding)."""
    if attention_mask is None:
      return jnp.ones(x.shape[:2], jnp.int32), None
    lengths = self.config.frames((attention_mask != 0).sum(1))
    # A row too short for a frame keeps one: a mean over none would be no number.
    mask = jnp.arange(x.shape[1]) < jnp.maximum(lengths, 1)[:, None]
    return mask.astype(jnp.int32), mask


def _mean(x, mask):
  """Returns the mean (B, D) over the real frames of x (B, T, D), padding's values whatever."""
  mask = mask[..., None] != 0
  total = jnp.where(mask, x, jnp.zeros_like(x)).astype(jnp.float32).sum(1)
  return (total / mask.sum(1)).astype(x.dtype)


def _dense(config, features, dtype, name=None) -> layers.Linear:
  init = nn.initializers.normal(config.initializer_range)
  return layers.Linear(features, dtype=dtype, kernel_init=init, name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  values = rng.normal(size=(2, config.samples(9))).astype(np.float32)
  mask = np.ones(values.shape, np.int32)
  mask[1, config.samples(4):] = 0
  return {"input_values": np.where(mask, values, np.float32(0)), "attention_mask": mask}


def fit(config: Config, shapes: dict) -> Config:
  """Returns the config of a file with these {our path: shape}: masked_spec as the file has it."""
  return dataclasses.replace(config, masked_spec="params/masked_spec_embed" in shapes)


def prefixed(config: Config) -> str | None:
  """Returns what export writes before the body's names: the model type if there is a head."""
  return None if config.head == "none" else f"{config.model_type or 'wav2vec2'}."
