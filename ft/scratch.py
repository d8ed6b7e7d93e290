"""Small untrained models as checkpoints in a folder, where no pretrained one fits.

A run starts from such a folder like from any other. For translation: Marian's architecture
(Junczys-Dowmunt et al. 2018, arXiv:1804.00344) with random weights, and one vocabulary of byte
pairs (Sennrich et al. 2016, arXiv:1508.07909) for both languages, learnt from the texts. For
recommendation: SASRec or BERT4Rec with a row for each item of a table, whose transformer may come
from a model of another domain.
"""

import json
import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors, models
from ft.data import formats, histories, interactions, sources
from ft.models import bart, sasrec
from ft.weights import names, resolve

SPECIAL = ("</s>", "<unk>", "<pad>")


def write(folder, texts: Iterable[str], vocabulary: int = 4000, width: int = 256, layers: int = 2,
          heads: int = 4, positions: int = 256, seed: int = 0) -> models.Pretrained:
  """Learns a tokenizer, initialises a model and writes both; returns the model.

  Args:
    folder: to be made.
    texts: sources of texts, a line each, of all the languages.
    vocabulary: most tokens.
    width: D; the networks between are twice as wide.
    layers: of the encoder, and of the decoder.
    heads: of each attention.
    positions: most tokens of a text.
    seed: of the weights.

  Raises:
    UserError: the folder is there already, a source is not, or sizes do not fit.
  """
  folder = _absent(folder)
  tokenizer = learn(texts, vocabulary)
  config = bart.Config(
    model_type="marian", head="lm", vocab_size=tokenizer.get_vocab_size(), d_model=width,
    encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=2 * width,
    decoder_ffn_dim=2 * width, encoder_attention_heads=heads, decoder_attention_heads=heads,
    max_position_embeddings=positions, activation_function="swish", scale_embedding=True,
    eos_token_id=0, pad_token_id=2, decoder_start_token_id=2, bos_token_id=None,
    forced_eos_token_id=None)
  config.check({})
  files = {"tokenizer.json": tokenizer.to_str().encode()}
  made = _made("bart", config, files, "text", seed)
  models.export(made, folder)
  return made


def _absent(folder) -> pathlib.Path:
  folder = pathlib.Path(folder)
  if folder.exists():
    raise errors.UserError(f"{folder} is there already; name a folder to be made, or use this one")
  return folder


def _made(family: str, config, files: dict, modality: str, seed: int) -> models.Pretrained:
  """Returns a model of random weights."""
  of = models.family_module(family)
  module = of.Model(config)
  variables = jax.jit(lambda key: module.init(key, **of.probe_inputs(config)))(jax.random.key(seed))
  return models.Pretrained(family, module, variables, names.Report(), files, config, modality, ())


def learn(texts: Iterable[str], vocabulary: int):
  """Returns a tokenizers.Tokenizer of byte pairs that ends a text with </s>."""
  from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
  from tokenizers.models import BPE

  tokenizer = Tokenizer(BPE(unk_token="<unk>"))
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
  tokenizer.decoder = decoders.Metaspace()
  trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL),
                                min_frequency=2, show_progress=False)
  tokenizer.train_from_iterator(_lines(texts), trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
    single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 0)])
  return tokenizer


def _lines(texts: Iterable[str]):
  for name in texts:
    table = formats.read(resolve.resolve(name), formats.Options(format="text", display=name))
    yield from (record["text"] for record in table.records)


# ---- Recommenders --------------------------------------------------------------------------------


def write_recommender(folder, source: str, columns: dict | None = None, kind: str = "sasrec",
                      width: int = 64, layers: int = 2, heads: int = 2, positions: int = 50,
                      dropout: float = 0.5, start: str = "", seed: int = 0) -> models.Pretrained:
  """Initialises a recommender for the items of a table and writes it with items.json.

  Args:
    folder: to be made.
    source: of interactions, see ft/data/sources.py.
    columns: "item" -> its column, where its name does not say it.
    kind: "sasrec" or "bert4rec".
    width: D; the networks between are four times as wide.
    layers, heads: of the transformer.
    positions: T, items of a history that it reads.
    dropout: rate, everywhere.
    start: a model, or the folder of a run, whose transformer is taken, and its rows of items whose
      ids are in the table too; then kind, sizes and dropout are its own. "": all is random.
    seed: of what is random.

  Raises:
    UserError: the folder is there already, a source is not, or sizes do not fit.
  """
  folder = _absent(folder)
  _, table, indices = sources.table(sources.written(), source)
  column = histories.columns(columns, table, needed=("item",))["item"]
  items = list(dict.fromkeys(histories.names(table, indices, column, "item")))
  files = {interactions.ITEMS: json.dumps(items).encode()}
  rows = len(items) + 1
  if start:
    made = _continued(start, items, files, seed)
  else:
    config = sasrec.Config(
      model_type=kind, head="rank", vocab_size=rows + (kind == "bert4rec"), hidden_size=width,
      num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
      max_position_embeddings=positions).with_dropout(dropout)
    config.check({})
    made = _made("sasrec", config, files, sasrec.MODALITY, seed)
  models.export(made, folder)
  return made


def _continued(start: str, items: list[str], files: dict, seed: int) -> models.Pretrained:
  """Returns the model of another domain with a table for these items."""
  inner = pathlib.Path(start) / "model"
  source = models.load(str(inner) if inner.is_dir() else start, head="rank")
  if source.family != "sasrec":
    raise errors.UserError(f"--start={start}: a {source.family} model; a recommender starts from "
                           "SASRec or BERT4Rec")
  if interactions.ITEMS not in source.files:
    raise errors.UserError(f"--start={start}: it has no {interactions.ITEMS}, which says what its "
                           "items are")
  config = sasrec.Config.from_hf({
    **source.config.to_hf(), "mask_token_id": None,
    "vocab_size": len(items) + 1 + int(source.config.bidirectional)})
  made = _made("sasrec", config, files, sasrec.MODALITY, seed)
  old = {item: i for i, item in enumerate(json.loads(source.files[interactions.ITEMS]), 1)}
  shared = [(i, old[item]) for i, item in enumerate(items, 1) if item in old]
  taken = np.array([(0, 0), *shared]).T
  if config.bidirectional:
    taken = np.append(taken, [[config.mask_token_id], [source.config.mask_token_id]], 1)
  params, fresh = dict(source.variables["params"]), made.variables["params"]
  table, random = (p["item_embedding"]["embedding"] for p in (params, fresh))
  random = random * (table.std() / config.initializer_range)  # as large as what the layers know
  params["item_embedding"] = {"embedding": random.at[taken[0]].set(table[taken[1]])}
  if config.bidirectional:
    scored = taken[:, :-1]  # the mask has no score
    params["output_bias"] = jnp.zeros(config.scored).at[scored[0]].set(
      params["output_bias"][scored[1]])
  made.variables = {**source.variables, "params": params}
  return made
