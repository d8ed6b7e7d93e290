"""Nothing trains: for tasks that learn without a gradient, such as from a bank of features."""

from ft import tune

KEYS = {}


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns all of `variables` as frozen; a run with it takes no steps. See `ft.tune.init`."""
  del config, rng, context
  return tune.build({}, dict(variables), head)
