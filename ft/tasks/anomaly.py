"""Anomaly detection: what no nominal image of train is like, found without an example of it.

Nothing trains. The patches of the nominal images of train, as a frozen model sees them, become a
bank (`ft/anomalies.py`), and an image is as anomalous as its patches are far from it. The threshold
comes from nominal images of validation. Defects are seen in test alone.

Shapes: B batch, N images of a split, h x w cells of the feature maps, H x W pixels, D features, M
patches in the bank. Label 0 is nominal, every other one a kind of defect.
"""

import functools
import io
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ft import anomalies, errors, feature_maps, stats, thumbnails, tune

KEYS = {
  "nominal": ("", "label of images without a defect; empty: the only one that train has"),
  "maps": ((), "which feature maps, from 0; (): those of 8 and 16 pixels a cell, else the last",
           "list"),
  "neighbourhood": (3, "cells on a side that a patch is the average of, odd", (1, 15)),
  "distance": ("euclidean", "of a patch to those of the bank", ["euclidean", "cosine"]),
  "score": ("patchcore", "of an image: its patches' largest distance, reweighted by the bank's "
            "neighbours; the largest; the mean of the largest 1 %; the mean",
            ["patchcore", "max", "tail", "mean"]),
  "neighbours": (9, "patchcore: neighbours that reweight; 1: none", (1, None)),
  "pool": (50_000, "patches of train, drawn at random, that the bank is chosen from; 0: all",
           (0, None)),
  "coreset": (0.1, "share of them in the bank, chosen to cover them (greedy k-centre)",
              (0.0001, 1.0)),
  "projection": (128, "dimensions of the random projection the choice is made in; 0: none",
                 (0, None)),
  "quantile": (0.95, "share of nominal validation images below the threshold", (0.5, 1.0)),
  "pictures": (8, "images of test whose heat maps are on the card", (0, 50)),
}

STRIDES = (8, 16)  # pixels a cell of the maps that are taken by default
FILE = "bank.npz"  # beside the exported model
MEAN = 1000  # images of train, drawn at random, that the mean image is of
SEED = 0  # of the patches that are drawn and of the coreset: the same bank whatever the run's seed


class Detector:
  """What tasks share that score images and see nominal ones alone before they are judged.

  A task adds how images are scored (`predict`, which gives "score" and "map") and what is saved.

  Attributes:
    labels: names by index, the nominal one first.
    metric: what the loop looks at, which is defined on nominal images; nothing is chosen by it.
    judged: what verdicts are about.
    model_args: what the model has to be loaded with: no head.
    needs: roles that a row has to have beside the model's inputs.
    head_features: `features` are what the baselines are made of, of train too.
    score: None: no metric is a mean over images.
  """

  metric = ("mean_score", "min")
  judged = ("auroc", "max")
  model_args = {"num_labels": 0}
  needs = ("label",)
  head_features = True
  score = None
  saved = ()  # keys of the config that prediction needs
  _limit = None  # score above which an image is anomalous, where outputs do not say

  def __init__(self, config, data, preprocess):
    """Settles what is nominal, and leaves nothing else in train and validation.

    Args:
      config: the section `task`.
      data: a `sources.Data` of images; its train and validation, and the report on them, change.
      preprocess: `ft.data.image.Preprocess`.

    Raises:
      UserError: no images, no nominal ones, or no labels in test.
    """
    if "image" not in data.columns:
      raise errors.UserError("anomalies are found in images; set data.modality=image")
    if preprocess.augments:
      raise errors.UserError("what is nominal is learnt from images as they are, so nothing is "
                             "augmented; set data.crop and data.flip to none, data.rotate90 and "
                             "data.colour off")
    nominal = _nominal(config.nominal, data)
    kinds = {str(label) for rows in data.splits.values() for label in rows.labels or ()}
    self._settle([nominal, *sorted(kinds - {nominal})], {key: config[key] for key in self.saved},
                 preprocess)
    for name in ("train", "validation"):
      _keep(data, name, nominal)
    self._config, self._train, self._test = config, data.splits["train"], data.splits["test"]

  def _settle(self, labels, how, preprocess):
    self.labels, self._how, self.preprocess = list(labels), dict(how), preprocess
    self._how["maps"] = tuple(self._how["maps"])

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"labels": self.labels, **self._how}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Detector":
    """Returns a task that can predict and describe, from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(spec["labels"], {key: spec[key] for key in cls.saved}, preprocess)
    return task

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    return {"labels": self.labels, "mode": self.judged[1]}

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns preprocess(row) with "label" () int32 and, where rows have masks, "mask" (H, W)."""
    label = self.labels[0] if row.get("label") is None else str(row["label"])
    if label not in self.labels:
      raise errors.RowError(f"label {label!r} was not there in training"
                            f"{errors.suggest(label, self.labels)}")
    made = {**self.preprocess(row), "label": np.asarray(self.labels.index(label), np.int32)}
    if "mask" in row:
      made["mask"] = (self.preprocess.mask(row) > 0).astype(np.uint8)
    return made

  def unlabelled(self, row: dict) -> dict:
    """Returns preprocess(row)."""
    return self.preprocess(row)

  def _threshold(self, scores) -> float:
    return float(np.quantile(scores, self._config.quantile))

  def features(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns "away" (B,) from the mean image, "features" (B, D) of whole images, and "label"."""
    pixels = self.preprocess.finish({"pixel_values": batch["pixel_values"]})
    made = apply(variables, pixels, None)["features"].astype(jnp.float32)
    apart = batch["pixel_values"].astype(jnp.float32) - self._mean_image
    return {"away": jnp.sqrt(jnp.sum(jnp.square(apart), (1, 2, 3))), "features": made,
            "label": batch["label"]}

  @functools.cached_property
  def _mean_image(self) -> np.ndarray:
    """(H, W, 3) float32, the mean pixels of train: no split's pixels are held for it."""
    rows = np.random.default_rng(SEED).permutation(len(self._train))[:MEAN]
    total, count = 0.0, 0
    for i in rows:
      try:
        total += self.preprocess(self._train[int(i)])["pixel_values"].astype(np.float64)
      except errors.RowError:
        continue  # it is counted when the rows are made examples
      count += 1
    return (total / count).astype(np.float32)

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the metrics of a split; those that it does not define are NaN.

    mean_score; auroc of images, and auroc/<kind> against nominal ones; f1, precision, recall,
    false_alarms (share of nominal images) at the threshold, and recall/<kind>; where there are
    masks pixel_auroc and pro (`anomalies.region_overlap`).
    """
    score, label = np.asarray(outputs["score"], np.float64), np.asarray(outputs["label"])
    found = {"mean_score": score.mean(), "auroc": stats.auroc(score, label > 0)}
    limit = outputs.get("threshold", self._limit)
    if limit is not None:
      found |= self._decided(score > np.asarray(limit), label)
    for i, kind in enumerate(self.labels[1:], start=1):
      of, rows = label == i, (label == i) | (label == 0)
      if of.any():
        found[f"auroc/{kind}"] = stats.auroc(score[rows], of[rows])
    if "mask" in outputs and "map" in outputs:
      found |= self._pixels(outputs)
    return {key: float(value) for key, value in found.items()}

  def _decided(self, said, label) -> dict:
    """Returns the metrics of what is called a defect (N,), by the labels (N,)."""
    defect = label > 0
    hits = (said & defect).sum()
    found = {"f1": _ratio(2 * hits, said.sum() + defect.sum()) if defect.any() else np.nan,
             "precision": _ratio(hits, said.sum()), "recall": _ratio(hits, defect.sum()),
             "false_alarms": _ratio((said & ~defect).sum(), (~defect).sum())}
    return found | {f"recall/{kind}": said[label == i].mean()
                    for i, kind in enumerate(self.labels) if i and (label == i).any()}

  def _pixels(self, outputs: dict) -> dict:
    masks = np.asarray(outputs["mask"])
    maps = anomalies.enlarge(outputs["map"], masks.shape[1:])
    return {"pixel_auroc": stats.auroc(maps.ravel(), masks.ravel()),
            "pro": anomalies.region_overlap(maps, masks)}

  def value(self, outputs: dict) -> float:
    """Returns the AUROC of images."""
    return stats.auroc(np.asarray(outputs["score"], np.float64), np.asarray(outputs["label"]) > 0)

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one image as JSON types: anomalous, score, threshold, and where.

    where: [row, column] of the worst cell's centre, as shares of height and width.
    """
    away = np.asarray(outputs["map"])
    row, column = np.unravel_index(away.argmax(), away.shape)
    score, threshold = float(outputs["score"]), calibration["threshold"]
    return {"anomalous": score > threshold, "score": score, "threshold": threshold,
            "where": [(int(row) + 0.5) / away.shape[0], (int(column) + 0.5) / away.shape[1]]}

  def evidence(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the card's further fields: heat maps of images of test from all over the ranks."""
    test = outputs["test"]
    count = min(self._config.pictures, len(test["score"]))
    if not count:
      return {}
    order = np.argsort(-np.asarray(test["score"]), kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
    pixels = [self.preprocess(self._test[int(test["index"][i])])["pixel_values"] for i in chosen]
    maps = anomalies.enlarge(np.asarray(test["map"])[chosen], pixels[0].shape[:2])
    low, high = np.median(maps), maps.max()
    shown = []
    for i, image, heat in zip(chosen, pixels, maps, strict=True):
      score = float(test["score"][i])
      said = "above" if score > calibration["threshold"] else "below"
      shown.append({
        "where": self._test.where(int(test["index"][i])),
        "words": f"{self.labels[int(test['label'][i])]}: score {score:.3f}, {said} the threshold",
        "images": {"image": thumbnails.uri(image),
                   "heat map": thumbnails.uri(thumbnails.heat(image, heat, low, high))}})
    return {"pictures": shown}

  def baselines(self, features: dict) -> dict:
    """Returns what no bank of patches gets.

    Args:
      features: split -> {"away", "features", "label"}, with at least "train" and "validation".

    Returns:
      "mean-image" (distance of the pixels to the mean of train) and "nearest-image" (distance of
      the whole image's features to the nearest of train's) -> split -> score, threshold, label.
    """
    train = features["train"]

    def from_mean(part):
      return part["away"]

    def from_nearest(part):
      away, _ = anomalies.nearest(jnp.asarray(part["features"]), jnp.asarray(train["features"]))
      return np.asarray(away)

    found = {}
    for name, measure in (("mean-image", from_mean), ("nearest-image", from_nearest)):
      threshold = self._threshold(measure(features["validation"]))
      found[name] = {}
      for split, part in features.items():
        score = measure(part)
        found[name][split] = {"score": score, "threshold": np.full(len(score), threshold),
                              "label": part["label"]}
    return found


class Task(Detector):
  """Bank, scores, metrics and baselines of anomaly detection; pure functions, no loop.

  Everywhere `apply(variables, inputs, rng)` returns the model's outputs, a dict with "feature_maps"
  and "features". The bank is in variables["company"].
  """

  saved = ("maps", "neighbourhood", "distance", "score", "neighbours")

  def __init__(self, config, data, preprocess):
    """Settles what is nominal; see `Detector`.

    Raises:
      UserError: as there, or a neighbourhood without a centre.
    """
    if config.neighbourhood % 2 == 0:
      raise errors.UserError(f"task.neighbourhood={config.neighbourhood} has no centre; take an "
                             "odd number of cells")
    super().__init__(config, data, preprocess)

  def save(self, company: Mapping) -> dict[str, bytes]:
    """Returns file name -> content of what prediction needs beside the model."""
    file = io.BytesIO()
    np.savez(file, **{key: np.asarray(value) for key, value in company.items()})
    return {FILE: file.getvalue()}

  def restore(self, folder) -> dict:
    """Returns what `save` was given, from the folder (a pathlib.Path) of an exported model."""
    try:
      with np.load(folder / FILE, allow_pickle=False) as file:
        return {key: file[key] for key in ("bank", "threshold")}
    except (OSError, ValueError, KeyError) as e:
      raise errors.UserError(f"{folder / FILE}: no readable bank of patches: {e}") from e

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over images: (scores, weight, {}). No gradient of it is of use."""
    made = self.predict(apply, variables, batch)["score"]
    return jnp.sum(made * batch["weight"]), jnp.sum(batch["weight"]), {}

  def observe(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"patches": (B, h, w, D) float32}, what `fit` is made of."""
    pixels = self.preprocess.finish({"pixel_values": batch["pixel_values"]})
    maps = apply(variables, pixels, None)["feature_maps"]
    chosen = feature_maps.pick(maps, self._how["maps"], batch["pixel_values"].shape[1], STRIDES)
    return {"patches": feature_maps.patches(chosen, self._how["neighbourhood"])}

  def fit(self, stream: Callable[[str], Iterable[dict]]) -> dict:
    """Returns {"bank": (M, D), "threshold": ()}: all that is learnt.

    Args:
      stream: split -> batches of what `observe` returns.
    """
    c = self._config
    points = self._draw(stream("train"), c.pool)
    points = np.asarray(anomalies.unit(points)) if c.distance == "cosine" else points
    count = max(1, round(c.coreset * len(points)))
    bank = points[anomalies.select(points, count, c.projection, SEED)]
    score = jax.jit(lambda images, bank: self._score(images, bank)[0])
    scores = [np.asarray(score(part["patches"], bank)) for part in stream("validation")]
    return {"bank": bank, "threshold": np.float32(self._threshold(np.concatenate(scores)))}

  def _draw(self, stream, most: int) -> np.ndarray:
    """Returns up to `most` patches (n, D) of a stream, each with the same chance (reservoir)."""
    rng, kept, keys = np.random.default_rng(SEED), None, np.zeros(0)
    for part in stream:
      rows = np.asarray(part["patches"]).reshape(-1, part["patches"].shape[-1])
      new = rng.random(len(rows))
      kept, keys = (rows, new) if kept is None else (
        np.concatenate([kept, rows]), np.concatenate([keys, new]))
      if most and len(keys) > most:
        smallest = np.sort(np.argpartition(keys, most)[:most])
        kept, keys = kept[smallest], keys[smallest]
    return kept

  def _score(self, patches, bank):
    return anomalies.score(patches, bank, distance=self._how["distance"], how=self._how["score"],
                           neighbours=self._how["neighbours"])

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns "score" (B,), "map" (B, h, w), "threshold" (B,), "label" and "mask" where given."""
    company = variables[tune.COMPANY]
    score, away = self._score(self.observe(apply, variables, batch)["patches"], company["bank"])
    return {"score": score, "map": away, "threshold": jnp.full_like(score, company["threshold"]),
            **{key: batch[key] for key in ("label", "mask") if key in batch}}

  def calibrate(self, outputs: dict) -> dict:
    """Returns {"threshold": score above which an image is anomalous}, which `fit` has found."""
    return {"threshold": float(outputs["threshold"][0])}


def _nominal(given: str, data) -> str:
  """Returns the label that is nominal; UserError if that is not clear."""
  known = {name: {str(label) for label in rows.labels or ()} for name, rows in data.splits.items()}
  there = known["train"]
  if given and there and given not in there:
    raise errors.UserError(f"task.nominal={given!r}: no image of train has this label"
                           f"{errors.suggest(given, there)}; there are {', '.join(sorted(there))}")
  if not given and len(there) > 1:
    raise errors.UserError("task.nominal has to say which label is of images without a defect: "
                           f"{', '.join(sorted(there))}")
  if not known["test"]:
    raise errors.UserError(f"{data.splits['test'].name} has no labels, so that nothing says which "
                           "of its images have a defect; put them in folders by kind, or name the "
                           "column in data.columns.label")
  return given or next(iter(there), "nominal")


def _keep(data, name: str, nominal: str) -> None:
  """Leaves the nominal rows of a split, and says so in the report."""
  rows = data.splits[name]
  if rows.labels is None:
    return
  kept = [i for i, label in enumerate(rows.labels) if str(label) == nominal]
  if not kept:
    raise errors.UserError(f"{name} has no image with the label {nominal}, which "
                           f"{'all' if name == 'train' else 'the threshold'} is learnt from")
  data.splits[name] = rows.select(kept)
  data.report["dropped"].setdefault(name, {})["not nominal"] = len(rows) - len(kept)
  data.report["splits"][name] = len(kept)
  data.report["labels"][name] = {nominal: len(kept)}


def _ratio(part, whole) -> float:
  return part / whole if whole else float("nan")
