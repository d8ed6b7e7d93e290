"""Whisper (Radford et al. 2022, arXiv:2212.04356): speech to text, and classification of speech.

Follows transformers' `models/whisper/modeling_whisper.py` (Apache-2.0) in names, defaults and the
places of dropout. The log-mel spectrogram that it reads is `ft.models.audio.LogMel`.
Shapes: B batch, F mel bins, M frames of the spectrogram, S = M / 2 positions of the encoder,
T tokens, D width, V vocabulary, C labels.
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
MODEL_TYPES = ("whisper",)
HEAD = ("params/classifier",)
OPTIONAL = ("params/projector", "params/layer_weights")
SURGERY = {
    "vocab_size": Surgery("vocab_size", ("params/embed_tokens/embedding",)),
    "depth": Surgery("decoder_layers", ("params/decoder",)),
}

_EPSILON = 1e-5  # of all norms; no config states it
_DECODER = "head=none|lm"


def _conv(theirs: str, ours: str) -> list[Rule]:
  return [Rule(theirs + ".weight", ours + "/kernel", "conv1d"),
          Rule(theirs + ".bias", ours + "/bias")]


def _layer(theirs: str, ours: str, attentions: tuple, only: str = "") -> list[Rule]:
  rules = []
  for name in attentions:
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
      rules += base.linear_rules(f"{theirs}{name}.{part}", f"{ours}{name}/{part}", only)
    rules += base.norm_rules(f"{theirs}{name}_layer_norm", f"{ours}{name}_layer_norm", only)
  rules += base.norm_rules(theirs + "final_layer_norm", ours + "final_layer_norm", only)
  return rules + base.linear_rules(theirs + "fc1", ours + "fc1", only) + base.linear_rules(
      theirs + "fc2", ours + "fc2", only)


NAMES = [
    *_conv("[model.]encoder.conv1", "params/encoder/conv1"),
    *_conv("[model.]encoder.conv2", "params/encoder/conv2"),
    Rule("[model.]encoder.embed_positions.weight", "params/encoder/embed_positions/embedding"),
    *_layer("[model.]encoder.layers.{i}.", "params/encoder/layer_{i}/", ("self_attn",)),
    *base.norm_rules("[model.]encoder.layer_norm", "params/encoder/layer_norm"),
    Rule("[model.]decoder.embed_tokens.weight", "params/embed_tokens/embedding", only=_DECODER),
    Rule("[model.]decoder.embed_positions.weight", "params/decoder/embed_positions/embedding",
         only=_DECODER),
    *_layer("[model.]decoder.layers.{i}.", "params/decoder/layer_{i}/",
            ("self_attn", "encoder_attn"), _DECODER),
    *base.norm_rules("[model.]decoder.layer_norm", "params/decoder/layer_norm", _DECODER),
    Rule("proj_out.weight", "params/embed_tokens/embedding", "tied",
         "head=lm&tie_word_embeddings=True"),
    Rule("proj_out.weight", "params/proj_out/kernel", "transpose",
         "head=lm&tie_word_embeddings=False"),
    *base.linear_rules("projector", "params/projector", "head=classify"),
    Rule("layer_weights", "params/layer_weights", only="head=classify"),
    *base.linear_rules("classifier", "params/classifier", "head=classify"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' WhisperConfig that matter here.

  What config.json may state and training does not compute: SpecAugment (apply_spec_augment, mask_*)
  and the dropping of whole layers (encoder_layerdrop, decoder_layerdrop). Neither acts in
  evaluation, upstream either. scale_embedding has no effect upstream, so it has none here.
  """

  vocab_size: int = 51865
  num_mel_bins: int = 80
  d_model: int = 384
  encoder_layers: int = 4
  encoder_attention_heads: int = 6
  encoder_ffn_dim: int = 1536
  decoder_layers: int = 4
  decoder_attention_heads: int = 6
  decoder_ffn_dim: int = 1536
  activation_function: str = "gelu"
  dropout: float = 0.0
  attention_dropout: float = 0.0
  activation_dropout: float = 0.0
  init_std: float = 0.02
  max_source_positions: int = 1500
  max_target_positions: int = 448
  decoder_start_token_id: int = 50257
  pad_token_id: int | None = 50256
  bos_token_id: int | None = 50256
  eos_token_id: int | tuple | None = 50256
  use_weighted_layer_sum: bool = False
  classifier_proj_size: int = 256
  tie_word_embeddings: bool = True

  PREFIXES = {"whisper": "Whisper"}
  HEADS = {"none": ("{}Model",), "lm": ("{}ForConditionalGeneration",),
           "classify": ("{}ForAudioClassification",)}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "activation_function", layers.ACTIVATIONS)
    base.multiple(self, "d_model", "encoder_attention_heads")
    base.multiple(self, "d_model", "decoder_attention_heads")
    base.only(hf, "is_encoder_decoder", True)

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, dropout=rate, attention_dropout=rate, activation_dropout=rate)


@jax.custom_jvp
def _mean(x):
  """Returns the mean of x (..., D) over the last axis, (..., 1), on a CPU summed in pairs.

  Some of Whisper's features are a thousand times larger than the others. After one of these, XLA's
  sum, one number after the other, rounds every further square off; what that changes in a norm
  moved gradients of whisper-tiny.en by 2e-4. In pairs it is 3e-5.
  """
  if jax.default_backend() != "cpu":  # sums in a tree by itself
    return x.mean(-1, keepdims=True)
  total = x
  while total.shape[-1] % 2 == 0:
    half = total.shape[-1] // 2
    total = total[..., :half] + total[..., half:]
  return total.sum(-1, keepdims=True) / x.shape[-1]


@_mean.defjvp
def _mean_tangent(primals, tangents):
  # The plain mean's, whose transpose is one broadcast: quick to compile.
  return _mean(*primals), tangents[0].mean(-1, keepdims=True)


def _layer_norm(dtype, name) -> layers.LayerNorm:
  return layers.LayerNorm(_EPSILON, dtype, mean=_mean, name=name)


class Attention(nn.Module):
  """Attention of x (B, T, D) to itself, or to a source (B, S, D); see `layers.cached_source`."""

  config: Config
  compute: layers.Compute
  heads: int
  crossed: bool = False

  @nn.compact
  def __call__(self, x, mask, source=None):
    c = self.config

    def linear(name, use_bias=True):
      return _dense(c, c.d_model, self.compute.dtype, name, use_bias)

    def split(y):
      return y.reshape(*y.shape[:2], self.heads, -1)

    query, key, value = linear("q_proj"), linear("k_proj", False), linear("v_proj")
    if self.crossed:
      q = split(query(x))
      k, v = layers.cached_source(
          self, lambda source: tuple(map(split, layers.fused([key, value], source))), source)
    else:
      q, k, v = map(split, layers.fused([query, key, value], x))
      k, v = layers.cached(self, k, v, mask.offset)
    y = attention.attention(q, k, v, mask, drop=layers.Dropout(c.attention_dropout),
                            implementation=self.compute.attention)
    return linear("out_proj")(y.reshape(x.shape))


class Layer(nn.Module):
  """Attentions and a two-layer network, each with norm before it and residual around it."""

  config: Config
  compute: layers.Compute
  decodes: bool = False

  @nn.compact
  def __call__(self, x, mask, source=None):
    c, dtype = self.config, self.compute.dtype
    heads = c.decoder_attention_heads if self.decodes else c.encoder_attention_heads
    size = c.decoder_ffn_dim if self.decodes else c.encoder_ffn_dim

    norm = functools.partial(_layer_norm, dtype)
    y = norm("self_attn_layer_norm")(x)
    y = Attention(c, self.compute, heads, name="self_attn")(y, mask)
    x = x + layers.Dropout(c.dropout)(y)
    if self.decodes:
      y = norm("encoder_attn_layer_norm")(x)
      cross = Attention(c, self.compute, heads, True, name="encoder_attn")
      x = x + layers.Dropout(c.dropout)(cross(y, None, source))
    y = _dense(c, size, dtype, "fc1")(norm("final_layer_norm")(x))
    y = layers.Dropout(c.activation_dropout)(layers.ACTIVATIONS[c.activation_function](y))
    y = _dense(c, c.d_model, dtype, "fc2")(y)
    return x + layers.Dropout(c.dropout)(y)


class Encoder(nn.Module):
  """Log-mel spectrogram (B, F, M) -> (x (B, S, D), states: before each layer, and x itself).

  The states between are there with `keep` only. The table of positions is fixed, as upstream: no
  gradient reaches it.
  """

  config: Config
  compute: layers.Compute

  @nn.compact
  def __call__(self, input_features, keep: bool = False):
    c, dtype = self.config, self.compute.dtype
    x = input_features.swapaxes(1, 2)
    x = layers.gelu(audio.Conv1d(c.d_model, 3, 1, 1, dtype=dtype, name="conv1")(x))
    x = layers.gelu(audio.Conv1d(c.d_model, 3, 2, 1, dtype=dtype, name="conv2")(x))
    table = layers.Embedding(c.max_source_positions, c.d_model, dtype, _sinusoids,
                             name="embed_positions")
    x = x + jax.lax.stop_gradient(table(jnp.arange(x.shape[1])))
    x = layers.Dropout(c.dropout)(x)
    first = x
    layer = functools.partial(Layer, c, self.compute)
    out = layers.run_layers(layer, c.encoder_layers, self.compute, x, attention.Mask(), keep=keep)
    x, after = out if keep else (out, [])
    x = _layer_norm(dtype, "layer_norm")(x)
    return x, [first, *after[:-1], x]


class Decoder(nn.Module):
  """Embedded tokens (B, T, D) and encoder states (B, S, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute

  @nn.compact
  def __call__(self, x, positions, mask, source):
    c, dtype = self.config, self.compute.dtype
    init = nn.initializers.normal(c.init_std)
    table = layers.Embedding(c.max_target_positions, c.d_model, dtype, init,
                             name="embed_positions")
    x = layers.Dropout(c.dropout)(x + table(positions))
    layer = functools.partial(Layer, c, self.compute, True)
    x = layers.run_layers(layer, c.decoder_layers, self.compute, x, mask, source)
    return _layer_norm(dtype, "layer_norm")(x)


class Model(nn.Module):
  """Whisper: spectrogram and tokens -> a dict. Dropout acts iff apply is given a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, dtype = self.config, self.compute.dtype
    self.encoder = Encoder(c, self.compute)
    if c.head == "classify":
      self.projector = _dense(c, c.classifier_proj_size, dtype)
      if c.use_weighted_layer_sum:
        count = c.encoder_layers + 1
        start = nn.initializers.constant(1 / count)
        self.layer_weights = self.param("layer_weights", start, (count,))
      if c.num_labels:
        self.classifier = _dense(c, c.num_labels, dtype)
      return
    init = nn.initializers.normal(c.init_std)
    self.embed_tokens = layers.Embedding(c.vocab_size, c.d_model, dtype, init)
    self.decoder = Decoder(c, self.compute)
    if c.head == "lm" and not c.tie_word_embeddings:
      self.proj_out = _dense(c, c.vocab_size, dtype, use_bias=False)

  def __call__(self, input_features, attention_mask=None, decoder_input_ids=None,
               decoder_attention_mask=None):
    """Applies the model.

    Args:
      input_features: (B, F, M), see audio.LogMel; M is 2 * config.max_source_positions (3000, 30
        seconds) in all published models. Fewer frames take the first positions.
      attention_mask: not used, as upstream: padding is silence, which the model has learned.
      decoder_input_ids: (B, T) int; None: the encoder alone.
      decoder_attention_mask: (B, T), 1 for real tokens; None: all are.

    Returns:
      encoder_last_hidden_state (B, S, D) and features: with head "classify" (B, P), the projected
      mean over positions, and logits (B, C) float32 if config.num_labels > 0; else (B, D), the
      mean, and if tokens were given what `decode` returns.

    Raises:
      UserError: more frames or tokens than the model has positions, or another number of mel bins.
    """
    if self.config.head == "classify":
      return self._classify(input_features)
    outputs = self.encode(input_features, attention_mask)
    outputs["features"] = outputs["encoder_last_hidden_state"].mean(1)
    if decoder_input_ids is not None:
      outputs |= self.decode(decoder_input_ids, outputs["encoder_last_hidden_state"],
                             decoder_attention_mask=decoder_attention_mask)
    return outputs

  def encode(self, input_features, attention_mask=None):
    """Returns {"encoder_last_hidden_state": (B, S, D)} of a spectrogram; see `__call__`."""
    del attention_mask
    self._check(input_features)
    return {"encoder_last_hidden_state": self.encoder(input_features)[0]}

  def decode(self, decoder_input_ids, encoder_hidden_states=None, attention_mask=None,
             decoder_attention_mask=None, cache_index=None, position_ids=None):
    """Applies the decoder.

    Args:
      decoder_input_ids: (B, T) int.
      encoder_hidden_states: (B, S, D); None: what an earlier call kept in "cache".
      attention_mask: of the encoder's input; not used.
      decoder_attention_mask: (B, T), or with a cache (B, slots), 1 for real tokens; None: all are.
      cache_index: slot of the first token, with a cache; None: without.
      position_ids: (B, T) int; None: cache_index, cache_index + 1, ….

    Returns:
      last_hidden_state (B, T, D) and, with head "lm", logits (B, T, V) float32.

    Raises:
      UserError: more tokens than the model has positions.
    """
    del attention_mask
    length, limit = decoder_input_ids.shape[1], self.config.max_target_positions
    if isinstance(length, int) and length > limit:  # it is symbolic while a program is exported
      raise errors.UserError(f"a text of {length} tokens; the model has {limit} positions")
    if position_ids is None:
      first = 0 if cache_index is None else cache_index
      position_ids = (first + jnp.arange(length))[None]
    mask = attention.Mask(padding=decoder_attention_mask, causal=True, offset=cache_index)
    x = self.embed_tokens(decoder_input_ids)
    x = self.decoder(x, position_ids, mask, encoder_hidden_states)
    outputs = {"last_hidden_state": x}
    if self.config.head == "lm":
      outputs["logits"] = self.lm_logits(x)
    return outputs

  def lm_logits(self, hidden):
    """Returns the scores (..., V) float32 of the next token, given states (..., D)."""
    if not self.config.tie_word_embeddings:
      return self.proj_out(hidden).astype(jnp.float32)
    return self.embed_tokens.attend(hidden).astype(jnp.float32)

  def head(self, features):
    """Returns the logits (B, C) of features (B, P): the classifier."""
    return self.classifier(features).astype(jnp.float32)

  def _classify(self, input_features):
    self._check(input_features)
    x, states = self.encoder(input_features, keep=self.config.use_weighted_layer_sum)
    outputs = {"encoder_last_hidden_state": x}
    if self.config.use_weighted_layer_sum:
      weights = jax.nn.softmax(self.layer_weights.astype(jnp.float32)).astype(x.dtype)
      x = sum(weight * state for weight, state in zip(weights, states, strict=True))
    outputs["features"] = self.projector(x).mean(1)
    if self.config.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    return outputs

  def _check(self, input_features):
    bins, frames = input_features.shape[1:]
    c = self.config
    if bins != c.num_mel_bins:
      raise errors.UserError(f"a spectrogram of {bins} mel bins; the model reads {c.num_mel_bins}")
    if isinstance(frames, int) and frames > 2 * c.max_source_positions:
      raise errors.UserError(f"a spectrogram of {frames} frames; the model has positions for "
                             f"{2 * c.max_source_positions}: cut the sound into clips")


def _dense(config, features, dtype, name=None, use_bias=True) -> layers.Linear:
  init = nn.initializers.normal(config.init_std)
  return layers.Linear(features, use_bias, dtype, init, name=name)


def _sinusoids(rng, shape, dtype=jnp.float32):
  """Returns the encoder's table of positions (length, D), sines before cosines."""
  del rng
  length, half = shape[0], shape[1] // 2
  rates = np.exp(-math.log(10000) / (half - 1) * np.arange(half))
  angles = np.arange(length)[:, None] * rates
  return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  frames = 2 * min(12, config.max_source_positions)
  inputs = {"input_features": rng.normal(size=(2, config.num_mel_bins, frames)).astype(np.float32)}
  if config.head == "classify":
    return inputs
  shape = (2, min(6, config.max_target_positions))
  mask = np.ones(shape, np.int32)
  mask[1, shape[1] // 2:] = 0
  return inputs | {"decoder_input_ids": rng.integers(0, config.vocab_size, shape, np.int32),
                   "decoder_attention_mask": mask}


def prefixed(config: Config) -> bool | None:
  """Returns whether export writes `model.`: so do the classes that transformers opens it with."""
  return {"lm": True, "classify": False}.get(config.head)
