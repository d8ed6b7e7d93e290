"""Rows that are the same, or nearly: exact keys, embeddings, MinHash of texts, hashes of images.

Every finder returns pairs (query, reference) of row numbers with their similarity. Nothing of size
queries x references is ever held: embeddings are compared in blocks, texts and images only where a
part of their hash agrees. Shapes: N queries, M references, D features.
"""

import collections
import dataclasses
import pathlib
import re
import unicodedata

import numpy as np

from ft import errors, thumbnails
from ft.data import image, sources, splits

SHINGLE = 4  # characters
CHARACTERS = 2000  # of a text that are compared
_BANDS, _ROWS = 32, 4  # texts of Jaccard .6 meet with probability .99, those of .2 with .05
_SHINGLES = 3_000_000  # kept in all; of more, the same share of each text, by their hash
_CROWD = 200  # texts of one band that a text is compared with
_RANDOM = 20_000  # pairs of rows that tell whether features set rows apart
_BLOCK = 1024, 8192  # queries, references
_SIDE, _WAVES = 32, 8  # pixels of the picture that is hashed, and cosine waves of it along a side
_PLAIN = 2.0  # standard deviation of the pixels of a picture, below which it is like any other
_LONGEST = 160


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Pairs of similar rows, each found once.

  Attributes:
    query, reference: (P,) row numbers. similarity: (P,) in the finder's measure.
    cut: texts that share a band with more others than they were compared with.
  """

  query: np.ndarray
  reference: np.ndarray
  similarity: np.ndarray
  cut: int = 0

  def nearest(self, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (size,) the most similar reference of each query, -1 without one; its similarity."""
    order = np.argsort(self.similarity, kind="stable")
    found, value = np.full(size, -1), np.zeros(size)
    found[self.query[order]] = self.reference[order]
    value[self.query[order]] = self.similarity[order]
    return found, value


# ---- What is compared of a row -------------------------------------------------------------------


def text(row: dict) -> str | None:
  """Returns what a model reads of a row of text, and None where it reads none."""
  parts = [_flat(row.get(role)) for role in ("text", "text_b", "words", "turns", "prompt")]
  if not any(parts):  # of preferences without a prompt, both are whole conversations
    parts = [_flat(row.get(role)) for role in ("chosen", "completion")]
  return " ".join(filter(None, parts)) or None


def excerpt(row: dict) -> str:
  """Returns the beginning of a row's text for people to recognise it by; "" without one."""
  found = " ".join((text(row) or "").split())
  return found if len(found) <= _LONGEST else found[:_LONGEST - 1] + "…"


def normal(value: str) -> str:
  """Returns a text without case, punctuation, repeated white space and forms of characters."""
  folded = unicodedata.normalize("NFKC", value).casefold()
  return " ".join(re.sub(r"[^\w\s]", "", folded).split()) or " ".join(folded.split())


def contents(rows) -> list[bytes | None]:
  """Returns a key a row that equal rows share: of normalised text, of bytes of images and sounds.

  Rows of tables are equal where all columns are that the model reads. Only files of one size can be
  equal, so only those are read. None where a row has neither text nor image nor sound nor columns,
  or its file cannot be read.

  Args:
    rows: iterable of dicts of role -> value.
  """
  parts, sizes = [], collections.Counter()
  for row in rows:
    found = text(row)
    part = [] if found is None else [splits.identity(normal(found))]
    if "record" in row:
      part.append(splits.identity([str(value).strip() for value in row["record"].values()]))
    for role in sources.FILES:
      value = row.get(role)
      if isinstance(value, pathlib.Path):
        size = value.stat().st_size if value.is_file() else -1
        sizes[size] += 1
        part.append((value, size))
      elif value is not None:
        part.append(splits.identity(value))
    parts.append(part)
  return [_key(part, sizes) for part in parts]


def _key(parts, sizes):
  found = b""
  for part in parts:
    if isinstance(part, tuple):
      path, size = part
      if size < 0:
        return None
      part = splits.identity(path.read_bytes() if sizes[size] > 1 else str(path))
    found += part
  return found or None


def picture(source) -> np.ndarray:
  """Returns the (32, 32) float32 grey picture of an image: path, encoded bytes or pixels.

  Raises:
    RowError: it cannot be read.
  """
  import PIL.Image

  limit = image.KEYS["max_pixels"][0]
  if isinstance(source, np.ndarray):
    opened, _ = image.decode_array(source, limit)
  else:
    opened, _ = image.decode(source, limit, near=2 * _SIDE)
  small = opened.convert("L").resize((_SIDE, _SIDE), PIL.Image.Resampling.BOX)
  return np.asarray(small, np.float32)


def thumbnail(row: dict) -> str:
  """Returns a row's image as a data URI for people to recognise it by; "" without one."""
  source = row.get("image")
  if source is None:
    return ""
  try:
    if isinstance(source, np.ndarray):
      opened, _ = image.decode_array(source, image.KEYS["max_pixels"][0])
    else:
      opened, _ = image.decode(source, image.KEYS["max_pixels"][0], near=thumbnails.SIDE)
  except errors.RowError:
    return ""
  return thumbnails.uri(np.asarray(opened))


def pictures(values) -> np.ndarray:
  """Returns (N, 32, 32) float32 pictures; NaN in those that cannot be read."""
  made = np.full((len(values), _SIDE, _SIDE), np.nan, np.float32)
  for i, value in enumerate(values):
    try:
      made[i] = picture(value)
    except errors.RowError:
      continue
  return made


# ---- Finders -------------------------------------------------------------------------------------


def exact(queries, references, inside=False) -> Pairs:
  """Pairs of equal keys, each query with the first reference that has its key.

  Args:
    queries: keys; None is like nothing. references: keys; inside: these are the same rows, and
      only earlier ones count.
  """
  first, query, reference = {}, [], []
  for i, key in enumerate(references):
    if key is not None:
      first.setdefault(key, i)
  for i, key in enumerate(queries):
    at = first.get(key) if key is not None else None
    if at is not None and not (inside and at >= i):
      query.append(i)
      reference.append(at)
  return Pairs(np.array(query, int), np.array(reference, int), np.ones(len(query)))


def units(features, centre=None) -> np.ndarray:
  """Returns features (N, D) less the centre (D,), each divided by its length, as float32."""
  found = np.asarray(features, np.float32)
  found = found if centre is None else found - np.asarray(centre, np.float32)
  return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def stray(unit, threshold: float) -> float:
  """Returns the share of random pairs of different rows (N, D) with a cosine above the threshold.

  Where that is no rarity, the features set no rows apart, and near-duplicates say nothing.
  """
  a, b = np.random.default_rng(0).integers(0, len(unit), (2, _RANDOM))
  near = np.einsum("ij,ij->i", unit[a], unit[b])[a != b]
  return float((near > threshold).mean()) if near.size else 0.0


def cosine(queries, references, threshold: float, inside=False) -> Pairs:
  """Each query's nearest reference by cosine, where it is above the threshold.

  Args:
    queries: (N, D) and references: (M, D) of length 1. inside: these are the same rows, and only
      earlier ones count.
  """
  best, at = np.full(len(queries), -1.0, np.float32), np.zeros(len(queries), int)
  for start in range(0, len(queries), _BLOCK[0]):
    rows = slice(start, start + _BLOCK[0])
    stop = min(start + _BLOCK[0], len(references)) if inside else len(references)
    for low in range(0, stop, _BLOCK[1]):
      near = queries[rows] @ references[low:min(low + _BLOCK[1], stop)].T
      if inside and low + near.shape[1] > start:  # column is not before row
        column, row = np.arange(near.shape[1]) + low, np.arange(len(near)) + start
        near[column[None] >= row[:, None]] = -1
      column = near.argmax(axis=1)
      value = near[np.arange(len(near)), column]
      better = value > best[rows]
      best[rows][better], at[rows][better] = value[better], column[better] + low
  found = np.flatnonzero(best > threshold)
  return Pairs(found, at[found], best[found].astype(float))


class Shingles:
  """The sets of character shingles of texts, and their MinHash signatures.

  Args:
    texts: (N,) str, or None where there is none.

  Attributes:
    sets: (N, vocabulary) sparse 0/1 matrix. signatures: (N, 128) uint32. kept: share of the
      shingles that is looked at, the same ones of every text. empty: (N,) texts without any.
  """

  def __init__(self, texts):
    from scipy import sparse

    parts = [f" {normal(t[:CHARACTERS])} ".encode() if t and t.strip() else b"" for t in texts]
    total = sum(max(len(part) - SHINGLE + 1, 0) for part in parts)
    step = max(1, -(-total // _SHINGLES))
    hashes = [_shingles(part, step) for part in parts]
    joined = np.concatenate(hashes) if hashes else np.zeros(0, np.uint32)
    row = np.repeat(np.arange(len(parts)), [len(part) for part in hashes])
    self.kept = 1 / step
    vocabulary, column = np.unique(joined, return_inverse=True)
    self.sets = sparse.csr_matrix((np.ones(len(row), np.float32), (row, column)),
                                  shape=(len(parts), max(len(vocabulary), 1)))
    self.sets.data[:] = 1  # a shingle that occurs twice is in the set once
    self.empty = np.diff(self.sets.indptr) == 0
    self.signatures = self._sign(vocabulary)

  def _sign(self, vocabulary):
    signatures = np.full((self.sets.shape[0], _BANDS * _ROWS), np.iinfo(np.uint32).max, np.uint32)
    full = np.flatnonzero(~self.empty)
    starts = self.sets.indptr[:-1][full]
    for k in range(signatures.shape[1] if len(full) else 0):
      ordered = _mixed(vocabulary, k)
      signatures[full, k] = np.minimum.reduceat(ordered[self.sets.indices], starts)
    return signatures

  def jaccard(self, a, b) -> np.ndarray:
    """Returns (P,) Jaccard similarities of the sets of texts a (P,) and b (P,)."""
    sizes, found = np.diff(self.sets.indptr), np.empty(len(a))
    for start in range(0, len(a), 200_000):
      i, j = a[start:start + 200_000], b[start:start + 200_000]
      both = np.asarray(self.sets[i].multiply(self.sets[j]).sum(axis=1)).ravel()
      found[start:start + 200_000] = both / np.maximum(sizes[i] + sizes[j] - both, 1)
    return found

  def pairs(self, threshold: float) -> Pairs:
    """Pairs of texts of at least this Jaccard similarity; a query stands behind its reference."""
    bands = [_joined(self.signatures[:, k * _ROWS:(k + 1) * _ROWS]) for k in range(_BANDS)]
    a, b, cut = _candidates(bands, ~self.empty)
    similarity = self.jaccard(a, b)
    good = similarity >= threshold
    return Pairs(a[good], b[good], similarity[good], cut)


def hashes(made) -> np.ndarray:
  """Returns (N, 64) bool: perceptual hashes of pictures (N, 32, 32).

  The signs of the 8 x 8 slowest cosine waves but for the mean, against their median: brightness,
  contrast, size and coding leave them as they are. Source: Zauner, Implementation and Benchmarking
  of Perceptual Image Hash Functions (2010).
  """
  from scipy import fft

  waves = fft.dctn(np.nan_to_num(made), axes=(1, 2), norm="ortho")
  slow = waves[:, :_WAVES, :_WAVES].reshape(len(made), -1)
  return slow > np.median(slow[:, 1:], axis=1, keepdims=True)


def alike(made, bits: int, correlation: float) -> Pairs:
  """Pairs of pictures whose hashes differ in few bits and whose pixels correlate.

  A query stands behind its reference.

  Args:
    made: (N, 32, 32) pictures, NaN for none. bits: fewer than `_PARTS` that may differ.
    correlation: least correlation of the pixels, which is the similarity given.
  """
  flat = made.reshape(len(made), -1)
  spread = flat.std(axis=1)
  usable = np.isfinite(spread) & (np.nan_to_num(spread) > _PLAIN)
  signs = np.where(hashes(made), np.float32(1), np.float32(-1)) * usable[:, None]
  a, b = _close(signs, 64 - 2 * bits)
  scaled = (flat - flat.mean(axis=1, keepdims=True)) / np.maximum(spread[:, None], 1e-6)
  value = np.empty(len(a))
  for start in range(0, len(a), 50_000):
    i, j = a[start:start + 50_000], b[start:start + 50_000]
    value[start:start + 50_000] = np.einsum("ij,ij->i", scaled[i], scaled[j]) / flat.shape[1]
  good = value >= correlation
  return Pairs(a[good], b[good], value[good])


# ---- Parts ---------------------------------------------------------------------------------------


def _candidates(bands, usable):
  """(queries, references, number cut): the pairs that share a band, each once."""
  found, cut, size = [np.zeros(0, int)], 0, len(usable)
  for band in bands:
    rows = np.flatnonzero(usable)
    rows = rows[np.argsort(band[rows], kind="stable")]
    ordered = band[rows]
    for apart in range(1, len(rows)):
      at = np.flatnonzero(ordered[apart:] == ordered[:-apart])
      if not len(at):
        break
      if apart > _CROWD:
        cut += len(at)
        break
      found.append(rows[at + apart] * size + rows[at])  # the sort is stable: the first is later
  keys = np.unique(np.concatenate(found))
  return keys // size, keys % size, cut


def _close(signs, least):
  """(queries, references) of the rows (N, 64) of -1 and 1 whose products are `least` or more."""
  parts = [np.zeros((0, 2), int)]
  for start in range(0, len(signs), _BLOCK[0]):
    i, j = np.nonzero(signs[start:start + _BLOCK[0]] @ signs.T >= max(least, 1))
    pair = np.stack([i + start, j], 1)
    parts.append(pair[pair[:, 0] > pair[:, 1]])
  return np.concatenate(parts).T


def _joined(signature):
  """(N,) uint64 of a band's (N, 4) uint32; equal bands give equal numbers."""
  total = np.zeros(len(signature), np.uint64)
  for column in signature.T:
    total = (total ^ column) * np.uint64(0x9E3779B97F4A7C15)
    total ^= total >> np.uint64(29)
  return total


def _shingles(data: bytes, step: int) -> np.ndarray:
  """(n,) uint32: the shingles of a text's bytes, four of them a number; one in `step` by hash."""
  if len(data) < SHINGLE:
    return np.zeros(0, np.uint32)
  raw = np.frombuffer(data, np.uint8).astype(np.uint32)
  parts = [raw[k:len(raw) - SHINGLE + 1 + k] << np.uint32(8 * k) for k in range(SHINGLE)]
  found = parts[0] | parts[1] | parts[2] | parts[3]
  return found if step == 1 else found[_mixed(found, -1) % np.uint32(step) == 0]


def _mixed(values, seed: int) -> np.ndarray:
  """A hash of each uint32, another for every seed (the finaliser of MurmurHash3)."""
  x = values ^ np.uint32((seed * 0x9E3779B1 + 0x85EBCA6B) & 0xFFFFFFFF)
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


def _flat(value) -> str:
  """All text within a value of turns or words."""
  if isinstance(value, dict):
    return _flat(value.get("content", list(value.values())))
  if isinstance(value, (list, tuple)):
    return " ".join(filter(None, (_flat(part) for part in value)))
  return value if isinstance(value, str) else ""
