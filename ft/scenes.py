"""Folders of images made of what scikit-learn brings along, for runs without a download.

Handwritten digits (Alpaydin and Kaynak 1998, UCI, CC BY 4.0): 1,797 grey images of 8 x 8 pixels.
Scenes are made, not photographed: one to three of these digits, enlarged and in a colour drawn at
random, pasted on a crop of one of two photographs, with a mask of which pixel is of which digit.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from ft import errors

DIGITS = (1, 3)  # of a scene
SIDES = (0.25, 0.55)  # of a digit, over the scene's
# Part -> its share of the photographs' width and of the digits: no two parts share a pixel of one.
PARTS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}


def write_digits(folder) -> int:
  """Writes the digits as PNG files, a folder a class; returns how many there are."""
  from sklearn import datasets

  made = datasets.load_digits()
  for i, (pixels, label) in enumerate(zip(made.images, made.target, strict=True)):
    _save(pathlib.Path(folder) / str(label) / f"{i:04}.png", grey(pixels))
  return len(made.target)


def write(folder, count: int, side: int, seed: int = 0) -> int:
  """Writes scenes as FOLDER/{train,validation,test}/{images,masks}/*.png; returns how many.

  Args:
    folder: to be made.
    count: scenes of train; validation and test have a third of it each.
    side: of a scene, pixels.
    seed: of all that is drawn.

  Raises:
    UserError: a part of the photographs is narrower than the side.
  """
  from sklearn import datasets

  digits, photographs = datasets.load_digits(), datasets.load_sample_images().images
  narrow = min(_share(x.shape[1], *part).stop - _share(x.shape[1], *part).start
               for x in photographs for part in PARTS.values())
  if side > narrow:
    raise errors.UserError(f"--side={side}: the photographs' parts are {narrow} pixels wide")
  total = 0
  for number, (part, bounds) in enumerate(PARTS.items()):
    crops = [x[:, _share(x.shape[1], *bounds)] for x in photographs]
    some = _share(len(digits.target), *bounds)
    made = scenes(crops, digits.images[some], digits.target[some], side,
                  np.random.default_rng((seed, number)))
    for i in range(count if part == "train" else max(1, count // 3)):
      image, mask = next(made)
      _save(pathlib.Path(folder) / part / "images" / f"{i:05}.png", image)
      _save(pathlib.Path(folder) / part / "masks" / f"{i:05}.png", mask)
      total += 1
  return total


def scenes(photographs, digits, labels, side: int, rng) -> Iterator[tuple]:
  """Yields (image (side, side, 3), mask (side, side)) uint8; masks: 0 ground, 1 + digit.

  Args:
    photographs: arrays (H, W, 3) uint8, at least `side` high and wide.
    digits: (N, 8, 8) ink from 0 to 16. labels: (N,) which digit.
    rng: source of all that is drawn.
  """
  import PIL.Image

  while True:
    ground = photographs[rng.integers(len(photographs))]
    top, left = (rng.integers(size - side + 1) for size in ground.shape[:2])
    image = ground[top:top + side, left:left + side].astype(np.float32)
    mask = np.zeros((side, side), np.uint8)
    for i in rng.integers(len(digits), size=rng.integers(DIGITS[0], DIGITS[1] + 1)):
      size = max(8, int(side * rng.uniform(*SIDES)))
      ink = np.asarray(PIL.Image.fromarray(grey(digits[i])).resize(
        (size, size), PIL.Image.Resampling.BICUBIC)) > 127
      at = tuple(slice(start, start + size) for start in rng.integers(side - size + 1, size=2))
      image[at][ink], mask[at][ink] = rng.integers(256, size=3), 1 + labels[i]
    yield image.astype(np.uint8), mask


def _share(size: int, start: float, end: float) -> slice:
  return slice(round(start * size), round(end * size))


def grey(ink) -> np.ndarray:
  """Returns ink from 0 to 16 as uint8 grey, 255 where there is most."""
  return np.minimum(np.asarray(ink) * 16, 255).astype(np.uint8)


def _save(path: pathlib.Path, pixels) -> None:
  import PIL.Image

  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(pixels).save(path)
