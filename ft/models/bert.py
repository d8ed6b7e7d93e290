"""BERT and its kin: RoBERTa, XLM-R, DistilBERT, MiniLM, the ELECTRA encoder.

BERT: Devlin et al. 2018, arXiv:1810.04805; RoBERTa: Liu et al. 2019, arXiv:1907.11692; XLM-R:
Conneau et al. 2019, arXiv:1911.02116; DistilBERT: Sanh et al. 2019, arXiv:1910.01108; ELECTRA:
Clark et al. 2020, arXiv:2003.10555; MiniLM, which has BERT's form: Wang et al. 2020,
arXiv:2002.10957. Follows transformers' `models/{bert,roberta,distilbert,electra}/modeling_*.py`
(Apache-2.0) in names, defaults and the places of dropout. They differ in how positions are counted,
in the size of word vectors, and in their heads.
Shapes: B batch, T tokens, D hidden size, C labels, V words.
"""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import attention, base, heads, layers, surgery
from ft.weights.names import Rule

MODALITY = "text"
MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra")
HEAD = ("params/classifier", "params/pre_classifier")
OPTIONAL = ("params/pooler", "params/transform", "params/decoder_bias")
SURGERY = {
    "vocab_size": surgery.Surgery("vocab_size", ("params/embeddings/word/embedding",
                                                 "params/decoder_bias")),
    "depth": surgery.Surgery("num_hidden_layers", ("params/encoder",)),
}
_ROBERTA = ("roberta", "xlm-roberta")
# The activation between the two layers of the label head, where it has two.
_TWO_LAYERS = {"roberta": "tanh", "xlm-roberta": "tanh", "distilbert": "relu", "electra": "gelu"}

_BASE, _DISTIL = "[bert.|roberta.|electra.]", "[distilbert.]"
_OURS = "params/encoder/layer_{i}/"
_WORDS = "params/embeddings/word/embedding"
_NOT_DISTIL = "model_type=|bert|roberta|xlm-roberta|electra"


def _layer_rules(layer: str, only: str, parts: dict) -> list[Rule]:
  """Returns the rules of a layer, given what upstream calls its parts."""
  rules = []
  for ours, theirs in parts.items():
    make = base.norm_rules if ours.endswith("norm") else base.linear_rules
    rules += make(layer + theirs, _OURS + ours, only)
  return rules


def _embedding_rules(base_name: str, only: str) -> list[Rule]:
  names = base_name + "embeddings."
  return [
      Rule(names + "word_embeddings.weight", _WORDS, only=only),
      Rule(names + "position_embeddings.weight", "params/embeddings/position/embedding", only=only),
      *base.norm_rules(names + "LayerNorm", "params/embeddings/norm", only),
      Rule(names + "position_ids", transform="arange"),
  ]


def _word_rules(kinds: str, transform: str, norm: str, decoder: str, bias: str) -> list[Rule]:
  """Returns the rules of a masked-word head, whose decoder files before transformers 5 hold too."""
  only = f"head=mlm&model_type={kinds}"
  rules = [*base.linear_rules(transform, "params/transform/dense", only),
           *base.norm_rules(norm, "params/transform/norm", only),
           Rule(bias, "params/decoder_bias", only=only),
           Rule(decoder + ".weight", _WORDS, "tied", only)]
  if bias != decoder + ".bias":
    rules.append(Rule(decoder + ".bias", "params/decoder_bias", "tied", only))
  return rules


NAMES = [
    *_embedding_rules(_BASE, _NOT_DISTIL),
    *_embedding_rules(_DISTIL, "model_type=distilbert"),
    Rule(_BASE + "embeddings.token_type_embeddings.weight",
         "params/embeddings/token_type/embedding"),
    Rule(_BASE + "embeddings.token_type_ids", transform="keep"),
    *base.linear_rules(_BASE + "embeddings_project", "params/project"),
    *_layer_rules(_BASE + "encoder.layer.{i}.", _NOT_DISTIL, {
        "attention/query": "attention.self.query", "attention/key": "attention.self.key",
        "attention/value": "attention.self.value", "attention/output": "attention.output.dense",
        "attention/norm": "attention.output.LayerNorm", "intermediate": "intermediate.dense",
        "output": "output.dense", "norm": "output.LayerNorm"}),
    *_layer_rules(_DISTIL + "transformer.layer.{i}.", "model_type=distilbert", {
        "attention/query": "attention.q_lin", "attention/key": "attention.k_lin",
        "attention/value": "attention.v_lin", "attention/output": "attention.out_lin",
        "attention/norm": "sa_layer_norm", "intermediate": "ffn.lin1", "output": "ffn.lin2",
        "norm": "output_layer_norm"}),
    *base.linear_rules(_BASE + "pooler.dense", "params/pooler"),
    *base.linear_rules("classifier", "params/classifier", "label_head=classifier|pre_classifier"),
    *base.linear_rules("pre_classifier", "params/pre_classifier", "label_head=pre_classifier"),
    *base.linear_rules("classifier.out_proj", "params/classifier", "label_head=out_proj"),
    *base.linear_rules("classifier.dense", "params/pre_classifier", "label_head=out_proj"),
    *base.linear_rules("2_Dense/linear", "params/classifier", "label_head=2_Dense"),
    *_word_rules("|bert", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
                 "cls.predictions.decoder", "cls.predictions.bias"),
    *_word_rules("roberta|xlm-roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder",
                 "lm_head.bias"),
    *_word_rules("distilbert", "vocab_transform", "vocab_layer_norm", "vocab_projector",
                 "vocab_projector.bias"),
    *_word_rules("electra", "generator_predictions.dense", "generator_predictions.LayerNorm",
                 "generator_lm_head", "generator_lm_head.bias"),
    # Other heads of pre-training: next sentence, replaced words.
    Rule("cls.seq_relationship.(weight|bias)", transform="keep", only="head=mlm"),
    Rule("cls.{*}", transform="ignore"),
    Rule("discriminator_predictions.{*}", transform="ignore"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of transformers' BertConfig that matter here, and what the label head reads.

  Attributes:
    embedding_size: of word vectors, in ELECTRA; None: hidden_size.
    pooling: what `features` are: "cls", what the model's own head reads, the pooler's dense layer
      and tanh on the first token in BERT (the first token itself in a model without pooler) and
      the first token elsewhere; "mean", over real tokens; "first", the first token.
    pooler: whether the model has the pooler's layer.
  """

  vocab_size: int = 30522
  hidden_size: int = 768
  embedding_size: int | None = None
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
  pad_token_id: int = 0
  pooling: str = "cls"
  pooler: bool = True

  PREFIXES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta",
              "distilbert": "DistilBert", "electra": "Electra"}
  HEADS = {"none": ("{}Model",), "classify": ("{}ForSequenceClassification",),
           "tag": ("{}ForTokenClassification",), "mlm": ("{}ForMaskedLM",)}
  DEFAULTS = {"roberta": {"vocab_size": 50265, "pad_token_id": 1},
              "xlm-roberta": {"pad_token_id": 1},
              "distilbert": {"num_hidden_layers": 6, "classifier_dropout": 0.2},
              "electra": {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4,
                          "intermediate_size": 1024}}
  ALIASES = {"hidden_size": ("dim",), "num_hidden_layers": ("n_layers",),
             "num_attention_heads": ("n_heads",), "intermediate_size": ("hidden_dim",),
             "hidden_act": ("activation",), "hidden_dropout_prob": ("dropout",),
             "attention_probs_dropout_prob": ("attention_dropout",),
             "classifier_dropout": ("seq_classif_dropout",)}
  OURS = ("pooling", "pooler")

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    made = {"pooling": hf.get("pooling", "cls")}
    if values["model_type"] == "distilbert":
      made |= {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
    if values["model_type"] != "electra":
      made["embedding_size"] = None
    # A mean-pooled export is a BertModel to transformers; its labels make it a classifier here.
    stated = hf.get("id2label") or {}
    labels = base.read_labels(stated)
    if values["head"] == "none" and (labels or made["pooling"] != "cls" and stated):
      made |= {"head": "classify", "labels": labels, "num_labels": len(stated)}
    return made

  @property
  def label_head(self) -> str:
    """Which rules of the name table name the label head; "" for none."""
    if self.head == "tag":
      return "classifier"
    if self.head != "classify":
      return ""
    if self.pooling != "cls":
      return "2_Dense"
    return {"distilbert": "pre_classifier"}.get(
        self.model_type, "out_proj" if self.model_type in _TWO_LAYERS else "classifier")

  @property
  def reads_pooler(self) -> bool:
    """Whether the model's own features are the pooler's output, where there is one."""
    return self.pooling == "cls" and self.model_type in ("", "bert")

  @property
  def positions(self) -> int:
    """How many tokens a text can have; RoBERTa counts from behind the padding's id."""
    skipped = self.pad_token_id + 1 if self.model_type in _ROBERTA else 0
    return self.max_position_embeddings - skipped

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_act", layers.ACTIVATIONS)
    base.multiple(self, "hidden_size", "num_attention_heads")
    heads.check_pooling(self.pooling)
    base.only(hf, "position_embedding_type", "absolute")
    base.only(hf, "is_decoder", False)
    base.only(hf, "add_cross_attention", False)
    if self.head == "mlm":
      base.only(hf, "tie_word_embeddings", True)

  def to_hf(self) -> dict:
    """Returns what config.json holds; transformers opens it."""
    hf = super().to_hf()
    hf.pop("pooling", None)
    if self.label_head == "2_Dense":
      hf["architectures"] = [self.PREFIXES[hf["model_type"]] + "Model"]
    if self.model_type == "distilbert":  # it knows some of the keys by its own names only
      for name, (theirs,) in self.ALIASES.items():
        if name in hf:
          hf[theirs] = hf.pop(name)
    return hf

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set."""
    return dataclasses.replace(self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate,
                               classifier_dropout=rate)


class Embeddings(nn.Module):
  """Sum of word, token type and position vectors, normalised: ids (B, T) -> (B, T, E)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c = self.config
    init = nn.initializers.normal(c.initializer_range)
    table = functools.partial(layers.Embedding, features=c.embedding_size or c.hidden_size,
                              dtype=self.compute.dtype, embedding_init=init)
    self.word = table(c.vocab_size)
    if c.type_vocab_size:
      self.token_type = table(c.type_vocab_size)
    self.position = table(c.max_position_embeddings)
    self.norm = layers.LayerNorm(c.layer_norm_eps, self.compute.dtype)
    self.dropout = layers.Dropout(c.hidden_dropout_prob)

  def __call__(self, input_ids, token_type_ids, position_ids):
    c = self.config
    if position_ids is None and c.model_type in _ROBERTA:  # words are counted, padding is not
      real = (input_ids != c.pad_token_id).astype(jnp.int32)
      position_ids = jnp.cumsum(real, axis=1) * real + c.pad_token_id
    elif position_ids is None:
      position_ids = jnp.arange(input_ids.shape[1])
    x = self.word(input_ids)
    if c.type_vocab_size:
      kinds = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
      x = x + self.token_type(kinds)
    return self.dropout(self.norm(x + self.position(position_ids)))


class Attention(nn.Module):
  """Self-attention, residual and norm: x (B, T, D) -> (B, T, D)."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask):
    c, dtype = self.config, self.compute.dtype
    qkv = [linear(c, c.hidden_size, dtype, name) for name in ("query", "key", "value")]
    sizes = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
    q, k, v = (y.reshape(*x.shape[:2], *sizes) for y in layers.fused(qkv, x))
    y = attention.attention(q, k, v, mask, drop=layers.Dropout(c.attention_probs_dropout_prob),
                            implementation=self.compute.attention)
    y = linear(c, c.hidden_size, dtype, "output")(y.reshape(x.shape))
    y = layers.Dropout(c.hidden_dropout_prob)(y)
    return layers.LayerNorm(c.layer_norm_eps, self.compute.dtype, name="norm")(x + y)


class Layer(nn.Module):
  """Attention and a two-layer network, each with residual and norm after it."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask):
    c, dtype = self.config, self.compute.dtype
    x = Attention(c, self.compute, name="attention")(x, mask)
    y = linear(c, c.intermediate_size, dtype, "intermediate")(x)
    y = linear(c, c.hidden_size, dtype, "output")(layers.ACTIVATIONS[c.hidden_act](y))
    y = layers.Dropout(c.hidden_dropout_prob)(y)
    return layers.LayerNorm(c.layer_norm_eps, self.compute.dtype, name="norm")(x + y)


class Encoder(nn.Module):
  """The stack of layers, `layer_0` first."""

  config: Config
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x, mask):
    layer = functools.partial(Layer, self.config, self.compute)
    return layers.run_layers(layer, self.config.num_hidden_layers, self.compute, x, mask)


class Model(nn.Module):
  """BERT: token ids -> a dict, see `__call__`. Dropout acts iff apply is given a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, dtype = self.config, self.compute.dtype
    self.embeddings = Embeddings(c, self.compute)
    size = c.embedding_size or c.hidden_size
    if size != c.hidden_size:
      self.project = linear(c, c.hidden_size, dtype)
    self.encoder = Encoder(c, self.compute)
    if c.pooler:
      self.pooler = linear(c, c.hidden_size, dtype)
    plain = c.classifier_dropout is None or (c.model_type, c.head) == ("distilbert", "tag")
    self.dropout = layers.Dropout(c.hidden_dropout_prob if plain else c.classifier_dropout)
    if c.label_head in ("pre_classifier", "out_proj"):
      self.pre_classifier = linear(c, c.hidden_size, dtype)
    if c.num_labels:
      self.classifier = linear(c, c.num_labels, dtype)
    if c.head == "mlm":
      act = "gelu" if c.model_type in (*_ROBERTA, "electra") else c.hidden_act
      self.transform = heads.Transform(size, act, c.layer_norm_eps, self.compute,
                                       scale=c.initializer_range)
      self.decoder_bias = self.param("decoder_bias", nn.initializers.zeros, (c.vocab_size,))

  def __call__(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None,
               segment_ids=None):
    """Applies the model.

    Args:
      input_ids: (B, T) int, T up to config.positions.
      attention_mask: (B, T), 1 for real tokens and 0 for padding; None: all are real.
      token_type_ids: (B, T) int; None: all are 0. DistilBERT has no use for them.
      position_ids: (B, T) int; None: counted as upstream does.
      segment_ids: (B, T), the number of each token's document in a packed row; None: one document.

    Returns:
      last_hidden_state (B, T, D); pooler_output (B, D) if the model has a pooler; features, what
      the label head reads: (B, D) as config.pooling chooses, with the head "tag" (B, T, D); logits
      float32: (B, C) or (B, T, C) if config.num_labels > 0, (B, T, V) with the head "mlm".

    Raises:
      UserError: more tokens than the model has positions.
    """
    c, length = self.config, input_ids.shape[1]
    if isinstance(length, int) and length > c.positions:  # it is symbolic in an exported program
      raise errors.UserError(f"a text of {length} tokens; the model has {c.positions} positions")
    if attention_mask is None:
      attention_mask = jnp.ones_like(input_ids)
    x = self.embeddings(input_ids, token_type_ids, position_ids)
    if x.shape[-1] != c.hidden_size:
      x = self.project(x)
    x = self.encoder(x, attention.Mask(padding=attention_mask, segments=segment_ids))
    outputs = {"last_hidden_state": x}
    if c.pooler:
      outputs["pooler_output"] = jnp.tanh(self.pooler(x[:, 0]))
    if c.head == "tag":
      outputs["features"] = x
    elif c.pooler and c.reads_pooler:
      outputs["features"] = outputs["pooler_output"]
    else:
      outputs["features"] = heads.pool(x, attention_mask, c.pooling)
    if c.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    if c.head == "mlm":
      outputs["logits"] = self.lm_logits(x)
    return outputs

  def head(self, features):
    """Returns the logits (…, C) float32 of features (…, D): dropout and the classifier."""
    c, x = self.config, features
    if c.label_head in ("pre_classifier", "out_proj"):
      x = x if c.label_head == "pre_classifier" else self.dropout(x)
      x = layers.ACTIVATIONS[_TWO_LAYERS[c.model_type]](self.pre_classifier(x))
    return self.classifier(self.dropout(x)).astype(jnp.float32)

  def lm_logits(self, hidden):
    """Returns scores of words (…, V) float32 of hidden states (…, D), with the head "mlm"."""
    x = self.embeddings.word.attend(self.transform(hidden)).astype(jnp.float32)
    return x + self.decoder_bias.astype(jnp.float32)


def linear(config, features, dtype, name=None) -> layers.Linear:
  """Returns a linear layer that starts as the config says."""
  init = nn.initializers.normal(config.initializer_range)
  return layers.Linear(features, dtype=dtype, kernel_init=init, name=name)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  shape = (2, min(12, config.positions))
  mask = np.ones(shape, np.int32)
  mask[1, shape[1] // 2:] = 0
  ids = rng.integers(0, config.vocab_size, shape, np.int32)
  inputs = {"input_ids": np.where(mask, ids, config.pad_token_id).astype(np.int32),
            "attention_mask": mask}
  if config.type_vocab_size:
    inputs["token_type_ids"] = rng.integers(0, config.type_vocab_size, shape, np.int32)
  return inputs


def complete(hf: dict, folder: pathlib.Path) -> dict:
  """Returns config.json's content with the pooling that 1_Pooling/config.json states."""
  return {**hf, "pooling": heads.stated_pooling(folder) or "cls"}


parts = heads.parts


def fit(config: Config, shapes: dict) -> Config:
  """Returns the config of a file with these {our path: shape}: without pooler where none is due."""
  needed = config.reads_pooler and config.label_head == "classifier" and config.head == "classify"
  # The classes of transformers with a label head of their own have no pooler beside it.
  unused = config.label_head not in ("", "2_Dense")
  stored = "params/pooler/kernel" in shapes and not unused
  return dataclasses.replace(config, pooler=needed or stored)


def prefixed(config: Config) -> str | None:
  """Returns the name of the encoder in export, such as `bert.`, as transformers' class has it."""
  if config.head == "none" or config.label_head == "2_Dense":
    return None
  return {"xlm-roberta": "roberta."}.get(config.model_type, (config.model_type or "bert") + ".")


def companions(config: Config, files: dict) -> dict:
  """Returns the files beside weights and config.json, with those that say how to pool."""
  if config.pooling == "cls":
    return heads.without_pooling(files)
  labels = config.num_labels if config.label_head == "2_Dense" else 0
  return heads.with_pooling(files, config.hidden_size, config.pooling, labels)
