"""Anomaly detection from end to end: a random network, grey cloth, holes in it."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from ft import config, errors, judge, models, predict, train
from ft.data import image as images
from ft.data import sources
from ft.models import efficientnet
from ft.tasks import anomaly
from ft.weights import names


def cloth(rng, hole=None):
  pixels = rng.normal(120, 6, (32, 32, 3))
  if hole:
    pixels[hole[0]:hole[0] + 8, hole[1]:hole[1] + 8] = 250
  return np.clip(pixels, 0, 255).astype(np.uint8)


def save(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny network, and a data set as MVTec's: nominal images in train, holes and masks in test."""
  folder, rng = tmp_path_factory.mktemp("cloth"), np.random.default_rng(0)
  for i in range(24):
    save(folder / "train" / "good" / f"{i}.png", cloth(rng))
  for i in range(10):
    save(folder / "test" / "good" / f"{i}.png", cloth(rng))
  for i in range(6):
    hole, mask = rng.integers(0, 24, 2), np.zeros((32, 32), np.uint8)
    mask[hole[0]:hole[0] + 8, hole[1]:hole[1] + 8] = 255
    save(folder / "test" / "hole" / f"{i}.png", cloth(rng, tuple(hole)))
    save(folder / "ground_truth" / "hole" / f"{i}_mask.png", mask)
  c = efficientnet.Config(
    stages=((1, 3, 1, 1, 16), (1, 3, 2, 6, 24), (1, 3, 2, 6, 32)), stem_features=8,
    head_features=64, image_size=32, num_labels=0,
  )
  module = efficientnet.Model(c)
  variables = module.init(jax.random.PRNGKey(0), **efficientnet.probe_inputs(c))
  models.export(
    models.Pretrained("efficientnet", module, variables, names.Report(), {}, c, "image", ()),
    folder / "model",
  )
  return folder


def complete(folder, **given):
  return config.complete({
    "model.source": str(folder / "model"), "data.modality": "image", "data.resize": "none",
    "data.train": str(folder / "train"), "data.test": str(folder / "test"),
    "data.validation_fraction": 0.25, "task.name": "anomaly", "task.maps": (1, 2),
    "task.coreset": 0.2, "task.pictures": 4, "tune.method": "none", "train.batch": 8,
    "train.train_sample": 0, **given,
  })


@pytest.fixture(scope="module")
def record(folder):
  return train.train(complete(folder), folder / "run")


def test_holes_are_found_by_nominal_images_alone(folder, record):
  assert record["data"]["splits"]["train"]["labels"] == {"good": 18}
  found = record["results"]["test"]
  tuned = found["fine-tuned"]
  assert tuned["metrics"]["auroc"] > 0.95 and tuned["metrics"]["pixel_auroc"] > 0.9
  assert tuned["metrics"]["pro"] > 0.5 and tuned["metrics"]["recall/hole"] > 0.8
  assert len(tuned["interval"]["auroc"]) == 2
  assert set(found) == {"mean-image", "nearest-image", "fine-tuned"}
  assert record["differences"]["test"]["fine-tuned - mean-image"]["metric"] == "auroc"
  assert record["best"]["step"] == 0 and record["model"]["trainable"] == 0
  assert "one class only" in record["guards"]["amount"]["words"]
  assert "auroc is no mean over rows" in record["guards"]["bias"]["words"]
  # The threshold holds 95 % of the nominal images of validation, and saw no other.
  validation = record["results"]["validation"]["fine-tuned"]["metrics"]
  assert validation["false_alarms"] == pytest.approx(1 / 6) and np.isnan(validation["auroc"])
  page = (folder / "run" / "card.html").read_text()
  assert "The run did not gain on test" in page or "The run gained on test" in page
  assert page.count('src="data:image/png;base64,') == 8 and "above the threshold" in page


def test_no_pixels_are_kept_for_the_distance_to_the_mean_image(folder):
  c = complete(folder)
  preprocess = images.Preprocess(c.data, models.inspect(c.model.source, c.model.family))
  task = anomaly.Task(c.task, sources.load(c.data), preprocess)
  pixels = [preprocess(row)["pixel_values"] for row in task._train]
  apply = lambda *_: {"features": np.ones((2, 5), np.float32)}  # noqa: E731
  batch = {"pixel_values": np.stack(pixels[:2]), "label": np.zeros(2, np.int32)}
  found = task.features(apply, {}, batch)
  want = [np.linalg.norm(one - np.mean(pixels, axis=0)) for one in pixels[:2]]
  np.testing.assert_allclose(found["away"], want, rtol=1e-5)
  assert {key: np.shape(value) for key, value in found.items()} == {
    "away": (2,), "features": (2, 5), "label": (2,)}


def test_prediction_and_evaluation_have_the_bank(folder, record):
  predictor = predict.Predictor(folder / "run")
  answers = list(predictor(predictor.rows(str(folder / "test"))))
  assert [answer["id"].split("/")[-2] for answer in answers] == 10 * ["good"] + 6 * ["hole"]
  scores = np.array([answer["score"] for answer in answers])
  assert scores[10:].min() > np.median(scores[:10])
  at = answers[12]
  mask = np.asarray(Image.open(folder / "ground_truth" / "hole" / "2_mask.png"))
  row, column = (int(32 * share) for share in at["where"])
  assert at["anomalous"] and mask[max(row - 4, 0):row + 5, max(column - 4, 0):column + 5].any()
  json.dumps(answers)
  again = judge.judge(folder / "run", str(folder / "test"))
  want = record["results"]["test"]["fine-tuned"]["metrics"]
  for key in ("auroc", "f1", "pixel_auroc"):
    assert again["metrics"][key] == pytest.approx(want[key], abs=1e-6)
  (folder / "run" / "model" / "bank.npz").write_bytes(b"no archive")
  with pytest.raises(errors.UserError, match=r"bank\.npz: no readable bank"):
    predict.Predictor(folder / "run")


def test_a_mask_of_another_size_is_one_clear_error(folder):
  preprocess = images.from_spec({"resize": "none", "mean": [0.5], "std": [0.5]})
  row = {"image": folder / "test" / "hole" / "0.png", "mask": np.zeros((16, 32), np.uint8)}
  with pytest.raises(errors.RowError, match="mask has 32x16 pixels, its image 32x32"):
    preprocess.mask(row)
  assert not preprocess.mask({**row, "mask": None}).any()
  with pytest.raises(errors.RowError, match="a mask has one channel"):
    preprocess.mask({**row, "mask": np.zeros((32, 32, 3), np.uint8)})
  numbers = np.arange(1024).reshape(32, 32) % 7
  np.testing.assert_array_equal(preprocess.mask({**row, "mask": numbers}), numbers)
  half = images.from_spec({"resize": "squash", "size": 16, "mean": [0.5], "std": [0.5]})
  assert set(np.unique(half.mask({**row, "mask": numbers}))) <= set(range(7))


@pytest.mark.parametrize("given,message", [
  ({"task.nominal": "god"}, "no image of train has this label.*did you mean 'good'"),
  ({"task.neighbourhood": 2}, "has no centre"),
  ({"data.flip": "h"}, "so nothing is augmented"),
  ({"task.maps": (7,)}, "the model has maps 0 to 2"),
  ({"data.test": "{}/test/good"}, "has no labels"),
])
def test_messages(folder, tmp_path, given, message):
  given = {key: value.format(folder) if isinstance(value, str) else value
           for key, value in given.items()}
  with pytest.raises(errors.UserError, match=message):
    train.train(complete(folder, **given), tmp_path / "run")
