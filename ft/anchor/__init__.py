"""Remedies that act within the step: what stays close to what was known, and what regularises.

A file in ft/anchor/ or ft/regularise/ has `KEYS` (its config, `anchor.<file>.<key>`), off by
default, and `make(config, context) -> Part | None`, None where it is off. Remedies are found by
file name and may be combined: a new one touches no other file. Each docstring states its cost.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from ft import errors, mesh, state, tune
from ft.data import loader as loaders
from ft.data import sources
from ft.passes import Once  # noqa: F401  remedies have it from here
from ft.weights import stacking

SECTIONS = ("anchor", "regularise")


@dataclasses.dataclass(frozen=True)
class Part:
  """What one remedy adds to the step; see `state.Extras` for the functions.

  Attributes:
    wrap: loss'(…) -> loss'(…), both with `base` as last argument.
    term: a further loss on rows of its own; `beside` then has a loader under the term's key.
    penalty, point, rho: as in `state.Extras`.
    start: whether it reads the point that training starts from: a copy of all that trains is kept.
    fixed: further trees that it reads, by name.
    beside: key -> Loader whose batch stands in the run's batch under that key.
    memory: what it remembers from step to step.
  """

  wrap: Callable | None = None
  term: state.Term | None = None
  penalty: Callable | None = None
  point: Callable | None = None
  rho: float = 0.0
  start: bool = False
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  memory: state.Memory | None = None


@dataclasses.dataclass(frozen=True)
class Context:
  """What a remedy may look at before training.

  Attributes:
    run: the `run.Run`, its model loaded.
    tuned: what trains (`tune.Tuned`).
    frozen, mutable: the placed trees of the step.
    apply: what `state.make_apply` returns.
  """

  run: Any
  tuned: tune.Tuned
  frozen: Any
  mutable: Any
  apply: Callable

  @functools.cached_property
  def fresh(self) -> frozenset[str]:
    """Paths of the trainable leaves that no checkpoint gave: they were initialised."""
    flat, made = tune.flatten(self.tuned.trainable), self.run.pretrained.report.initialised
    return frozenset({path if path in flat else stacking.split(path)[0] for path in made} & {*flat})

  @functools.cached_property
  def known(self) -> frozenset[str]:
    """Paths of the trainable leaves with a pretrained point: parameters that were not initialised.

    What a tuning method adds, such as adapters, has none.
    """
    return frozenset(path for path in tune.flatten(self.tuned.trainable)
                     if path.startswith("params/") and path not in self.fresh)

  def need_known(self, key: str) -> frozenset[str]:
    """Returns `known`; UserError in the name of a key where nothing that trains is in it."""
    if not self.known:
      raise errors.UserError(
        f"{key}: nothing that trains has a pretrained point with tune.method="
        f"{self.run.config.tune.method}: adapters and new heads start from nothing; leave it off, "
        "or train pretrained weights (tune.method=full, freeze)")
    return self.known

  def examples(self, source: str, key: str, labelled: bool) -> loaders.Examples:
    """Returns the examples of a source of rows, read as those of the run.

    Args:
      source: as in data.train.
      key: what the rows are called.
      labelled: whether the task's loss is to be taken of them.
    """
    run, task = self.run, self.run.task
    read = getattr(run.preprocess, "read", sources.read)
    rows = read(run.config.data, source, name=key, labelled=labelled)
    example = task.example if labelled else getattr(task, "unlabelled", task.example)
    return loaders.prepare(rows, example, preprocess=run.preprocess,
                           drop_policy=run.config.data.drop,
                           cache_bytes=run.config.data.cache_bytes)


@dataclasses.dataclass(frozen=True)
class Anchors:
  """All remedies of a run.

  Attributes:
    extras: for `state.make_train_step`.
    fixed: what the step gets beside the frozen variables, placed; {} where nothing reads any.
    beside: key -> Loader, for the training loader.
  """

  extras: state.Extras
  fixed: dict
  beside: dict


def make(config, context: Context) -> Anchors:
  """Makes what the config asks for.

  Args:
    config: of the run; the sections anchor, regularise, average, and optim.decay_to are read.
    context: see there.

  Raises:
    UserError: a remedy lacks what it needs.
  """
  parts = []
  for section in SECTIONS:
    package = importlib.import_module(f"ft.{section}")
    for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
      module = importlib.import_module(f"ft.{section}.{name}")
      if part := module.make(config[section][name], context):
        logging.info("%s.%s: %s", section, name, module.__doc__.split("\n")[0])
        parts.append(part)
  penalties = [part.penalty for part in parts if part.penalty]
  if context.tuned.penalty:
    penalties.append(lambda trainable, fixed: context.tuned.penalty(trainable))
  extras = state.Extras(
    wrap=_wrapped([part.wrap for part in parts if part.wrap]),
    terms=tuple(part.term for part in parts if part.term),
    penalty=(lambda *args: sum(one(*args) for one in penalties)) if penalties else None,
    point=_pointed([part.point for part in parts if part.point]),
    rho=max((part.rho for part in parts), default=0.0),
    average=config.average.ema,
    memories=tuple(part.memory for part in parts if part.memory),
  )
  decayed = config.optim.decay_to == "start" and config.optim.weight_decay > 0
  fixed = {}
  if decayed or any(part.start for part in parts):
    fixed["start"] = copy(context.tuned.trainable, context.run.mesh)
    if context.mutable:
      fixed["mutable"] = copy(context.mutable, context.run.mesh)
  for part in parts:
    fixed |= part.fixed
  return Anchors(extras, fixed, {key: loader for part in parts
                                 for key, loader in part.beside.items()})


def _wrapped(wraps: list) -> Callable | None:
  """Puts the wraps around each other; the innermost loss, the task's, gets no `base`."""
  if not wraps:
    return None

  def wrap(loss):
    wrapped = lambda apply, variables, batch, rng, base: loss(  # noqa: E731
      apply, variables, batch, rng)
    for one in wraps:
      wrapped = one(wrapped)
    return wrapped

  return wrap


def _pointed(points: list) -> Callable | None:
  if not points:
    return None

  def point(trainable, fixed, rng):
    for number, one in enumerate(points):
      trainable = one(trainable, fixed, jax.random.fold_in(rng, number))
    return trainable

  return point


def copy(tree, grid):
  """Returns the placed tree in buffers of its own: those of the train state are given away."""
  placement = mesh.shardings(grid, tree)
  return jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=placement)(
    mesh.place(tree, placement))


def divergence(context: Context, temperature: float, key: str) -> Callable:
  """Returns f(apply, ours, theirs, batch) -> (total, weight): how far a pass is from the base's.

  The task says how: T² KL(base || ours) of its distributions. The base of a label head that was
  just initialised has no opinion on labels; then it is the squared distance of the features that
  the head reads, over the squared norm of the base's.

  Args:
    context: of the run.
    temperature: T.
    key: in whose name errors speak.
  """
  task, head = context.run.task, context.run.pretrained.head
  if not hasattr(task, "divergence"):
    raise errors.UserError(f"{key}: task.name={context.run.config.task.name} has no distribution "
                           "to compare with the base's; leave it off")
  made = [path for path in context.run.pretrained.report.initialised if tune.under(path, head)]
  if not made or not hasattr(task, "drift"):
    return lambda apply, ours, theirs, batch: task.divergence(
      apply, ours, theirs, batch, temperature)
  if context.tuned.only_head:
    raise errors.UserError(f"{key}: only a new head trains, so the features stay those of the "
                           "base as they are; leave it off")
  logging.info("%s: the label head is new, so features are compared, and no labels", key)
  return task.drift
