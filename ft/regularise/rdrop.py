"""R-Drop: two passes with different dropout shall agree.

The mean of both losses plus weight (KL(p1 ‖ p2) + KL(p2 ‖ p1)) / 2 (Liang et al. 2021,
arXiv:2106.14448), averaged over rows. Without dropout the divergence is zero. Cost: a second
forward and backward pass; where the task's loss shapes its inputs anew (images) or takes its logits
in blocks, two more.
"""

import jax
import jax.numpy as jnp

from ft import anchor, errors

KEYS = {"weight": (0.0, "weight of the two passes' divergence; 0: off", (0.0, None))}
_STREAM = 0x7264


def make(config, context) -> anchor.Part | None:
  """Returns the wrap; see `ft.anchor.make`."""
  if not config.weight:
    return None
  task = context.run.task
  if not hasattr(task, "divergence"):
    raise errors.UserError(f"regularise.rdrop.weight: task.name={context.run.config.task.name} "
                           "has no distribution to compare; leave it off")
  return anchor.Part(wrap=wrap(config.weight, task.divergence))


def wrap(weight: float, divergence):
  """Returns loss -> loss of two passes; `divergence`: the task's."""
  def around(loss):
    def value(apply, variables, batch, rng, base):
      apply, other = anchor.Once(apply), jax.random.fold_in(rng, _STREAM)
      first, count, aux = loss(apply, variables, batch, rng, base)
      second, *_ = loss(apply, variables, batch, other, base)
      one, two = (variables, rng), (variables, other)
      there, rows = divergence(apply, one, two, batch, 1.0)
      back, _ = divergence(apply, two, one, batch, 1.0)
      apart = (there + back) / 2 * (count / jnp.maximum(rows, 1e-9))
      return (first + second) / 2 + weight * apart, count, {**aux, "rdrop": apart}

    return value

  return around
