"""Anomalies by a student: a decoder learns what a frozen model sees in nominal images, only there.

An image is as anomalous as the student (`ft/students.py`) and its teacher, the frozen model,
differ: 1 - cosine, cell by cell, summed over feature maps. The best step is the one with the
smallest scores of nominal validation images, and they give the threshold; defects are seen in test
alone. All else is as in `ft.tasks.anomaly`; `tune.method=none` leaves the teacher as it is.

Shapes: B batch, h x w cells of the feature maps, H x W pixels.
"""

import io
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ft import anomalies, errors, feature_maps, students, tune
from ft.tasks import anomaly
from ft.weights import names

KEYS = {
  "nominal": ("", "label of images without a defect; empty: the only one that train has"),
  "maps": ((), "which feature maps, from 0, fine to coarse; (): those of 4 to 16 pixels a cell, "
           "else the last", "list"),
  "width": (64, "units of the student, which its bottleneck has, too", (1, None)),
  "dropout": (0.1, "share of the bottleneck that is dropped in training", (0.0, 0.9)),
  "score": ("max", "of an image: its cells' largest difference; the mean of the largest 1 %; the "
            "mean", ["max", "tail", "mean"]),
  "quantile": (0.95, "share of nominal validation images below the threshold", (0.5, 1.0)),
  "pictures": (8, "images of test whose heat maps are on the card", (0, 50)),
}

STRIDES = (4, 8, 16)  # pixels a cell of the maps that are taken by default
FILE = "student.npz"  # beside the exported model
SCORES = {"max": jnp.max, "mean": jnp.mean, "tail": anomalies.tail}


class Task(anomaly.Detector):
  """Loss and scores of a student; pure functions, no loop, but for the threshold.

  Everywhere `apply(variables, inputs, rng)` returns the teacher's outputs, a dict with
  "feature_maps" and "features". The student's parameters are in variables["company"].

  Attributes:
    head: path prefixes of what trains anew, for its learning rate.
  """

  saved = ("maps", "width", "dropout", "score")
  head = (f"{tune.COMPANY}/student",)

  def _settle(self, labels, how, preprocess):
    super()._settle(labels, how, preprocess)
    self._student = students.Decoder(how["width"], how["dropout"])

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {**super().spec(), "limit": self._limit}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can predict and describe, from what `spec` returned."""
    task = super().from_spec(spec, preprocess)
    task._limit = spec["limit"]
    return task

  def save(self, company: Mapping) -> dict[str, bytes]:
    """Returns file name -> content of what prediction needs beside the model."""
    file = io.BytesIO()
    np.savez(file, **{key: np.asarray(value)
                      for key, value in names.flatten(company["student"]).items()})
    return {FILE: file.getvalue()}

  def restore(self, folder) -> dict:
    """Returns what `save` was given, from the folder (a pathlib.Path) of an exported model."""
    try:
      with np.load(folder / FILE, allow_pickle=False) as file:
        return {"student": names.unflatten({key: file[key] for key in file.files})}
    except (OSError, ValueError) as e:
      raise errors.UserError(f"{folder / FILE}: no readable student: {e}") from e

  def company(self, pretrained, tuned, sharding: Callable) -> tuple[dict, dict]:
    """Returns (the student with random weights, which trains; nothing frozen)."""
    del tuned
    pixels = jax.ShapeDtypeStruct((1, *self._sides(), 3), jnp.float32)
    maps = jax.eval_shape(
      lambda variables, x: self._pick(pretrained.module.apply(variables, pixel_values=x), x),
      pretrained.variables, pixels)
    made = jax.jit(self._student.init)(
      jax.random.PRNGKey(anomaly.SEED), [jnp.zeros(y.shape, jnp.float32) for y in maps])
    place = lambda x: jax.device_put(x, sharding(x.shape))  # noqa: E731
    return {"student": jax.tree.map(place, made["params"])}, {}

  def _sides(self) -> tuple:
    """Returns (height, width) of the first image that can be read."""
    for row in self._train:
      try:
        return self.preprocess(row)["pixel_values"].shape[:2]
      except errors.RowError:
        continue  # it is counted when the rows are made examples
    raise errors.UserError("no image of train can be read")

  # On the device.

  def _pick(self, outputs, pixels) -> list:
    return feature_maps.pick(outputs["feature_maps"], self._how["maps"], pixels.shape[1], STRIDES)

  def _apart(self, apply, variables, batch, rng) -> list:
    """Returns differences (B, h_i, w_i) of each map; `rng`: of training."""
    finished = self.preprocess.finish({"pixel_values": batch["pixel_values"]})
    maps = jax.lax.stop_gradient(self._pick(apply(variables, finished, None),
                                            batch["pixel_values"]))
    made = self._student.apply(
      {"params": variables[tune.COMPANY]["student"]}, maps, rng is not None,
      rngs={} if rng is None else {"dropout": rng})
    return students.apart(maps, made)

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over images: (mean 1 - cosine of the cells, over all maps, weight, {})."""
    each = sum(jnp.mean(d, (1, 2)) for d in self._apart(apply, variables, batch, rng))
    return jnp.sum(each * batch["weight"]), jnp.sum(batch["weight"]), {}

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns "score" (B,), "map" (B, h, w), and "label" and "mask" where given."""
    away = students.joined(self._apart(apply, variables, batch, None))
    return {"score": jax.vmap(SCORES[self._how["score"]])(away.reshape(len(away), -1)),
            "map": away, **{key: batch[key] for key in ("label", "mask") if key in batch}}

  # On the host, over whole splits.

  def calibrate(self, outputs: dict) -> dict:
    """Returns {"threshold": score above which an image is anomalous}, from validation.

    Metrics of outputs that bring no threshold go by it from then on.
    """
    self._limit = self._threshold(outputs["score"])
    return {"threshold": self._limit}
