"""Few rows a label, and labels that are unknown: the loss by hand, a run of each to its end."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import script
from ml_collections import config_dict

from ft import errors, models, state
from ft.data import loader, sources, text
from ft.tasks import classify, few_shot

ROOT = __file__.rpartition("/tests/")[0]
CSV = "text,label\ngood,a\nbad,b\ngreat film,a\nslow,b\ndull movie,c\n"


def make(tiny, path, **given):
  values = {key: default for key, (default, *_) in sources.KEYS.items()}
  values |= {"validation_fraction": 0.0, "test_fraction": 0.0, "modality": "text"}
  config = config_dict.ConfigDict({**values, "train": str(path)})
  rest = {key: default for key, (default, *_) in text.KEYS.items()} | {"max_length": 16}
  preprocess = text.Preprocess(types.SimpleNamespace(**rest), models.inspect(str(tiny.model)))
  keys = {key: entry[0] for key, entry in few_shot.KEYS.items()} | given
  data = sources.load(config)
  task = few_shot.Task(config_dict.ConfigDict(keys), data, preprocess)
  return task, loader.prepare(data.splits["train"], task.example, preprocess=preprocess)


def write(path, content):
  path.write_text(content)
  return path


def test_steps_go_over_setfits_pairs(tiny, tmp_path):
  """2, 2 and 1 rows of a label: positives 3 + 3 + 1 = 7, negatives 4 + 2 + 2 = 8, 8 of each."""
  task, examples = make(tiny, write(tmp_path / "a.csv", CSV))
  pairs = task.training(examples)
  assert len(pairs) == 16
  example = pairs[0]
  assert example["input_ids"].shape[1] == 2 and example["label"].shape == (2,)
  assert all(bool(pairs[i]["same"]) == (pairs[i]["label"][0] == pairs[i]["label"][1])
             for i in range(16))
  assert len(make(tiny, tmp_path / "a.csv", iterations=4)[0].training(examples)) == 40
  features = loader.from_arrays({"features": np.ones((3, 4)), "label": np.array([0, 1, 2])})
  assert task.training(features) is features


def test_the_loss_is_cosine_error_and_a_head_that_does_not_move_the_encoder(tiny, tmp_path):
  task, examples = make(tiny, write(tmp_path / "a.csv", CSV))
  pretrained = models.load(str(tiny.model), pooling="mean", **task.model_args)
  batch = loader.Loader(task.training(examples), 8, pad=task.preprocess.pad,
                        shuffle=True).batch(0)
  batch["weight"][-2:] = 0
  call = state.make_apply(pretrained.module)
  apply = lambda variables, inputs, rng=None: call(variables, inputs, rng)[0]  # noqa: E731

  def loss(variables):
    total, weight, _ = task.loss(apply, variables, batch, None)
    return total / weight

  found, grads = jax.jit(jax.value_and_grad(loss))(pretrained.variables)
  parts = []
  for side in (0, 1):
    inputs = {key: batch[key][..., side] for key in task.preprocess.pad}
    parts.append(jax.jit(apply)(pretrained.variables, inputs))
  a, b = (np.array(part["features"], np.float64) for part in parts)
  cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
  nats = np.mean([optax.softmax_cross_entropy_with_integer_labels(
    part["logits"], batch["label"][:, side]) for side, part in enumerate(parts)], 0)
  want = ((cosine - batch["same"])**2 + nats)[:-2].mean()
  assert float(found) == pytest.approx(want, rel=1e-4)

  def apart(variables):
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(variables["params"]["classifier"]))

  assert float(apart(grads)) > 0
  far = jax.tree_util.tree_map_with_path(
    lambda path, x: 5 * x if "classifier" in str(path) else x, pretrained.variables)
  other = jax.jit(jax.grad(loss))(far)["params"]["encoder"]  # another head, the same encoder's
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
               grads["params"]["encoder"], other)


def test_evaluation_and_anchors_see_rows(tiny, tmp_path):
  task, examples = make(tiny, write(tmp_path / "a.csv", CSV))
  rows = few_shot._rows(loader.Loader(task.training(examples), 4, pad=task.preprocess.pad).batch(0))
  assert rows["label"].shape == (8,) == rows["weight"].shape
  assert rows["input_ids"].ndim == 2 and "same" not in rows
  again = classify.Task.from_spec(task.spec(), task.preprocess)
  assert again.labels == task.labels == ["a", "b", "c"]


def test_one_class_is_refused(tiny, tmp_path):
  with pytest.raises(errors.UserError, match="the label a only; a classifier needs two"):
    make(tiny, write(tmp_path / "a.csv", "text,label\ngood,a\nbad,a\n"))


def test_abstaining_is_calibrated_saved_and_described(tiny, tmp_path):
  values = {key: default for key, (default, *_) in sources.KEYS.items()} | {
    "modality": "text", "unknown": ("c",)}
  lines = "".join(f"row {i},{'abc'[i % 3]}\n" for i in range(60))
  config = config_dict.ConfigDict(
    {**values, "train": str(write(tmp_path / "a.csv", "text,label\n" + lines))})
  keys = {key: entry[0] for key, entry in classify.KEYS.items()} | {"coverage": 0.8}
  preprocess = lambda row: {"x": np.zeros(1)}  # noqa: E731
  data = sources.load(config)
  task = classify.Task(config_dict.ConfigDict(keys), data, preprocess)
  assert task.labels == ["a", "b"]
  assert task.example({"text": "x", "label": "c"})["label"] == -1
  again = classify.Task.from_spec(json.loads(json.dumps(task.spec())), preprocess)
  assert again.example({"text": "x", "label": "c"})["label"] == -1
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(50, 2)) * 3
  fitted = again.calibrate({"logits": logits, "label": logits.argmax(1)})
  answers = [again.describe({"logits": row}, fitted)["label"] for row in logits]
  assert answers.count(None) == 10
  out = {"logits": logits, "label": np.where(np.arange(50) < 40, logits.argmax(1), -1)}
  found = task.metrics(out)
  assert found["accuracy"] == 0.8 == task.score(out).mean() and found["macro_f1"] == 1
  assert {"unknown_auroc", "unknown_auroc_energy", "accuracy_at_coverage"} <= found.keys()
  card = task.evidence({"test": {key: value[:40] for key, value in out.items()}, "open": out},
                       fitted)["abstention"]
  assert card["splits"]["open"]["n"] == 50 and card["splits"]["test"]["unknown_refused"] is None
  with pytest.raises(errors.UserError, match="does not occur in train"):
    task.example({"text": "x", "label": "d"})


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  """Texts of three kinds by their words."""
  rng, lines = np.random.default_rng(0), ["text,label"]
  words = {"praise": ["great", "good", "warm"], "blame": ["poor", "dull", "bad"],
           "other": ["plot", "movie", "film"]}
  for i in range(180):
    label = list(words)[i % 3]
    lines.append(f"{' '.join(rng.choice(words[label], 3))} the it,{label}")
  folder = tmp_path_factory.mktemp("films")
  return write(folder / "films.csv", "\n".join(lines) + "\n")


@pytest.mark.parametrize("data,task", [
  pytest.param("per_label=4", "name='few_shot', iterations=10", id="few_shot"),
  pytest.param("unknown=('other',)", "coverage=0.9", id="unknown", marks=pytest.mark.slow)])
def test_a_run_from_file_to_card(tiny, films, tmp_path, data, task):
  (tmp_path / "run.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(tiny.model)!r}, pooling="mean"),
    data=dict(train={str(films)!r}, max_length=16, {data}),
    task=dict({task}), optim=dict(rate=3e-3), guard=dict(overfit=dict(resamples=100)),
    train=dict(batch=16, steps=24, eval_every=12, log_every=5, train_sample=8),
  )
""")
  out = tmp_path / "out"
  script("train", f"--config={tmp_path / 'run.py'}", f"--workdir={out}")
  card = json.loads((out / "card.json").read_text())
  test = card["results"]["test"]
  assert set(test) == {"majority", "probe", "fine-tuned"}
  assert test["fine-tuned"]["metrics"]["accuracy"] > test["majority"]["metrics"]["accuracy"]
  if "few" in task:
    assert card["data"]["splits"]["train"]["rows"] == 12
    assert card["cost"]["tokens"] == 24 * 16 * 2 * 7  # steps, pairs, of rows of five words
    assert "train/cosine_error" in (out / "metrics.jsonl").read_text()
  else:
    both = card["results"]["open"]
    assert 0 <= both["probe"]["metrics"]["unknown_auroc"] <= 1
    account = card["abstention"]["splits"]["open"]
    assert account["n"] == both["fine-tuned"]["n"] > test["fine-tuned"]["n"]
    assert 0 <= account["unknown_refused"] <= 1
