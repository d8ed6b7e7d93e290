"""Chronos-Bolt against the published formulas on transformers' T5Stack, float32.

transformers lacks the model, so its forward pass stands here in torch, after the description of the
chronos-forecasting package; where that package is installed, the two are compared as well.
"""

import copy
import json

import jax
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import chronos_bolt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
t5 = pytest.importorskip("transformers.models.t5.modeling_t5")

CONFIGS = {
    "relu, extra token": {
        "d_model": 24, "d_kv": 5, "d_ff": 33, "num_layers": 2, "num_heads": 3,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
        "chronos_config": {
            "context_length": 40, "prediction_length": 7, "input_patch_size": 4,
            "input_patch_stride": 4, "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True}},
    "gated, overlapping patches": {
        "d_model": 20, "d_kv": 4, "d_ff": 18, "num_layers": 2, "num_decoder_layers": 1,
        "num_heads": 5, "feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-5,
        "chronos_config": {
            "context_length": 64, "prediction_length": 5, "input_patch_size": 6,
            "input_patch_stride": 2, "quantiles": [0.05, 0.25, 0.5, 0.75], "use_reg_token": False}},
}


class Block(torch.nn.Module):
  def __init__(self, config, inputs, outputs):
    super().__init__()
    self.hidden_layer = torch.nn.Linear(inputs, config.d_ff)
    self.output_layer = torch.nn.Linear(config.d_ff, outputs)
    self.residual_layer = torch.nn.Linear(inputs, outputs)
    self.act = t5.ACT2FN[config.dense_act_fn]

  def forward(self, x):
    return self.output_layer(self.act(self.hidden_layer(x))) + self.residual_layer(x)


class ChronosBoltModelForForecasting(t5.T5PreTrainedModel):
  _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight",
                        "decoder.embed_tokens.weight": "shared.weight"}

  def __init__(self, config):
    super().__init__(config)
    c = self.chronos = config.chronos_config
    config.vocab_size = 2 if c["use_reg_token"] else 1
    self.shared = torch.nn.Embedding(config.vocab_size, config.d_model)
    self.input_patch_embedding = Block(config, 2 * c["input_patch_size"], config.d_model)
    self.output_patch_embedding = Block(config, config.d_model,
                                        len(c["quantiles"]) * c["prediction_length"])
    encoder, decoder = copy.deepcopy(config), copy.deepcopy(config)
    encoder.is_decoder, encoder.use_cache = False, False
    decoder.is_decoder, decoder.num_layers = True, config.num_decoder_layers
    self.encoder, self.decoder = t5.T5Stack(encoder), t5.T5Stack(decoder)
    self.post_init()

  def forward(self, context, mask=None):
    c, rows = self.chronos, len(context)
    mask = (~context.isnan() if mask is None else mask).float()
    context, mask = context[:, -c["context_length"]:], mask[:, -c["context_length"]:]
    loc = context.nanmean(-1, keepdim=True).nan_to_num(0.0)
    scale = (context - loc).square().nanmean(-1, keepdim=True).sqrt().nan_to_num(1.0)
    scale = torch.where(scale == 0, 1e-5, scale)
    size, stride = c["input_patch_size"], c["input_patch_stride"]
    extra = -context.shape[1] % size
    values = torch.nn.functional.pad((context - loc) / scale, (extra, 0), value=torch.nan)
    seen = torch.nn.functional.pad(mask, (extra, 0)).unfold(-1, size, stride)
    values = torch.where(seen > 0, values.unfold(-1, size, stride), 0.0)
    x = self.input_patch_embedding(torch.cat([values, seen], -1))
    real = seen.sum(-1) > 0
    if c["use_reg_token"]:
      x = torch.cat([x, self.shared(torch.full((rows, 1), 1))], 1)
      real = torch.cat([real, torch.ones((rows, 1), dtype=bool)], 1)
    hidden = self.encoder(attention_mask=real, inputs_embeds=x).last_hidden_state
    state = self.decoder(input_ids=torch.zeros((rows, 1), dtype=torch.long),
                         encoder_hidden_states=hidden, encoder_attention_mask=real,
                         use_cache=False).last_hidden_state[:, 0]
    quantiles = self.output_patch_embedding(state).view(rows, len(c["quantiles"]), -1)
    return t5.BaseModelOutput({"quantile_preds": quantiles * scale[..., None] + loc[..., None],
                               "features": state, "last_hidden_state": hidden})


def build(case, cls=ChronosBoltModelForForecasting):
  torch.manual_seed(0)
  config = transformers.T5Config(**CONFIGS[case], decoder_start_token_id=0, pad_token_id=0)
  config._attn_implementation = "eager"
  return harness.randomise(cls(config))


def batch(length, seed=0):
  """Returns series with gaps, one that starts late, one that is constant."""
  rng = np.random.default_rng(seed)
  context = rng.normal(5.0, 3.0, (4, length)).astype(np.float32).cumsum(1)
  context[1, :length // 2 + 1] = np.nan
  context[2, rng.integers(0, length, 5)] = np.nan
  context[3] = 2.5
  return {"context": context}


OUTPUTS = {"quantile_preds": "quantile_preds", "features": "features"}


@pytest.mark.parametrize("case", CONFIGS)
def test_equals_the_published_formulas(case, tmp_path):
  # The first is longer than the context and no multiple of a patch, the second shorter.
  inputs = batch(43 if "relu" in case else 32)
  pretrained = harness.check("chronos_bolt", case, build(case), inputs, OUTPUTS, tmp_path)
  assert pretrained.family == "chronos_bolt" and pretrained.config.head == "forecast"
  harness.check_scan(pretrained, inputs, tmp_path)


def test_mask_leaves_values_out(tmp_path):
  model = build("relu, extra token")
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = batch(23)
  inputs["mask"] = (np.random.default_rng(1).random((4, 23)) > 0.3) & ~np.isnan(inputs["context"])
  inputs["mask"][2, :4] = False
  with torch.no_grad():
    want = model(**{key: torch.tensor(value) for key, value in inputs.items()})["quantile_preds"]
  got = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["quantile_preds"]
  assert harness.difference(got, want) < 1e-4


def test_a_series_without_values_is_finite(tmp_path):
  build("relu, extra token").save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  context = np.full((2, 12), np.nan, np.float32)
  got = jax.jit(pretrained.module.apply)(pretrained.variables, context)
  assert np.isfinite(got["quantile_preds"]).all() and (np.asarray(got["scale"]) == 1).all()


def test_equals_the_package(tmp_path):
  package = pytest.importorskip("chronos.chronos_bolt")
  for case in CONFIGS:
    model = build(case, package.ChronosBoltModelForForecasting)
    harness.check("chronos_bolt", f"{case} (package)", model, batch(37),
                  {"quantile_preds": "quantile_preds"}, tmp_path / case[:4])


def test_chronos_config_is_kept_and_written(tmp_path):
  build("relu, extra token").save_pretrained(tmp_path / "source")
  file = tmp_path / "source" / "config.json"
  stated = json.loads(file.read_text())
  del stated["chronos_config"]["use_reg_token"]
  stated["chronos_config"]["input_patch_stride"] = 2
  config = chronos_bolt.Config.from_hf(stated)
  assert config.to_hf() == stated and not config.use_reg_token
  made = chronos_bolt.Config(d_model=32, prediction_length=3, quantiles=(0.2, 0.8))
  hf = made.to_hf()
  assert hf["chronos_config"]["quantiles"] == [0.2, 0.8]
  again = chronos_bolt.Config.from_hf(hf)
  assert (again.prediction_length, again.d_model, again.head) == (3, 32, "forecast")


def test_dropout_and_depth(tmp_path):
  build("gated, overlapping patches").save_pretrained(tmp_path / "source")
  pretrained = models.load(str(tmp_path / "source"), dropout=0.5, changes={"depth": 1})
  run = jax.jit(lambda **kw: pretrained.module.apply(pretrained.variables, **batch(24), **kw))
  first, second = (run(rngs={"dropout": jax.random.key(i)})["features"] for i in (0, 1))
  assert harness.difference(first, second) > 0.01
  models.export(pretrained, tmp_path / "out")
  assert models.load(str(tmp_path / "out")).config.num_layers == 1


@pytest.mark.parametrize("wrong,words", [
    ({"quantiles": [0.5, 1.5]}, "quantiles"), ({"quantiles": []}, "quantiles"),
    ({"input_patch_stride": 0}, "input_patch_stride"),
    ({"prediction_length": "many"}, "prediction_length"), (None, "chronos_config")])
def test_wrong_configs_are_errors(wrong, words):
  stated = CONFIGS["relu, extra token"]
  chronos = wrong and {**stated["chronos_config"], **wrong}
  with pytest.raises(errors.UserError, match=words):
    chronos_bolt.Config.from_hf({"model_type": "t5", **stated, "chronos_config": chronos})


def test_there_is_no_label_head(tmp_path):
  build("relu, extra token").save_pretrained(tmp_path)
  with pytest.raises(errors.UserError, match="no label head"):
    models.load(str(tmp_path), num_labels=2)
