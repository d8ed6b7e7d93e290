"""Text to text: losses and texts against transformers, layouts, bad input."""

import json
import types

import jax
import numpy as np
import pytest
from ml_collections import config_dict
from tasks import text_models

from ft import errors, generation, models, predict, state, texts
from ft.data import loader as loaders
from ft.data import text
from ft.tasks import seq2seq

WORDS = text_models.WORDS
PAIRS = [("the film is good", "it is great"), ("a dull plot", "grim"),
         ("it was slow the plot was bad", "the film was slow it is bad"), ("good", "good film")]


def preprocess(folder, **given):
  config = {key: default for key, (default, *_) in text.KEYS.items()} | {"max_length": 24} | given
  return text.Preprocess(types.SimpleNamespace(**config), models.inspect(str(folder)))


class Pairs(list):
  """Rows of a split."""

  def __init__(self, pairs=PAIRS):
    super().__init__({"text": a, "target": b} for a, b in pairs)

  def select(self, index):
    return Pairs([(self[i]["text"], self[i]["target"]) for i in index])

  def where(self, i):
    return f"pairs: line {i + 1}"


def task(folder, columns=("text", "target"), data=None, **given):
  config = {key: default for key, (default, *_) in seq2seq.KEYS.items()}
  config |= {"max_target": 10, "scores": ("bleu", "chrf", "rouge")} | given
  return seq2seq.Task(
    config_dict.ConfigDict(config),
    types.SimpleNamespace(columns={c: c for c in columns}, splits={"test": Pairs()}),
    preprocess(folder, **(data or {})))


def batch(made, rows=None):
  """All rows in one batch, with one that fills it up."""
  examples = loaders.prepare(rows or Pairs(), made.example, preprocess=made.preprocess)
  return loaders.Loader(examples, 5, pad=made.preprocess.pad).batch(0)


def call(module):
  apply = state.make_apply(module)
  return lambda variables, inputs, rng=None: apply(variables, inputs, rng)[0]


@pytest.fixture(scope="module", params=["t5", "marian", "llama"])
def tiny(request, tmp_path_factory):
  """(kind, folder, model): two encoder-decoders, and a decoder-only model with a chat template."""
  folder = tmp_path_factory.mktemp(request.param)
  model = text_models.export(folder, request.param, template=request.param == "llama")
  return request.param, folder, model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  made = {}
  for kind in ("m2m_100", "marian", "llama"):
    made[kind] = tmp_path_factory.mktemp(kind)
    text_models.export(made[kind], kind, template=kind == "llama")
  return made


def reference(kind, folder):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  name = {"t5": "T5ForConditionalGeneration", "marian": "MarianMTModel",
          "llama": "LlamaForCausalLM"}[kind]
  return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval(), torch


def theirs(torch, ids, fill):
  """Rows of ids as one padded tensor."""
  width = max(map(len, ids))
  return torch.tensor([[*row, *[fill] * (width - len(row))] for row in ids])


def encoded(words: str) -> list[int]:
  return [WORDS.index(word) for word in words.split()]


def sides(kind, source: str, target: str) -> tuple[list[int], list[int]]:
  """What the two texts are, written by hand."""
  if kind == "llama":
    return encoded(f"<user> {source} <end> <bot>"), encoded(f"{target} <end>")
  return encoded(f"{source} </s>"), encoded(f"{target} </s>")


# ---- Loss ----


def test_loss_equals_transformers(tiny):
  kind, folder, model = tiny
  net, torch = reference(kind, folder)
  made = task(folder)
  both = [sides(kind, *pair) for pair in PAIRS]
  if kind == "llama":
    ids = theirs(torch, [a + b for a, b in both], 0)
    labels = theirs(torch, [[-100] * len(a) + b for a, b in both], -100)
    mask = theirs(torch, [[1] * len(a + b) for a, b in both], 0)
  else:
    ids, labels = theirs(torch, [a for a, _ in both], 0), theirs(torch, [b for _, b in both], -100)
    mask = theirs(torch, [[1] * len(a) for a, _ in both], 0)
  with torch.no_grad():
    want = net(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
  rows, apply = batch(made), call(model.module)
  total, weight, aux = jax.jit(lambda v, b: made.loss(apply, v, b, None))(model.variables, rows)
  assert float(total / weight) == pytest.approx(want, abs=1e-4)
  assert float(weight) == sum(len(b) for _, b in both)
  assert float(aux["nats_per_token"]) == pytest.approx(float(total), rel=1e-6)
  out = jax.device_get(jax.jit(lambda v, b: made.predict(apply, v, b))(model.variables, rows))
  real = {key: value[rows["index"] >= 0] for key, value in out.items()}
  assert made.metrics(real)["nats_per_token"] == pytest.approx(want, abs=1e-4)


def test_smoothing_is_in_the_loss_alone(folders):
  folder = folders["llama"]
  model = models.load(str(folder), head="lm")
  rows, apply = batch(task(folder)), call(model.module)
  plain, smooth = (jax.jit(lambda v, t=t: t.loss(apply, v, rows, None))(model.variables)
                   for t in (task(folder), task(folder, label_smoothing=0.2)))
  assert float(smooth[2]["nats_per_token"]) == pytest.approx(float(plain[0]), rel=1e-5)
  assert float(smooth[0]) != pytest.approx(float(plain[0]), rel=1e-3)


# ---- Texts ----


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_equal_transformers(tiny, beams):
  kind, folder, model = tiny
  net, torch = reference(kind, folder)
  made = task(folder, num_beams=beams)
  ends = [1, WORDS.index("<end>")] if kind == "llama" else [1]
  want = []
  for source, _ in PAIRS:
    ids = torch.tensor([sides(kind, source, "")[0]])
    with torch.no_grad():
      found = net.generate(ids, max_new_tokens=10, num_beams=beams, do_sample=False,
                           eos_token_id=ends, pad_token_id=0)[0].tolist()
    found = found[ids.shape[1]:] if kind == "llama" else found[1:]
    want.append(made.preprocess.decode(found))
  step = generation.make_step(made, model, lambda frozen, trainable: frozen)
  prompts = generation.prompts(made, Pairs(), np.arange(len(PAIRS)))
  rows = loaders.Loader(prompts, 4, pad=made.preprocess.pad, buckets=generation.buckets(made))
  rows = rows.batch(0)
  out = jax.device_get(step({}, {}, model.variables, rows))
  got = generation.decode(made, out)
  assert [got[list(rows["index"]).index(i)] for i in range(len(PAIRS))] == want
  assert len(set(want)) > 1


def test_predict_writes_the_same_text(folders, tmp_path):
  folder = folders["marian"]
  model = models.load(str(folder), head="lm")
  made = task(folder)
  files = {**model.files, "ft.json": json.dumps({
    "modality": "text", "preprocess": made.preprocess.spec(), "calibration": {},
    "task": {"name": "seq2seq", **json.loads(json.dumps(made.spec()))}}).encode()}
  models.export(types.SimpleNamespace(**{**model.__dict__, "files": files}), tmp_path / "model")
  predictor = predict.Predictor(tmp_path, batch=2)
  answers = list(predictor([{"text": a} for a, _ in PAIRS] + [{"text": " "}]))
  assert answers[-1] == {"error": "the source is empty"}
  step = generation.make_step(made, model, lambda frozen, trainable: frozen)
  prompts = generation.prompts(made, Pairs(), np.arange(len(PAIRS)))
  rows = loaders.Loader(prompts, 4, pad=made.preprocess.pad).batch(0)
  out = jax.device_get(step({}, {}, model.variables, rows))
  want = dict(zip(rows["index"].tolist(), generation.decode(made, out), strict=True))
  assert [answer["text"] for answer in answers[:4]] == [want[i] for i in range(4)]


# ---- Layouts ----


def test_languages_stand_before_texts_and_are_forced(folders):
  made = task(folders["m2m_100"], source_language="<en>", target_language="<de>")
  example = made.example({"text": "a film", "target": "good"})
  assert example["input_ids"].tolist() == encoded("<en> a film </s>")
  assert example["labels"].tolist() == encoded("<de> good </s>")
  assert made.prompts({**example, "index": 0})[1] == [1]
  model = models.load(str(folders["m2m_100"]), head="lm")
  assert made.decoding(model).forced_bos_token_id == WORDS.index("<de>")
  with pytest.raises(errors.UserError, match="'<dee>' is no token.*did you mean '<de>'"):
    task(folders["m2m_100"], target_language="<dee>")
  with pytest.raises(errors.UserError, match="task.prefix"):
    task(folders["llama"], target_language="<de>")


def test_languages_of_mbart_stand_behind(folders, tmp_path):
  text_models.export(tmp_path, "m2m_100")
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
  settings["tokenizer_class"] = "MBartTokenizer"
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  made = task(tmp_path, source_language="<en>", target_language="<de>")
  example = made.example({"text": "a film", "target": "good"})
  assert example["input_ids"].tolist() == encoded("a film </s> <en>")
  assert example["labels"].tolist() == encoded("good </s>")
  assert made.prompts({**example, "index": 0})[1] == [WORDS.index("<de>")]


@pytest.mark.parametrize("side,want", [
  ("truncate-right", "sum the film is </s>"), ("truncate-left", "sum was bad it </s>")])
def test_the_source_is_cut_and_the_prefix_is_not(folders, side, want):
  made = task(folders["marian"], prefix="sum ", data={"max_length": 5, "truncation": side})
  ids = made.example({"text": "the film is slow the plot was bad it", "target": "a"})["input_ids"]
  assert ids.tolist() == encoded(want)
  assert made.preprocess.counts["truncated"] == 1


def test_a_decoders_source_leaves_room_for_the_target(folders):
  made = task(folders["llama"], max_target=4, data={"max_length": 12})
  example = made.example({"text": "the film is slow the plot was bad it",
                          "target": "a bad film it is"})
  assert example["input_ids"].tolist() == encoded(
    "<user> the film is slow the <end> <bot> a bad film <end>")
  assert int(example["prompt"]) == 8
  assert made.preprocess.counts == {"truncated": 1, "too_long": 0, "targets_truncated": 1}
  assert made.show(example).endswith("<bot> ⟦a bad film <end>⟧ (8 + 4 tokens)")


def test_without_a_template_the_target_follows_the_source(tmp_path):
  text_models.export(tmp_path, "llama")
  example = task(tmp_path, prefix="do ").example({"text": "a film", "target": "good"})
  assert example["input_ids"].tolist() == encoded("do a film good </s>")
  assert int(example["prompt"]) == 3


# ---- Bad input ----


def test_rows_and_configs_that_do_not_fit(folders):
  made = task(folders["marian"])
  with pytest.raises(errors.RowError, match="the target is empty"):
    made.example({"text": "a film", "target": "  "})
  with pytest.raises(errors.RowError, match="the source is empty"):
    made.example({"text": "", "target": "a"})
  with pytest.raises(errors.UserError, match="none of the 2 rows.*the target is empty"):
    loaders.prepare(Pairs([("a", ""), ("it", "")]), made.example, preprocess=made.preprocess)
  for policy, kind in (("drop", errors.RowError), ("error", errors.UserError)):
    strict = task(folders["marian"], data={"truncation": policy, "max_length": 4})
    with pytest.raises(kind, match="the source has 8 tokens, more than the 4"):
      strict.example({"text": "the film is slow the plot was", "target": "a"})
  with pytest.raises(errors.UserError, match="no column of that role.*data.columns.target"):
    task(folders["marian"], columns=("text",))
  with pytest.raises(errors.UserError, match="generate_rows=0 writes none"):
    task(folders["marian"], metric="bleu", generate_rows=0)
  with pytest.raises(errors.UserError, match="metric=bleu is not among task.scores=rouge"):
    task(folders["marian"], metric="bleu", scores=("rouge",))
  with pytest.raises(errors.UserError, match="leaves no room for the source"):
    task(folders["llama"], max_target=20, prefix="do a sum it ", data={"max_length": 24})
  with pytest.raises(errors.UserError, match="positions for 64 tokens"):
    task(folders["marian"], max_target=65)
  with pytest.raises(errors.UserError, match="positions for 64 tokens"):
    task(folders["marian"], data={"max_length": 65})


# ---- Baselines ----


def test_statistics_give_the_lead_baseline(folders):
  made = task(folders["marian"], metric="rouge1", lead=1)
  part = {"index": np.arange(4), "generated": np.array([1, 0, 1, 0]), "nll": np.ones(4)}
  found = made.baselines({"test": part})["lead-1"]["test"]
  assert found["generated"].tolist() == [1, 0, 1, 0]
  scorer = texts.Measures(("rouge",))
  want = scorer.statistics(*zip(*((PAIRS[i][0], PAIRS[i][1], PAIRS[i][0]) for i in (0, 2)),
                                strict=True))
  assert made.value(found) == pytest.approx(want["rouge"][:, 0].mean())
