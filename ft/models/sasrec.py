"""SASRec and BERT4Rec: transformers over the items that a user chose, to say which comes next.

SASRec: Kang & McAuley 2018, arXiv:1808.09781. BERT4Rec: Sun et al. 2019, arXiv:1904.06690. Names,
formulas and the places of dropout follow RecBole 1.2.1, `recbole/model/sequential_recommender`
(MIT), and, with config.layout "pmixer", `pmixer/SASRec.pytorch`, which keeps to the SASRec authors'
code. Neither has a config.json: third_party/sasrec.md says what to write into one.
Shapes: B users, T items of a history, D width, V rows of the item table (0 is padding).
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import attention, base, heads, layers
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "interactions"
MODEL_TYPES = ("sasrec", "bert4rec")
HEAD = ("params/classifier",)
SURGERY = {
    "vocab_size": Surgery("vocab_size", ("params/item_embedding/embedding", "params/output_bias")),
    "depth": Surgery("num_hidden_layers", ("params/encoder",)),
}

_LAYER, _OURS = "trm_encoder.layer.{i}.", "params/encoder/layer_{i}/"
_RECBOLE, _PMIXER = "layout=recbole", "layout=pmixer"

NAMES = [
    Rule("item_embedding.weight", "params/item_embedding/embedding", only=_RECBOLE),
    Rule("position_embedding.weight", "params/position_embedding/embedding", only=_RECBOLE),
    *base.norm_rules("LayerNorm", "params/norm", _RECBOLE),
    *base.linear_rules(_LAYER + "multi_head_attention.query", _OURS + "attention/query", _RECBOLE),
    *base.linear_rules(_LAYER + "multi_head_attention.key", _OURS + "attention/key", _RECBOLE),
    *base.linear_rules(_LAYER + "multi_head_attention.value", _OURS + "attention/value", _RECBOLE),
    *base.linear_rules(_LAYER + "multi_head_attention.dense", _OURS + "attention/output",
                        _RECBOLE),
    *base.norm_rules(_LAYER + "multi_head_attention.LayerNorm", _OURS + "attention_norm",
                      _RECBOLE),
    *base.linear_rules(_LAYER + "feed_forward.dense_1", _OURS + "intermediate", _RECBOLE),
    *base.linear_rules(_LAYER + "feed_forward.dense_2", _OURS + "output", _RECBOLE),
    *base.norm_rules(_LAYER + "feed_forward.LayerNorm", _OURS + "mlp_norm", _RECBOLE),
    *base.linear_rules("output_ffn", "params/transform/dense", _RECBOLE),
    *base.norm_rules("output_ln", "params/transform/norm", _RECBOLE),
    Rule("output_bias", "params/output_bias", only="head=rank"),
    Rule("item_emb.weight", "params/item_embedding/embedding", only=_PMIXER),
    Rule("pos_emb.weight", "params/position_embedding/embedding", only=_PMIXER),
    *base.norm_rules("attention_layernorms.{i}", _OURS + "attention_norm", _PMIXER),
    Rule("attention_layers.{i}.in_proj_weight", _OURS + "attention/qkv/kernel", "transpose",
         _PMIXER),
    Rule("attention_layers.{i}.in_proj_bias", _OURS + "attention/qkv/bias", only=_PMIXER),
    *base.linear_rules("attention_layers.{i}.out_proj", _OURS + "attention/output", _PMIXER),
    *base.norm_rules("forward_layernorms.{i}", _OURS + "mlp_norm", _PMIXER),
    Rule("forward_layers.{i}.conv1.weight", _OURS + "intermediate/kernel", "pointwise", _PMIXER),
    Rule("forward_layers.{i}.conv1.bias", _OURS + "intermediate/bias", only=_PMIXER),
    Rule("forward_layers.{i}.conv2.weight", _OURS + "output/kernel", "pointwise", _PMIXER),
    Rule("forward_layers.{i}.conv2.bias", _OURS + "output/bias", only=_PMIXER),
    *base.norm_rules("last_layernorm", "params/norm", _PMIXER),
    *base.linear_rules("classifier", "params/classifier", "head=classify"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """A recommender's shape; keys of RecBole's and pmixer's settings are read, too.

  Attributes:
    vocab_size: V, rows of the item table: padding, items and BERT4Rec's mask.
    max_position_embeddings: items of a history that the model reads at most.
    mask_token_id: the item that stands for one to be told (BERT4Rec); None: the last row.
    layout: whose names and form, "recbole" | "pmixer".
    norm: where a layer normalises, "post": after each sum; "pre": before each part; "query": the
      queries alone, which are then what attention is added to.
    padding: "masked": nobody looks at padding; "zero": it is zero before each layer, and looked at;
      "position": it is looked at, and position 0 is its own.
  """

  vocab_size: int = 0
  hidden_size: int = 64
  num_hidden_layers: int = 2
  num_attention_heads: int = 2
  intermediate_size: int = 256
  hidden_act: str = "gelu"
  hidden_dropout_prob: float = 0.5
  attention_probs_dropout_prob: float = 0.5
  layer_norm_eps: float = 1e-12
  initializer_range: float = 0.02
  max_position_embeddings: int = 50
  mask_token_id: int | None = None
  layout: str = "recbole"
  norm: str = "post"
  padding: str = "masked"

  PREFIXES = {"sasrec": "SASRec", "bert4rec": "BERT4Rec"}
  HEADS = {"rank": ("{}",), "none": ("{}Model",), "classify": ("{}ForSequenceClassification",)}
  DEFAULTS = {"bert4rec": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}}
  ALIASES = {
      "hidden_size": ("hidden_units",), "num_hidden_layers": ("n_layers", "num_blocks"),
      "num_attention_heads": ("n_heads", "num_heads"), "intermediate_size": ("inner_size",),
      "hidden_dropout_prob": ("dropout_rate",),
      "attention_probs_dropout_prob": ("attn_dropout_prob", "dropout_rate"),
      "max_position_embeddings": ("MAX_ITEM_LIST_LENGTH", "maxlen"),
  }

  def __post_init__(self):
    super().__post_init__()
    if self.model_type == "bert4rec":
      if self.mask_token_id is None:
        object.__setattr__(self, "mask_token_id", self.vocab_size - 1)
      if not 0 < self.mask_token_id < self.vocab_size:
        raise errors.UserError(f"the mask is item {self.mask_token_id}; a table of vocab_size "
                               f"{self.vocab_size} rows does not hold it")

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    out = {} if hf.get("architectures") else {"head": "rank"}
    if values.get("layout") == "pmixer":
      own = {"layer_norm_eps": 1e-8, "hidden_act": "relu", "norm": "query", "padding": "zero",
             "intermediate_size": values.get("hidden_size", cls.hidden_size)}
      if hf.get("norm_first") is not None:
        own.update(norm="pre" if hf["norm_first"] else "post", padding="position")
      out |= {key: value for key, value in own.items() if key not in values}
    return out

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_act", layers.ACTIVATIONS)
    base.one_of(self, "layout", ("recbole",) if self.bidirectional else ("recbole", "pmixer"))
    base.one_of(self, "norm", ("post", "pre", "query") if self.layout == "pmixer" else ("post",))
    base.one_of(self, "padding",
                ("masked", "zero", "position") if self.layout == "pmixer" else ("masked",))
    base.multiple(self, "hidden_size", "num_attention_heads")
    if self.vocab_size < 2:
      raise errors.UserError(f"config.json: vocab_size {self.vocab_size} should be the rows of the "
                             "item table")

  def to_hf(self) -> dict:
    """Returns what config.json holds, a mask that is not the table's last row included."""
    own = {"mask_token_id": self.mask_token_id} if self.scored == self.vocab_size else {}
    return {**super().to_hf(), **{key: value for key, value in own.items() if value is not None}}

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)

  @property
  def bidirectional(self) -> bool:
    return self.model_type == "bert4rec"

  @property
  def scored(self) -> int:
    """Rows of the table that have a score: in RecBole's files the mask, the last, has none."""
    return self.vocab_size - int(self.mask_token_id == self.vocab_size - 1)


def linear(config, features, dtype, name=None) -> layers.Linear:
  """Returns a linear layer that starts as the config says."""
  init = nn.initializers.normal(config.initializer_range)
  return layers.Linear(features, dtype=dtype, kernel_init=init, name=name)


class Attention(nn.Module):
  """Self-attention of queries x and keys and values `source`, each (B, T, D): -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, source, mask):
    c, dtype = self.config, self.compute.dtype
    if c.layout == "recbole":
      qkv = layers.fused([linear(c, c.hidden_size, dtype, name)
                          for name in ("query", "key", "value")], x)
    else:
      project = linear(c, 3 * c.hidden_size, dtype, "qkv")
      qkv = jnp.split(project(source), 3, -1)
      if source is not x:
        qkv[0] = jnp.split(project(x), 3, -1)[0]
    shape = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
    q, k, v = (y.reshape(*x.shape[:2], *shape) for y in qkv)
    y = attention.attention(q, k, v, mask, drop=layers.Dropout(c.attention_probs_dropout_prob),
                            implementation=self.compute.attention)
    return linear(c, c.hidden_size, dtype, "output")(y.reshape(x.shape))


class Layer(nn.Module):
  """Attention and a two-layer network, with residuals and norms: (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, real):
    c, dtype = self.config, self.compute.dtype
    attend = Attention(c, self.compute, name="attention")
    attention_norm, mlp_norm = (layers.LayerNorm(c.layer_norm_eps, dtype, name=name)
                                for name in ("attention_norm", "mlp_norm"))
    # pmixer drops between the network's layers, and nothing of the attention's output.
    inner, outer = (layers.Dropout(c.hidden_dropout_prob if on else 0.0)
                    for on in (c.layout == "pmixer", c.layout == "recbole"))

    def network(x):
      y = inner(linear(c, c.intermediate_size, dtype, "intermediate")(x))
      y = linear(c, c.hidden_size, dtype, "output")(layers.ACTIVATIONS[c.hidden_act](y))
      return layers.Dropout(c.hidden_dropout_prob)(y)

    if c.norm == "post":
      x = attention_norm(x + outer(attend(x, x, mask)))
      return _kept(c, mlp_norm(x + network(x)), real)
    query = attention_norm(x)
    if c.norm == "pre":
      x = x + outer(attend(query, query, mask))
      return _kept(c, x + network(mlp_norm(x)), real)
    x = mlp_norm(query + outer(attend(query, x, mask)))
    return _kept(c, x + network(x), real)


def _kept(config, x, real):
  """Returns x (B, T, D), padding as zeros where the config says so."""
  return jnp.where(real[..., None], x, 0) if config.padding == "zero" else x


class Encoder(nn.Module):
  """The stack of layers, `layer_0` first."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask, real):
    layer = functools.partial(Layer, self.config, self.compute)
    return layers.run_layers(layer, self.config.num_hidden_layers, self.compute, x, mask, real)


class Model(nn.Module):
  """A sequential recommender: item ids -> a dict, see `__call__`.

  Dropout acts iff apply is given a "dropout" rng.
  """

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, dtype = self.config, self.compute.dtype
    init = nn.initializers.normal(c.initializer_range)
    self.item_embedding = layers.Embedding(c.vocab_size, c.hidden_size, dtype, init)
    rows = c.max_position_embeddings + int(c.padding == "position")
    self.position_embedding = layers.Embedding(rows, c.hidden_size, dtype, init)
    self.norm = layers.LayerNorm(c.layer_norm_eps, dtype)
    self.encoder = Encoder(c, self.compute)
    self.dropout = layers.Dropout(c.hidden_dropout_prob)
    if c.bidirectional:
      self.transform = heads.Transform(c.hidden_size, "gelu", c.layer_norm_eps, self.compute,
                                       scale=c.initializer_range)
      if c.head == "rank":
        self.output_bias = self.param("output_bias", nn.initializers.zeros, (c.scored,))
    if c.num_labels:
      self.classifier = linear(c, c.num_labels, dtype)

  def __call__(self, item_ids, attention_mask=None):
    """Applies the model.

    Args:
      item_ids: (B, T) int, T up to config.max_position_embeddings, oldest first; padding, id 0, on
        either side, as in training: positions are counted from the row's start.
      attention_mask: (B, T), 1 for items and 0 for padding; None: all but id 0 are items.

    Returns:
      last_hidden_state (B, T, D); features (B, D), that of the last item (of BERT4Rec: the mask
      that the caller puts there); logits float32, with the head "rank" (B, V), the scores of all
      items as the next one (padding's included; the mask's is the lowest float), and with a label
      head (B, C).

    Raises:
      UserError: more items than the model has positions.
    """
    c, (_, length) = self.config, item_ids.shape
    if isinstance(length, int) and length > c.max_position_embeddings:
      raise errors.UserError(f"a history of {length} items; the model reads "
                             f"{c.max_position_embeddings}")
    real = (item_ids if attention_mask is None else attention_mask) != 0
    x = self.encoder(self._embedded(item_ids, real), self._mask(real), real)
    if c.layout == "pmixer":
      x = self.norm(x)
    if c.bidirectional:
      x = self.transform(x)
    outputs = {"last_hidden_state": x, "features": layers.last_token(x, real)}
    if c.head == "rank":
      outputs["logits"] = self.item_logits(outputs["features"])
    if c.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    return outputs

  def item_logits(self, hidden):
    """Returns the scores (…, V) float32 of all items, given hidden (…, D) before each."""
    c = self.config
    scores = self.item_embedding.attend(hidden).astype(jnp.float32)
    if not c.bidirectional:
      return scores
    lowest = jnp.finfo(jnp.float32).min
    bias = jnp.pad(self.output_bias.astype(jnp.float32), (0, c.vocab_size - c.scored))
    return jnp.where(jnp.arange(c.vocab_size) == c.mask_token_id, lowest, scores + bias)

  def lm_logits(self, hidden):
    """Returns `item_logits`, under the name that losses over large vocabularies ask for."""
    return self.item_logits(hidden)

  def head(self, features):
    """Returns the logits (B, C) of features (B, D): dropout and the classifier."""
    return self.classifier(self.dropout(features)).astype(jnp.float32)

  def _embedded(self, item_ids, real):
    c = self.config
    x = self.item_embedding(item_ids)
    positions = jnp.arange(item_ids.shape[1])
    if c.padding == "position":
      positions = jnp.where(real, positions + 1, 0)
    if c.layout == "pmixer":
      x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
    x = x + self.position_embedding(positions)
    x = jnp.where(real[..., None], x, jax.lax.stop_gradient(x))  # padding's vector is not trained
    if c.layout == "recbole":
      x = self.norm(x)
    return _kept(c, self.dropout(x), real)

  def _mask(self, real):
    padding = real if self.config.padding == "masked" else None
    return attention.Mask(padding=padding, causal=not self.config.bidirectional)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  shape = (2, min(8, config.max_position_embeddings))
  ids = rng.integers(1, config.vocab_size, shape, np.int32)
  mask = np.ones(shape, np.int32)
  mask[1, shape[1] // 2:] = 0
  return {"item_ids": ids * mask, "attention_mask": mask}
