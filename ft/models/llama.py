"""Llama (Touvron et al. 2023, arXiv:2302.13971) and decoders that differ from it in a few words.

    llama     Llama 2 and 3 (arXiv:2307.09288, 2407.21783), SmolLM2 (arXiv:2502.02737)
    mistral   a sliding window in all layers (arXiv:2310.06825)
    qwen2     biases on query, key and value; windows in some layers (arXiv:2407.10671)
    qwen3     RMS norm of each query and key head instead (arXiv:2505.09388)
    smollm3   some layers without positions (arXiv:2501.18795)
    phi3      query, key and value as one matrix, gate and up too; longrope (arXiv:2404.14219)
    olmo2     norms after instead of before, and of all query and key features (arXiv:2501.00656)

Follows transformers' `models/{llama,mistral,qwen2,qwen3,smollm3,phi3,olmo2}/modeling_*.py`
(Apache-2.0) in names, defaults and arithmetic.
Shapes: B batch, T tokens, S slots of the cache or T without one, D hidden size, H heads, K key
heads, F features of a head, V vocabulary, C labels.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ft import errors
from ft.models import attention, base, decoder, layers
from ft.models import rope as rotary
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "text"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo2")
HEAD = ("params/classifier",)
SLIDING, FULL = "sliding_attention", "full_attention"

_LAYER, _OURS = "[model.]layers.{i}.", "params/layer_{i}/"


def _linear(theirs: str, ours: str) -> list[Rule]:
  return base.linear_rules(_LAYER + theirs, _OURS + ours)


def _norm(theirs: str, ours: str) -> Rule:
  return Rule(_LAYER + theirs + ".weight", _OURS + ours + "/scale")


NAMES = [
    Rule("[model.]embed_tokens.weight", "params/embed_tokens/embedding"),
    *_linear("self_attn.q_proj", "attention/query"),
    *_linear("self_attn.k_proj", "attention/key"),
    *_linear("self_attn.v_proj", "attention/value"),
    *_linear("self_attn.qkv_proj", "attention/qkv"),
    *_linear("self_attn.o_proj", "attention/output"),
    _norm("self_attn.q_norm", "attention/query_norm"),
    _norm("self_attn.k_norm", "attention/key_norm"),
    *_linear("mlp.gate_proj", "mlp/gate"),
    *_linear("mlp.up_proj", "mlp/up"),
    *_linear("mlp.gate_up_proj", "mlp/gate_up"),
    *_linear("mlp.down_proj", "mlp/down"),
    _norm("input_layernorm", "input_norm"),
    _norm("post_attention_layernorm", "post_norm"),
    _norm("post_feedforward_layernorm", "post_mlp_norm"),
    Rule("[model.]norm.weight", "params/norm/scale"),
    Rule("lm_head.weight", "params/embed_tokens/embedding", "tied",
         "head=lm&tie_word_embeddings=True"),
    Rule("lm_head.weight", "params/lm_head/kernel", "transpose",
         "head=lm&tie_word_embeddings=False"),
    Rule("score.weight", "params/classifier/kernel", "transpose", "head=classify"),
    Rule(_LAYER + "self_attn.rotary_emb.inv_freq", transform="keep"),  # files of before 2024
]
SURGERY = {
    "vocab_size": Surgery("vocab_size", ("params/embed_tokens/embedding",
                                         ("params/lm_head/kernel", 1))),
    "depth": Surgery("num_hidden_layers", ("params",)),
}


class Variant(NamedTuple):
  """What a model type's code computes, as opposed to what its config.json says.

  Attributes:
    qkv_bias, output_bias, mlp_bias: a field of Config that says so, or True or False.
    qk_norm: RMS norm of queries and keys: "" none, "head" each head, "all" features together.
    post_norm: norms stand after attention and feed-forward part instead of before.
    joined: query, key and value are one matrix in the file, gate and up another.
    windows: "" none, "all" layers, or by "layer_types".
    partial: part of a head may be rotated.
    dropout: on what attention and feed-forward part add.
    theta: of rotary positions where config.json is silent.
  """

  qkv_bias: str | bool = "attention_bias"
  output_bias: str | bool = "attention_bias"
  mlp_bias: str | bool = False
  qk_norm: str = ""
  post_norm: bool = False
  joined: bool = False
  windows: str = ""
  partial: bool = False
  dropout: bool = False
  theta: float = 10000.0


VARIANTS = {
    "llama": Variant(mlp_bias="mlp_bias"),
    "mistral": Variant(qkv_bias=False, output_bias=False, windows="all"),
    "qwen2": Variant(qkv_bias=True, output_bias=False, windows="layer_types"),
    "qwen3": Variant(qk_norm="head", windows="layer_types"),
    "smollm3": Variant(mlp_bias="mlp_bias", windows="layer_types", theta=2000000.0),
    "phi3": Variant(qkv_bias=False, output_bias=False, joined=True, windows="all", partial=True,
                    dropout=True),
    "olmo2": Variant(qk_norm="all", post_norm=True),
}
_QWEN = dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
             max_position_embeddings=32768, sliding_window=4096, bos_token_id=None,
             eos_token_id=None)


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' LlamaConfig and its relatives that matter here.

  Attributes:
    rope: of all layers that have positions; from rope_parameters, or rope_theta and rope_scaling.
    layer_types: "sliding_attention" or "full_attention" for each layer, where windows differ.
    no_rope_layers: smollm3: 1 for each layer with rotary positions, 0 for one without.
  """

  model_type: str = "llama"
  vocab_size: int = 32000
  hidden_size: int = 4096
  intermediate_size: int = 11008
  num_hidden_layers: int = 32
  num_attention_heads: int = 32
  num_key_value_heads: int | None = None
  head_dim: int | None = None
  hidden_act: str = "silu"
  max_position_embeddings: int = 2048
  original_max_position_embeddings: int | None = None
  initializer_range: float = 0.02
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  attention_dropout: float = 0.0
  resid_pdrop: float = 0.0
  use_sliding_window: bool = False
  sliding_window: int | None = None
  max_window_layers: int = 28
  layer_types: tuple | None = None
  no_rope_layers: tuple | None = None
  no_rope_layer_interval: int = 4
  pad_token_id: int | None = None
  bos_token_id: int | None = 1
  eos_token_id: int | tuple | None = 2
  rope: rotary.Rope | None = None

  PREFIXES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
              "smollm3": "SmolLM3", "phi3": "Phi3", "olmo2": "Olmo2"}
  HEADS = {"none": ("{}Model",), "lm": ("{}ForCausalLM",),
           "classify": ("{}ForSequenceClassification",)}
  DEFAULTS = {
      "mistral": dict(intermediate_size=14336, num_key_value_heads=8, sliding_window=4096,
                      max_position_embeddings=131072),
      "qwen2": _QWEN,
      "qwen3": dict(_QWEN, head_dim=128),
      "smollm3": dict(vocab_size=128256, hidden_size=2048, num_hidden_layers=36,
                      num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True,
                      max_position_embeddings=32768, pad_token_id=128004, bos_token_id=128000,
                      eos_token_id=128001),
      "phi3": dict(vocab_size=32064, hidden_size=3072, intermediate_size=8192,
                   max_position_embeddings=4096, original_max_position_embeddings=4096,
                   rms_norm_eps=1e-5, pad_token_id=32000, eos_token_id=32000),
      "olmo2": dict(vocab_size=50304, rms_norm_eps=1e-5, pad_token_id=1, bos_token_id=None,
                    eos_token_id=50279),
  }
  OURS = ("rope",)

  def __post_init__(self):
    super().__post_init__()
    heads = self.num_attention_heads
    filled = {"num_key_value_heads": self.num_key_value_heads or heads,
              "head_dim": self.head_dim or self.hidden_size // max(heads, 1)}
    filled["rope"] = self.rope or rotary.Rope(filled["head_dim"], self.variant.theta)
    for name in ("layer_types", "no_rope_layers"):  # as many as there are layers after surgery
      if values := getattr(self, name):
        filled[name] = (values + values[-1:] * self.num_hidden_layers)[:self.num_hidden_layers]
    for name, value in filled.items():
      object.__setattr__(self, name, value)

  @property
  def variant(self) -> Variant:
    """What the model type's code computes."""
    if self.model_type not in VARIANTS:
      raise errors.UserError(f"config.json: model_type {self.model_type!r} is no Llama; those are "
                             + ", ".join(VARIANTS))
    return VARIANTS[self.model_type]

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    known = cls(**values)
    lengths = {key: getattr(known, key) for key in (
        "max_position_embeddings", "original_max_position_embeddings")}
    return {"rope": rotary.Rope.from_hf({**hf, **lengths}, known.head_dim, known.variant.theta)}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_act", layers.ACTIVATIONS)
    base.multiple(self, "num_attention_heads", "num_key_value_heads")
    if not hf.get("head_dim"):
      base.multiple(self, "hidden_size", "num_attention_heads")
    base.only(hf, "quantization_config", None)
    if self.rope.size != self.head_dim and not self.variant.partial:
      raise errors.UserError(f"config.json: partial_rotary_factor is not supported for "
                             f"{self.model_type}, whose reference implementation ignores it")
    for key in ("layer_types", "no_rope_layers"):
      if hf.get(key) and len(hf[key]) != self.num_hidden_layers:
        raise errors.UserError(f"config.json: {key} has {len(hf[key])} entries for "
                               f"{self.num_hidden_layers} layers")
    if set(self.layer_types or ()) - {SLIDING, FULL}:
      raise errors.UserError(f"config.json: layer_types should be {SLIDING} or {FULL}, not "
                             + ", ".join(sorted(set(self.layer_types))))
    if None in self.windows():
      raise errors.UserError(f"config.json: layer_types has {SLIDING}, but there is no "
                             "sliding_window")

  def windows(self) -> list:
    """Returns how many tokens each layer sees; NO_WINDOW for all, None where none is stated."""
    count, kind = self.num_hidden_layers, self.variant.windows
    window = self.sliding_window
    if kind != "layer_types":
      return [window if kind == "all" and window else attention.NO_WINDOW] * count
    if self.model_type != "smollm3" and not self.use_sliding_window:
      window = None
    types = self.layer_types or [self._default_type(i, window) for i in range(count)]
    return [window if kind == SLIDING else attention.NO_WINDOW for kind in types]

  def rotated(self) -> list:
    """Returns 1 for each layer with rotary positions and 0 for each without."""
    if self.model_type != "smollm3":
      return [1] * self.num_hidden_layers
    if self.no_rope_layers:
      return [int(bool(on)) for on in self.no_rope_layers]
    every = self.no_rope_layer_interval
    return [int((i + 1) % every != 0) for i in range(self.num_hidden_layers)]

  def _default_type(self, layer: int, window) -> str:
    if self.model_type == "smollm3":
      sliding = self.use_sliding_window and window and not self.rotated()[layer]
    else:
      sliding = window and layer >= self.max_window_layers
    return SLIDING if sliding else FULL

  def biased(self, part: str) -> bool:
    """Returns whether "qkv", "output" or "mlp" have biases."""
    said = getattr(self.variant, part + "_bias")
    return getattr(self, said) if isinstance(said, str) else said

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with the dropout rates that its model type has set."""
    residual = rate if self.variant.dropout else self.resid_pdrop
    return dataclasses.replace(self, attention_dropout=rate, resid_pdrop=residual)

  def to_hf(self) -> dict:
    """Returns what config.json holds; transformers opens it."""
    hf = super().to_hf()
    if self.source == "{}":  # not read from a file: the rope stands nowhere else
      hf["rope_parameters"] = self.rope.to_hf(self.head_dim)
    return hf


class Attention(nn.Module):
  """Causal self-attention with rotary positions: x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, angles, window):
    c, compute = self.config, self.compute
    q, k, v = self._project(x)
    q, k = rotary.rotate(q, *angles), rotary.rotate(k, *angles)
    k, v = layers.cached(self, k, v, mask.offset)
    y = attention.attention(q, k, v, mask, window=window, drop=layers.Dropout(c.attention_dropout),
                            implementation=compute.attention)
    y = y.reshape(*x.shape[:2], -1)
    return decoder.linear(c, compute, c.hidden_size, c.biased("output"), "output")(y)

  def _project(self, x) -> tuple:
    """Returns q (B, T, H, F), k and v (B, T, K, F), before rotation."""
    c, compute, kind = self.config, self.compute, self.config.variant.qk_norm
    sizes = [heads * c.head_dim for heads in (
        c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)]
    if c.variant.joined:
      y = decoder.linear(c, compute, sum(sizes), c.biased("qkv"), "qkv")(x)
      q, k, v = jnp.split(y, [sizes[0], sizes[0] + sizes[1]], axis=-1)
    else:
      names = ("query", "key", "value")
      q, k, v = layers.fused([decoder.linear(c, compute, size, c.biased("qkv"), name)
                              for size, name in zip(sizes, names, strict=True)], x)
    if kind == "all":
      q, k = norm(c, compute, "query_norm")(q), norm(c, compute, "key_norm")(k)
    q, k, v = (y.reshape(*x.shape[:2], -1, c.head_dim) for y in (q, k, v))
    if kind == "head":
      q, k = norm(c, compute, "query_norm")(q), norm(c, compute, "key_norm")(k)
    return q, k, v


class MLP(nn.Module):
  """The gated feed-forward part (Shazeer 2020, arXiv:2002.05202): x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, compute, bias = self.config, self.compute, self.config.biased("mlp")
    if c.variant.joined:
      y = decoder.linear(c, compute, 2 * c.intermediate_size, bias, "gate_up")(x)
      gate, up = jnp.split(y, 2, axis=-1)
    else:
      gate, up = layers.fused([decoder.linear(c, compute, c.intermediate_size, bias, name)
                               for name in ("gate", "up")], x)
    y = layers.ACTIVATIONS[c.hidden_act](gate) * up
    return decoder.linear(c, compute, c.hidden_size, bias, "down")(y)


class Layer(nn.Module):
  """Attention and feed-forward part, each with a norm before (or after) it and a residual."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, angles, window=None, rotated=None):
    """Applies the layer.

    Args:
      x: (B, T, D).
      mask: attention.Mask.
      angles: (cos, sin), each (B, T, 1, F / 2).
      window: how many tokens it sees; None: as all layers.
      rotated: 0 in a layer without positions; None: all have them.
    """
    c, compute, after = self.config, self.compute, self.config.variant.post_norm
    drop = layers.Dropout(c.resid_pdrop if c.variant.dropout else 0.0)
    window = c.windows()[0] if window is None else window
    if rotated is not None:
      angles = jnp.where(rotated, angles[0], 1), jnp.where(rotated, angles[1], 0)
    y = x if after else norm(c, compute, "input_norm")(x)
    y = Attention(c, compute, name="attention")(y, mask, angles, window)
    x = x + drop(norm(c, compute, "post_norm")(y) if after else y)
    y = x if after else norm(c, compute, "post_norm")(x)
    y = MLP(c, compute, name="mlp")(y)
    return x + drop(norm(c, compute, "post_mlp_norm")(y) if after else y)


class Model(decoder.Decoder):
  """A Llama, see `decoder.Decoder`."""

  def setup(self):
    c, compute = self.config, self.compute
    init = nn.initializers.normal(c.initializer_range)
    self.embed_tokens = layers.Embedding(c.vocab_size, c.hidden_size, compute.dtype, init)
    self.norm = norm(c, compute)
    if c.head == "lm" and not c.tie_word_embeddings:
      self.lm_head = decoder.linear(c, compute, c.vocab_size, False)
    if c.num_labels:
      self.classifier = decoder.linear(c, compute, c.num_labels, False)

  def body(self, input_ids, position_ids, mask):
    c, compute, slots = self.config, self.compute, None
    if mask.offset is not None and c.rope.kind == "longrope":
      if mask.padding is None:
        raise ValueError("longrope with a cache needs an attention_mask of all its slots")
      slots = mask.padding.shape[1]
    angles = rotary.angles(c.rope, position_ids, compute.dtype, slots)
    each = {"window": c.windows()} if len(set(c.windows())) > 1 else {}
    each |= {"rotated": c.rotated()} if 0 in c.rotated() else {}
    return layers.run_layers(functools.partial(Layer, c, compute), c.num_hidden_layers, compute,
                             self.embed_tokens(input_ids), mask, angles, each=each)


def norm(config, compute, name=None) -> layers.RMSNorm:
  """Returns a norm with the config's epsilon."""
  return layers.RMSNorm(config.rms_norm_eps, compute.dtype, name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  return decoder.probe_tokens(config.vocab_size)
