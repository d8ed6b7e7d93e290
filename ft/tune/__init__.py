"""Ways to tune: each file splits a model's variables into what trains and what stays frozen.

A method is `ft/tune/<method>.py` with `KEYS` and `init(config, variables, rng, head, context) ->
Tuned`. The gradient, the optimizer and the checkpoints see `Tuned.trainable` only; masking the
optimizer alone would bring the frozen gradients back with the first norm or clip that reads them.
"""

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from ft import errors
from ft.config import choices

KEYS = {
  "init": ("", "adapter folder that training starts from: PEFT's, or adapter/ of a run"),
  "quantize": ("none", "frozen kernels and embedding tables are kept in 8 or 4 bits",
               ["none", "int8", "nf4"]),
  "quantize_targets": ((), "expressions of module paths to quantise; (): all that pay"),
  "also_train": ((), "adapters: expressions of further parameters, which train in full"),
}

COMPANY = "company"  # collection of variables that only the task reads

Tree = dict[str, Any]


class Row(NamedTuple):
  """One trainable leaf: its path (`params/classifier/kernel`), shape and number of parameters."""

  path: str
  shape: tuple[int, ...]
  count: int


@dataclasses.dataclass(frozen=True)
class Context:
  """What a method may look at beside the parameters.

  Attributes:
    pretrained: the loaded model (`models.Pretrained`), or None: its config gives sizes that the
      parameters do not show, such as the number of key heads.
    gradient: () -> gradients of the loss on a probe batch, a tree like {"params": …}; or None.
    report: whether to run the model for what `Tuned.notes` say.
  """

  pretrained: Any = None
  gradient: Callable[[], Tree] | None = None
  report: bool = False


@dataclasses.dataclass(frozen=True)
class Stages:
  """When trainable leaves start to train.

  Attributes:
    starts: path -> share of the run (0 to 1) after which it trains; an array that broadcasts over a
      stacked leaf gives each layer its own. Paths that are absent train from the start.
    rates: factor of the learning rate in each stage; empty: 1 in all.
  """

  starts: Mapping[str, Any]
  rates: tuple[float, ...] = ()

  def shares(self) -> list[float]:
    """Returns the shares of the run at which stages begin, 0 first."""
    return sorted({0.0}.union(*(np.ravel(start).tolist() for start in self.starts.values())))

  def steps(self, total: int) -> list[int]:
    """Returns the steps at which the stages begin, of a run of `total`."""
    return [round(share * total) for share in self.shares()]

  def of(self, step: int, total: int) -> int:
    """Returns the number of the stage that a step belongs to."""
    return sum(step >= start for start in self.steps(total)) - 1

  def live(self, path: str, stage: int):
    """Returns whether a leaf trains in a stage: bool, or an array where only some layers do."""
    live = np.asarray(self.starts.get(path, 0.0)) <= self.shares()[stage]
    return live if live.any() and not live.all() else bool(live.all())


@dataclasses.dataclass(frozen=True)
class Tuned:
  """A model's variables in two trees without overlap, and how to put them together again.

  Attributes:
    trainable: nested dicts of collections, e.g. {"params": …} or {"adapters": …, "params": …}.
    frozen: everything else; batch statistics are always here.
    combine: (frozen, trainable) -> variables for `module.apply`; structural, copies nothing.
    merge: (frozen, trainable) -> plain variables of the bare model, adapters folded in; pure. None
      where plain weights cannot compute the same, as with prompts.
    interceptor: for `flax.linen.intercept_methods` around every apply, or None.
    reader: the part of it that reads frozen weights which are not kept as they are, or None; with
      it alone, the model computes as before tuning.
    around: apply -> apply, for methods that change the model's inputs (see `state.make_apply`), or
      None.
    table: one row for each trainable leaf, sorted by path.
    only_head: nothing below the head trains, so the features the head reads can be cached.
    rates: path -> factor of the learning rate, for leaves where it is not 1.
    stages: when leaves start to train; None: all from the start.
    penalty: trainable -> scalar that is added to the mean loss, or None.
    after: total steps -> optax transformation behind the optimizer's, or None. It sees gradients as
      the extra argument `gradient`.
    settings: the section `tune` that was in force, which `tune.init` may have filled in.
    plain: frozen -> the same with plain parameters in place of quantised ones.
    notes: sentences for the card.
  """

  trainable: Tree
  frozen: Tree
  combine: Callable[[Tree, Tree], Tree]
  merge: Callable[[Tree, Tree], Tree] | None
  interceptor: Callable[..., Any] | None = None
  reader: Callable[..., Any] | None = None
  around: Callable[..., Any] | None = None
  table: tuple[Row, ...] = ()
  only_head: bool = False
  rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
  stages: Stages | None = None
  penalty: Callable[[Tree], Any] | None = None
  after: Callable[[int], Any] | None = None
  settings: Any = None
  plain: Callable[[Tree], Tree] = lambda frozen: frozen
  notes: tuple[str, ...] = ()


def init(config, variables: Mapping, rng, head: tuple[str, ...] = (),
         context: Context | None = None) -> Tuned:
  """Splits `variables` by the method `config.method`.

  Args:
    config: the section `tune`, with the chosen method's keys filled in.
    variables: {"params": …, "batch_stats": … where there are any}, nested dicts of arrays.
    rng: a key for parameters the method adds.
    head: path prefixes of the model's head, such as ("params/classifier",).
    context: what else is known.

  Returns:
    The split; its leaves are the given arrays, none copied, but for those that are quantised.

  Raises:
    UserError: the method is unknown, or its settings do not fit this model.
  """
  name, known = str(config.method), choices("tune.method")
  if name not in known:
    raise errors.UserError(
      f"tune.method={name!r} is none of {', '.join(known)}{errors.suggest(name, known)}"
    )
  if config.get("init"):
    reading = importlib.import_module("ft.tune.peft_reading")
    tuned = reading.start(config, variables, rng, head, context)
  else:
    method = importlib.import_module(f"ft.tune.{name}")
    tuned = method.init(config, variables, rng, head, context or Context())
    tuned = dataclasses.replace(tuned, settings=tuned.settings or config)
  quantize = importlib.import_module("ft.tune.quantize")
  return quantize.apply(tuned, config, head, context)


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


def matcher(expressions, variables: Mapping, key: str) -> Callable[[str], bool]:
  """Returns path -> whether one of the regular expressions is found in it.

  Args:
    expressions: a list of them, or one; none match nothing.
    variables: of the model; each expression has to find one of its parameters.
    key: what the error calls them.

  Raises:
    UserError: an expression is not valid, or finds no parameter.
  """
  given = [expressions] if isinstance(expressions, str) else list(expressions)
  paths = [path for path in flatten(variables) if path.startswith("params/")]
  for expression in given:
    try:
      found = any(re.search(expression, path) for path in paths)
    except re.error as e:
      raise errors.UserError(f"{key}: {expression!r} is no regular expression: {e}") from e
    if not found:
      modules = sorted({"  " + path.rpartition("/")[0] for path in paths})
      raise errors.UserError(
        f"{key}: {expression!r} finds none of the parameters{errors.suggest(expression, paths)}; "
        "they are:\n" + "\n".join(modules))
  return lambda path: any(re.search(expression, path) for expression in given)


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


def build(trainable: Tree, frozen: Tree, head: tuple[str, ...], *, merge=combine, **more) -> Tuned:
  """Makes a `Tuned` and fills in what follows from the two trees; `more`: its other fields."""
  table = tuple(
    Row(path, tuple(leaf.shape), math.prod(leaf.shape)) for path, leaf in flatten(trainable).items()
  )
  only_head = bool(table) and all(under(row.path, head) for row in table)
  return Tuned(trainable, frozen, combine, merge, table=table, only_head=only_head, **more)


def accompany(tuned: Tuned, trainable: Tree, frozen: Tree) -> Tuned:
  """Adds variables that only the task reads, such as a teacher's, to what trains and what does not.

  They stand in the collection COMPANY beside the model's own, which does not know of them. `merge`
  and `plain` leave them out, as a model is exported without; see also `alone`.

  Args:
    tuned: of the model.
    trainable, frozen: nested dicts without a common leaf; {} for none.
  """
  if trainable:
    rows = build({COMPANY: trainable}, {}, ()).table
    tuned = dataclasses.replace(tuned, trainable={**tuned.trainable, COMPANY: trainable},
                                table=(*tuned.table, *rows))
  merge, plain = tuned.merge, tuned.plain
  return dataclasses.replace(
    tuned, frozen={**tuned.frozen, COMPANY: frozen} if frozen else tuned.frozen,
    merge=merge and (lambda frozen, trainable: merge(alone(frozen), alone(trainable))),
    plain=lambda frozen: plain(alone(frozen)))


def alone(tree: Mapping) -> Tree:
  """Returns a tree of collections without what the task alone reads."""
  return {name: part for name, part in tree.items() if name != COMPANY}


def chain(*interceptors) -> Callable | None:
  """Returns one interceptor of several, the first outermost; those that are None are left out."""
  given = [interceptor for interceptor in interceptors if interceptor is not None]
  if len(given) < 2:
    return given[0] if given else None

  def run(call, args, kwargs, context):
    for interceptor in reversed(given):
      call = functools.partial(_intercepted, interceptor, call, context)
    return call(*args, **kwargs)

  return run


def _intercepted(interceptor, call, context, *args, **kwargs):
  return interceptor(call, args, kwargs, context)


def shapes(tuned: Tuned) -> Tree:
  """Returns the shapes of what is frozen, quantised parameters as they were before."""
  return jax.eval_shape(tuned.plain, tuned.frozen)


def describe(tuned: Tuned) -> str:
  """Returns a text table of what trains: layers of one kind in a row, parameters, share."""
  kept = sum(math.prod(leaf.shape) for path, leaf in flatten(shapes(tuned)).items()
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
