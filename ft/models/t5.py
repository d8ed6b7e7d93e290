"""T5 (Raffel et al. 2019, arXiv:1910.10683), T5 v1.1 and FLAN-T5, mT5, umT5, Chronos-T5.

Follows transformers' `models/t5/modeling_t5.py`, `mt5` and `umt5` (Apache-2.0) in names, defaults
and the places of dropout. Scores are not scaled; positions are a learned bias of the scores, which
the first layer's file holds for all layers (umT5: a bias a layer).
Shapes: B batch, T decoder and S encoder tokens, D width, H heads, V words, C labels.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import attention, base, heads, layers
from ft.models.surgery import Surgery
from ft.weights import names
from ft.weights.names import Rule

MODALITY = "text"
MODEL_TYPES = ("t5", "mt5", "umt5")
HEAD = ("params/classifier",)
OPTIONAL = ("params/dense",)
SURGERY = {
    "vocab_size": Surgery("vocab_size", ("params/shared/embedding", ("params/lm_head/kernel", 1))),
    "depth": Surgery("num_layers", ("params/encoder",)),
}

_DECODES = "head=none|lm|classify"
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


_MODULES = {"self_attention": ("SelfAttention", "qkvo"),
            "cross_attention": ("EncDecAttention", "qkvo"),
            "ff": ("DenseReluDense", ("wi", "wi_0", "wi_1", "wo"))}


def stack_rules(name: str, places: tuple, only: str) -> list[Rule]:
  """Returns the rules of the encoder or decoder; `places` are a layer's keys of _MODULES."""
  theirs, ours = f"[transformer.]{name}.", f"params/{name}/"
  shared = f"model_type=t5|mt5{'&' + only if only else ''}"
  each = f"model_type=umt5{'&' + only if only else ''}"
  block, layer = theirs + "block.{i}.", ours + "layer_{i}/"
  rules = [
      Rule(theirs + "embed_tokens.weight", "params/shared/embedding", "tied", only),
      Rule(f"{theirs}block.0.{_BIAS}", ours + "relative_bias/embedding", only=shared),
      Rule(block + _BIAS, layer + "self_attention/relative_bias/embedding", only=each),
      Rule(theirs + "final_layer_norm.weight", ours + "norm/scale", only=only)]
  for i, place in enumerate(places):
    rules.append(Rule(f"{block}layer.{i}.layer_norm.weight", f"{layer}{place}_norm/scale",
                      only=only))
    module, parts = _MODULES[place]
    rules += [Rule(f"{block}layer.{i}.{module}.{part}.weight", f"{layer}{place}/{part}/kernel",
                   "transpose", only) for part in parts]
  return rules


NAMES = [
    Rule("[transformer.]shared.weight", "params/shared/embedding"),
    *stack_rules("encoder", ("self_attention", "ff"), ""),
    *stack_rules("decoder", ("self_attention", "cross_attention", "ff"), _DECODES),
    # Files of the first release hold a bias that nothing reads.
    Rule("[transformer.]decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
         transform="keep"),
    Rule("lm_head.weight", "params/shared/embedding", "tied", "head=lm&tied=True"),
    Rule("lm_head.weight", "params/lm_head/kernel", "transpose", "head=lm&tied=False"),
    *base.linear_rules("classification_head.dense", "params/dense", "head=classify"),
    *base.linear_rules("classification_head.out_proj", "params/classifier", "head=classify"),
    *base.linear_rules("classifier", "params/classifier", "head=tag"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' T5Config that matter here.

  Attributes:
    scale_decoder_outputs: whether the decoder's outputs are divided by sqrt(D) before the language
      head; where config.json does not say, whether it ties the head to the word embeddings.
    tied: whether the language head is the word embeddings.
  """

  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_decoder_layers: int | None = None
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  dropout_rate: float = 0.1
  classifier_dropout: float = 0.0
  layer_norm_epsilon: float = 1e-6
  initializer_factor: float = 1.0
  feed_forward_proj: str = "relu"
  scale_decoder_outputs: bool = True
  pad_token_id: int | None = 0
  eos_token_id: int | tuple | None = 1
  decoder_start_token_id: int | None = None
  tied: bool = True

  PREFIXES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
  HEADS = {"none": ("{}Model",), "lm": ("{}ForConditionalGeneration", "{}WithLMHeadModel"),
           "encoder": ("{}EncoderModel",), "classify": ("{}ForSequenceClassification",),
           "tag": ("{}ForTokenClassification",)}
  _MT5 = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
          "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
  DEFAULTS = {"mt5": {**_MT5, "scale_decoder_outputs": False}, "umt5": _MT5}
  OURS = ("tied",)

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    kind, ties = values["model_type"], hf.get("tie_word_embeddings") is not False
    scales = values.get("scale_decoder_outputs", ties)
    # transformers 5 writes tie_word_embeddings=true whatever the file holds. A T5 that scales was
    # trained with a tied head; of the others the file decides, see fit.
    count = values.get("num_decoder_layers") or values.get("num_layers", cls.num_layers)
    return {"scale_decoder_outputs": scales, "tied": kind == "t5" and ties and scales,
            "num_decoder_layers": count}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    gated, act = self.activation
    if act not in layers.ACTIVATIONS:
      raise errors.UserError(f"config.json: feed_forward_proj {self.feed_forward_proj!r} is not "
                             "supported; supported are (gated-)relu, gelu, gelu_new, silu, …")
    base.only(hf, "is_gated_act", gated)
    base.only(hf, "dense_act_fn", act)
    buckets, reach = self.relative_attention_num_buckets, self.relative_attention_max_distance
    if buckets < 4 or reach <= buckets // 2:
      raise errors.UserError(f"config.json: relative_attention_num_buckets {buckets} should be at "
                             "least 4, and half of it below relative_attention_max_distance, "
                             f"which is {reach}")

  def to_hf(self) -> dict:
    """Returns what config.json holds; the decoder's depth too where it is not the encoder's."""
    hf = super().to_hf()
    if self.num_decoder_layers not in (None, self.num_layers):
      hf["num_decoder_layers"] = self.num_decoder_layers
    return hf

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, dropout_rate=rate, classifier_dropout=rate)

  @property
  def activation(self) -> tuple:
    """Whether the network is gated, and the name of its activation."""
    gate, _, act = self.feed_forward_proj.rpartition("-")
    if self.feed_forward_proj == "gated-gelu":
      act = "gelu_new"  # T5 v1.1 was trained with the approximation
    return gate == "gated", act

  @property
  def decodes(self) -> bool:
    """Whether there is a decoder."""
    return self.head in ("none", "lm", "classify")

  @property
  def start_token(self) -> int:
    """What the decoder's input starts with."""
    start = self.decoder_start_token_id
    return (self.pad_token_id or 0) if start is None else start


def buckets(count: int, reach: int, causal: bool) -> np.ndarray:
  """Returns the bucket of each distance -reach … reach of a key from its query, (2 reach + 1,).

  Half of the buckets are for one distance each, the others widen logarithmically up to `reach`.
  Bidirectional attention splits them between keys before and after; causal has none for after.
  """
  distance = np.arange(-reach, reach + 1)
  first = 0
  if causal:
    distance = np.maximum(-distance, 0)
  else:
    count //= 2
    first, distance = count * (distance > 0), np.abs(distance)
  exact = count // 2
  far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  far = far / np.float32(math.log(reach / exact)) * np.float32(count - exact)
  far = np.minimum(exact + far.astype(np.int32), count - 1)
  return first + np.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
  """The bias of scores by distance, (1, H, queries, keys) float32.

  Parameter: embedding (buckets, H).
  """

  config: Config
  causal: bool = False

  @nn.compact
  def __call__(self, queries: int, keys: int, offset=None):
    c = self.config
    count, reach = c.relative_attention_num_buckets, c.relative_attention_max_distance
    init = nn.initializers.normal(c.initializer_factor * c.d_model**-0.5)
    table = self.param("embedding", init, (count, c.num_heads)).astype(jnp.float32)
    # A table by distance first: then no logarithm is computed on a device, whose rounding could
    # move a distance into another bucket.
    by_distance = jnp.take(table, buckets(count, reach, self.causal), axis=0)
    first = 0 if offset is None else offset
    distance = jnp.arange(keys)[None, :] - (first + jnp.arange(queries))[:, None]
    values = jnp.take(by_distance, jnp.clip(distance, -reach, reach) + reach, axis=0)
    return values.transpose(2, 0, 1)[None]


class Attention(nn.Module):
  """Self-attention of x (B, T, D), or cross-attention to `source` (B, S, D); -> (B, T, D).

  Attributes:
    cross: whether keys and values are of `source`; None: those of an earlier call, see cached.
  """

  config: Config
  compute: layers.Compute = layers.Compute()
  cross: bool = False

  @nn.compact
  def __call__(self, x, mask, bias=None, source=None):
    c = self.config
    width = c.num_heads * c.d_kv
    stds = {"q": (c.d_model * c.d_kv)**-0.5, "k": c.d_model**-0.5, "v": c.d_model**-0.5}
    q, k, v = (linear(c, width, std, self.compute, name) for name, std in stds.items())

    def split(y):
      return y.reshape(*y.shape[:2], c.num_heads, c.d_kv)

    if self.cross:
      query = split(q(x))
      key, value = layers.cached_source(
          self, lambda source: tuple(split(y) for y in layers.fused([k, v], source)), source)
    else:
      query, key, value = (split(y) for y in layers.fused([q, k, v], x))
      key, value = layers.cached(self, key, value, mask.offset)
      if c.model_type == "umt5":
        bias = RelativeBias(c, mask.causal, name="relative_bias")(
            x.shape[1], key.shape[1], mask.offset)
    y = attention.attention(query, key, value, mask, bias=bias, scale=1.0,
                            drop=layers.Dropout(c.dropout_rate),
                            implementation=self.compute.attention)
    return linear(c, c.d_model, width**-0.5, self.compute, "o")(y.reshape(*x.shape[:2], width))


class FeedForward(nn.Module):
  """The two-layer network, gated or not: (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c = self.config
    gated, act = c.activation
    wide = [linear(c, c.d_ff, c.d_model**-0.5, self.compute, name)
            for name in (("wi_0", "wi_1") if gated else ("wi",))]
    y, *gate = layers.fused(wide, x)
    y = layers.ACTIVATIONS[act](y)
    y = y * gate[0] if gated else y
    y = layers.Dropout(c.dropout_rate)(y)
    return linear(c, c.d_model, c.d_ff**-0.5, self.compute, "wo")(y)


class Layer(nn.Module):
  """Self-attention, in a decoder cross-attention, and the network, each behind its norm."""

  config: Config
  compute: layers.Compute = layers.Compute()
  decoder: bool = False

  @nn.compact
  def __call__(self, x, mask, bias, source, source_mask):
    c = self.config

    def add(x, name, module, *args):
      y = layers.RMSNorm(c.layer_norm_epsilon, self.compute.dtype, name=name + "_norm")(x)
      return x + layers.Dropout(c.dropout_rate)(module(c, self.compute, name=name)(y, *args))

    x = add(x, "self_attention", Attention, mask, bias)
    if self.decoder:
      cross = functools.partial(Attention, cross=True)
      x = add(x, "cross_attention", cross, source_mask, None, source)
    return add(x, "ff", FeedForward)


class Stack(nn.Module):
  """Encoder or decoder: vectors (B, T, D) -> (B, T, D).

  Arguments of a call: x; padding (B, T), or (B, slots) with a cache; of a decoder also source
  (B, S, D), None with a cache that holds it, its padding (B, S), and offset, the slot of the first
  query in the cache.
  """

  config: Config
  compute: layers.Compute = layers.Compute()
  decoder: bool = False

  @nn.compact
  def __call__(self, x, padding=None, source=None, source_padding=None, offset=None):
    c = self.config
    count = (self.decoder and c.num_decoder_layers) or c.num_layers
    mask = attention.Mask(padding=padding, offset=offset, causal=self.decoder)
    bias = None
    if c.model_type != "umt5":
      bias = RelativeBias(c, self.decoder, name="relative_bias")(
          x.shape[1], self._slots(x.shape[1]), offset)
    x = layers.Dropout(c.dropout_rate)(x)
    layer = functools.partial(Layer, c, self.compute, self.decoder)
    x = layers.run_layers(layer, count, self.compute, x, mask, bias, source,
                          attention.Mask(padding=source_padding))
    x = layers.RMSNorm(c.layer_norm_epsilon, self.compute.dtype, name="norm")(x)
    return layers.Dropout(c.dropout_rate)(x)

  def _slots(self, length: int) -> int:
    """Returns how many keys self-attention sees: the cache's slots, (…, slots, H, D) arrays."""
    kept = names.flatten(self.variables.get("cache", {}))
    return next((k.shape[-3] for path, k in kept.items() if path.endswith("/cached_key")),
                length)


class Model(nn.Module):
  """T5: token ids -> a dict, see `__call__`. Dropout acts iff apply is given a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, compute = self.config, self.compute
    init = nn.initializers.normal(c.initializer_factor)
    self.shared = layers.Embedding(c.vocab_size, c.d_model, compute.dtype, init)
    self.encoder = Stack(c, compute)
    if c.decodes:
      self.decoder = Stack(c, compute, decoder=True)
    if c.head == "lm" and not c.tied:
      self.lm_head = linear(c, c.vocab_size, 1.0, compute)
    if c.head == "classify":
      self.dense = linear(c, c.d_model, c.d_model**-0.5, compute, use_bias=True)
    if c.num_labels:
      self.classifier = linear(c, c.num_labels, c.d_model**-0.5, compute, use_bias=True)
    self.dropout = layers.Dropout(c.classifier_dropout)

  def __call__(self, input_ids, attention_mask=None, decoder_input_ids=None,
               decoder_attention_mask=None):
    """Applies the model.

    Args:
      input_ids: (B, S) int.
      attention_mask: (B, S), 1 for real tokens and 0 for padding; None: all are real.
      decoder_input_ids: (B, T) int; None: the encoder alone is computed, or, under head "classify",
        where T is S, input_ids shifted by one are decoded.
      decoder_attention_mask: (B, T).

    Returns:
      encoder_last_hidden_state (B, S, D); of the decoder last_hidden_state (B, T, D), and with head
      "lm" logits (B, T, V); without a decoder last_hidden_state (B, S, D). features (B, D) is the
      mean of the encoder's real tokens; under "classify" the decoder's state at the last end token;
      under "tag" last_hidden_state. logits (B, C) or (B, S, C) of label heads. Logits are float32.
    """
    c = self.config
    outputs = self.encode(input_ids, attention_mask)
    hidden = outputs["encoder_last_hidden_state"]
    if c.head == "classify" and decoder_input_ids is None:
      decoder_input_ids = jnp.pad(input_ids[:, :-1], ((0, 0), (1, 0)),
                                  constant_values=c.start_token)
    if decoder_input_ids is not None and c.decodes:
      outputs |= self.decode(decoder_input_ids, hidden, attention_mask, decoder_attention_mask)
    elif not c.decodes:
      outputs["last_hidden_state"] = hidden
    if c.head == "classify":
      eos = c.eos_token_id[0] if isinstance(c.eos_token_id, tuple) else c.eos_token_id
      outputs["features"] = layers.last_token(outputs["last_hidden_state"], input_ids == eos)
    else:
      real = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
      outputs["features"] = hidden if c.head == "tag" else heads.pool(hidden, real, "mean")
    if c.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    return outputs

  def encode(self, input_ids, attention_mask=None):
    """Returns {"encoder_last_hidden_state": (B, S, D)} of tokens (B, S) and their mask (B, S)."""
    return {"encoder_last_hidden_state": self.encoder(self.shared(input_ids), attention_mask)}

  def decode(self, decoder_input_ids, encoder_hidden_states=None, attention_mask=None,
             decoder_attention_mask=None, cache_index=None):
    """Applies the decoder.

    Args:
      decoder_input_ids: (B, T) int.
      encoder_hidden_states: (B, S, D); None: those that an earlier call put into the cache.
      attention_mask: (B, S), of the encoder's tokens.
      decoder_attention_mask: (B, T), or (B, slots) with a cache.
      cache_index: slot of the first token in the cache; None: no cache.

    Returns:
      last_hidden_state (B, T, D), and with head "lm" logits (B, T, V) float32.
    """
    x = self.decoder(self.shared(decoder_input_ids), decoder_attention_mask,
                     encoder_hidden_states, attention_mask, cache_index)
    outputs = {"last_hidden_state": x}
    if self.config.head == "lm":
      outputs["logits"] = self.lm_logits(x)
    return outputs

  def lm_logits(self, hidden):
    """Returns the language head's logits (…, V) float32 of decoder states (…, D)."""
    c = self.config
    if c.scale_decoder_outputs:
      hidden = hidden * jnp.asarray(c.d_model**-0.5, hidden.dtype)
    output = self.shared.attend if c.tied else self.lm_head
    return output(hidden).astype(jnp.float32)

  def head(self, features):
    """Returns the label head's logits (…, C) float32 of features (…, D)."""
    if self.config.head == "classify":
      features = jnp.tanh(self.dense(self.dropout(features)))
    return self.classifier(self.dropout(features)).astype(jnp.float32)


def linear(config, features, std, compute, name=None, use_bias=False) -> layers.Linear:
  """Returns a linear layer that starts with `std` times config.initializer_factor."""
  init = nn.initializers.normal(config.initializer_factor * std)
  return layers.Linear(features, use_bias, compute.dtype, init, name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  mask = np.ones((2, 9), np.int32)
  mask[1, 5:] = 0
  inputs = {"input_ids": rng.integers(0, config.vocab_size, mask.shape, np.int32),
            "attention_mask": mask}
  if config.head in ("none", "lm"):
    inputs["decoder_input_ids"] = rng.integers(0, config.vocab_size, (2, 4), np.int32)
  return inputs


def fit(config: Config, shapes: dict) -> Config:
  """Returns the config of a file with these {our path: shape}: tied where it has no head."""
  return dataclasses.replace(config, tied=config.tied or "params/lm_head/kernel" not in shapes)


def prefixed(config: Config) -> bool:
  """Returns whether export writes `transformer.`, as the classes with a label head do."""
  return config.head in ("classify", "tag")
