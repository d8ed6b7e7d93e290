"""Changes of a loaded model's shape: labels, vocabulary, positions, channels, depth."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import test_bert

from ft import errors, models
from ft.models import base, bert, convnext, layers, surgery
from ft.weights import names, tensors

TABLE = "params/embeddings/word/embedding"


def changed(folder, changes, **kwargs):
  """Returns (leaves before, Pretrained after) of a tiny BERT."""
  source = test_bert.checkpoint(folder / "m")
  before = names.flatten(models.load(source).variables)
  return before, models.load(source, changes=changes, **kwargs)


def outputs(pretrained, **inputs):
  inputs = inputs or bert.probe_inputs(pretrained.config)
  return jax.jit(lambda v: pretrained.module.apply(v, **inputs))(pretrained.variables)


def test_a_new_label_head(tmp_path):
  before, after = changed(tmp_path, {}, labels=("a", "b", "c"))
  assert sorted(after.report.initialised) == ["params/classifier/bias",
                                              "params/classifier/kernel"]
  assert outputs(after)["logits"].shape == (2, 3)
  leaves = names.flatten(after.variables)
  assert leaves["params/classifier/kernel"].std() > 0
  for path in before:
    np.testing.assert_array_equal(leaves[path], before[path])


@pytest.mark.parametrize("size", [31, 11])
def test_vocabulary(size, tmp_path):
  before, after = changed(tmp_path, {"vocab_size": size})
  was, now = before[TABLE], names.flatten(after.variables)[TABLE]
  kept = min(size, 23)
  assert now.shape == (size, 12) and after.config.vocab_size == size
  np.testing.assert_array_equal(now[:kept], was[:kept])
  for row in now[kept:]:
    np.testing.assert_allclose(row, np.asarray(was).mean(0), atol=1e-7)
  assert after.report.changed == [
      f"vocab_size 23 -> {size}: new rows are the mean of the old ones"]
  assert "changed: vocab_size 23" in str(after.report)
  ids = np.arange(kept)[None, :16]
  np.testing.assert_allclose(
      outputs(after, input_ids=ids)["last_hidden_state"],
      outputs(models.load(str(tmp_path / "m")), input_ids=ids)["last_hidden_state"], atol=1e-6)
  models.export(after, tmp_path / "out")
  again = models.load(str(tmp_path / "out"))
  assert again.config.vocab_size == size and not again.report.changed
  np.testing.assert_array_equal(names.flatten(again.variables)[TABLE], now)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("scan", [False, True])
def test_depth(depth, scan, tmp_path):
  before, after = changed(tmp_path, {"depth": depth}, compute=layers.Compute(scan=scan))
  assert after.report.changed == [
      f"num_hidden_layers 2 -> {depth}: layers were cut from the end, or the last one was repeated"]
  models.export(after, tmp_path / "out")
  plain = models.load(str(tmp_path / "out"))
  leaves = names.flatten(plain.variables)
  for path, leaf in leaves.items():
    for i in (2, 3):  # copies of the last
      path = path.replace(f"layer_{i}", "layer_1")
    np.testing.assert_array_equal(leaf, before[path])
  found = {int(p.split("layer_")[1].split("/")[0]) for p in leaves if "layer_" in p}
  assert found == set(range(depth)) and plain.config.num_hidden_layers == depth
  np.testing.assert_allclose(outputs(after)["last_hidden_state"],
                             outputs(plain)["last_hidden_state"], atol=1e-6)


def test_several_changes_at_once_keep_dtype_and_place(tmp_path):
  mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  _, after = changed(tmp_path, {"depth": 3, "vocab_size": 40}, dtype=jnp.bfloat16,
                     sharding=lambda shape: everywhere)
  assert len(after.report.changed) == 2
  for leaf in jax.tree.leaves(after.variables):
    assert leaf.dtype == jnp.bfloat16 and leaf.sharding == everywhere


def test_what_stays_as_it_is_is_not_reported(tmp_path):
  _, after = changed(tmp_path, {"depth": 2, "vocab_size": 23})
  assert not after.report.changed


@pytest.mark.parametrize("changes,message", [
    ({"image_size": 32}, "model.image_size: bert cannot change it; it can change vocab_size"),
    ({"vocab_size": -5}, "model.vocab_size=-5 should be at least 1"),
    ({"depth": -1}, "model.depth=-1 should be at least 1"),
])
def test_changes_that_are_refused(changes, message, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    changed(tmp_path, changes)


# A family with a grid of positions, one vector before them, and two kernels that read channels.


@dataclasses.dataclass(frozen=True)
class Grid(base.HFConfig):
  image_size: int | tuple = 12
  patch_size: int = 4
  num_channels: int = 3
  registers: int = 1


FAMILY = types.SimpleNamespace(__name__="ft.models.grid", SURGERY={
    "image_size": surgery.Surgery("image_size", ("params/position", "params/absent"),
                                  patch="patch_size", extra="registers"),
    "channels": surgery.Surgery("num_channels", ("params/kernel", ("params/rows", 0)), axis=2),
})


def leaves_of(height, width, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
  return {"params/position": draw(1, 1 + height * width, 5), "params/kernel": draw(4, 4, 3, 6),
          "params/rows": draw(3, 7)}


@pytest.mark.parametrize("old,new", [
    (12, 20), (12, (8, 24)), ((8, 20), 16), (20, 8), ((20, 8), (11, 31))])
def test_positions_are_interpolated_as_torch_does(old, new):
  torch = pytest.importorskip("torch")
  pair = lambda size: size if isinstance(size, tuple) else (size, size)  # noqa: E731
  was, now = ([side // 4 for side in pair(size)] for size in (old, new))
  leaves = leaves_of(*was)
  config, made, said = surgery.apply(FAMILY, Grid(image_size=old), leaves, {"image_size": new})
  first, grid = leaves["params/position"][:, :1], leaves["params/position"][:, 1:]
  want = torch.nn.functional.interpolate(
      torch.tensor(np.asarray(grid)).reshape(1, *was, 5).permute(0, 3, 1, 2), size=tuple(now),
      mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, -1, 5)
  np.testing.assert_array_equal(made["params/position"][:, :1], first)
  np.testing.assert_allclose(made["params/position"][:, 1:], want, atol=1e-5)
  assert config.image_size == new
  assert said == [f"image_size {old} -> {new}: position vectors were interpolated"]


def test_positions_of_equal_sides_are_one_number():
  config, made, _ = surgery.apply(FAMILY, Grid(), leaves_of(3, 3), {"image_size": [16, 16]})
  assert config.image_size == 16 and made["params/position"].shape == (1, 17, 5)


@pytest.mark.parametrize("size,leaves,message", [
    (3, leaves_of(3, 3), "image_size=3 is smaller than a patch of 4"),
    (16, leaves_of(3, 2), r"params/position has 6 positions, not a grid of \[3, 3\]"),
])
def test_grids_that_do_not_fit(size, leaves, message):
  with pytest.raises(errors.UserError, match=message):
    surgery.apply(FAMILY, Grid(), leaves, {"image_size": size})


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7])
def test_channels_keep_what_a_grey_image_gives(count):
  leaves = leaves_of(3, 3)
  config, made, said = surgery.apply(FAMILY, Grid(), leaves, {"channels": count})
  assert config.num_channels == count and made["params/kernel"].shape == (4, 4, count, 6)
  for path, axis in (("params/kernel", 2), ("params/rows", 0)):
    np.testing.assert_allclose(made[path].sum(axis), leaves[path].sum(axis), atol=1e-5)
  if count == 6:
    np.testing.assert_allclose(made["params/rows"][3:], leaves["params/rows"] / 2, atol=1e-6)
  assert said == [f"num_channels 3 -> {count}: kernels of the input were repeated or added up"]


def test_channels_of_a_real_family_there_and_back(tmp_path):
  config = convnext.Config(hidden_sizes=(8,), depths=(1,), num_stages=1, image_size=8)
  module = convnext.Model(config)
  variables = module.init(jax.random.key(0), **convnext.probe_inputs(config))
  models.export(models.Pretrained("convnext", module, variables, names.Report(), {}, config,
                                  "image", convnext.HEAD), tmp_path / "3")
  grey = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
  want = module.apply(variables, np.repeat(grey, 3, -1))["features"]
  for before, after in ((3, 1), (1, 5)):
    loaded = models.load(str(tmp_path / str(before)), changes={"channels": after})
    assert f"num_channels {before} -> {after}" in str(loaded.report)
    models.export(loaded, tmp_path / str(after))
    stored = tensors.open_tensors(tmp_path / str(after))
    assert stored["embeddings.patch_embeddings.weight"].shape == (8, after, 4, 4)
    got = models.load(str(tmp_path / str(after)))
    got = got.module.apply(got.variables, np.repeat(grey, after, -1))["features"]
    np.testing.assert_allclose(got, want, atol=1e-4)
