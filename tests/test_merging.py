"""Merging against cases worked out by hand, and what may not be merged."""

import jax.numpy as jnp
import numpy as np
import pytest

from ft import errors, merging


def leaves(*values, **more):
  return {"params/a": np.float32(values)} | {f"params/{k}": np.float32(v) for k, v in more.items()}


def same(found, *values, path="params/a", rtol=1e-6):
  np.testing.assert_allclose(found[path], values, rtol=rtol, atol=1e-7)


def test_a_soup_of_one_is_itself():
  rng = np.random.default_rng(0)
  one = {"params/a": rng.standard_normal((7, 3)).astype(np.float32),
         "params/b": jnp.asarray(rng.standard_normal(5), jnp.bfloat16), "params/n": np.int32([3])}
  for soup in (merging.mean([one]), merging.greedy([one], lambda weights: 0.0)[0]):
    for path, leaf in one.items():
      assert soup[path].dtype == leaf.dtype
      assert np.asarray(soup[path]).tobytes() == np.asarray(leaf).tobytes()


def test_uniform_and_weighted_soups():
  models = [leaves(1, 2), leaves(3, -2), leaves(5, 6)]
  same(merging.mean(models), 3, 2)
  same(merging.mean(models, [1, 0, 3]), 4, 5)
  half = [{"params/a": jnp.asarray([1.0, 1.0], jnp.bfloat16)},
          {"params/a": jnp.asarray([1.0, 2.0], jnp.bfloat16)}]
  assert merging.mean(half)["params/a"].dtype == jnp.bfloat16
  with pytest.raises(errors.UserError, match="3 models need as many weights"):
    merging.mean(models, [1, 2])


def test_greedy_soup_goes_from_the_best_and_refuses_what_harms():
  models = [leaves(0.0), leaves(4.0), leaves(-9.0), leaves(2.0)]
  seen = []

  def evaluate(weights):  # best at 3.2: models rank 1, 3, 0, 2
    seen.append(float(weights["params/a"][0]))
    return -abs(seen[-1] - 3.2)

  soup, chosen = merging.greedy(models, evaluate)
  # 4 alone: -0.8; with 2: 3, -0.2, kept; with 0: 2, refused; with -9: -1, refused.
  assert chosen == [1, 3] and seen[:4] == [0, 4, -9, 2] and seen[4:] == [3, 2, -1]
  same(soup, 3)


def test_task_arithmetic_adds_what_was_learnt():
  base = leaves(1, 1, 1)
  models = [leaves(2, 1, 1), leaves(1, 4, 1)]
  same(merging.arithmetic(base, models, 1.0), 2, 4, 1)
  same(merging.arithmetic(base, models), 1.5, 2.5, 1)
  same(merging.arithmetic(base, models[:1], -1.0), 0, 1, 1)


def test_a_head_the_base_lacks_is_averaged():
  models = [leaves(2, head=[2]), leaves(4, head=[6])]
  for found in (merging.arithmetic(leaves(1), models, 1.0), merging.ties(leaves(1), models, 1.0),
                merging.dare(leaves(1), models, 0.0)):
    same(found, 4, path="params/head")


def test_ties_trims_elects_and_averages():
  base = leaves(0, 0, 0, 0, b=[0, 0])
  one = leaves(4, -3, 0.1, 2, b=[0.2, -5])
  two = leaves(2, 5, 3, 0.1, b=[0.3, -1])
  # Half of six stays: one keeps 4, -3, -5; two keeps 2, 5, 3 (over both leaves together).
  # Signs of the sums: 4+2 > 0, -3+5 > 0, 3 > 0, 0, 0, -5 < 0.
  found = merging.ties(base, [one, two], density=0.5)
  same(found, 3, 5, 3, 0)
  same(found, 0, -5, path="params/b")
  same(merging.ties(base, [one, two], density=0.5, scale=0.5), 1.5, 2.5, 1.5, 0)
  same(merging.ties(leaves(1, 1), [leaves(3, 0)], density=1.0), 3, 0)


def test_dare_drops_and_keeps_the_mean():
  base, one = leaves(*[1] * 4000), leaves(*[3] * 4000)
  found = merging.dare(base, [one], drop=0.75, seed=3)["params/a"]
  assert set(np.unique(found)) == {1.0, 9.0}
  assert (found == 1).mean() == pytest.approx(0.75, abs=0.03)
  assert found.mean() == pytest.approx(3, abs=0.25)
  np.testing.assert_array_equal(found, merging.dare(base, [one], drop=0.75, seed=3)["params/a"])
  same(merging.dare(leaves(1, 1), [leaves(2, 1), leaves(1, 5)], drop=0.0, scale=1.0), 2, 5)


def test_slerp_keeps_to_the_circle():
  one, other = leaves(1, 0), leaves(0, 1)
  same(merging.slerp(one, other, 0.5), 0.5**0.5, 0.5**0.5)
  third = np.pi / 6
  same(merging.slerp(one, other, 1 / 3), np.cos(third), np.sin(third))
  same(merging.slerp(leaves(1, 2), leaves(2, 4), 0.25), 1.25, 2.5)  # parallel: the line
  same(merging.slerp(leaves(0, 0), leaves(2, 4), 0.5), 1, 2)
  for t, end in ((0, one), (1, other)):
    assert merging.slerp(one, other, t)["params/a"] is end["params/a"]


def test_models_that_differ_are_named_with_the_first_path():
  with pytest.raises(errors.UserError, match=r"x and y .* params/a is \(2,\) and \(3,\)"):
    merging.check([leaves(1, 2), leaves(1, 2, 3)], ["x", "y"])
  with pytest.raises(errors.UserError, match="only y has params/b"):
    merging.check([leaves(1), leaves(1, b=[1], c=[1])], ["x", "y"])
  with pytest.raises(errors.UserError, match="at least 2 models, 1 given"):
    merging.check([leaves(1)], least=2)
  with pytest.raises(errors.UserError, match="the base has none of the models' parameters"):
    merging.arithmetic({"params/z": np.float32([1])}, [leaves(1)])
  with pytest.raises(errors.UserError, match="density=0"):
    merging.ties(leaves(1), [leaves(2)], density=0.0)
