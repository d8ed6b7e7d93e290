"""Ways to tune: each file splits a model's variables into what trains and what stays frozen.

A method is `ft/tune/<method>.py` with `KEYS` and `init(config, variables, rng, head) -> Tuned`. The
gradient, the optimizer and the checkpoints see `Tuned.trainable` only; masking the optimizer alone
would bring the frozen gradients back with the first norm or clip that reads them.
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import traverse_util

from ft import errors
from ft.config import choices

Tree = dict[str, Any]


class Row(NamedTuple):
  """One trainable leaf: its path (`params/classifier/kernel`), shape and number of parameters."""

  path: str
  shape: tuple[int, ...]
  count: int


@dataclasses.dataclass(frozen=True)
class Tuned:
  """A model's variables in two trees without overlap, and how to put them together again.

  Attributes:
    trainable: nested dicts of collections, e.g. {"params": …} or {"adapters": …, "params": …}.
    frozen: everything else; batch statistics are always here.
    combine: (frozen, trainable) -> variables for `module.apply`; structural, copies nothing.
    merge: (frozen, trainable) -> plain variables of the bare model, adapters folded in; pure.
    interceptor: for `flax.linen.intercept_methods` around every apply, or None.
    table: one row for each trainable leaf, sorted by path.
    only_head: nothing below the head trains, so the features the head reads can be cached.
  """

  trainable: Tree
  frozen: Tree
  combine: Callable[[Tree, Tree], Tree]
  merge: Callable[[Tree, Tree], Tree]
  interceptor: Callable[..., Any] | None = None
  table: tuple[Row, ...] = ()
  only_head: bool = False


def init(config, variables: Mapping, rng, head: tuple[str, ...] = ()) -> Tuned:
  """Splits `variables` by the method `config.method`.

  Args:
    config: the section `tune`, with the chosen method's keys filled in.
    variables: {"params": …, "batch_stats": … where there are any}, nested dicts of arrays.
    rng: a key for parameters the method adds.
    head: path prefixes of the model's head, such as ("params/classifier",).

  Returns:
    The split; its leaves are the given arrays, none copied.

  Raises:
    UserError: the method is unknown, or its settings do not fit this model.
  """
  name, known = str(config.method), choices("tune.method")
  if name not in known:
    raise errors.UserError(
      f"tune.method={name!r} is none of {', '.join(known)}{errors.suggest(name, known)}"
    )
  return importlib.import_module(f"ft.tune.{name}").init(config, variables, rng, head)


def flatten(tree: Mapping) -> dict[str, Any]:
  """Returns {"params/encoder/layer_0/kernel": leaf} of a nested dict, sorted by path."""
  flat = traverse_util.flatten_dict(tree, sep="/")
  return {path: flat[path] for path in sorted(flat)}


def unflatten(flat: Mapping[str, Any]) -> Tree:
  """The inverse of `flatten`."""
  return traverse_util.unflatten_dict(dict(flat), sep="/")


def under(path: str, prefixes: tuple[str, ...]) -> bool:
  """Whether `path` is one of the prefixes or lies below one."""
  return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def split(variables: Mapping, trains: Callable[[str], bool]) -> tuple[Tree, Tree]:
  """Returns (trainable, frozen); `trains(path)` is asked for leaves of "params" only."""
  flat = flatten(variables)
  chosen = {path for path in flat if path.startswith("params/") and trains(path)}
  trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
  frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
  return unflatten(trainable), unflatten(frozen)


def combine(frozen: Mapping, trainable: Mapping) -> Tree:
  """Joins two trees that share no leaf; ValueError names the first path both of them have."""
  return _join(frozen, trainable, ())


def _join(left: Mapping, right: Mapping, path: tuple[str, ...]) -> Tree:
  joined = dict(left)
  for key, value in right.items():
    if key not in joined:
      joined[key] = value
    elif isinstance(value, Mapping) and isinstance(joined[key], Mapping):
      joined[key] = _join(joined[key], value, (*path, key))
    else:
      raise ValueError(f"{'/'.join((*path, key))} is both trainable and frozen")
  return joined


def build(trainable: Tree, frozen: Tree, head: tuple[str, ...], *, merge=combine,
          interceptor=None) -> Tuned:
  """Makes a `Tuned` and fills in what follows from the two trees."""
  table = tuple(
    Row(path, tuple(leaf.shape), math.prod(leaf.shape)) for path, leaf in flatten(trainable).items()
  )
  only_head = bool(table) and all(under(row.path, head) for row in table)
  return Tuned(trainable, frozen, combine, merge, interceptor, table, only_head)


def describe(tuned: Tuned) -> str:
  """Returns a text table of what trains: layers of one kind in a row, parameters, share."""
  kept = sum(math.prod(leaf.shape) for path, leaf in flatten(tuned.frozen).items()
             if path.startswith("params/"))
  trained = sum(row.count for row in tuned.table)
  total = max(trained + kept, 1)
  rows = [(name, f"{count:,}", f"{100 * count / total:.2f} %") for name, count in _groups(tuned)]
  rows.append(("all that trains", f"{trained:,}", f"{100 * trained / total:.2f} %"))
  rows.append(("all that stays frozen", f"{kept:,}", f"{100 * kept / total:.2f} %"))
  rows.insert(0, ("trains", "parameters", "share"))
  wide = [max(len(row[i]) for row in rows) for i in range(3)]
  return "\n".join(f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}" for a, b, c in rows)


def _groups(tuned: Tuned) -> list[tuple[str, int]]:
  """Sums the rows by module, numbered layers together: `params/encoder/layer_{0-5}/output`."""
  counts, numbers = {}, {}
  for row in tuned.table:
    module = row.path.rpartition("/")[0]
    pattern = re.sub(r"_\d+(?=/|$)", "_{}", module)
    counts[pattern] = counts.get(pattern, 0) + row.count
    found = [int(n) for n in re.findall(r"_(\d+)(?=/|$)", module)]
    spots = numbers.setdefault(pattern, [set() for _ in found])
    for spot, number in zip(spots, found, strict=True):
      spot.add(number)
  return [(pattern.format(*(f"{{{_ranges(spot)}}}" for spot in numbers[pattern])), count)
          for pattern, count in counts.items()]


def _ranges(numbers: set[int]) -> str:
  """{0, 1, 2, 5} -> "0-2,5"."""
  runs: list[list[int]] = []
  for number in sorted(numbers):
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
