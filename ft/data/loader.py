"""Rows become examples, examples become batches; the batch of a step is a pure function.

`Loader.batch(step)` depends on nothing but (seed, step) and the examples, so the state of the input
pipeline is one integer: resuming at a step, another number of workers and another number of
processes all give the same rows in the same order with the same augmentation.
"""

import concurrent.futures
import copy
import multiprocessing.connection
import os
import signal
import threading
import time

import numpy as np
from absl import flags, logging

from ft import errors

KEYS = {
    "workers": (0, "processes that read rows not kept in memory; 0 = threads only", (0, 128)),
    "prefetch": (2, "batches made ahead of the step, each in a thread of its own", (0, 64)),
    "cache_bytes": (2_000_000_000, "bytes of examples kept in memory; others are read again",
                    (0, None)),
    "drop": ("count", "rows that cannot be used: leave out and count, or stop at the first",
             ["count", "error"]),
}

WINDOW = 50  # batches whose rows are sorted by length together
NAMED_ROWS = 5  # dropped rows that the report and the error name
CHUNK = 32  # rows a thread of `prepare` takes at a time


def prepare(rows, preprocess_fn, *, preprocess=None, drop_policy="count",
            cache_bytes=2_000_000_000, threads=None) -> "Examples":
  """Preprocesses every row once: finds what cannot be used, the lengths, and fills the cache.

  Args:
    rows: `len(rows)` rows, `rows[i] -> dict`; `rows.where(i)` and `rows.name` name them if present.
    preprocess_fn: row -> dict of numpy arrays; raises RowError for a row that cannot be used.
    preprocess: the modality's Preprocess, whose `pad`, `length`, `counts`, `shape_hint` and
      `threaded` are used; by default preprocess_fn itself as far as it has them.
    drop_policy: "count" leaves unusable rows out and counts them, "error" stops at the first.
    cache_bytes: bytes of examples to keep in memory.
    threads: how many threads preprocess; by default one, or one a core (eight at most) where
      `preprocess.threaded` says that it is safe and gains.

  Returns:
    Examples.

  Raises:
    UserError: no row is left; one cannot be used and drop_policy is "error"; or examples differ
      in keys, types or fixed shapes, so that they cannot be stacked.
  """
  preprocess = preprocess_fn if preprocess is None else preprocess
  pad = getattr(preprocess, "pad", {})
  before = dict(getattr(preprocess, "counts", {}))
  name = getattr(rows, "name", "the data")
  if not len(rows):
    raise errors.UserError(f"{name}: there are no rows")

  kept, cache, lengths, dropped = [], {}, [], []
  shapes = {}  # signature -> [how many, first row]
  room, told = cache_bytes, time.monotonic()
  threads = threads or (
      min(8, os.cpu_count() or 1) if getattr(preprocess, "threaded", False) else 1)
  for i, example in _examples(rows, preprocess_fn, threads):
    if isinstance(example, errors.RowError):
      if drop_policy == "error":
        raise errors.UserError(
          f"{_place(rows, i)}: {example} (data.drop='count' leaves such rows out)")
      dropped.append((i, str(example)))
      continue
    shapes.setdefault(_signature(example, pad), [0, i])[0] += 1
    if pad:
      lengths.append(preprocess.length(example))
    room -= _size(example)
    if room >= 0:
      cache[len(kept)] = example
    kept.append(i)
    if time.monotonic() - told > 20:
      told = time.monotonic()
      logging.info("%s: %d of %d rows read", name, i, len(rows))

  named = [f"{_place(rows, i)}: {reason}" for i, reason in dropped[:NAMED_ROWS]]
  if not kept:
    raise errors.UserError(
        f"{name}: none of the {len(rows)} rows can be used: " + "; ".join(named))
  if len(shapes) > 1:
    raise errors.UserError(_differ(rows, name, shapes, getattr(preprocess, "shape_hint", "")))
  after = getattr(preprocess, "counts", {})
  report = {"rows": len(rows), "used": len(kept), "dropped": len(dropped), "dropped_rows": named,
            **{key: n - before.get(key, 0) for key, n in after.items()}}
  if dropped:
    logging.warning("%s: %d of %d rows left out: %s",
                    name, len(dropped), len(rows), "; ".join(named))
  for key, n in report.items():
    if key in after and n:
      logging.warning("%s: %d of %d rows: %s", name, n, len(rows), key.replace("_", " "))
  return Examples(rows, preprocess_fn, np.array(kept, np.int64),
                  np.array(lengths, np.int64) if pad else None, report, cache)


def from_examples(examples, preprocess) -> "Examples":
  """Takes examples that are at hand, as `preprocess` made them, row i being examples[i]."""
  lengths = [preprocess.length(e) for e in examples] if preprocess.pad else None
  return _in_memory(examples, np.arange(len(examples)), lengths)


def from_arrays(arrays: dict) -> "Examples":
  """Takes the examples of a split from arrays (N, …).

  Args:
    arrays: key -> (N, …); "index" (N,), where it is there, gives the row indices.
  """
  values = {key: value for key, value in arrays.items() if key not in ("index", "weight")}
  n = len(next(iter(values.values())))
  examples = [{key: value[i] for key, value in values.items()} for i in range(n)]
  return _in_memory(examples, arrays.get("index", np.arange(n)), None)


def take(examples: "Examples", n: int, seed: int) -> "Examples":
  """Returns n of the examples, drawn by the seed, in the order of their rows; all if n is more."""
  if n >= len(examples):
    return examples
  chosen = np.sort(np.random.default_rng(seed).permutation(len(examples))[:n])
  return examples.select(chosen)


class Examples:
  """The usable rows of a split as examples, those that fit kept in memory.

  Attributes:
    indices: (N,) row index in the split's rows of each example.
    lengths: (N,) length of each example, None where examples have no variable length.
    report: counts of rows, used, dropped, the first dropped rows, and what preprocessing counted.
  """

  def __init__(self, rows, preprocess_fn, indices, lengths, report, cache):
    self._rows, self._preprocess_fn, self._cache, self._more = rows, preprocess_fn, cache, {}
    self.indices, self.lengths, self.report = indices, lengths, report

  def __len__(self):
    return len(self.indices)

  def __getitem__(self, i: int) -> dict:
    """Returns example i, to be read only: it may be the one in the cache."""
    example = self._read(i)
    return example | {key: values[i] for key, values in self._more.items()} if self._more else (
        example)

  def _read(self, i: int) -> dict:
    if i in self._cache:
      return self._cache[i]
    row = int(self.indices[i])
    try:
      return self._preprocess_fn(self._rows[row])
    except errors.RowError as e:  # it was readable when the run began
      raise errors.UserError(f"{_place(self._rows, row)}: {e}") from e

  @property
  def rows(self):
    """The split's rows, which `indices` count; None of examples that were not made of rows."""
    return self._rows

  @property
  def cached(self) -> bool:
    """Whether every example is in memory."""
    return len(self._cache) == len(self)

  def select(self, positions) -> "Examples":
    """Returns these of the examples, (M,) positions among them, with the same cache entries."""
    cache = {new: self._cache[i] for new, i in enumerate(map(int, positions)) if i in self._cache}
    report = {"rows": self.report.get("rows", len(self)), "used": len(positions)}
    chosen = Examples(self._rows, self._preprocess_fn, self.indices[positions],
                      None if self.lengths is None else self.lengths[positions], report, cache)
    return chosen.joined({key: values[positions] for key, values in self._more.items()})

  def joined(self, arrays: dict) -> "Examples":
    """Returns the examples, each with its row of some arrays (N, …) beside its own keys."""
    made = Examples(self._rows, self._preprocess_fn, self.indices, self.lengths, self.report,
                    self._cache)
    made._more = {**self._more, **arrays}
    return made

  def __getstate__(self):
    # Worker processes are sent the rows, not the cache: they exist to read what is not in it.
    return {**self.__dict__, "_cache": {}}


class Loader:
  """Batches of examples, each a function of (seed, epoch, index in the epoch).

  A batch has the examples' keys, "weight" (B,) float32 and "index" (B,) int32. Every example comes
  once an epoch with weight 1; the rows that fill up the last batch are copies with weight 0 and
  index -1. With lengths, rows of like length share a batch, which is padded to the smallest bucket
  that holds the longest row of the global batch.

  Attributes:
    beside: key -> Loader whose batch of the same step stands in the batch under that key.
  """

  def __init__(self, examples, batch_size, *, seed=0, pad=None, buckets=(), augment=None,
               shuffle=False, process_index=0, process_count=1, workers=0, prefetch=2):
    """Makes a loader of this process's part of each batch.

    Args:
      examples: Examples, or anything with `len`, `[i]`, `lengths` and `indices`.
      batch_size: rows of the global batch.
      seed: of the order and of the augmentation.
      pad: key -> value that fills the key's axis 0 up to the bucket.
      buckets: lengths to pad to; one that holds the longest example is added where there is none.
      augment: (example, np.random.Generator) -> example; must not change the example it is given.
      shuffle: a new order in each epoch; else the rows come by length, ties in their own order.
      process_index: this process.
      process_count: number of processes that share a batch.
      workers: processes that read what is not in memory.
      prefetch: batches made ahead.

    Raises:
      UserError: batch_size is no positive multiple of process_count.
    """
    if batch_size < 1 or batch_size % process_count:
      raise errors.UserError(
          f"batch size {batch_size} cannot be shared evenly by {process_count} "
          f"process{'es' if process_count > 1 else ''}: use a positive multiple of {process_count}")
    self.examples, self.batch_size, self.seed, self.shuffle = examples, batch_size, seed, shuffle
    self.steps_per_epoch = -(-len(examples) // batch_size)
    self._pad, self._augment = dict(pad or {}), augment
    self._lengths = examples.lengths if self._pad else None
    self._buckets = _cover(buckets, self._lengths)
    part = batch_size // process_count
    self._part = slice(process_index * part, (process_index + 1) * part)
    self._workers, self._prefetch = workers, prefetch
    self._plans = {}
    self.beside = {}

  def in_order(self) -> "Loader":
    """Returns a loader of the same batches' size without shuffling, augmentation and company."""
    other = copy.copy(self)
    other.shuffle, other._augment, other._plans, other.beside = False, None, {}, {}
    return other

  def batch(self, step: int) -> dict:
    """Returns this process's part of the batch of a step (counted over all epochs).

    Returns:
      dict of arrays whose first axis is batch_size / process_count.
    """
    epoch, index = divmod(step, self.steps_per_epoch)
    plan = self._plan(epoch)[index]
    part = plan[self._part]
    # A copy fills up, not a blank: a row whose mask is empty would divide zero by zero.
    filled = np.where(part < 0, plan[0], part)
    examples = [self._example(epoch, int(i)) for i in filled]
    width = None
    if self._pad:
      longest = self._lengths[plan[plan >= 0]].max()
      width = min(b for b in self._buckets if b >= longest)
    batch = {key: self._stack(key, [e[key] for e in examples], width) for key in examples[0]}
    batch["weight"] = (part >= 0).astype(np.float32)
    batch["index"] = np.where(part < 0, -1, self.examples.indices[part]).astype(np.int32)
    return batch | {key: other.batch(step) for key, other in self.beside.items()}

  def iterate(self, start_step=0, stop_step=None, *, put=None):
    """Yields the batches of the steps start_step … stop_step - 1, made ahead in the background.

    Closing the generator drops what is in preparation without waiting for it.

    Args:
      start_step: first step.
      stop_step: step to stop before; None = the end of the first epoch.
      put: applied to each batch one step before its turn, so that a copy to the device overlaps
        with the step before.

    Yields:
      What `batch` returns, or `put` of it.
    """
    stop_step = self.steps_per_epoch if stop_step is None else stop_step
    if start_step >= stop_step:
      return
    iterator = iter(self._dataset(start_step, stop_step))
    try:
      if put is None:
        yield from iterator
        return
      waiting = put(next(iterator))
      for batch in iterator:
        ready, waiting = waiting, put(batch)
        yield ready
      yield waiting
    finally:
      iterator.close()

  def _dataset(self, start, stop):
    import grain
    steps = grain.MapDataset.range(start, stop).map(self.batch)
    # Starting a process takes seconds: not for a few batches, nor to copy from memory.
    if self._workers and not self.examples.cached and stop - start > 4 * self._workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, which no main has parsed here
      batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
      return batches.mp_prefetch(grain.MultiprocessingOptions(
          num_workers=self._workers, per_worker_buffer_size=max(1, self._prefetch)),
          _start_worker).map(_own)
    return steps.to_iter_dataset(grain.ReadOptions(
        num_threads=self._prefetch, prefetch_buffer_size=self._prefetch))

  def _plan(self, epoch):
    """Returns (steps_per_epoch, batch_size): the examples of each batch, -1 where there is none."""
    epoch = epoch if self.shuffle else 0
    plan = self._plans.get(epoch)
    if plan is None:
      plan = self._make_plan(epoch)
      # Two epochs: batches made ahead reach into the next one.
      self._plans = {**{e: p for e, p in self._plans.items() if abs(e - epoch) <= 1}, epoch: plan}
    return plan

  def _make_plan(self, epoch):
    n, size = len(self.examples), self.batch_size
    # The spawn key keeps this stream apart from the rows' own, which are seeded [seed, epoch, row].
    rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch], spawn_key=(0,)))
    order = rng.permutation(n) if self.shuffle else np.arange(n)
    if self._lengths is not None:
      window = WINDOW * size if self.shuffle else n
      order = np.concatenate([
          part[np.argsort(self._lengths[part], kind="stable")]
          for part in np.split(order, range(window, n, window))])
    plan = np.full(self.steps_per_epoch * size, -1, np.int64)
    plan[:n] = order
    plan = plan.reshape(self.steps_per_epoch, size)
    return plan[rng.permutation(len(plan))] if self.shuffle and self._lengths is not None else plan

  def _example(self, epoch, i):
    example = self.examples[i]
    if self._augment is None:
      return example
    return self._augment(
        example, np.random.default_rng([self.seed, epoch, int(self.examples.indices[i])]))

  def _stack(self, key, values, width):
    if key not in self._pad:
      return np.stack(values)
    first = np.asarray(values[0])
    out = np.full((len(values), width, *first.shape[1:]), self._pad[key], first.dtype)
    for row, value in zip(out, values, strict=True):
      row[:len(value)] = value
    return out


def _in_memory(examples, indices, lengths):
  report = {"rows": len(examples), "used": len(examples), "dropped": 0, "dropped_rows": []}
  return Examples(None, None, np.asarray(indices, np.int64),
                  None if lengths is None else np.array(lengths, np.int64), report,
                  dict(enumerate(examples)))


def _own(batch):
  """Copies a batch out of the memory shared with a worker, which is scarce in containers."""
  return {key: _own(value) if isinstance(value, dict) else np.array(value)
          for key, value in batch.items()}


def _start_worker(unused_index, unused_count):
  """Makes a worker process end when its parent is gone, and only then or when told to."""
  # A signal to the whole process group must leave the parent the batches of its last steps.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  def watch():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)  # killed parents tell nobody to stop

  threading.Thread(target=watch, daemon=True).start()


def _examples(rows, preprocess_fn, threads):
  """Yields (row index, example or its RowError) in the order of the rows."""

  def read(start):
    return [(i, _try(rows, preprocess_fn, i)) for i in range(start, min(start + CHUNK, len(rows)))]

  if threads == 1:
    for start in range(0, len(rows), CHUNK):
      yield from read(start)
    return
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    window = CHUNK * threads * 4  # bounds what is read but not yet taken
    for start in range(0, len(rows), window):
      for chunk in pool.map(read, range(start, min(start + window, len(rows)), CHUNK)):
        yield from chunk
  finally:
    pool.shutdown(cancel_futures=True)


def _try(rows, preprocess_fn, i):
  try:
    example = preprocess_fn(rows[i])
  except errors.RowError as e:
    return e
  example = {key: np.asarray(value) for key, value in example.items()}
  for value in example.values():
    value.flags.writeable = False  # an augmentation that wrote into the cache would never show
  return example


def _place(rows, i):
  return rows.where(i) if hasattr(rows, "where") else f"row {i}"


def _size(example):
  return sum(value.nbytes + 150 for value in example.values()) + 250  # array and dict objects


def _signature(example, pad):
  return tuple((key, value.shape[1:] if key in pad else value.shape, value.dtype.name)
               for key, value in sorted(example.items()))


def _differ(rows, name, shapes, hint):
  def show(signature):
    return ", ".join(f"{key} {'x'.join(map(str, shape)) or 'scalar'} {dtype}"
                     for key, shape, dtype in signature)

  found = sorted(shapes.items(), key=lambda item: -item[1][0])
  common = set.intersection(*(set(signature) for signature in shapes))
  listed = "; ".join(
      f"{show([part for part in signature if part not in common])} in {count} "
      f"row{'s' if count > 1 else ''} (first: {_place(rows, i)})"
      for signature, (count, i) in found[:NAMED_ROWS])
  return (f"{name}: the examples of a split must have one shape, these have {len(shapes)}: {listed}"
          + (f". {hint}" if hint else ""))


def _cover(buckets, lengths):
  """Returns the buckets in order, one that holds the longest example among them."""
  buckets = sorted(set(buckets))
  if lengths is None or (buckets and buckets[-1] >= lengths.max()):
    return buckets
  return [*buckets, int(-(-lengths.max() // 8) * 8)]
