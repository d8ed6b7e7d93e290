"""GPT-2 (Radford et al. 2019), the decoder with learned positions.

Follows transformers' `models/gpt2/modeling_gpt2.py` (Apache-2.0) in names, defaults, arithmetic and
the places of dropout. Its matrices are stored as kernels (in, out), unlike other models'.
Shapes: B batch, T tokens, S slots of the cache or T without one, D hidden size, H heads, V
vocabulary, C labels.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp

from ft import errors
from ft.models import attention, base, decoder, layers
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "text"
MODEL_TYPES = ("gpt2",)
HEAD = ("params/classifier",)

_LAYER, _OURS = "[transformer.]h.{i}.", "params/layer_{i}/"


def _linear(theirs: str, ours: str) -> list[Rule]:
  return [Rule(_LAYER + theirs + ".weight", _OURS + ours + "/kernel"),
          Rule(_LAYER + theirs + ".bias", _OURS + ours + "/bias")]


def _norm(theirs: str, ours: str) -> list[Rule]:
  return [Rule(theirs + ".weight", ours + "/scale"), Rule(theirs + ".bias", ours + "/bias")]


NAMES = [
    Rule("[transformer.]wte.weight", "params/embed_tokens/embedding"),
    Rule("[transformer.]wpe.weight", "params/embed_positions/embedding"),
    *_norm(_LAYER + "ln_1", _OURS + "input_norm"),
    *_linear("attn.c_attn", "attention/qkv"),
    *_linear("attn.c_proj", "attention/output"),
    *_norm(_LAYER + "ln_2", _OURS + "post_norm"),
    *_linear("mlp.c_fc", "mlp/up"),
    *_linear("mlp.c_proj", "mlp/down"),
    *_norm("[transformer.]ln_f", "params/norm"),
    Rule("lm_head.weight", "params/embed_tokens/embedding", "tied",
         "head=lm&tie_word_embeddings=True"),
    Rule("lm_head.weight", "params/lm_head/kernel", "transpose",
         "head=lm&tie_word_embeddings=False"),
    Rule("score.weight", "params/classifier/kernel", "transpose", "head=classify"),
    # The causal mask and its value, which older files hold.
    Rule(_LAYER + "attn.(bias|masked_bias)", transform="keep"),
]
SURGERY = {
    "vocab_size": Surgery("vocab_size", ("params/embed_tokens/embedding",
                                         ("params/lm_head/kernel", 1))),
    "depth": Surgery("n_layer", ("params",)),
}


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' GPT2Config that matter here.

  Attributes:
    n_inner: width of the feed-forward part; None: four times n_embd.
    scale_attn_weights: scores are divided by the root of a head's size.
    scale_attn_by_inverse_layer_idx: and by the layer's number, from one.
  """

  model_type: str = "gpt2"
  vocab_size: int = 50257
  n_positions: int = 1024
  n_embd: int = 768
  n_layer: int = 12
  n_head: int = 12
  n_inner: int | None = None
  activation_function: str = "gelu_new"
  resid_pdrop: float = 0.1
  embd_pdrop: float = 0.1
  attn_pdrop: float = 0.1
  layer_norm_epsilon: float = 1e-5
  initializer_range: float = 0.02
  scale_attn_weights: bool = True
  scale_attn_by_inverse_layer_idx: bool = False
  tie_word_embeddings: bool = True
  bos_token_id: int | None = 50256
  eos_token_id: int | tuple | None = 50256
  pad_token_id: int | None = None

  PREFIXES = {"gpt2": "GPT2"}
  HEADS = {"none": ("{}Model",), "lm": ("{}LMHeadModel",),
           "classify": ("{}ForSequenceClassification",)}
  ALIASES = {"n_embd": ("hidden_size",), "n_layer": ("num_hidden_layers",),
             "n_head": ("num_attention_heads",), "n_positions": ("max_position_embeddings",)}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "activation_function", layers.ACTIVATIONS)
    base.multiple(self, "n_embd", "n_head")
    base.only(hf, "add_cross_attention", False)

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate)


class Attention(nn.Module):
  """Causal self-attention: x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, divisor):
    c, compute = self.config, self.compute
    y = linear(c, compute, 3 * c.n_embd, "qkv")(x)
    q, k, v = (part.reshape(*x.shape[:2], c.n_head, -1) for part in jnp.split(y, 3, axis=-1))
    if divisor is not None:
      q = q / jnp.asarray(divisor, q.dtype)
    k, v = layers.cached(self, k, v, mask.offset)
    y = attention.attention(q, k, v, mask, scale=None if c.scale_attn_weights else 1.0,
                            drop=layers.Dropout(c.attn_pdrop), implementation=compute.attention)
    return linear(c, compute, c.n_embd, "output", last=True)(y.reshape(x.shape))


class MLP(nn.Module):
  """The feed-forward part: x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, compute = self.config, self.compute
    inner = 4 * c.n_embd if c.n_inner is None else c.n_inner
    y = layers.ACTIVATIONS[c.activation_function](linear(c, compute, inner, "up")(x))
    return linear(c, compute, c.n_embd, "down", last=True)(y)


class Layer(nn.Module):
  """Attention and feed-forward part, each with a norm before it and a residual."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, divisor=None):
    """Applies the layer; `divisor` of the scores is its number, from one, or None."""
    c, compute, drop = self.config, self.compute, layers.Dropout(self.config.resid_pdrop)
    y = norm(c, compute, "input_norm")(x)
    x = x + drop(Attention(c, compute, name="attention")(y, mask, divisor))
    y = norm(c, compute, "post_norm")(x)
    return x + drop(MLP(c, compute, name="mlp")(y))


class Model(decoder.Decoder):
  """GPT-2, see `decoder.Decoder`."""

  def setup(self):
    c, compute = self.config, self.compute
    init = nn.initializers.normal(c.initializer_range)
    self.embed_tokens = layers.Embedding(c.vocab_size, c.n_embd, compute.dtype, init)
    self.embed_positions = layers.Embedding(c.n_positions, c.n_embd, compute.dtype, init)
    self.dropout = layers.Dropout(c.embd_pdrop)
    self.norm = norm(c, compute)
    if c.head == "lm" and not c.tie_word_embeddings:
      self.lm_head = linear(c, compute, c.vocab_size, bias=False)
    if c.num_labels:
      self.classifier = linear(c, compute, c.num_labels, bias=False)

  def body(self, input_ids, position_ids, mask):
    c, compute = self.config, self.compute
    divided = c.scale_attn_by_inverse_layer_idx
    each = {"divisor": [float(i + 1) for i in range(c.n_layer)]} if divided else {}
    x = self.dropout(self.embed_tokens(input_ids) + self.embed_positions(position_ids))
    return layers.run_layers(functools.partial(Layer, c, compute), c.n_layer, compute, x, mask,
                             each=each)

  def positions(self, length, cache_index):
    """Returns the positions (1, T); UserError for more tokens than the model has positions."""
    limit = self.config.n_positions
    if isinstance(length, int) and length > limit:  # it is symbolic in an export
      raise errors.UserError(f"a text of {length} tokens; the model has {limit} positions")
    return super().positions(length, cache_index)


def linear(config, compute, features, name=None, bias=True, last=False) -> layers.Linear:
  """Returns a linear layer; `last` ones, which add to the residual, start smaller with depth."""
  spread = config.initializer_range * ((2 * config.n_layer)**-0.5 if last else 1.0)
  return layers.Linear(features, bias, compute.dtype, nn.initializers.normal(spread), name=name)


def norm(config, compute, name=None) -> layers.LayerNorm:
  """Returns a norm with the config's epsilon."""
  return layers.LayerNorm(config.layer_norm_epsilon, compute.dtype, name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  return decoder.probe_tokens(config.vocab_size, min(12, config.n_positions))
