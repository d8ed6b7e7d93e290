"""Several LoRA adapters on one base: sums are exact, and merging can be undone."""

import jax
import numpy as np
import pytest
from tune import toys

from ft import errors, tune
from ft.tune import blend


def part(variables, weight, seed, **values):
  tuned = toys.init("lora", variables, **values)
  trainable = {"adapters": toys.shaken(tuned.trainable["adapters"], seed=seed)}
  return blend.Part(weight, toys.config("lora", **values), tuned, trainable)


def difference(variables, tuned, trainable):
  """{path: what merging adds to a leaf}, of the adapted layers."""
  rest = {key: value for key, value in tuned.trainable.items() if key != "adapters"}
  merged = tune.flatten(tuned.merge(tuned.frozen, {**rest, **trainable}))
  return {path: np.asarray(merged[path]) - leaf for path, leaf in tune.flatten(variables).items()
          if "kernel" in path or "embedding" in path}


@pytest.mark.parametrize("scanned", [False, True])
def test_weighted_sum_is_exact(scanned):
  _, variables, ids = toys.make(scanned=scanned)
  targets = ("query", "inner", "embeddings")
  parts = [part(variables, 0.75, 1, rank=2, alpha=3.0, targets=targets),
           part(variables, -0.5, 2, rank=3, alpha=4.0, scale="alpha/sqrt(r)", targets=targets,
                rank_pattern=("inner=1",))]
  values, tree = blend.combine(parts)
  together = toys.init("lora", variables, **values)
  shapes = jax.tree.map(np.shape, together.trainable["adapters"])
  assert jax.tree.map(np.shape, tree["adapters"]) == shapes
  ours = difference(variables, together, tree)
  each = [difference(variables, p.tuned, p.trainable) for p in parts]
  for path, leaf in ours.items():
    np.testing.assert_allclose(leaf, 0.75 * each[0][path] - 0.5 * each[1][path], atol=2e-6)
  assert max(np.abs(leaf).max() for leaf in ours.values()) > 0.05


def test_starts_from_the_weights_are_combined_as_what_they_add():
  _, variables, _ = toys.make()
  one = part(variables, 2.0, 1, rank=2, start="pissa")
  values, tree = blend.combine([one])
  assert values["rank"] == 4
  ours = difference(variables, toys.init("lora", variables, **values), tree)
  for path, leaf in difference(variables, one.tuned, one.trainable).items():
    np.testing.assert_allclose(ours[path], 2 * leaf, atol=2e-5)


@pytest.mark.parametrize("values", [{"targets": ("query", "embeddings")}, {"start": "olora"}])
def test_unmerge(values):
  _, variables, _ = toys.make(scanned="start" in values)
  tuned = toys.init("lora", variables, rank=2, **values)
  trainable = toys.shaken(tuned.trainable)
  merged = tuned.merge(tuned.frozen, trainable)
  back = tune.flatten(blend.unmerge(tuned, merged, trainable))
  assert back.keys() == tune.flatten(variables).keys()
  for path, leaf in tune.flatten(variables).items():
    if "classifier" in path:  # trained in full
      np.testing.assert_array_equal(back[path], tune.flatten(merged)[path])
    else:
      np.testing.assert_allclose(back[path], leaf, atol=1e-6)


def test_select():
  assert blend.select({"a": {"x": 1}, "b": {}}, "a") == {"x": 1}
  with pytest.raises(errors.UserError, match="no adapter 'german'.*did you mean 'German'.*French"):
    blend.select({"German": {}, "French": {}}, "german")


def test_messages():
  _, variables, _ = toys.make()
  with pytest.raises(errors.UserError, match="no adapter to combine"):
    blend.combine([])
  one, other = (part(variables, 1.0, 1, rank=2, targets=(t,)) for t in ("query", "key"))
  with pytest.raises(errors.UserError, match="different layers, such as adapters/encoder/layer_0"):
    blend.combine([one, other])
  dora = part(variables, 1.0, 1, rank=2, dora=True)
  with pytest.raises(errors.UserError, match="DoRA's update.*is no sum"):
    blend.combine([dora])
  with pytest.raises(errors.UserError, match="cannot be taken out"):
    blend.unmerge(dora.tuned, variables, dora.trainable)
