"""Tagging: alignment against transformers, seqeval's numbers, a run to its end."""

import json
import types
from importlib import metadata

import jax
import numpy as np
import pytest
from commands import script
from ml_collections import config_dict

from ft import errors, models, state
from ft.data import sources, text
from ft.tasks import tag

ROOT = __file__.rpartition("/tests/")[0]
GOLD = ["B-A I-A O B-B", "O B-A O O", "B-B O B-A I-A"]
SAID = ["B-A I-A O O", "O I-A I-B O", "B-B B-A I-A I-A"]


def make(folder, path, scheme="bio", strict=False, max_length=32, **data):
  values = {key: default for key, (default, *_) in sources.KEYS.items()}
  config = config_dict.ConfigDict({**values, "modality": "text", "train": str(path), **data})
  rest = {key: default for key, (default, *_) in text.KEYS.items()} | {"max_length": max_length}
  preprocess = text.Preprocess(types.SimpleNamespace(**rest), models.inspect(str(folder)))
  return tag.Task(config_dict.ConfigDict({"scheme": scheme, "strict": strict}),
                  sources.load(config), preprocess)


def write(path, sentences):
  """Writes sentences of (word, tag) pairs as a CoNLL file."""
  path.write_text("".join("".join(f"{w} {t}\n" for w, t in words) + "\n" for words in sentences))
  return path


def sentences(rows, seed=0):
  """Good and bad films: "great movie" is a B-GOOD I-GOOD, and so on."""
  rng, made = np.random.default_rng(seed), []
  for i in range(rows):
    words = [(str(rng.choice(["it", "was", "movie", "the", "movie"])), "O")
             for _ in range(rng.integers(1, 5))]
    kind, word = [("GOOD", "great"), ("BAD", "poor")][i % 2]
    made.append(words + [(word, f"B-{kind}"), ("movie", f"I-{kind}"), (f"x{i}", "O")])
  return made


@pytest.fixture(scope="module")
def task(tiny, tmp_path_factory):
  path = write(tmp_path_factory.mktemp("tag") / "a.conll", sentences(60))
  return make(tiny.model, path)


def outputs(task, gold=GOLD, said=SAID):
  width = 6
  rows = [np.full((len(gold), width), fill, np.int32) for fill in (-1, 0)]
  for made, lines in zip(rows, (gold, said), strict=True):
    for row, line in zip(made, lines, strict=True):
      row[:len(line.split())] = [task.labels.index(tag) for tag in line.split()]
  return {"gold": rows[0], "decided": rows[1]}


# ---- Alignment ----


@pytest.mark.parametrize("kind", ["wordpiece", "bytes"])
def test_first_pieces_are_those_of_transformers(tmp_path, kind):
  tokenizers = pytest.importorskip("tokenizers")
  transformers = pytest.importorskip("transformers")
  lines = ["Unaffable Zürich-based engineers rewrote it , quickly .", "Ada Lovelace's 1843 notes"]
  if kind == "wordpiece":
    made = tokenizers.BertWordPieceTokenizer()
    made.train_from_iterator(lines * 3, vocab_size=70, show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
      sep_token="[SEP]")
    size = made.get_vocab_size()
  else:
    made = tokenizers.ByteLevelBPETokenizer(add_prefix_space=True)
    made.train_from_iterator(lines * 3, vocab_size=300, show_progress=False,
                             special_tokens=["<pad>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    size = made.get_vocab_size()
  fast.save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(
    {"model_type": "bert", "vocab_size": size, "max_position_embeddings": 512}))
  path = write(tmp_path / "a.conll", [[(w, "O") for w in line.split()] for line in lines] +
               [[(f"w{i}", "B-A")] for i in range(20)])
  task = make(tmp_path, path, max_length=128)
  for line in lines:
    words = line.split()
    example = task.example({"words": words, "label": ["O"] * len(words)})
    theirs = fast(words, is_split_into_words=True)
    assert example["input_ids"].tolist() == theirs["input_ids"]
    ids = theirs.word_ids()
    assert example["first"][:len(words)].tolist() == [ids.index(i) for i in range(len(words))]
    assert (example["first"][len(words):] == -1).all() and example["words"] == len(words)


def test_cut_words_are_outside_and_judged(tiny, tmp_path):
  path = write(tmp_path / "a.conll", sentences(60))
  task = make(tiny.model, path, max_length=10)
  words = ["the"] * 9 + ["great"]
  example = task.example({"words": words, "label": ["O"] * 9 + ["B-GOOD"]})
  assert example["first"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, -1, -1]
  assert example["gold"].tolist() == [0] * 9 + [task.labels.index("B-GOOD")]
  assert "(cut)" in task.show(example) and task.preprocess.counts["truncated"] == 1
  with pytest.raises(errors.RowError, match="11 words, more than data.max_length=10"):
    task.unlabelled({"words": ["a"] * 11})

  def apply(variables, inputs, rng):
    good = np.zeros((1, 10, len(task.labels)), np.float32)
    good[..., task.labels.index("B-GOOD")] = 1
    return {"logits": good}

  batch = {key: value[None] for key, value in example.items()} | {"weight": np.ones(1, np.float32)}
  out = task.predict(apply, {}, batch)
  assert np.asarray(out["decided"])[0].tolist() == [task.labels.index("B-GOOD")] * 8 + [0, 0]
  total, weight, aux = task.loss(apply, {}, batch, None)
  assert float(weight) == 8 and float(aux["accuracy"]) == 0


# ---- Loss ----


def test_loss_equals_transformers(tiny, task):
  torch = pytest.importorskip("torch")
  import transformers

  pretrained = models.load(str(tiny.model), **task.model_args)
  folder = tiny.folder / "tagger"
  models.export(pretrained, folder)
  reference = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
  rows = [task.example({"words": [w for w, _ in s], "label": [t for _, t in s]})
          for s in sentences(5, 3)]
  length = max(len(row["input_ids"]) for row in rows)
  batch = {key: np.stack([np.pad(row[key], (0, length - len(row[key]))) if key in
                          task.preprocess.pad else row[key] for row in rows]) for key in rows[0]}
  labels = np.full((5, length), -100)
  for i, row in enumerate(rows):
    real = row["gold"] >= 0
    labels[i, row["first"][real]] = row["gold"][real]
  with torch.no_grad():
    want = reference(**{key: torch.tensor(batch[key]).long() for key in task.preprocess.pad},
                     labels=torch.tensor(labels)).loss.item()
  batch["weight"] = np.ones(5, np.float32)
  apply = state.make_apply(pretrained.module)
  call = lambda variables, inputs, rng=None: apply(variables, inputs, rng)[0]  # noqa: E731
  total, weight, _ = jax.jit(lambda v, b: task.loss(call, v, b, None))(pretrained.variables, batch)
  assert float(total / weight) == pytest.approx(want, abs=1e-5)
  assert float(weight) == (labels >= 0).sum()
  batch["weight"][1:] = 0
  half = jax.jit(lambda v, b: task.loss(call, v, b, None))(pretrained.variables, batch)
  assert float(half[1]) == (labels[0] >= 0).sum()


# ---- Metrics ----


@pytest.mark.parametrize("scheme,strict,gold,said", [
  ("bio", False, GOLD, SAID), ("bio", True, GOLD, SAID),
  ("bilou", False, ["B-A L-A O U-B", "B-A I-A L-A O"], ["B-A L-A O O", "B-A L-A U-B U-B"])])
def test_metrics_are_seqevals(tiny, tmp_path, scheme, strict, gold, said):
  from seqeval import metrics
  from seqeval import scheme as schemes

  kinds = ["U-A", "U-B"] if scheme == "bilou" else ["B-A", "B-B"]
  path = write(tmp_path / "a.conll", [[(f"w{i}", kinds[i % 2])] for i in range(30)])
  task = make(tiny.model, path, scheme, strict)
  out = outputs(task, gold, said)
  how = {} if not strict and scheme == "bio" else {
    "mode": "strict", "scheme": schemes.BILOU if scheme == "bilou" else schemes.IOB2}
  lists = [[line.split() for line in lines] for lines in (gold, said)]
  found = task.metrics(out)
  for name, function in (("f1", metrics.f1_score), ("precision", metrics.precision_score),
                         ("recall", metrics.recall_score)):
    assert found[f"entity_{name}"] == pytest.approx(function(*lists, **how)), name
  assert found["accuracy"] == pytest.approx(metrics.accuracy_score(*lists))
  assert {"f1/A", "f1/B"} <= found.keys()
  assert task.value(out) == pytest.approx(found["entity_f1"])
  rows = np.array([0, 0, 1])  # as the bootstrap draws sentences
  again = {key: value[rows] for key, value in out.items()}
  chosen = [[lines[i] for i in rows] for lines in lists]
  assert task.value(again) == pytest.approx(metrics.f1_score(*chosen, **how))


def test_how_entities_are_counted_is_said(task):
  said = task.describe_task()["signatures"]["entity_f1"]
  assert said == f"seqeval {metadata.version('seqeval')}|average:micro|mode:default"
  assert task.labels == ["O", "B-BAD", "I-BAD", "B-GOOD", "I-GOOD"]
  assert task.metric == ("entity_f1", "max")


def test_plain_tags_are_judged_by_words(tiny, tmp_path):
  path = write(tmp_path / "a.conll", [[("a", "DT"), (f"w{i}", "NN"), ("x", "NN")]
                                      for i in range(20)])
  task = make(tiny.model, path, "none")
  assert task.labels == ["DT", "NN"] and task.metric == ("accuracy", "max")
  out = {"gold": np.array([[0, 1, -1], [1, 1, 1]]), "decided": np.array([[0, 0, 0], [1, 1, 0]])}
  assert task.metrics(out) == {"accuracy": 0.6} and task.value(out) == 0.6


def test_majority_tag_by_hand(tiny, tmp_path):
  train = [[("great", "B-A"), ("movie", "O")], [("great", "B-A"), ("great", "O")]]
  other = [[("great", "B-A"), ("new", "O"), ("movie", "B-A")]]
  paths = [write(tmp_path / name, rows) for name, rows in (("a.conll", train), ("b.conll", other))]
  task = make(tiny.model, paths[0], validation=str(paths[1]), test_fraction=0.0)
  row = task.example({"words": ["great", "new", "movie"], "label": ["B-A", "O", "B-A"]})
  features = {"validation": {"gold": row["gold"][None], "words": np.array([3]),
                             "index": np.array([0])}}
  made = task.baselines(features)["majority tag"]["validation"]
  assert made["decided"][0, :3].tolist() == [task.labels.index("B-A"), 0, 0]
  found = task.metrics(made)
  assert found["entity_precision"] == 1 and found["entity_recall"] == 0.5


# ---- Bad input ----


@pytest.mark.parametrize("rows,scheme,message", [
  ([{"words": ["a", "b"], "label": ["O"]}], "bio", "line 1: 2 words and 1 labels"),
  ([{"words": ["a"], "label": ["O", "O"]}], "bio", "line 1: 1 words and 2 labels"),
  ([{"words": ["a", "b"], "label": ["B-X", "O"]}], "bilou", "O after B-X, which task.scheme=bilou"),
  ([{"words": ["a"], "label": ["O"]}], "bio", "train has the tag O only"),
  ([{"text": "a", "label": "O"}], "bio", "column of the words in data.columns.words")])
def test_messages(tiny, tmp_path, rows, scheme, message):
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(errors.UserError, match=message):
    make(tiny.model, path, scheme, validation_fraction=0.0, test_fraction=0.0)


def test_a_tag_that_train_lacks(tiny, tmp_path):
  paths = [write(tmp_path / f"{kind}.conll", [[("a", f"B-{kind}"), ("b", "O")]])
           for kind in ("PER", "PERS")]
  with pytest.raises(errors.UserError, match="tag 'B-PERS' of validation does not occur in train "
                                             ".did you mean 'B-PER'"):
    make(tiny.model, paths[0], validation=str(paths[1]), test_fraction=0.0)


# ---- A run ----


def test_a_run_from_file_to_prediction(tiny, tmp_path):
  path = write(tmp_path / "a.conll", sentences(120))
  config = tmp_path / "tag.py"
  config.write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(tiny.model)!r}),
    data=dict(train={str(path)!r}, max_length=32, buckets=(16,)),
    task=dict(name="tag"), optim=dict(rate=3e-3, head_rate_factor=3.0),
    guard=dict(overfit=dict(resamples=200)),
    train=dict(batch=16, steps=60, eval_every=30, log_every=5, train_sample=16),
  )
""")
  out = tmp_path / "out"
  script("train", f"--config={config}", f"--workdir={out}")
  card = json.loads((out / "card.json").read_text())
  assert card["task"]["signatures"]["entity_f1"].startswith("seqeval ")
  tuned, usual = (card["results"]["test"][name] for name in ("fine-tuned", "majority tag"))
  assert tuned["metrics"]["entity_f1"] > usual["metrics"]["entity_f1"]
  low, high = tuned["interval"]["entity_f1"]
  assert low <= tuned["metrics"]["entity_f1"] <= high
  row = card["differences"]["test"]["fine-tuned - majority tag"]
  assert row["verdict"] == "gained" and row["n"] == 24
  assert "tags of its words: " in card["data"]["first_example"]
  (tmp_path / "rows.txt").write_text("it was great movie\n\n")
  said = script("predict", f"--run={out}", f"--input={tmp_path / 'rows.txt'}").stdout
  answers = [json.loads(line) for line in said.splitlines()]
  assert len(answers[0]["labels"]) == 4 and answers[0]["labels"][2] == "B-GOOD"
  assert "error" in answers[1]
  test = write(tmp_path / "more.conll", sentences(20, 5))
  found = json.loads(script("evaluate", f"--run={out}", f"--data={test}").stdout)
  assert found["n"] == 20 and found["metrics"]["entity_f1"] > usual["metrics"]["entity_f1"]
