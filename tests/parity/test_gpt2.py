"""GPT-2 against transformers: outputs, gradients, files of every age, cache, packed rows."""

import jax
import numpy as np
import pytest
from parity import decoders, harness

from ft import errors, models
from ft.models import generate, gpt2, layers
from ft.models.decoding import Settings
from ft.weights import names, tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 61, "n_positions": 21, "n_embd": 30, "n_layer": 2, "n_head": 5,
         "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Case -> (what differs from SMALL, left padding); each differs in every branch.
CASES = {
    "gelu_new, tied": ({}, False),
    "own width, relu, scores by layer, untied, left": (
        {"n_inner": 37, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True,
         "reorder_and_upcast_attn": True, "tie_word_embeddings": False, "n_head": 3,
         "layer_norm_epsilon": 1e-3}, True),
    "gelu, plain scores": ({"activation_function": "gelu", "scale_attn_weights": False,
                            "n_head": 2, "initializer_range": 0.1}, True),
}
FIRST, SECOND, THIRD = CASES


def build(case, kind="GPT2LMHeadModel", **more):
  torch.manual_seed(0)
  config = transformers.GPT2Config(**{**SMALL, **CASES[case][0], **more})
  return harness.randomise(getattr(transformers, kind)(config))


def batch(case):
  return harness.tokens(SMALL["vocab_size"], left=CASES[case][1])


def load(case, folder, **options):
  """Returns (the reference, ft's reading of it)."""
  model = build(case)
  model.save_pretrained(folder / "upstream")
  return model, models.load(str(folder / "upstream"), **options)


@pytest.mark.parametrize("case", [FIRST, SECOND, pytest.param(THIRD, marks=pytest.mark.slow)])
def test_language_model_equals_transformers(case, tmp_path):
  inputs = batch(case)
  pretrained = harness.check("gpt2", case, build(case), inputs, {"logits": "logits"}, tmp_path,
                             real={"logits": inputs["attention_mask"]})
  if case != FIRST:
    harness.check_scan(pretrained, inputs, tmp_path)


def test_classifier_equals_transformers(tmp_path):
  model = build(SECOND, "GPT2ForSequenceClassification", num_labels=3)
  harness.check("gpt2", "classifier, left", model, batch(SECOND), {"logits": "logits"}, tmp_path)


@pytest.mark.slow
def test_body_equals_transformers(tmp_path):
  inputs = batch(FIRST)
  harness.check("gpt2", "body", build(FIRST, "GPT2Model"), inputs,
                {"last_hidden_state": "last_hidden_state"}, tmp_path,
                real={"last_hidden_state": inputs["attention_mask"]})


@pytest.mark.parametrize(("case", "scan"), [(FIRST, False), (SECOND, True)])
def test_cache_gives_the_logits_of_a_full_pass(case, scan, tmp_path):
  _, pretrained = load(case, tmp_path, compute=layers.Compute(scan=scan))
  decoders.check_cache(pretrained, batch(case))


def test_packed_documents_do_not_see_each_other(tmp_path):
  model, pretrained = load(FIRST, tmp_path)
  decoders.check_packed(pretrained, model, SMALL["vocab_size"])


def test_a_language_model_gets_a_label_head_and_another_shape(tmp_path):
  build(FIRST).save_pretrained(tmp_path / "upstream")
  pretrained = models.load(str(tmp_path / "upstream"), num_labels=2, labels=("no", "yes"),
                           changes={"vocab_size": 66, "depth": 3})
  assert pretrained.report.initialised == ["params/classifier/kernel"]
  assert len(pretrained.report.changed) == 2
  models.export(pretrained, tmp_path / "out")
  model = decoders.opened(transformers.GPT2ForSequenceClassification, tmp_path / "out")
  assert model.config.id2label == {0: "no", 1: "yes"} and model.config.n_layer == 3
  decoders.check_logits(pretrained, model, batch(FIRST))


def test_an_untied_output_layer_grows_with_the_vocabulary(tmp_path):
  build(SECOND).save_pretrained(tmp_path)
  leaves = names.flatten(models.load(str(tmp_path), changes={"vocab_size": 66}).variables)
  assert leaves["params/lm_head/kernel"].shape == (30, 66)
  assert leaves["params/embed_tokens/embedding"].shape == (66, 30)


def test_files_of_before_are_given_back(tmp_path):
  """The first files name the body's tensors without a prefix, and hold the causal mask."""
  model = build(FIRST)
  model.save_pretrained(tmp_path / "upstream")
  file = tmp_path / "upstream" / "model.safetensors"
  content = {name.removeprefix("transformer."): tensor.read()
             for name, tensor in tensors.open_tensors(file).items()}
  for i in range(2):
    content[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 21, 21), np.float32))
    content[f"h.{i}.attn.masked_bias"] = np.float32(-1e4)
  tensors.write_sharded(tmp_path / "upstream", {
      name: tensors.ArrayTensor(np.asarray(value)) for name, value in content.items()},
      10**9, {"format": "pt"})
  pretrained = models.load(str(tmp_path / "upstream"))
  decoders.check_logits(pretrained, model, batch(FIRST))
  models.export(pretrained, tmp_path / "out")
  harness.same_tensors(tmp_path / "upstream", tmp_path / "out")


def test_more_tokens_than_positions(tmp_path):
  _, pretrained = load(FIRST, tmp_path)
  with pytest.raises(errors.UserError, match="a text of 22 tokens; the model has 21 positions"):
    pretrained.module.apply(pretrained.variables, np.ones((1, 22), np.int32))
  with pytest.raises(errors.UserError, match="24 tokens"):
    generate.generate(pretrained, {"input_ids": np.ones((1, 4), np.int32)},
                      Settings(max_new_tokens=20))


def test_dropout_acts_with_its_rng_only():
  config = gpt2.Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=12)
  assert config.with_dropout(0.3).attn_pdrop == config.with_dropout(0.3).embd_pdrop == 0.3
  module, inputs = gpt2.Model(config), gpt2.probe_inputs(config)
  variables = jax.jit(module.init)(jax.random.key(0), **inputs)
  run = jax.jit(lambda rngs: module.apply(variables, **inputs, rngs=rngs)["features"])
  np.testing.assert_array_equal(run({}), run({}))
  assert not np.allclose(run({}), run({"dropout": jax.random.key(1)}))


@pytest.mark.parametrize(("stated", "says"), [
    ({"activation_function": "mish"}, "activation_function 'mish'"),
    ({"n_head": 7}, "n_embd 768 is not a multiple of n_head 7"),
    ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
])
def test_what_is_not_computed_is_refused(stated, says):
  with pytest.raises(errors.UserError, match=says):
    gpt2.Config.from_hf({"model_type": "gpt2", **stated})


def test_both_names_of_a_size_are_read_and_written():
  config = gpt2.Config.from_hf({"model_type": "gpt2", "hidden_size": 48, "n_head": 4})
  assert (config.n_embd, config.n_layer, config.n_head) == (48, 12, 4)
  assert config.to_hf() == {"model_type": "gpt2", "hidden_size": 48, "n_head": 4}
