"""CoNLL files and the schemes of tags: what is read, what is refused and where it stands."""

import pytest

from ft import errors
from ft.data import formats, tags

CONLL = """-DOCSTART- -X- -X- O

# sent 1
EU NNP B-NP B-ORG
rejects VBZ B-VP O
# NN B-NP O

# sent 2
New\tNNP\tB-NP\tB-LOC
"""


def table(tmp_path, content, name="a.conll", **options):
  (tmp_path / name).write_text(content)
  return formats.read(tmp_path / name, formats.Options(display=name, **options))


def test_a_file_of_four_columns(tmp_path):
  found = table(tmp_path, CONLL)
  assert found.columns == ("0", "1", "2", "3") and found.roles == {"words": "0", "label": "3"}
  assert [record["0"] for record in found.records] == [["EU", "rejects", "#"], ["New"]]
  assert found.records[0]["3"] == ["B-ORG", "O", "O"]
  assert [found.where(i) for i in (0, 1)] == ["a.conll: line 4", "a.conll: line 9"]


def test_tabs_names_and_lines_that_end_otherwise(tmp_path):
  found = table(tmp_path, "New York\tB-LOC\r\n\r\n\r\nis\tO\r\n", "a.bio", names=("word", "tag"))
  assert found.roles == {"words": "word", "label": "tag"}
  assert [record["word"] for record in found.records] == [["New York"], ["is"]]


@pytest.mark.parametrize("content,options,message", [
  ("a O\nb\n", {}, "line 2 has 1 fields, and the first word has 2"),
  ("a X O\n", {"names": ("words", "tag")}, "line 1 has 3 fields, and data.names has 2"),
  ("\n\n", {}, "holds no rows")])
def test_malformed_files(tmp_path, content, options, message):
  with pytest.raises(errors.UserError, match=message):
    table(tmp_path, content, **options)


@pytest.mark.parametrize("scheme,given,want", [
  ("bio", "B-A I-A O B-A B-A", None),
  ("iob1", "I-A I-A O I-A B-A I-B", "B-A I-A O B-A B-A B-B"),
  ("bilou", "B-A I-A L-A U-B O B-A L-A", None),
  ("none", "NN VB NN", None)])
def test_tags_that_follow_their_scheme(scheme, given, want):
  labels = given.split()
  assert tags.check(["w"] * len(labels), labels, scheme) == (want or given).split()


@pytest.mark.parametrize("scheme,given,message", [
  ("bio", "O I-A", "word 2 has the label I-A after O.*task.scheme=iob1 reads such labels"),
  ("bio", "B-A I-B", "I-B after B-A"),
  ("bio", "B-A X", "word 2 has the label 'X', which is not of task.scheme=bio: O, B-TYPE, I-TYPE"),
  ("bio", "U-A", "'U-A', which is not of task.scheme=bio"),
  ("bilou", "B-A O", "O after B-A, which task.scheme=bilou forbids"),
  ("bilou", "B-A L-B", "L-B after B-A"),
  ("bilou", "I-A L-A", "I-A after O"),
  ("bilou", "U-A L-A", "L-A after U-A"),
  ("bilou", "O B-A", "the last label is B-A"),
  ("bio", "B-", "'B-', which is not of")])
def test_tags_that_break_their_scheme(scheme, given, message):
  labels = given.split()
  with pytest.raises(errors.RowError, match=message):
    tags.check(["w"] * len(labels), labels, scheme)


@pytest.mark.parametrize("words,labels,message", [
  (["a", "b"], ["O"], "2 words and 1 labels"),
  (["a"], ["O", "O"], "1 words and 2 labels"),
  (["a"], "O", "1 words and no list of labels"),
  ("a b", ["O", "O"], "no words: they should be a list"),
  (["a", ""], ["O", "O"], "word 2 is ''"),
  ([], [], "no words")])
def test_rows_whose_lists_do_not_fit(words, labels, message):
  with pytest.raises(errors.RowError, match=message):
    tags.check(words, labels, "bio")


def test_every_prefix_of_every_type():
  assert tags.everything(["O", "L-B", "U-A"], "bilou") == [
    "O", "B-A", "I-A", "L-A", "U-A", "B-B", "I-B", "L-B", "U-B"]
  assert tags.everything({"NN": 3, "DT": 1}, "none") == ["DT", "NN"]
