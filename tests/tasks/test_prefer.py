"""Preferences: rows in every layout, both answers in one pass, the reference, runs, wrong input."""

import json
import types

import jax
import numpy as np
import optax
import pytest
from commands import script
from ml_collections import config_dict
from tasks import chat_models
from tasks.chat_models import WORDS

from ft import config as configs
from ft import errors, evaluate, judge, models, predict, state, train, tune
from ft.data import answers, text
from ft.data import loader as loaders
from ft.tasks import prefer

ROOT = __file__.rpartition("/tests/")[0]
ASKED = [{"role": "user", "content": "hi"}]
GOOD, BAD = ([{"role": "assistant", "content": said}] for said in ("fine thanks", "bye"))
ROW = {"prompt": "hi", "chosen": "fine thanks", "rejected": "bye"}
OTHER = {"prompt": "a table for 2", "chosen": "in which city", "rejected": "is booked at 7:30 ok"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  place = tmp_path_factory.mktemp("prefer") / "llama"
  chat_models.export(place)
  return place


@pytest.fixture(scope="module")
def pretrained(folder):
  return models.load(str(folder), head="lm")


def task(folder, data=None, rows=(ROW, OTHER), **given):
  values = {key: value[0] for key, value in text.KEYS.items()} | {"max_length": 64} | (data or {})
  preprocess = text.Preprocess(types.SimpleNamespace(**values), models.inspect(str(folder)))
  section = {key: value[0] for key, value in prefer.KEYS.items()} | given
  found = types.SimpleNamespace(columns=dict.fromkeys(rows[0]), splits={"train": list(rows)})
  return prefer.Task(config_dict.ConfigDict(section), found, preprocess)


def batch(made, rows=(ROW, OTHER), size=None, **more):
  examples = loaders.from_examples([made.example(row) for row in rows], made.preprocess)
  return loaders.Loader(examples.joined(more), size or len(rows), pad=made.preprocess.pad,
                        buckets=made.preprocess.buckets).batch(0)


def call(pretrained):
  apply = state.make_apply(pretrained.module)
  return lambda variables, inputs, rng=None: apply(variables, inputs, rng)[0]


def words(ids):
  return " ".join(WORDS[i] for i in ids)


# ---- Rows ----


@pytest.mark.parametrize("row", [
  ROW,
  {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
  {"prompt": ASKED, "chosen": "fine thanks", "rejected": "bye"},
  {"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
  {"prompt": "hi", "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
  {"prompt": [["user", "hi"]], "chosen": [["assistant", "fine thanks"]],
   "rejected": [["assistant", "bye"]]},
])
def test_every_layout_gives_the_same_answers(folder, row):
  assert answers.read(row, ("chosen", "rejected")) == (ASKED, [GOOD, BAD])
  example = task(folder).example(row)
  made = [words(ids[mask > 0]) for ids, mask in zip(
    example["input_ids"].T, example["loss_mask"].T, strict=True)]
  assert made == ["fine thanks <e>", "bye <e>"]
  assert words(example["input_ids"][:, 0]) == (
    "<b> <|im|> user hi <e> <|im|> assistant fine thanks <e>")


def test_replies_of_the_context_are_not_learnt(folder):
  context = [*ASKED, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "how"}]
  example = task(folder).example({"prompt": context, "chosen": GOOD, "rejected": BAD})
  assert words(example["input_ids"][example["loss_mask"][:, 0] > 0, 0]) == "fine thanks <e>"


def test_whole_texts_are_cut_where_they_part_at_a_word():
  row = {"chosen": "Human: a table? Assistant: in Paris",
         "rejected": "Human: a table? Assistant: in Pa"}
  context, found = answers.read(row, ("chosen", "rejected"))
  assert (context, found) == ("Human: a table? Assistant: in", [" Paris", " Pa"])


def test_texts_without_a_template_end_with_the_end_token(tmp_path):
  chat_models.export(tmp_path, template="")
  example = task(tmp_path).example({"prompt": "hi how ", "chosen": "are you", "rejected": "bye"})
  assert words(example["input_ids"][:, 0]) == "<b> hi how are you <e>"
  assert example["loss_mask"].T.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_single_answers_of_whole_conversations():
  row = {"completion": [*ASKED, *GOOD], "label": True}
  assert answers.read(row, ("completion",)) == (ASKED, [GOOD])


@pytest.mark.parametrize("change,message", [
  ({"rejected": "fine thanks"}, "chosen and rejected are equal"),
  ({"chosen": " "}, "chosen is empty"),
  ({"rejected": None}, "rejected is empty"),
  ({"prompt": ""}, "prompt is empty"),
  ({"rejected": BAD}, "one is a text and the other is not"),
  ({"chosen": [*ASKED, *GOOD], "rejected": [["user", "bye"], ["assistant", "ok"]]},
   "no common prompt.*data.columns.prompt"),
  ({"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *GOOD]}, "are equal"),
  ({"chosen": [*ASKED, *GOOD], "rejected": ASKED}, "rejected is empty: no turn"),
])
def test_rows_that_cannot_be_used(folder, change, message):
  with pytest.raises(errors.RowError, match=message):
    task(folder).example({**ROW, **change})


def test_texts_that_share_nothing():
  with pytest.raises(errors.RowError, match="no common prompt; texts have to begin alike"):
    answers.read({"chosen": "yes sir", "rejected": "yesterday"}, ("chosen", "rejected"))


def test_contexts_longer_than_the_model_allows(folder):
  long = {"prompt": "how are you " * 20, "chosen": "fine thanks", "rejected": "bye"}
  made = task(folder, data=dict(max_length=12, truncation="truncate-left"))
  example = made.example(long)
  assert len(example["input_ids"]) == 12 and made.preprocess.counts["truncated"] == 1
  assert words(example["input_ids"][example["loss_mask"][:, 0] > 0, 0]) == "fine thanks <e>"
  # Cut alike, so that both answers follow the same words.
  assert (example["input_ids"][:9] == example["input_ids"][:9, :1]).all()
  with pytest.raises(errors.RowError, match="no token of an answer is left.*truncate-left"):
    task(folder, data=dict(max_length=12)).example(long)
  for policy, kind in (("drop", errors.RowError), ("error", errors.UserError)):
    with pytest.raises(kind, match="more than data.max_length=12"):
      task(folder, data=dict(max_length=12, truncation=policy)).example(long)
  with pytest.raises(errors.RowError, match="no room for its context"):
    made.example({**long, "chosen": "fine " * 20})
  with pytest.raises(errors.UserError, match="positions for 128"):
    task(folder, data=dict(max_length=256))


@pytest.mark.parametrize("rows,given,message", [
  ([{"prompt": "hi", "chosen": "bye"}], {}, "data.columns.chosen and data.columns.rejected"),
  ([{"prompt": "hi", "completion": "ok", "label": 1}], dict(loss="ipo"), "two answers a row"),
  ([{"prompt": "hi", "completion": "ok"}], dict(loss="kto"), "data.columns.completion and"),
  ([ROW], dict(loss="hinge", label_smoothing=0.1), "task.loss=hinge does not read it"),
  ([ROW], dict(loss="orpo", reference_free=True), "only dpo, ipo, hinge, robust"),
])
def test_data_and_keys_that_do_not_fit(folder, rows, given, message):
  with pytest.raises(errors.UserError, match=message):
    task(folder, rows=rows, **given)


def test_labels_that_say_nothing(folder):
  rows = [{"prompt": "hi", "completion": "ok", "label": "maybe"},
          {"prompt": "how", "completion": "bye", "label": "True"}]
  made = task(folder, rows=rows, loss="kto")
  with pytest.raises(errors.UserError, match="'maybe' does not say"):
    made.example(rows[0])
  assert made.example(rows[1])["desirable"] == 1


# ---- One pass ----


def test_answers_side_by_side_get_what_each_gets_alone_from_transformers(folder, pretrained):
  torch = pytest.importorskip("torch")
  import transformers

  made = task(folder)
  rows = batch(made, size=3)  # the third row fills up
  out = jax.device_get(jax.jit(lambda v, b: made.predict(call(pretrained), v, b))(
    pretrained.variables, rows))
  reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  for number, row in enumerate((ROW, OTHER)):
    example = made.example(row)
    for side in range(2):
      real = example["attention_mask"][:, side] > 0
      ids, mask = (torch.tensor(example[key][real, side]).long()
                   for key in ("input_ids", "loss_mask"))
      with torch.no_grad():
        logp = torch.log_softmax(reference(input_ids=ids[None]).logits[0, :-1], -1)
      want = (logp.gather(1, ids[1:, None])[:, 0] * mask[1:]).sum().item()
      assert out["logp"][number, side] == pytest.approx(want, abs=1e-4)
      assert out["tokens"][number, side] == mask.sum()


def test_the_loss_is_the_formula_of_the_log_ratios(folder, pretrained):
  made = task(folder, beta=0.5, sft_weight=2.0)
  known = np.array([[-5.0, -4.0], [-6.0, -3.0]], np.float32)
  rows = batch(made, size=3, reference=known)
  v, apply = pretrained.variables, call(pretrained)
  (total, weight, aux), out = jax.device_get(jax.jit(
    lambda v, b: (made.loss(apply, v, b, None), made.predict(apply, v, b)))(v, rows))
  logp, tokens = np.asarray(out["logp"])[:2], np.asarray(out["tokens"])[:2]
  order = np.asarray(rows["index"])[:2]  # by length
  margin = 0.5 * np.subtract(*(logp - known[order]).T)
  want = np.log1p(np.exp(-margin)) - 2.0 * logp[:, 0] / tokens[:, 0]
  assert float(total) == pytest.approx(want.sum(), rel=1e-4) and float(weight) == 2
  assert float(aux["margin"]) == pytest.approx(margin.sum(), rel=1e-4)
  assert float(aux["accuracy"]) == (margin > 0).sum()


def test_rows_without_a_reference_train_nothing_but_are_measured_at_the_start(folder, pretrained):
  made = task(folder)
  rows, v, apply = batch(made), pretrained.variables, call(pretrained)
  with pytest.raises(errors.UserError, match="known of the run's own rows alone"):
    made.loss(apply, v, rows, jax.random.PRNGKey(0))
  total, weight, _ = jax.jit(lambda v, b: made.loss(apply, v, b, None))(v, rows)
  assert float(total / weight) == pytest.approx(np.log(2), rel=1e-6)


def test_kto_compares_with_answers_to_other_contexts(folder, pretrained):
  made = task(folder, loss="kto")
  example = made.example(ROW)
  said = words(example["input_ids"][example["loss_mask"][:, 2] > 0, 2])
  assert said in ("in which city <e>", "is booked at 7:30 ok <e>")
  known = np.zeros((2, 3), np.float32)
  rows = batch(made, reference=known)
  apply, key = call(pretrained), jax.random.PRNGKey(0)
  (total, weight, aux), out = jax.device_get(jax.jit(
    lambda v, b: (made.loss(apply, v, b, key), made.predict(apply, v, b)))(
      pretrained.variables, rows))
  logp = out["logp"]
  assert float(weight) == 4 and float(aux["kl"]) == 0.0  # of log-ratios below zero
  want = 1 - 1 / (1 + np.exp(-0.1 * logp[:, :2] * [1, -1]))
  assert float(total) == pytest.approx(want.sum(), rel=1e-4)


def test_metrics_by_hand(folder):
  made = task(folder, beta=0.5)
  out = {"logp": np.array([[-4.0, -8.0], [-6.0, -2.0]]), "tokens": np.array([[2.0, 4], [2, 4]]),
         "reference": np.array([[-5.0, -8.0], [-5.0, -4.0]])}
  found = made.metrics(out)
  assert found["accuracy"] == 0.5 and found["margin"] == pytest.approx((0.5 - 1.5) / 2)
  assert found["likelihood_accuracy"] == 0.0 and found["nats_per_token"] == 2.5
  terms = [n * (np.exp(d) - 1 - d) for n, d in ((2, 0.5), (4, 0.0), (2, -0.5), (4, 0.5))]
  assert found["kl_to_reference"] == pytest.approx(sum(terms) / 12)
  rows = made.baselines({"test": {key: out[key] for key in ("logp", "tokens")}})
  assert made.metrics(rows["longer answer"]["test"]) == {"accuracy": 0.0}
  assert made.metrics(rows["zero-shot"]["test"])["accuracy"] == 0.0
  single = task(folder, rows=[{"prompt": "hi", "completion": "ok", "label": 1}], loss="kto")
  found = single.metrics({
    "logp": np.array([[-1.0], [-2], [-3]]), "tokens": np.ones((3, 1)),
    "reference": np.zeros((3, 1)), "desirable": np.array([1, 0, 1])})
  assert found["auroc"] == 0.5 and found["nats_per_token"] == 2.0


# ---- Runs ----


@pytest.fixture(scope="module")
def tiny(folder, tmp_path_factory):
  """A config whose users prefer `fine` to `bye`, whatever they said, and `ok` to nothing else."""
  place, rng, lines = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0), []
  for _ in range(60):
    said = " ".join(rng.choice(WORDS[9:], 3))
    more = " ".join(rng.choice(WORDS[9:20], 2))
    lines.append({"prompt": said, "chosen": f"fine {more}", "rejected": f"bye {more}"})
  lines[0]["rejected"] = lines[0]["chosen"]
  single = [{"prompt": row["prompt"], "completion": row[role], "label": role == "chosen"}
            for row in lines for role in ("chosen", "rejected")]
  for name, rows in (("pairs", lines), ("single", single)):
    (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (place / "tiny.py").write_text(f"""
def get_config(data="pairs"):
  return dict(
    model=dict(source={str(folder)!r}),
    data=dict(train={str(place)!r} + "/" + data + ".jsonl", max_length=24, buckets=()),
    task=dict(name="prefer"), tune=dict(method="lora", rank=4), optim=dict(rate=1e-2),
    guard=dict(overfit=dict(resamples=100)),
    train=dict(batch=8, steps=12, eval_every=6, log_every=3, train_sample=0, export=False),
  )
""")
  return place / "tiny.py"


def run(tiny, out, *given, data="pairs"):
  return train.train(configs.load(f"{tiny}:data={data}", list(given)), out)


def test_a_run_learns_what_is_preferred_and_scores_conversations(tiny, tmp_path):
  out = tmp_path / "out"
  done = script("train", f"--config={tiny}", f"--workdir={out}", "--config.train.export=true")
  assert "⟦fine" in done.stderr and "⟦bye" in done.stderr
  assert "1 of " in done.stderr and "chosen and rejected are equal" in done.stderr
  card = json.loads((out / "card.json").read_text())
  rows = card["results"]["test"]
  tuned, base = (rows[name]["metrics"] for name in ("fine-tuned", "zero-shot"))
  assert tuned["accuracy"] == 1.0 > rows["longer answer"]["metrics"]["accuracy"]
  assert tuned["likelihood_accuracy"] >= base["likelihood_accuracy"]
  assert tuned["margin"] > 0.05 and tuned["kl_to_reference"] > 0 and "margin" not in base
  assert not (out / evaluate.FEATURES).exists()  # kept until the run is finished, and no longer
  asked = json.dumps({"turns": [["user", "hi"], ["assistant", "fine"]]}) + "\n"
  assert json.loads(script("predict", f"--run={out}", given=asked).stdout)["tokens"] == 2


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_reference_already(tiny, tmp_path, monkeypatch):
  one, measured, evaluated = train.Loop.one, evaluate.run, []

  def stopped(self, now, number, batches):
    if number == 7:
      raise errors.Preempted("asked to")
    return one(self, now, number, batches)

  def counted(step, state, frozen, loader, *rest):
    evaluated.append(len(loader.examples))
    return measured(step, state, frozen, loader, *rest)

  monkeypatch.setattr(evaluate, "run", counted)
  with monkeypatch.context() as patch, pytest.raises(errors.Preempted):
    patch.setattr(train.Loop, "one", stopped)
    run(tiny, tmp_path, ("train.baselines", "false"))
  with np.load(tmp_path / evaluate.FEATURES) as file:
    kept = {key: file[key] for key in file.files}
  rows = {name: len(kept[f"{name}/logp"]) for name in ("train", "validation", "test")}
  assert evaluated == [*rows.values(), rows["validation"]]  # the reference, and step 6
  evaluated.clear()
  # What stands there is the reference: with another one of test, its divergence is another.
  np.savez(tmp_path / evaluate.FEATURES,
           **{key: value - 9.0 * (key == "test/logp") for key, value in kept.items()})
  found = run(tiny, tmp_path, ("train.baselines", "false"))["results"]
  assert evaluated == [rows["validation"], rows["validation"], rows["test"]]  # step 12, the end
  apart = [found[name]["fine-tuned"]["metrics"]["kl_to_reference"]
           for name in ("validation", "test")]
  assert 0 < apart[0] < 1 < apart[1]


@pytest.mark.parametrize("loss", [
  "orpo", "simpo", "kto", "reward", pytest.param("cpo", marks=pytest.mark.slow)])
def test_steps_of_every_kind_of_loss_move_answers_apart(folder, loss):
  made = task(folder, loss=loss, beta=0.5)
  rows = batch(made)
  loaded = models.load(str(folder), **made.model_args)
  variables, apply, tx = loaded.variables, state.make_apply(loaded.module), optax.adam(1e-2)
  score = state.make_predict_step(made.predict, apply, tune.combine)
  before = jax.device_get(score(variables, {}, {}, rows))
  if made.refer:
    rows |= made.refer(before)
  step = state.make_train_step(made.loss, apply, tune.combine, tx)
  now = state.create(variables, {}, tx, 0)
  for _ in range(8):
    now, metrics = step(now, {}, rows)
  after = jax.device_get(score(now.trainable, {}, {}, rows))
  key = "reward" if loss == "reward" else "logp"
  gained = (after[key] - before[key])[:, :2] / (1 if loss == "reward" else after["tokens"][:, :2])
  assert (gained[:, 0] > gained[:, 1] + 0.05).all()
  assert float(metrics["accuracy"]) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "reward"])
def test_finished_runs_score_and_are_judged_on_further_pairs(tiny, tmp_path, loss):
  run(tiny, tmp_path, ("task.loss", loss), ("train.steps", "6"), ("train.export", "true"))
  found = judge.judge(tmp_path, str(tiny.with_name("pairs.jsonl")))
  assert found["n"] == 59 and 0 <= found["metrics"]["accuracy"] <= 1
  assert "kl_to_reference" not in found["metrics"]  # nobody knows the reference of these
  rows = [{"turns": [["user", "hi"], ["assistant", "fine thanks"]]}, {"turns": []}]
  answer, wrong = predict.Predictor(tmp_path)(rows)
  assert set(answer) == ({"reward"} if loss == "reward" else {"nats_per_token", "tokens"})
  assert "no turns" in wrong["error"]


@pytest.mark.slow
def test_a_reward_head_alone_learns_from_cached_features(folder, tiny, tmp_path):
  values = {"model.source": str(folder), "data.train": str(tiny.with_name("pairs.jsonl")),
            "data.max_length": 24, "task.name": "prefer", "task.loss": "reward",
            "tune.method": "head", "optim.rate": 0.1, "train.batch": 8, "train.steps": 40,
            "train.train_sample": 0, "train.export": False, "guard.overfit.resamples": 100}
  tuned = train.train(configs.complete(values), tmp_path)["results"]["test"]
  assert tuned["fine-tuned"]["metrics"]["accuracy"] > 0.6
  assert tuned["probe"]["metrics"]["accuracy"] > 0.6


@pytest.mark.parametrize("loss,data,metric", [
  ("kto", "single", "auroc"),
  pytest.param("kto", "pairs", "accuracy", marks=pytest.mark.slow),
  pytest.param("orpo", "pairs", "accuracy", marks=pytest.mark.slow),
  pytest.param("simpo", "pairs", "accuracy", marks=pytest.mark.slow),
  pytest.param("reward", "pairs", "accuracy", marks=pytest.mark.slow)])
def test_other_losses_learn_too(tiny, tmp_path, loss, data, metric):
  found = run(tiny, tmp_path / "out", ("task.loss", loss), ("task.beta", "0.5"),
              ("optim.rate", "3e-2"), ("train.steps", "60" if loss == "reward" else "20"),
              data=data)
  results = found["results"]["test"]
  assert results["fine-tuned"]["metrics"][metric] > 0.9
  first = "probe" if loss == "reward" else "zero-shot"
  assert set(results) == {"fine-tuned", "longer answer", first}
