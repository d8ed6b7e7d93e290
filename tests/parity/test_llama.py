"""Llama and its relatives against transformers: outputs, gradients, files, cache, packed rows."""

import jax
import numpy as np
import pytest
from parity import decoders, harness

from ft import errors, models
from ft.models import layers, llama, rope
from ft.weights import names, tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 16}


def longrope(pairs, original):
  return {"rope_type": "longrope", "rope_theta": 1000.0,
          "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
          "long_factor": [1.5 + 0.7 * i for i in range(pairs)],
          "original_max_position_embeddings": original}


# Case -> (class prefix, what differs from SMALL, left padding); each differs in every branch.
CASES = {
    "llama: grouped, llama3 rope, all biases, untied": (
        "Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}, False),
    "llama: own head size, linear rope, tied, gelu, left": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0},
                  "tie_word_embeddings": True, "head_dim": 10, "hidden_act": "gelu",
                  "num_key_value_heads": 1, "rms_norm_eps": 1e-3}, True),
    "mistral: window 4, own head size, left": (
        "Mistral", {"sliding_window": 4, "head_dim": 8}, True),
    "qwen2: qkv bias, window in later layers, tied": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1,
                  "tie_word_embeddings": True}, False),
    "qwen3: q/k norm, window by layer type, left": (
        "Qwen3", {"head_dim": 10, "use_sliding_window": True, "sliding_window": 4,
                  "layer_types": ["sliding_attention", "full_attention"]}, True),
    "smollm3: some layers without rope, yarn, window, tied": (
        "SmolLM3", {"no_rope_layers": [1, 0], "mlp_bias": True, "rope_parameters": YARN,
                    "use_sliding_window": True, "sliding_window": 5}, False),
    "phi3: partial longrope (short), window, left": (
        "Phi3", {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 6,
                 "partial_rotary_factor": 0.5, "original_max_position_embeddings": 32,
                 "rope_scaling": longrope(3, 32)}, True),
    "phi3: longrope (long), tied": (
        "Phi3", {"original_max_position_embeddings": 8, "rope_scaling": longrope(3, 8),
                 "tie_word_embeddings": True}, False),
    "olmo2: norms after, norm of all of q and k, bias": (
        "Olmo2", {"attention_bias": True}, False),
}
MORE = {
    "llama: one head size, default rope, yarn, left": (
        "Llama", {"rope_parameters": {**YARN, "truncate": False, "mscale": 0.7,
                                      "mscale_all_dim": 0.4}, "num_key_value_heads": 4}, True),
    "mistral: no window, one key head, tied": (
        "Mistral", {"sliding_window": None, "num_key_value_heads": 1,
                    "tie_word_embeddings": True}, False),
    "qwen2: no window, ungrouped, left": (
        "Qwen2", {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 2}, True),
    "qwen3: biases, tied": (
        "Qwen3", {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": True}, False),
    "smollm3: every fourth layer without positions, left": (
        "SmolLM3", {"num_hidden_layers": 5, "attention_bias": True, "tie_word_embeddings": False,
                    "num_key_value_heads": 4}, True),
    "phi3: default rope, ungrouped": ("Phi3", {"num_key_value_heads": 4}, False),
    "olmo2: tied, one key head, linear rope, left": (
        "Olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 1,
                  "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}},
        True),
}
ALL = {**CASES, **MORE}
# The default run takes one case of each kind of difference; the rest is slow on two cores.
SLOW = {*MORE, *list(CASES)[1:4], list(CASES)[7]}
EVERY = [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in ALL]
FIRST, QWEN3, SMOLLM3, LONG = (list(CASES)[i] for i in (0, 4, 5, 7))


def build(case, kind="ForCausalLM", **more):
  prefix, special, _ = ALL[case]
  config = getattr(transformers, prefix + "Config")(**{**SMALL, **special, **more})
  torch.manual_seed(0)
  return harness.randomise(getattr(transformers, prefix + kind)(config))


def batch(case):
  return harness.tokens(SMALL["vocab_size"], left=ALL[case][2])


def load(case, folder, **options):
  """Returns (the reference, ft's reading of it)."""
  model = build(case)
  model.save_pretrained(folder / "upstream")
  return model, models.load(str(folder / "upstream"), **options)


@pytest.mark.parametrize("case", EVERY)
def test_language_model_equals_transformers(case, tmp_path):
  inputs = batch(case)
  pretrained = harness.check(
      "llama", case, build(case), inputs, {"logits": "logits"}, tmp_path,
      real={"logits": inputs["attention_mask"]})
  if case in (QWEN3, *SLOW):
    harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.parametrize("case", [FIRST, pytest.param(QWEN3, marks=pytest.mark.slow)])
def test_classifier_equals_transformers(case, tmp_path):
  model = build(case, "ForSequenceClassification", num_labels=3)
  pretrained = harness.check("llama", case.partition(":")[0] + ": classifier", model, batch(case),
                             {"logits": "logits"}, tmp_path)
  assert pretrained.config.head == "classify" and pretrained.config.num_labels == 3


def test_body_equals_transformers(tmp_path):
  inputs = batch(FIRST)
  harness.check("llama", "llama: body", build(FIRST, "Model"), inputs,
                {"last_hidden_state": "last_hidden_state"}, tmp_path, gradients=False,
                real={"last_hidden_state": inputs["attention_mask"]})


@pytest.mark.parametrize(("case", "scan"), [
    (FIRST, False), (QWEN3, True), *(pytest.param(case, scan, marks=pytest.mark.slow) for case, scan
                                     in ((FIRST, True), (QWEN3, False), (SMOLLM3, True),
                                         (LONG, False)))])
def test_cache_gives_the_logits_of_a_full_pass(case, scan, tmp_path):
  _, pretrained = load(case, tmp_path, compute=layers.Compute(scan=scan))
  decoders.check_cache(pretrained, batch(case))


def test_longrope_with_a_cache_needs_to_know_the_slots(tmp_path):
  _, pretrained = load(LONG, tmp_path)
  with pytest.raises(ValueError, match="attention_mask"):
    pretrained.module.apply(pretrained.variables, np.ones((1, 4), np.int32), cache_index=0,
                            mutable=["cache"])


@pytest.mark.parametrize("case", [QWEN3, pytest.param(FIRST, marks=pytest.mark.slow)])
def test_packed_documents_do_not_see_each_other(case, tmp_path):
  model, pretrained = load(case, tmp_path)
  decoders.check_packed(pretrained, model, SMALL["vocab_size"])


def test_a_language_model_gets_a_label_head(tmp_path):
  _, pretrained = load(FIRST, tmp_path, num_labels=2, labels=("no", "yes"))
  assert pretrained.report.initialised == ["params/classifier/kernel"]
  assert pretrained.report.ignored == ["lm_head.weight"]
  models.export(pretrained, tmp_path / "out")
  model = decoders.opened(transformers.LlamaForSequenceClassification, tmp_path / "out")
  assert model.config.id2label == {0: "no", 1: "yes"}
  decoders.check_logits(pretrained, model, batch(FIRST))


@pytest.mark.parametrize("case", [QWEN3, pytest.param(SMOLLM3, marks=pytest.mark.slow)])
def test_surgery(case, tmp_path):
  """Layers differ in windows and positions here: new ones are as the last."""
  _, before = load(case, tmp_path)
  changes = {"vocab_size": SMALL["vocab_size"] + 5, "depth": 3}
  after = models.load(str(tmp_path / "upstream"), changes=changes)
  assert len(after.report.changed) == 2
  old, new = (names.flatten(p.variables) for p in (before, after))
  assert new["params/embed_tokens/embedding"].shape == (66, 24)
  if not after.config.tie_word_embeddings:
    head = new["params/lm_head/kernel"]
    assert head.shape == (24, 66)
    np.testing.assert_allclose(head[:, -1], old["params/lm_head/kernel"].mean(1), atol=1e-6)
  models.export(after, tmp_path / "out")
  model = decoders.opened(transformers.AutoModelForCausalLM, tmp_path / "out")
  decoders.check_logits(after, model, batch(case))
  one = models.load(str(tmp_path / "upstream"), changes={"depth": 1})
  assert one.config.num_hidden_layers == 1 and "params/layer_1/mlp/up/kernel" not in names.flatten(
      one.variables)


def test_what_older_files_hold_besides_is_given_back(tmp_path):
  """Frequencies of the rope, and a tied output layer under its own name."""
  case = list(CASES)[1]
  build(case).save_pretrained(tmp_path / "upstream")
  file = tmp_path / "upstream" / "model.safetensors"
  content = {name: tensor.read() for name, tensor in tensors.open_tensors(file).items()}
  content["lm_head.weight"] = content["model.embed_tokens.weight"]
  for i in range(2):
    content[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
  tensors.write_sharded(tmp_path / "upstream", {
      name: tensors.ArrayTensor(value) for name, value in content.items()}, 10**9, {"format": "pt"})
  models.export(models.load(str(tmp_path / "upstream")), tmp_path / "out")
  harness.same_tensors(tmp_path / "upstream", tmp_path / "out")


def test_a_model_made_here_is_opened_there(tmp_path):
  config = llama.Config(
      vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=1, head="lm",
      num_attention_heads=2, rope=rope.Rope(8, 50.0, "linear", (("factor", 2.0),)))
  module = llama.Model(config)
  inputs = llama.probe_inputs(config)
  variables = jax.jit(module.init)(jax.random.key(0), **inputs)
  made = models.Pretrained("llama", module, variables, names.Report(), {}, config, "text",
                           llama.HEAD)
  models.export(made, tmp_path / "out")
  decoders.check_logits(made, decoders.opened(transformers.LlamaForCausalLM, tmp_path / "out"),
                        inputs)


def test_dropout_acts_with_its_rng_only():
  config = llama.Config(model_type="phi3", vocab_size=31, hidden_size=16, intermediate_size=20,
                        num_hidden_layers=1, num_attention_heads=2).with_dropout(0.5)
  assert (config.attention_dropout, config.resid_pdrop) == (0.5, 0.5)
  module, inputs = llama.Model(config), llama.probe_inputs(config)
  variables = jax.jit(module.init)(jax.random.key(0), **inputs)
  run = jax.jit(lambda rngs: module.apply(variables, **inputs, rngs=rngs)["features"])
  plain, again, dropped = (run(rngs) for rngs in ({}, {}, {"dropout": jax.random.key(1)}))
  np.testing.assert_array_equal(plain, again)
  assert not np.allclose(plain, dropped)


@pytest.mark.parametrize(("stated", "says"), [
    ({"model_type": "granite"}, "model_type 'granite' is no Llama"),
    ({"hidden_act": "mish"}, "hidden_act 'mish'"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
    ({"num_attention_heads": 7}, "hidden_size 4096 is not a multiple"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for llama"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["full_attention"]},
     "layer_types has 1 entries for 2 layers"),
    ({"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
     "not chunked_attention"),
    ({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
     "there is no sliding_window"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
])
def test_what_is_not_computed_is_refused(stated, says):
  with pytest.raises(errors.UserError, match=says):
    llama.Config.from_hf({"model_type": "llama", **stated})


def test_windows_of_each_kind_of_config():
  read = lambda **hf: llama.Config.from_hf(hf).windows()  # noqa: E731
  assert read(model_type="mistral", num_hidden_layers=2) == [4096] * 2
  assert read(model_type="mistral", num_hidden_layers=1, sliding_window=None) == [2**30]
  assert read(model_type="llama", num_hidden_layers=1, sliding_window=5) == [2**30]
  assert read(model_type="qwen2", num_hidden_layers=2, use_sliding_window=True, sliding_window=5,
              max_window_layers=1) == [2**30, 5]
  assert read(model_type="qwen2", num_hidden_layers=1, sliding_window=5,
              max_window_layers=0) == [2**30]
  smollm3 = llama.Config.from_hf({"model_type": "smollm3", "num_hidden_layers": 8})
  assert smollm3.rotated() == [1, 1, 1, 0, 1, 1, 1, 0] and smollm3.rope.theta == 2e6
