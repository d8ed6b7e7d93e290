"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): a long, deep encoder with rotary positions.

Most layers look a short way to each side, every third at the whole text; the two kinds have rotary
positions of their own (Su et al. 2021, arXiv:2104.09864). Norms stand before attention and the
gated feed-forward part (Shazeer 2020, arXiv:2002.05202); the first layer has none before attention,
so layers are not of one shape and model.scan leaves them unrolled.
Follows transformers' `models/modernbert/modeling_modernbert.py` (Apache-2.0) in names, defaults and
the places of dropout; padding is masked where upstream may leave it out.
Shapes: B batch, T tokens, D hidden size, H heads, F features of a head, C labels, V words.
"""

import dataclasses
import pathlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import attention, base, heads, layers, rope, surgery
from ft.weights.names import Rule

MODALITY = "text"
MODEL_TYPES = ("modernbert",)
HEAD = ("params/classifier",)
OPTIONAL = ("params/transform", "params/decoder_bias")
SURGERY = {
    "vocab_size": surgery.Surgery("vocab_size", ("params/embeddings/word/embedding",
                                                 "params/decoder_bias")),
    "depth": surgery.Surgery("num_hidden_layers", ("params/encoder",)),
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"

_LAYER, _OURS = "[model.]layers.{i}.", "params/encoder/layer_{i}/"
_WORDS = "params/embeddings/word/embedding"
_HEADED = "head=classify|tag|mlm"

NAMES = [
    Rule("[model.]embeddings.tok_embeddings.weight", _WORDS),
    *base.norm_rules("[model.]embeddings.norm", "params/embeddings/norm"),
    *base.norm_rules(_LAYER + "attn_norm", _OURS + "attention_norm"),
    *base.linear_rules(_LAYER + "attn.Wqkv", _OURS + "attention/qkv"),
    *base.linear_rules(_LAYER + "attn.Wo", _OURS + "attention/output"),
    *base.norm_rules(_LAYER + "mlp_norm", _OURS + "mlp_norm"),
    *base.linear_rules(_LAYER + "mlp.Wi", _OURS + "mlp/input"),
    *base.linear_rules(_LAYER + "mlp.Wo", _OURS + "mlp/output"),
    *base.norm_rules("[model.]final_norm", "params/final_norm"),
    *base.linear_rules("head.dense", "params/transform/dense", _HEADED),
    *base.norm_rules("head.norm", "params/transform/norm", _HEADED),
    Rule("decoder.weight", _WORDS, "tied", "head=mlm&tie_word_embeddings=True"),
    Rule("decoder.weight", "params/decoder/kernel", "transpose",
         "head=mlm&tie_word_embeddings=False"),
    Rule("decoder.bias", "params/decoder_bias", only="head=mlm"),
    *base.linear_rules("classifier", "params/classifier", "head=classify|tag"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' ModernBertConfig that matter here.

  Attributes:
    layer_types: "full_attention" or "sliding_attention" for each layer; None: the first of every
      `global_attn_every_n_layers` looks at the whole text.
    local_attention: how far the other layers see, to both sides together.
    global_rope, local_rope: rotary positions of the two kinds of layers.
    pooling: what `features` read: "cls", the first token, or "mean", over real tokens. It is
      config.json's classifier_pooling, or what a sentence encoder's 1_Pooling states.
  """

  vocab_size: int = 50368
  hidden_size: int = 768
  intermediate_size: int = 1152
  num_hidden_layers: int = 22
  num_attention_heads: int = 12
  hidden_activation: str = "gelu"
  max_position_embeddings: int = 8192
  initializer_range: float = 0.02
  norm_eps: float = 1e-5
  norm_bias: bool = False
  pad_token_id: int = 50283
  attention_bias: bool = False
  attention_dropout: float = 0.0
  layer_types: tuple | None = None
  global_attn_every_n_layers: int = 3
  local_attention: int = 128
  embedding_dropout: float = 0.0
  mlp_bias: bool = False
  mlp_dropout: float = 0.0
  decoder_bias: bool = True
  classifier_dropout: float = 0.0
  classifier_bias: bool = False
  classifier_activation: str = "gelu"
  tie_word_embeddings: bool = True
  global_rope: rope.Rope | None = None
  local_rope: rope.Rope | None = None
  pooling: str = "cls"

  PREFIXES = {"modernbert": "ModernBert"}
  HEADS = {"none": ("{}Model",), "classify": ("{}ForSequenceClassification",),
           "tag": ("{}ForTokenClassification",), "mlm": ("{}ForMaskedLM",)}
  OURS = ("global_rope", "local_rope", "pooling")

  def __post_init__(self):
    super().__post_init__()
    count, every = self.num_hidden_layers, max(self.global_attn_every_n_layers, 1)
    types = self.layer_types
    if types:  # as many as there are layers after surgery
      types = (types + types[-1:] * count)[:count]
    else:
      types = tuple(LOCAL if i % every else GLOBAL for i in range(count))
    size = self.hidden_size // max(self.num_attention_heads, 1)
    filled = {"layer_types": types,
              "global_rope": self.global_rope or rope.Rope(size, 160000.0),
              "local_rope": self.local_rope or rope.Rope(size, 10000.0)}
    for name, value in filled.items():
      object.__setattr__(self, name, value)

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    known = cls(**values)
    size = known.hidden_size // max(known.num_attention_heads, 1)
    stated = hf.get("rope_parameters") or {}
    if stated.keys() - {LOCAL, GLOBAL}:
      raise errors.UserError(f"config.json: rope_parameters should be given for {GLOBAL} and "
                             f"{LOCAL}, not {', '.join(stated)}")
    thetas = {GLOBAL: hf.get("global_rope_theta") or 160000.0}
    # Before transformers 5 a null said that all layers have the positions of the global ones.
    thetas[LOCAL] = hf.get("local_rope_theta", 10000.0) or thetas[GLOBAL]
    made = {}
    for field, kind in (("global_rope", GLOBAL), ("local_rope", LOCAL)):
      settings = {**(stated.get(kind) or {}), **(hf.get("rope_scaling") or {})}
      made[field] = rope.Rope.from_hf(
          {"rope_parameters": settings, "max_position_embeddings": known.max_position_embeddings},
          size, thetas[kind])
    pooling = hf.get("pooling") or hf.get("classifier_pooling") or "cls"
    return {**made, "pooling": "cls" if pooling == "first" else pooling}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_activation", layers.ACTIVATIONS)
    base.one_of(self, "classifier_activation", layers.ACTIVATIONS)
    base.multiple(self, "hidden_size", "num_attention_heads")
    heads.check_pooling(self.pooling)
    if hf.get("layer_types") and len(hf["layer_types"]) != self.num_hidden_layers:
      raise errors.UserError(f"config.json: layer_types has {len(hf['layer_types'])} entries for "
                             f"{self.num_hidden_layers} layers")
    if unknown := set(self.layer_types) - {LOCAL, GLOBAL}:
      raise errors.UserError(f"config.json: layer_types should be {GLOBAL} or {LOCAL}, not "
                             + ", ".join(map(repr, sorted(unknown))))
    for key in ("quantization_config", "head_dim"):
      base.only(hf, key, None)

  def to_hf(self) -> dict:
    """Returns what config.json holds; transformers opens it."""
    hf = super().to_hf()
    hf.pop("pooling", None)
    if hf.get("classifier_pooling", "cls") != self.pooling:
      hf["classifier_pooling"] = self.pooling
    if self.source == "{}":  # not read from a file: the positions stand nowhere else
      size = self.hidden_size // self.num_attention_heads
      hf["rope_parameters"] = {GLOBAL: self.global_rope.to_hf(size),
                               LOCAL: self.local_rope.to_hf(size)}
    return hf

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, attention_dropout=rate, embedding_dropout=rate,
                               mlp_dropout=rate, classifier_dropout=rate)


class Embeddings(nn.Module):
  """Word vectors, normalised: ids (B, T) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c = self.config
    init = nn.initializers.normal(c.initializer_range)
    self.word = layers.Embedding(c.vocab_size, c.hidden_size, self.compute.dtype, init)
    self.norm = norm(c, self.compute)
    self.dropout = layers.Dropout(c.embedding_dropout)

  def __call__(self, input_ids):
    return self.dropout(self.norm(self.word(input_ids)))


class Attention(nn.Module):
  """Self-attention with rotary positions: x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, angles, window):
    c = self.config
    shape = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
    qkv = linear(c, self.compute, 3 * c.hidden_size, c.attention_bias, "qkv")(x)
    q, k, v = (y.reshape(shape) for y in jnp.split(qkv, 3, axis=-1))
    q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
    y = attention.attention(q, k, v, mask, window=window, drop=layers.Dropout(c.attention_dropout),
                            implementation=self.compute.attention)
    y = linear(c, self.compute, c.hidden_size, c.attention_bias, "output")(y.reshape(x.shape))
    return layers.Dropout(c.attention_dropout)(y)


class MLP(nn.Module):
  """The gated feed-forward part: x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c = self.config
    y = linear(c, self.compute, 2 * c.intermediate_size, c.mlp_bias, "input")(x)
    y, gate = jnp.split(y, 2, axis=-1)
    y = layers.Dropout(c.mlp_dropout)(layers.ACTIVATIONS[c.hidden_activation](y) * gate)
    return linear(c, self.compute, c.hidden_size, c.mlp_bias, "output")(y)


class Layer(nn.Module):
  """Attention and feed-forward part, each with a norm before it and a residual.

  Attributes:
    number: which layer it is; the first has no norm before attention.
  """

  config: Config
  compute: layers.Compute = layers.Compute()
  number: int = 0

  @nn.compact
  def __call__(self, x, mask, angles):
    """Applies the layer to x (B, T, D); angles: layer type -> (cos, sin), each (B, T, 1, F / 2)."""
    c, kind = self.config, self.config.layer_types[self.number]
    window = c.local_attention // 2 if kind == LOCAL else attention.NO_WINDOW
    y = norm(c, self.compute, "attention_norm")(x) if self.number else x
    x = x + Attention(c, self.compute, name="attention")(y, mask, angles[kind], window)
    return x + MLP(c, self.compute, name="mlp")(norm(c, self.compute, "mlp_norm")(x))


class Encoder(nn.Module):
  """The stack of layers, `layer_0` first."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, angles):
    c = self.config

    def layer(name):
      return Layer(c, self.compute, int(name.rpartition("_")[2]), name=name)

    unrolled = dataclasses.replace(self.compute, scan=False)
    return layers.run_layers(layer, c.num_hidden_layers, unrolled, x, mask, angles)


class Model(nn.Module):
  """ModernBERT: token ids -> a dict, see `__call__`. Dropout acts iff given a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, compute = self.config, self.compute
    self.embeddings = Embeddings(c, compute)
    self.encoder = Encoder(c, compute)
    self.final_norm = norm(c, compute)
    if c.head != "none":
      self.transform = heads.Transform(
          c.hidden_size, c.classifier_activation, c.norm_eps, compute, c.classifier_bias,
          c.norm_bias, c.initializer_range / (2 * c.num_hidden_layers)**0.5)
    if c.num_labels:
      init = nn.initializers.normal(c.hidden_size**-0.5)
      self.classifier = layers.Linear(c.num_labels, dtype=compute.dtype, kernel_init=init)
    self.dropout = layers.Dropout(c.classifier_dropout)
    if c.head == "mlm" and not c.tie_word_embeddings:
      self.decoder = linear(c, compute, c.vocab_size, False)
    if c.head == "mlm" and c.decoder_bias:
      self.decoder_bias = self.param("decoder_bias", nn.initializers.zeros, (c.vocab_size,))

  def __call__(self, input_ids, attention_mask=None, position_ids=None, segment_ids=None):
    """Applies the model.

    Args:
      input_ids: (B, T) int.
      attention_mask: (B, T), 1 for real tokens and 0 for padding; None: all are real.
      position_ids: (B, T) int; None: 0, 1, 2, ….
      segment_ids: (B, T), the number of each token's document in a packed row; None: one document.

    Returns:
      last_hidden_state (B, T, D); features (B, D), the pooled text, with a label head after its
      dense layer and norm, with the head "tag" those of all tokens (B, T, D); logits float32:
      (B, C) or (B, T, C) if config.num_labels > 0, (B, T, V) with the head "mlm".
    """
    c = self.config
    if attention_mask is None:
      attention_mask = jnp.ones_like(input_ids)
    if position_ids is None:
      position_ids = jnp.arange(input_ids.shape[1])[None]
    angles = {kind: rope.angles(turns, position_ids, self.compute.dtype)
              for kind, turns in ((GLOBAL, c.global_rope), (LOCAL, c.local_rope))}
    mask = attention.Mask(padding=attention_mask, segments=segment_ids)
    x = self.final_norm(self.encoder(self.embeddings(input_ids), mask, angles))
    features = x if c.head == "tag" else heads.pool(x, attention_mask, c.pooling)
    if c.num_labels:
      features = self.transform(features)
    outputs = {"last_hidden_state": x, "features": features}
    if c.num_labels:
      outputs["logits"] = self.head(features)
    if c.head == "mlm":
      outputs["logits"] = self.lm_logits(x)
    return outputs

  def head(self, features):
    """Returns the logits (…, C) float32 of features (…, D): dropout and the classifier."""
    return self.classifier(self.dropout(features)).astype(jnp.float32)

  def lm_logits(self, hidden):
    """Returns scores of words (…, V) float32 of hidden states (…, D), with the head "mlm"."""
    c = self.config
    x = self.transform(hidden)
    x = self.embeddings.word.attend(x) if c.tie_word_embeddings else self.decoder(x)
    x = x.astype(jnp.float32)
    return x + self.decoder_bias.astype(jnp.float32) if c.decoder_bias else x


def linear(config, compute, features, bias, name=None) -> layers.Linear:
  """Returns a linear layer that starts as the config says."""
  init = nn.initializers.normal(config.initializer_range)
  return layers.Linear(features, bias, compute.dtype, init, name=name)


def norm(config, compute, name=None) -> layers.LayerNorm:
  """Returns a norm, with or without bias as the config says."""
  return layers.LayerNorm(config.norm_eps, compute.dtype, config.norm_bias, name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  mask = np.ones((2, 12), np.int32)
  mask[1, 6:] = 0
  return {"input_ids": rng.integers(0, config.vocab_size, mask.shape, np.int32),
          "attention_mask": mask}


def complete(hf: dict, folder: pathlib.Path) -> dict:
  """Returns config.json's content with the pooling of a sentence encoder, where that is stated."""
  pooling = heads.stated_pooling(folder)
  return {**hf, "pooling": pooling} if pooling else hf


def companions(config: Config, files: dict) -> dict:
  """Returns the files beside weights and config.json; a sentence encoder's say how it pools."""
  if config.num_labels:  # the label head is a ModernBertFor…Classification's
    return heads.without_pooling(files)
  if "1_Pooling/config.json" in files:
    return heads.with_pooling(files, config.hidden_size, config.pooling)
  return files
