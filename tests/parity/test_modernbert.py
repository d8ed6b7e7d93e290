"""ModernBERT against transformers, float32: outputs, gradients, exports that it opens."""

import json

import jax
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import layers, modernbert

torch = harness.torch
transformers = harness.transformers

COMMON = {"initializer_range": 0.3, "attn_implementation": "eager", "pad_token_id": 0,
          "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
TINY = [
    {"vocab_size": 41, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 4,
     "num_attention_heads": 3, "local_attention": 6},
    {"vocab_size": 37, "hidden_size": 20, "intermediate_size": 26, "num_hidden_layers": 3,
     "num_attention_heads": 5, "local_attention": 9, "hidden_activation": "silu",
     "norm_bias": True, "attention_bias": True, "mlp_bias": True, "decoder_bias": False,
     "classifier_bias": True, "classifier_activation": "relu", "classifier_pooling": "mean",
     "norm_eps": 1e-4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
     "rope_parameters": {
         "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0},
         "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}},
]
NAMES = {"none": "Model", "classify": "ForSequenceClassification",
         "tag": "ForTokenClassification", "mlm": "ForMaskedLM"}


def tiny(i, head, **extra):
  """Returns a random tiny transformers model, in evaluation mode."""
  torch.manual_seed(1)
  config = transformers.ModernBertConfig(**{**COMMON, **TINY[i], **extra})
  return harness.randomise(getattr(transformers, "ModernBert" + NAMES[head])(config))


def run(pretrained, inputs):
  return jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)


def close(got, want):
  assert harness.difference(got, want) <= harness.TOLERANCE


@pytest.mark.parametrize("i,head", [
    (1, "none"), (1, "classify"), (0, "mlm"), (1, "mlm"), (1, "tag"),
    *(pytest.param(0, head, marks=pytest.mark.slow) for head in ("none", "classify", "tag"))])
def test_equals_transformers(i, head, tmp_path):
  labels = {"num_labels": 4} if head in ("classify", "tag") else {}
  model = tiny(i, head, **labels)
  inputs = harness.tokens(model.config.vocab_size, left=i == 1 and head == "none")
  output = "last_hidden_state" if head == "none" else "logits"
  real = None if head == "classify" else {output: inputs["attention_mask"]}
  pretrained = harness.check("modernbert", f"{i}, {head}", model, inputs, {output: output},
                             tmp_path, real=real)
  assert not pretrained.report.ignored and pretrained.config.head == head
  if labels:
    out = run(pretrained, inputs)
    close(pretrained.module.apply(pretrained.variables, out["features"], method="head"),
          out["logits"])


def test_untied_decoder(tmp_path):
  model = tiny(0, "mlm", tie_word_embeddings=False)
  inputs = harness.tokens(41)
  harness.check("modernbert", "untied decoder", model, inputs, {"logits": "logits"}, tmp_path,
                real={"logits": inputs["attention_mask"]})


def test_config_of_transformers_4(tmp_path):
  """Files on the Hub count global layers and name two thetas; a null theta is the global one."""
  model = tiny(0, "mlm", global_attn_every_n_layers=2, global_rope_theta=5000.0,
               local_rope_theta=300.0)
  model.save_pretrained(tmp_path)
  stated = json.loads((tmp_path / "config.json").read_text())
  new = models.load(str(tmp_path)).config
  del stated["rope_parameters"], stated["layer_types"]
  stated |= {"global_attn_every_n_layers": 2, "global_rope_theta": 5000.0,
             "local_rope_theta": 300.0}
  (tmp_path / "config.json").write_text(json.dumps(stated))
  pretrained = models.load(str(tmp_path))
  assert (pretrained.config.global_rope, pretrained.config.local_rope) == (
      new.global_rope, new.local_rope)
  assert pretrained.config.layer_types == new.layer_types
  models.export(pretrained, tmp_path / "out")
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written == stated
  inputs = harness.tokens(41)
  seen = inputs["attention_mask"][..., None]
  with torch.no_grad():
    want = model(**harness.as_torch(inputs)).logits.numpy()
  close(run(pretrained, inputs)["logits"] * seen, want * seen)
  config = modernbert.Config.from_hf({**stated, "local_rope_theta": None})
  assert config.local_rope == config.global_rope


def test_scan_leaves_layers_as_they_are(tmp_path):
  model = tiny(0, "mlm")
  model.save_pretrained(tmp_path)
  inputs = harness.tokens(41)
  want = run(models.load(str(tmp_path)), inputs)
  scanned = models.load(str(tmp_path), compute=layers.Compute(scan=True, remat="full"))
  assert harness.difference(run(scanned, inputs)["logits"], want["logits"]) < 2e-6


def test_packed_rows_do_not_see_each_other(tmp_path):
  tiny(0, "none").save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  ids = np.random.default_rng(0).integers(3, 41, (1, 16)).astype(np.int32)
  packed = {"position_ids": np.concatenate([np.arange(7), np.arange(9)])[None],
            "segment_ids": np.array([[0] * 7 + [1] * 9])}
  first = run(pretrained, {"input_ids": ids, **packed})["last_hidden_state"]
  other = ids.copy()
  other[:, :7] = 9
  second = run(pretrained, {"input_ids": other, **packed})["last_hidden_state"]
  assert np.array_equal(first[:, 7:], second[:, 7:]) and (first[:, :7] != second[:, :7]).any()
  close(first[:, 7:], run(pretrained, {"input_ids": ids[:, 7:]})["last_hidden_state"])


def opened(head, folder):
  cls = getattr(transformers, "ModernBert" + NAMES[head])
  model, info = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
  for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[key], (key, info[key])
  return model.eval()


@pytest.mark.parametrize("source,head,pooling", [
    ("mlm", "classify", "mean"), ("none", "tag", "auto"), ("none", "mlm", "auto"),
    ("classify", "none", "auto")])
def test_transformers_opens_another_head(source, head, pooling, tmp_path):
  tiny(0, source).save_pretrained(tmp_path / "base")
  labels = {"num_labels": 3, "labels": ("a", "b", "c")} if head in ("classify", "tag") else {}
  pretrained = models.load(str(tmp_path / "base"), head=head, pooling=pooling, **labels)
  kept = "params/transform/dense/kernel" not in pretrained.report.initialised
  assert kept is (source == "mlm" or head == "none")
  models.export(pretrained, tmp_path / "out")
  model = opened(head, tmp_path / "out")
  inputs = harness.tokens(41)
  with torch.no_grad():
    want = model(**harness.as_torch(inputs))
  output = "last_hidden_state" if head == "none" else "logits"
  seen = inputs["attention_mask"][..., None] if head != "classify" else 1
  close(run(pretrained, inputs)[output] * seen, want[output].numpy() * seen)
  if pooling == "mean":
    assert model.config.classifier_pooling == "mean"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_encoder(pooling, tmp_path):
  tiny(0, "none").save_pretrained(tmp_path / "base")
  (tmp_path / "base" / "1_Pooling").mkdir()
  (tmp_path / "base" / "1_Pooling" / "config.json").write_text(json.dumps({
      "pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_cls_token": pooling == "cls"}))
  pretrained = models.load(str(tmp_path / "base"))
  assert pretrained.config.pooling == pooling
  inputs = harness.tokens(41)
  out = run(pretrained, inputs)
  hidden, mask = np.asarray(out["last_hidden_state"]), inputs["attention_mask"][..., None]
  close(out["features"], (hidden * mask).sum(1) / mask.sum(1) if pooling == "mean"
        else hidden[:, 0])
  models.export(pretrained, tmp_path / "out")
  assert models.load(str(tmp_path / "out")).config == pretrained.config
  labelled = models.load(str(tmp_path / "base"), num_labels=2)
  models.export(labelled, tmp_path / "labelled")
  assert not (tmp_path / "labelled" / "1_Pooling").exists()
  assert opened("classify", tmp_path / "labelled").config.classifier_pooling == pooling


def test_surgery(tmp_path):
  tiny(0, "mlm").save_pretrained(tmp_path / "base")
  pretrained = models.load(str(tmp_path / "base"), changes={"vocab_size": 44, "depth": 5})
  models.export(pretrained, tmp_path / "out")
  model = opened("mlm", tmp_path / "out")
  assert (model.config.vocab_size, model.config.num_hidden_layers) == (44, 5)
  assert model.config.layer_types[4] == model.config.layer_types[3]
  inputs = harness.tokens(44)
  seen = inputs["attention_mask"][..., None]
  with torch.no_grad():
    want = model(**harness.as_torch(inputs)).logits.numpy()
  close(run(pretrained, inputs)["logits"] * seen, want * seen)


def test_dropout_acts_with_an_rng_only(tmp_path):
  tiny(0, "classify").save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dropout=0.3)
  inputs = harness.tokens(41)
  apply = jax.jit(lambda v, **kw: pretrained.module.apply(v, **inputs, **kw)["logits"])
  assert (apply(pretrained.variables, rngs={"dropout": jax.random.key(1)})
          != apply(pretrained.variables)).any()


@pytest.mark.parametrize("hf,message", [
    ({"hidden_activation": "mish"}, "hidden_activation 'mish'"),
    ({"classifier_activation": "mish"}, "classifier_activation 'mish'"),
    ({"num_attention_heads": 5}, "not a multiple"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
    ({"layer_types": ["full_attention", "chunked"] * 2}, "not 'chunked'"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters should be given for"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"classifier_pooling": "max"}, "pools by 'max'"),
])
def test_config_that_is_not_served(hf, message, tmp_path):
  tiny(0, "none").save_pretrained(tmp_path)
  stated = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(stated | hf))
  with pytest.raises(errors.UserError, match=message):
    models.load(str(tmp_path))
