"""Which part of a model a parameter belongs to, told from its path alone: layer, bottom or norm.

Families name their equal layers `layer_3`, `blocks_3`, `stage_3` or `h_3`; where modules inside are
numbered too, the outermost number counts, as in `stage_3/block_1`. With model.scan the layers are
one stack, `layers`, whose leaves have a leading axis.
"""

import re
from collections.abc import Mapping

import numpy as np

from ft.weights import stacking

_NUMBERED = re.compile(r"(?:^|/)[a-z]*(?:layer|block|stage)s?_(\d+)(?=/)|(?:^|/)h_(\d+)(?=/)")
_BOTTOM = re.compile(
  r"embed|(?:^|/)(?:conv_)?stem|(?:^|/)w[tp]e/|cls_token|/feature_(?:extractor|projection)/|"
  r"encoder/(?:conv\d/|position)", re.IGNORECASE)
_NORM = re.compile(r"norm|(?:^|[/_])(?:ln|bn)[_\d/]", re.IGNORECASE)


def layer(path: str) -> tuple[str, int] | None:
  """Returns (stack, number) of "params/encoder/layer_3/kernel": ("params/encoder/layer_", 3).

  None outside numbered layers, and for layers that are stacked.
  """
  found = _NUMBERED.search(path)
  if stacking.is_stacked(path) or not found:
    return None
  group = 1 if found[1] else 2
  return path[:found.start(group)], int(found[group])


def numbers(path: str, leaf):
  """Returns the layer number of a parameter, or None outside of layers.

  Of stacked layers all numbers, of a shape that broadcasts over the leaf.
  """
  if stacking.is_stacked(path):
    return np.arange(leaf.shape[0]).reshape(-1, *(1,) * (len(leaf.shape) - 1))
  found = layer(path)
  return found[1] if found else None


def counts(leaves: Mapping) -> dict[str, int]:
  """Returns {stack: number of its layers} of {path: leaf}; see `stack`."""
  found = {}
  for path, leaf in leaves.items():
    number = numbers(path, leaf)
    if number is not None:
      found[stack(path)] = max(found.get(stack(path), 0), 1 + int(np.max(number)))
  return found


def stack(path: str) -> str | None:
  """Returns what a parameter's layer has in common with its equals: "params/encoder/layer_".

  An encoder's and a decoder's layers are two stacks. None outside of layers.
  """
  if stacking.is_stacked(path):
    return stacking.numbered(path, 0).partition("layer_0")[0] + "layer_"
  found = layer(path)
  return found[0] if found else None


def is_bottom(path: str) -> bool:
  """Whether a parameter outside of layers stands below them: embeddings, stem, features."""
  return bool(_BOTTOM.search(path))


def is_norm(path: str) -> bool:
  """Whether a parameter belongs to a normalisation."""
  return bool(_NORM.search(path))
