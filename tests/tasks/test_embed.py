"""Embeddings: what rows become, search and similarity by hand, a run to its end."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from commands import script
from ml_collections import config_dict

from ft import errors, models
from ft.data import sources, text
from ft.tasks import embed

ROOT = __file__.rpartition("/tests/")[0]
PAIRS = "text,text_b\n" + "".join(f"good film {i},great movie {i}\n" for i in range(20))


def make(tiny, path, given=None, **data):
  values = {key: default for key, (default, *_) in sources.KEYS.items()}
  data = {"validation_fraction": 0.0, "test_fraction": 0.0, **data}
  config = config_dict.ConfigDict({**values, "modality": "text", "train": str(path), **data})
  rest = {key: default for key, (default, *_) in text.KEYS.items()} | {"max_length": 16}
  preprocess = text.Preprocess(types.SimpleNamespace(**rest), models.inspect(str(tiny.model)))
  keys = {key: entry[0] for key, entry in embed.KEYS.items()} | (given or {})
  return embed.Task(config_dict.ConfigDict(keys), sources.load(config), preprocess)


def write(path, content):
  path.write_text(content)
  return path


def counting(variables, inputs, rng):
  """Features (B, 2) that can be worked out: sum of the ids, and one."""
  ids = jnp.asarray(inputs["input_ids"] * inputs["attention_mask"], jnp.float32)
  return {"features": jnp.stack([ids.sum(-1), jnp.ones(len(ids))], -1)}


def batched(task, rows):
  made = [task.example(row) for row in rows]
  length = max(len(one["input_ids"]) for one in made)
  pad = lambda x: np.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
  stacked = {key: np.stack([pad(one[key]) if key in task.preprocess.pad else one[key]
                            for one in made]) for key in made[0]}
  return stacked | {"weight": np.ones(len(rows), np.float32)}


def test_the_texts_of_a_row_stand_side_by_side(tiny, tmp_path):
  path = write(tmp_path / "a.csv", "text,text_b,negative\ngood film,it was great,poor\n")
  task = make(tiny, path)
  row = {"text": "good film", "text_b": "it was great", "negative": "poor"}
  example = task.example(row)
  assert example["input_ids"].shape == (5, 3)
  for side, role in enumerate(("text", "text_b", "negative")):
    alone = task.preprocess({"text": row[role]})
    size = len(alone["input_ids"])
    np.testing.assert_array_equal(example["input_ids"][:size, side], alone["input_ids"])
    np.testing.assert_array_equal(example["attention_mask"][:, side], np.arange(5) < size)
  assert task.show(example) == ("[CLS] good film [SEP] (4 tokens) | [CLS] it was great [SEP] "
                                "(5 tokens) | [CLS] poor [SEP] (3 tokens)")
  batch = batched(task, [row, {**row, "text_b": "was"}])
  out = task.predict(counting, {}, batch)
  ids = task.preprocess({"text": "it was great"})["input_ids"].sum()
  np.testing.assert_allclose(out["document"][0], np.array([ids, 1]) / np.hypot(ids, 1), rtol=1e-6)
  assert out["query"].shape == (2, 2)
  alone = task.predict(counting, {}, {key: value[None] for key, value in
                                      task.unlabelled({"text": "it was great"}).items()})
  np.testing.assert_allclose(alone["embedding"][0], out["document"][0], rtol=1e-6)


def test_loss_sums_over_real_rows(tiny, tmp_path):
  task = make(tiny, write(tmp_path / "a.csv", PAIRS))
  rows = [{"text": "good", "text_b": "great"}, {"text": "bad", "text_b": "poor film"},
          {"text": "dull", "text_b": "slow"}]
  batch = batched(task, rows)
  two = {key: value[:2] for key, value in batch.items()}
  whole, weight, _ = task.loss(counting, {}, two, None)
  batch["weight"][2] = 0  # fills the batch up
  masked, count, _ = task.loss(counting, {}, batch, None)
  assert float(masked) == pytest.approx(float(whole), rel=1e-5) and float(weight) == float(count)


def test_search_by_hand(tiny, tmp_path):
  task = make(tiny, write(tmp_path / "a.csv", PAIRS))
  unit = lambda *angles: np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)  # noqa: E731
  out = {"query": unit(0.0, 0.6, 2.0), "document": unit(0.1, 0.2, 1.9),
         "group": np.array([7, 8, 9])}
  # Query 1 (0.6) finds 0.2 first, its own; query 0 finds 0.1; query 2 finds 1.9.
  assert task.metrics(out)["mrr"] == 1
  out["query"] = unit(0.3, 0.6, 2.0)  # now document 1 is nearer to query 0 than its own
  found = task.metrics(out)
  assert found["mrr"] == pytest.approx((1 / 2 + 1 + 1) / 3) == task.value(out)
  assert found["recall@1"] == pytest.approx(2 / 3) and found["recall@5"] == 1
  assert found["ndcg@10"] == pytest.approx((1 / np.log2(3) + 1 + 1) / 3)
  np.testing.assert_allclose(task.score(out), [0.5, 1, 1])
  out["group"] = np.array([7, 7, 9])  # the same text twice is one document
  assert task.metrics(out)["mrr"] == 1


def test_classes_find_each_other(tiny, tmp_path):
  path = write(tmp_path / "a.csv", "text,label\ngood,a\nbad,b\ngreat,a\nslow,b\n")
  task = make(tiny, path)
  assert task.kind == "classes" and task.needs == ("label",)
  angles = np.array([0.0, 0.1, 0.15, 3.0])
  out = {"embedding": np.stack([np.cos(angles), np.sin(angles)], 1), "label": [1, 2, 1, 2]}
  # Row 0: 1 (b), 2 (a): rank 2. Row 1: 2, 0, 3: rank 3. Row 2: 1, 0: rank 2. Row 3: 2, 1: rank 2.
  np.testing.assert_allclose(task.score(out), [1 / 2, 1 / 3, 1 / 2, 1 / 2])


@pytest.mark.parametrize("given,count", [({"loss": "cosine"}, 12), ({}, 4)])
def test_pairs_are_drawn_from_labels(tiny, tmp_path, given, count):
  """cosine: positives 2·3/2·2 = 6, negatives 4, both as many as the larger; else one a row."""
  from ft.data import loader

  path = write(tmp_path / "a.csv", "text,label\ngood,a\nbad,b\ngreat film,a\nslow,b\n")
  task = make(tiny, path, given)
  rows = task._rows["train"]
  examples = loader.prepare(rows, task.example, preprocess=task.preprocess)
  pairs = task.training(examples)
  assert len(pairs) == count
  same = sum(float(pairs[i]["target"]) for i in range(count))
  assert same == (6 if given else 4)
  batch = loader.Loader(pairs, 4, pad=task.preprocess.pad, shuffle=True).batch(0)
  assert batch["input_ids"].shape[-1] == 2
  total, weight, _ = task.loss(counting, {}, batch, None)
  assert np.isfinite(float(total)) and float(weight) == 4


def test_scored_pairs_are_judged_by_rank(tiny, tmp_path):
  path = write(tmp_path / "a.csv", "text,text_b,target\ngood,great,0.9\ngood,bad,0.1\n")
  task = make(tiny, path, {"loss": "cosine", "metric": "spearman"})
  assert task.kind == "scored" and task.score is None
  out = {"cosine": np.array([0.1, 0.5, 0.2, 0.9]), "target": np.array([0, 2, 1, 3])}
  assert task.metrics(out) == {"spearman": pytest.approx(1)}
  batch = batched(task, [{"text": "good", "text_b": "good", "target": "0.5"}])
  total, _, aux = task.loss(counting, {}, batch, None)
  assert float(aux["cosine"]) == pytest.approx(1) and float(total) == pytest.approx(0.25)
  words = task.baselines({"train": {**out, "target": np.array([0.9, 0.1]),
                                    "index": np.array([0, 1])}})["BM25"]["train"]
  np.testing.assert_array_equal(words["cosine"], [0, 0])


def test_search_by_words(tiny, tmp_path):
  content = ("text,text_b\nthe dull film,a film that is dull\nslow plot,plot slow\nx,y\n"
             "z,plot slow\n")
  task = make(tiny, write(tmp_path / "a.csv", content))
  examples = [task.example(row) for row in task._rows["train"]]
  features = {"train": {"group": np.array([one["group"] for one in examples]),
                        "index": np.arange(4)}}
  found = task.baselines(features)["BM25"]["train"]
  np.testing.assert_array_equal(found["mrr"][:2], [1, 1])
  assert task.score(found)[3] < 1 and set(task.metrics(found)) == {
    "mrr", "ndcg@10", "recall@1", "recall@5", "recall@10"}


@pytest.mark.parametrize("content,given,message", [
  ("text\ngood\n", {}, "two texts a row, or texts of classes"),
  (PAIRS, {"loss": "cosine"}, "task.loss=cosine"),
  (PAIRS, {"metric": "spearman"}, "task.metric=spearman"),
  ("text,text_b,target\na,b,1\n", {"metric": "spearman"}, "task.loss=contrastive")])
def test_messages(tiny, tmp_path, content, given, message):
  with pytest.raises(errors.UserError, match=message):
    make(tiny, write(tmp_path / "a.csv", content), given)


def test_sides_that_are_empty_and_targets_that_are_none(tiny, tmp_path):
  task = make(tiny, write(tmp_path / "a.csv", PAIRS))
  with pytest.raises(errors.RowError, match="text_b is empty: a pair needs both its sides"):
    task.example({"text": "good", "text_b": " "})
  path = write(tmp_path / "b.csv", "text,text_b,target\na,b,1\n")
  task = make(tiny, path, {"loss": "cosine", "metric": "spearman"})
  with pytest.raises(errors.UserError, match="'far' is no finite number"):
    task.example({"text": "a", "text_b": "b", "target": "far"})


def test_one_class_makes_no_pairs(tiny, tmp_path):
  from ft.data import loader

  path = write(tmp_path / "a.csv", "text,label\ngood,a\nbad,a\n")
  task = make(tiny, path)
  examples = loader.prepare(task._rows["train"], task.example, preprocess=task.preprocess)
  with pytest.raises(errors.UserError, match="two labels or more"):
    task.training(examples)


def test_a_run_from_file_to_prediction(tiny, tmp_path):
  rng = np.random.default_rng(0)
  words = "bad bland bright dull fine good great grim poor slow warm film movie plot".split()
  lines = ["question,answer"]
  for _ in range(160):
    chosen = list(rng.choice(words, 4, replace=False))
    lines.append(f"{' '.join(chosen)},it was {' '.join(rng.permutation(chosen))}")
  path = write(tmp_path / "a.csv", "\n".join(lines) + "\n")
  (tmp_path / "embed.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(tiny.model)!r}, pooling="mean"),
    data=dict(train={str(path)!r}, columns=dict(text="question", text_b="answer"), max_length=16),
    task=dict(name="embed"), optim=dict(rate=3e-3), guard=dict(overfit=dict(resamples=100)),
    train=dict(batch=16, steps=40, eval_every=20, log_every=5, train_sample=16),
  )
""")
  out = tmp_path / "out"
  script("train", f"--config={tmp_path / 'embed.py'}", f"--workdir={out}")
  card = json.loads((out / "card.json").read_text())
  rows = card["results"]["test"]
  assert set(rows) == {"zero-shot", "BM25", "fine-tuned"}
  assert rows["BM25"]["metrics"]["mrr"] > 0.9  # the same words in another order
  assert rows["fine-tuned"]["metrics"]["mrr"] > rows["zero-shot"]["metrics"]["mrr"] - 0.05
  assert {"low", "verdict"} & card["differences"]["test"]["fine-tuned - BM25"].keys()
  assert " | " in card["data"]["first_example"]
  (tmp_path / "rows.txt").write_text("good film\n")
  said = script("predict", f"--run={out}", f"--input={tmp_path / 'rows.txt'}").stdout
  vector = np.array(json.loads(said)["embedding"])
  assert vector.shape == (32,) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
  stated = json.loads((out / "model" / "1_Pooling" / "config.json").read_text())
  assert stated["pooling_mode_mean_tokens"]
