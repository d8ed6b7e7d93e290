"""The EfficientNet family on tiny models made here: config, tree, dropout, statistics, export."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft import errors, models
from ft.models import convolution, efficientnet, layers
from ft.weights import names, tensors

STAGES = ((1, 3, 1, 1, 8), (2, 5, 2, 3, 8), (1, 3, 2, 2, 16))
TINY = efficientnet.Config(stages=STAGES, stem_features=8, head_features=24, image_size=32,
                           num_labels=5)


def build(config=TINY, seed=0):
  """Returns a model and variables in which nothing is 0 or 1."""
  model = efficientnet.Model(config)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images(config)))
  rng = np.random.default_rng(seed)
  draw = lambda s: jnp.asarray(0.3 * np.abs(rng.normal(size=s.shape)) + 0.1, s.dtype)  # noqa: E731
  variables = jax.tree.map(draw, shapes)
  for path, leaf in names.flatten(variables).items():
    if path.endswith("kernel"):
      node = variables
      for name in path.split("/")[:-1]:
        node = node[name]
      fan_in = leaf.shape[-2] * (leaf.shape[0] * leaf.shape[1] if leaf.ndim == 4 else 1)
      node["kernel"] = jnp.asarray(rng.normal(size=leaf.shape) * fan_in**-0.5, jnp.float32)
  return model, variables


def images(config=TINY, batch=3, height=0, width=0):
  shape = (batch, height or config.image_size, width or config.image_size, 3)
  return jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)


def run(model, variables, x, **kwargs):
  return jax.jit(lambda v, x: model.apply(v, x, **kwargs))(variables, x)


@pytest.mark.parametrize("variant,blocks,millions", [
  ("lite0", 16, 4.65), ("lite1", 21, 5.42), ("lite2", 21, 6.09), ("lite3", 24, 8.20),
  ("lite4", 30, 13.01),
])
def test_variants_have_the_published_sizes(variant, blocks, millions):
  config = efficientnet.Config.variant(variant)
  model = efficientnet.Model(config)
  small = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), small))
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
  assert len(config.blocks()) == blocks and round(count / 1e6, 2) == millions


def test_config_survives_json():
  for config in (TINY, efficientnet.Config.variant("lite3", padding="static"),
                 dataclasses.replace(TINY, num_labels=0),
                 dataclasses.replace(TINY, num_labels=2, labels=("bad", "good"))):
    assert efficientnet.Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_config_of_an_earlier_export():
  """Its keys were these, in this form; it had no architectures."""
  earlier = {"batch_norm_eps": 0.001, "batch_norm_momentum": 0.9, "depth_coefficient": 1.5,
             "drop_connect_rate": 0.1, "dropout_rate": 0.3, "hidden_dim": 24, "image_mean": [0.5],
             "image_size": 32, "image_std": [0.25], "model_type": "efficientnet-lite",
             "num_labels": 2, "padding": "static", "stages": [list(s) for s in STAGES],
             "stem_dim": 8, "width_coefficient": 1.2, "id2label": {"0": "bad", "1": "good"},
             "label2id": {"bad": 0, "good": 1}}
  want = efficientnet.Config(
    norm_epsilon=0.001, norm_momentum=0.9, depth=1.5, drop_connect=0.1, dropout=0.3,
    head_features=24, image_mean=(0.5,), image_size=32, image_std=(0.25,), num_labels=2,
    padding="static", stages=STAGES, stem_features=8, width=1.2, labels=("bad", "good"))
  assert efficientnet.Config.from_hf(earlier) == want
  assert want.to_hf().items() >= {k: v for k, v in earlier.items() if k != "num_labels"}.items()
  assert efficientnet.Config.from_hf({**earlier, "num_labels": 0, "id2label": {}}).num_labels == 0


def test_config_by_variant_and_defaults():
  assert efficientnet.Config.from_hf({"variant": "lite2"}).image_size == 260
  assert efficientnet.Config.from_hf({"variant": "lite2", "image_size": 64}).image_size == 64
  stated = efficientnet.complete({}, None)
  assert stated["image_size"] == 224
  assert np.allclose(np.array(stated["image_mean"]) * 255, 127)
  assert np.allclose(np.array(stated["image_std"]) * 255, 128)


@pytest.mark.parametrize("hf,match", [
  ({"variant": "lite9"}, "no variant 'lite9'"),
  ({"width_coefficient": "wide"}, "width_coefficient is 'wide', should be of type float"),
  ({"image_size": [224]}, "image_size is .224., should be of type int"),
  ({"padding": "valid"}, "padding 'valid' is not supported; supported are 'same', 'static'"),
  ({"stages": [[1, 3, 1, 1]]}, "lists of five positive numbers"),
])
def test_a_wrong_config_is_one_clear_error(hf, match):
  with pytest.raises(errors.UserError, match=match):
    efficientnet.Config.from_hf(hf)


def test_parameter_tree():
  _, variables = build()
  assert sorted(variables["params"]) == [*(f"blocks_{i}" for i in range(4)), "classifier",
                                         "head_conv", "stem"]
  assert sorted(variables["params"]["blocks_0"]) == ["depthwise", "project"]
  assert sorted(variables["params"]["blocks_1"]) == ["depthwise", "expand", "project"]
  paths = names.flatten(variables["params"])
  assert paths["blocks_1/depthwise/conv/kernel"].shape == (5, 5, 24)
  mirrored = {path.rsplit("/", 1)[0] for path in names.flatten(variables["batch_stats"])}
  assert mirrored == {path.rsplit("/", 1)[0] for path in paths if path.endswith("norm/scale")}


@pytest.mark.parametrize("height,width", [(32, 32), (33, 47), (20, 64)])
def test_outputs(height, width):
  model, variables = build()
  out = run(model, variables, images(height=height, width=width))
  assert out["last_hidden_state"].shape == (3, -(-height // 8), -(-width // 8), 24)
  assert out["features"].shape == (3, 24) and out["logits"].shape == (3, 5)
  np.testing.assert_allclose(out["features"], out["last_hidden_state"].mean((1, 2)), rtol=1e-5)
  half, quarter, eighth = ((-(-height // n), -(-width // n)) for n in (2, 4, 8))
  assert [y.shape for y in out["feature_maps"]] == [
    (3, *half, 8), (3, *quarter, 8), (3, *eighth, 16)]
  head = model.apply(variables, out["features"], method="head")
  np.testing.assert_allclose(head, out["logits"], rtol=1e-5, atol=1e-6)


def test_no_head_without_labels():
  model, variables = build(dataclasses.replace(TINY, num_labels=0))
  assert "classifier" not in variables["params"]
  assert "logits" not in run(model, variables, images())


def test_library_and_shifted_models_agree():
  model, variables = build()

  def gradients(implementation):
    with convolution.using(implementation):
      loss = lambda p: jnp.square(  # noqa: E731
        model.apply({**variables, "params": p}, images(height=33))["logits"]).sum()
      return jax.jit(jax.grad(loss))(variables["params"])

  for got, want in zip(*map(jax.tree.leaves, map(gradients, convolution.IMPLEMENTATIONS)),
                       strict=True):
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_static_padding_equals_same_at_the_trained_size_only():
  model, variables = build()
  static = efficientnet.Model(dataclasses.replace(TINY, padding="static"))
  x = images()
  np.testing.assert_array_equal(run(model, variables, x)["logits"],
                                run(static, variables, x)["logits"])
  x = images(height=33, width=33)
  assert not np.allclose(run(model, variables, x)["features"],
                         run(static, variables, x)["features"])


def test_dropout_acts_only_with_its_stream():
  x = images()
  rng = {"rngs": {"dropout": jax.random.key(1)}}
  model, variables = build(dataclasses.replace(TINY, drop_connect=0.0, dropout=0.5))
  calm, noisy = run(model, variables, x), run(model, variables, x, **rng)
  np.testing.assert_allclose(calm["features"], noisy["features"], rtol=1e-6)
  assert not np.allclose(calm["logits"], noisy["logits"])
  model, variables = build(dataclasses.replace(TINY, drop_connect=0.9, dropout=0.0))
  calm, noisy = run(model, variables, x), run(model, variables, x, **rng)
  assert not np.allclose(calm["features"], noisy["features"])
  again = run(model, variables, x, **rng)
  np.testing.assert_array_equal(noisy["features"], again["features"])


def test_stochastic_depth_keeps_the_expectation():
  config = dataclasses.replace(TINY, drop_connect=0.8)
  model = efficientnet.Model(config).bind({}, rngs={"dropout": jax.random.key(0)})
  gates = model._gates(4000)
  for gate, (*_, rate) in zip(gates, config.blocks(), strict=True):
    assert set(np.unique(gate)) <= {np.float32(0), np.float32(1 / (1 - np.float32(rate)))}
    assert abs(float((gate == 0).mean()) - rate) < 0.03 and abs(float(gate.mean()) - 1) < 0.07
  assert efficientnet.Model(config).bind({})._gates(3) == [None] * 4


def test_statistics_move_only_where_mutable():
  model, variables = build()
  x = images()
  out, updates = run(model, variables, x, mutable=["batch_stats"])
  assert not np.allclose(out["logits"], run(model, variables, x)["logits"])
  before, after = (names.flatten(tree["batch_stats"]) for tree in (variables, updates))
  assert before.keys() == after.keys()
  assert all(not np.array_equal(before[path], after[path]) for path in before)


def test_half_precision():
  _, variables = build()
  compute = layers.Compute(jnp.bfloat16)
  out = run(efficientnet.Model(TINY, compute=compute), variables, images())
  assert out["last_hidden_state"].dtype == jnp.bfloat16 and out["logits"].dtype == jnp.float32
  assert np.isfinite(np.asarray(out["logits"])).all()


def upstream(folder, config=TINY):
  """Writes a checkpoint with upstream's names, its step counters included."""
  _, variables = build(config)
  dumped = names.dump_tree(names.flatten(variables), efficientnet.NAMES, config=config)
  arrays = {name: tensor.read() for name, tensor in dumped.items()}
  for name in list(arrays):
    if name.endswith("running_mean"):
      arrays[name.replace("running_mean", "num_batches_tracked")] = np.int64(3)
  folder.mkdir()
  tensors.write_safetensors(folder / "model.safetensors", arrays)
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  return variables, arrays


def test_load_and_export_give_the_same_file_back(tmp_path):
  variables, arrays = upstream(tmp_path / "a")
  loaded = models.load(str(tmp_path / "a"))
  assert loaded.family == "efficientnet" and loaded.modality == "image" and loaded.config == TINY
  assert not loaded.report.initialised and not loaded.report.ignored
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
  models.export(loaded, tmp_path / "b")
  again = tensors.open_tensors(tmp_path / "b")
  assert again.keys() == arrays.keys()
  for name, array in arrays.items():
    assert np.array_equal(again[name].read(), array), name
  assert models.inspect(str(tmp_path / "b")).hf_config["image_mean"] == list(TINY.image_mean)


def test_a_new_head_is_initialised_and_said(tmp_path):
  upstream(tmp_path / "a")
  loaded = models.load(str(tmp_path / "a"), num_labels=2, labels=["bad", "good"], dropout=0.3)
  assert sorted(loaded.report.initialised) == ["params/classifier/bias", "params/classifier/kernel"]
  assert loaded.config.dropout == 0.3 and loaded.config.labels == ("bad", "good")
  assert run(loaded.module, loaded.variables, images())["logits"].shape == (3, 2)
  models.export(loaded, tmp_path / "b")
  assert models.load(str(tmp_path / "b")).config == loaded.config


def test_other_channels(tmp_path):
  upstream(tmp_path / "a")
  loaded = models.load(str(tmp_path / "a"), changes={"channels": 1})
  assert "num_channels 3 -> 1" in str(loaded.report)
  grey = images()[..., :1]
  got = run(loaded.module, loaded.variables, grey)["logits"]
  assert got.shape == (3, 5)
  models.export(loaded, tmp_path / "b")
  assert models.load(str(tmp_path / "b")).config == loaded.config


def test_another_shape_is_named(tmp_path):
  upstream(tmp_path / "a")
  other = dataclasses.replace(TINY, stem_features=16)
  (tmp_path / "a" / "config.json").write_text(json.dumps(other.to_hf()))
  with pytest.raises(errors.UserError, match="_blocks.0._bn1.bias: has"):
    models.load(str(tmp_path / "a"))
