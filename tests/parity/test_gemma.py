"""Gemma, Gemma 2 and Gemma 3 text against transformers, float32: outputs, gradients, exports."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import layers

torch = harness.torch
transformers = harness.transformers

TINY = {
    "gemma": {"vocab_size": 41, "hidden_size": 24, "intermediate_size": 31,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
              "head_dim": 10, "hidden_act": "gelu"},
    "gemma2": {"vocab_size": 39, "hidden_size": 20, "intermediate_size": 27,
               "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
               "head_dim": 6, "query_pre_attn_scalar": 11, "sliding_window": 4,
               "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5},
    "gemma2 untied": {"vocab_size": 37, "hidden_size": 18, "intermediate_size": 22,
                      "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
                      "head_dim": 8, "attn_logit_softcapping": None,
                      "final_logit_softcapping": None, "attention_bias": True,
                      "tie_word_embeddings": False, "hidden_activation": "silu",
                      "layer_types": ["full_attention"] * 2, "rms_norm_eps": 1e-3,
                      "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "gemma3_text": {"vocab_size": 43, "hidden_size": 24, "intermediate_size": 29,
                    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 3,
                    "final_logit_softcapping": 3.0,
                    "layer_types": ["sliding_attention", "sliding_attention", "full_attention",
                                    "sliding_attention"],
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "factor": 4.0,
                                           "rope_theta": 2000.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    "gemma3_text local": {"vocab_size": 36, "hidden_size": 16, "intermediate_size": 21,
                          "num_hidden_layers": 2, "num_attention_heads": 4,
                          "num_key_value_heads": 1, "head_dim": 6, "query_pre_attn_scalar": 6,
                          "sliding_window": 5, "attention_bias": True},
    "gemma3_text encoder": {"vocab_size": 36, "hidden_size": 16, "intermediate_size": 21,
                            "num_hidden_layers": 3, "num_attention_heads": 2,
                            "num_key_value_heads": 1, "head_dim": 6, "sliding_window": 6,
                            "use_bidirectional_attention": True, "query_pre_attn_scalar": 6,
                            "layer_types": ["sliding_attention", "full_attention",
                                            "sliding_attention"]},
}
PREFIX = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text"}
NAMES = {"none": "Model", "lm": "ForCausalLM", "classify": "ForSequenceClassification"}


def class_of(kind, head):
  name = PREFIX[kind.split()[0]] + NAMES[head]
  return getattr(transformers, {"Gemma3TextForCausalLM": "Gemma3ForCausalLM"}.get(name, name))


def tiny(kind, head, **extra):
  """Returns a random tiny transformers model, in evaluation mode."""
  torch.manual_seed(1)
  make = getattr(transformers, PREFIX[kind.split()[0]] + "Config")
  config = make(**{"initializer_range": 0.3, "pad_token_id": 0, **TINY[kind], **extra},
                attn_implementation="eager")
  return harness.randomise(class_of(kind, head)(config))


def run(pretrained, inputs):
  return jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)


def close(got, want):
  assert harness.difference(got, want) <= harness.TOLERANCE


@pytest.mark.parametrize("kind", [kind for kind in TINY if "encoder" not in kind])
def test_language_model_equals_transformers(kind, tmp_path):
  model = tiny(kind, "lm")
  inputs = harness.tokens(model.config.vocab_size, left="2" in kind)
  pretrained = harness.check("gemma", f"{kind}, lm", model, inputs, {"logits": "logits"},
                             tmp_path, real={"logits": inputs["attention_mask"]})
  assert not pretrained.report.ignored and pretrained.config.head == "lm"
  if kind in PREFIX:
    harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.parametrize("kind", [pytest.param("gemma", marks=pytest.mark.slow), "gemma2",
                                  pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_classifier_equals_transformers(kind, tmp_path):
  model = tiny(kind, "classify", num_labels=4)
  inputs = harness.tokens(36, left=kind == "gemma2")
  pretrained = harness.check("gemma", f"{kind}, classifier", model, inputs,
                             {"logits": "logits"}, tmp_path)
  out = run(pretrained, inputs)
  assert out["features"].shape == (3, model.config.hidden_size)
  close(pretrained.module.apply(pretrained.variables, out["features"], method="head"),
        out["logits"])


@pytest.mark.parametrize("kind", ["gemma3_text encoder",
                                  pytest.param("gemma2", marks=pytest.mark.slow)])
def test_body_equals_transformers(kind, tmp_path):
  model = tiny(kind, "none")
  inputs = harness.tokens(36)
  harness.check("gemma", f"{kind}, body", model, inputs,
                {"last_hidden_state": "last_hidden_state"}, tmp_path,
                real={"last_hidden_state": inputs["attention_mask"]})


def stepwise(pretrained, ids, mask, prompt):
  """Returns the logits of a prefill of `prompt` tokens and of single steps after it."""
  slots, module = ids.shape[1], pretrained.module
  positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
  empty = jax.eval_shape(lambda: module.apply(
      pretrained.variables, ids, attention_mask=mask, cache_index=0, mutable=["cache"])[1])
  cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty)

  @jax.jit
  def call(cache, ids, positions, index):
    return module.apply({**pretrained.variables, **cache}, ids, attention_mask=mask,
                        position_ids=positions, cache_index=index, mutable=["cache"])

  parts, start = [], 0
  for end in (prompt, *range(prompt + 1, slots + 1)):
    out, cache = call(cache, ids[:, start:end], positions[:, start:end], start)
    parts.append(out["logits"])
    start = end
  return np.concatenate(parts, 1)


@pytest.mark.parametrize("kind,scan", [("gemma2", False), ("gemma3_text", True)])
def test_cache_gives_what_one_pass_gives(kind, scan, tmp_path):
  model = tiny(kind, "lm")
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), compute=layers.Compute(scan=scan))
  inputs = harness.tokens(36, length=12, left=True)
  ids, mask = inputs["input_ids"], inputs["attention_mask"]
  positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
  with torch.no_grad():
    want = model(**harness.as_torch({**inputs, "position_ids": positions})).logits.numpy()
  seen = mask[..., None]
  close(run(pretrained, {**inputs, "position_ids": positions})["logits"] * seen, want * seen)
  close(stepwise(pretrained, ids, mask, 7) * seen, want * seen)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_packed_rows_do_not_see_each_other(kind, tmp_path):
  tiny(kind, "lm").save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  ids = np.random.default_rng(0).integers(3, 36, (1, 16)).astype(np.int32)
  packed = {"position_ids": np.concatenate([np.arange(7), np.arange(9)])[None],
            "segment_ids": np.array([[0] * 7 + [1] * 9])}
  first = run(pretrained, {"input_ids": ids, **packed})["logits"]
  other = ids.copy()
  other[:, :7] = 9
  second = run(pretrained, {"input_ids": other, **packed})["logits"]
  assert np.array_equal(first[:, 7:], second[:, 7:]) and (first[:, :7] != second[:, :7]).any()
  close(first[:, 7:], run(pretrained, {"input_ids": ids[:, 7:]})["logits"])


def test_text_part_of_a_checkpoint_of_text_and_images(tmp_path):
  text = {**TINY["gemma3_text"], "initializer_range": 0.3, "pad_token_id": 0,
          "final_logit_softcapping": None}
  vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 12, "image_size": 28, "patch_size": 14}
  torch.manual_seed(1)
  model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
      text_config=text, vision_config=vision, mm_tokens_per_image=1,
      attn_implementation="eager"))
  harness.randomise(model).save_pretrained(tmp_path / "base")
  (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
  pretrained = models.load(str(tmp_path / "base"))
  assert pretrained.config.head == "lm" and not pretrained.report.initialised
  assert all(name.startswith(("vision_tower.", "multi_modal_projector."))
             for name in pretrained.report.ignored)
  inputs = harness.tokens(43)
  seen = inputs["attention_mask"][..., None]
  with torch.no_grad():
    want = model(**harness.as_torch(inputs)).logits.numpy()
  close(run(pretrained, inputs)["logits"] * seen, want * seen)
  models.export(pretrained, tmp_path / "out")
  assert not (tmp_path / "out" / "preprocessor_config.json").exists()
  with torch.no_grad():
    again = opened("gemma3_text", "lm", tmp_path / "out")(**harness.as_torch(inputs)).logits
  close(again.numpy() * seen, want * seen)
  body = models.load(str(tmp_path / "base"), head="none")
  models.export(body, tmp_path / "body")
  opened("gemma3_text", "none", tmp_path / "body")


def opened(kind, head, folder):
  model, info = class_of(kind, head).from_pretrained(folder, output_loading_info=True,
                                                     attn_implementation="eager")
  for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[key], (key, info[key])
  return model.eval()


@pytest.mark.parametrize("kind,source,head", [
    ("gemma2", "lm", "classify"), ("gemma2 untied", "lm", "none"), ("gemma3_text", "none", "lm")])
def test_transformers_opens_another_head(kind, source, head, tmp_path):
  tiny(kind, source).save_pretrained(tmp_path / "base")
  labels = {"num_labels": 3} if head == "classify" else {}
  pretrained = models.load(str(tmp_path / "base"), head=head, **labels)
  models.export(pretrained, tmp_path / "out")
  model = opened(kind, head, tmp_path / "out")
  inputs = harness.tokens(36)
  output = "last_hidden_state" if head == "none" else "logits"
  seen = inputs["attention_mask"][..., None] if head != "classify" else 1
  with torch.no_grad():
    want = model(**harness.as_torch(inputs))[output].numpy()
  close(run(pretrained, inputs)[output] * seen, want * seen)


@pytest.mark.parametrize("kind", ["gemma2 untied", "gemma3_text"])
def test_surgery(kind, tmp_path):
  model = tiny(kind, "lm")
  model.save_pretrained(tmp_path / "base")
  size = model.config.vocab_size + 3
  pretrained = models.load(str(tmp_path / "base"), changes={"vocab_size": size, "depth": 3})
  models.export(pretrained, tmp_path / "out")
  model = opened(kind, "lm", tmp_path / "out")
  assert (model.config.vocab_size, model.config.num_hidden_layers) == (size, 3)
  inputs = harness.tokens(size)
  seen = inputs["attention_mask"][..., None]
  with torch.no_grad():
    want = model(**harness.as_torch(inputs)).logits.numpy()
  close(run(pretrained, inputs)["logits"] * seen, want * seen)


def test_configs_of_transformers_4(tmp_path):
  """They state a pattern and two thetas; Gemma's say gelu and mean the approximation."""
  kind = "gemma3_text local"
  model = tiny(kind, "lm", sliding_window_pattern=2,
               rope_parameters={"full_attention": {"rope_type": "linear", "factor": 4.0,
                                                   "rope_theta": 700.0},
                                "sliding_attention": {"rope_type": "default", "rope_theta": 40.0}})
  model.save_pretrained(tmp_path)
  new = models.load(str(tmp_path))
  stated = json.loads((tmp_path / "config.json").read_text())
  for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
    del stated[key]
  stated |= {"sliding_window_pattern": 2, "rope_theta": 700.0, "rope_local_base_freq": 40.0,
             "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
  (tmp_path / "config.json").write_text(json.dumps(stated))
  old = models.load(str(tmp_path))
  assert old.config == new.config
  models.export(old, tmp_path / "out")
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == stated


def test_bfloat16_rounds_the_scale_of_embeddings(tmp_path):
  tiny("gemma2", "lm").save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dtype=jnp.bfloat16, compute=layers.Compute(jnp.bfloat16))
  out = run(pretrained, harness.tokens(36))
  assert out["last_hidden_state"].dtype == jnp.bfloat16 and out["logits"].dtype == jnp.float32


@pytest.mark.parametrize("kind,hf,message", [
    ("gemma", {"hidden_act": "mish"}, "hidden_activation 'mish'"),
    ("gemma", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma2", {"num_key_value_heads": 3}, "not a multiple"),
    ("gemma2", {"sliding_window": None}, "there is no sliding_window"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
    ("gemma2", {"layer_types": ["full_attention", "x", "x"]}, "not 'x'"),
    ("gemma3_text", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping=20.0"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "should be given for"),
    ("gemma3_text", {"model_type": "gemma3"}, "should have a text_config"),
])
def test_config_that_is_not_served(kind, hf, message, tmp_path):
  tiny(kind, "lm").save_pretrained(tmp_path)
  stated = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(stated | hf))
  with pytest.raises(errors.UserError, match=message):
    models.load(str(tmp_path))
