"""PatchTST against transformers, float32: all heads, norms, poolings, and batch statistics."""

import json

import jax
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import patchtst
from ft.models import series as series_lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGS = {
    "batch norm, pre, sincos, flat head": {
        "num_input_channels": 3, "context_length": 29, "patch_length": 6, "patch_stride": 4,
        "num_hidden_layers": 2, "d_model": 20, "num_attention_heads": 4, "ffn_dim": 37,
        "pooling_type": None, "prediction_length": 7},
    "layer norm, post, random, token, channels": {
        "num_input_channels": 2, "context_length": 24, "patch_length": 5, "patch_stride": 5,
        "num_hidden_layers": 2, "d_model": 18, "num_attention_heads": 3, "ffn_dim": 21,
        "norm_type": "layernorm", "norm_eps": 1e-3, "pre_norm": False, "bias": False,
        "positional_encoding_type": "random", "use_cls_token": True, "channel_attention": True,
        "share_embedding": False, "activation_function": "relu", "scaling": "mean",
        "prediction_length": 5},
    "batch norm, post, max, unscaled, channels": {
        "num_input_channels": 2, "context_length": 20, "patch_length": 4, "patch_stride": 2,
        "num_hidden_layers": 1, "d_model": 14, "num_attention_heads": 1, "ffn_dim": 16,
        "pre_norm": False, "channel_attention": True, "scaling": None, "pooling_type": "max",
        "activation_function": "silu", "prediction_length": 3},
    "batch norm, pre, random, mean": {
        "num_input_channels": 1, "context_length": 16, "patch_length": 3, "patch_stride": 3,
        "num_hidden_layers": 1, "d_model": 16, "num_attention_heads": 2, "ffn_dim": 16,
        "positional_encoding_type": "random", "scaling": True},
}
FLAT, TOKEN, POOLED, PLAIN = CONFIGS
HEADS = {
    "none": (transformers.PatchTSTModel, {}, {"last_hidden_state": "last_hidden_state"}),
    "forecast": (transformers.PatchTSTForPrediction, {},
                 {"prediction_outputs": "prediction_outputs"}),
    "classify": (transformers.PatchTSTForClassification, {"num_targets": 4},
                 {"logits": "prediction_logits"}),
    "regress": (transformers.PatchTSTForRegression, {"num_targets": 3},
                {"regression_outputs": "regression_outputs"}),
}


def build(case, head="forecast", cls=None, **changes):
  """Returns a random model of a case, its batch statistics moved, too."""
  torch.manual_seed(0)
  own, extra, _ = HEADS[head]
  config = transformers.PatchTSTConfig(**{**CONFIGS[case], "init_std": 0.3, **extra, **changes},
                                       attn_implementation="eager")
  model = harness.randomise((cls or own)(config))
  for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm1d):
      module.running_mean.normal_(0, 0.3)
      module.running_var.uniform_(0.5, 2)
  return model


def series(config, rows=3, missing=True):
  rng = np.random.default_rng(0)
  shape = (rows, config.context_length, config.num_input_channels)
  values = 3 + np.cumsum(rng.normal(size=shape), 1).astype(np.float32)
  if not missing:
    return {"past_values": values}
  observed = (rng.random(shape) < 0.8).astype(np.float32)
  observed[0, :, 0] = 0  # nothing of this channel was observed
  return {"past_values": values * observed, "past_observed_mask": observed}


def run(pretrained, inputs, **kw):
  return jax.jit(lambda v: pretrained.module.apply(v, **inputs, **kw))(pretrained.variables)


@pytest.mark.parametrize("case", CONFIGS)
def test_forecast(case, tmp_path):
  model = build(case)
  inputs = series(model.config, missing=case != TOKEN)
  outputs = {**HEADS["forecast"][2], "loc": "loc", "scale": "scale"}
  pretrained = harness.check("patchtst", f"forecast: {case}", model, inputs, outputs, tmp_path)
  if case in (FLAT, TOKEN):
    harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.parametrize(("case", "head"), [
    (PLAIN, "none"), (PLAIN, "classify"), (POOLED, "regress"),
    pytest.param(TOKEN, "classify", marks=pytest.mark.slow)])
def test_other_heads(case, head, tmp_path):
  changes = {"output_range": [-1.0, 3.0]} if head == "regress" else {}
  model = build(case, head, **changes)
  harness.check("patchtst", f"{head}: {case}", model, series(model.config), HEADS[head][2],
                tmp_path)


class OwnProjections(transformers.PatchTSTForPrediction):
  """What transformers means by share_projection=False; its own loop fails after one channel."""

  def __init__(self, config):
    super().__init__(config)
    self.head.forward = self.project

  def project(self, x):
    x = x.mean(2) if self.config.pooling_type else x.flatten(2)
    parts = [project(x[:, i]) for i, project in enumerate(self.head.projections)]
    return torch.stack(parts, 2)


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_projections_of_each_channel(pooling, tmp_path):
  model = build(FLAT, cls=OwnProjections, share_projection=False, pooling_type=pooling)
  inputs = series(model.config)
  source = tmp_path / "saved"
  model.save_pretrained(source)
  stated = json.loads((source / "config.json").read_text())
  stated["architectures"] = ["PatchTSTForPrediction"]
  (source / "config.json").write_text(json.dumps(stated))
  pretrained = models.load(str(source))
  assert not pretrained.report.initialised
  got = run(pretrained, inputs)["prediction_outputs"]
  want = model(**harness.as_torch(inputs)).prediction_outputs.detach()
  assert harness.difference(got, want) <= harness.TOLERANCE
  models.export(pretrained, tmp_path / "out")
  harness.same_tensors(source, tmp_path / "out")


def test_batch_statistics_while_training(tmp_path):
  model = build(FLAT)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = series(model.config)
  got, moved = run(pretrained, inputs, mutable=["batch_stats"])
  want = model.train()(**harness.as_torch(inputs))
  difference = harness.difference(got["prediction_outputs"], want.prediction_outputs.detach())
  assert difference <= harness.TOLERANCE
  for i, layer in enumerate(model.model.encoder.layers):
    own = moved["batch_stats"]["encoder"][f"layer_{i}"]["mlp_norm"]
    norm = layer.norm_sublayer3.batchnorm
    assert harness.difference(own["mean"], norm.running_mean) <= harness.TOLERANCE
    assert harness.difference(own["var"], norm.running_var) <= harness.TOLERANCE


def test_one_checkpoint_for_other_heads(tmp_path):
  model = build(PLAIN)
  model.save_pretrained(tmp_path / "forecast")
  body = models.load(str(tmp_path / "forecast"), head="none")
  assert body.report.ignored == ["head.projection.bias", "head.projection.weight"]
  labelled = models.load(str(tmp_path / "forecast"), labels=("calm", "rush", "storm"))
  assert sorted(labelled.report.initialised) == ["params/classifier/bias",
                                                 "params/classifier/kernel"]
  models.export(labelled, tmp_path / "labelled")
  again = transformers.PatchTSTForClassification.from_pretrained(tmp_path / "labelled").eval()
  assert again.config.num_targets == 3 and again.config.id2label[1] == "rush"
  inputs = series(model.config)
  got = run(labelled, inputs)["logits"]
  want = again(**harness.as_torch(inputs)).prediction_logits.detach()
  assert harness.difference(got, want) <= harness.TOLERANCE
  reloaded = models.load(str(tmp_path / "labelled"))
  assert reloaded.config.labels == ("calm", "rush", "storm")
  assert not reloaded.report.initialised


def test_a_pretrained_body_under_a_new_head(tmp_path):
  torch.manual_seed(0)
  config = transformers.PatchTSTConfig(**CONFIGS[PLAIN])
  transformers.PatchTSTForPretraining(config).save_pretrained(tmp_path)
  forecast = models.load(str(tmp_path), head="forecast")
  assert sorted(forecast.report.ignored) == ["head.linear.bias", "head.linear.weight"]
  assert all(path.startswith("params/projection/") for path in forecast.report.initialised)
  # As many classes as steps of a patch: the head that rebuilds patches is no classifier.
  labelled = models.load(str(tmp_path), num_labels=config.patch_length)
  assert "params/classifier/kernel" in labelled.report.initialised


def test_depth(tmp_path):
  model = build(FLAT)
  model.save_pretrained(tmp_path)
  grown = models.load(str(tmp_path), changes={"depth": 3})
  encoder = grown.variables["params"]["encoder"]
  same = jax.tree.map(np.array_equal, encoder["layer_1"], encoder["layer_2"])
  assert jax.tree.all(same)
  assert grown.config.num_hidden_layers == 3
  cut = models.load(str(tmp_path), changes={"depth": 1})
  inputs = series(model.config)
  model.model.encoder.layers = model.model.encoder.layers[:1]
  want = model(**harness.as_torch(inputs)).prediction_outputs.detach()
  got = run(cut, inputs)["prediction_outputs"]
  assert harness.difference(got, want) <= harness.TOLERANCE


def test_sincos_positions_start_as_upstream_s_and_are_not_trained(tmp_path):
  model = build(FLAT)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  want = model.model.encoder.positional_encoder.position_enc
  want = model.model.encoder.positional_encoder._init_pe(model.config, want.shape[0])
  assert harness.difference(series_lib.sincos(None, tuple(want.shape)), want) <= 1e-6
  inputs = patchtst.probe_inputs(pretrained.config)

  def loss(params):
    out = pretrained.module.apply({**pretrained.variables, "params": params}, **inputs)
    return (out["prediction_outputs"]**2).sum()

  gradient = jax.jit(jax.grad(loss))(pretrained.variables["params"])["encoder"]["positions"]
  assert not np.any(gradient)


def test_dropout_acts_only_with_a_key(tmp_path):
  build(PLAIN).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dropout=0.3)
  assert pretrained.config.path_dropout == pretrained.config.head_dropout == 0.3
  inputs = patchtst.probe_inputs(pretrained.config)
  outputs = [run(pretrained, inputs, rngs=rngs) for rngs in (
      {}, {}, {"dropout": jax.random.key(1)}, {"dropout": jax.random.key(2)})]
  a, b, c, d = (np.asarray(out["prediction_outputs"]) for out in outputs)
  assert np.array_equal(a, b)
  assert not np.allclose(a, c) and not np.allclose(c, d)


@pytest.mark.parametrize("wrong", [
    {"loss": "nll"}, {"loss": None}, {"norm_type": "groupnorm"}, {"pooling_type": "min"},
    {"positional_encoding_type": "rotary"}, {"scaling": "robust"}, {"activation_function": "x"},
    {"d_model": 15}, {"context_length": 6}, {"minimum_scale": 0.1}])
def test_wrong_config_values(wrong):
  with pytest.raises(errors.UserError, match=next(iter(wrong))):
    patchtst.Config.from_hf({"model_type": "patchtst", **CONFIGS[FLAT], **wrong})


def test_wrong_inputs(tmp_path):
  build(TOKEN).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  with pytest.raises(errors.UserError, match="25 steps; the model reads 24"):
    pretrained.module.apply(pretrained.variables, np.zeros((1, 25, 2), np.float32))
  with pytest.raises(errors.UserError, match="3 channels"):
    pretrained.module.apply(pretrained.variables, np.zeros((1, 24, 3), np.float32))
