"""Semantic segmentation: a class for each pixel, by a head on a model's feature maps.

The maps, each normalised, stand side by side at the largest grid; a linear layer makes class
scores of each cell, which are interpolated to the pixels (the linear protocol of DINOv2, Oquab et
al. 2023, arXiv:2304.07193). `task.head=upernet` joins scales in its place (`ft/upernet.py`). The
head is the task's own, in variables["company"], and is kept beside the exported model.

Shapes: B batch, N images of a split, H x W pixels, h x w cells, C classes, D features.
"""

import base64
import io
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft import errors, feature_maps, tune, upernet
from ft.weights import names

KEYS = {
  "classes": ((), "names of the mask's values 0, 1, …; (): the values that train has", "list"),
  "ignore": (255, "value of pixels that count nowhere; -1: none", (-1, 255)),
  "maps": ((), "which feature maps, from 0; (): those of 4 to 32 pixels a cell, else the last",
           "list"),
  "head": ("linear", "a linear layer on each cell; or pyramid pooling and a feature pyramid",
           ["linear", "upernet"]),
  "width": (64, "upernet: units of its layers", (1, None)),
  "metric": ("miou", "what the best checkpoint is chosen by", ["miou", "pixel_accuracy"]),
}

STRIDES = (4, 8, 16, 32)  # pixels a cell of the maps that are taken by default
FILE = "segmentation_head.npz"  # beside the exported model
NOWHERE = 255  # class of pixels that count nowhere


class Task:
  """Loss, predictions, metrics and baseline of segmentation; pure functions, no loop.

  Everywhere `apply(variables, inputs, rng)` returns the model's outputs, with "feature_maps".

  Attributes:
    labels: class names by index.
    metric: (name, "max").
    model_args: what the model has to be loaded with: no head of its own.
    head: path prefixes of the task's own head, for its learning rate.
    needs: roles that a row has to have beside the model's inputs.
    head_features: `features` are what the baseline is made of, of train too.
    score: None: no metric is a mean over images.
  """

  model_args = {"num_labels": 0}
  head = (f"{tune.COMPANY}/head",)
  needs = ("mask",)
  head_features = True
  score = None

  def __init__(self, config, data, preprocess):
    """Settles the classes from the masks of train.

    Args:
      config: the section `task`.
      data: a `sources.Data` of images with masks.
      preprocess: `ft.data.image.Preprocess`.

    Raises:
      UserError: there are no masks, a single class, or pixels would be moved without their mask.
    """
    if "mask" not in data.columns:
      raise errors.UserError("task.name=segment needs a mask for each image: a folder with images "
                             "and masks in it, or a table whose column is named in "
                             "data.columns.mask")
    if preprocess.augments:
      raise errors.UserError("task.name=segment does not move masks with augmented images yet; set "
                             "data.crop and data.flip to none, data.rotate90 and data.colour off")
    how = config.ignore, config.maps, config.metric, config.head, config.width
    self._settle(config.classes, range(len(config.classes)), *how, preprocess)
    self._size, values = None, set()
    for row in data.splits["train"]:
      try:
        mask = preprocess.mask(row)
      except errors.RowError:
        continue  # it is counted, or an error, when the rows are made examples
      self._size, values = self._size or mask.shape, values | set(np.unique(mask).tolist())
    if not config.classes:
      values = sorted(values - {config.ignore})
      self._settle(map(str, values), values, *how, preprocess)
    if len(self.labels) < 2:
      raise errors.UserError(f"the masks of train have the class {', '.join(self.labels)} only; "
                             f"pixels of {config.ignore} count nowhere (task.ignore)")

  def _settle(self, labels, values, ignore, maps, metric, head, width, preprocess):
    self.labels, self._values, self._ignore = list(labels), list(values), ignore
    self._maps, self.metric, self.preprocess = tuple(maps), (metric, "max"), preprocess
    self._kind, self._width = head, width

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"labels": self.labels, "values": self._values, "ignore": self._ignore,
            "maps": list(self._maps), "metric": self.metric[0], "head": self._kind,
            "width": self._width}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can predict and describe (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(spec["labels"], spec["values"], spec["ignore"], spec["maps"], spec["metric"],
                 spec.get("head", "linear"), spec.get("width", 0), preprocess)
    return task

  def save(self, company: Mapping) -> dict[str, bytes]:
    """Returns file name -> content of what prediction needs beside the model."""
    file = io.BytesIO()
    np.savez(file, **{key: np.asarray(value)
                      for key, value in names.flatten(company["head"]).items()})
    return {FILE: file.getvalue()}

  def restore(self, folder) -> dict:
    """Returns what `save` was given, from the folder (a pathlib.Path) of an exported model."""
    try:
      with np.load(folder / FILE, allow_pickle=False) as file:
        return {"head": names.unflatten({key: file[key] for key in file.files})}
    except (OSError, ValueError) as e:
      raise errors.UserError(f"{folder / FILE}: no readable head: {e}") from e

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    return {"labels": self.labels, "mode": self.metric[1], "resampled": "images, not pixels"}

  def company(self, pretrained, tuned, sharding: Callable) -> tuple[dict, dict]:
    """Returns (the head, which trains and says nothing yet; nothing frozen).

    Of the linear one kernel (D, C) and bias (C,), zeros; of UPerNet its parameters.
    """
    del tuned
    images = jax.ShapeDtypeStruct((1, *self._size, 3), jnp.float32)
    maps = jax.eval_shape(
      lambda variables, x: self._pick(pretrained.module.apply(variables, pixel_values=x), x),
      pretrained.variables, images)
    if self._kind == "upernet":
      head = jax.jit(self._upernet().init)(
        jax.random.PRNGKey(0), [jnp.zeros(y.shape, jnp.float32) for y in maps])["params"]
    else:
      width = sum(y.shape[-1] for y in maps)
      head = {"kernel": np.zeros((width, len(self.labels)), np.float32),
              "bias": np.zeros(len(self.labels), np.float32)}
    return {"head": jax.tree.map(lambda x: jax.device_put(x, sharding(x.shape)), head)}, {}

  def _upernet(self) -> upernet.UPerNet:
    return upernet.UPerNet(len(self.labels), self._width)

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns preprocess(row) with "mask" (H, W) uint8 of class indices, NOWHERE where none counts.

    Raises:
      RowError: the mask has another size than the image, or a value that is no class.
    """
    if row.get("mask") is None:
      raise errors.RowError("there is no mask for the image")
    mask = self.preprocess.mask(row)
    found = np.full(mask.shape, NOWHERE, np.uint8)
    for i, value in enumerate(self._values):
      found[mask == value] = i
    wrong = np.unique(mask[(found == NOWHERE) & (mask != self._ignore)])
    if len(wrong):
      raise errors.RowError(f"its mask has the value {wrong[0]}, which is no class: there are "
                            f"{', '.join(map(str, self._values))} (task.classes, task.ignore)")
    return {**self.preprocess(row), "mask": found}

  def unlabelled(self, row: dict) -> dict:
    """Returns preprocess(row)."""
    return self.preprocess(row)

  def _pick(self, outputs, pixels) -> list:
    return feature_maps.pick(outputs["feature_maps"], self._maps, pixels.shape[1], STRIDES)

  def _cells(self, maps, head):
    """Returns class scores (B, h, w, C) of the largest grid."""
    if self._kind == "upernet":
      return self._upernet().apply({"params": head}, maps)
    normal = [jax.nn.standardize(y.astype(jnp.float32), axis=-1) for y in maps]
    return feature_maps.patches(normal, 1) @ head["kernel"] + head["bias"]

  def _logits(self, apply, variables, batch, rng):
    """Returns class scores (B, H, W, C) float32."""
    pixels, head = batch["pixel_values"], variables[tune.COMPANY]["head"]
    outputs = apply(variables, self.preprocess.finish({"pixel_values": pixels}), rng)
    cells = self._cells(self._pick(outputs, pixels), head)
    return jax.image.resize(cells, (*pixels.shape[:3], cells.shape[-1]), "bilinear")

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over pixels: (total, weight, {"pixel_accuracy": …}); NOWHERE has no weight."""
    logits = self._logits(apply, variables, batch, rng)
    counts = (batch["mask"] != NOWHERE) * batch["weight"][:, None, None]
    losses = self._losses(logits, batch["mask"])
    right = jnp.argmax(logits, -1) == batch["mask"]
    return jnp.sum(losses * counts), jnp.sum(counts), {"pixel_accuracy": jnp.sum(right * counts)}

  def _losses(self, logits, mask):
    label = jnp.where(mask == NOWHERE, 0, mask).astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns what is counted in an image, so that no split's pixels are held.

    "hits", "true" and "said" (B, C) pixels of a class that are right, are of it, and are said to
    be, "nats" (B,) the sum of their losses; where the batch has no mask "classes" (B, H, W) uint8.
    """
    logits = self._logits(apply, variables, batch, None)
    classes = jnp.argmax(logits, -1)
    if "mask" not in batch:
      return {"classes": classes.astype(jnp.uint8)}
    counts = batch["mask"] != NOWHERE
    table = self._confusion(batch["mask"], classes)
    return {"hits": jnp.diagonal(table, axis1=1, axis2=2), "true": table.sum(2),
            "said": table.sum(1),
            "nats": jnp.sum(self._losses(logits, batch["mask"]) * counts, (1, 2))}

  def _confusion(self, mask, classes):
    size = len(self.labels)
    pairs = jnp.where(mask == NOWHERE, size**2, mask.astype(jnp.int32) * size + classes)
    count = lambda one: jnp.bincount(one.ravel(), length=size**2 + 1)[:-1]  # noqa: E731
    return jax.vmap(count)(pairs).reshape(-1, size, size)

  def features(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"pixels": (B, C)} of each class, by which the majority is known."""
    del apply, variables
    return {"pixels": self._confusion(batch["mask"], jnp.zeros_like(batch["mask"], jnp.int32)
                                      )[..., 0]}

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the metrics of a split over all its pixels.

    miou, the mean over classes of the intersection of true and predicted pixels over their union,
    of the classes that have either; pixel_accuracy; mean_recall over classes that occur; log_loss
    in nats a pixel; iou/<class>.
    """
    hits, true, said = (np.sum(outputs[key], axis=0, dtype=np.float64)
                        for key in ("hits", "true", "said"))
    union = true + said - hits
    iou = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
    recall = np.divide(hits, true, out=np.full(len(hits), np.nan), where=true > 0)
    total = true.sum()
    found = {"miou": np.nanmean(iou) if total else np.nan,
             "pixel_accuracy": hits.sum() / total if total else np.nan,
             "mean_recall": np.nanmean(recall) if total else np.nan,
             "log_loss": np.sum(outputs["nats"], dtype=np.float64) / total if total else np.nan}
    found |= {f"iou/{self.labels[i]}": value for i, value in enumerate(iou) if union[i]}
    return {key: float(value) for key, value in found.items()}

  def value(self, outputs: dict) -> float:
    """Returns the selection metric of a split."""
    return self.metrics(outputs)[self.metric[0]]

  def calibrate(self, outputs: dict) -> dict:
    """Returns {}: nothing is fitted to validation."""
    del outputs
    return {}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one image as JSON types.

    shares {class: share of the pixels}, and mask, a data URI of a PNG with the values that masks of
    train have, of the size that the model sees.
    """
    del calibration
    import PIL.Image
    classes = np.asarray(outputs["classes"])
    counts = np.bincount(classes.ravel(), minlength=len(self.labels)) / classes.size
    file = io.BytesIO()
    PIL.Image.fromarray(np.array(self._values, np.uint8)[classes]).save(file, "PNG")
    return {"shares": {name: float(n) for name, n in zip(self.labels, counts, strict=True)},
            "mask": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")}

  def evidence(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns {}: a confusion matrix of pixels, as if they were rows, would look far too sure."""
    del outputs, calibration
    return {}

  def baselines(self, features: dict) -> dict:
    """Returns what no training gets: "majority", every pixel of the class most frequent in train.

    Args:
      features: split -> {"pixels": (N, C)}, with at least "train".
    """
    total = features["train"]["pixels"].sum(0, dtype=np.float64)
    most, nats = int(total.argmax()), -np.log((total + 1) / (total + 1).sum())
    found = {}
    for split, part in features.items():
      true = np.asarray(part["pixels"], np.int64)
      here = np.arange(len(total)) == most
      found[split] = {"hits": true * here, "true": true,
                      "said": true.sum(1, keepdims=True) * here, "nats": true @ nats}
    return {"majority": found}
