"""Labels that follow from other columns: bounds by hand, and read out of prepared TFDS folders."""

import io

import numpy as np
import pytest
from data.test_sources import config, error
from PIL import Image

from ft.data import derived, image, sources

CLEVR = {"size": [0, 1, 1, 0], "pixel_coords": [[1.0, 2.0, 12.0], [3, 4, 9.2], [5, 6, 9.7],
                                                [7, 8, 11]]}
KITTI = {"type": [3, 2, 0], "location": [[0.0, 1.0, 4.0], [0, 1, 25.0], [0, 1, 19.5]]}


def png(pixels):
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, "PNG")
  return out.getvalue()


def sprite(i):
  pixels = np.zeros((64, 64), np.uint8)
  pixels[i, :7] = 1
  return pixels


def test_clevr():
  assert derived.clevr_count({"objects": CLEVR}) == {"label": 1}
  assert derived.clevr_distance({"objects": CLEVR}) == {"label": 3}

  def of(away):
    return derived.clevr_distance({"objects": {"pixel_coords": [[0, 0, away]]}})["label"]

  assert [of(x) for x in (7.9, 8.0, 8.1, 8.5, 9.4, 9.9, 10.0, 10.1, 99)] == [
    0, 0, 1, 1, 3, 4, 4, 5, 5]


def test_kitti():
  assert derived.kitti_distance({"objects": KITTI}) == {"label": 1}  # the pedestrian is no vehicle
  none = {"type": [3, 4], "location": [[0.0, 0.0, 5.0], [0, 0, 6]]}
  assert derived.kitti_distance({"objects": none}) == {"label": 3}
  assert derived.kitti_distance({"objects": {"type": [], "location": []}}) == {"label": 3}
  near = {"type": [1], "location": [[0.0, 0.0, 8.0]]}
  assert derived.kitti_distance({"objects": near}) == {"label": 0}


def test_dsprites():
  def of(rule, column, values):
    return [rule({"image": sprite(1), column: value})["label"] for value in values]

  found = of(derived.dsprites_location, "label_x_position", range(32))
  assert found == [i // 2 for i in range(32)]
  found = of(derived.dsprites_orientation, "label_orientation", map(str, range(40)))
  assert found == [int(i // 2.5) for i in range(40)] and max(found) == 15
  for form in (sprite(2), sprite(2)[..., None], png(sprite(2))):
    pixels = derived.dsprites_location({"image": form, "label_x_position": 0})["image"]
    assert pixels.dtype == np.uint8 and set(np.unique(pixels)) == {0, 255}
    np.testing.assert_array_equal(pixels > 0, sprite(2) > 0)


@pytest.fixture(scope="module", params=["array_record", "parquet"])
def prepared(request, tmp_path_factory):
  """Twelve rows with the features of CLEVR, KITTI and dSprites that the rules read."""
  tfds = pytest.importorskip("tensorflow_datasets")
  f = tfds.features

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = tmp_path_factory.mktemp("pkg")

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict({
        "image": f.Image(shape=(64, 64, 1)),
        "label_x_position": f.ClassLabel(num_classes=32),
        "objects": f.Sequence({
          "size": f.ClassLabel(names=["small", "large"]),
          "type": f.ClassLabel(names=["Car", "Van", "Truck", "Pedestrian"]),
          "pixel_coords": f.Tensor(shape=(3,), dtype=np.float32),
          "location": f.Tensor(shape=(3,), dtype=np.float32)}),
      }))

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(12):
        yield i, {"image": io.BytesIO(png(sprite(i))), "label_x_position": 2 * i, "objects": [
          {"size": 0, "type": 3, "pixel_coords": (0, 0, 7 + i / 2), "location": (0, 0, 1)}
        ] * (3 + i % 3) + [{"size": 1, "type": i % 3, "pixel_coords": (0, 0, 50),
                            "location": (0, 0, 2 * i)}]}

  builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format=request.param)
  builder.download_and_prepare()
  return f"tfds:{builder.data_dir}:train"


@pytest.mark.parametrize("rule,want", [
  ("clevr-count", lambda i: 1 + i % 3),
  ("clevr-distance", lambda i: [a < 7 + i / 2 for a in (8, 8.5, 9, 9.5, 10)].count(True)),
  ("kitti-distance", lambda i: (2 * i > 8) + (2 * i > 20)),
  ("dsprites-location", lambda i: i),
])
def test_tfds(prepared, rule, want):
  rows = sources.read(config("image", derive=rule), prepared)
  found = []
  preprocess = image.from_spec({"resize": "none", "mean": [0.5], "std": [0.5]})
  for row in rows:
    pixels = preprocess(row)["pixel_values"]
    at = int(np.flatnonzero(pixels[:, 0, 0])[0])  # which row this is, whatever its place
    assert pixels.shape == (64, 64, 3)
    assert pixels.max() == (255 if rule.startswith("dsprites") else 1)
    found.append((at, row["label"]))
  assert sorted(found) == [(i, want(i)) for i in range(12)]
  assert rows.labels == [label for _, label in found]


def test_messages(prepared):
  assert "mean 'clevr-count'" in error(train=prepared, derive="clevr-coutn")
  assert "reads a column label_orientation" in error(train=prepared, derive="dsprites-orientation")
