"""The linear probe by gradient: only the model's head trains, on features computed once."""

from ft import errors, tune

KEYS = {}


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the parameters below the `head` prefixes as trainable; see `ft.tune.init`.

  Raises:
    UserError: the model has no head.
  """
  del config, rng, context
  trainable, frozen = tune.split(variables, lambda path: tune.under(path, head))
  if not trainable:
    raise errors.UserError(
      "tune.method='head' trains the model's head alone, but this model has none "
      f"({', '.join(head) or 'the family names none'}); use tune.method='freeze' with tune.train"
    )
  return tune.build(trainable, frozen, head)
