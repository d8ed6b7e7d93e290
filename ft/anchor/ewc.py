"""Elastic weight consolidation: weights that mattered for what was known are held the most.

weight/2 Σ F_i (θ_i - θ0_i)² (Kirkpatrick et al. 2017, arXiv:1612.00796). F is the diagonal of the
empirical Fisher information: the mean over rows of `source` of the squared gradient of each row's
own loss at θ0, without dropout. Only parameters that the checkpoint gave take part; under a new
label head the gradients pass through its random weights, so there it says little: prefer it where
the pretrained head stays, as in language models. Cost: before training (and again when a run goes
on), one forward and backward pass for every row, one at a time; then a copy of what trains and one
of F; no further pass in the step.
"""

import jax
import jax.numpy as jnp

from ft import anchor, errors, tune
from ft import run as runs
from ft.data import loader as loaders

KEYS = {
  "weight": (0.0, "lambda: strength of the pull; 0: off", (0.0, None)),
  "source": ("", "rows of what was known, with labels, as data.train; has to be set"),
  "rows": (256, "most rows of the source that are looked at", (1, None)),
}


def make(config, context) -> anchor.Part | None:
  """Returns the penalty and the Fisher information; see `ft.anchor.make`."""
  if not config.weight:
    return None
  if not config.source:
    raise errors.UserError(
      "anchor.ewc: EWC without a source: set anchor.ewc.source to rows of what shall not be "
      "forgotten, with labels (the task's loss is taken of them)")
  known, run = context.need_known("anchor.ewc.weight"), context.run
  examples = context.examples(config.source, "anchor.ewc.source", labelled=True)
  examples = loaders.take(examples, config.rows, run.config.seed)
  batches = runs.loader(run, examples, run.config.train.batch)
  information = fisher(
    run.task.loss, context.apply, context.tuned.combine, context.tuned.trainable,
    {**context.frozen, **context.mutable}, known,
    (run.place(batches.batch(i)) for i in range(batches.steps_per_epoch)))
  return anchor.Part(penalty=penalty(config.weight), start=True, fixed={"fisher": information})


def fisher(loss, apply, combine, trainable, frozen, known, batches) -> dict:
  """Returns the mean over rows of squared gradients: a nested dict of the leaves in `known`.

  Args:
    loss: the task's.
    apply: as `state.make_apply` gives it.
    combine: (frozen, trainable) -> variables.
    trainable, frozen: the trees.
    known: paths of the leaves that are wanted; no others get a gradient.
    batches: iterable of batches; rows of weight 0 do not count.
  """
  flat = tune.flatten(trainable)
  rest = {path: leaf for path, leaf in flat.items() if path not in known}

  def one(chosen, rest, frozen, row):
    variables = combine(frozen, tune.unflatten({**rest, **chosen}))
    call = lambda variables, inputs, rng=None: apply(variables, inputs)[0]  # noqa: E731
    return loss(call, variables, jax.tree.map(lambda x: x[None], row), None)[0]

  @jax.jit
  def add(sums, chosen, rest, frozen, batch):
    def body(sums, row):
      grads = jax.grad(one)(chosen, rest, frozen, row)
      return jax.tree.map(lambda s, g: s + jnp.square(g.astype(jnp.float32)), sums, grads), None

    return jax.lax.scan(body, sums, batch)[0]

  chosen = {path: flat[path] for path in sorted(known)}
  sums = {path: jnp.zeros_like(leaf, jnp.float32) for path, leaf in chosen.items()}
  count = 0.0
  for batch in batches:
    sums = add(sums, chosen, rest, frozen, batch)
    count += float(jnp.sum(batch["weight"] > 0))
  return tune.unflatten({path: value / count for path, value in sums.items()})


def penalty(weight: float):
  """Returns (trainable, {"start": …, "fisher": …}) -> scalar."""
  def value(trainable, fixed):
    flat, start = tune.flatten(trainable), tune.flatten(fixed["start"])
    return sum(weight / 2 * jnp.sum(held * jnp.square(
      flat[path].astype(jnp.float32) - start[path].astype(jnp.float32)))
      for path, held in tune.flatten(fixed["fisher"]).items())

  return value
