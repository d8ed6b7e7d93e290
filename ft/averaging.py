"""Averages of weights: the running mean while training, and between pretrained and tuned after it.

`ema` keeps θ̄ <- d θ̄ + (1 - d) θ of what trains (Polyak & Juditsky 1992), with the smaller decay
(1 + t) / (10 + t) at first; evaluation, the best checkpoint and the export use θ̄. Cost: one float32
copy of what trains, in memory and in checkpoints.

`wise` is WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903): after training, the weights
(1 - α) θ0 + α θ are evaluated for each α on validation, on every further test set (what was
retained) and on the sample of train; the α that is best on validation is judged on test and
exported. Leaves that no checkpoint gave, such as a new head, stay tuned. Cost: no training; the
checkpoint is read once more, and each α is one evaluation, with two further copies of the model.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ft import errors, evaluate, mesh, models, state, tune
from ft.weights import stacking

KEYS = {
  "ema": (0.0, "decay of a running mean of what trains, used in its place; 0: off",
          (0.0, 0.999999)),
  "dfr": ((), "after training, the label head is fitted anew to half of validation, balanced over "
          "these columns: label, or of data.attributes; (): off; see ft/last_layer.py"),
  "wise": ((), "shares alpha of the tuned weights to choose from after training; (): off", "list"),
}


@dataclasses.dataclass(frozen=True)
class Final:
  """The model that is judged and exported.

  Attributes:
    tuned: how it is put together (`tune.Tuned`).
    predict: step of predictions.
    state: `state.State` with what trained.
    frozen: the rest.
    tradeoff: one dict an α: "alpha", "chosen", "values": split -> metric.
    fitted: (n,) validation rows by index that it was fitted to; nothing is calibrated on them.
    notes: what the card has to say of it.
  """

  tuned: tune.Tuned
  predict: Callable
  state: state.State
  frozen: Any
  tradeoff: tuple[dict, ...] = ()
  fitted: tuple[int, ...] = ()
  notes: tuple[str, ...] = ()

  def unseen(self, outputs: dict) -> dict:
    """Returns the outputs (N, …) of validation less those of rows that it was fitted to."""
    if not self.fitted:
      return outputs
    kept = ~np.isin(outputs["index"], self.fitted)
    return {key: value[kept] for key, value in outputs.items()}


def check(config, tuned: tune.Tuned) -> None:
  """Raises UserError, before anything trains, where `average.wise` could not be done."""
  alphas = config.average.wise
  for alpha in alphas:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
      raise errors.UserError(f"average.wise={tuple(alphas)}: expected numbers from 0 (pretrained) "
                             "to 1 (tuned), such as 0,0.25,0.5,0.75,1")
  if alphas and tuned.merge is None:
    raise errors.UserError("average.wise mixes plain weights, and tune.method="
                           f"{config.tune.method} has none that compute the same; leave it at ()")


def interpolate(base: dict, tuned: dict, alpha: float, fresh=frozenset()) -> dict:
  """Returns (1 - alpha) base + alpha tuned, computed in float32; 0 and 1 give the ends themselves.

  Args:
    base, tuned: path -> array.
    alpha: from 0 to 1.
    fresh: paths that stay tuned; so do leaves that are no floating-point numbers.
  """
  def one(path, leaf):
    if alpha == 1 or path in fresh or not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    if alpha == 0:
      return base[path]
    mixed = (1 - alpha) * base[path].astype(jnp.float32) + alpha * leaf.astype(jnp.float32)
    return mixed.astype(leaf.dtype)

  return {path: one(path, leaf) for path, leaf in tuned.items()}


def sweep(run, final: Final, load: dict) -> Final:
  """Evaluates every share of `average.wise` and returns the model that is best on validation.

  Of equals, the share nearest to the pretrained weights is taken.

  Args:
    run: `run.Run`.
    final: the tuned model.
    load: split -> Loader.
  """
  merged = {**final.tuned.merge(final.frozen, final.state.trainable), **final.state.mutable}
  tuned = tune.flatten(mesh.place(merged, mesh.shardings(run.mesh, merged)))
  base, fresh = pretrained(run, tuned)
  predict = plain_step(run)
  empty = state.State(None, None, {}, {}, None, None)
  metric, direction = run.task.metric
  best, curve = None, []
  for alpha in sorted(set(run.config.average.wise)):
    weights = tune.unflatten(interpolate(base, tuned, alpha, fresh))
    values = {}
    for name in load:
      if name not in ("train", "test"):
        out = evaluate.run(predict, empty, weights, load[name], run.place, run.poll)
        values["train" if name == "train_sample" else name] = float(run.task.metrics(out)[metric])
    logging.info("alpha %g: %s", alpha, ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    value = values["validation"] if direction == "max" else -values["validation"]
    if best is None or value > best[0]:
      best = value, alpha, weights
    curve.append({"alpha": alpha, "chosen": False, "values": values})
  _, alpha, weights = best
  logging.info("average.wise: alpha %g is best on validation", alpha)
  curve = tuple({**entry, "chosen": entry["alpha"] == alpha} for entry in curve)
  return plain(run, weights, curve, predict)


def plain(run, weights: dict, tradeoff: tuple = (), predict: Callable | None = None) -> Final:
  """Returns the model of plain weights, a tree of all variables, in place of a tuned one."""
  predict = predict or plain_step(run)
  build = dataclasses.replace(tune.build({}, weights, (), merge=_plain), combine=_plain)
  return Final(build, predict, state.State(None, None, {}, {}, None, None), weights, tradeoff)


def plain_step(run) -> Callable:
  """Returns the step of predictions of plain weights."""
  return state.make_predict_step(
    run.task.predict, state.make_apply(run.pretrained.module), _plain, mesh.replicated(run.mesh))


def _plain(frozen, trainable):
  del trainable
  return frozen


def pretrained(run, tuned: dict) -> tuple[dict, frozenset]:
  """Reads the checkpoint again: (path -> array, paths that it does not give).

  Raises:
    UserError: a leaf of `tuned` has no counterpart to be mixed with.
  """
  base = read_again(run)
  for path, leaf in tuned.items():
    if path not in base or base[path].shape != np.shape(leaf):
      raise errors.UserError(f"average.wise: {path} has no pretrained counterpart of its shape "
                             f"with tune.method={run.config.tune.method}; leave it at ()")
  return base, fresh(run, tuned)


def read_again(run) -> dict:
  """Returns the variables that the run started from, path -> array, read from the checkpoint."""
  again = models.load_config(
    run.config.model, run.task.model_args, jax.random.PRNGKey(run.config.seed),
    sharding=functools.partial(mesh.shard, run.mesh))
  return tune.flatten(again.variables)


def fresh(run, paths) -> frozenset:
  """Returns which paths of variables no checkpoint gave, such as those of a new head."""
  return frozenset(path if path in paths else stacking.split(path)[0]
                   for path in run.pretrained.report.initialised)
