"""The configs of image systems: what their words make of the config, and VTAB's protocol."""

import collections
import pathlib
import re
import runpy

import pytest

from ft import config
from ft.card import suite
from ft.data import derived

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
VTAB = runpy.run_path(str(CONFIGS / "vtab.py"))
# Rows of the splits that VTAB cuts its own from, and the share of them before validation.
CUT = {"caltech101": (3059, 0.9), "cifar100": (50_000, 0.9), "pets": (3680, 0.8),
       "svhn": (73_257, 0.9), "eurosat": (27_000, 0.6), "resisc45": (31_500, 0.6),
       "clevr-count": (70_000, 0.9), "clevr-distance": (70_000, 0.9),
       "dsprites-location": (737_280, 0.8), "dsprites-orientation": (737_280, 0.8)}


def load(name, **words):
  said = ",".join(f"{key}={value}" for key, value in words.items())
  return config.load(f"{CONFIGS / name}.py" + (f":{said}" if said else ""))


def test_vtab_has_its_nineteen_tasks():
  groups = collections.Counter(entry[0] for entry in VTAB["TASKS"].values())
  assert groups == {"natural": 7, "specialised": 4, "structured": 8}
  for task in VTAB["TASKS"]:
    data = load("vtab", task=task).data
    assert data.train.endswith(":train[:800]")
    bounds = re.search(r"\[(\d*):(\d+)\]$", data.validation)
    start = int(bounds[1] or 0)
    assert int(bounds[2]) - start == 200
    if task in CUT:
      rows, share = CUT[task]
      assert start == round(rows * share)
    assert not data.derive or data.derive in derived.RULES


@pytest.mark.parametrize("method", VTAB["METHODS"])
def test_vtab_takes_every_method(method):
  made = load("vtab", task="pets", method=method, data="/some/where")
  assert made.data.train == "tfds:/some/where:train[:800]"
  assert suite.TITLE.fullmatch(made.title)["method"] == method


def test_images(tmp_path):
  for part in ("train", "test"):
    (tmp_path / part).mkdir()
  data = load("images", data=tmp_path).data
  assert (data.train, data.validation, data.test) == (
    f"{tmp_path}/train", "", f"{tmp_path}/test")
  assert load("images", data=tmp_path / "train").data.train == f"{tmp_path}/train"
  made = load("images", data="tfds:cifar10", model="vit", size=128, shots=10, rule="sgd", rate=0.01)
  assert (made.data.train, made.data.validation, made.data.test) == (
    "tfds:cifar10:train", "", "tfds:cifar10:test")
  assert made.model.image_size == (128, 128) and made.data.per_label == 10
  assert made.optim.name == "sgd" and made.optim.rate == 0.01
  flowers = load("images", data="tfds:oxford_flowers102", validation="validation")
  assert flowers.data.validation == "tfds:oxford_flowers102:validation"
  assert not load("images").task.zero_shot and load("images", model="clip").task.zero_shot
  for method in ("full", "head", "lora", "norms", "lp-ft", "ssf"):
    assert load("images", method=method).optim.rate > 0


def test_anomaly_and_segmentation():
  assert load("anomaly").task.name == "anomaly"
  assert load("anomaly", method="student", model="dinov2").task.name == "anomaly_student"
  made = load("segmentation", folder="x", head="linear", method="none")
  assert made.task.head == "linear" and made.data.validation == "x/validation"
