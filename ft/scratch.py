"""A small untrained translation model with a tokenizer of its own, as a checkpoint in a folder.

Where no pretrained model fits, a run starts from such a folder like from any other: Marian's
architecture (Junczys-Dowmunt et al. 2018, arXiv:1804.00344) with random weights, and one vocabulary
of byte pairs (Sennrich et al. 2016, arXiv:1508.07909) for both languages, learnt from the texts.
"""

import pathlib
from collections.abc import Iterable

import jax

from ft import errors, models
from ft.data import formats
from ft.models import bart
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
  folder = pathlib.Path(folder)
  if folder.exists():
    raise errors.UserError(f"{folder} is there already; name a folder to be made, or use this one")
  tokenizer = learn(texts, vocabulary)
  config = bart.Config(
    model_type="marian", head="lm", vocab_size=tokenizer.get_vocab_size(), d_model=width,
    encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=2 * width,
    decoder_ffn_dim=2 * width, encoder_attention_heads=heads, decoder_attention_heads=heads,
    max_position_embeddings=positions, activation_function="swish", scale_embedding=True,
    eos_token_id=0, pad_token_id=2, decoder_start_token_id=2, bos_token_id=None,
    forced_eos_token_id=None)
  config.check({})
  module = bart.Model(config)
  variables = jax.jit(lambda key: module.init(key, **bart.probe_inputs(config)))(
    jax.random.key(seed))
  files = {"tokenizer.json": tokenizer.to_str().encode()}
  made = models.Pretrained("bart", module, variables, names.Report(), files, config, "text", ())
  models.export(made, folder)
  return made


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
