"""BERT (Devlin et al. 2018, arXiv:1810.04805), the encoder of many sentence embedding models.

Follows transformers' `modeling_bert.py` (Apache-2.0) in names, defaults and places of dropout.
Shapes: B batch, T tokens, D hidden size, C labels.
"""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ft import errors
from ft.models import layers
from ft.weights.names import Rule

MODALITY = "text"
MODEL_TYPES = ("bert",)
HEAD = ("params/classifier",)


@dataclasses.dataclass(frozen=True)
class Config:
  vocab_size: int = 30522
  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  intermediate_size: int = 3072
  hidden_act: str = "gelu"
  hidden_dropout_prob: float = 0.1
  attention_probs_dropout_prob: float = 0.1
  classifier_dropout: float | None = None
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  initializer_range: float = 0.02
  num_labels: int = 0
  pooling: str = "cls"
  pooler: bool = True


class Embeddings(nn.Module):
  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids, token_type_ids):
    c = self.config
    init = nn.initializers.normal(c.initializer_range)

    def table(size, name):
      return layers.Embedding(size, c.hidden_size, self.dtype, init, name=name)

    x = table(c.vocab_size, "word")(input_ids)
    x = x + table(c.type_vocab_size, "token_type")(token_type_ids)
    x = x + table(c.max_position_embeddings, "position")(jnp.arange(input_ids.shape[1]))
    x = layers.LayerNorm(c.layer_norm_eps, self.dtype, name="norm")(x)
    return layers.Dropout(c.hidden_dropout_prob)(x)


class Attention(nn.Module):
  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, bias):
    c = self.config
    init = nn.initializers.normal(c.initializer_range)

    def linear(name):
      return layers.Linear(c.hidden_size, dtype=self.dtype, kernel_init=init, name=name)

    qkv = layers.fused([linear("query"), linear("key"), linear("value")], x)
    heads = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
    q, k, v = (y.reshape(*x.shape[:2], *heads) for y in qkv)
    y = layers.attention(q, k, v, bias, layers.Dropout(c.attention_probs_dropout_prob))
    y = linear("output")(y.reshape(x.shape))
    y = layers.Dropout(c.hidden_dropout_prob)(y)
    return layers.LayerNorm(c.layer_norm_eps, self.dtype, name="norm")(x + y)


class Layer(nn.Module):
  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, bias):
    c = self.config
    init = nn.initializers.normal(c.initializer_range)

    def linear(features, name):
      return layers.Linear(features, dtype=self.dtype, kernel_init=init, name=name)

    x = Attention(c, self.dtype, name="attention")(x, bias)
    y = layers.ACTIVATIONS[c.hidden_act](linear(c.intermediate_size, "intermediate")(x))
    y = layers.Dropout(c.hidden_dropout_prob)(linear(c.hidden_size, "output")(y))
    return layers.LayerNorm(c.layer_norm_eps, self.dtype, name="norm")(x + y)


class Encoder(nn.Module):
  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, bias):
    for i in range(self.config.num_hidden_layers):
      x = Layer(self.config, self.dtype, name=f"layer_{i}")(x, bias)
    return x


class Model(nn.Module):
  config: Config
  dtype: Any = jnp.float32

  def setup(self):
    c = self.config
    init = nn.initializers.normal(c.initializer_range)
    self.embeddings = Embeddings(c, self.dtype)
    self.encoder = Encoder(c, self.dtype)
    if c.pooler:
      self.pooler = layers.Linear(c.hidden_size, dtype=self.dtype, kernel_init=init)
    rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
    self.dropout = layers.Dropout(rate)
    if c.num_labels:
      self.classifier = layers.Linear(c.num_labels, dtype=self.dtype, kernel_init=init)

  def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
    if attention_mask is None:
      attention_mask = jnp.ones_like(input_ids)
    if token_type_ids is None:
      token_type_ids = jnp.zeros_like(input_ids)
    x = self.embeddings(input_ids, token_type_ids)
    x = self.encoder(x, layers.padding_bias(attention_mask))
    out = {"last_hidden_state": x}
    if self.config.pooler:
      out["pooler_output"] = jnp.tanh(self.pooler(x[:, 0]))
    if self.config.pooling == "mean":
      m = attention_mask[..., None].astype(x.dtype)
      out["features"] = (x*m).sum(1) / jnp.maximum(m.sum(1), 1)
    else:
      out["features"] = out["pooler_output"]
    if self.config.num_labels:
      out["logits"] = self.head(out["features"])
    return out

  def head(self, features):
    return self.classifier(self.dropout(features))
