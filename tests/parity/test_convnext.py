"""ConvNeXt and ConvNeXt V2 against transformers, float32: outputs, gradients, exports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import convnext, layers
from ft.weights import names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {
    "v1, layer scale, gelu": ("ConvNext", dict(
        hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, layer_scale_init_value=0.4)),
    "v1, no layer scale, relu, patch 3, 1 channel": ("ConvNext", dict(
        hidden_sizes=[10, 10], depths=[1, 1], num_stages=2, layer_scale_init_value=0.0,
        hidden_act="relu", patch_size=3, num_channels=1, layer_norm_eps=1e-3)),
    "v2, response norm, gelu": ("ConvNextV2", dict(
        hidden_sizes=[8, 12], depths=[2, 1], num_stages=2)),
}
MORE = {
    "v2, response norm, silu, patch 2, 3 stages": ("ConvNextV2", dict(
        hidden_sizes=[6, 8, 10], depths=[1, 1, 2], num_stages=3, hidden_act="silu", patch_size=2)),
    "v1, layer scale, tanh gelu, 4 stages": ("ConvNext", dict(
        hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 2, 1], layer_scale_init_value=0.1,
        hidden_act="gelu_new")),
}


def upstream(case, head="ForImageClassification"):
  """Returns a random transformers model in evaluation mode."""
  kind, settings = (CASES | MORE)[case]
  config = getattr(transformers, kind + "Config")(
      initializer_range=0.2, image_size=40, num_labels=5, **settings)
  torch.manual_seed(0)
  return harness.randomise(getattr(transformers, kind + head)(config))


def images(model, height=37, width=33, rows=2):
  shape = (rows, height, width, model.config.num_channels)
  return {"pixel_values": np.random.default_rng(3).normal(size=shape).astype(np.float32)}


def with_maps(pretrained, variables, inputs):
  """Returns the model's outputs with its maps one by one, in torch's layout."""
  out = pretrained.module.apply(variables, **inputs)
  maps = {f"map_{i}": y.transpose(0, 3, 1, 2) for i, y in enumerate(out["feature_maps"])}
  return {**out, **maps}


def maps_of(model):
  return {f"map_{i}": lambda out, _, i=i: out.hidden_states[i + 1]
          for i in range(model.config.num_stages)}


def check(model, folder, case, outputs):
  inputs = images(model)
  return harness.check(
      "convnext", case, model, inputs, {**outputs, **maps_of(model)}, folder, call=with_maps,
      torch_inputs={**harness.as_torch(inputs), "output_hidden_states": True})


@pytest.mark.parametrize("case", [
    *CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_classifier_equals_transformers(case, tmp_path):
  model = upstream(case)
  pretrained = check(model, tmp_path, case, {"logits": "logits"})
  assert pretrained.config.num_labels == 5 and not pretrained.report.ignored
  if "relu" not in case:
    harness.check_scan(pretrained, images(model), tmp_path)


def test_body_equals_transformers(tmp_path):
  case = list(CASES)[1]
  model = upstream(case, "Model")
  pretrained = check(model, tmp_path, case + ", body", {"features": "pooler_output"})
  assert pretrained.config.head == "none"


def load(case, folder, **kwargs):
  model = upstream(case)
  model.save_pretrained(folder)
  return model, models.load(str(folder), **kwargs)


@pytest.mark.slow
def test_stochastic_depth(tmp_path):
  model, pretrained = load(list(CASES)[0], tmp_path, dropout=0.9)
  rates = pretrained.config.drop_rates()
  assert [len(stage) for stage in rates] == [1, 2]
  np.testing.assert_allclose(sum(rates, []), [0.0, 0.45, 0.9])
  x = images(model, rows=64)
  for scan in (False, True):
    module = pretrained.module
    variables = pretrained.variables
    if scan:
      scanned = models.load(str(tmp_path), dropout=0.9, compute=layers.Compute(scan=True))
      module, variables = scanned.module, scanned.variables
    run = jax.jit(lambda key, m=module, v=variables: m.apply(v, **x, rngs={"dropout": key}))
    calm = jax.jit(lambda m=module, v=variables: m.apply(v, **x))()
    noisy = run(jax.random.key(1))
    first, last = noisy["feature_maps"][0], noisy["feature_maps"][-1]
    # The first layer is never dropped.
    np.testing.assert_allclose(first, calm["feature_maps"][0], atol=1e-5)
    assert not np.allclose(last, calm["last_hidden_state"], atol=1e-3)
    np.testing.assert_array_equal(last, run(jax.random.key(1))["last_hidden_state"])


def test_stochastic_depth_keeps_the_expectation():
  x = jnp.ones((4000, 2, 3))
  rngs = {"dropout": jax.random.key(0)}
  for rate in (0.3, jnp.float32(0.3)):
    y = layers.DropPath(rate).apply({}, x, rngs=rngs)
    np.testing.assert_array_equal(y, jnp.broadcast_to(y[:, :1, :1], y.shape))
    assert set(np.unique(y)) == {0, np.float32(1 / (1 - np.float32(0.3)))}
    assert abs(float((y == 0).mean()) - 0.3) < 0.03
    assert layers.DropPath(rate).apply({}, x) is x
  assert layers.DropPath(0.0).apply({}, x, rngs=rngs) is x


def test_a_channel_that_is_not_active_has_a_gradient():
  x = jnp.zeros((1, 3, 3, 4)).at[..., 0].set(1.0)
  norm = convnext.ResponseNorm()
  params = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
  gradient = jax.grad(lambda x: norm.apply(params, x).sum())(x)
  assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.slow
def test_other_labels_and_channels(tmp_path):
  model, pretrained = load(list(CASES)[2], tmp_path, labels=("a", "b"), changes={"channels": 5})
  assert sorted(pretrained.report.initialised) == ["params/classifier/bias",
                                                   "params/classifier/kernel"]
  assert len(pretrained.report.changed) == 1 and "num_channels 3 -> 5" in str(pretrained.report)
  out = pretrained.module.apply(pretrained.variables, **convnext.probe_inputs(pretrained.config))
  assert out["logits"].shape == (2, 2) and out["logits"].dtype == jnp.float32
  models.export(pretrained, tmp_path / "out")
  again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
  x = images(again)
  want = again(**harness.as_torch(x)).logits.detach().numpy()
  got = pretrained.module.apply(pretrained.variables, **x)["logits"]
  assert harness.difference(got, want) <= harness.TOLERANCE


@pytest.mark.slow
def test_bfloat16(tmp_path):
  model, pretrained = load(list(CASES)[2], tmp_path, compute=layers.Compute(jnp.bfloat16))
  out = pretrained.module.apply(pretrained.variables, **images(model))
  assert out["last_hidden_state"].dtype == jnp.bfloat16 and out["logits"].dtype == jnp.float32
  want = convnext.Model(pretrained.config).apply(pretrained.variables, **images(model))
  assert harness.difference(out["logits"], want["logits"]) < 0.05


def test_published_sizes():
  for kind, count in (("convnext", 28_589_128), ("convnextv2", 28_635_496)):
    config = convnext.Config.from_hf({
        "model_type": kind, "architectures": [convnext.Config.PREFIXES[kind] +
                                              "ForImageClassification"],
        "id2label": {str(i): str(i) for i in range(1000)}})
    module = convnext.Model(config)
    shapes = jax.eval_shape(lambda m=module, c=config: m.init(jax.random.key(0),
                                                              **convnext.probe_inputs(c)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("hf,message", [
    ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
    ({"depths": [1, 2]}, "should be of one length"),
    ({"patch_size": [4, 4]}, "patch_size is .4, 4., should be of type int"),
    ({"architectures": ["ConvNextBackbone"]}, "ConvNextBackbone is not supported"),
])
def test_config_that_is_not_served(hf, message):
  with pytest.raises(errors.UserError, match=message):
    convnext.Config.from_hf({"model_type": "convnext", **hf})


def test_a_damaged_checkpoint_is_one_error(tmp_path):
  model = upstream(list(CASES)[2])
  state = model.state_dict()
  state["convnextv2.extra"] = torch.zeros(2)
  del state["convnextv2.layernorm.bias"]
  name = "convnextv2.encoder.stages.0.layers.0.grn.weight"
  state[name] = torch.zeros(1, 2, 1, state[name].shape[-1])
  from safetensors import torch as files
  model.config.save_pretrained(tmp_path)
  files.save_file(state, tmp_path / "model.safetensors")
  with pytest.raises(errors.UserError, match=r"(?s)layernorm.bias.*extra.*grn.weight") as e:
    models.load(str(tmp_path))
  assert "has (1, 2, 1, 32), needs (1, 1, 1, 32)" in str(e.value)


def test_no_name_stands_outside_of_the_table(tmp_path):
  _, pretrained = load(list(CASES)[1], tmp_path)
  leaves = names.flatten(pretrained.variables)
  config = dataclasses.replace(pretrained.config)
  assert len(names.dump_tree(leaves, convnext.NAMES, config=config)) == len(leaves)
