"""L2-SP: pretrained weights are pulled back to where they started, new ones to zero.

alpha/2 ‖θ - θ0‖² + beta/2 ‖w‖² (Xuhong et al. 2018, arXiv:1802.01483), added to the mean loss once
a step; the gradient is alpha (θ - θ0) and beta w. θ are trained parameters that the checkpoint
gave, w those that were initialised, such as a new head; adapters are neither. It goes through the
optimizer: Adam divides it by its running size as it does the loss's gradient, where
optim.decay_to=start is decoupled. Cost: a copy of what trains; no further pass.
"""

import jax.numpy as jnp

from ft import anchor, tune

KEYS = {
  "alpha": (0.0, "pull of pretrained weights to where they started; 0: off", (0.0, None)),
  "beta": (0.0, "pull of initialised weights, such as a new head, to zero", (0.0, None)),
}


def make(config, context) -> anchor.Part | None:
  """Returns the penalty; see `ft.anchor.make`."""
  if not config.alpha and not config.beta:
    return None
  known = context.need_known("anchor.l2sp.alpha") if config.alpha else ()
  return anchor.Part(penalty=penalty(config.alpha, config.beta, known, context.fresh),
                     start=bool(config.alpha))


def penalty(alpha: float, beta: float, known, fresh):
  """Returns (trainable, {"start": tree}) -> scalar; `known`, `fresh`: paths of leaves."""
  def value(trainable, fixed):
    flat = tune.flatten(trainable)
    start = tune.flatten(fixed["start"]) if known else {}
    total = sum((alpha / 2 * _squares(flat[path], start[path]) for path in known), jnp.float32(0))
    return total + sum(beta / 2 * _squares(flat[path], 0) for path in fresh)

  return value


def _squares(leaf, origin):
  return jnp.sum(jnp.square(leaf.astype(jnp.float32) - jnp.asarray(origin, jnp.float32)))
