"""TinyTimeMixer against granite-tsfm, float32, on random and on real weights; ETTh1 zero-shot."""

import importlib
import json
import sys
import types

import jax
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import ttm
from ft.weights import names, resolve

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
_SMALL = {"context_length": 24, "patch_length": 4, "patch_stride": 4, "prediction_length": 7,
          "num_layers": 1, "decoder_num_layers": 1}
CONFIGS = {
    "3 levels, gates, decoder": {
        **_SMALL, "num_input_channels": 3, "d_model": 24, "adaptive_patching_levels": 3,
        "decoder_num_layers": 2, "decoder_d_model": 12},
    "mixed channels, frequency, raw residual, attention": {
        **_SMALL, "num_input_channels": 3, "d_model": 12, "mode": "mix_channel", "self_attn": True,
        "self_attn_heads": 3, "resolution_prefix_tuning": True, "frequency_token_vocab_size": 4,
        "decoder_mode": "mix_channel", "decoder_d_model": 12, "decoder_raw_residual": True,
        "decoder_adaptive_patching_levels": 2, "use_positional_encoding": True,
        "positional_encoding_type": "random", "scaling": "mean", "prediction_filter_length": 5,
        "prediction_channel_indices": [2, 0], "expansion_factor": 3, "norm_eps": 1e-3},
    "batch norm, no gate, no decoder, unscaled": {
        **_SMALL, "num_layers": 2, "num_input_channels": 2, "d_model": 10, "norm_mlp": "BatchNorm",
        "gated_attn": False, "use_decoder": False, "use_positional_encoding": True,
        "scaling": None, "loss": "mae", "exogenous_channel_indices": [0]},
}
LEVELS, MIXED, BATCH = CONFIGS
OUTPUTS = {"prediction_outputs": "prediction_outputs", "loc": "loc", "scale": "scale",
           "last_hidden_state": "backbone_hidden_state",
           "decoder_hidden_state": "decoder_hidden_state"}


@pytest.fixture(scope="module")
def tsfm():
  """granite-tsfm's modeling file alone; the package's own start imports pandas and datasets."""
  # Installing it would replace torch by an older one: its wheel is only unpacked.
  try:
    wheel = resolve.resolve("pypi:granite-tsfm==0.3.11")
  except errors.UserError as e:
    pytest.skip(f"needs granite-tsfm from a package index: {e}")
  folder = wheel / "tsfm_public" / "models" / "tinytimemixer"
  package = types.ModuleType("granite_tinytimemixer")
  package.__path__ = [str(folder)]
  sys.modules[package.__name__] = package
  return importlib.import_module(f"{package.__name__}.modeling_tinytimemixer")


def build(tsfm, case, cls="TinyTimeMixerForPrediction"):
  """Returns a random model of a case, its batch statistics moved, too."""
  torch.manual_seed(0)
  config = tsfm.TinyTimeMixerConfig(**CONFIGS[case])
  cls = getattr(tsfm, cls)
  if not hasattr(cls(config), "all_tied_weights_keys"):
    # The body alone is made without transformers' last step, and could not be opened again.
    def start(self, config, first=cls.__init__):
      first(self, config)
      self.post_init()
    cls = type(cls.__name__, (cls,), {"__init__": start, "__module__": cls.__module__})
  model = harness.randomise(cls(config))
  for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm1d):
      module.running_mean.normal_(0, 0.3)
      module.running_var.uniform_(0.5, 2)
  return model


def series(config, rows=3, length=None, missing=True):
  rng = np.random.default_rng(0)
  shape = (rows, length or config.context_length, config.num_input_channels)
  values = 3 + np.cumsum(rng.normal(size=shape), 1).astype(np.float32)
  inputs = {"past_values": values}
  if missing:
    observed = (rng.random(shape) < 0.8).astype(np.float32)
    observed[0, :, 0] = 0  # nothing of this channel was observed
    inputs = {"past_values": values * observed, "past_observed_mask": observed}
  if config.resolution_prefix_tuning:
    inputs["freq_token"] = np.arange(rows, dtype=np.int32) % 4
  return inputs


def run(pretrained, inputs, **kw):
  return jax.jit(lambda v: pretrained.module.apply(v, **inputs, **kw))(pretrained.variables)


@pytest.mark.parametrize("case", CONFIGS)
def test_forecast(case, tsfm, tmp_path):
  model = build(tsfm, case)
  inputs = series(model.config)
  pretrained = harness.check("ttm", case, model, inputs, OUTPUTS, tmp_path)
  if case == LEVELS:
    harness.check_scan(pretrained, inputs, tmp_path)


def test_body(tsfm, tmp_path):
  model = build(tsfm, MIXED, "TinyTimeMixerModel")
  outputs = {"last_hidden_state": "last_hidden_state", "loc": "loc"}
  pretrained = harness.check("ttm", "body alone", model, series(model.config), outputs, tmp_path)
  assert pretrained.config.head == "none"
  out = run(pretrained, series(model.config))
  want = np.asarray(out["last_hidden_state"]).mean((1, 2))
  assert harness.difference(out["features"], want) <= 1e-6


def test_contexts_of_other_lengths(tsfm, tmp_path):
  model = build(tsfm, LEVELS)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  for length, missing in ((17, True), (17, False), (31, True)):
    inputs = series(model.config, length=length, missing=missing)
    want = model(**harness.as_torch(inputs)).prediction_outputs.detach()
    got = run(pretrained, inputs)["prediction_outputs"]
    assert harness.difference(got, want) <= harness.TOLERANCE


@pytest.mark.slow
def test_another_horizon_makes_a_new_head_and_a_body_gets_one(tsfm, tmp_path):
  build(tsfm, LEVELS).save_pretrained(tmp_path)
  body = models.load(str(tmp_path), head="none")
  assert all(name.startswith(("decoder.", "head.")) for name in body.report.ignored)
  models.export(body, tmp_path / "body")
  again = models.load(str(tmp_path / "body"), head="forecast")
  made = [path for path in names.flatten(again.variables) if not path.startswith("params/encoder/")]
  assert sorted(again.report.initialised) == sorted(made)
  stated = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**stated, "prediction_length": 9}))
  longer = models.load(str(tmp_path))
  assert sorted(longer.report.initialised) == ["params/forecast/bias", "params/forecast/kernel"]
  out = run(longer, series(longer.config))
  assert out["prediction_outputs"].shape == (3, 9, 3)


def test_batch_statistics_while_training(tsfm, tmp_path):
  model = build(tsfm, BATCH)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dropout=0.0)
  for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0
  inputs = series(model.config)
  got, moved = run(pretrained, inputs, mutable=["batch_stats"])
  want = model.train()(**harness.as_torch(inputs)).prediction_outputs.detach()
  assert harness.difference(got["prediction_outputs"], want) <= harness.TOLERANCE
  norm = model.backbone.encoder.mlp_mixer_encoder.mixers[1].feature_mixer.norm.norm.batchnorm
  own = moved["batch_stats"]["encoder"]["layer_1"]["features"]["norm"]
  assert harness.difference(own["mean"], norm.running_mean) <= harness.TOLERANCE
  assert harness.difference(own["var"], norm.running_var) <= harness.TOLERANCE


def test_dropout_acts_only_with_a_key(tsfm, tmp_path):
  build(tsfm, BATCH).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dropout=0.3)
  inputs = ttm.probe_inputs(pretrained.config)
  a, b, c, d = (np.asarray(run(pretrained, inputs, rngs=rngs)["prediction_outputs"]) for rngs in (
      {}, {}, {"dropout": jax.random.key(1)}, {"dropout": jax.random.key(2)}))
  assert np.array_equal(a, b)
  assert not np.allclose(a, c) and not np.allclose(c, d)


@pytest.mark.parametrize("wrong", [
    {"loss": "nll"}, {"norm_mlp": "RMSNorm"}, {"mode": "mix"}, {"decoder_mode": "mix"},
    {"scaling": "robust"}, {"positional_encoding_type": "rotary"}, {"patch_stride": 2},
    {"num_patches": 5}, {"context_length": 4}, {"prediction_filter_length": 8},
    {"prediction_channel_indices": [3]}, {"adaptive_patching_levels": 2, "d_model": 15},
    {"self_attn_heads": 5, "self_attn": True}, *({k: 7} for k in ttm._REFUSED)])
def test_wrong_config_values(wrong):
  with pytest.raises(errors.UserError, match=next(iter(wrong))):
    ttm.Config.from_hf({"model_type": "tinytimemixer", **CONFIGS[LEVELS], **wrong})


def test_wrong_inputs(tsfm, tmp_path):
  build(tsfm, MIXED).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  with pytest.raises(errors.UserError, match="2 channels"):
    pretrained.module.apply(pretrained.variables, np.zeros((1, 24, 2), np.float32))
  with pytest.raises(errors.UserError, match="freq_token"):
    pretrained.module.apply(pretrained.variables, np.zeros((1, 24, 3), np.float32))


def test_real_weights(tsfm, shared, tmp_path):
  source = shared / "weights" / "ttm-1024-96"
  model = tsfm.TinyTimeMixerForPrediction.from_pretrained(source).eval()
  inputs = {"past_values": ett(shared)[:2048].reshape(2, 1024, 7)[..., :2]}
  case = "real weights in the shape of r1, 1024 -> 96"
  pretrained = harness.check("ttm", case, model, inputs, OUTPUTS, tmp_path)
  direct = models.load(str(source))
  assert not direct.report.ignored and direct.config == pretrained.config
  models.export(direct, tmp_path / "direct")
  harness.same_tensors(source, tmp_path / "direct")


def ett(shared):
  """Returns ETTh1 (steps, 7), standardised by its first twelve months of 30 days."""
  table = np.genfromtxt(shared / "data" / "forecast-ett" / "ETTh1.csv", delimiter=",",
                        skip_header=1, usecols=range(1, 8), dtype=np.float64)
  train = table[:12 * 30 * 24]
  return ((table - train.mean(0)) / train.std(0)).astype(np.float32)


@pytest.mark.slow
def test_zero_shot_on_etth1(tsfm, shared):
  """Mean squared error over the test split: as granite-tsfm's own code finds it for these weights.

  That is 0.7146. For TTM r1 with a context of 1024 steps 0.362 is published: the weights at hand
  are not those, or not all of them are. Either implementation fails on sine waves with them, too.
  """
  source = shared / "weights" / "ttm-1024-96"
  pretrained = models.load(str(source))
  model = tsfm.TinyTimeMixerForPrediction.from_pretrained(source).eval()
  predict = jax.jit(lambda x: pretrained.module.apply(pretrained.variables, past_values=x))
  table, first, last = ett(shared), 16 * 30 * 24, 20 * 30 * 24
  starts, total = np.arange(first, last - 96 + 1), np.zeros(2)
  for chunk in np.array_split(starts, -(-len(starts) // 64)):
    real = len(chunk)
    chunk = np.pad(chunk, (0, 64 - real), mode="edge")[:, None]
    context, future = table[chunk + np.arange(-1024, 0)], table[chunk + np.arange(96)]
    with torch.no_grad():
      theirs = model(past_values=torch.tensor(context)).prediction_outputs.numpy()
    ours = np.asarray(predict(context)["prediction_outputs"])
    total += [float(np.square(y - future)[:real].sum()) for y in (ours, theirs)]
  ours, theirs = total / (len(starts) * 96 * 7)
  assert len(starts) == 2785 and abs(ours - theirs) <= 1e-5 * theirs
  assert round(ours, 4) == 0.7146
