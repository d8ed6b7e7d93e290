"""Full fine-tuning: every parameter trains; batch statistics stay as they were."""

from ft import tune

KEYS = {}


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns all of "params" as trainable; see `ft.tune.init`."""
  del config, rng, context
  trainable, frozen = tune.split(variables, lambda path: True)
  return tune.build(trainable, frozen, head)
