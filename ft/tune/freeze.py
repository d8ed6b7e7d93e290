"""Partial fine-tuning: the parameters whose path one of the regular expressions finds."""

import re

from ft import errors, tune

KEYS = {
  "train": ((), "regular expressions, searched in paths as params/encoder/layer_5/output/kernel"),
  "train_head": (True, "train the head too, whether or not an expression finds it"),
}


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the parameters found by `config.train` as trainable; see `ft.tune.init`.

  An expression is searched (`re.search`), so "layer_5" finds every parameter of that layer and
  "^params/encoder/.*bias$" is anchored.

  Raises:
    UserError: an expression is not valid or finds nothing, or together they find everything.
  """
  del rng, context
  paths = [path for path in tune.flatten(variables) if path.startswith("params/")]
  chosen = set()
  for expression in _expressions(config):
    found = [path for path in paths if re.search(expression, path)]
    if not found:
      raise errors.UserError(
        f"tune.train: {expression!r} finds none of the parameters"
        f"{errors.suggest(expression, paths)}; they are:\n" + "\n".join(_modules(paths))
      )
    chosen.update(found)
  if config.train_head:
    chosen.update(path for path in paths if tune.under(path, head))
  if len(chosen) == len(paths):
    raise errors.UserError(
      f"tune.train={list(config.train)} leaves nothing frozen: narrow the expressions, "
      "or use tune.method='full'"
    )
  trainable, frozen = tune.split(variables, chosen.__contains__)
  return tune.build(trainable, frozen, head)


def _expressions(config) -> list[str]:
  given = [config.train] if isinstance(config.train, str) else list(config.train)
  if not given:
    raise errors.UserError(
      "tune.method='freeze' needs tune.train, a list of regular expressions over parameter paths, "
      "such as ['layer_5', 'bias$']; to train the head alone use tune.method='head'"
    )
  for expression in given:
    try:
      re.compile(expression)
    except re.error as e:
      raise errors.UserError(
        f"tune.train: {expression!r} is no regular expression: {e}"
      ) from e
  return given


def _modules(paths: list[str]) -> list[str]:
  """The modules the paths belong to, each once."""
  return sorted({"  " + path.rpartition("/")[0] for path in paths})
