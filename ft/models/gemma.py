"""Gemma, Gemma 2 and the text part of Gemma 3: decoders with norms around every part.

    gemma        a norm before each part, as Llama (Gemma team 2024, arXiv:2403.08295)
    gemma2       norms after each part, too; every other layer sees a window; attention scores and
                 logits are capped (arXiv:2408.00118)
    gemma3_text  RMS norm of queries and keys instead of the caps; five layers with a window to one
                 without, with rotary positions of their own (arXiv:2503.19786)
    gemma3       a checkpoint of text and images, of which the text part is read

Follows transformers' `models/{gemma,gemma2,gemma3}/modeling_*.py` (Apache-2.0) in names, defaults
and arithmetic. Norms hold their scale's distance from one; word vectors are scaled by sqrt(D).
Shapes: B batch, T tokens, S slots of the cache or T without one, D hidden size, H heads, K key
heads, F features of a head, V vocabulary, C labels.
"""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax.numpy as jnp

from ft import errors
from ft.models import attention, base, decoder, layers
from ft.models import rope as rotary
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "text"
MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3")
HEAD = ("params/classifier",)
SURGERY = {
    "vocab_size": Surgery("vocab_size", ("params/embed_tokens/embedding",
                                         ("params/lm_head/kernel", 1))),
    "depth": Surgery("num_hidden_layers", ("params",)),
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
_BASE = "[model.|language_model.model.]"
_LAYER, _OURS = _BASE + "layers.{i}.", "params/layer_{i}/"


def _linear(theirs: str, ours: str) -> list[Rule]:
  return base.linear_rules(_LAYER + theirs, _OURS + ours)


def _norm(theirs: str, ours: str, only: str = "") -> Rule:
  return Rule(_LAYER + theirs + ".weight", _OURS + ours + "/scale", only=only)


NAMES = [
    Rule(_BASE + "embed_tokens.weight", "params/embed_tokens/embedding"),
    *_linear("self_attn.q_proj", "attention/query"),
    *_linear("self_attn.k_proj", "attention/key"),
    *_linear("self_attn.v_proj", "attention/value"),
    *_linear("self_attn.o_proj", "attention/output"),
    _norm("self_attn.q_norm", "attention/query_norm"),
    _norm("self_attn.k_norm", "attention/key_norm"),
    *_linear("mlp.gate_proj", "mlp/gate"),
    *_linear("mlp.up_proj", "mlp/up"),
    *_linear("mlp.down_proj", "mlp/down"),
    _norm("input_layernorm", "input_norm"),
    # In Gemma it stands before the feed-forward part, whatever its name says.
    _norm("post_attention_layernorm", "mlp_norm", "model_type=gemma"),
    _norm("post_attention_layernorm", "post_norm", "model_type=gemma2|gemma3_text"),
    _norm("pre_feedforward_layernorm", "mlp_norm", "model_type=gemma2|gemma3_text"),
    _norm("post_feedforward_layernorm", "post_mlp_norm"),
    Rule(_LAYER + "self_attn.rotary_emb.inv_freq", transform="keep"),  # files of before 2024
    Rule(_BASE + "norm.weight", "params/norm/scale"),
    Rule("lm_head.weight", "params/embed_tokens/embedding", "tied",
         "head=lm&tie_word_embeddings=True"),
    Rule("lm_head.weight", "params/lm_head/kernel", "transpose",
         "head=lm&tie_word_embeddings=False"),
    Rule("score.weight", "params/classifier/kernel", "transpose", "head=classify"),
    # The part of a checkpoint that sees images.
    Rule("vision_tower.{*}", transform="ignore"),
    Rule("multi_modal_projector.{*}", transform="ignore"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' Gemma2Config and its relatives that matter here.

  Attributes:
    layer_types: "sliding_attention" or "full_attention" for each layer; None: as is usual.
    sliding_window_pattern: gemma3_text: one layer of so many sees everything, if layer_types is
      None.
    use_bidirectional_attention: gemma3_text: an encoder; windows then reach to both sides together.
    rope, local_rope: rotary positions of all layers, or of those with and without a window.
    nested: it was the text part of a checkpoint of text and images.
  """

  model_type: str = "gemma2"
  vocab_size: int = 256000
  hidden_size: int = 2304
  intermediate_size: int = 9216
  num_hidden_layers: int = 26
  num_attention_heads: int = 8
  num_key_value_heads: int = 4
  head_dim: int = 256
  hidden_activation: str = "gelu_pytorch_tanh"
  max_position_embeddings: int = 8192
  initializer_range: float = 0.02
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = True
  attention_bias: bool = False
  attention_dropout: float = 0.0
  query_pre_attn_scalar: float = 256
  sliding_window: int | None = 4096
  sliding_window_pattern: int = 6
  layer_types: tuple | None = None
  final_logit_softcapping: float | None = 30.0
  attn_logit_softcapping: float | None = 50.0
  use_bidirectional_attention: bool = False
  pad_token_id: int | None = 0
  bos_token_id: int | None = 2
  eos_token_id: int | tuple | None = 1
  rope: rotary.Rope | None = None
  local_rope: rotary.Rope | None = None
  nested: bool = dataclasses.field(default=False, compare=False)

  PREFIXES = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text"}
  HEADS = {"none": ("{}Model",), "lm": ("{}ForCausalLM", "Gemma3ForCausalLM"),
           "classify": ("{}ForSequenceClassification",)}
  DEFAULTS = {
      "gemma": dict(hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
                    num_attention_heads=16, num_key_value_heads=16, sliding_window=None,
                    final_logit_softcapping=None, attn_logit_softcapping=None),
      "gemma3_text": dict(vocab_size=262208, max_position_embeddings=131072,
                          final_logit_softcapping=None, attn_logit_softcapping=None),
  }
  ALIASES = {"hidden_activation": ("hidden_act",)}
  OURS = ("rope", "local_rope", "nested")

  def __post_init__(self):
    super().__post_init__()
    types = self.layer_types or tuple(map(self._usual_type, range(self.num_hidden_layers)))
    types = (types + types[-1:] * self.num_hidden_layers)[:self.num_hidden_layers]
    theta = 1000000.0 if self.model_type == "gemma3_text" else 10000.0
    filled = {"layer_types": types, "rope": self.rope or rotary.Rope(self.head_dim, theta),
              "local_rope": self.local_rope or rotary.Rope(self.head_dim)}
    for name, value in filled.items():
      object.__setattr__(self, name, value)

  def _usual_type(self, layer: int) -> str:
    every = {"gemma": 1, "gemma2": 2}.get(self.model_type, self.sliding_window_pattern)
    return LOCAL if (layer + 1) % max(every, 1) else GLOBAL

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    # A null says that there is none, where a missing key means the default.
    made = {key: None for key in ("sliding_window", "final_logit_softcapping",
                                  "attn_logit_softcapping") if key in hf and hf[key] is None}
    made["nested"] = hf.get("nested", False)
    if values["model_type"] == "gemma":  # its first files say gelu and mean the approximation
      made["hidden_activation"] = {"gelu": "gelu_pytorch_tanh"}.get(
          hf.get("hidden_act"), hf.get("hidden_act") or "gelu_pytorch_tanh")
      made["layer_types"] = None
    known = cls(**{**values, **made})
    length = {"max_position_embeddings": known.max_position_embeddings}
    if values["model_type"] != "gemma3_text":
      return {**made, "rope": rotary.Rope.from_hf({**hf, **length}, known.head_dim)}
    stated = hf.get("rope_parameters") or {}
    if stated.keys() - {LOCAL, GLOBAL}:
      raise errors.UserError(f"config.json: rope_parameters should be given for {GLOBAL} and "
                             f"{LOCAL}, not {', '.join(stated)}")
    far = {**(stated.get(GLOBAL) or {}), **(hf.get("rope_scaling") or {})}
    made["rope"] = rotary.Rope.from_hf({"rope_parameters": far, **length}, known.head_dim,
                                       hf.get("rope_theta") or 1000000.0)
    near = {"rope_parameters": stated.get(LOCAL), **length}
    made["local_rope"] = rotary.Rope.from_hf(near, known.head_dim,
                                             hf.get("rope_local_base_freq") or 10000.0)
    return made

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_activation", layers.ACTIVATIONS)
    base.multiple(self, "num_attention_heads", "num_key_value_heads")
    base.only(hf, "quantization_config", None)
    if self.model_type == "gemma":
      base.only(hf, "hidden_activation", self.hidden_activation)
    if self.model_type == "gemma3_text":
      base.only(hf, "attn_logit_softcapping", None)  # the reference does not apply it
    else:
      base.only(hf, "use_bidirectional_attention", False)
    if self.nested:
      base.only(hf, "final_logit_softcapping", None)  # the reference applies it to text alone
    for turns in (self.rope, self.local_rope):
      if turns.size != self.head_dim:
        raise errors.UserError("config.json: partial_rotary_factor is not supported")
    if hf.get("layer_types") and len(hf["layer_types"]) != self.num_hidden_layers:
      raise errors.UserError(f"config.json: layer_types has {len(hf['layer_types'])} entries for "
                             f"{self.num_hidden_layers} layers")
    if unknown := set(self.layer_types) - {LOCAL, GLOBAL}:
      raise errors.UserError(f"config.json: layer_types should be {LOCAL} or {GLOBAL}, not "
                             + ", ".join(map(repr, sorted(unknown))))
    if LOCAL in self.layer_types and not self.sliding_window:
      raise errors.UserError(f"config.json: layer_types has {LOCAL}, but there is no "
                             "sliding_window")

  def windows(self) -> list:
    """Returns how far each layer sees, as attention.attention takes it."""
    near = self.sliding_window
    if self.use_bidirectional_attention and near:
      near = near // 2
    return [near if kind == LOCAL else attention.NO_WINDOW for kind in self.layer_types]

  def to_hf(self) -> dict:
    """Returns what config.json holds; transformers opens it."""
    hf = super().to_hf()
    hf.pop("nested", None)
    if hf.get("architectures") == ["Gemma3TextForCausalLM"]:
      hf["architectures"] = ["Gemma3ForCausalLM"]  # it has no class of that name
    if self.source == "{}":  # not read from a file: the positions stand nowhere else
      far, near = self.rope.to_hf(self.head_dim), self.local_rope.to_hf(self.head_dim)
      hf["rope_parameters"] = {GLOBAL: far, LOCAL: near} if self.two_ropes else far
    return hf

  @property
  def two_ropes(self) -> bool:
    """Whether layers with a window have rotary positions of their own."""
    return self.model_type == "gemma3_text"

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with its dropout rate set."""
    return dataclasses.replace(self, attention_dropout=rate)


class Attention(nn.Module):
  """Causal self-attention with rotary positions: x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, angles, window):
    c, compute = self.config, self.compute
    q, k, v = layers.fused([decoder.linear(c, compute, heads * c.head_dim, c.attention_bias, name)
                            for name, heads in (("query", c.num_attention_heads),
                                                ("key", c.num_key_value_heads),
                                                ("value", c.num_key_value_heads))], x)
    q, k, v = (y.reshape(*x.shape[:2], -1, c.head_dim) for y in (q, k, v))
    if c.model_type == "gemma3_text":
      q, k = norm(c, compute, "query_norm")(q), norm(c, compute, "key_norm")(k)
    q, k = rotary.rotate(q, *angles), rotary.rotate(k, *angles)
    k, v = layers.cached(self, k, v, mask.offset)
    size = c.head_dim if c.model_type == "gemma" else c.query_pre_attn_scalar
    y = attention.attention(q, k, v, mask, window=window, scale=size**-0.5,
                            softcap=c.attn_logit_softcapping or 0.0,
                            drop=layers.Dropout(c.attention_dropout),
                            implementation=compute.attention)
    y = y.reshape(*x.shape[:2], -1)
    return decoder.linear(c, compute, c.hidden_size, c.attention_bias, "output")(y)


class MLP(nn.Module):
  """The gated feed-forward part (Shazeer 2020, arXiv:2002.05202): x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, compute = self.config, self.compute
    gate, up = layers.fused([decoder.linear(c, compute, c.intermediate_size, False, name)
                             for name in ("gate", "up")], x)
    y = layers.ACTIVATIONS[c.hidden_activation](gate) * up
    return decoder.linear(c, compute, c.hidden_size, False, "down")(y)


class Layer(nn.Module):
  """Attention and feed-forward part, each between norms (Gemma: behind one) and with a residual."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, angles, window=None, local=0):
    """Applies the layer.

    Args:
      x: (B, T, D).
      mask: attention.Mask.
      angles: two (cos, sin), each (B, T, 1, F / 2), of layers without and with a window.
      window: how far it sees; None: as all layers.
      local: 1 in a layer with a window, else 0.
    """
    c, compute, after = self.config, self.compute, self.config.model_type != "gemma"
    window = c.windows()[0] if window is None else window
    angles = [jnp.where(local, near, far) for far, near in zip(*angles, strict=True)]
    y = norm(c, compute, "input_norm")(x)
    y = Attention(c, compute, name="attention")(y, mask, angles, window)
    x = x + (norm(c, compute, "post_norm")(y) if after else y)
    y = MLP(c, compute, name="mlp")(norm(c, compute, "mlp_norm")(x))
    return x + (norm(c, compute, "post_mlp_norm")(y) if after else y)


class Model(decoder.Decoder):
  """A Gemma, see `decoder.Decoder`."""

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
    c, compute = self.config, self.compute
    mask = mask.replace(causal=not c.use_bidirectional_attention)
    far = rotary.angles(c.rope, position_ids, compute.dtype)
    near = rotary.angles(c.local_rope, position_ids, compute.dtype) if c.two_ropes else far
    windows, each = c.windows(), {}
    if len(set(c.layer_types)) > 1:
      each = {"window": windows, "local": [int(kind == LOCAL) for kind in c.layer_types]}
    elif LOCAL in c.layer_types:
      far = near
    x = self.embed_tokens(input_ids)
    x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)  # rounded to that dtype, as upstream does
    return layers.run_layers(functools.partial(Layer, c, compute), c.num_hidden_layers, compute,
                             x, mask, (far, near), each=each)

  def lm_logits(self, hidden):
    """Returns the scores (…, V) float32 of the next token, for last_hidden_state (…, D)."""
    logits, cap = super().lm_logits(hidden), self.config.final_logit_softcapping
    return jnp.tanh(logits / cap) * cap if cap else logits


def norm(config, compute, name=None) -> layers.RMSNorm:
  """Returns a norm whose parameter is its scale's distance from one."""
  return layers.RMSNorm(config.rms_norm_eps, compute.dtype, 1.0, name=name)


def complete(hf: dict, folder: pathlib.Path) -> dict:
  """Returns config.json's content; of a checkpoint of text and images, that of the text part."""
  del folder
  if hf.get("model_type") != "gemma3":
    return hf
  if not isinstance(hf.get("text_config"), dict):
    raise errors.UserError("config.json: a gemma3 should have a text_config")
  classes = {"Gemma3Model": "Gemma3TextModel",
             "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
             "Gemma3ForSequenceClassification": "Gemma3TextForSequenceClassification"}
  shared = {key: hf[key] for key in (
      "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "id2label",
      "label2id", "tie_word_embeddings", "transformers_version") if key in hf}
  return {**hf["text_config"], **shared, "model_type": "gemma3_text", "nested": True,
          "architectures": [classes.get(name, name) for name in hf.get("architectures") or ()]}


def prefixed(config: Config) -> bool | str | None:
  """Returns the name of the decoder in export, `model.` under a head, as in transformers' class."""
  if config.head != "none":
    return "model."
  return False if config.nested else None


def companions(config: Config, files: dict) -> dict:
  """Returns the files beside weights and config.json; a text part has no use for images'."""
  return {name: content for name, content in files.items()
          if not (config.nested and name.endswith("processor_config.json"))}


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  return decoder.probe_tokens(config.vocab_size)
