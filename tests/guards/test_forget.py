"""The forgetting guard on whole runs of tiny models, against both models computed by themselves."""

import json
import types

import numpy as np
import pytest
from language_models import log_probs
from tasks import text_models

from ft import config, guards, models, train, tune
from ft.guards import forget

QUICK = [("guard.overfit.resamples", "100"), ("train.steps", "12"), ("train.eval_every", "12")]


def learnt(source, folder):
  """Writes the model at a source as if it had been trained: its offsets are not zero."""
  made = models.load(str(source))
  rng = np.random.default_rng(0)
  flat = {path: leaf + (0.05 * rng.normal(size=leaf.shape).astype(np.float32)
                        if leaf.ndim == 1 else 0)
          for path, leaf in tune.flatten(made.variables).items()}
  made.variables = tune.unflatten(flat)
  models.export(made, folder)
  return folder


def written(folder, name, values):
  lines = "\n".join(f"    {key}={value!r}," for key, value in values.items())
  path = folder / f"{name}.py"
  path.write_text(f"def get_config():\n  return dict(\n{lines}\n  )\n")
  return str(path)


@pytest.fixture(scope="module")
def classified(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("forget")
  texts = folder / "general.txt"
  rng = np.random.default_rng(1)
  words = tiny.csv.read_text().split("\n")[1].split(",")[0].split()
  texts.write_text("\n".join(" ".join(rng.choice(words, 6)) for _ in range(90)))
  source = learnt(tiny.model, folder / "model")
  flags = [*QUICK, ("model.source", str(source)), ("guard.forget.source", str(texts)),
           ("guard.forget.probe.source", str(tiny.csv)), ("data.validation_fraction", "0.3")]
  return folder, train.train(config.load(str(tiny.config), flags), folder / "run"), tiny, texts


def test_a_classifier_is_compared_layer_by_layer(classified):
  folder, record, _, texts = classified
  found = record["guards"]["forget"]
  numbers = found["numbers"]
  assert numbers["missing"] == [] and numbers["retention"] == []
  assert numbers["cka"]["inputs"] == f"general text ({texts})" and numbers["cka"]["n"] == 64
  layers = {row["layer"]: row["cka"] for row in numbers["cka"]["layers"]}
  assert set(layers) == {"encoder/layer_0", "encoder/layer_1", "last"}
  assert all(0.1 < value < 1 - 1e-6 for value in layers.values())
  assert numbers["cka"]["chance"] < layers["encoder/layer_0"]
  assert numbers["divergence"]["kind"] == "features"  # the head is new
  assert numbers["divergence"]["interval"][0] <= numbers["divergence"]["value"]
  assert "on general text" in found["words"].lower()
  page = (folder / "run" / "card.html").read_text()
  assert "What was forgotten" in page and "encoder · layer 1" in page


def test_the_change_of_weights_is_that_of_the_files(classified):
  folder, record, *_ = classified
  start, end = (tune.flatten(models.load(str(folder / path)).variables)
                for path in ("model", "run/model"))
  one = [path for path in start if "/layer_1/" in path]
  want = np.sqrt(sum(np.square(end[p] - start[p]).sum() for p in one)
                 / sum(np.square(start[p]).sum() for p in one))
  went = {row["layer"]: row["relative"] for row in record["guards"]["forget"]["numbers"]["weights"]}
  assert went["encoder/layer_1"] == pytest.approx(want, rel=1e-3)


def test_a_probe_of_another_task_is_read_before_and_after(classified):
  probe = classified[1]["guards"]["forget"]["numbers"]["probe"]
  assert probe["n"] == 128 and probe["classes"] == 2
  assert probe["difference"] == pytest.approx(probe["after"] - probe["before"])
  assert probe["interval"][0] <= probe["difference"] <= probe["interval"][1]
  assert 0.4 < probe["before"] <= 1


@pytest.mark.parametrize("batch_stats, same", [("frozen", True), ("train", False)])
def test_a_body_whose_statistics_trained_is_not_called_the_same(batch_stats, same, monkeypatch):
  def sides(_):
    raise guards.Missing("both models are asked")

  monkeypatch.setattr(forget.retention, "sides", sides)
  context = types.SimpleNamespace(
    run=types.SimpleNamespace(
      pretrained=types.SimpleNamespace(report=types.SimpleNamespace(matched=["params/x"])),
      config=types.SimpleNamespace(model=types.SimpleNamespace(batch_stats=batch_stats))),
    tuned=types.SimpleNamespace(table=[1], only_head=True),
    # As average.wise and average.dfr leave it: statistics are among the frozen weights.
    final=types.SimpleNamespace(state=types.SimpleNamespace(mutable={})))
  if same:
    assert forget.gather(None, context) == {"only_head": True}
  else:
    with pytest.raises(guards.Missing, match="both models are asked"):
      forget.gather(None, context)


def test_random_weights_have_nothing_to_forget(tiny, tmp_path):
  flags = [*QUICK, ("train.steps", "1"), ("train.export", "False"), ("train.baselines", "False")]
  record = train.train(config.load(str(tiny.config), flags), tmp_path / "run")
  found = record["guards"]["forget"]
  assert found["verdict"] == "not measured" and "nothing was pretrained" in found["words"]
  assert "nothing was pretrained" in (tmp_path / "run" / "card.html").read_text()


@pytest.fixture(scope="module",
                params=["full", pytest.param("lora", marks=pytest.mark.slow)])
def language(request, tmp_path_factory):
  """A tiny language model that learns one kind of text, and is asked for another."""
  folder = tmp_path_factory.mktemp(request.param)
  text_models.export(folder / "random", "llama")
  learnt(folder / "random", folder / "model")
  rng = np.random.default_rng(0)

  def sentences(words, n):
    return [" ".join(rng.choice(words, rng.integers(4, 9))) for _ in range(n)]

  kinds = ("new", ["good", "great", "film"], 150), ("old", text_models.WORDS[9:], 50)
  for name, words, n in kinds:
    (folder / f"{name}.txt").write_text("\n".join(sentences(words, n)))
  values = {
    "model": {"source": str(folder / "model")}, "optim": {"rate": 0.02},
    "data": {"train": str(folder / "new.txt"), "max_length": 16, "buckets": (8,),
             "validation_fraction": 0.25, "extra": {"old": str(folder / "old.txt")}},
    "task": {"name": "lm"}, "train": {"batch": 8, "train_sample": 0},
    "tune": {"method": request.param, **({"rank": 4} if request.param == "lora" else {})},
    "guard": {"forget": {"source": str(folder / "old.txt")}}}
  made = config.load(written(folder, "lm", values), [*QUICK, ("train.steps", "30")])
  return folder, train.train(made, folder / "run")


def test_nats_before_and_after_are_those_of_the_two_models(language):
  folder, record = language
  numbers = record["guards"]["forget"]["numbers"]
  found = numbers["text"]
  sentences = (folder / "old.txt").read_text().split("\n")
  for name, key in (("model", "before"), ("run/model", "after")):
    nats = count = 0
    for sentence in sentences:
      ids, known = log_probs(folder / name, sentence)
      nats -= known[np.arange(len(ids) - 1), ids[1:]].sum()
      count += len(ids) - 1
    assert found[key] == pytest.approx(nats / count, rel=1e-3)
    assert found["tokens"] == count and found["n"] == 50
  assert found["interval"][0] < found["difference"] < found["interval"][1]
  one, = numbers["retention"]
  for key in ("before", "after"):
    assert one[key] == pytest.approx(found[key], rel=1e-3)
  if record["config"]["tune"]["method"] == "full":  # it learnt three words only
    assert found["difference"] > 0.1 and one["verdict"] == "lost"
    assert record["guards"]["forget"]["verdict"] in ("warning", "alarm")
    assert "worse than before training on old" in record["guards"]["forget"]["words"]


def test_the_divergence_is_forward_kl_a_token(language):
  folder, record = language
  found = record["guards"]["forget"]["numbers"]["divergence"]
  lines = (folder / "new.txt").read_text().split("\n")
  values = []
  for sentence in lines:  # of which validation is a part
    _, before = log_probs(folder / "model", sentence)
    _, after = log_probs(folder / "run" / "model", sentence)
    values.append((np.exp(before) * (before - after)).sum(axis=1)[:-1].mean())
  assert found["kind"] == "answers" and found["unit"] == "nats a token"
  assert found["n"] == 30 and found["value"] == pytest.approx(np.mean(values), rel=0.1)


# ---- Bad input, and verdicts ---------------------------------------------------------------------


def section(**given):
  return types.SimpleNamespace(**{**vars(guards.defaults("forget")), **given})


@pytest.mark.parametrize("content, reason", [
  (None, "no such file"), ("", "general text")])
def test_general_text_that_is_not_there_is_a_reason(content, reason, tmp_path):
  path = tmp_path / "general.txt"
  if content is not None:
    path.write_text(content)
  with pytest.raises(guards.Missing, match=reason):
    forget.read_texts(section(source=str(path)))


def test_the_default_shard_is_what_the_archive_holds(shared):
  del shared
  rows = forget.read_texts(section())
  assert len(rows) == 5190 and all(isinstance(rows[i]["text"], str) for i in range(3))


def judged(**numbers):
  evidence = guards.Evidence(gathered={"forget": {"missing": [], **numbers}})
  return forget.measure(section(), evidence)


def told(difference, lo, hi):
  return {"source": "x", "n": 64, "tokens": 900, "before": 3.0, "after": 3.0 + difference,
          "difference": difference, "interval": [lo, hi]}


@pytest.mark.parametrize("change, verdict", [
  ((0.05, 0.03, 0.07), "ok"), ((0.2, 0.1, 0.3), "warning"), ((0.2, -0.1, 0.5), "ok"),
  ((0.9, 0.5, 1.2), "alarm"), ((-0.4, -0.5, -0.3), "ok")])
def test_nats_make_the_verdict(change, verdict):
  found = judged(text=told(*change))
  assert found["verdict"] == verdict and "nats/token" in found["words"]


def test_layers_probe_and_curve_are_said():
  layers = [{"layer": "layer_0", "cka": 0.99}, {"layer": "layer_1", "cka": 0.3}]
  found = judged(
    cka={"inputs": "validation rows", "n": 90, "layers": layers, "chance": 0.1},
    probe={"source": "s", "before": 0.9, "after": 0.8, "difference": -0.1,
           "interval": [-0.15, -0.05], "n": 200, "classes": 2},
    tradeoff=[{"alpha": 0.5, "chosen": True, "values": {}}])
  assert found["verdict"] == "warning"
  for said in ("at least 0.30 (layer_1", "−10.0 points", "0.5 of the tuned ones"):
    assert said in found["words"]


def test_what_was_not_asked_is_not_measured():
  assert forget.measure(section(), guards.Evidence())["verdict"] == "not measured"
  found = judged(missing=["general text: no network"])
  assert found["verdict"] == "not measured" and "no network" in found["words"]
  assert json.dumps(found["numbers"])


def test_a_head_that_trained_alone_has_forgotten_nothing():
  found = judged(only_head=True)
  assert found["verdict"] == "ok" and "bit for bit" in found["words"]
