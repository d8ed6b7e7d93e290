"""The batch of a step is a pure function, every row comes once, and padding is small."""

import time

import numpy as np
import pytest

from ft import errors
from ft.data import loader

PAD = {"tokens": 0}


class Words:
  """Rows of token ids with a preprocessing that pads, counts and drops."""

  pad = PAD
  name = "words.csv"

  def __init__(self, lengths, bad=()):
    self.widths, self.bad, self.counts, self.reads = lengths, set(bad), {"long": 0}, 0

  def __len__(self):
    return len(self.widths)

  def __getitem__(self, i):
    return {"i": i, "n": self.widths[i]}

  def where(self, i):
    return f"words.csv: line {i + 2}"

  def __call__(self, row):
    self.reads += 1
    if row["i"] in self.bad:
      raise errors.RowError("no text")
    self.counts["long"] += row["n"] > 60
    return {"tokens": np.full(row["n"], row["i"] + 1, np.int32), "label": np.int32(row["i"] % 3)}

  def length(self, example):
    return len(example["tokens"])


def _words(n=103, bad=(), **kwargs):
  lengths = np.random.default_rng(7).integers(1, 65, n)
  words = Words(lengths, bad)
  return loader.prepare(words, words, **kwargs)


def _loader(n=103, batch_size=8, **kwargs):
  kwargs = {"seed": 3, "pad": PAD, "buckets": (16, 32, 64), "shuffle": True, **kwargs}
  return loader.Loader(_words(n), batch_size, **kwargs)


def _same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 103])
def test_every_row_once_an_epoch(n, shuffle):
  batches = _loader(n, shuffle=shuffle)
  for epoch in range(3):
    seen = [batches.batch(epoch * batches.steps_per_epoch + i)
            for i in range(batches.steps_per_epoch)]
    index = np.concatenate([b["index"] for b in seen])
    weight = np.concatenate([b["weight"] for b in seen])
    assert sorted(index[weight == 1]) == list(range(n))
    assert set(weight) <= {0.0, 1.0} and (index[weight == 0] == -1).all()
    assert all(len(b["weight"]) == 8 and b["weight"][0] == 1 for b in seen)


def test_rows_keep_their_own_content_and_index():
  batches = _loader()
  for step in range(batches.steps_per_epoch):
    batch = batches.batch(step)
    for row, index, label, weight in zip(
        batch["tokens"], batch["index"], batch["label"], batch["weight"], strict=True):
      if weight:
        n = batches.examples.lengths[index]
        assert (row[:n] == index + 1).all() and (row[n:] == 0).all() and label == index % 3


def test_index_is_the_row_of_the_split_also_after_drops():
  examples = _words(20, bad=[0, 5, 6])
  assert list(examples.indices) == [i for i in range(20) if i not in (0, 5, 6)]
  batch = loader.Loader(examples, 17, pad=PAD, shuffle=False).batch(0)
  assert sorted(batch["index"]) == list(examples.indices)
  for row, index in zip(batch["tokens"], batch["index"], strict=True):
    assert row[0] == index + 1


def test_batch_is_pure_and_seeded():
  a, b = _loader(), _loader()
  for step in [40, 3, 17, 3]:
    _same(a.batch(step), b.batch(step))
  order = [a.batch(i)["index"] for i in range(a.steps_per_epoch)]
  other = _loader(seed=4)
  assert any((x != other.batch(i)["index"]).any() for i, x in enumerate(order))
  assert any((x != a.batch(i + a.steps_per_epoch)["index"]).any() for i, x in enumerate(order))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 12, 13, 20])
def test_iterate_from_anywhere_equals_batch(start, prefetch):
  batches = _loader(prefetch=prefetch)
  got = list(batches.iterate(start, 30))
  assert len(got) == 30 - start
  for step, batch in enumerate(got, start):
    _same(batch, batches.batch(step))


def test_iterate_defaults_to_one_epoch_and_may_be_empty():
  batches = _loader()
  assert len(list(batches.iterate())) == batches.steps_per_epoch
  assert not list(batches.iterate(5, 5))


def test_put_is_applied_one_batch_ahead():
  batches, calls = _loader(), []

  def put(batch):
    calls.append(batch["index"])
    return batch["index"]

  stream = batches.iterate(2, 6, put=put)
  np.testing.assert_array_equal(next(stream), batches.batch(2)["index"])
  assert len(calls) == 2
  assert len(list(stream)) == 3 and len(calls) == 4


@pytest.mark.parametrize("n", [103, 97])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_the_batch(n, shuffle):
  whole = _loader(n, shuffle=shuffle, augment=_noise)
  parts = [_loader(n, shuffle=shuffle, augment=_noise, process_index=i, process_count=2)
           for i in range(2)]
  for step in range(2 * whole.steps_per_epoch):
    expected, got = whole.batch(step), [part.batch(step) for part in parts]
    _same(expected, {key: np.concatenate([g[key] for g in got]) for key in expected})


def _noise(example, rng):
  return {**example, "noise": rng.random(3, np.float32)}


def test_augmentation_depends_on_seed_epoch_and_row_only():
  def noise_by_row(batches, epoch):
    found = {}
    for i in range(batches.steps_per_epoch):
      batch = batches.batch(epoch * batches.steps_per_epoch + i)
      found |= {int(k): v for k, v in zip(batch["index"], batch["noise"], strict=True) if k >= 0}
    return np.array([found[k] for k in sorted(found)])

  base = noise_by_row(_loader(augment=_noise), 1)
  np.testing.assert_array_equal(base, noise_by_row(_loader(augment=_noise, batch_size=32), 1))
  assert len(np.unique(base[:, 0])) == len(base)
  assert (base != noise_by_row(_loader(augment=_noise), 0)).all()
  assert (base != noise_by_row(_loader(augment=_noise, seed=4), 1)).all()
  row = np.random.default_rng([3, 1, 11]).random(3, np.float32)
  np.testing.assert_array_equal(base[11], row)


def test_batches_are_padded_to_the_smallest_bucket_of_the_global_batch():
  batches = _loader(400)
  widths = set()
  for step in range(batches.steps_per_epoch):
    batch = batches.batch(step)
    longest = batches.examples.lengths[batch["index"][batch["weight"] == 1]].max()
    assert batch["tokens"].shape[1] == min(b for b in (16, 32, 64) if b >= longest)
    widths.add(batch["tokens"].shape[1])
  assert widths == {16, 32, 64}


def test_a_bucket_is_added_for_longer_rows():
  batches = _loader(buckets=(16,))
  longest = batches.examples.lengths.max()
  widths = {batches.batch(i)["tokens"].shape[1] for i in range(batches.steps_per_epoch)}
  assert longest > 16 and widths == {16, -(-longest // 8) * 8}


def test_evaluation_comes_in_order_of_length():
  batches = _loader(shuffle=False)
  got = list(batches.iterate())
  index = np.concatenate([b["index"] for b in got])
  assert (index[:103] == np.argsort(batches.examples.lengths, kind="stable")).all()
  assert (index[103:] == -1).all() and got[-1]["weight"].sum() == 103 % 8
  _same(got[0], batches.batch(batches.steps_per_epoch))  # the same in every epoch


def test_grouping_by_length_keeps_padding_small():
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(3.3, 0.7, 10_000), 2, 128).astype(int)
  words = Words(lengths)
  examples = loader.prepare(words, words)
  buckets = (16, 24, 32, 48, 64, 96, 128)

  def padding(examples_lengths, buckets):
    examples.lengths = examples_lengths
    batches = loader.Loader(examples, 32, seed=1, pad=PAD, buckets=buckets, shuffle=True)
    total = sum(batches.batch(i)["tokens"].size for i in range(batches.steps_per_epoch))
    return 1 - lengths.sum() / total

  naive = padding(np.full(10_000, 128), (128,))  # every batch as long as the longest row
  assert naive > 0.7
  assert padding(lengths, buckets) < 0.2


def test_short_batches_move_about_and_epochs_mix_the_neighbours():
  batches = _loader(1000, batch_size=10)
  neighbours = []
  for epoch in range(2):
    index = [batches.batch(epoch * 100 + i)["index"] for i in range(100)]
    neighbours.append({frozenset(row) for row in index})
    widths = [batches.batch(epoch * 100 + i)["tokens"].shape[1] for i in range(100)]
    assert len(set(widths[:20])) > 1  # lengths do not come in order
  assert len(neighbours[0] & neighbours[1]) < 5


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 10**9])
def test_cache_bounds_memory_and_changes_nothing(cache_bytes):
  words = Words(np.random.default_rng(7).integers(1, 65, 103))
  examples = loader.prepare(words, words, cache_bytes=cache_bytes)
  assert examples.cached == (cache_bytes == 10**9)
  assert sum(loader._size(e) for e in examples._cache.values()) <= cache_bytes
  batches = loader.Loader(examples, 8, seed=3, pad=PAD, buckets=(16, 32, 64), shuffle=True)
  reads = words.reads
  for step in range(5):
    _same(batches.batch(step), _loader().batch(step))
  assert words.reads - reads == {0: 40, 10**9: 0}.get(cache_bytes, words.reads - reads)


def test_worker_processes_give_the_same_batches():
  examples = _words(cache_bytes=0)
  kwargs = {"seed": 3, "pad": PAD, "buckets": (16, 32, 64), "shuffle": True, "augment": _noise}
  alone = loader.Loader(examples, 8, **kwargs)
  helped = loader.Loader(examples, 8, workers=2, **kwargs)
  stream = helped.iterate(5, 40)
  for step in range(5, 20):
    _same(next(stream), alone.batch(step))
  begin = time.monotonic()
  stream.close()
  assert time.monotonic() - begin < 10


class Vanishing(Words):
  """Rows of which one cannot be read any more after the first reading."""

  def __call__(self, row):
    if self.reads >= len(self) and row["i"] == 9:
      raise errors.RowError("file is gone")
    return super().__call__(row)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_lost_during_the_run_is_named(workers):
  words = Vanishing(np.full(40, 5))
  examples = loader.prepare(words, words, cache_bytes=0)
  batches = loader.Loader(examples, 4, pad=PAD, shuffle=True, workers=workers)
  with pytest.raises(errors.UserError, match="^words.csv: line 11: file is gone"):
    for _ in batches.iterate():
      pass


def test_closing_does_not_wait_for_what_is_in_preparation():
  def slow(example, rng):
    time.sleep(0.5)
    return example

  stream = _loader(batch_size=2, augment=slow, prefetch=2).iterate(0, 50)
  next(stream)
  begin = time.monotonic()
  stream.close()
  assert time.monotonic() - begin < 0.4


def test_counts_and_drops_are_reported():
  words = Words(np.array([61, 3, 64, 5, 62, 1]), bad=[2, 3])
  examples = loader.prepare(words, words)
  assert examples.report == {
      "rows": 6, "used": 4, "dropped": 2, "long": 2,
      "dropped_rows": ["words.csv: line 4: no text", "words.csv: line 5: no text"]}
  again = loader.prepare(words, words)  # counts are of this split, not of all read so far
  assert again.report["long"] == 2


def test_drop_policy_error_stops_at_the_first_row():
  with pytest.raises(errors.UserError, match="^words.csv: line 4: no text"):
    _words(10, bad=[7, 2], drop_policy="error")


def test_all_rows_dropped_names_reasons():
  with pytest.raises(errors.UserError, match="none of the 9 rows.*line 2: no text; .*line 6"):
    _words(9, bad=range(9))


def test_no_rows_at_all():
  with pytest.raises(errors.UserError, match="words.csv: there are no rows"):
    _words(0)


def test_rows_of_different_shape_are_named():
  def preprocess(row):
    size = 5 if row == 3 else 4
    return {"pixel_values": np.zeros((size, 4, 3), np.uint8), "label": np.int32(0)}

  preprocess.shape_hint = "Set data.size."
  with pytest.raises(errors.UserError) as e:
    loader.prepare(range(8), preprocess)
  assert str(e.value) == (
      "the data: the examples of a split must have one shape, these have 2: "
      "pixel_values 4x4x3 uint8 in 7 rows (first: row 0); "
      "pixel_values 5x4x3 uint8 in 1 row (first: row 3). Set data.size.")


@pytest.mark.parametrize("drop_policy", ["count", "error"])
def test_threads_change_nothing(drop_policy):
  bad = [200, 777]
  if drop_policy == "error":
    with pytest.raises(errors.UserError, match="^words.csv: line 202: no text"):
      _words(1000, bad, threads=4, drop_policy=drop_policy)
    return
  one, many = _words(1000, bad, threads=1), _words(1000, bad, threads=4)
  assert one.report["dropped_rows"] == many.report["dropped_rows"]
  np.testing.assert_array_equal(one.indices, many.indices)
  np.testing.assert_array_equal(one.lengths, many.lengths)
  _same(one[500], many[500])


@pytest.mark.parametrize("size,count", [(0, 1), (-4, 1), (9, 2)])
def test_batch_that_cannot_be_shared(size, count):
  with pytest.raises(errors.UserError, match=f"batch size {size} cannot.*multiple of {count}"):
    _loader(batch_size=size, process_count=count)


def test_cached_examples_cannot_be_written_to():
  def spoil(example, rng):
    example["tokens"][:] = 0
    return example

  with pytest.raises(ValueError, match="read-only"):
    _loader(augment=spoil).batch(0)


def test_without_lengths_rows_come_in_order_and_stack():
  examples = loader.prepare(range(10), lambda row: {"x": np.full((2, 2), row, np.uint8)})
  assert examples.lengths is None
  batches = loader.Loader(examples, 4)
  index = np.concatenate([b["index"] for b in batches.iterate()])
  assert list(index) == [*range(10), -1, -1]
  assert batches.batch(2)["x"].shape == (4, 2, 2)


def test_examples_at_hand():
  words = Words(np.array([5, 3, 9]))
  examples = loader.from_examples([words(words[i]) for i in range(3)], words)
  assert list(examples.lengths) == [5, 3, 9] and examples.cached
  batch = loader.Loader(examples, 4, pad=PAD, buckets=(16,)).batch(0)
  assert list(batch["index"]) == [1, 0, 2, -1] and batch["tokens"].shape == (4, 16)


def test_arrays_keep_their_row_index():
  arrays = {"features": np.arange(12.0).reshape(4, 3), "label": np.arange(4), "weight": np.ones(4),
            "index": np.array([2, 3, 5, 8])}
  examples = loader.from_arrays(arrays)
  batch = loader.Loader(examples, 4, shuffle=True).batch(0)
  assert sorted(batch["index"]) == [2, 3, 5, 8] and set(batch) == {
      "features", "label", "weight", "index"}
  for features, label, index in zip(batch["features"], batch["label"], batch["index"], strict=True):
    assert examples.indices[label] == index
    np.testing.assert_array_equal(features, arrays["features"][label])


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 10**9])
def test_take_draws_by_seed_and_keeps_the_rows(cache_bytes):
  examples = _words(103, bad=[4, 5], cache_bytes=cache_bytes)
  some, same = loader.take(examples, 20, 1), loader.take(examples, 20, 1)
  assert len(some) == len(some.indices) == len(some.lengths) == 20
  assert list(some.indices) == list(same.indices) == sorted(set(some.indices))
  assert list(some.indices) != list(loader.take(examples, 20, 2).indices)
  for i, row in enumerate(some.indices):
    assert some[i]["tokens"][0] == row + 1 and len(some[i]["tokens"]) == some.lengths[i]
  assert len(loader.take(examples, 1000, 1)) == 101


def test_in_order_is_the_plain_loader():
  training, plain = _loader(augment=_noise), _loader(shuffle=False)
  training.batch(0)
  for step in range(plain.steps_per_epoch):
    _same(training.in_order().batch(step), plain.batch(step))
  assert "noise" in training.batch(0)
