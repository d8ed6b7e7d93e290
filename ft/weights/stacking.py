"""Equal layers as one: `params/encoder/layer_3/…` <-> slice 3 of `params/encoder/layers/…`.

A model with compute.scan holds its equal layers stacked, with a leading axis. Files, exports and
checkpoints hold them one by one; this module turns one form into the other.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ft import mesh

_NUMBERED = re.compile(r"(^|/)layer_(\d+)(/|$)")
_STACKED = re.compile(r"(^|/)layers(/|$)")


def split(path: str) -> tuple:
  """Returns ("params/encoder/layers/kernel", 3) of "params/encoder/layer_3/kernel"; else None."""
  match = _NUMBERED.search(path)
  if not match:
    return path, None
  return _NUMBERED.sub(r"\1layers\3", path, count=1), int(match[2])


def is_stacked(path: str) -> bool:
  """Returns whether a path's leaf has a leading axis of layers."""
  return bool(_STACKED.search(path))


def numbered(path: str, layer: int) -> str:
  """The inverse of `split`."""
  return _STACKED.sub(rf"\1layer_{layer}\2", path, count=1)


def unstack(leaves: Mapping) -> dict:
  """Returns {path: leaf} with stacked leaves, arrays or shapes, taken apart."""
  out = {}
  for path, leaf in leaves.items():
    if not is_stacked(path):
      out[path] = leaf
    elif isinstance(leaf, jax.ShapeDtypeStruct):
      one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
      out |= {numbered(path, i): one for i in range(leaf.shape[0])}
    else:
      out |= {numbered(path, i): leaf[i] for i in range(leaf.shape[0])}
  return out


def stack(leaves: Mapping) -> dict:
  """Returns {path: leaf} with the leaves of numbered layers stacked, in order of their numbers."""
  out, groups = {}, {}
  for path, leaf in leaves.items():
    target, number = split(path)
    if number is None:
      out[path] = leaf
    else:
      groups.setdefault(target, {})[number] = leaf
  for path, parts in groups.items():
    ordered = [parts[i] for i in range(len(parts))]
    host = all(isinstance(part, np.ndarray) for part in ordered)
    out[path] = np.stack(ordered) if host else jnp.stack(ordered)
  return out


def apart(tree):
  """Returns a train state or other tree with the stacks in its dicts taken apart, layer by layer.

  Works on arrays and on ShapeDtypeStructs, whose shardings are kept for the axes that remain.
  """
  if isinstance(tree, Mapping):
    tree = {key: apart(value) for key, value in tree.items()}
    stack = tree.pop("layers", None)
    count = jax.tree.leaves(stack)[0].shape[0] if stack else 0
    return tree | {f"layer_{i}": jax.tree.map(functools.partial(_slice, i), stack)
                   for i in range(count)}
  return _rebuilt(tree, {key: apart(value) for key, value in _children(tree).items()})


def together(tree, like):
  """The inverse of `apart`: stacks what is stacked in `like`, and places it as it is there."""
  if isinstance(like, Mapping):
    tree = dict(tree)
    if "layers" in like:
      count = jax.tree.leaves(like["layers"])[0].shape[0]
      parts = [tree.pop(f"layer_{i}") for i in range(count)]
      tree["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    return {key: together(tree[key], value) for key, value in like.items()}
  children = _children(like)
  if not children:
    sharding = getattr(like, "sharding", None)
    return mesh.place_leaf(tree, sharding) if isinstance(tree, jax.Array) else tree
  theirs = _children(tree)
  return _rebuilt(tree, {key: together(theirs[key], value) for key, value in children.items()})


def _children(node) -> dict:
  """Returns the parts of a tuple, list or dataclass of a tree; {} of a leaf."""
  if isinstance(node, (tuple, list)):
    return dict(enumerate(node))
  if dataclasses.is_dataclass(node) and not isinstance(node, jax.ShapeDtypeStruct):
    return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
  return {}


def _rebuilt(node, children: Mapping):
  """Returns a node with other parts."""
  if isinstance(node, tuple) and hasattr(node, "_fields"):
    return type(node)(*children.values())
  if isinstance(node, (tuple, list)):
    return type(node)(children.values())
  return dataclasses.replace(node, **children) if children else node


def _slice(i, leaf):
  if not isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf[i]
  sharding = leaf.sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


class Placer:
  """Puts arrays read from a file where they belong, layers straight into their stack.

  A stack is made once, empty and in its sharded place, and filled in place (its buffer is donated),
  so that no second copy of it exists.
  """

  def __init__(self, expected: Mapping, sharding=None):
    """`expected`: path -> leaf with .shape, stacks included; `sharding`: shape -> Sharding."""
    self._expected, self._sharding, self.stacks = expected, sharding, {}

  def __call__(self, path: str, array: np.ndarray):
    """Returns the placed array; None for a layer of a stack, which is in `stacks` then."""
    target, number = split(path)
    if number is None or target not in self._expected:
      return mesh.place_leaf(array, self._where(array.shape))
    shape = tuple(self._expected[target].shape)
    if target not in self.stacks:
      make = jax.jit(lambda: jnp.zeros(shape, array.dtype), out_shardings=self._where(shape))
      self.stacks[target] = make()
    self.stacks[target] = _put(self.stacks[target], array, number)
    return None

  def _where(self, shape):
    return self._sharding(tuple(shape)) if self._sharding else None


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, part, number):
  return stack.at[number].set(part)
