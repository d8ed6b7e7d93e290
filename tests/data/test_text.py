"""Text becomes the tokens the checkpoint's tokenizer makes; lengths and counts are honest."""

import io
import json
import pickle
import sys
import types

import numpy as np
import pytest
import tokenizers

from ft import errors
from ft.data import text

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "good",
         "bad"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s"]
BERT = {"model_type": "bert", "vocab_size": len(VOCAB), "max_position_embeddings": 64,
        "type_vocab_size": 2, "pad_token_id": 0}


@pytest.fixture
def folder(tmp_path):
  """A checkpoint folder with vocab.txt only."""
  (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
  (tmp_path / "config.json").write_text(json.dumps(BERT))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
  return tmp_path


def make(folder, hf_config=None, **given):
  config = {key: default for key, (default, *_) in text.KEYS.items()} | {"max_length": 16} | given
  return text.Preprocess(types.SimpleNamespace(**config),
                         types.SimpleNamespace(folder=folder, hf_config=hf_config or BERT))


def words(preprocess, example):
  return preprocess.show(example).rpartition(" (")[0]


def test_special_tokens_segments_and_types(folder):
  preprocess = make(folder)
  example = preprocess({"text": "Good ONES", "text_b": "bad", "label": "x"})
  assert words(preprocess, example) == "[CLS] good ones [SEP] bad [SEP]"
  assert example["token_type_ids"].tolist() == [0, 0, 0, 0, 0, 1, 1]
  assert all(v.dtype == np.int32 for v in example.values())
  assert preprocess.length(example) == 7
  assert set(example) == set(preprocess.pad)
  assert "token_type_ids" not in make(folder, {**BERT, "type_vocab_size": 1})({"text": "one"})


@pytest.mark.parametrize(("direction", "single", "pair"), [
    ("right", "[CLS] one two three four [SEP]", "[CLS] one two [SEP] ten [SEP]"),
    ("left", "[CLS] seven eight nine ten [SEP]", "[CLS] nine ten [SEP] ten [SEP]")])
def test_truncation_keeps_special_tokens(folder, direction, single, pair):
  preprocess = make(folder, max_length=6, truncation=f"truncate-{direction}")
  long = " ".join(WORDS[:10])
  assert words(preprocess, preprocess({"text": long})) == single
  assert words(preprocess, preprocess({"text": long, "text_b": "ten"})) == pair
  assert words(preprocess, preprocess({"text": "one two three four"})).startswith("[CLS] one")
  assert preprocess.counts == {"truncated": 2, "too_long": 0}


def test_drop_and_error(folder):
  long = {"text": " ".join(WORDS[:10])}
  drop, stop = (make(folder, max_length=6, truncation=t) for t in ("drop", "error"))
  with pytest.raises(errors.RowError, match="12 tokens, more than data.max_length=6"):
    drop(long)
  assert drop.counts == {"truncated": 0, "too_long": 1}
  assert len(drop({"text": "one two three four"})["input_ids"]) == 6
  with pytest.raises(errors.UserError, match="12 tokens"):
    stop(long)
  with pytest.raises(errors.RowError):
    text.from_spec(stop.spec(), folder)(long)


@pytest.mark.parametrize("row", [{}, {"text": ""}, {"text": " \n"}, {"text": None},
                                 {"text": "\ud800"}])
def test_rows_without_text(folder, row):
  with pytest.raises(errors.RowError):
    make(folder)(row)


def test_limits_of_the_model(folder, tmp_path):
  with pytest.raises(errors.UserError, match="positions for 64 tokens"):
    make(folder, max_length=65)
  with pytest.raises(errors.UserError, match="positions for 62 tokens"):
    make(folder, {**BERT, "model_type": "xlm-roberta", "pad_token_id": 1}, max_length=63)
  with pytest.raises(errors.UserError, match="leaves no room"):
    make(folder, max_length=3)
  with pytest.raises(errors.UserError, match="do not belong together"):
    make(folder, {**BERT, "vocab_size": 5})
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.UserError, match="no tokenizer there"):
    make(tmp_path / "empty")
  (tmp_path / "empty/tokenizer.json").write_text("{")
  with pytest.raises(errors.UserError, match="cannot be read"):
    make(tmp_path / "empty")


def test_buckets(folder):
  assert make(folder, buckets=(32, 8, 8)).buckets == (8, 16)
  assert make(folder, buckets=()).buckets == (16,)
  with pytest.raises(errors.UserError, match="positive lengths"):
    make(folder, buckets=("a",))


def test_stored_padding_and_truncation_are_undone(folder):
  tokenizer = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"))
  tokenizer.enable_padding(length=12)
  tokenizer.enable_truncation(4)
  tokenizer.save(str(folder / "tokenizer.json"))
  preprocess = make(folder, truncation="drop")
  assert len(preprocess({"text": "one"})["input_ids"]) == 3
  assert len(preprocess({"text": " ".join(WORDS)})["input_ids"]) == 14


def test_spec_rebuilds_the_same_preprocessing(folder):
  preprocess = make(folder, max_length=6, truncation="truncate-left", columns={"text": "sms"})
  rebuilt = text.from_spec(json.loads(json.dumps(preprocess.spec())), folder)
  row = {"text": " ".join(WORDS)}
  assert preprocess(row)["input_ids"].tolist() == rebuilt(row)["input_ids"].tolist()
  assert rebuilt.spec() == preprocess.spec()
  assert rebuilt.columns == {"text": "sms"}
  copy = pickle.loads(pickle.dumps(preprocess))
  assert copy(row)["input_ids"].tolist() == preprocess(row)["input_ids"].tolist()
  (folder / "vocab.txt").write_text("\n".join([*VOCAB[:5], *reversed(WORDS), "##s"]))
  with pytest.raises(errors.UserError, match="not the one the model was trained with"):
    text.from_spec(preprocess.spec(), folder)


def test_the_rest_of_the_contract(folder):
  preprocess = make(folder)
  example = preprocess({"text": "one"})
  assert not preprocess.augments
  assert preprocess.finish(example) is example
  assert preprocess.show(example) == "[CLS] one [SEP] (3 tokens)"


# Rows to predict on


def read(path, content, **columns):
  path.write_bytes(content)
  return [str(row) if isinstance(row, Exception) else row
          for row in text.read_rows(str(path), columns)]


def test_read_rows_of_each_kind(tmp_path):
  assert read(tmp_path / "a.txt", b"one\r\ntwo\n") == [{"text": "one"}, {"text": "two"}]
  assert read(tmp_path / "a.csv", b'id,sms\n1,"one\ntwo"\n2,x\n', text="sms") == [
      {"text": "one\ntwo"}, {"text": "x"}]
  assert read(tmp_path / "a.tsv", b'text\ttext_b\nsay "hi\tb\n') == [
      {"text": 'say "hi', "text_b": "b"}]
  assert read(tmp_path / "a.jsonl", b'{"text": "a", "x": 1}\n\n{"text": "b"}\n') == [
      {"text": "a"}, {"text": "b"}]


def test_unreadable_rows_stop_nothing(tmp_path):
  lines = read(tmp_path / "a.txt", b"one\n\nna\xefve\ntwo\n")
  assert lines[0] == {"text": "one"}
  assert lines[1].endswith("line 2: no text")
  assert lines[2].endswith("line 3: not UTF-8 text")
  assert lines[3] == {"text": "two"}
  rows = read(tmp_path / "a.csv", b"text,b\none,1\ntwo\nthree,3\n")
  assert rows[1].endswith("line 3: 1 fields, the header has 2")
  assert rows[2] == {"text": "three"}
  rows = read(tmp_path / "a.jsonl", b'{"text": 1}\n{"text":\n[]\n{"text": "ok"}\n')
  assert [isinstance(r, str) for r in rows] == [True, True, True, False]


def test_read_rows_of_standard_input(monkeypatch):
  content = io.TextIOWrapper(io.BytesIO(b'one\n{"text": "two"}\n{not json}\n'), encoding="ascii")
  monkeypatch.setattr(sys, "stdin", content)
  assert list(text.read_rows("-")) == [{"text": "one"}, {"text": "two"}, {"text": "{not json}"}]


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(errors.UserError, match="no such file"):
    list(text.read_rows(str(tmp_path / "a.txt")))
  with pytest.raises(errors.UserError, match="is empty"):
    read(tmp_path / "a.txt", b"")
  with pytest.raises(errors.UserError, match="its columns are sms, label"):
    read(tmp_path / "a.csv", b"sms,label\nx,y\n")


# The reference implementation


def test_same_ids_as_transformers(folder):
  transformers = pytest.importorskip("transformers")
  reference = transformers.BertTokenizerFast.from_pretrained(folder)
  reference.save_pretrained(folder / "saved")
  for place in (folder, folder / "saved"):
    preprocess = make(place)
    for row in ({"text": "Good, ones tens ELEVEN"}, {"text": "six", "text_b": "sevens eight"}):
      expected = reference(*row.values(), return_token_type_ids=True)
      found = preprocess(row)
      assert {k: v.tolist() for k, v in found.items()} == dict(expected)
