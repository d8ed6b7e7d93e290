"""Every kind of source, its splits, its counts, and one clear message for each bad input."""

import gzip
import json

import ml_collections
import numpy as np
import pytest

from ft import errors
from ft.data import sources

CSV = "text,label,who\n" + "".join(
    f'"a {i}, quoted\nover lines",{"pos" if i % 2 else "neg"},{i // 4}\n' for i in range(40))
VADER = ("pypi:vaderSentiment==3.3.2/vaderSentiment-3.3.2/additional_resources/"
         "hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014/")


def config(modality="text", **given):
  values = {key: default for key, (default, *_) in sources.KEYS.items()}
  assert set(given) <= set(values)
  frozen = {k: ml_collections.FrozenConfigDict(v) if isinstance(v, dict) else v
            for k, v in given.items()}
  return ml_collections.ConfigDict({**values, "modality": modality, **frozen})


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def error(**given):
  with pytest.raises(errors.UserError) as e:
    sources.load(config(**given))
  return str(e.value)


def everything(data):
  return [row for rows in data.splits.values() for row in rows]


# Formats


def test_csv_with_quotes_over_lines(tmp_path):
  data = sources.load(config(train=write(tmp_path / "a.csv", "\ufeff" + CSV)))
  assert data.report["splits"] == {"train": 28, "validation": 4, "test": 8}
  assert data.report["labels"]["test"] == {"neg": 4, "pos": 4}
  assert data.columns == {"text": "text", "label": "label"}
  rows = sources.read(config(), str(tmp_path / "a.csv"))
  assert rows[3] == {"text": "a 3, quoted\nover lines", "label": "pos"}
  assert rows.where(3) == f"{tmp_path / 'a.csv'}: line 8"
  assert rows.select([3, 1])[0] == rows[3]


def test_attributes_stand_beside_the_row_where_the_source_has_them(tmp_path):
  path = write(tmp_path / "a.csv", "text,label,sex\nall good,1,F\nno good,0,\n")
  rows = sources.read(config(attributes=("sex", "age")), path)
  assert [row["attributes"] for row in rows] == [{"sex": "F"}, {"sex": ""}]
  assert "attributes" not in sources.read(config(), path)[0]


def test_two_files_of_parallel_lines(tmp_path):
  a = tmp_path / "a.en.gz"
  a.write_bytes(gzip.compress(b"one\n\ntwo, a comma\nthree\n"))
  b = write(tmp_path / "b.de", "eins\n\nzwei\n\n")
  rows = sources.read(config(), f"{a}, {b}")
  assert rows[1] == {"text": "two, a comma", "target": "zwei"}
  assert rows[2] == {"text": "three", "target": ""}  # the task names such a row
  assert rows.where(1) == f"{a} and {b}: line 3" and len(rows) == 3
  assert len(sources.read(config(), f"{a},{b}[:2]")) == 2
  short = write(tmp_path / "c.de", "eins\nzwei\n")
  assert f"{a} has 4 lines, {short} has 2" in error(train=f"{a},{short}")
  assert "two with a comma" in error(train=f"{a},{b},{short}")
  assert "absent.de" in error(train=f"{a},{tmp_path}/absent.de")
  assert "leave it empty" in error(train=f"{a},{b}", format="csv")


def test_columns_called_source_and_target(tmp_path):
  rows = sources.read(config(), write(tmp_path / "a.tsv", "source\ttarget\nin\tout\n"))
  assert rows[0] == {"text": "in", "target": "out"}
  file = write(tmp_path / "b.jsonl", json.dumps({"q": "in", "a": 7}) + "\n")
  rows = sources.read(config(columns={"text": "q", "target": "a"}), file)
  assert rows[0] == {"text": "in", "target": "7"}


def test_tsv_takes_quotes_as_they_come_and_giant_fields(tmp_path):
  giant = "x" * 300_000
  path = write(tmp_path / "a.tsv", f'ham\tsay "hi\nspam\t{giant}\nham\t"ok" then\n\n')
  rows = sources.read(config(header=False, names=["label", "text"]), path)
  assert [row["label"] for row in rows] == ["ham", "spam", "ham"]
  assert rows[0]["text"] == 'say "hi'
  assert rows[1]["text"] == giant
  quoted = write(tmp_path / "b.tsv", 'text\tlabel\n"a\tb"\tx\n')
  assert sources.read(config(quoting="standard"), quoted)[0]["text"] == "a\tb"
  csv = write(tmp_path / "c.csv", f"text,label\n{giant},a\n")
  assert sources.read(config(), csv)[0]["text"] == giant


def test_jsonl_with_several_labels(tmp_path):
  lines = [{"t": "one", "y": ["a", "b"]}, {"t": "two", "y": []}, {"t": "three", "y": 1.0}]
  path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)))
  rows = sources.read(config(columns={"text": "t", "label": "y"}), path)
  assert rows.labels == [["a", "b"], [], 1]
  assert rows.where(1).endswith("line 3")


def test_parquet(tmp_path):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet
  table = pa.table({"text": ["a", "b", None], "label": [0, 1, None]})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  rows = sources.read(config(), str(tmp_path / "a.parquet"))
  assert [rows[i] for i in range(2)] == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
  assert rows[2] == {"text": "", "label": None}


def test_npz_splits(tmp_path):
  images = np.arange(20 * 4, dtype=np.uint8).reshape(20, 2, 2)
  np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(20)[:, None] % 2,
           val_images=images[:4] + 100, val_labels=np.array([[1], [0], [1], [1]]))
  path = str(tmp_path / "a.npz")
  data = sources.load(config("image", train=f"{path}:train", validation=f"{path}:val"))
  assert data.report["splits"] == {"train": 16, "validation": 4, "test": 4}
  row = data.splits["validation"][0]
  assert row["image"].shape == (2, 2)
  assert row["label"] == 1
  assert data.splits["validation"].where(2) == f"{path}:val: row 2"
  assert "no arrays for the split 'tset'" in error(modality="image", train=f"{path}:tset")
  assert "Name a split" in error(modality="image", train=path)
  np.savez(tmp_path / "b.npz", images=np.array([{}], object))
  assert "plain arrays" in error(modality="image", train=str(tmp_path / "b.npz"))


def test_folder_of_images(tmp_path):
  for name in ("cat/2.png", "cat/1.jpg", "dog/x/3.PNG", "dog/.hidden/4.png", "dog/notes.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / name, name)
  rows = sources.read(config("image"), str(tmp_path))
  assert [(r["image"].name, r["label"]) for r in rows] == [
      ("1.jpg", "cat"), ("2.png", "cat"), ("3.PNG", "dog")]
  assert rows.where(0) == str(tmp_path / "cat/1.jpg")
  loose = sources.read(config("image"), str(tmp_path / "cat"))
  assert "label" not in loose[0]
  write(tmp_path / "5.png", "x")
  assert "beside the class folders cat, dog" in error(modality="image", train=str(tmp_path))


def test_folders_that_are_not_classes(tmp_path):
  for name in ("train/cat/1.png", "test/cat/2.png"):
    (tmp_path / name).parent.mkdir(parents=True)
    write(tmp_path / name, name)
  assert "look like splits" in error(modality="image", train=str(tmp_path))
  (tmp_path / "other").mkdir()
  write(tmp_path / "other/readme.md", "x")
  assert "no images in it" in error(modality="image", train=str(tmp_path / "other"))


def test_a_class_of_one_image_cannot_be_carved(tmp_path):
  for name in ("cat/1.png", "cat/2.png", "cat/3.png", "dog/4.png"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / name, name)
  assert "one image only of dog, so that none is left" in error(modality="image",
                                                                train=str(tmp_path))


def test_masks_of_images(tmp_path):
  for name in ("images/a.png", "images/b.jpg", "masks/a.png", "masks/b.png"):
    (tmp_path / "whole" / name).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / "whole" / name, name)
  rows = sources.read(config("image"), str(tmp_path / "whole"))
  assert [(row["image"].name, row["mask"].name) for row in rows] == [
      ("a.png", "a.png"), ("b.jpg", "b.png")]
  (tmp_path / "whole/masks/b.png").unlink()
  assert "1 of 2 images have no mask" in error(modality="image", train=str(tmp_path / "whole"))
  for name in ("test/good/0.png", "test/crack/0.png", "ground_truth/crack/0_mask.png"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / name, name)
  rows = sources.read(config("image"), str(tmp_path / "test"))
  assert [(row["label"], row["mask"] and row["mask"].name) for row in rows] == [
      ("crack", "0_mask.png"), ("good", None)]


def test_images_named_in_a_table(tmp_path):
  path = write(tmp_path / "a.csv", "image,label\nsub/1.png,x\n")
  assert sources.read(config("image"), path)[0]["image"] == tmp_path / "sub/1.png"


# Splits


def test_slices(tmp_path):
  path = write(tmp_path / "a.csv", "text\n" + "".join(f"row {i}\n" for i in range(10)))
  for spec, first, count in (("[:80%]", 0, 8), ("[80%:]", 8, 2), ("[2:5]", 2, 3), ("[-3:]", 7, 3),
                             ("[25%:75%]", 2, 6), ("[:]", 0, 10)):
    rows = sources.read(config(), path + spec)
    assert (len(rows), rows[0]["text"]) == (count, f"row {first}"), spec
  for spec in ("[80%]", "[a:b]", "[5:2]", "[:11]", "[:120%]"):
    assert "slice" in error(train=path + spec) or "more than all" in error(train=path + spec)


def test_sources_must_not_share_rows(tmp_path):
  path = write(tmp_path / "a.csv", CSV)
  data = sources.load(config(train=path + "[:50%]", test=path + "[50%:]"))
  assert data.report["splits"] == {"train": 18, "validation": 2, "test": 20}
  assert "share 10 rows" in error(train=path + "[:75%]", test=path + "[50%:]")
  assert "share 40 rows" in error(train=path, extra={"again": path})
  other = write(tmp_path / "b.csv", "text,label,who\nnew,pos,3\n")
  assert "share 1 values of who, such as 3" in error(train=path, test=other, group="who")


def test_extra_sets_and_fractions(tmp_path):
  path, other = write(tmp_path / "a.csv", CSV), write(tmp_path / "b.csv", "text,label\nx,pos\n")
  data = sources.load(config(train=path, extra={"far": other}, validation_fraction=0.0))
  assert list(data.splits) == ["train", "test", "far"]
  assert data.splits["far"].name == "far"
  assert "name of a split" in error(train=path, extra={"test": other})
  assert "nothing to train on" in error(train=path, validation_fraction=0.5, test_fraction=0.5)
  assert "too few rows" in error(train=other)


def test_groups_and_duplicates_never_straddle(tmp_path):
  data = sources.load(config(train=write(tmp_path / "a.csv", CSV), group="who"))
  owners = [{row["group"] for row in rows} for rows in data.splits.values()]
  assert sum(map(len, owners)) == 10
  rows = "".join(f"{'Same' if i % 2 else ' same '} {i // 4},a\n" for i in range(80))
  path = write(tmp_path / "b.csv", "text,label\n" + rows)
  data = sources.load(config(train=path))
  assert data.report["duplicates_of_train"] == {"validation": 0, "test": 0}
  data = sources.load(config(train=path, keep_duplicates_together=False))
  assert data.report["duplicates_of_train"]["test"] > 0


def test_duplicate_image_files_stay_together(tmp_path):
  for i in range(40):
    (tmp_path / str(i % 2)).mkdir(exist_ok=True)
    write(tmp_path / str(i % 2) / f"{i}.png", f"content {i // 4:02}")
  data = sources.load(config("image", train=str(tmp_path)))
  contents = [{row["image"].read_bytes() for row in rows} for rows in data.splits.values()]
  assert sum(map(len, contents)) == 10


def test_the_split_depends_on_its_seed_alone(tmp_path):
  path = write(tmp_path / "a.csv", CSV)
  first, again, other = (
      [row["text"] for row in sources.load(config(train=path, split_seed=s)).splits["test"]]
      for s in (0, 0, 1))
  assert first == again != other


def test_limit_keeps_labels_consistent(tmp_path):
  rows = "".join(f"text {i},{'abcdefghij'[i // 20]}\n" for i in range(200))
  data = sources.load(config(train=write(tmp_path / "a.csv", "text,label\n" + rows), limit=5))
  known = set(data.splits["train"].labels)
  assert data.report["splits"]["train"] == 5
  assert all(set(rows.labels) <= known for rows in data.splits.values())
  assert data.report["dropped"]["train"]["beyond data.limit"] == 135


def test_few_rows_a_label(tmp_path):
  path = write(tmp_path / "a.csv", CSV)
  data = sources.load(config(train=path, per_label=3))
  assert data.report["labels"]["train"] == {"neg": 3, "pos": 3}
  assert data.report["splits"] == {"train": 6, "validation": 4, "test": 8}
  assert data.report["dropped"]["train"]["beyond data.per_label"] == 22
  whole = [row["text"] for row in sources.load(config(train=path)).splits["train"]]
  kept = [row["text"] for row in data.splits["train"]]
  assert set(kept) < set(whole)
  other = sources.load(config(train=path, per_label=3, split_seed=1))
  assert kept != [row["text"] for row in other.splits["train"]]
  text = write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(40)))
  assert "data.per_label needs a label" in error(train=text, per_label=2)


def test_unknown_labels_are_in_open_alone(tmp_path):
  lines = "text,label\n" + "".join(f"row {i},{'abc'[i % 3]}\n" for i in range(60))
  path = write(tmp_path / "a.csv", lines)
  data = sources.load(config(train=path, unknown=("c",)))
  assert list(data.splits) == ["train", "validation", "test", "open"] and data.unknown == ("c",)
  assert {name: set(data.report["labels"][name]) for name in data.splits} == {
    "train": {"a", "b"}, "validation": {"a", "b"}, "test": {"a", "b"}, "open": {"a", "b", "c"}}
  counts = data.report["splits"]
  assert counts["open"] == counts["test"] + data.report["dropped"]["test"]["of data.unknown"]
  assert "no row has the label 'd'" in error(train=path, unknown=("d",))


def test_words_and_their_tags(tmp_path):
  path = write(tmp_path / "a.conll", "".join(f"word{i} O\nx B-A\n\n" for i in range(20)))
  data = sources.load(config(train=path))
  assert data.report["splits"] == {"train": 14, "validation": 2, "test": 4}
  row = data.splits["train"][0]
  assert row["words"][1] == "x" and row["label"] == ["O", "B-A"]
  lines = [{"tokens": ["a", "b"], "tags": ["O", 1]}, {"tokens": [], "tags": []}]
  path = write(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
  data = sources.load(config(train=path, columns=dict(words="tokens", label="tags"),
                             validation_fraction=0.0, test_fraction=0.0))
  assert data.splits["train"][0] == {"words": ["a", "b"], "label": ["O", 1]}
  assert data.report["dropped"]["train"] == {"no words": 1}


def test_dropped_rows_are_counted(tmp_path):
  path = write(tmp_path / "a.csv", CSV + "  ,pos,9\nno label,,9\n")
  data = sources.load(config(train=path))
  assert data.report["read"]["train"] == 42
  assert data.report["dropped"]["train"] == {"empty text": 1, "no label": 1}
  path = write(tmp_path / "b.csv", "text,label\n ,a\n")
  assert "no row of train is usable: {'empty text': 1}" in error(train=path)


def test_binarize(tmp_path):
  rows = "".join(f"text {i},{i / 10 - 2}\n" for i in range(41))
  path = write(tmp_path / "a.csv", "text,score\n" + rows + "x,\n")
  rule = {"column": "score", "at": 0.0, "margin": "0.5", "labels": ("bad", "good")}
  data = sources.load(config(train=path, binarize=rule))
  assert data.report["dropped"]["train"] == {"score within margin": 11, "no label": 1}
  for row in everything(data):
    assert row["label"] == ("good" if int(row["text"][5:]) > 20 else "bad")
  assert "did you mean 'margin'" in error(train=path, binarize={"column": "score", "marging": 1})
  assert "no column 'stars'" in error(train=path, binarize={"column": "stars"})
  assert "line 2: text is 'text 0'" in error(train=path, binarize={"column": "text"})


# Plain text, conversations


def test_plain_text_has_a_row_a_line(tmp_path):
  for name, content in (("a.txt", b"one\r\n\ntwo\n"), ("a.en", b"one\n \ntwo"),
                        ("a.de.gz", gzip.compress(b"one\n\ntwo\n"))):
    rows = sources.read(config(), write(tmp_path / name, content))
    assert list(rows) == [{"text": "one"}, {"text": "two"}]
    assert rows.where(1).endswith(f"{name}: line 3")
  packed = write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "three"}\n'))
  assert sources.read(config(), packed)[0] == {"text": "three"}
  assert "no whole gzip" in error(train=write(tmp_path / "c.txt.gz", gzip.compress(b"x" * 99)[:-9]))
  bad = write(tmp_path / "d.txt.gz", gzip.compress(b"ok\nna\xefve\n"))
  assert "line 2, byte 5 (0xef)" in error(train=bad)


def test_turns_stand_for_text(tmp_path):
  lines = [{"id": i, "turns": [["USER", f"hi {i % 5}"]] if i else []} for i in range(21)]
  path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
  data = sources.load(config(train=path))
  assert data.report["dropped"]["train"] == {"no turns": 1}
  assert data.splits["train"][0]["turns"][0][0] == "USER"
  parts = [{str(row["turns"]) for row in rows} for rows in data.splits.values()]
  assert not parts[0] & parts[1] and not parts[0] & parts[2]  # duplicates stay together


def test_a_source_may_say_itself_how_it_is_written(tmp_path):
  train = write(tmp_path / "a.csv", CSV)
  other = write(tmp_path / "b.txt", "1\tgood\tpos\n2\tbad\tneg\n")
  own = {"source": f"{other}[:1]", "format": "tsv", "header": False,
         "names": ("n", "words", "label"), "columns": {"text": "words"}}
  data = sources.load(config(train=train, extra={"b": own}))
  assert list(data.splits["b"]) == [{"text": "good", "label": "pos"}]
  assert "did you mean 'format'" in error(train=train, extra={"b": own | {"fromat": "tsv"}})
  assert "needs its source" in error(train=train, extra={"b": {"format": "tsv"}})


# Bad input


@pytest.mark.parametrize(("name", "content", "given", "words"), [
    ("a.csv", "", {}, ["a.csv is empty"]),
    ("a.csv", "text,label\n", {}, ["holds no rows"]),
    ("a.csv", "sms,label\nx,a\n", {}, ["no column for the text", "sms, label"]),
    ("a.csv", CSV, {"columns": {"text": "txt"}}, ["no column 'txt'", "mean 'text'", "text, label"]),
    ("a.csv", CSV, {"columns": {"label": "klass"}}, ["no column 'klass'", "data.columns.label"]),
    ("a.csv", CSV, {"columns": {"lable": "x"}}, ["no such role", "mean 'label'"]),
    ("a.csv", CSV, {"group": "patient"}, ["no column 'patient' (data.group)", "who"]),
    ("a.csv", "text,label\na,b\nc,d,e\n", {}, ["line 3 has 3 fields", "text, label"]),
    ("a.csv", 'text,label\na,b\n"c,d\ne,f\n', {}, ["line 3", "data.quoting=none"]),
    ("a.csv", "text,text\na,b\n", {}, ["named twice: text"]),
    ("a.csv", "a\tb\nc\td\n", {"names": ["x", "y"]}, ["data.names has 2"]),
    ("a.csv", b"text,label\nok,a\nna\xefve,b\n", {}, ["line 3, byte 18 (0xef)", "data.encoding"]),
    ("a.csv", "text\na\n".encode("utf-16"), {}, ["line 1, byte 0", "utf-16"]),
    ("a.csv", CSV, {"encoding": "utf-7000"}, ["utf-7000", "no encoding"]),
    ("a.jsonl", '{"text": "a"}\n{"text": \n', {}, ["line 2 is not JSON"]),
    ("a.jsonl", "[1]\n", {}, ["line 1 is list"]),
    ("a.parquet", "no parquet", {}, ["no readable Parquet"]),
    ("a.npz", "no npz", {}, ["no readable npz"]),
    ("a.dat", "x", {}, ["set data.format to one of", "parquet"]),
])
def test_bad_input_is_one_clear_message(tmp_path, name, content, given, words):
  message = error(train=write(tmp_path / name, content), **given)
  for word in words:
    assert word in message, message


def test_what_is_not_there(tmp_path):
  write(tmp_path / "train.csv", CSV)
  message = error(train=str(tmp_path / "trian.csv"))
  assert "did you mean 'train.csv'" in message
  assert "data.train is empty" in error()
  assert "needs a file" in error(train=str(tmp_path), format="csv")


def test_rows_to_predict_on_need_no_label(tmp_path):
  path = write(tmp_path / "a.csv", "sms\nhello\n")
  given = {"columns": {"text": "sms", "label": "class"}, "group": "who",
           "binarize": {"column": "stars"}}
  rows = sources.read(config(**given), path, labelled=False)
  assert rows[0] == {"text": "hello"}
  assert rows.labels is None


# TFDS


@pytest.fixture(scope="module", params=["array_record", "parquet"])
def prepared(request, tmp_path_factory):
  """A tiny data set of 20 texts with images, written in one of the two formats."""
  tfds = pytest.importorskip("tensorflow_datasets")
  import io

  from PIL import Image
  out = io.BytesIO()
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(out, "PNG")

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = tmp_path_factory.mktemp("pkg")

    def _info(self):
      return tfds.core.DatasetInfo(
          builder=self, supervised_keys=("sentence", "kind"), features=tfds.features.FeaturesDict({
              "sentence": tfds.features.Text(), "picture": tfds.features.Image(shape=(4, 4, 3)),
              "kind": tfds.features.ClassLabel(names=["minus", "plus"])}))

    def _split_generators(self, manager):
      return {"train": self._generate_examples(20), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
      for i in range(count):
        yield i, {"sentence": f"naïve {count} {i}", "picture": io.BytesIO(out.getvalue()),
                  "kind": i % 2}

  folder = tmp_path_factory.mktemp("tfds")
  builder = Tiny(data_dir=folder, file_format=request.param)
  builder.download_and_prepare()
  return str(builder.data_dir)


def test_tfds_without_tensorflow(prepared):
  data = sources.load(config(train=f"tfds:{prepared}:train[:60%]", test=f"tfds:{prepared}:test",
                             validation=f"tfds:{prepared}:train[60%:]"))
  assert data.report["splits"] == {"train": 12, "validation": 8, "test": 5}
  rows = everything(data)
  assert {row["label"] for row in rows} == {"minus", "plus"}
  assert len({row["text"] for row in rows}) == 25
  assert all(row["text"].startswith("naïve") for row in rows)
  assert data.splits["validation"].where(0).endswith(":train: row 12")
  assert "its splits" in error(train=f"tfds:{prepared}")
  assert "mean 'train'" in error(train=f"tfds:{prepared}:trian")
  assert "TFDS data set" in error(train="tfds:no_such_data_set:train")


def test_tfds_images_stay_encoded(prepared):
  given = {"columns": {"image": "picture"}}
  rows = sources.read(config("image", **given), f"tfds:{prepared}:test")
  assert rows[0]["image"].startswith(b"\x89PNG")


def test_tfds_count_is_checked(prepared, monkeypatch):
  import tensorflow_datasets as tfds
  original = tfds.core.DatasetBuilder.as_data_source
  monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source",
                      lambda self, split, **kw: original(self, split="train", **kw))
  assert "20 rows" in error(train=f"tfds:{prepared}:test")


# Real data


def test_counts_of_the_shared_data(shared):
  folder = shared / "data"
  data = sources.load(config(train=f"{folder}/spam-sms/SMSSpamCollection", format="tsv",
                             columns={"text": "SMS", "label": "Label"}))
  total = {c: sum(data.report["labels"][s][c] for s in data.splits) for c in ("ham", "spam")}
  assert total == {"ham": 4827, "spam": 747}
  assert data.report["duplicates_of_train"] == {"validation": 0, "test": 0}
  bank = f"{folder}/intent-banking77"
  data = sources.load(config(train=f"{bank}/train.csv", test=f"{bank}/test.csv",
                             columns={"label": "category"}))
  assert data.report["read"] == {"train": 10003, "test": 3080}
  assert len(data.report["labels"]["test"]) == len(data.report["labels"]["train"]) == 77
  chest = f"{folder}/medical-pneumoniamnist/pneumoniamnist.npz"
  data = sources.load(config("image", train=f"{chest}:train", validation=f"{chest}:val",
                             test=f"{chest}:test"))
  assert data.report["splits"] == {"train": 3882, "validation": 524, "test": 624}
  assert data.report["labels"]["train"]["0"] == 388


@pytest.mark.slow
def test_counts_of_the_packages():
  """Fetches two packages from the index on first use."""
  data = sources.load(config(
      train=VADER + "movieReviewSnippets_GroundTruth.txt", format="tsv", header=False,
      names=["id", "rating", "text"],
      binarize={"column": "rating", "at": 0.0, "margin": 0.5, "labels": ("negative", "positive")},
      extra={"tweets": VADER + "tweets_GroundTruth.txt"}))
  assert data.report["read"] == {"train": 10605, "tweets": 4200}
  assert sum(data.report["splits"][s] for s in ("train", "validation", "test")) == 10043
  textile = "pypi:conformal-clip-data==0.1.4/conformal_clip_data/data/textile_images/simulated"
  rows = sources.read(config("image"), textile)
  assert {c: rows.labels.count(c) for c in set(rows.labels)} == {
      "nominal": 1000, "local": 500, "global": 500}
