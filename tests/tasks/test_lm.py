"""Causal language modelling: against transformers, exact sums, honest bytes, a run to its end."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from commands import script
from ml_collections import config_dict

from ft import errors, losses, models, state, tune
from ft.data import text, turns
from ft.models import layers, llama
from ft.tasks import lm
from ft.tune import lora
from ft.weights import names

ROOT = __file__.rpartition("/tests/")[0]
WORDS = ("<pad> <unk> <s> </s> a bad bright dull film good great grim is it plot slow the "
         "was").split()
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
            "{{ raise_exception('no tools here') }}{% endif %}"
            "<s> {{ m.role }} : {{ m.content }} </s>\n{% endfor %}")


def tokenizer(template: bool):
  """A tokenizer of words, which sets <s> before a text, as Llama's does."""
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
    {w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(["<pad>", "<unk>", "<s>", "</s>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)])
  settings = {"bos_token": "<s>", "pad_token": "<pad>"}
  if template:
    settings["chat_template"] = TEMPLATE
  return {"tokenizer.json": made.to_str().encode(),
          "tokenizer_config.json": json.dumps(settings).encode()}


def export(folder, template=False, tied=True, scan=False):
  """Writes a random Llama of two layers with its tokenizer, and returns it as loaded from there."""
  config = llama.Config(
    vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, head="lm",
    tie_word_embeddings=tied, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    initializer_range=0.5)
  module = llama.Model(config)
  variables = module.init(jax.random.PRNGKey(0), **llama.probe_inputs(config))
  models.export(models.Pretrained("llama", module, variables, names.Report(), tokenizer(template),
                                  config, "text", ()), folder)
  return models.load(str(folder), head="lm", compute=layers.Compute(scan=scan))


def preprocess(folder, **given):
  config = {key: default for key, (default, *_) in text.KEYS.items()} | {"max_length": 16} | given
  return text.Preprocess(types.SimpleNamespace(**config), models.inspect(str(folder)))


def section(**given):
  """The config section `task` with its defaults."""
  return config_dict.ConfigDict({key: value[0] for key, value in lm.KEYS.items()} | given)


def task(folder, columns=("text",), smoothing=0.0, **given):
  return lm.Task(section(label_smoothing=smoothing),
                 types.SimpleNamespace(columns=dict.fromkeys(columns, "x")),
                 preprocess(folder, **given))


def batch(length=9, rows=4, seed=0):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(2, length + 1, rows)
  mask = (np.arange(length) < sizes[:, None]).astype(np.int32)
  ids = rng.integers(4, len(WORDS), (rows, length)).astype(np.int32) * mask
  return {"input_ids": ids, "attention_mask": mask, "bytes": sizes.astype(np.int32) * 3,
          "weight": np.ones(rows, np.float32), "index": np.arange(rows, dtype=np.int32)}


def call(module, interceptor=None):
  apply = state.make_apply(module, interceptor)
  return lambda variables, inputs, rng=None: apply(variables, inputs, rng)[0]


@pytest.fixture(scope="module", params=[(True, False), (False, True)], ids=["tied", "scan"])
def tiny(request, tmp_path_factory):
  """(folder, model, task): tied embeddings unrolled, and a head of its own with stacked layers."""
  folder = tmp_path_factory.mktemp("llama")
  tied, scan = request.param
  pretrained = export(folder, tied=tied, scan=scan)
  return folder, pretrained, task(folder)


# ---- Loss ----


def test_loss_and_predictions_equal_transformers(tiny):
  torch = pytest.importorskip("torch")
  import transformers

  folder, pretrained, made = tiny
  rows = batch()
  reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  labels = np.where(rows["attention_mask"] > 0, rows["input_ids"], -100)
  with torch.no_grad():
    want = reference(
      input_ids=torch.tensor(rows["input_ids"]).long(), labels=torch.tensor(labels).long(),
      attention_mask=torch.tensor(rows["attention_mask"])).loss.item()
  apply = call(pretrained.module)
  total, weight, aux = jax.jit(lambda v, b: made.loss(apply, v, b, None))(
    pretrained.variables, rows)
  assert float(total / weight) == pytest.approx(want, abs=1e-5)
  assert float(weight) == np.sum(rows["attention_mask"][:, 1:])
  assert float(aux["nats_per_token"]) == pytest.approx(float(total), rel=1e-6)
  out = jax.device_get(jax.jit(lambda v, b: made.predict(apply, v, b))(pretrained.variables, rows))
  found = made.metrics(out)
  assert found["nats_per_token"] == pytest.approx(want, abs=1e-5)
  assert found["perplexity"] == pytest.approx(np.exp(want), rel=1e-4)
  assert found["bits_per_byte"] == pytest.approx(
    want * float(weight) / np.log(2) / rows["bytes"].sum(), rel=1e-4)


def test_padding_and_masked_rows_change_nothing(tiny):
  _, pretrained, made = tiny
  rows, apply = batch(), call(pretrained.module)
  wide = {k: np.pad(v, ((0, 0), (0, 4))) if v.ndim == 2 else v for k, v in rows.items()}
  more = {k: np.concatenate([v, v[:2]]) for k, v in rows.items()}
  more["weight"][4:] = 0
  loss = jax.jit(lambda v, b: made.loss(apply, v, b, None)[:2])
  sums = [np.asarray(loss(pretrained.variables, b)) for b in (rows, wide, more)]
  np.testing.assert_allclose(sums[1], sums[0], rtol=1e-5)
  np.testing.assert_allclose(sums[2], sums[0], rtol=1e-5)


def test_accumulation_is_exact_and_the_head_trains(tiny):
  _, pretrained, made = tiny
  apply, rows = state.make_apply(pretrained.module), batch(rows=8)
  moved = []
  for parts in (1, 4):
    tx = optax.sgd(0.1)
    step = state.make_train_step(made.loss, apply, tune.combine, tx, parts)
    fresh = state.create(jax.tree.map(jnp.copy, pretrained.variables), {}, tx, 0)
    now, metrics = step(fresh, {}, rows)
    moved.append((tune.flatten(now.trainable), float(metrics["loss"])))
  (whole, loss), (cut, same) = moved
  assert same == pytest.approx(loss, rel=1e-5)
  before = tune.flatten(pretrained.variables)
  for path, leaf in whole.items():
    np.testing.assert_allclose(cut[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    assert np.any(np.asarray(leaf) != np.asarray(before[path])), path


def test_blocks_give_the_same_as_one_piece(tiny, monkeypatch):
  _, pretrained, made = tiny
  apply, rows = call(pretrained.module), batch()

  def gradient():
    return jax.jit(jax.value_and_grad(lambda v: made.loss(apply, v, rows, None)[0]))(
      pretrained.variables)

  whole = gradient()
  plain = losses.cross_entropy
  monkeypatch.setattr(losses, "cross_entropy",
                      lambda *args: plain(*args, block=2 * 4 * len(WORDS)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), whole,
               gradient())


def test_adapters_act_on_the_head(tiny):
  """A LoRA on the output layer changes the loss by what it changes the logits, and is trained."""
  _, pretrained, made = tiny
  config = {**{k: v[0] for k, v in tune.KEYS.items()},
            **{k: v[0] for k, v in lora.KEYS.items()}}
  layer = "embed_tokens" if pretrained.config.tie_word_embeddings else "lm_head"
  config |= {"method": "lora", "rank": 2, "targets": (layer,)}
  tuned = tune.init(config_dict.ConfigDict(config), pretrained.variables, jax.random.PRNGKey(1))
  trainable = jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(jax.random.PRNGKey(2), x.shape), tuned.trainable)
  apply, rows = call(pretrained.module, tuned.interceptor), batch()

  def loss(trainable):
    return made.loss(apply, tuned.combine(tuned.frozen, trainable), rows, None)[0]

  got, grads = jax.jit(jax.value_and_grad(loss))(trainable)
  merged, plain = tuned.merge(tuned.frozen, trainable), call(pretrained.module)
  want = jax.jit(lambda v: made.loss(plain, v, rows, None)[0])(merged)
  assert float(got) == pytest.approx(float(want), rel=1e-5)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_divergence_equals_the_plain_formula(tiny):
  _, pretrained, made = tiny
  apply, rows = call(pretrained.module), batch()
  other = jax.tree.map(lambda x: 1.1 * x, pretrained.variables)
  apart_from = jax.jit(lambda a, b: made.divergence(apply, a, b, rows, 2.0))
  total, weight = apart_from(pretrained.variables, other)
  inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
  logits = jax.jit(lambda v: apply(v, inputs)["logits"])
  q, p = (jax.nn.log_softmax(logits(v) / 2) for v in (pretrained.variables, other))
  apart = 4 * jnp.sum(jnp.exp(p) * (p - q), -1)[:, :-1]
  mask = rows["attention_mask"][:, 1:]
  assert float(total) == pytest.approx(float(jnp.sum(apart * mask)), rel=1e-4)
  assert float(weight) == mask.sum()
  same, _ = apart_from(other, other)
  assert float(same) == pytest.approx(0, abs=1e-4)


def test_label_smoothing_is_in_the_loss_and_not_in_the_metric(tiny):
  folder, pretrained, made = tiny
  rows, apply = batch(), call(pretrained.module)
  other = task(folder, smoothing=0.2)
  (plain, _, aux), (smooth, _, same) = jax.jit(lambda v: tuple(
    one.loss(apply, v, rows, None) for one in (made, other)))(pretrained.variables)
  assert float(same["nats_per_token"]) == pytest.approx(float(aux["nats_per_token"]), rel=1e-6)
  assert float(smooth) != pytest.approx(float(plain), rel=1e-3)


# ---- Rows ----


def test_the_tokenizers_start_token_is_read_and_not_predicted(tiny):
  made = tiny[2]
  example = made.example({"text": "the film is  good", "label": "x"})
  assert example["input_ids"].tolist() == [WORDS.index(w) for w in "<s> the film is good".split()]
  assert example["bytes"] == len("the film is  good") and example["bytes"].dtype == np.int32
  assert made.example({"text": "slow"})["bytes"] == 4


def test_bytes_are_those_of_what_is_kept(tiny):
  folder = tiny[0]
  words = " ".join(WORDS[4:14])
  cut = task(folder, max_length=5).example({"text": words})
  assert len(cut["input_ids"]) == 5 and cut["bytes"] == len(" ".join(WORDS[4:8]))
  made = preprocess(folder)
  content, encoding = made.encode({"text": "tëst </s> it"})
  assert made.text_bytes(content, encoding, first=1) == len("tëst ".encode()) + len(" it")
  assert made.text_bytes(content, encoding, first=2) == len("  it")


def test_text_of_one_token_is_left_out(tmp_path):
  export(tmp_path)
  made = preprocess(tmp_path)
  made._tokenizer.post_processor = tokenizers.processors.Sequence([])  # sets no <s>
  alone = lm.Task(section(), types.SimpleNamespace(columns={"text": "text"}), made)
  with pytest.raises(errors.RowError, match="nothing to predict"):
    alone.example({"text": "slow"})


CHAT = [["USER", "is it good"], ["SYSTEM", "the plot is"]]
SPEAKERS = {"USER": "user", "SYSTEM": "assistant"}


def test_the_checkpoints_template_makes_the_text_of_turns(tmp_path):
  export(tmp_path, template=True)
  made = preprocess(tmp_path, max_length=32, speakers=SPEAKERS)
  content, encoding = made.encode({"turns": CHAT})
  assert content == "<s><s> user : is it good </s>\n<s> assistant : the plot is </s>\n"
  assert encoding.tokens[:3] == ["<s>", "<s>", "<unk>"]  # those of the template, no further one
  as_dicts = [{"role": SPEAKERS[a], "content": b} for a, b in CHAT]
  assert preprocess(tmp_path, max_length=32).encode({"turns": as_dicts})[0] == content
  again = text.Preprocess.from_spec(made.spec(), tmp_path)
  assert again.encode({"turns": CHAT})[0] == content
  with pytest.raises(errors.RowError, match="no tools here"):
    made.encode({"turns": [["tool", "x"]]})


def test_turns_without_a_template_are_marked_plainly(tmp_path):
  export(tmp_path)
  content, encoding = preprocess(tmp_path, speakers=SPEAKERS).encode({"turns": CHAT})
  assert content == "user: is it good\nassistant: the plot is\n"
  assert encoding.tokens[0] == "<s>"


@pytest.mark.parametrize("given,kind,message", [
  ([["BOT", "hi"]], errors.UserError, "'BOT' is no role.*data.speakers"),
  ([["usr", "hi"]], errors.UserError, "did you mean 'user'"),
  ([], errors.RowError, "no turns"),
  ("hello", errors.RowError, "no turns"),
  ([["user"]], errors.RowError, "no \\[speaker, text\\]"),
  ([{"role": "user", "content": None}], errors.RowError, "no \\[speaker, text\\]"),
])
def test_turns_that_are_none(given, kind, message):
  with pytest.raises(kind, match=message):
    turns.messages(given)


@pytest.mark.parametrize("source", ["{% for %}", "{{ ''.__class__.__mro__ }}"])
def test_templates_are_checked_and_see_nothing(tmp_path, source):
  with pytest.raises((errors.UserError, errors.RowError), match="template"):
    turns.renderer(tmp_path, {"chat_template": source})([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("columns,message", [
  (("image",), "models text"), (("text", "text_b"), "one text a row")])
def test_data_that_is_no_text(tiny, columns, message):
  with pytest.raises(errors.UserError, match=message):
    task(tiny[0], columns)


def test_models_that_encode_are_refused(tiny):
  with pytest.raises(errors.UserError, match="decoder-only"):
    tiny[2].loss(lambda *args: {"encoder_last_hidden_state": 0}, {}, batch(), None)


# ---- A run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run on conversations, with plain text beside them."""
  folder = tmp_path_factory.mktemp("run")
  export(folder / "llama", template=True)
  rng = np.random.default_rng(0)
  words = lambda n: " ".join(rng.choice(WORDS[4:], n))  # noqa: E731
  rows = [{"turns": [["USER", words(4)], ["SYSTEM", "the film is " + words(2)]]} for _ in range(60)]
  (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "general.txt").write_text("".join(words(rng.integers(3, 9)) + "\n" for _ in range(12)))
  (folder / "own.tsv").write_text("".join(f"{i}\t{words(5)}\n" for i in range(12)))
  (folder / "tiny.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(folder / 'llama')!r}),
    data=dict(
      train={str(folder / 'chat.jsonl')!r}, speakers=dict(USER="user", SYSTEM="assistant"),
      extra=dict(
        general={str(folder / 'general.txt')!r},
        own=dict(source={str(folder / 'own.tsv')!r}, header=False, names=("id", "text")),
      ),
      max_length=32, buckets=(16,),
    ),
    task=dict(name="lm"), optim=dict(rate=1e-2), guard=dict(overfit=dict(resamples=100)),
    train=dict(batch=8, steps=20, eval_every=10, log_every=5, train_sample=8),
  )
""")
  script("train", f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'out'}")
  return folder


def test_a_run_says_what_it_gained_and_what_it_cost_elsewhere(run):
  card = json.loads((run / "out" / "card.json").read_text())
  assert card["task"] == {"name": "lm", "metric": "nats_per_token", "mode": "min"}
  assert set(card["results"]) == {"validation", "test", "general", "own"}
  row = card["differences"]["test"]["fine-tuned - zero-shot"]
  assert row["verdict"] == "gained" and row["hi"] < 0
  assert row["difference"] == pytest.approx(
    card["results"]["test"]["fine-tuned"]["metrics"]["nats_per_token"]
    - card["results"]["test"]["zero-shot"]["metrics"]["nats_per_token"], abs=1e-6)
  before = card["results"]["general"]["zero-shot"]
  assert before["metrics"]["nats_per_token"] == pytest.approx(pretrained_nats(run), rel=1e-5)
  low, high = before["interval"]["nats_per_token"]
  assert low < before["metrics"]["nats_per_token"] < high and before["n"] == 12
  assert card["guards"]["calibrate"]["verdict"] == "not measured"
  assert "test gained over the pretrained model (−" in card["guards"]["overfit"]["words"]
  assert "nats/token" in card["guards"]["overfit"]["words"]
  page = (run / "out" / "card.html").read_text()
  assert "nats/token" in page and "pretrained model" in page
  assert card["data"]["first_example"].startswith("<s> <s> <unk> <unk> ")  # by the template


def pretrained_nats(run) -> float:
  """What the checkpoint gives the general text, a row at a time."""
  pretrained = models.load(str(run / "llama"), head="lm")
  made, apply = task(run / "llama", max_length=32), call(pretrained.module)
  step = jax.jit(lambda v, b: made.predict(apply, v, b))
  parts = []
  for line in (run / "general.txt").read_text().splitlines():
    example = made.example({"text": line})
    row = {k: np.pad(v, (0, 12 - len(v)))[None] if v.ndim else v[None] for k, v in example.items()}
    parts.append(step(pretrained.variables, {**row, "weight": np.ones(1, np.float32)}))
  return made.value({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})


def test_prediction_gives_nats_by_row(run):
  (run / "rows.txt").write_text("the film is good\nslow plot\n\n")
  out = script("predict", f"--run={run / 'out'}", f"--input={run / 'rows.txt'}").stdout
  answers = [json.loads(line) for line in out.splitlines()]
  assert [a.get("tokens") for a in answers] == [4, 2, None] and "error" in answers[2]
  assert all(a["nats_per_token"] > 0 for a in answers[:2])


def test_evaluation_needs_no_labels(run):
  out = json.loads(script("evaluate", f"--run={run / 'out'}",
                          f"--data={run / 'general.txt'}").stdout)
  card = json.loads((run / "out" / "card.json").read_text())
  want = card["results"]["general"]["fine-tuned"]
  assert out["n"] == want["n"] == 12
  assert out["metrics"]["nats_per_token"] == pytest.approx(
    want["metrics"]["nats_per_token"], rel=1e-4)
