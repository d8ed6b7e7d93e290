"""Two models asked the same: similarity and divergence by closed forms, and the base itself."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tasks import text_models

from ft import averaging, mesh, models, passes, retention, state, tune
from ft import config as configs
from ft.data import loader as loaders


def test_cka_of_rotated_and_scaled_features_is_one():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(600, 20)) * np.arange(1, 21)
  rotation, _ = np.linalg.qr(rng.normal(size=(20, 20)))
  assert retention.cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0)
  assert retention.cka(x, x[:, :10]) < 1


def test_cka_is_what_the_gram_matrices_say():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(50, 4)), rng.normal(size=(50, 7))
  y[:, :2] += x[:, :2]
  centre = np.eye(50) - 1 / 50
  k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre  # HSIC, Gretton et al. 2005
  want = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
  assert retention.cka(x, y) == pytest.approx(want)
  assert np.isnan(retention.cka(np.ones((9, 2)), x[:9]))


def test_features_that_have_nothing_in_common_are_alike_by_chance_alone():
  rng = np.random.default_rng(2)
  x, y = rng.normal(size=(4000, 10)), rng.normal(size=(4000, 10))
  # For independent Gaussians E‖YᵀX‖² = n D² and ‖XᵀX‖² ≈ n² D: about D / n.
  assert retention.cka(x, y) == pytest.approx(10 / 4000, rel=0.5)
  few = retention.cka(x[:40], y[:40])
  assert few > 0.1 and retention.chance(x[:40], x[:40]) == pytest.approx(few, abs=0.1)


def test_layers_have_the_names_of_their_parameters():
  assert retention.layer_of("params/encoder/layer_3/output/kernel") == "encoder/layer_3"
  assert retention.layer_of("params/level_1/layer_0/a/b") == "level_1/layer_0"
  assert retention.layer_of("params/classifier/bias") == "classifier"


class Toy:
  """A model of one matrix, whose answer to x is N(x W, 1) or softmax(x W)."""

  def apply(self, variables, x, mutable=(), rngs=None):
    del mutable, rngs
    return {"logits": x @ variables["params"]["w"]["kernel"]}, {}


def asker(before, after):
  """Asks two toys whose kernels are given."""
  config = types.SimpleNamespace(seed=0, data=types.SimpleNamespace(workers=0, prefetch=1))
  grid = mesh.make(types.SimpleNamespace(data=-1, fsdp=1, tensor=1))
  run = types.SimpleNamespace(
    config=config, task=None, mesh=grid, poll=lambda: None,
    preprocess=types.SimpleNamespace(augments=False, augment=None),
    place=lambda batch: mesh.place_batch(batch, mesh.batch_sharding(grid)))
  apply = state.make_apply(Toy())
  made = [retention.Side(tune.combine, apply, state.State(
    None, None, {"params": {"w": {"kernel": jnp.asarray(kernel)}}}, {}, None, None), {})
    for kernel in (before, after)]
  return retention.Asker(run, *made)


def test_divergence_row_by_row_is_that_of_categoricals():
  rng = np.random.default_rng(0)
  before, after = rng.normal(size=(2, 3, 4)).astype(np.float32)
  rows = rng.normal(size=(7, 3)).astype(np.float32)

  def divergence(apply, ours, theirs, batch):
    p, q = (jax.nn.log_softmax(apply(v, {"x": batch["x"]})["logits"]) for v in (theirs, ours))
    return jnp.sum(jnp.sum(jnp.exp(p) * (p - q), -1) * batch["weight"]), jnp.sum(batch["weight"])

  made = asker(before, after).apart(divergence, loaders.from_arrays({"x": rows}), 4)
  p, q = (np.exp(rows @ kernel) for kernel in (before, after))
  p, q = (part / part.sum(axis=1, keepdims=True) for part in (p, q))
  np.testing.assert_allclose(made["total"], (p * np.log(p / q)).sum(axis=1), rtol=1e-4)
  np.testing.assert_array_equal(made["weight"], 1)  # rows that fill up the batch are left out
  assert len(made["total"]) == 7


def test_divergence_of_gaussians():
  rng = np.random.default_rng(0)
  before, after = rng.normal(size=(2, 3, 2)).astype(np.float32)
  rows = rng.normal(size=(5, 3)).astype(np.float32)

  def divergence(apply, ours, theirs, batch):
    away = [apply(v, {"x": batch["x"]})["logits"] for v in (ours, theirs)]
    return jnp.sum(0.5 * jnp.square(away[0] - away[1])), jnp.sum(batch["weight"])

  made = asker(before, after).apart(divergence, loaders.from_arrays({"x": rows}), 5)
  want = [0.5 * np.sum(np.square(row @ before - row @ after)) for row in rows]  # variance 1
  np.testing.assert_allclose(made["total"], want, rtol=1e-4)


def test_both_are_asked_with_one_program():
  before, after = np.eye(2, dtype=np.float32), 2 * np.eye(2, dtype=np.float32)
  ask = asker(before, after)
  def forward(apply, variables, batch):
    return {"y": apply(variables, {"x": batch["x"]})["logits"]}

  rows = loaders.from_arrays({"x": np.eye(2, dtype=np.float32)})
  found = ask(forward, rows, 2)
  np.testing.assert_array_equal(found[0]["y"], before)
  np.testing.assert_array_equal(found[1]["y"], after)
  assert len(ask._steps) == 1


def test_parts_are_means_over_real_tokens(tmp_path):
  made = text_models.export(tmp_path / "m", "llama")
  apply = state.make_apply(made.module)
  ids = jnp.array([[5, 6, 7, 0], [5, 6, 7, 8]])
  batch = {"input_ids": ids, "attention_mask": (ids > 0).astype(jnp.int32), "weight": jnp.ones(2)}

  def forward(apply, variables, batch):
    apply(variables, {key: batch[key] for key in ("input_ids", "attention_mask")})
    return {}

  call = lambda v, inputs, rng=None: apply(v, inputs, rng)[0]  # noqa: E731
  found = retention.pooled(forward)(call, made.variables, batch)
  outputs, seen = passes.layers_of(lambda: made.module.apply(
    made.variables, input_ids=ids, attention_mask=batch["attention_mask"]))
  assert set(found) == {"part/layer_0", "part/layer_1", "part/last"}
  np.testing.assert_allclose(found["part/layer_1"][0], seen[1][0, :3].mean(axis=0), atol=1e-5)
  np.testing.assert_allclose(found["part/last"], outputs["features"], atol=1e-5)


def test_weights_that_were_never_trained_are_known(tmp_path):
  made = text_models.export(tmp_path / "m", "marian")
  side = retention.Side(tune.combine, None, state.State(None, None, made.variables, {}, None, None),
                        {})
  run = types.SimpleNamespace(pretrained=made)
  assert retention.untrained(run, side)
  flat = tune.flatten(made.variables)
  path = next(path for path in flat if path.endswith("bias"))
  flat[path] = flat[path].at[0].add(1e-3)
  learnt = side.state.replace(trainable=tune.unflatten(flat))
  side = retention.Side(tune.combine, None, learnt, {})
  assert not retention.untrained(run, side)
  made.report.initialised = [path]  # a new head says nothing about the checkpoint
  assert retention.untrained(run, side)


def context(made, folder, tuned, trained):
  """What a run leaves of a model at a folder, with the trainable tree it ended with."""
  config = types.SimpleNamespace(
    model=models_section(str(folder)), seed=0, tune=types.SimpleNamespace(method="x"))
  run = types.SimpleNamespace(
    config=config, pretrained=made, task=types.SimpleNamespace(model_args={"head": "lm"}),
    mesh=mesh.make(types.SimpleNamespace(data=-1, fsdp=1, tensor=1)))
  final = averaging.Final(tuned, None, state.State(None, None, trained, {}, None, None),
                          tuned.frozen)
  return types.SimpleNamespace(run=run, tuned=tuned, final=final)


def models_section(source):
  section = {key: entry[0] for key, entry in models.KEYS.items()} | {"source": source}
  return type("Section", (dict,), {"__getattr__": dict.__getitem__})(section)


@pytest.mark.parametrize("method", ["full", "lora", "sparse half"])
def test_the_base_is_the_model_before_tuning(method, tmp_path):
  made = text_models.export(tmp_path / "m", "llama")
  ids = {"input_ids": jnp.array([[5, 6, 7, 8]])}
  before = made.module.apply(made.variables, **ids)["logits"]
  name = {"full": "full", "lora": "lora", "sparse half": "freeze"}[method]
  given = {"freeze": {"select": "last", "layers": 1}, "lora": {"rank": 4}}.get(name, {})
  section = configs.section("tune.method", name, given)
  tuned = tune.init(section, made.variables, jax.random.key(0), made.head, tune.Context(made))
  trained = jax.tree.map(lambda x: x + 0.1, tuned.trainable)
  base, after = retention.sides(context(made, tmp_path / "m", tuned, trained))
  assert (base.apply is after.apply) == (method != "lora")
  found = [side.apply(side.variables(), ids)[0]["logits"] for side in (base, after)]
  np.testing.assert_allclose(found[0], before, atol=1e-5)
  assert np.abs(found[1] - before).max() > 1e-2
  rows = retention.moved(tuned, base, after)
  went = {row["layer"]: row["relative"] for row in rows}
  if method == "full":
    kernels = tune.flatten(made.variables["params"]["layer_1"])
    size = np.sqrt(sum(np.square(leaf).sum() for leaf in kernels.values()))
    count = sum(leaf.size for leaf in kernels.values())
    assert went["layer_1"] == pytest.approx(0.1 * np.sqrt(count) / size, rel=1e-3)
  else:
    assert went["layer_1"] > 0 and went["token_embedding" if "token_embedding" in went else next(
      key for key in went if "embed" in key)] == 0
    assert (went["layer_0"] > 0) == (method == "lora")
