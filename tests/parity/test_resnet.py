"""ResNet and BiT against transformers, float32: outputs, gradients, statistics, exports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import layers, resnet
from ft.weights import names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# The smallest models that reach every branch: half of a test's time is compilation.
RESNET = {
    "basic, gelu": dict(
        layer_type="basic", hidden_sizes=[8, 12], depths=[2, 1], embedding_size=6,
        hidden_act="gelu"),
    "bottleneck, silu": dict(
        hidden_sizes=[8, 16, 24], depths=[1, 2, 1], embedding_size=8, hidden_act="silu"),
    "bottleneck, first stage and 1x1 downsample, 1 channel": dict(
        hidden_sizes=[16, 16], depths=[2, 1], embedding_size=16, downsample_in_first_stage=True,
        downsample_in_bottleneck=True, hidden_act="tanh", num_channels=1),
}
BIT = {
    "preactivation, explicit padding": dict(
        hidden_sizes=[16, 32], depths=[2, 1], embedding_size=8, num_groups=4, hidden_act="gelu"),
    "preactivation, SAME, dynamic pooling": dict(
        hidden_sizes=[32, 32, 64], depths=[1, 1, 2], embedding_size=16, num_groups=8,
        global_padding="same", embedding_dynamic_padding=True, hidden_act="silu"),
    "bottleneck, SAME, output stride 8, 1 channel": dict(
        layer_type="bottleneck", hidden_sizes=[16, 32, 32], depths=[1, 2, 2], embedding_size=8,
        num_groups=2, global_padding="SAME", output_stride=8, hidden_act="silu", num_channels=1),
    "bottleneck, explicit padding": dict(
        layer_type="bottleneck", hidden_sizes=[32, 64], depths=[1, 2], embedding_size=8,
        num_groups=8, hidden_act="gelu"),
}


def upstream(settings, kind="ResNet", head="ForImageClassification"):
  """Returns a random transformers model in evaluation mode, its statistics neither 0 nor 1."""
  config = getattr(transformers, kind + "Config")(num_labels=5, **settings)
  torch.manual_seed(0)
  model = harness.randomise(getattr(transformers, kind + head)(config))
  for name, buffer in model.named_buffers():
    if "running" in name:
      buffer.uniform_(0.5, 1.5)
  return model


def images(model, height=53, width=46, rows=2):
  shape = (rows, height, width, model.config.num_channels)
  return {"pixel_values": np.random.default_rng(3).normal(size=shape).astype(np.float32)}


def with_maps(pretrained, variables, inputs):
  """Returns the model's outputs with its maps one by one, in torch's layout."""
  out = pretrained.module.apply(variables, **inputs)
  maps = {f"map_{i}": y.transpose(0, 3, 1, 2) for i, y in enumerate(out["feature_maps"])}
  return {**out, **maps}


def check(settings, case, folder, kind="ResNet", head="ForImageClassification", outputs=None):
  model = upstream(settings, kind, head)
  inputs = images(model)
  maps = {f"map_{i}": lambda out, _, i=i: out.hidden_states[i + 1]
          for i in range(len(model.config.depths))}
  return harness.check(
      "resnet", case, model, inputs, {**(outputs or {"logits": "logits"}), **maps}, folder,
      call=with_maps,
      torch_inputs={**harness.as_torch(inputs), "output_hidden_states": True})


@pytest.mark.parametrize("case", RESNET)
def test_resnet_equals_transformers(case, tmp_path):
  pretrained = check(RESNET[case], case, tmp_path)
  assert pretrained.config.num_labels == 5 and not pretrained.report.ignored


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.slow if "8" in case else ()) for case in BIT])
def test_bit_equals_transformers(case, tmp_path):
  check(BIT[case], f"BiT: {case}", tmp_path, "Bit")


@pytest.mark.parametrize("kind,settings", [
    ("ResNet", list(RESNET.values())[0]), ("Bit", list(BIT.values())[0])])
def test_body_equals_transformers(kind, settings, tmp_path):
  pretrained = check(settings, f"{kind}, body", tmp_path, kind, "Model",
                     {"features": lambda out, _: out.pooler_output[..., 0, 0]})
  assert pretrained.config.head == "none"


@pytest.mark.parametrize("kind,settings", [
    ("ResNet", list(RESNET.values())[0]), ("Bit", list(BIT.values())[0])])
def test_a_backbone_is_read_and_written(kind, settings, tmp_path):
  upstream(settings, kind, "Backbone").save_pretrained(tmp_path / "upstream")
  pretrained = models.load(str(tmp_path / "upstream"))
  assert pretrained.config.head == "none" and not pretrained.report.initialised
  models.export(pretrained, tmp_path / "out")
  harness.same_tensors(tmp_path / "upstream", tmp_path / "out")


def load(settings, folder, kind="ResNet", **kwargs):
  model = upstream(settings, kind)
  model.save_pretrained(folder)
  return model, models.load(str(folder), **kwargs)


def test_batch_statistics_move_only_where_mutable(tmp_path):
  model, pretrained = load(RESNET["bottleneck, silu"], tmp_path / "before")
  inputs = images(model, rows=4)
  want = model.train()(**harness.as_torch(inputs)).logits
  want.square().sum().backward()

  def loss(params):
    out, updates = pretrained.module.apply({**pretrained.variables, "params": params}, **inputs,
                                           mutable=["batch_stats"])
    return jnp.square(out["logits"]).sum(), (out["logits"], updates)

  (_, (got, updates)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      pretrained.variables["params"])
  assert harness.difference(got, want.detach()) <= harness.TOLERANCE
  name = "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight"
  gradient = dict(model.named_parameters())[name].grad.permute(2, 3, 1, 0)
  ours = grads["encoder"]["stage_1"]["block_0"]["conv_1"]["conv"]["kernel"]
  assert harness.difference(ours, gradient) <= harness.TOLERANCE
  model.save_pretrained(tmp_path / "after")
  after = names.flatten(models.load(str(tmp_path / "after")).variables["batch_stats"])
  updates = names.flatten(updates["batch_stats"])
  assert updates.keys() == after.keys()
  for path, value in after.items():
    assert harness.difference(updates[path], value) <= harness.TOLERANCE, path


@pytest.mark.slow
def test_stochastic_depth_is_of_bit_only(tmp_path):
  case = "preactivation, explicit padding"
  model, pretrained = load(BIT[case], tmp_path / "bit", "Bit", dropout=0.9)
  x = images(model, rows=32)
  run = jax.jit(lambda key: pretrained.module.apply(pretrained.variables, **x,
                                                    rngs={"dropout": key})["features"])
  calm = pretrained.module.apply(pretrained.variables, **x)["features"]
  assert not np.allclose(run(jax.random.key(1)), calm)
  np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
  rates = [shape.rate for stage in pretrained.config.stages() for shape in stage]
  np.testing.assert_allclose(rates, [0, 0.45, 0.9])
  with pytest.raises(errors.UserError, match="resnet has no dropout"):
    load(RESNET["basic, gelu"], tmp_path / "resnet", dropout=0.1)


@pytest.mark.parametrize("kind,settings", [
    ("ResNet", list(RESNET.values())[0]), ("Bit", list(BIT.values())[0])])
def test_other_labels_and_channels(kind, settings, tmp_path):
  _, pretrained = load(settings, tmp_path / "m", kind, labels=("a", "b"), changes={"channels": 1})
  assert len(pretrained.report.initialised) == 2
  assert "num_channels 3 -> 1" in str(pretrained.report)
  models.export(pretrained, tmp_path / "out")
  again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
  x = images(again)
  want = again(**harness.as_torch(x)).logits.detach().numpy()
  got = pretrained.module.apply(pretrained.variables, **x)["logits"]
  assert harness.difference(got, want) <= harness.TOLERANCE


@pytest.mark.slow
def test_half_precision(tmp_path):
  for kind, settings in (("ResNet", RESNET["basic, gelu"]), ("Bit", list(BIT.values())[0])):
    model, pretrained = load(settings, tmp_path / kind, kind, compute=layers.Compute(jnp.bfloat16))
    out = pretrained.module.apply(pretrained.variables, **images(model))
    assert out["last_hidden_state"].dtype == jnp.bfloat16 and out["logits"].dtype == jnp.float32
    want = resnet.Model(pretrained.config).apply(pretrained.variables, **images(model))
    assert harness.difference(out["logits"], want["logits"]) < 0.1


def test_half_precision_files_keep_their_dtype(tmp_path):
  model = upstream(RESNET["basic, gelu"]).half()
  model.save_pretrained(tmp_path / "m")
  models.export(models.load(str(tmp_path / "m")), tmp_path / "out")
  harness.same_tensors(tmp_path / "m", tmp_path / "out")


@pytest.mark.parametrize("stated,millions", [
    ({"model_type": "resnet"}, 25.56),
    ({"model_type": "resnet", "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512],
      "depths": [2, 2, 2, 2]}, 11.69),
    ({"model_type": "bit"}, 25.55),
])
def test_published_sizes(stated, millions):
  prefix = resnet.Config.PREFIXES[stated["model_type"]]
  config = resnet.Config.from_hf({**stated, "architectures": [prefix + "ForImageClassification"],
                                  "id2label": {str(i): str(i) for i in range(1000)}})
  module = resnet.Model(config)
  shapes = jax.eval_shape(
      lambda: module.init(jax.random.key(0), **resnet.probe_inputs(config)))["params"]
  assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == millions


@pytest.mark.parametrize("hf,message", [
    ({"layer_type": "preactivation"}, "layer_type 'preactivation' is not supported"),
    ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
    ({"depths": [1, 2]}, "should be of one length"),
    ({"model_type": "bit", "layer_type": "basic"}, "layer_type 'basic' is not supported"),
    ({"model_type": "bit", "global_padding": "VALID"}, "global_padding 'VALID' is not supported"),
    ({"model_type": "bit", "width_factor": 3}, "width_factor=3 is not supported"),
    ({"model_type": "bit", "num_groups": 48}, "do not divide into num_groups 48"),
    ({"model_type": "bit", "num_groups": 1, "hidden_sizes": [12], "depths": [1]},
     "multiples of 8"),
])
def test_config_that_is_not_served(hf, message):
  with pytest.raises(errors.UserError, match=message):
    resnet.Config.from_hf({"model_type": "resnet", **hf})
