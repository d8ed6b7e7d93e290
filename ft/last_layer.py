"""Deep feature reweighting: the label head fitted anew to rows balanced over groups.

What a model learnt from biased rows is often all there in its features, and only the last layer
leans on the shortcut (Kirichenko et al. 2023, arXiv:2204.02937). After training, logistic
regressions on the tuned features of group-balanced draws of validation rows are averaged and stand
in the head's place; their strength is the one whose worst group is best on held-out rows. The head
is fitted to one half of validation, with half of each group. The other half is what validation is
from then on: temperatures, thresholds and conformal sets need rows that the head has not seen.
Cost: one pass over validation, and seconds.
"""

import dataclasses

import jax
import numpy as np
from absl import logging

from ft import averaging, errors, evaluate, mesh, probes, state, tune
from ft.regularise import balance
from ft.tasks import classify

DRAWS = 10
FEWEST = 4  # rows of each group that the head is fitted to
KEY = "average.dfr"


def check(run, tuned: tune.Tuned) -> None:
  """Raises UserError, before anything trains, where `average.dfr` could not be done."""
  if not run.config.average.dfr:
    return
  if not isinstance(run.task, classify.Task) or run.task.multi:
    raise errors.UserError(f"{KEY}: it fits the head of a classifier with one label a row; set "
                           "task.name=classify, or leave it at ()")
  if tuned.merge is None:
    raise errors.UserError(f"{KEY} needs plain weights, and tune.method="
                           f"{run.config.tune.method} has none that compute the same; leave it at "
                           "()")
  names, cell = balance.cells(run, run.config.average.dfr, KEY, "validation")
  _check_cells(cell, names, 2 * FEWEST - 1)  # of an odd number, the head gets one more


def _check_cells(cell, names, fewest: int) -> None:
  counts = np.bincount(cell, minlength=len(names))
  if counts.min() < fewest:
    raise errors.UserError(f"{KEY}: validation has {counts.min()} rows of "
                           f"{names[int(counts.argmin())]!r}; {fewest} are needed")


def halves(cell, seed: int) -> np.ndarray:
  """Returns the places (n / 2,) in cell (n,) of a half with half of each group, in order."""
  rng = np.random.default_rng(seed)
  return np.sort(np.concatenate([rng.permutation(np.flatnonzero(cell == g))[::2]
                                 for g in np.unique(cell)]))


def retrain(run, final: averaging.Final, loader) -> averaging.Final:
  """Returns the model with the head that balanced rows of half of validation give.

  Args:
    run: `run.Run`.
    final: the tuned model.
    loader: of validation.

  Raises:
    UserError: a head that is no linear layer on the features; for the rest see `check`.
  """
  names, cell = balance.cells(run, run.config.average.dfr, KEY, "validation")
  weights = {**final.tuned.merge(final.frozen, final.state.trainable), **final.state.mutable}
  weights = mesh.place(weights, mesh.shardings(run.mesh, weights))
  step = state.make_predict_step(
    _features(run.task), state.make_apply(run.pretrained.module), lambda frozen, _: frozen,
    mesh.replicated(run.mesh))
  empty = state.State(None, None, {}, {}, None, None)
  seen = evaluate.run(step, empty, weights, loader, run.place, run.poll)
  flat = tune.flatten(weights)
  paths = [f"{run.pretrained.head[0]}/{part}" for part in ("kernel", "bias")]
  _check_linear(run, flat, paths, seen)
  half = halves(cell[seen["index"]], run.config.seed)
  rows = seen["index"][half]
  kernel, bias = fit(np.asarray(seen["features"], np.float32)[half], seen["label"][half],
                     cell[rows], len(run.task.labels), names, run.config.seed)
  for path, value in zip(paths, (kernel, bias), strict=True):
    flat[path] = mesh.place_leaf(np.asarray(value, flat[path].dtype), flat[path].sharding)
  return dataclasses.replace(
    averaging.plain(run, tune.unflatten(flat), final.tradeoff), fitted=tuple(rows.tolist()),
    notes=(f"{KEY}: after training the label head was fitted anew to {len(half):,} of "
           f"{len(seen['index']):,} validation rows, balanced over "
           f"{', '.join(run.config.average.dfr)}. Numbers of validation, temperatures, thresholds "
           "and conformal sets are of its other rows. The history of training, and what the guard "
           "overfit says of it, are of the model before that.",))


def fit(features, label, cell, classes: int, names, seed: int = 0, draws: int = DRAWS) -> tuple:
  """Returns (kernel (D, C), bias (C,)), the mean of regressions on balanced draws.

  Args:
    features: (n, D). label: (n,) of C classes. cell: (n,) int group of each row.
    names: of the groups, for messages. draws: how many regressions are averaged.

  Raises:
    UserError: a group with fewer than FEWEST rows, or a class that no group has.
  """
  _check_cells(cell, names, FEWEST)
  if len(np.unique(label)) < classes:
    raise errors.UserError(f"{KEY}: validation lacks a class")
  half = halves(cell, seed)
  other = np.setdiff1d(np.arange(len(cell)), half)
  best = None
  for strength in probes.STRENGTHS:
    kernel, bias = _mean(features[half], label[half], cell[half], classes, strength, seed, 3)
    right = np.argmax(features[other] @ kernel + bias, 1) == label[other]
    worst = min(right[cell[other] == g].mean() for g in range(len(names)))
    if best is None or worst > best[0]:
      best = worst, strength
  logging.info("%s: strength %g, worst of %d groups %.3f on held-out validation rows", KEY, best[1],
               len(names), best[0])
  return _mean(features, label, cell, classes, best[1], seed, draws)


def _mean(features, label, cell, classes, strength, seed, draws):
  """The mean of regressions, each on as many rows of every group as the smallest has."""
  least, found = np.bincount(cell)[np.unique(cell)].min(), []
  for draw in range(draws):
    rng = np.random.default_rng((seed, draw))
    rows = np.concatenate([rng.choice(np.flatnonzero(cell == g), least, replace=False)
                           for g in np.unique(cell)])
    found.append(next(probes.probes(features[rows], label[rows], classes, (strength,))))
  return np.mean([one.kernel for one in found], 0), np.mean([one.bias for one in found], 0)


def _features(task):
  def both(apply, variables, batch):
    return {**task.features(apply, variables, batch), **task.predict(apply, variables, batch)}

  return both


def _check_linear(run, flat: dict, paths: list[str], seen: dict) -> None:
  """The head has to give what a linear layer of its kernel gives."""
  if all(path in flat for path in paths):
    gather = jax.jit(lambda tree: tree, out_shardings=mesh.replicated(run.mesh))
    kernel, bias = (np.asarray(part, np.float32) for part in gather([flat[p] for p in paths]))
    features = np.asarray(seen["features"], np.float32)[:8]
    if features.shape[-1] == kernel.shape[0] and np.allclose(
        features @ kernel + bias, seen["logits"][:8], atol=1e-2, rtol=1e-2):
      return
  raise errors.UserError(f"{KEY}: the label head of this model is no linear layer on its features; "
                         "leave it at ()")
