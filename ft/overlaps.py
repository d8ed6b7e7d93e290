"""Which rows of the splits of a run are in train too, or repeat others: what is compared, and how.

A finder gives split -> (nearest (n,): place among the compared rows of train or -1, similarity
(n,), repeats (n,): whether the row repeats an earlier one of its own split), tells `settings` what
it did, and raises `guards.Missing` where rows lack what it compares. n: compared rows of a split.
"""

import dataclasses

import numpy as np

from ft import duplicates, guards

_CORRELATION = 0.97  # of the pixels of two pictures whose hashes agree
_STRAY = 0.001  # share of random pairs that may be as close as near-duplicates


@dataclasses.dataclass
class Part:
  """What is compared of a split: n rows, sampled where there are more.

  Attributes:
    of: rows in the split. index: (n,) their places in it. keys, texts: of each row, or None.
    images: of the rows that are compared as pictures, else None. label: of each, or None.
    features: (n, D), or None.
  """

  of: int
  index: np.ndarray
  keys: list
  texts: list
  images: list
  label: list | None
  features: np.ndarray | None


def collect(evidence, most: int, images: int) -> dict[str, Part]:
  """What is compared of each split: split -> Part, train first.

  Args:
    most, images: rows of a split, and images of these, of which a sample is taken beyond.
  """
  parts, rows, features = {}, evidence.rows, evidence.features
  order = [name for name in ("train", "validation", "test") if name in rows]
  for name in order + [name for name in rows if name not in order]:
    size, have = len(rows[name]), features.get(name)
    index = np.arange(size)
    have = None if have is None or np.ndim(have.get("features")) != 2 else have
    if have is not None:
      index = np.asarray(have["index"] if "index" in have else index[:len(have["features"])])
    kept = _sample(len(index), most)
    made = [rows[name][int(i)] for i in index[kept]]
    seen = set(_sample(len(made), images).tolist()) if images else set()
    seen_images = [row.get("image") if i in seen else None for i, row in enumerate(made)]
    classes = getattr(rows[name], "classes", None)
    parts[name] = Part(
        size, index[kept], duplicates.contents(made), [duplicates.text(row) for row in made],
        seen_images, None if classes is None else [classes[int(i)] for i in index[kept]],
        None if have is None else np.asarray(have["features"], np.float32)[kept])
  return parts


def exact(parts, config, settings):
  """Rows whose text, image, sound or columns are the same."""
  del config, settings
  if all(key is None for part in parts.values() for key in part.keys):
    raise guards.Missing("rows have no text, image or sound")
  found = {}
  for split, part in parts.items():
    inside = duplicates.exact(part.keys, part.keys, inside=True)
    between = duplicates.exact(part.keys, parts["train"].keys) if split != "train" else None
    found[split] = _entry(len(part.keys), between, inside)
  return found


def embedding(parts, config, settings):
  """Rows that are near to the model before tuning."""
  threshold = config.cosine
  if any(part.features is None for part in parts.values()):
    raise guards.Missing("no features of the model before tuning, one vector a row, were recorded")
  train = parts["train"].features
  for kind, centre in (("raw", None), ("centred", train.mean(axis=0, dtype=np.float64))):
    units = {split: duplicates.units(part.features, centre) for split, part in parts.items()}
    if duplicates.stray(units["train"], threshold) <= _STRAY:
      settings["features"] = kind
      break
  else:
    raise guards.Missing(f"the features do not set rows apart: random pairs of train rows have "
                         f"cosines above {threshold:g}")
  found = {}
  for split, unit in units.items():
    inside = duplicates.cosine(unit, unit, threshold, inside=True)
    between = duplicates.cosine(unit, units["train"], threshold) if split != "train" else None
    found[split] = _entry(len(unit), between, inside)
  return found


def minhash(parts, config, settings):
  """Texts that share most of their characters' shingles."""
  texts = [text for part in parts.values() for text in part.texts]
  if not any(texts):
    raise guards.Missing("rows have no text")
  shingles = duplicates.Shingles(texts)
  settings["shingles_kept"] = shingles.kept
  pairs = shingles.pairs(config.jaccard)
  settings["minhash_cut"] = pairs.cut
  return _by_split(pairs, parts)


def picture(parts, config, settings):
  """Images that look alike."""
  images = [image for part in parts.values() for image in part.images]
  if not any(image is not None for image in images):
    raise guards.Missing("rows have no image, or guard.leak.images is 0")
  made = duplicates.pictures(images)
  if not np.isfinite(made).any():
    raise guards.Missing("no image could be read")
  settings["pictures"] = int(np.isfinite(made[:, 0, 0]).sum())
  settings["correlation"] = _CORRELATION
  return _by_split(duplicates.alike(made, config.bits, _CORRELATION), parts)


def _by_split(pairs, parts):
  """Pairs among all rows in their order, train first: those within a split and those with train."""
  found, first = {}, {}
  start = 0
  for split, part in parts.items():
    first[split], start = start, start + len(part.index)
  size = len(parts["train"].index)
  for split, part in parts.items():
    own = (pairs.query >= first[split]) & (pairs.query < first[split] + len(part.index))
    query, other = pairs.query[own] - first[split], pairs.reference[own]
    value, within = pairs.similarity[own], other >= first[split]
    inside = duplicates.Pairs(query[within], other[within] - first[split], value[within])
    known = other < size
    between = None if split == "train" else duplicates.Pairs(query[known], other[known],
                                                             value[known])
    found[split] = _entry(len(part.index), between, inside)
  return found


def _entry(size, between, inside):
  nearest, similarity = (np.full(size, -1), np.zeros(size))
  if between is not None:
    nearest, similarity = between.nearest(size)
  repeats = np.zeros(size, bool)
  repeats[inside.query] = True
  return nearest, similarity, repeats


def _sample(size, most):
  if size <= most:
    return np.arange(size)
  return np.sort(np.random.default_rng(0).choice(size, most, replace=False))


FINDERS = {"exact": exact, "embedding": embedding, "minhash": minhash, "picture": picture}
