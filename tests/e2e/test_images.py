"""The image path from end to end: folders by class, augmentation, batch statistics, prediction."""

import json

import jax
import numpy as np
import pytest
from commands import script
from PIL import Image

from ft import config, models, train
from ft.models import efficientnet
from ft.weights import names

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A small random network and 20 noisy images of each of three colours."""
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for name, colour in COLOURS.items():
    (folder / "data" / name).mkdir(parents=True)
    for i in range(20):
      pixels = np.clip(rng.normal(colour, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(folder / "data" / name / f"{i}.png")
  stages = ((1, 3, 1, 1, 16), (1, 3, 2, 6, 24))
  c = efficientnet.Config(
    stages=stages, stem_features=8, head_features=64, image_size=32, num_labels=0
  )
  module = efficientnet.Model(c)
  variables = module.init(jax.random.PRNGKey(0), **efficientnet.probe_inputs(c))
  models.export(
    models.Pretrained("efficientnet", module, variables, names.Report(), {}, c, "image", ()),
    folder / "model",
  )
  return folder


def run(folder, name, **given):
  c = config.complete({
    "model.source": str(folder / "model"), "data.modality": "image", "data.resize": "none",
    "data.train": str(folder / "data"), "data.flip": "hv", "data.crop": "pad",
    "optim.rate": 1e-2, "train.batch": 8, "train.steps": 8, "train.eval_every": 8.0, **given,
  })
  return train.train(c, folder / name)


def test_frozen_and_updated_batch_statistics(folder, tiny):
  frozen = run(folder, "frozen")
  run(folder, "moved", **{"model.batch_stats": "train", "train.accumulate": 2})
  assert frozen["results"]["test"]["probe"]["metrics"]["accuracy"] > 0.9

  def statistics(path):
    flat = names.flatten(models.load(str(path)).variables["batch_stats"])
    return {key: np.asarray(value) for key, value in flat.items()}

  before, after = statistics(folder / "model"), statistics(folder / "frozen" / "model")
  assert all(np.array_equal(before[key], after[key]) for key in before)
  changed = statistics(folder / "moved" / "model")
  assert not any(np.array_equal(before[key], changed[key]) for key in before)

  # Prediction of a folder: every readable image gets an answer, the broken one says why.
  (folder / "new").mkdir()
  Image.new("RGB", (32, 32), COLOURS["red"]).save(folder / "new" / "a.png")
  (folder / "new" / "b.png").write_text("no image")
  done = script("predict", f"--run={folder / 'frozen'}", f"--input={folder / 'new'}")
  answers = [json.loads(line) for line in done.stdout.splitlines()]
  assert [answer["id"].rsplit("/")[-1] for answer in answers] == ["a.png", "b.png"]
  assert answers[0]["label"] in COLOURS and "b.png" in answers[1]["error"]
