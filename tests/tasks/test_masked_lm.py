"""Masked language modelling: transformers' rule and loss, draws that can be repeated, a run."""

import json
import types

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import config_dict

from ft import config, errors, models, predict, state, train
from ft.data import text
from ft.models import bert, modernbert
from ft.tasks import masked_lm
from ft.weights import names

WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] a bad bright dull film good great grim is it plot slow "
         "the was un ##real ##ly ##ised").split()
MASK, SIZE = WORDS.index("[MASK]"), len(WORDS)
FAMILIES = {
  "bert": (bert, lambda: bert.Config(
    vocab_size=SIZE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=64, initializer_range=0.5, head="mlm")),
  "modernbert": (modernbert, lambda: modernbert.Config(
    vocab_size=SIZE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=64, initializer_range=0.5, pad_token_id=0,
    head="mlm", classifier_bias=False)),
}


def files(mask="[MASK]"):
  """A tokenizer of word pieces; `mask` is what its settings call the mask token."""
  made = tokenizers.Tokenizer(tokenizers.models.WordPiece(
    {w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(WORDS[:5])
  made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
  settings = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]",
              "mask_token": mask, "tokenizer_class": "PreTrainedTokenizerFast"}
  return {"tokenizer.json": made.to_str().encode(),
          "tokenizer_config.json": json.dumps(settings).encode()}


def export(folder, family="bert", scale=1.0):
  module, make = FAMILIES[family]
  made = make()
  model = module.Model(made)
  variables = model.init(jax.random.PRNGKey(0), **module.probe_inputs(made))
  variables = jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, variables)
  models.export(models.Pretrained(family, model, variables, names.Report(), files(), made, "text",
                                  ()), folder)
  return models.load(str(folder), head="mlm")


def task(folder, columns=("text",), data=None, **given):
  values = {key: value[0] for key, value in text.KEYS.items()} | {"max_length": 24} | (data or {})
  preprocess = text.Preprocess(types.SimpleNamespace(**values), models.inspect(str(folder)))
  section = {key: value[0] for key, value in masked_lm.KEYS.items()} | given
  return masked_lm.Task(config_dict.ConfigDict(section), types.SimpleNamespace(
    columns=dict.fromkeys(columns, "x"), splits={}), preprocess)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("bert")
  export(made)
  return made


def batch(made, rows):
  """Examples of texts as the loader stacks them."""
  examples = [made.example({"text": row}) for row in rows]
  width = max(len(example["input_ids"]) for example in examples)
  pad = made.preprocess.pad
  stacked = {key: np.stack([np.pad(example[key], (0, width - len(example[key])),
                                   constant_values=pad[key]) for example in examples])
             for key in examples[0]}
  return {**stacked, "weight": np.ones(len(rows), np.float32),
          "index": np.arange(len(rows), dtype=np.int32)}


TEXTS = ("the film was unreal a bad plot is slow", "it is good",
         "unrealised grim film the was a it")


@pytest.mark.parametrize("family", [*FAMILIES])
def test_loss_equals_transformers(tmp_path, family):
  torch = pytest.importorskip("torch")
  import transformers

  pretrained = export(tmp_path, family)
  made = task(tmp_path, mask_rate=0.4)
  rows = batch(made, TEXTS)
  reference = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32)
  labels = np.where(rows["labels"] < 0, -100, rows["labels"])
  with torch.no_grad():
    want = reference.eval()(
      input_ids=torch.tensor(rows["input_ids"]).long(), labels=torch.tensor(labels).long(),
      attention_mask=torch.tensor(rows["attention_mask"]))
  apply = state.make_apply(pretrained.module)
  call = lambda variables, inputs, rng=None: apply(variables, inputs, rng)[0]  # noqa: E731
  (total, weight, _), out = jax.jit(lambda v, b: (
    made.loss(call, v, b, None), made.predict(call, v, b)))(pretrained.variables, rows)
  assert float(total / weight) == pytest.approx(want.loss.item(), abs=1e-4)
  assert float(weight) == np.sum(rows["labels"] >= 0)
  found = made.metrics(jax.device_get(out))
  assert found["nats_per_token"] == pytest.approx(want.loss.item(), abs=1e-4)
  right = (want.logits.argmax(-1).numpy() == labels).sum() / np.sum(labels >= 0)
  assert found["masked_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("hidden,other", [(0.8, 0.1), (1.0, 0.0), (0.5, 0.25)])
def test_draws_are_those_of_transformers_collator(folder, hidden, other):
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  collator = transformers.DataCollatorForLanguageModeling(
    tokenizer, mlm_probability=0.3, mask_replace_prob=hidden, random_replace_prob=other,
    return_tensors="np")
  ids = np.random.default_rng(0).integers(5, SIZE, 400)
  special = np.arange(400) % 50 == 0
  collator.generator = np.random.default_rng(7)
  want, labels = collator.numpy_mask_tokens(ids[None].copy(), special[None].copy())
  rng = np.random.default_rng(7)
  chosen = masked_lm.choose(np.where(special, -1, np.arange(400)), 0.3, False, rng)
  got = masked_lm.replace(ids, chosen, MASK, len(tokenizer), hidden, other, rng)
  np.testing.assert_array_equal(np.where(chosen, ids, -100), labels[0])
  np.testing.assert_array_equal(got, want[0])


def test_shares_of_what_becomes_of_chosen_tokens():
  """80 in a hundred hidden, 10 drawn, 10 as they were: within five standard errors."""
  ids = np.full(200_000, 7)
  rng = np.random.default_rng(0)
  chosen = masked_lm.choose(np.arange(len(ids)), 0.15, False, rng)
  found = masked_lm.replace(ids, chosen, MASK, 1000, 0.8, 0.1, rng)
  assert np.all(found[~chosen] == 7)
  count = chosen.sum()
  assert count / len(ids) == pytest.approx(0.15, abs=5 * np.sqrt(0.15 * 0.85 / len(ids)))
  for share, of in ((0.8, found == MASK), (0.1, (found != MASK) & (found != 7)),
                    (0.1, (found == 7) & chosen)):
    assert of.sum() / count == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / count))


def test_whole_words_are_hidden_together(folder):
  made = task(folder, whole_words=True, mask_rate=0.3)
  example = made.example({"text": "the unreally film unrealised it"})
  assert example["words"].tolist() == [-1, 0, 1, 1, 1, 2, 3, 3, 3, 4, -1]
  seen = set()
  for seed in range(40):
    labels = made.augment(example, np.random.default_rng(seed))["labels"]
    for word in range(5):
      hidden = labels[example["words"] == word] >= 0
      assert hidden.all() or not hidden.any()
      seen |= {word} if hidden.all() else set()
  assert seen == set(range(5))
  assert np.all(labels[example["words"] < 0] == -1)


def test_masks_are_drawn_anew_in_training_and_kept_in_evaluation(folder):
  made = task(folder)
  first, again = (made.example({"text": TEXTS[0]}) for _ in range(2))
  for key in first:
    np.testing.assert_array_equal(first[key], again[key])
  drawn = [made.augment(first, np.random.default_rng([0, epoch, 5])) for epoch in range(12)]
  assert len({one["labels"].tobytes() for one in drawn}) > 6
  same = made.augment(first, np.random.default_rng([0, 3, 5]))
  np.testing.assert_array_equal(same["labels"], drawn[3]["labels"])
  whole = made.preprocess({"text": TEXTS[0]})["input_ids"]
  for one in (first, *drawn):  # nothing of the text is lost by drawing
    np.testing.assert_array_equal(np.where(one["labels"] < 0, one["input_ids"], one["labels"]),
                                  whole)
    assert np.any(one["labels"] >= 0)


def test_a_row_of_two_tokens_always_has_one_to_predict(folder):
  made = task(folder, mask_rate=0.01)
  assert np.sum(made.example({"text": "good film"})["labels"] >= 0) == 1
  with pytest.raises(errors.RowError, match="a text of one token"):
    made.example({"text": "film"})


def test_words_of_bad_input(folder, tmp_path):
  with pytest.raises(errors.UserError, match="more than 1 together"):
    task(folder, hidden_share=0.9, random_share=0.2)
  with pytest.raises(errors.UserError, match="task.name=masked_lm models text"):
    task(folder, columns=("image",))
  export(tmp_path)
  content = json.loads((tmp_path / "tokenizer.json").read_text())
  for token in content["added_tokens"]:
    token["content"] = token["content"].replace("[MASK]", "[M]")
  content["model"]["vocab"]["[M]"] = content["model"]["vocab"].pop("[MASK]")
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(errors.UserError, match="has no mask token"):
    task(tmp_path)


def test_decoders_have_no_such_head(tmp_path):
  from tasks import text_models

  text_models.export(tmp_path, "llama")
  with pytest.raises(errors.UserError, match="llama models have no masked-word head"):
    task(tmp_path)


def test_a_run_on_a_text_file(tmp_path):
  export(tmp_path / "bert", scale=0.3)
  rng = np.random.default_rng(0)
  lines = [" ".join([word := WORDS[rng.integers(5, 12)], word, word, word, word, word])
           for _ in range(120)]
  (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
  (tmp_path / "tiny.py").write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(tmp_path / "bert")!r}),
    data=dict(train={str(tmp_path / "texts.txt")!r}, max_length=16, buckets=(),
              keep_duplicates_together=False),
    task=dict(name="masked_lm", mask_rate=0.2), optim=dict(rate=2e-2),
    train=dict(batch=16, steps=30, eval_every=15, log_every=5, train_sample=0),
    guard=dict(overfit=dict(resamples=100)),
  )
""")
  out = tmp_path / "out"
  train.train(config.load(str(tmp_path / "tiny.py")), out)
  card = json.loads((out / "card.json").read_text())
  test = card["results"]["test"]
  assert set(test) == {"zero-shot", "unigram", "fine-tuned"}
  nats = {name: row["metrics"]["nats_per_token"] for name, row in test.items()}
  assert nats["fine-tuned"] < nats["unigram"] < nats["zero-shot"]  # the word stands beside
  assert test["fine-tuned"]["metrics"]["masked_accuracy"] > 0.6  # by chance 0.14
  assert "⟦" in card["data"]["first_example"]
  again = models.load(str(out / "model"))
  assert again.config.head == "mlm" and not again.report.initialised
  answers = list(predict.Predictor(out)([{"text": lines[0]}, {"text": "film"}]))
  assert answers[0]["nats_per_token"] < 1.9 and "one token" in answers[1]["error"]
