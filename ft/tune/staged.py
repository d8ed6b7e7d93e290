"""Full fine-tuning in stages: the head first, then the pretrained layers.

lp-ft (Kumar et al. 2022, arXiv:2202.10054): the head alone, then everything at a lower rate, so
that a random head does not distort good features. unfreeze (Howard & Ruder 2018, arXiv:1801.06146):
the head, then layer by layer from the top, at equal shares of the run, the embeddings last.

What does not train yet passes no gradient and does not move. Each stage compiles its own step.
Layers that model.scan has stacked are held still too, but save the backward pass only in stages
in which all of them are.
"""

import numpy as np
from absl import logging

from ft import errors, tune
from ft.tune import parts

KEYS = {
  "order": ("lp-ft", "head and then all; or head and then layer by layer", ["lp-ft", "unfreeze"]),
  "head_share": (0.3, "lp-ft: share of the run in which the head trains alone", (0.0, 1.0)),
  "rate_factor": (0.1, "lp-ft: rate of everything after that, over the head's before", (0.0, None)),
  "group": (1, "unfreeze: layers that start together", (1, None)),
}
READERS = {"head_share": "lp-ft", "rate_factor": "lp-ft", "group": "unfreeze"}


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns all of "params" as trainable, with the stages in which it starts; see `ft.tune.init`.

  Raises:
    UserError: the model has no head, or no numbered layers to unfreeze; a key has no effect.
  """
  del rng, context
  _check(config)
  trainable, frozen = tune.split(variables, lambda path: True)
  leaves = tune.flatten(trainable)
  body = {path: leaf for path, leaf in leaves.items() if not tune.under(path, head)}
  if len(body) == len(leaves):
    raise errors.UserError(
      "tune.method='staged' trains the head first, but this model has none "
      f"({', '.join(head) or 'the family names none'}); use tune.method='full'")
  if config.order == "lp-ft":
    stages = tune.Stages({path: config.head_share for path in body}, (1.0, config.rate_factor))
  else:
    stages = tune.Stages(_starts(body, config.group))
    logging.info("layers start to train at these shares of the run: %s",
                 ", ".join(f"{share:.2f}" for share in stages.shares()))
  return tune.build(trainable, frozen, head, stages=stages)


def _check(config) -> None:
  for key, order in READERS.items():
    if config.order != order and config[key] != KEYS[key][0]:
      raise errors.UserError(
        f"tune.{key}: nothing reads it with tune.order={config.order}; it belongs to {order}")
  if not 0 < config.head_share < 1:
    raise errors.UserError(
      f"tune.head_share={config.head_share} leaves one stage only: use tune.method="
      f"{'head' if config.head_share else 'full'!r}, or a share between 0 and 1")
  if not config.rate_factor > 0:
    raise errors.UserError("tune.rate_factor=0 would train the head alone; use tune.method='head'")


def _starts(body: dict, group: int) -> dict:
  """Path -> share of the run at which it starts; an array that broadcasts over a stacked leaf.

  Stage 1 has the top layers of every stack and what stands above layers (pooler, last norm); the
  last stage what stands below them.
  """
  sizes = parts.counts(body)
  if not sizes:
    raise errors.UserError(
      "tune.order='unfreeze': this model has no numbered layers; use tune.order='lp-ft'")
  deepest = 1 + (max(sizes.values()) - 1) // group

  def stage(path, leaf):
    number = parts.numbers(path, leaf)
    if number is None:
      return deepest + 1 if parts.is_bottom(path) else 1
    return 1 + (sizes[parts.stack(path)] - 1 - number) // group

  stages = {path: np.asarray(stage(path, leaf)) for path, leaf in body.items()}
  count = 1 + max(int(np.max(number)) for number in stages.values())
  return {path: number / count for path, number in stages.items()}
