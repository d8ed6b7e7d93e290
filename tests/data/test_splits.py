"""Carved splits are stratified, keep groups whole, and depend on nothing but rows and seed."""

import collections

import numpy as np
import pytest

from ft.data import splits

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def test_units_are_joined_through_any_criterion():
  unit = splits.units(["a", "b", "a", None, None, "c"], [1, 2, 3, 3, 4, None], size=6)
  assert unit.tolist() == [0, 1, 0, 0, 2, 3]
  assert splits.units(None, None, size=3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_every_row_once_and_each_label_in_its_share(seed):
  rng = np.random.default_rng(seed)
  labels = rng.choice(list("abcde"), 1000, p=[0.5, 0.3, 0.15, 0.04, 0.01]).tolist()
  parts = splits.carve(np.arange(1000), labels, SHARES, seed)
  assert sorted(np.concatenate(list(parts.values()))) == list(range(1000))
  total = collections.Counter(labels)
  for name, share in SHARES.items():
    assert abs(len(parts[name]) - share * 1000) <= 2
    counts = collections.Counter(labels[i] for i in parts[name])
    assert all(abs(counts[c] - share * n) <= 2 for c, n in total.items())


@pytest.mark.parametrize("seed", range(5))
def test_groups_never_straddle(seed):
  rng = np.random.default_rng(seed)
  groups = rng.integers(0, 60, 1000)
  labels = rng.choice(["x", "y"], 1000).tolist()
  parts = splits.carve(splits.units(groups.tolist(), size=1000), labels, SHARES, seed)
  owners = [set(groups[rows]) for rows in parts.values()]
  assert sum(map(len, owners)) == len(set(groups))
  assert all(abs(len(parts[n]) / 1000 - s) < 0.06 for n, s in SHARES.items())


def test_the_first_part_has_every_label():
  labels = [str(i // 2) for i in range(40)] + ["single"]
  for seed in range(10):
    parts = splits.carve(np.arange(41), labels, SHARES, seed)
    assert {labels[i] for i in parts["train"]} == set(labels)


def test_a_function_of_seed_and_rows():
  labels = ["a", "b"] * 50
  first, again, other = (splits.carve(np.arange(100), labels, SHARES, s) for s in (1, 1, 2))
  assert all(np.array_equal(first[n], again[n]) for n in SHARES)
  assert any(not np.array_equal(first[n], other[n]) for n in SHARES)


def test_sample_is_stratified_and_exact():
  labels = ["a"] * 900 + ["b"] * 100
  kept = splits.sample(labels, 50, 0, 1000)
  assert len(kept) == 50
  assert 4 <= sum(labels[i] == "b" for i in kept) <= 6
  assert len(splits.sample([str(i) for i in range(100)], 7, 0, 100)) == 7
  assert splits.sample(None, 10, 0, 4).tolist() == [0, 1, 2, 3]


def test_identity():
  assert splits.identity("Good  Film\n") == splits.identity("good film")
  assert splits.identity("good film") != splits.identity("good films")
  image = np.zeros((2, 2), np.uint8)
  assert splits.identity(image) == splits.identity(image.copy())
  assert splits.identity(image) != splits.identity(image.reshape(4))
