"""BART (Lewis et al. 2019, arXiv:1910.13461) and the translation models built like it.

    bart      norms after each sublayer, learned positions
    mbart     mBART (arXiv:2001.08210): norms before, and one more after the last layer
    marian    Marian, OPUS-MT (arXiv:1804.00344): sinusoidal positions, one vocabulary or two
    m2m_100   M2M100, NLLB (arXiv:2010.11125, arXiv:2207.04672): norms before, sinusoidal positions

Follows transformers' `modeling_bart.py`, `modeling_mbart.py`, `modeling_marian.py` and
`modeling_m2m_100.py` (Apache-2.0) in names, defaults and the places of dropout.
Shapes: B batch, T decoder and S encoder tokens, D width, H heads, V words, C labels.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import attention, base, heads, layers
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "text"
MODEL_TYPES = ("bart", "mbart", "marian", "m2m_100")
HEAD = ("params/classifier",)
OPTIONAL = ("params/dense",)
SURGERY = {
    "vocab_size": Surgery("vocab_size", (
        "params/shared/embedding", "params/encoder_tokens/embedding",
        "params/decoder_tokens/embedding", ("params/lm_head/kernel", 1),
        ("buffers/final_logits_bias", 1))),
    "depth": Surgery("encoder_layers", ("params/encoder",)),
}

_EPSILON = 1e-5  # of all norms; no config states it
_OFFSET = 2  # rows before the first position in the table of learned ones


def _stack(name: str, places: tuple) -> list[Rule]:
  """Returns the rules of the encoder or decoder; `places` are the attentions of a layer."""
  theirs, ours = f"[model.]{name}.", f"params/{name}/"
  block, layer = theirs + "layers.{i}.", ours + "layer_{i}/"
  shared = f"params/{name}_tokens/embedding"
  rules = [
      Rule(theirs + "embed_tokens.weight", shared, only="separate=True"),
      Rule(theirs + "embed_tokens.weight", "params/shared/embedding", "tied", "separate=False"),
      Rule(theirs + "embed_positions.weight", ours + "positions/embedding",
           only="model_type=bart|mbart"),
      Rule(theirs + "embed_positions.(weight|weights)", transform="keep",
           only="model_type=marian|m2m_100"),
      Rule(theirs + "version", transform="keep"),
      *base.norm_rules(theirs + "layernorm_embedding", ours + "embedding_norm",
                        "model_type=bart|mbart"),
      *base.norm_rules(theirs + "layer_norm", ours + "norm", "model_type=mbart|m2m_100")]
  for place in places:
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
      rules += base.linear_rules(f"{block}{place}.{part}", f"{layer}{place}/{part}")
  for part in ("fc1", "fc2"):
    rules += base.linear_rules(block + part, layer + part)
  for place in (*places, "final"):
    rules += base.norm_rules(f"{block}{place}_layer_norm", f"{layer}{place}_norm")
  return rules


_TIED = "head=lm&tie_word_embeddings=True&separate="
NAMES = [
    Rule("[model.]shared.weight", "params/shared/embedding", only="separate=False"),
    Rule("[model.]shared.weight", transform="keep", only="separate=True"),  # read by nothing
    *_stack("encoder", ("self_attn",)),
    *_stack("decoder", ("self_attn", "encoder_attn")),
    Rule("lm_head.weight", "params/shared/embedding", "tied", _TIED + "False"),
    Rule("lm_head.weight", "params/decoder_tokens/embedding", "tied", _TIED + "True"),
    Rule("lm_head.weight", "params/lm_head/kernel", "transpose",
         "head=lm&tie_word_embeddings=False"),
    Rule("final_logits_bias", "buffers/final_logits_bias", only="head=lm"),
    *base.linear_rules("classification_head.dense", "params/dense", "head=classify"),
    *base.linear_rules("classification_head.out_proj", "params/classifier", "head=classify"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' BartConfig and its relatives that matter here.

  Attributes:
    separate: whether encoder and decoder have word embeddings of their own.
    logits_bias: whether the file holds final_logits_bias, a constant that is added to the logits.
  """

  vocab_size: int = 50265
  decoder_vocab_size: int | None = None
  max_position_embeddings: int = 1024
  encoder_layers: int = 12
  encoder_ffn_dim: int = 4096
  encoder_attention_heads: int = 16
  decoder_layers: int = 12
  decoder_ffn_dim: int = 4096
  decoder_attention_heads: int = 16
  encoder_layerdrop: float = 0.0
  decoder_layerdrop: float = 0.0
  activation_function: str = "gelu"
  d_model: int = 1024
  dropout: float = 0.1
  attention_dropout: float = 0.0
  activation_dropout: float = 0.0
  classifier_dropout: float = 0.0
  init_std: float = 0.02
  scale_embedding: bool = False
  pad_token_id: int | None = 1
  bos_token_id: int | None = 0
  eos_token_id: int | tuple | None = 2
  decoder_start_token_id: int | None = None
  forced_bos_token_id: int | None = None
  forced_eos_token_id: int | tuple | None = None
  tie_word_embeddings: bool = True
  share_encoder_decoder_embeddings: bool = True
  separate: bool = False
  logits_bias: bool = False

  PREFIXES = {"bart": "Bart", "mbart": "MBart", "marian": "Marian", "m2m_100": "M2M100"}
  HEADS = {"none": ("{}Model",), "lm": ("{}ForConditionalGeneration", "{}MTModel"),
           "classify": ("{}ForSequenceClassification",)}
  DEFAULTS = {
      "bart": {"decoder_start_token_id": 2, "forced_eos_token_id": 2},
      "mbart": {"forced_eos_token_id": 2},
      "marian": {"vocab_size": 58101, "decoder_start_token_id": 58100, "pad_token_id": 58100,
                 "eos_token_id": 0, "bos_token_id": None, "forced_eos_token_id": 0},
      "m2m_100": {"vocab_size": 128112, "encoder_layerdrop": 0.05, "decoder_layerdrop": 0.05,
                  "activation_function": "relu", "attention_dropout": 0.1,
                  "decoder_start_token_id": 2, "scale_embedding": True}}
  OURS = ("separate", "logits_bias")

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    one = values.get("tie_word_embeddings", True)
    if values["model_type"] == "marian":
      one = one and values.get("share_encoder_decoder_embeddings", True)
    return {"separate": not one}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "activation_function", layers.ACTIVATIONS)
    base.multiple(self, "d_model", "encoder_attention_heads")
    base.multiple(self, "d_model", "decoder_attention_heads")
    base.only(hf, "is_decoder", False)
    if self.model_type in ("mbart", "m2m_100") and self.pad_token_id is None:
      raise errors.UserError("config.json: pad_token_id is missing")

  def to_hf(self) -> dict:
    """Returns what config.json holds; transformers opens it."""
    hf = super().to_hf()
    if self.head == "lm" and self.model_type == "marian":
      hf["architectures"] = ["MarianMTModel"]
    return hf

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set; fewer layers than stated are dropped."""
    layerdrops = {f"{side}_layerdrop": min(rate, getattr(self, f"{side}_layerdrop"))
                  for side in ("encoder", "decoder")}
    return dataclasses.replace(self, dropout=rate, attention_dropout=rate,
                               activation_dropout=rate, classifier_dropout=rate, **layerdrops)

  @property
  def target_size(self) -> int:
    """Words of the decoder's side."""
    own = self.model_type == "marian" and not self.share_encoder_decoder_embeddings
    return (own and self.decoder_vocab_size) or self.vocab_size

  @property
  def norm_first(self) -> bool:
    """Whether sublayers read a normed input; then a norm follows the last layer."""
    return self.model_type in ("mbart", "m2m_100")

  @property
  def learned(self) -> bool:
    """Whether positions are learned; then the embeddings are normed too."""
    return self.model_type in ("bart", "mbart")


def sinusoids(positions: int, size: int) -> np.ndarray:
  """Returns Marian's position vectors (positions, size): sines, then cosines."""
  half = (size + 1) // 2
  angles = np.arange(positions)[:, None] / 10000.0**(2 * np.arange(half) / size)
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :size].astype(np.float32)


def sinusoids_of(positions, size: int):
  """Returns M2M100's vectors (…, size) of positions (…): sines, then cosines, zero if odd."""
  half = size // 2
  rates = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / (half - 1)))
  angles = positions.astype(jnp.float32)[..., None] * rates
  zero = jnp.zeros((*positions.shape, size % 2), jnp.float32)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles), zero], axis=-1)


class Positions(nn.Module):
  """Position vectors (T, D) or (B, T, D) of ids (B, T), the first of them in slot `offset`."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, ids, offset=None):
    c, first = self.config, 0 if offset is None else offset
    if c.model_type == "m2m_100":
      real = ids != c.pad_token_id
      positions = (jnp.cumsum(real, axis=1) + first) * real + c.pad_token_id
      y = jnp.where(real[..., None], sinusoids_of(positions, c.d_model), 0.0)
      return y.astype(self.compute.dtype)
    length, limit = ids.shape[1], c.max_position_embeddings
    if isinstance(length, int) and length > limit:  # it is symbolic while a program is exported
      raise errors.UserError(f"a text of {length} tokens; the model has {limit} positions")
    positions = first + jnp.arange(length)
    if not c.learned:
      return jnp.take(sinusoids(limit, c.d_model), positions, axis=0).astype(self.compute.dtype)
    init = nn.initializers.normal(c.init_std)
    table = self.param("embedding", init, (limit + _OFFSET, c.d_model))
    return jnp.take(table, positions + _OFFSET, axis=0, mode="fill").astype(self.compute.dtype)


class Attention(nn.Module):
  """Self-attention of x (B, T, D), or cross-attention to `source` (B, S, D); -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()
  heads: int = 1
  cross: bool = False

  @nn.compact
  def __call__(self, x, mask, source=None):
    c = self.config
    q, k, v = (linear(c, c.d_model, self.compute, name) for name in ("q_proj", "k_proj", "v_proj"))

    def split(y):
      return y.reshape(*y.shape[:2], self.heads, c.d_model // self.heads)

    if self.cross:
      query = split(q(x))
      key, value = layers.cached_source(
          self, lambda source: tuple(split(y) for y in layers.fused([k, v], source)), source)
    else:
      query, key, value = (split(y) for y in layers.fused([q, k, v], x))
      key, value = layers.cached(self, key, value, mask.offset)
    y = attention.attention(query, key, value, mask, drop=layers.Dropout(c.attention_dropout),
                            implementation=self.compute.attention)
    return linear(c, c.d_model, self.compute, "out_proj")(y.reshape(x.shape))


class Layer(nn.Module):
  """Self-attention, in a decoder cross-attention, and the network, with norm and residual each."""

  config: Config
  compute: layers.Compute = layers.Compute()
  decoder: bool = False

  @nn.compact
  def __call__(self, x, mask, source, source_mask):
    c, compute, side = self.config, self.compute, "decoder" if self.decoder else "encoder"
    count, width, rate = (getattr(c, f"{side}_{key}")
                          for key in ("attention_heads", "ffn_dim", "layerdrop"))
    start = x

    def add(x, name, branch, *args):
      norm = layers.LayerNorm(_EPSILON, compute.dtype, name=name + "_norm")
      y = branch(norm(x) if c.norm_first else x, *args)
      x = x + layers.Dropout(c.dropout)(y)
      return x if c.norm_first else norm(x)

    def network(y):
      y = layers.ACTIVATIONS[c.activation_function](linear(c, width, compute, "fc1")(y))
      return linear(c, c.d_model, compute, "fc2")(layers.Dropout(c.activation_dropout)(y))

    x = add(x, "self_attn", Attention(c, compute, count, name="self_attn"), mask)
    if self.decoder:
      cross = Attention(c, compute, count, cross=True, name="encoder_attn")
      x = add(x, "encoder_attn", cross, source_mask, source)
    x = add(x, "final", network)
    # LayerDrop (arXiv:1909.11556): in training, a layer is passed by now and then.
    if rate and self.has_rng("dropout"):
      x = jnp.where(jax.random.bernoulli(self.make_rng("dropout"), rate), start, x)
    return x


class Stack(nn.Module):
  """Encoder or decoder: ids and their vectors (B, T), (B, T, D) -> (B, T, D).

  With a cache, padding is (B, slots), offset the slot of the first query, source may be None.
  """

  config: Config
  compute: layers.Compute = layers.Compute()
  decoder: bool = False

  @nn.compact
  def __call__(self, ids, x, padding=None, source=None, source_padding=None, offset=None):
    c, dtype = self.config, self.compute.dtype
    x = x * math.sqrt(c.d_model) if c.scale_embedding else x
    x = x + Positions(c, self.compute, name="positions")(ids, offset)
    if c.learned:
      x = layers.LayerNorm(_EPSILON, dtype, name="embedding_norm")(x)
    x = layers.Dropout(c.dropout)(x)
    mask = attention.Mask(padding=padding, offset=offset, causal=self.decoder)
    layer = functools.partial(Layer, c, self.compute, self.decoder)
    count = c.decoder_layers if self.decoder else c.encoder_layers
    x = layers.run_layers(layer, count, self.compute, x, mask, source,
                          attention.Mask(padding=source_padding))
    return layers.LayerNorm(_EPSILON, dtype, name="norm")(x) if c.norm_first else x


class Model(nn.Module):
  """BART: token ids -> a dict, see `__call__`. Dropout acts iff apply is given a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, compute = self.config, self.compute
    table = functools.partial(layers.Embedding, features=c.d_model, dtype=compute.dtype,
                              embedding_init=nn.initializers.normal(c.init_std))
    if c.separate:
      self.encoder_tokens, self.decoder_tokens = table(c.vocab_size), table(c.target_size)
    else:
      self.shared = table(c.vocab_size)
    self.encoder, self.decoder = Stack(c, compute), Stack(c, compute, decoder=True)
    if c.head == "lm" and not c.tie_word_embeddings:
      self.lm_head = linear(c, c.target_size, compute, use_bias=False)
    if c.logits_bias:
      # A constant: upstream's optimisers never see it, so it is no parameter.
      self.final_logits_bias = self.variable("buffers", "final_logits_bias", jnp.zeros,
                                             (1, c.target_size))
    if c.head == "classify":
      self.dense = linear(c, c.d_model, compute)
    if c.num_labels:
      self.classifier = linear(c, c.num_labels, compute)
    self.dropout = layers.Dropout(c.classifier_dropout)

  def __call__(self, input_ids, attention_mask=None, decoder_input_ids=None,
               decoder_attention_mask=None):
    """Applies the model.

    Args:
      input_ids: (B, S) int.
      attention_mask: (B, S), 1 for real tokens and 0 for padding; None: all are real.
      decoder_input_ids: (B, T) int, under "classify" of input_ids' shape; None: of bart and mbart
        input_ids shifted by one; of the others the encoder alone is computed.
      decoder_attention_mask: (B, T).

    Returns:
      encoder_last_hidden_state (B, S, D); last_hidden_state (B, T, D) of the decoder, and with head
      "lm" logits (B, T, V) float32. features (B, D) is the mean of the encoder's real tokens; under
      "classify" the decoder's state at the last end token, and logits are (B, C).

    Raises:
      UserError: more tokens than the model has positions.
    """
    c = self.config
    outputs = self.encode(input_ids, attention_mask)
    hidden = outputs["encoder_last_hidden_state"]
    if decoder_input_ids is None and c.learned:
      decoder_input_ids = self._shifted(input_ids)
    if decoder_input_ids is not None:
      outputs |= self.decode(decoder_input_ids, hidden, attention_mask, decoder_attention_mask)
    if c.head == "classify":
      eos = c.eos_token_id[0] if isinstance(c.eos_token_id, tuple) else c.eos_token_id
      outputs["features"] = layers.last_token(outputs["last_hidden_state"], input_ids == eos)
    else:
      real = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
      outputs["features"] = heads.pool(hidden, real, "mean")
    if c.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    return outputs

  def encode(self, input_ids, attention_mask=None):
    """Returns {"encoder_last_hidden_state": (B, S, D)} of tokens (B, S) and their mask (B, S)."""
    tokens = self.encoder_tokens if self.config.separate else self.shared
    return {"encoder_last_hidden_state": self.encoder(input_ids, tokens(input_ids), attention_mask)}

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
    tokens = self.decoder_tokens if self.config.separate else self.shared
    x = self.decoder(decoder_input_ids, tokens(decoder_input_ids), decoder_attention_mask,
                     encoder_hidden_states, attention_mask, cache_index)
    logits = {"logits": self.lm_logits(x)} if self.config.head == "lm" else {}
    return {"last_hidden_state": x, **logits}

  def lm_logits(self, hidden):
    """Returns the language head's logits (…, V) float32 of decoder states (…, D)."""
    c = self.config
    tokens = self.decoder_tokens if c.separate else self.shared
    output = tokens.attend if c.tie_word_embeddings else self.lm_head
    logits = output(hidden).astype(jnp.float32)
    return logits + self.final_logits_bias.value[0] if c.logits_bias else logits

  def head(self, features):
    """Returns the label head's logits (B, C) float32 of features (B, D)."""
    features = jnp.tanh(self.dense(self.dropout(features)))
    return self.classifier(self.dropout(features)).astype(jnp.float32)

  def _shifted(self, ids):
    """Returns ids (B, S) moved by one, behind the start token; mbart's is the last real token."""
    c = self.config
    start = jnp.full_like(ids[:, :1], c.decoder_start_token_id or 0)
    if c.model_type == "mbart":
      last = (ids != c.pad_token_id).sum(1, keepdims=True) - 1
      start = jnp.take_along_axis(ids, last, axis=1)
    return jnp.concatenate([start, ids[:, :-1]], axis=1)


def linear(config, features, compute, name=None, use_bias=True) -> layers.Linear:
  """Returns a linear layer that starts as the config says."""
  init = nn.initializers.normal(config.init_std)
  return layers.Linear(features, use_bias, compute.dtype, init, name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  mask = np.ones((2, min(9, config.max_position_embeddings)), np.int32)
  mask[1, mask.shape[1] // 2:] = 0
  ids = rng.integers(0, config.vocab_size, mask.shape, np.int32)
  inputs = {"input_ids": np.where(mask, ids, config.pad_token_id or 0).astype(np.int32),
            "attention_mask": mask}
  if config.head != "classify":
    inputs["decoder_input_ids"] = rng.integers(0, config.target_size, (2, 4), np.int32)
  return inputs


def fit(config: Config, shapes: dict) -> Config:
  """Returns the config of a file with these {our path: shape}; UserError for an unknown head."""
  if config.head == "classify" and not config.learned:
    raise errors.UserError(f"{config.model_type} has no label head; it has: none, lm")
  separate = config.separate and "params/encoder_tokens/embedding" in shapes
  return dataclasses.replace(config, separate=separate,
                             logits_bias="buffers/final_logits_bias" in shapes)
