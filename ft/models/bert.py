"""BERT (Devlin et al. 2018, arXiv:1810.04805), the encoder of many sentence embedding models.

Follows transformers' `models/bert/modeling_bert.py` (Apache-2.0) in names, defaults and the places
of dropout; the layout of a mean-pooled export follows sentence-transformers (Apache-2.0).
Shapes: B batch, T tokens, D hidden size, C labels.
"""

import dataclasses
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from absl import logging

from ft import errors
from ft.models import layers
from ft.weights.names import Rule

MODALITY = "text"
MODEL_TYPES = ("bert",)
HEAD = ("params/classifier",)
OPTIONAL = ("params/pooler",)
POOLINGS = ("cls", "mean", "first")

_LAYER, _OURS = "[bert.]encoder.layer.{i}.", "params/encoder/layer_{i}/"


def _linear(theirs: str, ours: str, only: str = "") -> list[Rule]:
  return [Rule(theirs + ".weight", ours + "/kernel", "transpose", only),
          Rule(theirs + ".bias", ours + "/bias", only=only)]


def _norm(theirs: str, ours: str) -> list[Rule]:
  # Files converted from TensorFlow say gamma and beta.
  return [Rule(theirs + ".(weight|gamma)", ours + "/scale"),
          Rule(theirs + ".(bias|beta)", ours + "/bias")]


NAMES = [
    Rule("[bert.]embeddings.word_embeddings.weight", "params/embeddings/word/embedding"),
    Rule("[bert.]embeddings.position_embeddings.weight", "params/embeddings/position/embedding"),
    Rule("[bert.]embeddings.token_type_embeddings.weight",
         "params/embeddings/token_type/embedding"),
    *_norm("[bert.]embeddings.LayerNorm", "params/embeddings/norm"),
    Rule("[bert.]embeddings.position_ids", transform="arange"),
    *_linear(_LAYER + "attention.self.query", _OURS + "attention/query"),
    *_linear(_LAYER + "attention.self.key", _OURS + "attention/key"),
    *_linear(_LAYER + "attention.self.value", _OURS + "attention/value"),
    *_linear(_LAYER + "attention.output.dense", _OURS + "attention/output"),
    *_norm(_LAYER + "attention.output.LayerNorm", _OURS + "attention/norm"),
    *_linear(_LAYER + "intermediate.dense", _OURS + "intermediate"),
    *_linear(_LAYER + "output.dense", _OURS + "output"),
    *_norm(_LAYER + "output.LayerNorm", _OURS + "norm"),
    *_linear("[bert.]pooler.dense", "params/pooler"),
    *_linear("classifier", "params/classifier", "pooling=cls"),
    *_linear("2_Dense/linear", "params/classifier", "pooling=mean|first"),
    Rule("cls.{*}", transform="ignore"),  # heads of pre-training: masked words, next sentence
]


@dataclasses.dataclass(frozen=True)
class Config:
  """The keys of transformers' BertConfig that matter here, and what the label head reads.

  Attributes:
    num_labels: C; 0 for no label head.
    labels: their names; empty if they have none.
    pooling: what `features` are: "cls", the pooler's dense layer and tanh on the first token (the
      first token itself in a model without pooler); "mean", over real tokens; "first", the first
      token.
    pooler: whether the model has the pooler's layer.
    source: config.json as it was read, JSON; its other keys are given back on export.
  """

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
  labels: tuple = ()
  pooling: str = "cls"
  pooler: bool = True
  source: str = dataclasses.field(default="{}", repr=False, compare=False)

  @classmethod
  def from_hf(cls, hf: dict) -> "Config":
    """Returns the Config of a config.json; UserError for a value that is not supported."""
    values = {"source": json.dumps({k: v for k, v in hf.items() if k != "pooling"})}
    for field in dataclasses.fields(cls):
      if field.name in _UPSTREAM and hf.get(field.name) is not None:
        value = hf[field.name]
        kind = float if field.default is None else type(field.default)
        known = (int, float) if kind is float else kind
        if isinstance(value, bool) or not isinstance(value, known):
          raise errors.UserError(f"config.json: {field.name} is {value!r}, "
                                 f"should be of type {kind.__name__}")
        values[field.name] = kind(value)
    values["pooling"] = hf.get("pooling", "cls")
    values["labels"] = _labels(hf.get("id2label") or {})
    values["num_labels"] = len(values["labels"])
    config = cls(**values)
    config.check(hf)
    return config

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    if self.hidden_act not in layers.ACTIVATIONS:
      raise errors.UserError(f"config.json: hidden_act {self.hidden_act!r} is not known; known "
                             f"are {', '.join(layers.ACTIVATIONS)}")
    if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
      raise errors.UserError(f"config.json: hidden_size {self.hidden_size} is not a multiple of "
                             f"num_attention_heads {self.num_attention_heads}")
    if self.pooling not in POOLINGS:
      raise errors.UserError(f"the checkpoint pools by {self.pooling!r}, which is not supported; "
                             f"set model.pooling to one of {', '.join(POOLINGS)}")
    for key, only in (("position_embedding_type", "absolute"), ("is_decoder", False),
                      ("add_cross_attention", False)):
      if hf.get(key, only) != only:
        raise errors.UserError(f"config.json: {key}={hf[key]!r} is not supported, only {only!r}")

  def to_hf(self) -> dict:
    """Returns what config.json holds; transformers opens it."""
    hf = json.loads(self.source)
    hf.update({name: getattr(self, name) for name in _UPSTREAM})
    hf["model_type"] = MODEL_TYPES[0]
    for key in ("id2label", "label2id", "num_labels"):
      hf.pop(key, None)
    if self.num_labels:
      labels = self.labels or tuple(f"LABEL_{i}" for i in range(self.num_labels))
      hf["id2label"] = {str(i): label for i, label in enumerate(labels)}
      hf["label2id"] = {label: i for i, label in enumerate(labels)}
      with_head = self.pooling == "cls"
      hf["architectures"] = ["BertForSequenceClassification" if with_head else "BertModel"]
    return hf

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate,
                               classifier_dropout=rate)


_UPSTREAM = tuple(f.name for f in dataclasses.fields(Config)
                  if f.name not in ("num_labels", "labels", "pooling", "pooler", "source"))


def _labels(id2label: dict) -> tuple:
  """Returns the names of labels in order; none where they are LABEL_0, LABEL_1, …."""
  try:
    labels = tuple(str(id2label[i]) for i in sorted(id2label, key=int))
  except (ValueError, TypeError, AttributeError):
    raise errors.UserError("config.json: id2label should map numbers to names") from None
  generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
  return () if generic else labels


class Embeddings(nn.Module):
  """Sum of word, position and token type vectors, normalised: ids (B, T) -> (B, T, D)."""

  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids, token_type_ids):
    c = self.config

    def table(size, name):
      init = nn.initializers.normal(c.initializer_range)
      return layers.Embedding(size, c.hidden_size, self.dtype, init, name=name)

    x = table(c.vocab_size, "word")(input_ids)
    x = x + table(c.type_vocab_size, "token_type")(token_type_ids)
    x = x + table(c.max_position_embeddings, "position")(jnp.arange(input_ids.shape[1]))
    x = layers.LayerNorm(c.layer_norm_eps, self.dtype, name="norm")(x)
    return layers.Dropout(c.hidden_dropout_prob)(x)


class Attention(nn.Module):
  """Self-attention, residual and norm: x (B, T, D), bias (B, 1, 1, T) -> (B, T, D)."""

  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, bias):
    c = self.config
    qkv = [linear(c, c.hidden_size, self.dtype, name) for name in ("query", "key", "value")]
    heads = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
    q, k, v = (y.reshape(*x.shape[:2], *heads) for y in layers.fused(qkv, x))
    y = layers.attention(q, k, v, bias, layers.Dropout(c.attention_probs_dropout_prob))
    y = linear(c, c.hidden_size, self.dtype, "output")(y.reshape(x.shape))
    y = layers.Dropout(c.hidden_dropout_prob)(y)
    return layers.LayerNorm(c.layer_norm_eps, self.dtype, name="norm")(x + y)


class Layer(nn.Module):
  """Attention and a two-layer network, each with residual and norm after it."""

  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, bias):
    c = self.config
    x = Attention(c, self.dtype, name="attention")(x, bias)
    y = linear(c, c.intermediate_size, self.dtype, "intermediate")(x)
    y = linear(c, c.hidden_size, self.dtype, "output")(layers.ACTIVATIONS[c.hidden_act](y))
    y = layers.Dropout(c.hidden_dropout_prob)(y)
    return layers.LayerNorm(c.layer_norm_eps, self.dtype, name="norm")(x + y)


class Encoder(nn.Module):
  """The stack of layers, `layer_0` first."""

  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, bias):
    for i in range(self.config.num_hidden_layers):
      x = Layer(self.config, self.dtype, name=f"layer_{i}")(x, bias)
    return x


class Model(nn.Module):
  """BERT: token ids -> a dict, see `__call__`. Dropout acts iff apply is given a "dropout" rng."""

  config: Config
  dtype: Any = jnp.float32

  def setup(self):
    c = self.config
    self.embeddings = Embeddings(c, self.dtype)
    self.encoder = Encoder(c, self.dtype)
    if c.pooler:
      self.pooler = linear(c, c.hidden_size, self.dtype)
    rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
    self.dropout = layers.Dropout(rate)
    if c.num_labels:
      self.classifier = linear(c, c.num_labels, self.dtype)

  def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
    """Applies the model.

    Args:
      input_ids: (B, T) int, T up to config.max_position_embeddings.
      attention_mask: (B, T), 1 for real tokens and 0 for padding; None: all are real.
      token_type_ids: (B, T) int; None: all are 0.

    Returns:
      last_hidden_state (B, T, D), pooler_output (B, D) if the model has a pooler, features (B, D)
      that config.pooling chooses, and logits (B, C) float32 if config.num_labels > 0.

    Raises:
      UserError: more tokens than the model has positions.
    """
    length, limit = input_ids.shape[1], self.config.max_position_embeddings
    if isinstance(length, int) and length > limit:  # it is symbolic while a program is exported
      raise errors.UserError(f"a text of {length} tokens; the model has {limit} positions")
    if attention_mask is None:
      attention_mask = jnp.ones_like(input_ids)
    if token_type_ids is None:
      token_type_ids = jnp.zeros_like(input_ids)
    x = self.embeddings(input_ids, token_type_ids)
    x = self.encoder(x, layers.padding_bias(attention_mask))
    outputs = {"last_hidden_state": x}
    if self.config.pooler:
      outputs["pooler_output"] = jnp.tanh(self.pooler(x[:, 0]))
    outputs["features"] = self._features(outputs, attention_mask)
    if self.config.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    return outputs

  def _features(self, outputs, mask):
    x = outputs["last_hidden_state"]
    if self.config.pooling == "mean":
      mask = (mask != 0)[..., None].astype(jnp.float32)
      total = (x.astype(jnp.float32) * mask).sum(1)
      return (total / jnp.maximum(mask.sum(1), 1.0)).astype(x.dtype)
    return outputs["pooler_output"] if self._reads_pooler() else x[:, 0]

  def _reads_pooler(self):
    return self.config.pooling == "cls" and self.config.pooler

  def head(self, features):
    """Returns the logits (B, C) of features (B, D): dropout and the classifier."""
    return self.classifier(self.dropout(features)).astype(jnp.float32)


def linear(config, features, dtype, name=None) -> layers.Linear:
  """Returns a linear layer that starts as the config says."""
  init = nn.initializers.normal(config.initializer_range)
  return layers.Linear(features, dtype=dtype, kernel_init=init, name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  shape = (2, min(12, config.max_position_embeddings))
  mask = np.ones(shape, np.int32)
  mask[1, shape[1] // 2:] = 0
  return {"input_ids": rng.integers(0, config.vocab_size, shape, np.int32),
          "attention_mask": mask,
          "token_type_ids": rng.integers(0, config.type_vocab_size, shape, np.int32)}


def complete(hf: dict, folder: pathlib.Path) -> dict:
  """Returns config.json's content with the pooling that 1_Pooling/config.json states."""
  file = folder / "1_Pooling" / "config.json"
  if not file.is_file():
    return {**hf, "pooling": "cls"}
  try:
    stated = json.loads(file.read_text(encoding="utf-8"))
    modes = [key.removeprefix("pooling_mode_") for key, on in stated.items()
             if key.startswith("pooling_mode_") and on is True]
  except (ValueError, AttributeError) as e:
    raise errors.UserError(f"{file} is no readable JSON object: {e}") from None
  known = {"mean_tokens": "mean", "cls_token": "first"}
  # Another kind of pooling is an error of from_hf, unless the user chooses one.
  return {**hf, "pooling": known.get(modes[0], modes[0]) if len(modes) == 1 else " + ".join(modes)}


def parts(hf: dict, folder: pathlib.Path) -> tuple:
  """Returns the sub-folders that hold tensors of the model: 2_Dense, if it is a label head."""
  if not (folder / "2_Dense").is_dir():
    return ()
  if "id2label" in hf:
    return ("2_Dense",)
  logging.warning("%s/2_Dense is not read: it is no label head (config.json names no labels)",
                  folder)
  return ()


def fit(config: Config, shapes: dict) -> Config:
  """Returns the config of a file with these {our path: shape}: without pooler where none is due."""
  needed = config.pooling == "cls" and config.num_labels > 0
  return dataclasses.replace(config, pooler=needed or "params/pooler/kernel" in shapes)


def prefixed(config: Config) -> bool | None:
  """Returns whether export writes `bert.`: so does the class that transformers opens it with."""
  return True if config.num_labels and config.pooling == "cls" else None


def companions(config: Config, files: dict) -> dict:
  """Returns the files beside weights and config.json, with those that say how to pool.

  The layout is sentence-transformers': modules.json lists the encoder (this folder), 1_Pooling and,
  for a label head, 2_Dense, a linear layer without activation.
  """
  files = dict(files)
  if config.pooling == "cls":
    return {k: v for k, v in files.items() if k not in ("modules.json", "1_Pooling/config.json")}
  modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
  if config.num_labels:
    modules.append(("2_Dense", "Dense"))
    files["2_Dense/config.json"] = _json({
        "in_features": config.hidden_size, "out_features": config.num_labels, "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity"})
  if config.num_labels or "modules.json" not in files:
    files["modules.json"] = _json([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules)])
  files["1_Pooling/config.json"] = _json({
      "word_embedding_dimension": config.hidden_size,
      "pooling_mode_cls_token": config.pooling == "first",
      "pooling_mode_mean_tokens": config.pooling == "mean",
      "pooling_mode_max_tokens": False,
      "pooling_mode_mean_sqrt_len_tokens": False})
  return files


def _json(value) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode()
