"""Stacked layers: the same numbers and files as one by one, in less time to compile; placement."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft import errors, models
from ft.models import bert, layers
from ft.weights import names, stacking, tensors

CONFIG = bert.Config(vocab_size=31, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                     intermediate_size=24, max_position_embeddings=20, initializer_range=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("stacking") / "model"
  module = bert.Model(CONFIG)
  variables = module.init(jax.random.key(1), **bert.probe_inputs(CONFIG))
  models.export(models.Pretrained("bert", module, variables, names.Report(), {}, CONFIG, "text",
                                  bert.HEAD), path)
  return path


def outputs(loaded, **kwargs):
  probe = bert.probe_inputs(CONFIG)
  return jax.jit(lambda v: loaded.module.apply(v, **probe, **kwargs))(loaded.variables)


def test_paths():
  assert stacking.split("params/encoder/layer_12/output/kernel") == (
      "params/encoder/layers/output/kernel", 12)
  assert stacking.split("params/classifier/kernel") == ("params/classifier/kernel", None)
  assert stacking.numbered("params/layers/kernel", 3) == "params/layer_3/kernel"
  flat = {"params/layer_0/kernel": np.ones(2), "params/layer_1/kernel": np.zeros(2), "a": 1}
  again = stacking.unstack(stacking.stack(flat))
  assert again.keys() == flat.keys()
  assert all(np.array_equal(again[path], flat[path]) for path in flat)


@pytest.mark.parametrize("remat", [
  "none", *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("dots", "full"))])
def test_same_outputs_gradients_and_file(folder, tmp_path, remat):
  one = models.load(str(folder))
  many = models.load(str(folder), compute=layers.Compute(scan=True, remat=remat))
  flat = names.flatten(many.variables)
  assert flat["params/encoder/layers/output/kernel"].shape == (4, 24, 16)
  for name, value in outputs(one).items():
    np.testing.assert_allclose(outputs(many)[name], value, atol=2e-6)
  probe = bert.probe_inputs(CONFIG)
  gradient = lambda m: names.flatten(jax.jit(jax.grad(  # noqa: E731
      lambda v: m.module.apply(v, **probe)["pooler_output"].sum()))(m.variables))
  want, got = gradient(one), stacking.unstack(gradient(many))
  assert want.keys() == got.keys()
  for path, value in want.items():
    np.testing.assert_allclose(got[path], value, atol=2e-5, err_msg=path)
  models.export(many, tmp_path / "out")
  a, b = (tensors.open_tensors(f) for f in (folder, tmp_path / "out"))
  assert a.keys() == b.keys()
  assert all(a[name].read().tobytes() == b[name].read().tobytes() for name in a)
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
      (folder / "config.json").read_text())


@pytest.mark.optimised
def test_remat_saves_memory_not_values(folder):
  def temporary(remat):
    loaded = models.load(str(folder), compute=layers.Compute(scan=True, remat=remat))
    ids = np.zeros((64, 20), np.int32)
    loss = lambda v: loaded.module.apply(v, ids)["last_hidden_state"].sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(loaded.variables).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  none, dots, full = (temporary(remat) for remat in ("none", "dots", "full"))
  assert full < dots < none


def test_dropout_differs_between_stacked_layers(folder):
  loaded = models.load(str(folder), dropout=0.5, compute=layers.Compute(scan=True))
  first, second = (outputs(loaded, rngs={"dropout": jax.random.key(i)})["pooler_output"]
                   for i in (0, 1))
  assert not np.array_equal(first, second)


def test_depth_is_cut_and_grown_while_stacked(folder):
  for depth in (2, 6):
    loaded = models.load(str(folder), changes={"depth": depth},
                         compute=layers.Compute(scan=True))
    assert loaded.variables["params"]["encoder"]["layers"]["output"]["kernel"].shape[0] == depth
    assert loaded.config.num_hidden_layers == depth and len(loaded.report.changed) == 1


def test_each_leaf_goes_straight_to_its_place(folder):
  """On eight virtual devices nothing is on one device alone (the test's own process has one)."""
  placed = {}

  def sharding(shape):
    placed[shape] = placed.get(shape, 0) + 1
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])

  loaded = models.load(str(folder), sharding=sharding, compute=layers.Compute(scan=True))
  assert (4, 16, 24) in placed and (31, 16) in placed
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.variables))


def test_a_mask_per_layer_reaches_it():
  """`each` gives every layer its own value, unrolled and stacked alike."""
  import flax.linen as nn

  class Add(nn.Module):
    @nn.compact
    def __call__(self, x, factor, amount):
      return x * factor + amount + self.param("bias", nn.initializers.zeros, ())

  class Tower(nn.Module):
    compute: layers.Compute

    @nn.compact
    def __call__(self, x):
      make = lambda name: Add(name=name)  # noqa: E731
      return layers.run_layers(make, 3, self.compute, x, 2.0, each={"amount": [1.0, 10.0, 100.0]},
                               keep=True)

  for scan in (False, True):
    tower = Tower(layers.Compute(scan=scan))
    x = jnp.ones(2)
    last, kept = tower.apply(tower.init(jax.random.key(0), x), x)
    assert [float(k[0]) for k in kept] == [3.0, 16.0, 132.0]
    assert np.array_equal(last, kept[-1])


def test_three_faults_are_one_error(folder, tmp_path):
  """A tensor missing, one too many and one of another shape are named together."""
  arrays = {name: t.read() for name, t in tensors.open_tensors(folder).items()}
  arrays.pop("encoder.layer.2.output.dense.bias")
  arrays["encoder.layer.9.output.dense.bias"] = np.zeros(16, np.float32)
  arrays["encoder.layer.1.intermediate.dense.weight"] = np.zeros((24, 17), np.float32)
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  tensors.write_safetensors(tmp_path / "model.safetensors", arrays)
  for scan in (False, True):
    with pytest.raises(errors.UserError) as caught:
      models.load(str(tmp_path), compute=layers.Compute(scan=scan))
    for said in ("missing (1)", "encoder.layer.2.output.dense.bias", "unexpected (1)",
                 "encoder.layer.9.output.dense.bias", "wrong shape (1)", "(24, 17)", "(24, 16)"):
      assert said in str(caught.value), said


def test_a_state_is_stored_layer_by_layer(folder):
  """What a checkpoint holds has no stacks, and comes back as it was."""
  import optax

  from ft import state

  loaded = models.load(str(folder), compute=layers.Compute(scan=True))
  now = state.create(loaded.variables, {}, optax.adam(1e-3), 0)
  stored = stacking.apart(now)
  paths = ["/".join(str(getattr(k, "key", k)) for k in path)
           for path, _ in jax.tree_util.tree_flatten_with_path(stored)[0]]
  assert not any("/layers/" in path for path in paths)
  assert sum("layer_3" in path for path in paths) == 3 * 16  # parameters and both moments
  abstract = jax.eval_shape(lambda: now)
  assert jax.tree.structure(stacking.apart(abstract)) == jax.tree.structure(stored)
  again = stacking.together(stored, abstract)
  assert jax.tree.structure(again) == jax.tree.structure(now)
  jax.tree.map(np.testing.assert_array_equal, again, now)
