"""KL to the base: on the new inputs, outputs are held close to those of the pretrained model.

weight T² KL(p_base ‖ p_θ) at a temperature T (learning without forgetting, Li & Hoiem 2016,
arXiv:1606.09282; Hinton et al. 2015 for T²), with dropout in our pass and none in the base's. A
label head that was just initialised has no opinion to keep: then features are held, as the log
says. Cost: a forward pass of the base each step and a copy of what trains; where the task's loss
shapes its inputs anew (images) or takes its logits in blocks, our pass is made twice.
"""

import jax.numpy as jnp

from ft import anchor

KEYS = {
  "weight": (0.0, "weight of the divergence from the base on the run's own rows; 0: off",
             (0.0, None)),
  "temperature": (2.0, "T: above 1, unlikely answers count for more", (0.01, None)),
}


def make(config, context) -> anchor.Part | None:
  """Returns the wrap; see `ft.anchor.make`."""
  if not config.weight:
    return None
  measure = anchor.divergence(context, config.temperature, "anchor.kl.weight")
  return anchor.Part(wrap=wrap(config.weight, measure), start=True)


def wrap(weight: float, measure):
  """Returns loss -> loss with the weighted mean of a measure added; see `anchor.divergence`.

  The measure's mean is taken over its own weights, as rows may weigh differently in the loss.
  """
  def around(loss):
    def value(apply, variables, batch, rng, base):
      apply = anchor.Once(apply)
      total, count, aux = loss(apply, variables, batch, rng, base)
      apart, rows = measure(apply, (variables, rng), (base(), None), batch)
      apart = apart * (count / jnp.maximum(rows, 1e-9))
      return total + weight * apart, count, {**aux, "kl": apart}

    return value

  return around
