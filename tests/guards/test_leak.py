"""The leak guard: planted duplicates, groups, times and columns, and the metric on both halves."""

import dataclasses
import json
import string

import numpy as np
import pytest

from ft import guards, overlaps
from ft.data import formats, sources
from ft.guards import leak, overfit

WORDS = ["".join(np.random.default_rng(i).choice(list(string.ascii_lowercase), 2 + i % 6))
         for i in range(700)]


def table(records, name="reviews.csv"):
  columns = tuple(records[0])
  return formats.Table(name, columns, records, lambda i: f"{name}: line {i + 2}")


def rows(name, records, attributes=(), group=""):
  roles = {role: role for role in sources.ROLES if role in records[0]}
  if group:
    roles["group"] = group
  return sources.Rows(name, table(records, f"{name}.csv"), roles, np.arange(len(records)), None,
                      attributes)


def sentences(n, seed):
  rng = np.random.default_rng(seed)
  return [" ".join(rng.choice(WORDS, rng.integers(8, 20))) for _ in range(n)]


def texts(train=400, fresh=120, planted=80):
  """(train texts, test texts, (n,) whether each of test has a near-duplicate in train)."""
  known, other = sentences(train, 0), sentences(fresh, 1)
  copies = []
  for k in range(planted):
    words = known[3 * k].split()
    words[k % len(words)] = "other"
    copies.append([known[3 * k].upper() + "?", " ".join(words)][k % 2])
  order = np.random.default_rng(2).permutation(fresh + planted)
  return known, [(other + copies)[i] for i in order], order >= fresh


def score(outputs):
  return (outputs["logits"].argmax(axis=1) == outputs["label"]).astype(float)


def outputs(right, seed=0):
  """Outputs that are right where asked to be, with their rows in another order."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, 2, len(right))
  logits = np.eye(2)[np.where(right, label, 1 - label)]
  return {"label": label, "logits": logits, "index": np.arange(len(right))}


def measured(data, features=None, models=None, **changes):
  config = guards.defaults("leak")
  vars(config).update(changes)
  return leak.measure(config, guards.Evidence(
    metric="accuracy", rows=data, features=features or {}, score=score,
    metrics=lambda rows: {"accuracy": float(score(rows).mean())},
    outputs={"test": models} if models else {}))


def text_case(**changes):
  train, test, planted = texts()
  data = {"train": rows("train", [{"text": t, "label": "ab"[i % 2]} for i, t in enumerate(train)]),
          "test": rows("test", [{"text": t, "label": "a"} for t in test])}
  rng = np.random.default_rng(3)
  right = np.where(planted, True, rng.random(len(test)) < 0.6)
  shuffled = {key: value[::-1] for key, value in outputs(right).items()}
  return planted, measured(data, models={guards.TUNED: shuffled}, **changes)


def row(numbers, key, **given):
  return next(r for r in numbers[key] if all(r[k] == v for k, v in given.items()))


def test_near_duplicates_of_text_and_the_metric_of_both_halves():
  planted, found = text_case()
  numbers = found["numbers"]
  assert row(numbers, "between", split="test", method="exact")["rows"] == 40
  near = row(numbers, "between", split="test", method="any")
  assert near["rows"] == planted.sum() == 80 and near["n"] == 200
  assert near["interval"][0] < 0.4 < near["interval"][1]
  half = row(numbers, "halves", split="test", method="any", model=guards.TUNED)
  assert (half["leaked"]["n"], half["leaked"]["value"]) == (80, 1.0)
  assert half["clean"]["n"] == 120 and half["clean"]["value"] == pytest.approx(0.6, abs=0.1)
  assert half["inflation"] == pytest.approx(half["all"]["value"] - half["clean"]["value"])
  assert found["verdict"] == "alarm"
  assert found["words"].startswith("40.0 % [33.")
  assert "accuracy 100.0 on them, " in found["words"]
  example = numbers["examples"][0]
  assert example["place"].startswith("test.csv: line ")
  assert example["train_place"].startswith("train.csv: line ")


def test_the_verdict_follows_the_limits():
  assert text_case(inflation=1.0)[1]["verdict"] == "warning"
  assert text_case(inflation=1.0, near=0.5, exact=0.5)[1]["verdict"] == "ok"


def test_a_lower_metric_is_better():
  planted, _ = text_case()
  right = outputs(np.where(planted, True, np.arange(len(planted)) % 2 == 0))
  train, test, _ = texts()
  data = {"train": rows("train", [{"text": t} for t in train]),
          "test": rows("test", [{"text": t} for t in test])}
  found = leak.measure(guards.defaults("leak"), guards.Evidence(
    metric="mae", mode="min", rows=data, score=lambda o: 1 - score(o),
    metrics=lambda o: {"mae": float(1 - score(o).mean())},
    outputs={"test": {guards.TUNED: right}}))
  half = row(found["numbers"], "halves", method="any")
  assert half["leaked"]["value"] == 0 and half["inflation"] > 0.15
  assert found["verdict"] == "alarm" and "mae 0.000 on them" in found["words"]


def test_embeddings_find_planted_rows_and_say_whether_labels_agree():
  rng = np.random.default_rng(0)
  train = rng.normal(size=(600, 48)).astype(np.float32)
  test = rng.normal(size=(200, 48)).astype(np.float32)
  test[:60] = train[:60] * 2 + 0.2 * rng.normal(size=(60, 48))
  label = np.array(list("ab"))
  data = {"train": rows("train", [{"label": label[i % 2]} for i in range(600)]),
          "test": rows("test", [{"label": label[(i + (i < 15)) % 2]} for i in range(200)])}
  features = {"train": {"features": train}, "test": {"features": test}}
  found = measured(data, features)
  entry = row(found["numbers"], "between", split="test", method="embedding")
  assert entry["rows"] == 60 and entry["same_label"] == pytest.approx(0.75)
  assert found["numbers"]["settings"]["features"] == "raw"
  assert row(found["numbers"], "inside", split="train", method="embedding")["rows"] == 0
  # Features that all point the same way, as those behind a ReLU may, say nothing until centred.
  lifted = {name: {"features": part["features"] + 20} for name, part in features.items()}
  numbers = measured(data, lifted)["numbers"]
  assert numbers["settings"]["features"] == "centred"
  assert abs(row(numbers, "between", split="test", method="embedding")["rows"] - 60) <= 2


def test_features_that_do_not_set_rows_apart():
  data = {"train": rows("train", [{"text": t} for t in sentences(60, 15)]),
          "test": rows("test", [{"text": t} for t in sentences(40, 16)])}
  features = {name: {"features": np.arange(len(part))[:, None] + [[1.0, 1.0]]}
              for name, part in data.items()}
  numbers = measured(data, features)["numbers"]
  assert "do not set rows apart" in row(numbers, "missing", part="embedding")["reason"]
  assert row(numbers, "between", method="any")["rows"] == 0


def test_images_that_were_coded_again():
  from test_duplicates import changed, scenes

  pixels = scenes(150, np.random.default_rng(0))
  copies = [changed(pixels[i], ("jpeg", "brighter")[i % 2]) for i in range(40)]
  fresh = scenes(60, np.random.default_rng(1))
  data = {"train": rows("train", [{"image": p, "label": "a"} for p in pixels]),
          "test": rows("test", [{"image": p, "label": "a"} for p in [*copies, *fresh]])}
  numbers = measured(data)["numbers"]
  assert row(numbers, "between", split="test", method="exact")["rows"] == 0
  assert row(numbers, "between", split="test", method="picture")["rows"] == pytest.approx(40, abs=2)
  assert numbers["settings"]["pictures"] == 250
  assert row(measured(data, images=0)["numbers"], "missing",
             part="perceptual hash")["reason"].endswith("guard.leak.images is 0")


def test_repeats_inside_a_split_are_counted():
  base = sentences(100, 5)
  data = {"train": rows("train", [{"text": t} for t in base + base[:25]]),
          "test": rows("test", [{"text": t} for t in sentences(50, 6)])}
  numbers = measured(data)["numbers"]
  assert row(numbers, "inside", split="train", method="exact")["rows"] == 25
  assert row(numbers, "inside", split="train", method="minhash")["rows"] == 25
  assert row(numbers, "inside", split="test", method="any")["rows"] == 0


def test_groups_times_and_columns():
  train, test = sentences(300, 7), sentences(100, 8)
  label = lambda i: "ab"[i % 2]  # noqa: E731
  made = {}
  for name, part, first in (("train", train, 0), ("test", test, 280)):
    made[name] = rows(name, [
      {"text": t, "label": label(i), "patient": f"p{first + i}", "site": "xy"[i % 2],
       "sex": "mf"[i // 2 % 2], "dose": str(i % 2 + 0.001 * i),
       "date": f"2024-{1 + i % 12:02d}-01"} for i, t in enumerate(part)],
      attributes=("sex", "site", "dose"), group="patient")
  found = measured(made)
  numbers = found["numbers"]
  assert row(numbers, "groups", split="test")["rows"] == 20
  assert row(numbers, "times", split="test")["later"] == pytest.approx(0.5, abs=0.1)
  assert [r["column"] for r in numbers["columns"]][-1] == "sex"
  told = {r["column"]: r["accuracy"] for r in numbers["columns"]}
  assert told["site"] == 1 and told["dose"] > 0.95 and told["sex"] < 0.6
  assert found["verdict"] == "alarm"
  for words in ("20 of 100 test rows are of a group that is in train", "later than half",
                "the column site alone gives 100.0 % of the labels"):
    assert words in found["words"]
  late = [{**r, "date": "2025-03-01"} for r in made["test"].table.records]
  apart = {**made, "test": rows("test", late, group="patient")}
  assert row(measured(apart)["numbers"], "times", split="test")["later"] == 0


def test_rows_and_columns_of_a_table():
  """20 rows of 100 are in train but for their id, and one column is the label under a new name."""
  rng = np.random.default_rng(9)
  made = [{"id": str(i), "x": f"{rng.normal():.4f}", "colour": rng.choice(["red", "blue"]),
           "label": "ab"[i % 2], "outcome": "01"[i % 2]} for i in range(480)]
  again = [{**record, "id": f"again {i}"} for i, record in enumerate(made[:20])]

  def part(name, records):
    return dataclasses.replace(rows(name, records), whole=True, roles={"label": "label"},
                               ignored=("id",))

  found = measured({"train": part("train", made[:400]), "test": part("test", made[400:] + again)})
  numbers = found["numbers"]
  assert row(numbers, "between", split="test", method="exact")["rows"] == 20
  assert [r["column"] for r in numbers["columns"]][0] == "outcome"
  assert {r["column"] for r in numbers["columns"]} == {"x", "colour", "outcome"}
  assert "the column outcome alone gives 100.0 %" in found["words"]
  assert found["words"].endswith("Not measured: groups in two splits, order of time.")
  assert any("colour" in r["text"] and "colour" in r["train_text"] for r in numbers["examples"])


@dataclasses.dataclass(frozen=True)
class Series:
  name: str


@dataclasses.dataclass(frozen=True)
class Windows:
  """What `data.windows.Windows` offers of one split."""

  places: np.ndarray
  parts: np.ndarray
  series: tuple = (Series("a"),)
  labels = classes = None
  roles = ()

  def __len__(self):
    return len(self.places)

  def __getitem__(self, i):
    return {"window": i}

  def show(self, series, step):
    del series
    return f"day {step}"


def windows(first, last, part):
  at = np.arange(first, last)
  return Windows(np.stack([0 * at, at], 1), np.array([part]))


def test_windows_of_series():
  train, test = windows(20, 90, (0, 100)), windows(100, 140, (100, 150))
  found = measured({"train": train, "test": test})
  assert row(found["numbers"], "between", method="windows")["rows"] == 0
  assert found["verdict"] == "ok" and "0 of 40 test windows" in found["words"]
  found = measured({"train": train, "test": windows(95, 145, (90, 150))})
  assert row(found["numbers"], "between", method="windows")["rows"] == 5
  assert found["verdict"] == "alarm"


def test_a_half_that_is_too_small_has_no_metric():
  base, other = sentences(100, 9), sentences(90, 10)
  data = {"train": rows("train", [{"text": t} for t in base]),
          "test": rows("test", [{"text": t} for t in base[:10] + other])}
  found = measured(data, models={guards.TUNED: outputs(np.ones(100, bool))})
  half = row(found["numbers"], "halves", method="any")
  assert half["leaked"] == {"n": 10, "value": None, "lo": None, "hi": None}
  assert half["clean"]["value"] == 1 and "too few for a metric of their own" in found["words"]


def test_many_rows_are_sampled_and_the_number_is_said():
  data = {"train": rows("train", [{"text": t} for t in sentences(300, 11)]),
          "test": rows("test", [{"text": t} for t in sentences(150, 12)])}
  model = {guards.TUNED: outputs(np.ones(150, bool))}
  numbers = measured(data, models=model, rows=100)["numbers"]
  assert numbers["splits"] == [{"split": "train", "n": 100, "of": 300},
                               {"split": "test", "n": 100, "of": 150}]
  json.dumps(numbers, default=float)


def test_outputs_without_an_index_are_of_all_rows():
  planted, _ = text_case()
  part = overlaps.Part(len(planted), np.arange(len(planted)), [], [], [], None, None)
  assert leak._places({"logits": planted}, part).tolist() == list(range(len(planted)))
  assert leak._places({"logits": planted[:7]}, part) is None
  assert leak._places({"logits": planted[:7], "index": np.arange(7)}, part) is None
  assert leak._places(None, part) is None


@pytest.mark.parametrize("data, reason", [
  ({}, "no rows of train"),
  ({"train": rows("train", [{"label": "a"}] * 40)}, "of no other split"),
  ({"train": rows("train", [{"label": "a"}] * 40), "test": rows("test", [{"label": "a"}] * 40)},
   "rows have no text, image or sound")])
def test_missing_input_is_not_measured(data, reason):
  found = measured(data)
  assert found["verdict"] == "not measured" and reason in found["words"]


@pytest.mark.parametrize("group, reason", [
  ("", "no column of groups"), ("one", "one value only")])
def test_groups_that_cannot_be_looked_at(group, reason):
  made = {name: rows(name, [{"text": t, "one": "x", "date": "soon"} for t in sentences(60, seed)],
                     group=group)
          for name, seed in (("train", 13), ("test", 14))}
  numbers = measured(made)["numbers"]
  assert reason in row(numbers, "missing", part="groups")["reason"]
  assert "does not hold times" in row(numbers, "missing", part="times")["reason"]


def test_the_halves_are_what_the_results_table_says():
  """The metric on all rows is that of `overfit.results`, by the same way."""
  planted, found = text_case()
  del planted
  half = row(found["numbers"], "halves", method="any")
  train, test, truth = texts()
  right = np.where(truth, True, np.random.default_rng(3).random(len(test)) < 0.6)
  table = overfit.results(guards.Evidence(
    metric="accuracy", score=score, metrics=lambda o: {"accuracy": float(score(o).mean())},
    outputs={"test": {guards.TUNED: outputs(right)}}))
  assert half["all"]["value"] == table["test"][guards.TUNED]["metrics"]["accuracy"]
