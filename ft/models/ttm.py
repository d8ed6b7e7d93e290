"""TinyTimeMixer (Ekambaram et al. 2024, arXiv:2401.03955): forecasts by mixing patches.

Follows granite-tsfm's `tsfm_public/models/tinytimemixer/modeling_tinytimemixer.py` (Apache-2.0) in
names, defaults and the places of dropout. Shapes: B series, T steps of context, C channels, P
patches (and the frequency's vector where there is one), D width, H steps of the forecast.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ft import errors
from ft.models import attention, base, convolution, layers, series
from ft.weights.names import Rule

MODALITY = "series"
MODEL_TYPES = ("tinytimemixer",)
# There is no label head, which would be the first. A new horizon or decoder is made anew, and what
# few-shot tuning of the head moves is what the paper moves: all but the backbone.
HEAD = ("params/classifier", "params/decoder", "params/forecast")

# What granite-tsfm calls the steps of series to a model that is told them; 0 stands for others.
FREQUENCIES = {"1min": 1, "2min": 2, "5min": 3, "10min": 4, "15min": 5, "30min": 6, "1h": 7,
               "1d": 8, "1w": 9}

_BATCH, _LAYERNORM = "norm_mlp=BatchNorm|batchnorm", "norm_mlp=LayerNorm|layernorm"
_TINY = 4  # levels of adaptive patching do not make vectors this short or shorter


def _mixer_rules(theirs: str, ours: str, only: str = "") -> list[Rule]:
  """Returns the rules of one mixer layer."""
  rules = []

  def linear(their_name, our_name):
    rules.extend(base.linear_rules(theirs + their_name, ours + our_name, only))

  def norm(their_name, our_name):
    batch, layer = (f"{kind}&{only}".rstrip("&") for kind in (_BATCH, _LAYERNORM))
    rules.extend(series.batch_norm_rules(theirs + their_name + ".norm.batchnorm",
                                           (ours + our_name).removeprefix("params/"), batch))
    rules.append(Rule(theirs + their_name + ".norm.weight", ours + our_name + "/scale", only=layer))
    rules.append(Rule(theirs + their_name + ".norm.bias", ours + our_name + "/bias", only=layer))

  for mixer, mine in (("patch_mixer", "patches"), ("feature_mixer", "features"),
                      ("channel_feature_mixer", "channels")):
    norm(f"{mixer}.norm", f"{mine}/norm")
    linear(f"{mixer}.mlp.fc1", f"{mine}/intermediate")
    linear(f"{mixer}.mlp.fc2", f"{mine}/output")
    linear(f"{mixer}.gating_block.attn_layer", f"{mine}/gate")
  for part, mine in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"),
                     ("out_proj", "output")):
    linear(f"patch_mixer.self_attn_layer.{part}", f"patches/attention/{mine}")
  norm("patch_mixer.norm_attn", "patches/attention_norm")
  return rules


def _stack_rules(theirs: str, ours: str, only: str = "") -> list[Rule]:
  """Returns the rules of a stack of mixer layers, with levels of adaptive patching or without."""
  return [*_mixer_rules(theirs + "mixers.{l}.mixer_layers.{i}.", ours + "level_{l}/layer_{i}/",
                        only),
          *_mixer_rules(theirs + "mixers.{i}.", ours + "layer_{i}/", only)]


NAMES = [
    *base.linear_rules("[backbone.]encoder.patcher", "params/encoder/embedding"),
    Rule("[backbone.]encoder.positional_encoder.position_enc", "params/encoder/positions"),
    Rule("[backbone.]encoder.freq_mod.0.weight", "params/encoder/frequency/embedding"),
    *base.linear_rules("[backbone.]encoder.freq_mod.1", "params/encoder/frequency_hidden"),
    *base.linear_rules("[backbone.]encoder.freq_mod.3", "params/encoder/frequency_output"),
    *_stack_rules("[backbone.]encoder.mlp_mixer_encoder.", "params/encoder/"),
    *base.linear_rules("decoder.adapter", "params/decoder/adapter", "head=forecast"),
    *base.linear_rules("decoder.decoder_raw_embedding", "params/decoder/raw_embedding",
                           "head=forecast"),
    *_stack_rules("decoder.decoder_block.", "params/decoder/", "head=forecast"),
    *base.linear_rules("head.base_forecast_block", "params/forecast", "head=forecast"),
]

# What later versions can also do, with the value that switches it off.
_REFUSED = {
    "enable_forecast_channel_mixing": False, "categorical_vocab_size_list": None,
    "multi_scale": False, "register_tokens": 0, "fft_length": 0, "multi_quantile_head": False,
    "decompose": False, "enable_base_norm_always": False, "masked_context_length": None,
    "gate_mode": "softmax", "use_register_context_gating": False,
}


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of granite-tsfm's TinyTimeMixerConfig that matter here."""

  context_length: int = 64
  patch_length: int = 8
  patch_stride: int = 8
  num_input_channels: int = 1
  prediction_length: int = 16
  prediction_filter_length: int | None = None
  prediction_channel_indices: tuple | None = None
  exogenous_channel_indices: tuple | None = None
  d_model: int = 16
  expansion_factor: int = 2
  num_layers: int = 3
  dropout: float = 0.2
  mode: str = "common_channel"
  gated_attn: bool = True
  norm_mlp: str = "LayerNorm"
  norm_eps: float = 1e-5
  self_attn: bool = False
  self_attn_heads: int = 1
  use_positional_encoding: bool = False
  positional_encoding_type: str = "sincos"
  scaling: str | bool | None = "std"
  loss: str | None = "mse"
  adaptive_patching_levels: int = 0
  resolution_prefix_tuning: bool = False
  frequency_token_vocab_size: int = 5
  head_dropout: float = 0.2
  use_decoder: bool = True
  decoder_num_layers: int = 8
  decoder_d_model: int = 8
  decoder_adaptive_patching_levels: int = 0
  decoder_raw_residual: bool = False
  decoder_mode: str = "common_channel"

  PREFIXES = {"tinytimemixer": "TinyTimeMixer"}
  HEADS = {"none": ("{}Model",), "forecast": ("{}ForPrediction",)}

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    # A null of these keys is a choice of its own, not the default.
    return {key: None for key in ("scaling", "loss") if key in hf and hf[key] is None}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    for key, value in _REFUSED.items():
      base.only(hf, key, value)
    base.one_of(self, "loss", ("mse", "mae", "pinball", "huber", None))  # of points, all of them
    base.one_of(self, "norm_mlp", ("LayerNorm", "layernorm", "BatchNorm", "batchnorm"))
    base.one_of(self, "mode", ("common_channel", "mix_channel"))
    base.one_of(self, "decoder_mode", ("common_channel", "mix_channel"))
    base.one_of(self, "positional_encoding_type", ("sincos", "random"))
    base.one_of(self, "patch_stride", (self.patch_length,))
    base.only(hf, "num_patches", self.num_patches)
    series.check_series(self, hf)
    if not 0 < self.horizon <= self.prediction_length:
      raise errors.UserError(f"config.json: prediction_filter_length {self.horizon} should be from "
                             f"1 to prediction_length {self.prediction_length}")
    for channel in self.channels or ():
      if not 0 <= channel < self.num_input_channels:
        raise errors.UserError(f"config.json: prediction_channel_indices: there is no channel "
                               f"{channel} of {self.num_input_channels}")
    self.encoder_shape.check(self.adaptive_patching_levels, self)
    self.decoder_shape.check(self.decoder_adaptive_patching_levels, self)

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, dropout=rate, head_dropout=rate)

  @property
  def scaler(self) -> str:
    """What the context is scaled by: "std", "mean" or ""."""
    return "std" if self.scaling is True else self.scaling or ""

  @property
  def num_patches(self) -> int:
    """Vectors a channel, that of the frequency included."""
    count = (self.context_length - self.patch_length) // self.patch_length + 1
    return count + int(self.resolution_prefix_tuning)

  @property
  def horizon(self) -> int:
    """Steps that are forecast, H."""
    length = self.prediction_filter_length
    return self.prediction_length if length is None else length

  @property
  def channels(self) -> tuple | None:
    """The channels that are forecast, in order; None: all of them."""
    if self.prediction_channel_indices is not None:
      return tuple(sorted(self.prediction_channel_indices))
    if self.exogenous_channel_indices is None:
      return None
    return tuple(sorted(set(range(self.num_input_channels)) - set(self.exogenous_channel_indices)))

  @property
  def encoder_shape(self) -> "Shape":
    return Shape(self.num_patches, self.d_model, self.num_layers, self.mode, self.dropout)

  @property
  def decoder_shape(self) -> "Shape":
    return Shape(self.num_patches, self.decoder_d_model, self.decoder_num_layers,
                 self.decoder_mode, self.head_dropout)


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a stack of mixer layers is made for: patches P of width D, layers a level, and rates."""

  patches: int
  width: int
  count: int
  mode: str
  dropout: float

  def level(self, level: int) -> "Shape":
    """Returns the shape inside a level: 2**level as many patches, as much narrower."""
    factor = 2**level if self.width // 2**level > _TINY else 1
    return dataclasses.replace(self, patches=self.patches * factor, width=self.width // factor)

  def check(self, levels: int, config: Config) -> None:
    """Raises UserError if width does not divide by a level's factor or by the heads."""
    for level in range(max(levels, 1)):
      own = self.level(level)
      if own.patches * own.width != self.patches * self.width:
        raise errors.UserError(f"config.json: adaptive_patching_levels {levels}: a width of "
                               f"{self.width} is no multiple of {2**level}")
      if config.self_attn and own.width % config.self_attn_heads:
        raise errors.UserError(f"config.json: self_attn_heads {config.self_attn_heads}: a width "
                               f"of {own.width} is no multiple of it")


def linear(features, dtype, name=None) -> layers.Linear:
  """Returns a linear layer whose kernel starts as torch's."""
  init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
  return layers.Linear(features, dtype=dtype, kernel_init=init, name=name)


def _norm(config, dtype, name):
  if "batch" in config.norm_mlp.lower():
    return convolution.BatchNorm(momentum=0.9, epsilon=config.norm_eps, name=name)
  return layers.LayerNorm(config.norm_eps, dtype, name=name)


class Attention(nn.Module):
  """Self-attention over the patches of a channel: (B, C, P, D) -> the same."""

  config: Config
  shape: Shape
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    count, width, dtype = self.config.self_attn_heads, self.shape.width, self.compute.dtype
    qkv = [linear(width, dtype, name) for name in ("query", "key", "value")]
    q, k, v = (y.reshape(-1, x.shape[2], count, width // count) for y in layers.fused(qkv, x))
    y = attention.attention(q, k, v, drop=layers.Dropout(self.shape.dropout),
                            implementation=self.compute.attention)
    return linear(width, dtype, "output")(y.reshape(x.shape))


class Mixer(nn.Module):
  """Mixes x (B, C, P, D) along one axis: norm, two-layer network, gate, residual."""

  config: Config
  shape: Shape
  axis: int
  gate_first: bool = False
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, dtype = self.config, self.compute.dtype
    normed = _norm(c, dtype, "norm")(x)
    y = normed.swapaxes(self.axis, -1)
    if self.gate_first:
      y = self._network(self._gated(y))
    else:
      y = self._gated(self._network(y))
    y = y.swapaxes(self.axis, -1)
    if c.self_attn and self.axis == 2:
      attend = Attention(c, self.shape, self.compute, name="attention")
      y = _norm(c, dtype, "attention_norm")(y + attend(normed))
    return x + y

  def _network(self, x):
    drop, size = layers.Dropout(self.shape.dropout), x.shape[-1]
    y = linear(size * self.config.expansion_factor, self.compute.dtype, "intermediate")(x)
    return drop(linear(size, self.compute.dtype, "output")(drop(layers.gelu(y))))

  def _gated(self, x):
    if not self.config.gated_attn:
      return x
    scores = linear(x.shape[-1], self.compute.dtype, "gate")(x)
    return x * jax.nn.softmax(scores.astype(jnp.float32), -1).astype(x.dtype)


class Layer(nn.Module):
  """Mixes channels (where the mode says so), patches and features."""

  config: Config
  shape: Shape
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    mixer = functools.partial(Mixer, self.config, self.shape, compute=self.compute)
    if self.shape.mode == "mix_channel":
      x = mixer(axis=1, gate_first=True, name="channels")(x)
    if self.shape.patches > 1:
      x = mixer(axis=2, name="patches")(x)
    return mixer(axis=3, name="features")(x)


class Level(nn.Module):
  """The layers of one level of adaptive patching, on finer patches of x (B, C, P, D)."""

  config: Config
  shape: Shape
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    y = x.reshape(*x.shape[:2], self.shape.patches, self.shape.width)
    return run(self.config, self.shape, self.compute, y).reshape(x.shape)


def run(config, shape, compute, x, levels: int = 0):
  """Runs a stack of layers on x (B, C, P, D), inside a compact method; the finest level first."""
  if levels <= 0:
    layer = functools.partial(Layer, config, shape, compute)
    return layers.run_layers(layer, shape.count, compute, x)
  for i in range(levels):
    x = Level(config, shape.level(levels - 1 - i), compute, name=f"level_{i}")(x)
  return x


class Encoder(nn.Module):
  """Embeds and mixes patches: (B, C, P, patch_length), freq_token (B,) -> (B, C, P, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, freq_token):
    c, dtype = self.config, self.compute.dtype
    x = linear(c.d_model, dtype, "embedding")(x)
    if c.resolution_prefix_tuning:
      if freq_token is None:
        raise errors.UserError("this model reads the series' frequency: give freq_token")
      init = nn.initializers.normal(1.0)
      y = layers.Embedding(c.frequency_token_vocab_size, c.patch_length, dtype, init,
                           name="frequency")(freq_token.reshape(-1))
      y = linear((c.patch_length + c.d_model) // 2, dtype, "frequency_hidden")(y)
      y = linear(c.d_model, dtype, "frequency_output")(layers.gelu(y))
      y = jnp.broadcast_to(y[:, None, None], (*x.shape[:2], 1, c.d_model))
      x = jnp.concatenate([y, x], 2)
    if c.use_positional_encoding:
      table = series.positions(self, c.positional_encoding_type, x.shape[2:])
      x = x + table.astype(dtype)
    return run(c, c.encoder_shape, self.compute, x, c.adaptive_patching_levels)


class Decoder(nn.Module):
  """Mixes the encoder's vectors further: (B, C, P, D) -> (B, C, P, decoder_d_model)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, patches):
    c, dtype = self.config, self.compute.dtype
    if c.d_model != c.decoder_d_model:
      x = linear(c.decoder_d_model, dtype, "adapter")(x)
    if c.decoder_raw_residual:
      # The frequency's vector stands first and has no patch.
      first = c.num_patches - patches.shape[2]
      patches = jnp.pad(patches, ((0, 0), (0, 0), (first, 0), (0, 0)))
      x = x + linear(c.decoder_d_model, dtype, "raw_embedding")(patches)
    return run(c, c.decoder_shape, self.compute, x, c.decoder_adaptive_patching_levels)


class Model(nn.Module):
  """TinyTimeMixer: contexts of series -> a dict, see `__call__`.

  Dropout acts iff apply is given a "dropout" rng; batch statistics move iff "batch_stats" is
  mutable.
  """

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c = self.config
    self.encoder = Encoder(c, self.compute)
    if c.head == "forecast":
      if c.use_decoder:
        self.decoder = Decoder(c, self.compute)
      self.dropout = layers.Dropout(c.head_dropout)
      self.forecast = linear(c.prediction_length, self.compute.dtype)

  def __call__(self, past_values, past_observed_mask=None, freq_token=None):
    """Applies the model.

    Args:
      past_values: (B, T, C); missing values as 0. Of more than config.context_length steps the last
        are read; fewer are preceded by zeros.
      past_observed_mask: (B, T, C), 1 for observed values and 0 for missing ones; None: all are
        observed, zeros that precede a short context included, as upstream does.
      freq_token: (B,) int, what the sampling interval is; where config.resolution_prefix_tuning.

    Returns:
      last_hidden_state (B, C, P, D), the encoder's; features (B, D), its mean; loc and scale
      (B, 1, C), float32, of the context; with the head: decoder_hidden_state and prediction_outputs
      (B, H, C) float32, on the scale of past_values; then, C are the channels that are forecast.

    Raises:
      UserError: channels that the model cannot mix, or no freq_token where one is due.
    """
    c = self.config
    self._check(past_values)
    values, observed = (_fitted(a, c.context_length) for a in (past_values, past_observed_mask))
    values, loc, scale = series.scaled(values, observed, c.scaler)
    patches = series.patches(values, c.patch_length, c.patch_length).astype(self.compute.dtype)
    x = self.encoder(patches, freq_token)
    outputs = {"last_hidden_state": x, "loc": loc, "scale": scale,
               "features": x.astype(jnp.float32).mean((1, 2)).astype(x.dtype)}
    if c.head == "forecast":
      if c.use_decoder:
        x = self.decoder(x, patches)
      outputs["decoder_hidden_state"] = x
      y = self.forecast(self.dropout(x.reshape(*x.shape[:2], -1)))
      y = y.astype(jnp.float32).swapaxes(1, 2)[:, :c.horizon]
      if c.channels is not None:
        y, loc, scale = (a[..., jnp.asarray(c.channels)] for a in (y, loc, scale))
      outputs.update(prediction_outputs=y * scale + loc, loc=loc, scale=scale)
    return outputs

  def _check(self, values):
    c = self.config
    mixes = "mix_channel" in (c.mode, c.decoder_mode if c.head == "forecast" else "")
    if values.shape[2] != c.num_input_channels and (mixes or c.channels is not None):
      raise errors.UserError(f"a series of {values.shape[2]} channels; the model mixes "
                             f"{c.num_input_channels}")


def _fitted(a, length: int):
  """Returns the last `length` steps of (B, T, C), with zeros before a shorter one."""
  if a is None or a.shape[1] == length:
    return a
  short = max(length - a.shape[1], 0)
  return jnp.pad(a[:, -length:], ((0, 0), (short, 0), (0, 0)))


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with missing values, on which an export is compared."""
  inputs = series.probe_series(config.context_length, config.num_input_channels)
  if config.resolution_prefix_tuning:
    inputs["freq_token"] = jnp.arange(2) % config.frequency_token_vocab_size
  return inputs
