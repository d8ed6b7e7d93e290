"""Packing: several examples in one row, so that a step computes little padding.

Each token of a packed row keeps its document's number (`segment_ids`, from 1, 0 is padding) and its
place there (`position_ids`, from 0); attention stays within a document, and a document's last token
predicts nothing, so the loss is that of the examples one by one. Shapes: N examples.
"""

import bisect
import collections

import numpy as np
from absl import logging

KEYS_ADDED = ("segment_ids", "position_ids")


def best_fit(lengths, size: int) -> list[list[int]]:
  """Puts lengths (N,) into as few bins of a size as best-fit decreasing does (Johnson 1974).

  The longest go first, each into the fullest bin that it still fits. O(N log N).

  Returns:
    The positions in `lengths` that each bin holds, in order.
  """
  bins, room, free = [], collections.defaultdict(list), []  # space left -> bins; sorted spaces
  for i in map(int, np.argsort(-np.asarray(lengths), kind="stable")):
    length = int(lengths[i])
    at = bisect.bisect_left(free, length)
    if at == len(free):
      number, left = len(bins), size
      bins.append([])
    else:
      left = free[at]
      number = room[left].pop()
      if not room[left]:
        del free[at]
    bins[number].append(i)
    left -= length
    if left > 0:
      if not room[left]:
        bisect.insort(free, left)
      room[left].append(number)
  return [sorted(one) for one in bins]


def pack(examples, keys, size: int) -> "Packed":
  """Returns examples packed into rows of up to `size` tokens.

  Args:
    examples: loader.Examples.
    keys: of the arrays (tokens, …) that are joined; what else an example has is left out.
    size: most tokens of a row; no example is longer.
  """
  packed = Packed(examples, tuple(keys), best_fit(examples.lengths, size))
  logging.log_first_n(
      logging.INFO, "packing: %d rows of train into %d rows of up to %d tokens, %.1f %% full", 1,
      len(examples), len(packed), size, 100 * packed.lengths.sum() / (size * len(packed)))
  return packed


class Packed:
  """What `loader.Examples` are to a Loader, of several examples each.

  Attributes:
    indices: (bins,) row index of the first example in each bin.
    lengths: (bins,) tokens.
    report: that of the examples.
    rows_each: mean examples in a bin.
  """

  def __init__(self, examples, keys, bins):
    self._examples, self._keys, self._bins = examples, keys, bins
    self.indices = np.array([examples.indices[one[0]] for one in bins], np.int64)
    self.lengths = np.array([examples.lengths[one].sum() for one in bins], np.int64)
    self.report, self.rows_each = examples.report, len(examples) / len(bins)

  def __len__(self):
    return len(self._bins)

  def __getitem__(self, i: int) -> dict:
    """Returns the arrays (tokens, …) of a bin's examples, joined, with KEYS_ADDED."""
    parts = [self._examples[j] for j in self._bins[i]]
    sizes = [len(part["input_ids"]) for part in parts]
    joined = {key: np.concatenate([part[key] for part in parts])
              for key in self._keys if key in parts[0]}
    segments = np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), sizes)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
    return {**joined, "segment_ids": segments, "position_ids": positions}

  @property
  def cached(self) -> bool:
    """Whether every example is in memory."""
    return self._examples.cached
