"""Several LoRA adapters on one base: choose one, add them up, or take one out of merged weights.

All functions are pure and work on trees as `tune.Tuned` has them. A sum of low-rank updates is an
update of low rank again, with the ranks side by side: nothing is approximated.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from ft import errors, tune
from ft.tune import adapters, lora
from ft.weights import stacking


class Part(NamedTuple):
  """One adapter: how much of it, the section `tune` it was trained with, and its trees."""

  weight: float
  config: Any
  tuned: tune.Tuned
  trainable: tune.Tree


def select(named: Mapping[str, tune.Tree], name: str) -> tune.Tree:
  """Returns the trainable tree of this name.

  Raises:
    UserError: there is none; the message lists those there are.
  """
  if name not in named:
    raise errors.UserError(f"there is no adapter {name!r}{errors.suggest(name, named)}; there are: "
                           f"{', '.join(named) or 'none'}")
  return named[name]


def combine(parts: Sequence[Part]) -> tuple[dict, tune.Tree]:
  """Returns one adapter that computes Σ weight_i s_i A_i B_i.

  Args:
    parts: adapters of the same layers.

  Returns:
    (values, tree): values of the section `tune` (rank, alpha, …) and {"adapters": …}, in which
    rank is Σ r_i and the scale is 1. Heads and what else trained in full is not combined.

  Raises:
    UserError: there are none, they adapt different layers, or one has DoRA, whose update is no sum.
  """
  if not parts:
    raise errors.UserError("there is no adapter to combine")
  tables = [_updates(part) for part in parts]
  for table in tables[1:]:
    other = sorted(table.keys() ^ tables[0].keys())
    if other:
      raise errors.UserError("the adapters act on different layers, such as " + other[0])
  flat, ranks = {}, {}
  for path in tables[0]:
    some_a, some_b = zip(*(table[path] for table in tables), strict=True)
    flat[f"{path}/lora_a"] = jnp.concatenate(some_a, axis=-1)
    flat[f"{path}/lora_b"] = jnp.concatenate(some_b, axis=-2)
    ranks[path.removeprefix(adapters.COLLECTION + "/")] = flat[f"{path}/lora_b"].shape[-2]
  return _values(ranks), tune.unflatten(flat)


def _values(ranks: dict[str, int]) -> dict:
  """Values of the section `tune` with these ranks, by module path, and a scale of 1 everywhere."""
  common = max(set(ranks.values()), key=list(ranks.values()).count)
  own = [(_expression(path), rank) for path, rank in ranks.items() if rank != common]
  return {"targets": tuple(_expression(path) for path in ranks), "rank": common,
          "alpha": float(common), "scale": "alpha/r", "dora": False, "start": "zero",
          "rank_pattern": tuple(f"{expression}={rank}" for expression, rank in own),
          "alpha_pattern": tuple(f"{expression}={float(rank)}" for expression, rank in own)}


def _expression(path: str) -> str:
  """An expression that finds this module path and no other; of a stack, also one by one."""
  if not stacking.is_stacked(path):
    return f"^{path}$"
  return f"^{stacking.numbered(path, 0).replace('layer_0', 'layer(s|_[0-9]+)', 1)}$"


def _updates(part: Part) -> dict[str, tuple]:
  """Returns {adapters/<module>: (A, weight * s * B)}."""
  flat = tune.flatten(tune.combine(_only(part.tuned.frozen), _only(part.trainable)))
  method, out = lora.Lora(part.config), {}
  for path in sorted({name.rpartition("/")[0] for name in flat}):
    p = {name.rpartition("/")[2]: leaf for name, leaf in flat.items()
         if name.rpartition("/")[0] == path}
    if "lora_magnitude" in p or "lora_a" not in p:
      raise errors.UserError(
        f"{path}: only plain LoRA adapters can be combined; a DoRA's update, or another method's, "
        "is no sum. Merge it into the weights first")
    a, b = lora.factors(p)
    scale = method.scale(path.removeprefix(adapters.COLLECTION + "/"))
    out[path] = (a, b * (part.weight * scale))
  return out


def _only(tree) -> tune.Tree:
  return {key: value for key, value in tree.items() if key == adapters.COLLECTION}


def unmerge(tuned: tune.Tuned, merged: Mapping, trainable: Mapping) -> tune.Tree:
  """Returns the weights that an adapter was merged into, to within rounding.

  Args:
    tuned: the adapter's split.
    merged: what `tuned.merge` returned; its head and whatever else trained in full stay.
    trainable: the adapter's trainable tree.

  Raises:
    UserError: the adapter is a DoRA: its merging rescales the weights by what it does not keep.
  """
  def negated(tree):
    flat = tune.flatten(_only(tree))
    if any(path.endswith("/lora_magnitude") for path in flat):
      raise errors.UserError("a DoRA adapter cannot be taken out of merged weights; load the base")
    return tune.unflatten({path: -leaf if path.endswith(("/lora_b", "/lora_b0")) else leaf
                           for path, leaf in flat.items()})

  return tuned.merge(tune.combine(merged, negated(tuned.frozen)), negated(trainable))
