"""Span corruption: T5's targets and loss, lengths that follow from the text's, bad input."""

import json
import types

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import config_dict

from ft import config, errors, models, state, train
from ft.data import text
from ft.models import t5
from ft.tasks import span_lm
from ft.weights import names

WORDS = ("<pad> </s> <unk> a bad bright dull film good great grim is it plot slow the was "
         "<extra_id_3> <extra_id_2> <extra_id_1> <extra_id_0>").split()
SENTINELS = [WORDS.index(f"<extra_id_{i}>") for i in range(4)]


def export(folder, words=WORDS):
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
    {w: i for i, w in enumerate(words)}, unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens([w for w in words if w.startswith("<")])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
  settings = {"pad_token": "<pad>", "eos_token": "</s>"}
  files = {"tokenizer.json": made.to_str().encode(),
           "tokenizer_config.json": json.dumps(settings).encode()}
  made = t5.Config(
    d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2,
    initializer_factor=2.0, decoder_start_token_id=0, model_type="t5", vocab_size=len(words),
    pad_token_id=0, eos_token_id=1, head="lm")
  module = t5.Model(made)
  variables = module.init(jax.random.PRNGKey(3), **t5.probe_inputs(made))
  models.export(models.Pretrained("t5", module, variables, names.Report(), files, made, "text",
                                  ()), folder)
  return models.load(str(folder), head="lm")


def task(folder, **given):
  values = {key: value[0] for key, value in text.KEYS.items()} | {"max_length": 32}
  preprocess = text.Preprocess(types.SimpleNamespace(**values), models.inspect(str(folder)))
  section = {key: value[0] for key, value in span_lm.KEYS.items()} | given
  return span_lm.Task(config_dict.ConfigDict(section),
                      types.SimpleNamespace(columns={"text": "x"}, splits={}), preprocess)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  folder = tmp_path_factory.mktemp("t5")
  return folder, export(folder)


def test_the_example_of_the_paper():
  """Raffel et al. (2020), figure 2."""
  words = "Thank you for inviting me to your party last week".split()
  ids = np.arange(100, 110)
  read, labels = span_lm.corrupt(ids, np.isin(words, ["for", "inviting", "last"]), [9, 8, 7])
  assert read.tolist() == [100, 101, 9, 104, 105, 106, 107, 8, 109]
  assert labels.tolist() == [9, 102, 103, 8, 108, 7]
  np.testing.assert_array_equal(span_lm.restore(read, labels, [9, 8, 7]), ids)


@pytest.mark.parametrize("length,tokens,count", [(2, 1, 1), (10, 2, 1), (100, 15, 5), (12, 6, 6)])
def test_spans_are_a_partition(length, tokens, count):
  drawn = set()
  for seed in range(30):
    noise = span_lm.spans(length, tokens, count, np.random.default_rng(seed))
    assert noise.shape == (length,) and noise.sum() == tokens and not noise[-1]
    assert (noise & ~np.concatenate([[False], noise[:-1]])).sum() == count
    drawn.add(noise.tobytes())
    sentinels = range(1000, 1001 + count)
    read, labels = span_lm.corrupt(np.arange(length), noise, sentinels)
    assert read[read >= 1000].tolist() == [*sentinels][:-1]
    assert labels[labels >= 1000].tolist() == [*sentinels] and labels[-1] == 1000 + count
    assert len(read) == length - tokens + count and len(labels) == tokens + count + 1
    np.testing.assert_array_equal(span_lm.restore(read, labels, sentinels), np.arange(length))
  assert len(drawn) > 6 or count == length - tokens  # then there is one way


def test_every_token_but_the_last_is_hidden_at_times():
  hidden = sum(span_lm.spans(10, 2, 1, np.random.default_rng(seed)) for seed in range(200))
  assert hidden[-1] == 0 and (hidden[:-1] > 10).all()


def test_lengths_are_those_of_t5(tiny):
  """round(length x 0.15) tokens in round(tokens / 3) spans, as random_spans_noise_mask has it."""
  made = task(tiny[0])
  sizes = [made._size(n) for n in (2, 7, 10, 20, 40)]
  assert sizes == [(1, 1), (1, 1), (2, 1), (3, 1), (6, 2)]


def batch(made, rows, epoch=None):
  examples = [made.example({"text": row}) for row in rows]
  if epoch is not None:
    examples = [made.augment(one, np.random.default_rng([epoch, i]))
                for i, one in enumerate(examples)]
  width = max(len(value) for example in examples for value in example.values())
  pad = made.preprocess.pad
  stacked = {key: np.stack([np.pad(example[key], (0, width - len(example[key])),
                                   constant_values=pad[key]) for example in examples])
             for key in examples[0]}
  return {**stacked, "weight": np.ones(len(rows), np.float32),
          "index": np.arange(len(rows), dtype=np.int32)}


TEXTS = ("the film was good and a bad plot is slow it is it", "it is good",
         "grim film the was a it dull bright great a film is the plot was it slow is")


def test_loss_equals_transformers(tiny):
  torch = pytest.importorskip("torch")
  import transformers

  folder, pretrained = tiny
  made = task(folder, noise_rate=0.3, mean_span=2.0)
  apply = state.make_apply(pretrained.module)
  call = lambda variables, inputs, rng=None: apply(variables, inputs, rng)[0]  # noqa: E731
  loss = jax.jit(lambda v, b: made.loss(call, v, b, None))
  reference = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
  for epoch in (None, 1):
    rows = batch(made, TEXTS, epoch)
    labels = np.where(rows["labels"] < 0, -100, rows["labels"])
    with torch.no_grad():
      want = reference.eval()(
        input_ids=torch.tensor(rows["input_ids"]).long(), labels=torch.tensor(labels).long(),
        attention_mask=torch.tensor(rows["attention_mask"])).loss.item()
    total, weight, _ = loss(pretrained.variables, rows)
    assert float(total / weight) == pytest.approx(want, abs=1e-4)
    assert float(weight) == np.sum(rows["labels"] >= 0)


def test_no_label_is_cut_off(tiny):
  made = task(tiny[0], noise_rate=0.6, mean_span=1.0)
  for length in range(2, 31):
    ids = np.full(length, 5, np.int32)
    one = made._corrupted(ids, np.random.default_rng(length))
    assert len(one["labels"]) <= made._longest(max(len(one["labels"]), len(one["input_ids"])))


def test_spans_are_drawn_anew_in_training_and_kept_in_evaluation(tiny):
  made = task(tiny[0])
  first, again = (made.example({"text": TEXTS[2]}) for _ in range(2))
  for key in first:
    np.testing.assert_array_equal(first[key], again[key])
  drawn = [made.augment(first, np.random.default_rng(seed)) for seed in range(12)]
  assert len({one["labels"].tobytes() for one in drawn}) > 4
  whole = made.preprocess({"text": TEXTS[2]})["input_ids"]
  for one in drawn:
    assert one["input_ids"][-1] == one["labels"][-1] == 1  # both end with </s>
    np.testing.assert_array_equal(
      span_lm.restore(one["input_ids"][:-1], one["labels"][:-1], SENTINELS), whole[:-1])
    assert {key: len(value) for key, value in one.items()} == {
      key: len(value) for key, value in first.items()}


@pytest.mark.parametrize("content,message", [
  ("film", "a text of one token"), ("the film <extra_id_1> was", "a text with a sentinel")])
def test_rows_that_cannot_be_used(tiny, content, message):
  with pytest.raises(errors.RowError, match=message):
    task(tiny[0]).example({"text": content})


def test_models_that_cannot(tmp_path):
  from tasks import text_models

  export(tmp_path / "bare", words=WORDS[:17])
  with pytest.raises(errors.UserError, match="has no sentinels"):
    task(tmp_path / "bare")
  text_models.export(tmp_path / "llama", "llama")
  with pytest.raises(errors.UserError, match="llama models are no encoder-decoders"):
    task(tmp_path / "llama")


def test_a_run_on_a_text_file(tiny, tmp_path):
  rng = np.random.default_rng(0)
  lines = [" ".join([WORDS[rng.integers(3, 17)]] * rng.integers(6, 12)) for _ in range(90)]
  (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
  made = {
    "model.source": str(tiny[0]), "data.train": str(tmp_path / "texts.txt"), "data.max_length": 16,
    "data.buckets": (), "task.name": "span_lm", "optim.rate": 2e-2, "train.batch": 16,
    "train.steps": 20, "train.eval_every": 10, "train.train_sample": 0,
    "guard.overfit.resamples": 100}
  train.train(config.complete(made), tmp_path / "out")
  card = json.loads((tmp_path / "out" / "card.json").read_text())
  test = card["results"]["test"]
  nats = {name: row["metrics"]["nats_per_token"] for name, row in test.items()}
  assert nats["fine-tuned"] < nats["zero-shot"] - 0.5
  assert "<extra_id_0>" in card["data"]["first_example"]
