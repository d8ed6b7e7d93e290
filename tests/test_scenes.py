"""Images made of what scikit-learn brings along: what masks say, and that parts are apart."""

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from ft import errors, scenes
from ft.data import image as images


def read(path):
  return np.asarray(Image.open(path))


def test_digits_are_scikit_learn_s(tmp_path):
  assert scenes.write_digits(tmp_path) == 1797
  made = datasets.load_digits()
  for i in (0, 7, 1796):
    found = read(tmp_path / str(made.target[i]) / f"{i:04}.png")
    np.testing.assert_array_equal(found, np.minimum(16 * made.images[i], 255))


def test_masks_are_where_digits_are():
  ground = [np.full((40, 50, 3), 77, np.uint8)]
  ink = np.zeros((1, 8, 8))
  ink[0, 2:6, 2:6] = 16  # a square in place of a digit
  made = scenes.scenes(ground, ink, np.array([6]), 32, np.random.default_rng(0))
  for _ in range(20):
    image, mask = next(made)
    assert set(np.unique(mask)) <= {0, 7} and (mask == 7).any()
    assert (image[mask == 0] == 77).all()
    assert (image[mask == 7] != 77).any(-1).mean() > 0.9  # a colour may be the ground's, by chance


def test_parts_share_no_pixel_and_the_seed_decides(tmp_path):
  assert scenes.write(tmp_path / "a", 6, 64, seed=3) == 6 + 2 + 2
  scenes.write(tmp_path / "b", 6, 64, seed=3)
  scenes.write(tmp_path / "c", 6, 64, seed=4)
  name = "images/00001.png"
  first = read(tmp_path / "a" / "train" / name)
  np.testing.assert_array_equal(first, read(tmp_path / "b" / "train" / name))
  assert (first != read(tmp_path / "c" / "train" / name)).any()
  bounds = sorted(scenes.PARTS.values())
  assert bounds[0][0] == 0 and bounds[-1][1] == 1
  assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False))
  # The ground of a test scene stands in the last part of a photograph.
  image, mask = (read(tmp_path / "a" / "test" / part / "00000.png") for part in ("images", "masks"))
  found = False
  for photograph in datasets.load_sample_images().images:
    last = photograph[:, round(0.8 * photograph.shape[1]):]
    for view in np.lib.stride_tricks.sliding_window_view(last, (64, 64, 3))[:, :, 0].reshape(
        -1, 64, 64, 3):
      if (view[0, :8] == image[0, :8])[mask[0, :8] == 0].all() and (
          view[mask == 0] == image[mask == 0]).all():
        found = True
  assert found


def test_a_side_wider_than_a_part(tmp_path):
  with pytest.raises(errors.UserError, match="--side=129: the photographs' parts are 128 pixels"):
    scenes.write(tmp_path, 1, 129)


def test_masks_are_read_as_the_task_reads_them(tmp_path):
  scenes.write(tmp_path, 1, 48)
  part = tmp_path / "train"
  row = {role: part / f"{role}s" / "00000.png" for role in ("image", "mask")}
  preprocess = images.from_spec({"resize": "none", "mean": [0.5], "std": [0.5]})
  assert preprocess.mask(row).shape == (48, 48) and preprocess.mask(row).max() <= 10
