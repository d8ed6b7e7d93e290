"""wav2vec 2.0 and HuBERT against transformers, float32, on random tiny models."""

import functools

import jax
import numpy as np
import optax
import pytest
from parity import harness

from ft import errors, models
from ft.models import wav2vec2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GROUP = {"vocab_size": 19, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 37, "conv_dim": (10, 12, 9), "conv_stride": (3, 2, 2),
         "conv_kernel": (5, 3, 2), "num_conv_pos_embeddings": 18,
         "num_conv_pos_embedding_groups": 4, "initializer_range": 0.2, "classifier_proj_size": 7}
STABLE = {**GROUP, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True,
          "num_conv_pos_embeddings": 5, "num_conv_pos_embedding_groups": 3, "hidden_size": 30,
          "num_attention_heads": 3, "hidden_act": "gelu_new", "feat_extract_activation": "relu",
          "layer_norm_eps": 1e-3, "conv_dim": (8, 6), "conv_stride": (4, 3),
          "conv_kernel": (5, 4)}
BODY = {"last_hidden_state": "last_hidden_state"}


def build(cls, values, **extra):
  torch.manual_seed(0)
  config = cls.config_class(**{**values, **extra})
  return harness.randomise(cls(config))


def batch(masked=True, samples=290):
  rng = np.random.default_rng(2)
  values = rng.normal(size=(3, samples)).astype(np.float32)
  mask = np.ones(values.shape, np.int32)
  mask[1, 201:], mask[2, 97:] = 0, 0
  if not masked:
    return {"input_values": values}
  return {"input_values": np.where(mask, values, np.float32(0)), "attention_mask": mask}


def real_frames(values, inputs):
  """Returns (B, T), 1 for frames of real samples, counted one by one."""
  if "attention_mask" not in inputs:
    return None
  config = wav2vec2.Config(conv_kernel=values["conv_kernel"], conv_stride=values["conv_stride"])
  total = config.frames(inputs["input_values"].shape[1])
  return np.stack([np.arange(total) < config.frames(n) for n in inputs["attention_mask"].sum(1)])


@pytest.mark.parametrize("case, cls, values, masked", [
    ("ctc, group norm, masked", "Wav2Vec2ForCTC", GROUP, True),
    ("ctc, stable, layer norm, MMS adapter, unmasked", "Wav2Vec2ForCTC",
     {**STABLE, "adapter_attn_dim": 5}, False),
    ("hubert, ctc, no norm before projection", "HubertForCTC",
     {**STABLE, "feat_proj_layer_norm": False, "mask_time_prob": 0.0}, True),
])
def test_letters(case, cls, values, masked, tmp_path):
  inputs = batch(masked)
  real = real_frames(values, inputs)
  pretrained = harness.check("wav2vec2", case, build(getattr(transformers, cls), values), inputs,
                             {"logits": "logits"}, tmp_path, real={"logits": real})
  assert pretrained.config.head == "ctc" and pretrained.modality == "audio"
  if masked:
    outputs = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)
    assert np.array_equal(outputs["frame_mask"], real)
  else:
    harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.parametrize("case, cls, values, masked", [
    ("body, stable, layer norm, masked", "Wav2Vec2Model", STABLE, True),
    pytest.param("body, group norm, unmasked", "Wav2Vec2Model", GROUP, False,
                 marks=pytest.mark.slow),
    pytest.param("hubert, body, group norm", "HubertModel", GROUP, True, marks=pytest.mark.slow),
])
def test_body(case, cls, values, masked, tmp_path):
  inputs = batch(masked)
  harness.check("wav2vec2", case, build(getattr(transformers, cls), values), inputs, BODY,
                tmp_path, real={"last_hidden_state": real_frames(values, inputs)})


@pytest.mark.parametrize("case, cls, values, masked", [
    ("classify, masked mean", "Wav2Vec2ForSequenceClassification", GROUP, True),
    ("hubert, classify, weighted sum of layers", "HubertForSequenceClassification",
     {**STABLE, "use_weighted_layer_sum": True}, True),
    pytest.param("classify, weighted sum, unmasked", "Wav2Vec2ForSequenceClassification",
                 {**GROUP, "use_weighted_layer_sum": True}, False, marks=pytest.mark.slow),
])
def test_classifier(case, cls, values, masked, tmp_path):
  inputs = batch(masked)
  model = build(getattr(transformers, cls), values, num_labels=3)
  pretrained = harness.check("wav2vec2", case, model, inputs, {"logits": "logits"}, tmp_path)
  assert pretrained.config.num_labels == 3
  outputs = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)
  again = pretrained.module.apply(pretrained.variables, outputs["features"], method="head")
  assert harness.difference(again, outputs["logits"]) < 1e-6


def test_names_of_older_files_and_of_pretraining(tmp_path):
  """Weight normalisation had other names before torch 2.1; a body carries its quantizer along."""
  from safetensors.numpy import load_file, save_file
  model = build(transformers.Wav2Vec2ForPreTraining, GROUP, num_codevectors_per_group=4,
                codevector_dim=6, proj_codevector_dim=5)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  assert not pretrained.report.ignored
  models.export(pretrained, tmp_path / "same")
  harness.same_tensors(tmp_path, tmp_path / "same")
  old = {name.replace("parametrizations.weight.original0", "weight_g")
         .replace("parametrizations.weight.original1", "weight_v"): value
         for name, value in load_file(tmp_path / "model.safetensors").items()}
  save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
  again = models.load(str(tmp_path))
  models.export(again, tmp_path / "old")
  harness.same_tensors(tmp_path, tmp_path / "old")
  inputs = batch()
  got, want = (jax.jit(p.module.apply)(p.variables, **inputs)["last_hidden_state"]
               for p in (again, pretrained))
  assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert"])
def test_heads_on_a_body(kind, tmp_path):
  build(getattr(transformers, f"{kind}Model"), GROUP).save_pretrained(tmp_path / "upstream")
  inputs = batch()
  for name, asked in (("ForCTC", {"head": "ctc", "changes": {"vocab_size": 23}}),
                      ("ForSequenceClassification", {"labels": ("no", "yes", "stop")})):
    pretrained = models.load(str(tmp_path / "upstream"), **asked)
    assert pretrained.report.initialised
    models.export(pretrained, tmp_path / name)
    model, info = getattr(transformers, kind + name).from_pretrained(
        tmp_path / name, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want = model.eval()(**harness.as_torch(inputs)).logits.detach().numpy()
    got = np.asarray(jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["logits"])
    if name == "ForCTC":
      assert got.shape[-1] == 23
      seen = real_frames(GROUP, inputs)[..., None]
      got, want = got * seen, want * seen
    assert harness.difference(got, want) <= harness.TOLERANCE


def test_fewer_layers(tmp_path):
  build(transformers.Wav2Vec2ForCTC, GROUP).save_pretrained(tmp_path / "upstream")
  pretrained = models.load(str(tmp_path / "upstream"), changes={"depth": 1})
  models.export(pretrained, tmp_path / "out")
  model = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "out").eval()
  inputs = batch(masked=False)
  want = model(**harness.as_torch(inputs)).logits.detach()
  got = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["logits"]
  assert harness.difference(got, want) <= harness.TOLERANCE


def test_ctc_loss_is_that_of_torch():
  """optax's loss on `logits` and `frame_mask` is what transformers' model computes with labels."""
  rng = np.random.default_rng(4)
  logits = rng.normal(size=(3, 21, 8)).astype(np.float32) * 2
  frames, letters = np.array([21, 15, 9]), np.array([7, 4, 1])
  labels = rng.integers(1, 8, (3, 7), np.int32)
  labels[0, 2] = labels[0, 1]  # a letter twice needs a blank between
  logit_padding = (np.arange(21) >= frames[:, None]).astype(np.float32)
  label_padding = (np.arange(7) >= letters[:, None]).astype(np.float32)

  def loss(logits):
    return optax.ctc_loss(logits, logit_padding, labels, label_padding, blank_id=0).sum()

  got, gradient = jax.jit(jax.value_and_grad(loss))(logits)
  theirs = torch.tensor(logits, requires_grad=True)
  want = torch.nn.functional.ctc_loss(
      theirs.log_softmax(-1).transpose(0, 1), torch.tensor(labels, dtype=torch.long),
      torch.tensor(frames), torch.tensor(letters), blank=0, reduction="sum")
  want.backward()
  assert harness.difference(got, want.detach()) <= harness.TOLERANCE
  assert harness.difference(gradient, theirs.grad) <= harness.TOLERANCE


def test_dropout_acts_with_a_key_only(tmp_path):
  build(transformers.Wav2Vec2ForCTC, GROUP).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dropout=0.5)
  run = functools.partial(jax.jit(pretrained.module.apply), pretrained.variables, **batch())
  assert np.array_equal(run()["logits"], run()["logits"])
  first, second = (run(rngs={"dropout": jax.random.key(i)})["logits"] for i in (0, 1))
  assert not np.array_equal(first, second)


def test_padding_does_not_reach_real_frames():
  """With layer norm in the feature extractor; group norm's statistics see padding, upstream too."""
  config = wav2vec2.Config.from_hf({"model_type": "wav2vec2", **STABLE})
  model, inputs = wav2vec2.Model(config), batch()
  variables = jax.jit(model.init)(jax.random.key(0), **inputs)
  apply = jax.jit(model.apply)
  first = apply(variables, **inputs)
  noise = np.where(inputs["attention_mask"], inputs["input_values"], np.float32(9))
  second = apply(variables, noise, inputs["attention_mask"])
  seen = np.asarray(first["frame_mask"])[..., None]
  assert np.array_equal(first["last_hidden_state"] * seen, second["last_hidden_state"] * seen)
  assert np.array_equal(first["features"], second["features"])


@pytest.mark.parametrize("wrong", [
    {"feat_extract_norm": "batch"}, {"hidden_act": "sine"}, {"hidden_size": 25},
    {"add_adapter": True}, {"conv_dim": [8]}, {"feat_proj_layer_norm": False},
    {"model_type": "hubert", "conv_pos_batch_norm": True}, {"num_conv_pos_embedding_groups": 5}])
def test_what_is_not_computed_is_refused(wrong):
  with pytest.raises(errors.UserError):
    wav2vec2.Config.from_hf({"model_type": "wav2vec2", **GROUP, **wrong})


def test_a_sound_that_is_too_short_is_refused():
  config = wav2vec2.Config.from_hf({"model_type": "wav2vec2", **GROUP})
  model = wav2vec2.Model(config)
  assert config.frames(config.samples(4)) == 4 and config.frames(config.samples(4) - 1) == 3
  short = np.zeros((1, config.samples(1) - 1), np.float32)
  with pytest.raises(errors.UserError):
    jax.eval_shape(model.init, jax.random.key(0), short)
