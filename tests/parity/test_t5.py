"""T5, v1.1, mT5 and umT5 against transformers, float32; caches, scan, tied names, surgery."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import layers, t5
from ft.weights import tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSIC = {"vocab_size": 41, "d_model": 24, "d_kv": 7, "d_ff": 33, "num_layers": 2,
           "num_heads": 3, "relative_attention_num_buckets": 8,
           "relative_attention_max_distance": 10, "decoder_start_token_id": 0}
GATED = {"vocab_size": 53, "d_model": 20, "d_kv": 4, "d_ff": 18, "num_layers": 2,
         "num_decoder_layers": 3, "num_heads": 5, "feed_forward_proj": "gated-gelu",
         "tie_word_embeddings": False, "layer_norm_epsilon": 1e-5, "decoder_start_token_id": 2}
# Random models differ most where a bucket per distance ends, so texts reach beyond it.
LENGTH = 17
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def build(name, untied=False, **config):
  """Returns a random transformers model; `untied` gives it a language head of its own."""
  torch.manual_seed(0)
  kind = name.split("For")[0].removesuffix("EncoderModel").removesuffix("Model")
  config = getattr(transformers, kind + "Config")(**config)
  config._attn_implementation = "eager"
  model = getattr(transformers, name)(config)
  if untied:
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    model.all_tied_weights_keys.pop("lm_head.weight")
  return harness.randomise(model)


def run(pretrained, inputs):
  return jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)


def batch(vocab, left=False, target=7):
  """Returns both sides' tokens and masks."""
  source = harness.tokens(vocab, length=LENGTH, left=left)
  result = harness.tokens(vocab, rows=3, length=target, seed=1)
  return {**source, "decoder_input_ids": result["input_ids"],
          "decoder_attention_mask": result["attention_mask"]}


@pytest.mark.parametrize("case,name,left,config", [
    ("relu, tied, scaled", "T5ForConditionalGeneration", False, CLASSIC),
    ("gated, own head, 2+3 layers, padded left", "T5ForConditionalGeneration", True, GATED),
    SLOW("mT5, own head", "MT5ForConditionalGeneration", False, GATED),
    SLOW("umT5, bias a layer", "UMT5ForConditionalGeneration", True, CLASSIC),
])
def test_language_model(case, name, left, config, tmp_path):
  model = build(name, untied=config is GATED, **config)
  inputs = batch(config["vocab_size"], left)
  pretrained = harness.check(
      "t5", case, model, inputs,
      {"logits": "logits", "encoder_last_hidden_state": "encoder_last_hidden_state"}, tmp_path,
      real={"encoder_last_hidden_state": inputs["attention_mask"],
            "logits": inputs["decoder_attention_mask"]})
  assert pretrained.config.head == "lm"
  assert pretrained.config.tied == (config is CLASSIC)


def test_body_and_scan(tmp_path):
  model = build("T5Model", **GATED)
  inputs = batch(GATED["vocab_size"])
  pretrained = harness.check(
      "t5", "body, gated, 2+3 layers", model, inputs, {"last_hidden_state": "last_hidden_state"},
      tmp_path, real={"last_hidden_state": inputs["decoder_attention_mask"]})
  harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.parametrize("case,name,config", [
    SLOW("encoder, silu", "T5EncoderModel", {**CLASSIC, "feed_forward_proj": "gated-silu"}),
    ("encoder, umT5", "UMT5EncoderModel", GATED),
])
def test_encoder(case, name, config, tmp_path):
  model = build(name, **config)
  inputs = harness.tokens(config["vocab_size"], length=LENGTH, left=True)

  def mean(reference, given):
    mask = given["attention_mask"][..., None]
    return (reference.last_hidden_state * mask).sum(1) / mask.sum(1)

  pretrained = harness.check(
      "t5", case, model, inputs, {"last_hidden_state": "last_hidden_state", "features": mean},
      tmp_path, real={"last_hidden_state": inputs["attention_mask"]})
  assert pretrained.config.head == "encoder"
  if name.startswith("U"):
    harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.parametrize("name", ["T5ForSequenceClassification",
                                  SLOW("MT5ForTokenClassification")])
def test_label_heads(name, tmp_path):
  model = build(name, **CLASSIC, num_labels=4)
  inputs = harness.tokens(CLASSIC["vocab_size"], length=LENGTH)
  for row, mask in enumerate(inputs["attention_mask"]):
    inputs["input_ids"][row, mask.sum() - 1] = 1
  real = {"logits": inputs["attention_mask"]} if "Token" in name else None
  pretrained = harness.check("t5", name, model, inputs, {"logits": "logits"}, tmp_path, real=real)
  assert pretrained.config.num_labels == 4
  again = models.load(str(tmp_path / "upstream"), labels=("a", "b"), rng=jax.random.key(1))
  assert all(path.startswith("params/classifier/") for path in again.report.initialised)
  models.export(again, tmp_path / "relabelled")
  reopened = type(model).from_pretrained(tmp_path / "relabelled").eval()
  assert reopened.config.id2label == {0: "a", 1: "b"}
  want = reopened(**harness.as_torch(inputs)).logits.detach().numpy()
  got = run(again, inputs)["logits"]
  weights = inputs["attention_mask"][..., None] if real else 1
  assert harness.difference(got * weights, want * weights) < 1e-4


def steps(pretrained, inputs, slots):
  """Returns the logits of a decoder that reads its prefix, then one token at a time."""
  module, variables = pretrained.module, pretrained.variables
  ids, mask = inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
  encode = jax.jit(functools.partial(module.apply, method="encode"))
  encoded = encode(variables, inputs["input_ids"],
                   inputs["attention_mask"])["encoder_last_hidden_state"]
  known = {"attention_mask": inputs["attention_mask"],
           "decoder_attention_mask": np.pad(mask, ((0, 0), (0, slots - mask.shape[1])))}
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
    ("T5ForConditionalGeneration", True), SLOW("T5ForConditionalGeneration", False),
    ("UMT5ForConditionalGeneration", False), SLOW("UMT5ForConditionalGeneration", True)])
def test_decoding_step_by_step_equals_one_pass(name, scan, tmp_path):
  build(name, **CLASSIC).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), compute=layers.Compute(scan=scan))
  inputs = batch(CLASSIC["vocab_size"], target=12)
  inputs["decoder_attention_mask"] = np.ones_like(inputs["decoder_input_ids"])
  inputs["decoder_attention_mask"][1, :2] = 0  # padded on the left
  want = run(pretrained, inputs)["logits"]
  got = steps(pretrained, inputs, slots=15)
  real = inputs["decoder_attention_mask"][..., None]
  assert harness.difference(got * real, want * real) < 1e-5


def test_without_masks_equals_transformers(tmp_path):
  model = build("T5ForConditionalGeneration", **CLASSIC)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = {key: value for key, value in batch(CLASSIC["vocab_size"]).items() if "mask" not in key}
  want = model(**harness.as_torch(inputs)).logits.detach()
  assert harness.difference(
      run(pretrained, inputs)["logits"], want) < 1e-4


def test_dropout_acts_with_an_rng_only(tmp_path):
  build("T5ForConditionalGeneration", **CLASSIC).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dropout=0.5)
  inputs = batch(CLASSIC["vocab_size"])
  act = jax.jit(functools.partial(pretrained.module.apply, pretrained.variables, **inputs))
  first, second = (act(rngs={"dropout": jax.random.key(i)})["logits"] for i in (0, 1))
  assert harness.difference(first, second) > 0.01
  assert harness.difference(act()["logits"], act()["logits"]) == 0


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


def test_a_file_with_every_name_of_the_embeddings_comes_back(tmp_path):
  source, out = tmp_path / "old", tmp_path / "out"
  build("T5ForConditionalGeneration", **CLASSIC).save_pretrained(source)

  def older(held):
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
      held[name + ".weight"] = held["shared.weight"]
    held["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = \
        torch.randn(8, 3)

  rewrite(source, older)
  pretrained = models.load(str(source))
  assert pretrained.config.tied and not pretrained.report.ignored
  models.export(pretrained, out)
  harness.same_tensors(source, out)
  assert "lm_head.weight" in tensors.open_tensors(out)

  def differ(held):
    held["lm_head.weight"] = held["lm_head.weight"] + 1

  rewrite(source, differ)
  with pytest.raises(errors.UserError, match="should be equal"):
    models.load(str(source))


def test_first_release_of_v11_states_its_untied_head(tmp_path):
  model = build("T5ForConditionalGeneration", untied=True, **GATED)
  model.save_pretrained(tmp_path)
  inputs = batch(GATED["vocab_size"])
  want = model(**harness.as_torch(inputs)).logits.detach()
  stated = json.loads((tmp_path / "config.json").read_text())
  del stated["scale_decoder_outputs"]  # as transformers 4 wrote it
  (tmp_path / "config.json").write_text(json.dumps({**stated, "tie_word_embeddings": False}))
  pretrained = models.load(str(tmp_path))
  assert not pretrained.config.tied and not pretrained.config.scale_decoder_outputs
  got = run(pretrained, inputs)["logits"]
  real = inputs["decoder_attention_mask"][..., None]
  assert harness.difference(got * real, want.numpy() * real) < 1e-4


def test_a_language_model_without_its_decoder(tmp_path):
  model = build("T5ForConditionalGeneration", **CLASSIC)
  model.save_pretrained(tmp_path / "lm")
  pretrained = models.load(str(tmp_path / "lm"), head="encoder")
  assert all(name.startswith("decoder.") for name in pretrained.report.ignored)
  models.export(pretrained, tmp_path / "encoder")
  opened = transformers.T5EncoderModel.from_pretrained(tmp_path / "encoder").eval()
  inputs = harness.tokens(CLASSIC["vocab_size"])
  want = opened(**harness.as_torch(inputs)).last_hidden_state.detach()
  got = run(pretrained, inputs)["last_hidden_state"]
  assert harness.difference(got, want) < 1e-4


def test_chronos_config_is_kept(tmp_path):
  chronos = {"tokenizer_class": "MeanScaleUniformBins", "n_tokens": 41, "n_special_tokens": 2,
             "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0}}
  model = build("T5ForConditionalGeneration", **CLASSIC)
  model.config.chronos_config = chronos
  model.save_pretrained(tmp_path / "source")
  pretrained = models.load(str(tmp_path / "source"))
  models.export(pretrained, tmp_path / "out")
  assert json.loads((tmp_path / "out/config.json").read_text())["chronos_config"] == chronos


def test_surgery(tmp_path):
  model = build("T5ForConditionalGeneration", untied=True, **GATED)
  model.save_pretrained(tmp_path / "source")
  pretrained = models.load(str(tmp_path / "source"), changes={"vocab_size": 57, "depth": 1})
  assert len(pretrained.report.changed) == 2
  params = pretrained.variables["params"]
  np.testing.assert_allclose(params["shared"]["embedding"][54],
                             model.shared.weight.detach().numpy().mean(0), atol=1e-5)
  assert params["lm_head"]["kernel"].shape == (20, 57)
  models.export(pretrained, tmp_path / "out")
  opened, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  inputs = batch(57)
  want = opened.eval()(**harness.as_torch(inputs)).logits.detach().numpy()
  got = run(pretrained, inputs)["logits"]
  real = inputs["decoder_attention_mask"][..., None]
  assert harness.difference(got * real, want * real) < 1e-4


def test_depth_of_a_symmetric_model_leaves_the_decoder(tmp_path):
  build("T5ForConditionalGeneration", **CLASSIC).save_pretrained(tmp_path / "source")
  rewrite(tmp_path / "source", lambda held: None, {"num_decoder_layers": None})
  pretrained = models.load(str(tmp_path / "source"), changes={"depth": 3})
  models.export(pretrained, tmp_path / "out")
  assert models.load(str(tmp_path / "out")).config.num_decoder_layers == 2


@pytest.mark.parametrize("count,reach,causal", [
    (32, 128, False), (32, 128, True), (8, 10, False), (9, 30, True), (64, 500, False)])
def test_buckets_equal_transformers(count, reach, causal):
  from transformers.models.t5.modeling_t5 import T5Attention
  distance = torch.arange(-reach - 3, reach + 4)
  want = T5Attention._relative_position_bucket(distance, not causal, count, reach)
  got = t5.buckets(count, reach, causal)[np.clip(distance.numpy(), -reach, reach) + reach]
  assert np.array_equal(got, want.numpy())


@pytest.mark.parametrize("wrong,words", [
    ({"feed_forward_proj": "gated-snake"}, "feed_forward_proj"),
    ({"dense_act_fn": "silu"}, "dense_act_fn"),
    ({"is_gated_act": True}, "is_gated_act"),
    ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets"),
    ({"relative_attention_max_distance": 16}, "relative_attention_max_distance"),
    ({"d_model": "wide"}, "d_model"),
])
def test_wrong_configs_are_errors(wrong, words):
  with pytest.raises(errors.UserError, match=words):
    t5.Config.from_hf({"model_type": "t5", **wrong})
