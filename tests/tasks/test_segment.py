"""Segmentation: loss against torch, metrics against scikit-learn, a run from end to end."""

import base64
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as reference
from tasks.test_anomaly import cloth, save

from ft import config, errors, judge, models, predict, train
from ft.data import image as images
from ft.models import efficientnet
from ft.tasks import segment
from ft.weights import names


class Preprocess:
  def finish(self, batch):
    return {"pixel_values": batch["pixel_values"].astype(jnp.float32)}


def task(values=(0, 1, 2), maps=(0, 1)):
  spec = {"labels": [str(v) for v in values], "values": list(values), "ignore": 255,
          "maps": list(maps), "metric": "miou"}
  return segment.Task.from_spec(spec, Preprocess())


def test_loss_equals_torch():
  rng = np.random.default_rng(0)
  maps = [rng.normal(size=(2, side, side, c)).astype(np.float32) for side, c in ((4, 3), (2, 5))]
  head = {"kernel": rng.normal(size=(8, 3)).astype(np.float32), "bias": np.float32([0.1, 0, -1])}
  mask = rng.integers(0, 3, (2, 8, 8)).astype(np.uint8)
  mask[0, :2] = 255
  batch = {"pixel_values": np.zeros((2, 8, 8, 3), np.uint8), "mask": mask,
           "weight": np.ones(2, np.float32)}
  apply = lambda variables, inputs, rng: {"feature_maps": maps}  # noqa: E731
  total, weight, aux = task().loss(apply, {"company": {"head": head}}, batch, None)
  normal = [torch.nn.functional.layer_norm(torch.tensor(y), y.shape[-1:]).permute(0, 3, 1, 2)
            for y in maps]
  small = torch.nn.functional.interpolate(normal[1], size=(4, 4), mode="bilinear")
  cells = torch.cat([normal[0], small], 1).permute(0, 2, 3, 1) @ torch.tensor(head["kernel"])
  logits = torch.nn.functional.interpolate(
    (cells + torch.tensor(head["bias"])).permute(0, 3, 1, 2), size=(8, 8), mode="bilinear")
  want = torch.nn.functional.cross_entropy(
    logits, torch.tensor(mask).long(), ignore_index=255, reduction="sum")
  np.testing.assert_allclose(total, want, rtol=1e-4)
  assert weight == 128 - 16
  np.testing.assert_allclose(aux["pixel_accuracy"], (logits.argmax(1).numpy() == mask).sum())
  # A row of weight 0, such as fills a batch up, counts nowhere.
  batch["weight"] = np.float32([0, 1])
  assert task().loss(apply, {"company": {"head": head}}, batch, None)[1] == 64


def test_metrics_equal_scikit_learn():
  rng = np.random.default_rng(1)
  true, said = rng.integers(0, 3, (2, 4, 50))
  count = lambda x: np.stack([np.bincount(row, minlength=3) for row in x])  # noqa: E731
  right = np.stack([reference.confusion_matrix(t, s, labels=range(3)).diagonal()
                    for t, s in zip(true, said, strict=True)])
  found = task().metrics({"hits": right, "true": count(true), "said": count(said),
                          "nats": np.full(4, 25.0)})
  true, said = true.ravel(), said.ravel()
  assert found["miou"] == pytest.approx(reference.jaccard_score(true, said, average="macro"))
  assert found["pixel_accuracy"] == pytest.approx(reference.accuracy_score(true, said))
  assert found["mean_recall"] == pytest.approx(reference.balanced_accuracy_score(true, said))
  assert found["log_loss"] == 0.5
  # A class in neither truth nor answer is left out of the mean.
  same = dict.fromkeys(("hits", "true", "said"), np.array([[3, 4, 0]]))
  assert task().metrics({**same, "nats": np.ones(1)})["miou"] == 1


def test_what_is_counted_in_an_image():
  """Intersections and sizes of each class, (B, C), are all that is kept and resampled."""
  rng = np.random.default_rng(2)
  maps = [rng.normal(size=(2, 4, 4, 5)).astype(np.float32)]
  apply = lambda *_: {"feature_maps": maps}  # noqa: E731
  head = {"kernel": rng.normal(size=(5, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}
  variables, mask = {"company": {"head": head}}, rng.integers(0, 3, (2, 8, 8)).astype(np.uint8)
  mask[0, :2] = 255
  batch = {"pixel_values": np.zeros((2, 8, 8, 3), np.uint8)}
  said = np.asarray(task(maps=(0,)).predict(apply, variables, batch)["classes"])
  found = task(maps=(0,)).predict(apply, variables, {**batch, "mask": mask})
  assert {key: np.shape(value) for key, value in found.items()} == {
    "hits": (2, 3), "true": (2, 3), "said": (2, 3), "nats": (2,)}
  for i in range(2):
    known = mask[i] != 255
    want = reference.confusion_matrix(mask[i][known], said[i][known], labels=range(3))
    np.testing.assert_array_equal(found["hits"][i], want.diagonal())
    np.testing.assert_array_equal(found["true"][i], want.sum(1))
    np.testing.assert_array_equal(found["said"][i], want.sum(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("holes"), np.random.default_rng(0)
  for i in range(40):
    hole, mask = rng.integers(0, 24, 2), np.zeros((32, 32), np.uint8)
    mask[hole[0]:hole[0] + 8, hole[1]:hole[1] + 8] = 7
    save(folder / "data" / "images" / f"{i}.png", cloth(rng, tuple(hole)))
    save(folder / "data" / "masks" / f"{i}.png", mask)
  c = efficientnet.Config(stages=((1, 3, 1, 1, 16), (1, 3, 2, 6, 24)), stem_features=8,
                          head_features=16, image_size=32, num_labels=0)
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
    "data.train": str(folder / "data"), "task.name": "segment", "task.maps": (0, 1),
    "tune.method": "none", "optim.rate": 0.3, "train.batch": 8, "train.steps": 40,
    "train.eval_every": 40.0, "train.train_sample": 8, **given,
  })


def test_a_run_and_what_it_leaves(folder, tmp_path):
  record = train.train(complete(folder), tmp_path / "run")
  found = record["results"]["test"]
  tuned = found["fine-tuned"]["metrics"]
  # Every pixel cloth: its IoU is its share, and the hole's is 0.
  assert found["majority"]["metrics"]["miou"] == pytest.approx((1 - 64 / 1024) / 2)
  assert tuned["miou"] > 0.7 and tuned["iou/7"] > 0.4
  assert record["differences"]["test"]["fine-tuned - majority"]["verdict"] == "gained"
  assert record["model"]["trainable"] == (16 + 24) * 2 + 2  # the linear head alone
  again = judge.judge(tmp_path / "run", str(folder / "data"))
  assert again["n"] == 40 and again["metrics"]["miou"] > 0.7
  predictor = predict.Predictor(tmp_path / "run")
  answer, = predictor(predictor.rows(str(folder / "data" / "images" / "3.png")))
  assert answer["shares"]["7"] == pytest.approx(64 / 1024, abs=0.03)
  content = base64.b64decode(answer["mask"].partition(",")[2])
  said = np.asarray(Image.open(io.BytesIO(content)))
  true = np.asarray(Image.open(folder / "data" / "masks" / "3.png"))
  assert set(np.unique(said)) == {0, 7} and (said == true).mean() > 0.95


def test_upernet_trains_and_comes_back(folder, tmp_path):
  test = f"{folder / 'data'}[75%:]"
  record = train.train(complete(folder, **{
    "data.train": f"{folder / 'data'}[:75%]", "data.test": test, "task.head": "upernet",
    "task.width": 16, "optim.rate": 0.01, "train.steps": 60}), tmp_path / "run")
  found = record["results"]["test"]
  want = found["fine-tuned"]["metrics"]
  assert want["log_loss"] < found["majority"]["metrics"]["log_loss"]
  assert record["model"]["trainable"] > 5000
  again = judge.judge(tmp_path / "run", test)
  assert again["n"] == 10
  assert again["metrics"]["log_loss"] == pytest.approx(want["log_loss"], rel=1e-5)
  (tmp_path / "run" / "model" / segment.FILE).write_bytes(b"no archive")
  with pytest.raises(errors.UserError, match="no readable head"):
    predict.Predictor(tmp_path / "run")


@pytest.mark.parametrize("given,message", [
  ({"data.train": "{}/data/images"}, "needs a mask for each image"),
  ({"data.flip": "h"}, "does not move masks"),
  ({"task.ignore": 7}, "have the class 0 only"),
  ({"task.classes": ("cloth", "hole")}, "none of the 28 rows can be used.*has the value 7, which"),
])
def test_messages(folder, tmp_path, given, message):
  given = {key: value.format(folder) if isinstance(value, str) else value
           for key, value in given.items()}
  with pytest.raises(errors.UserError, match=message):
    train.train(complete(folder, **given), tmp_path / "run")


def test_a_mask_of_another_size_is_a_row_error():
  preprocess = images.from_spec({"resize": "none", "mean": [0.5], "std": [0.5]})
  made = segment.Task.from_spec(task((0, 7)).spec(), preprocess)
  row = {"image": cloth(np.random.default_rng(0)), "mask": np.zeros((32, 30), np.uint8)}
  with pytest.raises(errors.RowError, match="mask has 30x32 pixels, its image 32x32"):
    made.example(row)
