"""Carves honest splits: stratified, by whole groups, a function of the seed and the rows alone."""

import hashlib
import zlib
from collections.abc import Hashable, Sequence

import numpy as np


def units(*keys: Sequence[Hashable | None] | None, size: int) -> np.ndarray:
  """Numbers the sets of rows that must stay together.

  Args:
    *keys: for each criterion a key per row; rows that share a key of any criterion (directly or
      through other rows) belong together. None as a key, or as a whole criterion, ties nothing.
    size: the number of rows N.

  Returns:
    (N,) int: the same number for rows that belong together, numbered by first appearance.
  """
  parent = np.arange(size)

  def root(i):
    while parent[i] != i:
      parent[i] = parent[parent[i]]
      i = parent[i]
    return i

  for criterion in keys:
    first = {}
    for i, key in enumerate(criterion if criterion is not None else ()):
      if key is not None:
        a, b = root(first.setdefault(key, i)), root(i)
        parent[max(a, b)] = min(a, b)
  return np.unique([root(i) for i in range(size)], return_inverse=True)[1]


def carve(unit: np.ndarray, labels: Sequence[Hashable] | None, shares: dict[str, float],
          seed: int) -> dict[str, np.ndarray]:
  """Divides rows into named parts, no unit in two of them.

  Within each label the units are shuffled and dealt to whichever part lacks most rows, so each
  part has its share of every label to within a unit. The first unit of a label goes to the first
  part: no other part gets a label that the first one lacks. Adding a label does not reshuffle the
  others, and the order of the rows of other labels does not matter.

  Args:
    unit: (N,) int: which rows belong together; see `units`.
    labels: what to stratify by, one per row; None for no strata. A unit counts under its most
      frequent label.
    shares: part -> share of the rows, all > 0; the first one takes in what is needed to cover all
      labels.
    seed: decides the shuffle.

  Returns:
    part -> sorted (n,) int indices of rows.
  """
  members = _members(unit)
  strata: dict[str, list[int]] = {}
  for u, rows in enumerate(members):
    strata.setdefault(_majority(labels, rows), []).append(u)
  parts = list(shares)
  share = [shares[p] for p in parts]
  owed = [0.0] * len(parts)  # plain numbers: arrays this small are slow
  dealt = {p: [] for p in parts}
  for stratum in sorted(strata):
    rng = np.random.default_rng([seed, zlib.crc32(stratum.encode())])
    for place, u in enumerate(rng.permutation(strata[stratum])):
      size = len(members[u])
      owed = [o + s * size for o, s in zip(owed, share, strict=True)]
      to = 0 if place == 0 else max(range(len(parts)), key=owed.__getitem__)
      owed[to] -= size
      dealt[parts[to]].extend(members[u])
  return {p: np.sort(np.array(rows, int)) for p, rows in dealt.items()}


def sample(labels: Sequence[Hashable] | None, count: int, seed: int, size: int) -> np.ndarray:
  """Returns sorted indices of `count` of `size` rows (or all of them), stratified like `carve`."""
  if count >= size:
    return np.arange(size)
  shares = {"kept": count / size, "rest": 1 - count / size}
  kept = carve(np.arange(size), labels, shares, seed)["kept"]
  if len(kept) > count:  # more labels than rows to keep
    kept = np.sort(np.random.default_rng(seed).choice(kept, count, replace=False))
  return kept


def few(labels: Sequence[Hashable], count: int, seed: int) -> np.ndarray:
  """Returns sorted indices of up to `count` rows of each label, drawn by the seed."""
  rows: dict[str, list[int]] = {}
  for i, label in enumerate(labels):
    rows.setdefault(str(label), []).append(i)
  drawn = [np.random.default_rng([seed, zlib.crc32(label.encode())]).permutation(there)[:count]
           for label, there in rows.items()]
  return np.sort(np.concatenate(drawn))


def identity(value) -> Hashable:
  """Returns a key that duplicates share: of text up to case and white space, else of content."""
  if isinstance(value, str):
    value = " ".join(value.casefold().split()).encode("utf-8", "surrogatepass")
  elif isinstance(value, np.ndarray):
    value = f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
  elif not isinstance(value, bytes):
    value = repr(value).encode("utf-8", "surrogatepass")
  return hashlib.blake2b(value, digest_size=16).digest()


def _members(unit: np.ndarray) -> list[np.ndarray]:
  order = np.argsort(unit, kind="stable")
  return np.split(order, np.flatnonzero(np.diff(unit[order])) + 1) if len(unit) else []


def _majority(labels, rows) -> str:
  if labels is None:
    return ""
  counts: dict[str, int] = {}
  for row in rows:
    counts[str(labels[row])] = counts.get(str(labels[row]), 0) + 1
  return max(sorted(counts), key=counts.get)
