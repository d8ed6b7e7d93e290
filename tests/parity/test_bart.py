"""BART, mBART, Marian and M2M100 against transformers, float32; caches, scan, names, surgery."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import bart, layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 47, "max_position_embeddings": 29, "d_model": 24, "init_std": 0.1,
        "encoder_layers": 2, "encoder_ffn_dim": 33, "encoder_attention_heads": 3,
        "decoder_layers": 2, "decoder_ffn_dim": 21, "decoder_attention_heads": 4,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": 2}
ODD = {**TINY, "d_model": 15, "encoder_attention_heads": 5, "decoder_attention_heads": 3,
       "decoder_layers": 1}


def build(name, **config):
  """Returns a random transformers model with nonzero constants on its logits."""
  torch.manual_seed(0)
  kind = name.split("For")[0].removesuffix("MTModel").removesuffix("Model")
  config = getattr(transformers, kind + "Config")(**config)
  config._attn_implementation = "eager"
  model = harness.randomise(getattr(transformers, name)(config))
  if hasattr(model, "final_logits_bias"):
    model.final_logits_bias.normal_()
  # Position tables that are not trained, and an embedding that nothing reads, are no parameters.
  body = getattr(model, "model", model)
  for table in (body.encoder.embed_positions, body.decoder.embed_positions,
                getattr(body, "shared", None)):
    weight = getattr(table, "weight", None)
    unread = table is getattr(body, "shared", 0) and weight is not body.encoder.embed_tokens.weight
    if weight is not None and (unread or not weight.requires_grad):
      del table.weight
      table.register_buffer("weight", weight.detach().clone())
      if not unread:
        table.weight.copy_(torch.tensor(bart.sinusoids(*weight.shape)))
  return model.eval()


def batch(vocab, left=False, target=7, pad=1, length=13):
  """Returns both sides' tokens and masks; padding has the id that positions skip."""
  source = harness.tokens(vocab, length=length, left=left)
  result = harness.tokens(vocab, rows=3, length=target, seed=1)
  out = {**source, "decoder_input_ids": result["input_ids"],
         "decoder_attention_mask": result["attention_mask"]}
  for ids, mask in (("input_ids", "attention_mask"),
                    ("decoder_input_ids", "decoder_attention_mask")):
    out[ids] = np.where(out[mask] != 0, out[ids], pad).astype(np.int32)
  return out


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
LANGUAGE = [
    ("bart, tied", "BartForConditionalGeneration", False, TINY),
    SLOW("bart, own embeddings and head, scaled, relu", "BartForConditionalGeneration", True,
         {**ODD, "tie_word_embeddings": False, "scale_embedding": True,
          "activation_function": "relu"}),
    SLOW("mbart, scaled", "MBartForConditionalGeneration", True,
         {**TINY, "scale_embedding": True}),
    SLOW("marian, one vocabulary, swish", "MarianMTModel", False,
         {**TINY, "activation_function": "swish", "scale_embedding": True}),
    ("marian, two vocabularies, odd width", "MarianMTModel", True,
     {**ODD, "decoder_vocab_size": 39, "share_encoder_decoder_embeddings": False}),
    ("m2m_100", "M2M100ForConditionalGeneration", True, TINY),
    SLOW("m2m_100, own head, odd width, unscaled", "M2M100ForConditionalGeneration", False,
         {**ODD, "tie_word_embeddings": False, "scale_embedding": False}),
]


@pytest.mark.parametrize("case,name,left,config", LANGUAGE)
def test_language_model(case, name, left, config, tmp_path):
  model = build(name, **config)
  inputs = batch(config.get("decoder_vocab_size", config["vocab_size"]), left)
  pretrained = harness.check(
      "bart", case, model, inputs,
      {"logits": "logits", "encoder_last_hidden_state": "encoder_last_hidden_state"}, tmp_path,
      real={"encoder_last_hidden_state": inputs["attention_mask"],
            "logits": inputs["decoder_attention_mask"]})
  assert pretrained.config.head == "lm"
  assert pretrained.config.logits_bias == (not name.startswith("M2M"))


def test_body_and_scan(tmp_path):
  model = build("MBartModel", **TINY)
  inputs = batch(TINY["vocab_size"])
  pretrained = harness.check(
      "bart", "mbart, body", model, inputs, {"last_hidden_state": "last_hidden_state"},
      tmp_path, real={"last_hidden_state": inputs["decoder_attention_mask"]})
  harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.slow
def test_marian_body_keeps_its_positions(tmp_path):
  model = build("MarianModel", **TINY)
  inputs = batch(TINY["vocab_size"])
  harness.check("bart", "marian, body", model, inputs,
                {"last_hidden_state": "last_hidden_state"}, tmp_path,
                real={"last_hidden_state": inputs["decoder_attention_mask"]})


@pytest.mark.parametrize("name", ["BartForSequenceClassification",
                                  SLOW("MBartForSequenceClassification")])
def test_classifier(name, tmp_path):
  model = build(name, **TINY, num_labels=4)
  inputs = {key: value for key, value in batch(TINY["vocab_size"]).items() if "dec" not in key}
  for row, mask in enumerate(inputs["attention_mask"]):
    inputs["input_ids"][row, mask.sum() - 1] = 2
  pretrained = harness.check("bart", name, model, inputs, {"logits": "logits"}, tmp_path)
  assert pretrained.config.num_labels == 4
  again = models.load(str(tmp_path / "upstream"), labels=("a", "b"), rng=jax.random.key(1))
  assert all(path.startswith("params/classifier/") for path in again.report.initialised)


def steps(pretrained, inputs, slots):
  """Returns the logits of a decoder that reads its prefix, then one token at a time."""
  module, variables = pretrained.module, pretrained.variables
  ids = inputs["decoder_input_ids"]
  encode = jax.jit(functools.partial(module.apply, method="encode"))
  encoded = encode(variables, inputs["input_ids"],
                   inputs["attention_mask"])["encoder_last_hidden_state"]
  known = {"attention_mask": inputs["attention_mask"]}
  step = jax.jit(functools.partial(module.apply, mutable=["cache"], method="decode"))
  empty = jax.eval_shape(functools.partial(step, cache_index=0, encoder_hidden_states=encoded,
                                           **known),
                         variables, np.zeros((len(ids), slots), np.int32))[1]
  cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), empty)
  out, cache = step({**variables, **cache}, ids[:, :3], encoder_hidden_states=encoded,
                    cache_index=0, **known)
  logits = [out["logits"]]
  for i in range(3, ids.shape[1]):
    out, cache = step({**variables, **cache}, ids[:, i:i + 1], cache_index=jnp.int32(i), **known)
    logits.append(out["logits"])
  return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("name,scan", [
    SLOW("BartForConditionalGeneration", False), SLOW("MBartForConditionalGeneration", True),
    ("MarianMTModel", True), ("M2M100ForConditionalGeneration", False)])
def test_decoding_step_by_step_equals_one_pass(name, scan, tmp_path):
  build(name, **TINY).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), compute=layers.Compute(scan=scan))
  inputs = batch(TINY["vocab_size"], target=10)
  inputs["decoder_input_ids"] = harness.tokens(TINY["vocab_size"], rows=3, length=10)["input_ids"]
  del inputs["decoder_attention_mask"]
  inputs["decoder_input_ids"] = np.maximum(inputs["decoder_input_ids"], 3)
  want = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["logits"]
  assert harness.difference(steps(pretrained, inputs, slots=13), want) < 1e-5


@pytest.mark.parametrize("name", ["BartModel", "MBartModel"])
def test_without_decoder_tokens_the_source_is_shifted(name, tmp_path):
  model = build(name, **TINY)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = {"input_ids": batch(TINY["vocab_size"])["input_ids"]}
  want = model(**harness.as_torch(inputs)).last_hidden_state.detach()
  got = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["last_hidden_state"]
  assert harness.difference(got, want) < 1e-4


def rewrite(folder, change, config=None):
  """Changes the tensors {name: torch tensor} and config.json of a saved model."""
  from safetensors.torch import load_file, save_file
  held = load_file(folder / "model.safetensors")
  change(held)
  save_file({key: value.clone() for key, value in held.items()}, folder / "model.safetensors",
            {"format": "pt"})
  stated = json.loads((folder / "config.json").read_text())
  stated.update(config or {})
  (folder / "config.json").write_text(json.dumps(stated))


@pytest.mark.parametrize("name", [SLOW("BartForConditionalGeneration"),
                                  "M2M100ForConditionalGeneration"])
def test_an_older_file_with_every_name_comes_back(name, tmp_path):
  source, out = tmp_path / "old", tmp_path / "out"
  build(name, **TINY).save_pretrained(source)

  def older(held):
    for other in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
      held[other + ".weight"] = held["model.shared.weight"]
    held["model.encoder.version"] = torch.tensor([3.0])
    if name.startswith("M2M"):
      held["model.encoder.embed_positions.weights"] = torch.randn(31, 24)

  rewrite(source, older)
  pretrained = models.load(str(source))
  assert not pretrained.report.ignored
  models.export(pretrained, out)
  harness.same_tensors(source, out)


def test_a_file_without_the_constant_gets_none(tmp_path):
  build("BartForConditionalGeneration", **TINY).save_pretrained(tmp_path / "source")
  rewrite(tmp_path / "source", lambda held: held.pop("final_logits_bias"))
  pretrained = models.load(str(tmp_path / "source"))
  assert "buffers" not in pretrained.variables
  models.export(pretrained, tmp_path / "out")
  harness.same_tensors(tmp_path / "source", tmp_path / "out")


@pytest.mark.slow
def test_a_body_gets_a_language_head(tmp_path):
  build("MarianModel", **TINY).save_pretrained(tmp_path / "body")
  pretrained = models.load(str(tmp_path / "body"), head="lm")
  models.export(pretrained, tmp_path / "out")
  opened, info = transformers.MarianMTModel.from_pretrained(tmp_path / "out",
                                                            output_loading_info=True)
  assert not info["unexpected_keys"]
  assert opened.config.architectures == ["MarianMTModel"]
  inputs = batch(TINY["vocab_size"])
  want = opened.eval()(**harness.as_torch(inputs)).logits.detach().numpy()
  got = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["logits"]
  real = inputs["decoder_attention_mask"][..., None]
  assert harness.difference(got * real, want * real) < 1e-4


def test_surgery(tmp_path):
  model = build("BartForConditionalGeneration", **TINY)
  model.save_pretrained(tmp_path / "source")
  pretrained = models.load(str(tmp_path / "source"), changes={"vocab_size": 51, "depth": 1})
  assert len(pretrained.report.changed) == 2
  models.export(pretrained, tmp_path / "out")
  opened, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  inputs = batch(51)
  want = opened.eval()(**harness.as_torch(inputs)).logits.detach().numpy()
  got = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["logits"]
  real = inputs["decoder_attention_mask"][..., None]
  assert got.shape[-1] == 51 and harness.difference(got * real, want * real) < 1e-4


@pytest.mark.slow
def test_dropout_acts_with_an_rng_only(tmp_path):
  build("M2M100Model", **TINY, encoder_layerdrop=0.9).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dropout=0.5)
  assert pretrained.config.encoder_layerdrop == 0.5
  inputs = batch(TINY["vocab_size"])
  run = jax.jit(lambda **kw: pretrained.module.apply(pretrained.variables, **inputs, **kw))
  first, second = (run(rngs={"dropout": jax.random.key(i)})["features"] for i in (0, 1))
  assert harness.difference(first, second) > 0.01
  assert harness.difference(run()["features"], run()["features"]) == 0


def test_more_tokens_than_positions_are_an_error(tmp_path):
  build("BartModel", **TINY).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  with pytest.raises(errors.UserError, match="29 positions"):
    pretrained.module.apply(pretrained.variables, np.full((1, 30), 3, np.int32))


def test_positions_equal_transformers_far_out():
  from transformers.models.m2m_100 import modeling_m2m_100 as upstream
  want = upstream.M2M100SinusoidalPositionalEmbedding.get_embedding(1026, 15, 1)[2:]
  got = bart.sinusoids_of(jnp.arange(2, 1026), 15)
  assert harness.difference(got, want) < 1e-4
  from transformers.models.marian import modeling_marian as marian
  table = marian.MarianSinusoidalPositionalEmbedding(512, 15).create_weight()
  assert harness.difference(bart.sinusoids(512, 15), table) < 1e-6


@pytest.mark.parametrize("wrong,words", [
    ({"activation_function": "snake"}, "activation_function"),
    ({"encoder_attention_heads": 5}, "encoder_attention_heads"),
    ({"decoder_attention_heads": 7}, "decoder_attention_heads"),
    ({"is_decoder": True}, "is_decoder"),
    ({"d_model": "wide"}, "d_model"),
])
def test_wrong_configs_are_errors(wrong, words):
  with pytest.raises(errors.UserError, match=words):
    bart.Config.from_hf({"model_type": "bart", **TINY, **wrong})


def test_translation_models_have_no_label_head(tmp_path):
  build("MarianModel", **TINY).save_pretrained(tmp_path)
  with pytest.raises(errors.UserError, match="no label head"):
    models.load(str(tmp_path), num_labels=3)
