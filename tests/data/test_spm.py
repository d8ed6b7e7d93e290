"""SentencePiece models against the library's own processor and transformers' Marian tokenizer."""

import json
import types

import numpy as np
import pytest

from ft import errors, scratch
from ft.data import pairs, spm, text

TEXTS = ("The quick brown fox jumps over the lazy dog.", "A man in a red shirt rides a bicycle!",
         "Two  dogs   play, 1234 times", " café naïve Zürich ﬁn ①", "snow 雪 ☃ and unknown letters",
         "semi-detached; it's the cat's", "")
ENGLISH = [f"{subject} {verb} {place} in {year}." for subject in (
  "A man", "Two dogs", "The girl", "My café", "Some children") for verb in (
  "runs over", "is playing on", "jumps into", "looks at", "rides through") for place in (
  "a red field", "the lazy river", "Zürich", "an old street", "the snow") for year in (1999, 2024)]
GERMAN = [line.replace("A man", "Ein Mann").replace("dogs", "Hunde").replace("the", "der")
          .replace("field", "Acker").replace("is playing on", "spielt über")
          for line in ENGLISH]


def train(folder, name, lines, kind="unigram", **options):
  sentencepiece = pytest.importorskip("sentencepiece")
  options = {"vocab_size": 120, "hard_vocab_limit": False, **options}
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_prefix=str(folder / "made"), model_type=kind,
    minloglevel=2, **options)
  (folder / "made.model").rename(folder / name)
  (folder / "made.vocab").unlink()
  return sentencepiece.SentencePieceProcessor(model_file=str(folder / name))


@pytest.mark.parametrize("kind, options", [
  ("unigram", {}), ("unigram", {"byte_fallback": True, "vocab_size": 400}),
  ("unigram", {"normalization_rule_name": "identity", "add_dummy_prefix": False,
               "remove_extra_whitespaces": False}),
  ("bpe", {"byte_fallback": True, "vocab_size": 420}), ("bpe", {}),
  ("unigram", {"user_defined_symbols": ["<mask>", "[X]"]}),
])
def test_ids_and_texts_are_the_librarys(tmp_path, kind, options):
  processor = train(tmp_path, "spiece.model", ENGLISH, kind, **options)
  made = spm.read(tmp_path, {}, "llama").tokenizer
  assert spm.read(tmp_path, {}, "llama").target is None
  for line in (*TEXTS, *ENGLISH[::7], *GERMAN[::7], "look <mask> and [X]!"):
    ids = made.encode(line, add_special_tokens=False).ids
    assert ids == processor.encode(line), line
    assert made.decode(ids) == processor.decode(ids).replace(" ⁇ ", "<unk>").strip() or (
      processor.unk_id() in ids)
  assert made.encode("A man").ids == [processor.bos_id(), *processor.encode("A man")]


def test_t5_ends_texts_and_has_sentinels_behind_its_vocabulary(tmp_path):
  processor = train(tmp_path, "spiece.model", ENGLISH, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
  made = spm.read(tmp_path, {}, "t5").tokenizer
  size = processor.get_piece_size()
  assert made.encode("A man").ids == [*processor.encode("A man"), 1]
  assert made.token_to_id("<extra_id_99>") == size
  assert made.token_to_id("<extra_id_0>") == size + 99
  assert size + 99 in made.encode("A <extra_id_0> man").ids


@pytest.fixture
def marian(tmp_path):
  """A Marian checkpoint as it is published: two models and one vocabulary for both."""
  folder = tmp_path / "marian"
  source = tmp_path / "texts.txt"
  source.write_text("\n".join(ENGLISH + GERMAN))
  scratch.write(folder, [str(source)], vocabulary=400, width=16, layers=1, heads=2)
  (folder / "tokenizer.json").unlink()
  known = {}
  for name, lines in (("source.spm", ENGLISH), ("target.spm", GERMAN)):
    processor = train(folder, name, lines)
    known |= dict.fromkeys(processor.id_to_piece(i) for i in range(processor.get_piece_size()))
  known = [token for token in known if token not in ("<s>", "</s>", "<unk>")]
  vocabulary = ["</s>", "<unk>", *sorted(known), "<pad>"]
  (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
  (folder / "tokenizer_config.json").write_text(json.dumps(
    {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de",
     "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}))
  return folder, vocabulary


def test_both_languages_are_those_of_transformers(marian):
  transformers = pytest.importorskip("transformers")
  folder, vocabulary = marian
  theirs = transformers.MarianTokenizer.from_pretrained(folder)
  read = spm.read(folder, json.loads((folder / "tokenizer_config.json").read_text()), "marian")
  for line in (*TEXTS[:-1], *ENGLISH[::5]):
    assert read.tokenizer.encode(line).ids == theirs(line).input_ids, line
  for line in (*TEXTS[:-1], *GERMAN[::5]):
    ids = read.target.encode(line).ids
    assert ids == theirs(text_target=line).input_ids, line
    said = theirs.decode(ids, skip_special_tokens=True)
    assert read.target.decode(ids, skip_special_tokens=True) == said
  # Whatever the model writes can be read, also tokens of the other language.
  every = [i for i, token in enumerate(vocabulary) if token.startswith("▁")]
  said = read.target.decode(every)
  assert all(vocabulary[i].strip("▁") in said for i in every)


def test_sources_and_targets_have_their_own(marian):
  folder, vocabulary = marian
  config = types.SimpleNamespace(max_length=32, truncation="truncate-right", buckets=(32,))
  hf_config = {"model_type": "marian", "eos_token_id": 0, "decoder_start_token_id":
               len(vocabulary) - 1, "pad_token_id": len(vocabulary) - 1}
  info = types.SimpleNamespace(folder=folder, hf_config=hf_config)
  preprocess = text.Preprocess(config, info)
  task = dict(prefix="", max_target=32, source_language="", target_language="")
  layout = pairs.Layout.of(_Keys(task), preprocess, decoder_only=False)
  made = pairs.Pairs(preprocess, layout)
  example = made.example({"text": ENGLISH[3], "target": GERMAN[3]})
  read = spm.read(folder, {}, "marian")
  np.testing.assert_array_equal(example["input_ids"], read.tokenizer.encode(ENGLISH[3]).ids)
  np.testing.assert_array_equal(example["labels"], read.target.encode(GERMAN[3]).ids)
  assert preprocess.decode(example["labels"]) == GERMAN[3]
  assert GERMAN[3] in made.show(example)


class _Keys(dict):
  __getattr__ = dict.__getitem__


def test_what_cannot_be_read(tmp_path):
  (tmp_path / "spiece.model").write_bytes(b"\x00nonsense")
  with pytest.raises(errors.UserError, match="not a SentencePiece model"):
    spm.read(tmp_path, {}, "t5")
  with pytest.raises(errors.UserError, match="xlm-roberta numbers the pieces of spiece.model anew"):
    spm.read(tmp_path, {}, "xlm-roberta")
  (tmp_path / "spiece.model").rename(tmp_path / "source.spm")
  with pytest.raises(errors.UserError, match=r"target\.spm and vocab\.json missing"):
    spm.read(tmp_path, {}, "marian")
