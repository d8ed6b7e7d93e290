"""Group DRO: the loss of the groups that fare worst at present counts most.

q_g <- q_g exp(eta l_g), normalised; the weights follow sum_g q_g l_g, where l_g is the mean loss of
the batch's rows of group g (Sagawa et al. 2020, arXiv:1911.08731, algorithm 1; `adjust` is their
C of C / sqrt(n_g)). q is part of the train state, so that a resumed run goes on with it. It needs
strong decay or early stopping: a network that learns the rows by heart has no worst group in train.
Cost: none but the losses of each group, from one forward pass. With train.accumulate, each
micro-batch starts from the step's q.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ft import anchor, state
from ft.regularise import balance

KEYS = {
  "by": ((), "columns whose combinations are the groups: label, or of data.attributes; (): off"),
  "eta": (0.01, "rate of the groups' weights", (0.0, None)),
  "adjust": (0.0, "C: C / sqrt(n_g) is added to the loss of a group in the update of its weight",
             (0.0, None)),
}
KEY = "group_dro"


def make(config, context) -> anchor.Part | None:
  """Returns the wrap and the memory; see `ft.anchor.make`."""
  if not config.by:
    return None
  _, cell = balance.cells(context.run, config.by, "regularise.group_dro.by")
  extra = config.adjust / np.sqrt(np.bincount(cell))
  return anchor.Part(wrap=wrap(cell, config.eta, extra), memory=memory(len(extra), config.eta,
                                                                       extra))


def memory(groups: int, eta: float, extra) -> state.Memory:
  """Returns q, which starts even, and its update from a step's sums."""
  def move(q, sums):
    return moved(q, sums["loss"] / jnp.maximum(sums["count"], 1e-9), sums["count"], eta, extra)

  return state.Memory(KEY, jnp.full(groups, 1 / groups, jnp.float32), move)


def moved(q, loss, count, eta: float, extra):
  """Returns q after a step. loss (G,): mean of each group; count (G,): where 0, q_g stays."""
  grown = q * jnp.exp(jnp.where(count > 0, eta * (loss + jnp.asarray(extra, q.dtype)), 0))
  return grown / grown.sum()


def wrap(cell, eta: float, extra):
  """Returns loss -> sum_g q_g l_g; `cell` (N,): the group of each training row."""
  cell, groups = jnp.asarray(cell), len(extra)

  def around(loss):
    def value(apply, variables, batch, rng, base):
      apply, group = anchor.Once(apply), cell[jnp.maximum(batch["index"], 0)]
      parts = [loss(apply, variables, {**batch, "weight": batch["weight"] * (group == g)}, rng,
                    base)[:2] for g in range(groups)]
      total, count = (jnp.stack(part) for part in zip(*parts, strict=True))
      _, weight, aux = loss(apply, variables, batch, rng, base)
      mean = total / jnp.maximum(count, 1e-9)
      q = moved(variables[state.MEMORY][KEY], jax.lax.stop_gradient(mean), count, eta, extra)
      sums = {"loss": jax.lax.stop_gradient(total), "count": jax.lax.stop_gradient(count)}
      return jnp.sum(q * mean) * weight, weight, {**aux, state.MEMORY: {KEY: sums}}

    return value

  return around
