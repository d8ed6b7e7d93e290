"""Finders of duplicates: planted ones among real and made-up rows, and exact references."""

import io
import string

import numpy as np
import PIL.Image
import pytest
from scipy import ndimage
from sklearn import datasets

from ft import duplicates

SEED = 0


def sentences(n, rng, vocabulary=600):
  """Sentences of 8 to 20 made-up words, of which common ones come often."""
  letters = np.array(list(string.ascii_lowercase))
  words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(vocabulary)]
  chance = 1 / np.arange(1, vocabulary + 1)
  return [" ".join(rng.choice(words, rng.integers(8, 21), p=chance / chance.sum()))
          for _ in range(n)]


def edited(text, kind, rng):
  """A near-duplicate: another case, more punctuation, or one of its words changed or dropped."""
  words = text.split()
  at = int(rng.integers(len(words)))
  if kind == "case":
    return text.title()
  if kind == "punctuation":
    return "  ".join(word + rng.choice(["", ",", "!"]) for word in words) + "?"
  words[at:at + 1] = [] if kind == "dropped" else ["changed"]
  return " ".join(words)


def recall_precision(found, planted):
  """Of the pairs found, against planted pairs: sets of (query, reference)."""
  return len(found & planted) / len(planted), len(found & planted) / max(len(found), 1)


def between(pairs, size):
  """The pairs of a row behind the first `size` with one of them."""
  return {(i, j) for i, j in zip(pairs.query, pairs.reference, strict=True) if j < size <= i}


def test_minhash_finds_planted_texts():
  rng = np.random.default_rng(SEED)
  train, fresh = sentences(3000, rng), sentences(900, rng)
  sources = rng.choice(3000, 300, replace=False)
  kinds = ("case", "punctuation", "word", "dropped")
  planted = [edited(train[i], kinds[k % 4], rng) for k, i in enumerate(sources)]
  texts = train + planted + fresh
  shingles = duplicates.Shingles(texts)
  pairs = shingles.pairs(0.6)
  recall, precision = recall_precision(between(pairs, 3000),
                                       {(3000 + k, i) for k, i in enumerate(sources)})
  assert recall >= 0.95 and precision >= 0.95


def test_jaccard_is_the_definition():
  rng = np.random.default_rng(SEED)
  texts = [*sentences(30, rng), "", None, "ab", "Ab!"]
  shingles = duplicates.Shingles(texts)

  def cut(text):
    padded = f" {duplicates.normal(text or '')} "
    return {padded[i:i + 4] for i in range(len(padded) - 3)} if (text or "").strip() else set()

  a, b = (part.ravel() for part in np.meshgrid(np.arange(len(texts)), np.arange(len(texts))))
  known = [len(cut(texts[i]) & cut(texts[j])) / max(len(cut(texts[i]) | cut(texts[j])), 1)
           for i, j in zip(a, b, strict=True)]
  np.testing.assert_allclose(shingles.jaccard(a, b), known, atol=1e-6)
  pairs = shingles.pairs(0.9)
  assert set(zip(pairs.query, pairs.reference, strict=True)) == {(33, 32)}


def test_minhash_finds_all_pairs_that_all_comparisons_find():
  """Brute force over every pair, at a threshold where bands meet with probability .99."""
  rng = np.random.default_rng(SEED)
  base = sentences(200, rng)
  texts = base + [edited(text, kind, rng) for text in base for kind in ("word", "dropped", "word")]
  shingles = duplicates.Shingles(texts)
  a, b = np.tril_indices(len(texts), -1)
  value = shingles.jaccard(a, b)
  known = {(i, j) for i, j, v in zip(a, b, value, strict=True) if v >= 0.65}
  pairs = shingles.pairs(0.65)
  found = set(zip(pairs.query, pairs.reference, strict=True))
  assert found <= known and len(found) >= 0.98 * len(known) and len(known) > 500


def test_long_texts_are_sampled_alike(monkeypatch):
  rng = np.random.default_rng(SEED)
  texts = [" ".join(sentences(4, rng)) for _ in range(60)]
  texts += [edited(text, "word", rng) for text in texts[:20]]
  monkeypatch.setattr(duplicates, "_SHINGLES", 5000)
  shingles = duplicates.Shingles(texts)
  assert 0 < shingles.kept < 0.5
  pairs = shingles.pairs(0.6)
  assert between(pairs, 60) == {(60 + k, k) for k in range(20)}


@pytest.mark.parametrize("inside", [False, True])
def test_cosine_is_brute_force_in_blocks(monkeypatch, inside):
  monkeypatch.setattr(duplicates, "_BLOCK", (16, 24))
  rng = np.random.default_rng(SEED)
  b = duplicates.units(rng.normal(size=(100, 8)), np.full(8, 0.1))
  a = b if inside else duplicates.units(rng.normal(size=(70, 8)))
  near = a @ b.T
  if inside:
    near[np.triu_indices(100)] = -1
  pairs = duplicates.cosine(a, b, 0.7, inside)
  known = np.flatnonzero(near.max(axis=1) > 0.7)
  assert len(known) > 20 and pairs.query.tolist() == known.tolist()
  assert pairs.reference.tolist() == near[known].argmax(axis=1).tolist()
  np.testing.assert_allclose(pairs.similarity, near[known].max(axis=1), rtol=1e-6)


def scenes(n, rng, side=64):
  """Images of smooth random shapes, (n, side, side, 3) uint8."""
  made = rng.normal(size=(n, side, side, 3))
  made = sum(ndimage.gaussian_filter(made, (0, s, s, 0)) * s for s in (6, 1))
  low, high = made.min(axis=(1, 2, 3), keepdims=True), made.max(axis=(1, 2, 3), keepdims=True)
  return (255 * (made - low) / (high - low)).astype(np.uint8)


def changed(pixels, kind):
  """A near-duplicate: coded as JPEG, brighter with less contrast, larger, or with noise."""
  image = PIL.Image.fromarray(pixels)
  if kind == "jpeg":
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return file.getvalue()
  if kind == "brighter":
    return (40 + 0.75 * pixels).astype(np.uint8)
  if kind == "larger":
    return np.asarray(image.resize((150, 150)))
  noise = np.random.default_rng(1).normal(0, 6, pixels.shape)
  return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def test_pictures_that_were_changed_are_found():
  rng = np.random.default_rng(SEED)
  train, fresh = scenes(400, rng), scenes(200, rng)
  kinds = ("jpeg", "brighter", "larger", "noise")
  planted = [changed(train[i], kinds[i % 4]) for i in range(120)]
  made = duplicates.pictures([*train, *planted, *fresh, b"no image", None])
  assert np.isnan(made[-2:]).all() and np.isfinite(made[:-2]).all()
  pairs = duplicates.alike(made, 6, 0.97)
  recall, precision = recall_precision(between(pairs, 400),
                                       {(400 + i, i) for i in range(120)})
  assert recall >= 0.95 and precision >= 0.95


def test_pictures_of_digits():
  """Real images that are alike: changed copies are found, other images of the digit are not."""
  digits = datasets.load_digits().images[:600]
  large = np.stack([ndimage.zoom(image * 15, 4, order=1) for image in digits]).astype(np.uint8)
  planted = [changed(np.repeat(large[i][..., None], 3, -1), "jpeg") for i in range(100)]
  made = duplicates.pictures([*large, *planted])
  pairs = duplicates.alike(made, 6, 0.97)
  recall, precision = recall_precision(between(pairs, 600),
                                       {(600 + i, i) for i in range(100)})
  assert recall >= 0.95 and precision >= 0.95


def test_plain_pictures_are_like_nothing():
  made = duplicates.pictures([np.full((9, 9), 7, np.uint8), np.full((9, 9), 8, np.uint8)])
  assert not len(duplicates.alike(made, 6, 0.9).query)


def test_contents_of_texts_files_and_arrays(tmp_path):
  files = [tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png")]
  for path, data in zip(files, (b"same", b"same", b"other", b"diff"), strict=False):
    path.write_bytes(data)
  pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
  rows = [{"text": "Is it  on?"}, {"text": "is it on"}, {"text": "is it off"},
          *[{"image": path} for path in files], {"image": pixels}, {"image": pixels.copy()},
          {"image": pixels[:2]}, {"image": tmp_path / "gone.png"}, {"label": 3},
          {"turns": [{"role": "user", "content": "Is it on"}]}]
  keys = duplicates.contents(rows)
  equal = [(i, j) for i in range(len(keys)) for j in range(i) if keys[i] == keys[j] is not None]
  assert equal == [(1, 0), (4, 3), (8, 7), (12, 0), (12, 1)]
  assert keys[10] is None and keys[11] is None


def test_exact_takes_the_first_of_equals():
  pairs = duplicates.exact([b"x", None, b"y", b"z"], [b"y", b"x", None, b"x"])
  assert list(zip(pairs.query, pairs.reference, strict=True)) == [(0, 1), (2, 0)]
  keys = [b"x", b"y", b"x", b"x"]
  pairs = duplicates.exact(keys, keys, inside=True)
  assert list(zip(pairs.query, pairs.reference, strict=True)) == [(2, 0), (3, 0)]


def test_the_nearest_of_several():
  pairs = duplicates.Pairs(np.array([2, 0, 2]), np.array([5, 6, 7]), np.array([0.7, 0.9, 0.8]))
  place, value = pairs.nearest(4)
  assert place.tolist() == [6, -1, 7, -1] and value.tolist() == [0.9, 0, 0.8, 0]


@pytest.mark.parametrize("row, text", [
    ({"text": "a", "text_b": "b"}, "a b"), ({"words": ["a", "b"]}, "a b"), ({"label": "x"}, None),
    ({"turns": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a b"),
    ({"prompt": "a", "chosen": "b"}, "a"), ({"chosen": "a", "rejected": "b"}, "a")])
def test_what_is_read_of_a_row(row, text):
  assert duplicates.text(row) == text
