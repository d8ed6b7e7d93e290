"""Passes of a model that several losses look at, and what is seen within one."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn

_LAYER = re.compile(r"layer_(\d+)")
_PART = re.compile(r"(layer|block|stage|level)_\d+")


class Once:
  """An apply that computes equal calls once: losses that look at one pass then share it.

  Calls are equal where variables, rng and every input are the same objects; within one trace of
  the step those are the same values. `variables` may also be a pair (variables, rng): such a call
  ignores the rng it is given, by which a task's function of two sets of variables compares any
  two passes.
  """

  def __init__(self, apply: Callable):
    self._apply, self._seen = apply, []

  def __call__(self, variables, inputs, rng=None):
    if isinstance(variables, tuple):
      variables, rng = variables
    for known, outputs in self._seen:
      if (known[0] is variables and known[1] is rng and known[2].keys() == inputs.keys()
          and all(known[2][key] is inputs[key] for key in inputs)):
        return outputs
    outputs = self._apply(variables, inputs, rng)
    self._seen.append(((variables, rng, dict(inputs)), outputs))
    return outputs


def layers_of(call: Callable) -> tuple[Any, dict]:
  """Returns what a call of a model gives, and what each of its layers gave: number -> (B, T, D).

  See `parts_of`.
  """
  outputs, seen = parts_of(call)
  found = {path: _LAYER.fullmatch(path.rpartition("/")[2]) for path in seen}
  return outputs, {int(found[path][1]): made for path, made in seen.items() if found[path]}


def parts_of(call: Callable) -> tuple[Any, dict]:
  """Returns what a call of a model gives, and what its layers, blocks and stages gave, by path.

  Layers have to be unrolled, and not be computed again in the backward pass (model.scan=False,
  model.remat=none): what is inside of such a loop cannot be looked at from outside.
  """
  seen = {}

  def look(call, args, kwargs, context):
    outputs = call(*args, **kwargs)
    if _PART.fullmatch(context.module.name or "") and context.method_name == "__call__":
      seen["/".join(context.module.path)] = outputs
    return outputs

  with nn.intercept_methods(look):
    outputs = call()
  return outputs, seen
