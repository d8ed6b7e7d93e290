"""What adapter methods share: which layers they adapt, where their parameters live, how they act.

An adapter method is a subclass of `Adapter`: it makes the parameters of ONE layer and says what
they do to its input, weights or output. This file does the rest for every model, scanned or not:
adapters are a collection of their own that mirrors the module paths (adapters/<module>/<name>),
with the leading axis of stacked layers where the kernel has one, and they act through a linen
method interceptor on the hooks `prepare`, `weights` and `adapt` of `Linear`, `Conv` and
`Embedding`. No model file mentions them.
"""

import dataclasses
import math
import re
import threading
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ft import errors, tune
from ft.models import convolution, layers
from ft.weights import stacking

LAYERS = (layers.Linear, layers.Embedding, convolution.Conv)
COLLECTION = "adapters"
ALL = "all-linear"
HOOKS = ("prepare", "weights", "adapt", "adapt_output")
LINEAR = ("linear", "pointwise")  # matrices: what ALL stands for


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer that can be adapted; of stacked layers, one of them.

  Attributes:
    path: module path with the layer's number, encoder/layer_3/attention/query.
    kind: "linear" (in, out) | "pointwise", a 1x1 convolution, seen as (in, out) | "conv"
      (h, w, in, out) | "depthwise" (h, w, C) | "embedding" (V, D).
    shape: of its kernel or table, as above.
    bias: features of its bias, or 0 without one.
    rng: randomness of this layer alone, so that adding or removing targets leaves the start of the
      others unchanged. Numpy's, as jax would compile a program for every shape there is.
  """

  path: str
  kind: str
  shape: tuple[int, ...]
  bias: int
  rng: np.random.Generator
  _leaf: Any
  _index: int | None = None

  @property
  def stacked(self) -> bool:
    """Whether it is one of a stack, whose adapters have to be alike."""
    return self._index is not None

  def kernel(self):
    """Returns the kernel or table, of `shape`, in its own dtype."""
    leaf = self._leaf if self._index is None else self._leaf[self._index]
    return leaf.reshape(self.shape)


class Adapter:
  """The base of adapter methods; `p` is what `create` (and `shared`) made, name -> array.

  A subclass overrides the hooks that it needs; only those are intercepted. All see one layer.
  Module is the linen module: its `path`, `has_rng("dropout")` and `make_rng("dropout")` are of use.
  In training under bfloat16, x, y, kernel have the compute dtype or the parameters'; p is float32.

  Attributes:
    KINDS: kinds of `Layer` that the method can adapt.
    mergeable: whether `merge` gives plain weights with the same outputs.
  """

  KINDS = LINEAR
  mergeable = True

  def __init__(self, config):
    self.config = config

  def create(self, layer: Layer) -> tuple[dict, dict]:
    """Returns ({name: array} that trains, {name: array} that stays fixed), numpy or jax."""
    raise NotImplementedError

  def shared(self, layers: list[Layer], rng: np.random.Generator) -> tuple[dict, dict]:
    """The same for parameters that all layers share; they stand at adapters/<name>."""
    del layers, rng
    return {}, {}

  def prepare(self, p, x, module):
    """Returns the layer's input (…, in) (conv: (B, H, W, C); embedding: not called)."""
    raise NotImplementedError

  def weights(self, p, kernel, bias, module):
    """Returns (kernel, bias or None) that the layer computes with."""
    raise NotImplementedError

  def adapt(self, p, x, y, module):
    """Returns the layer's output, given its own input x (embedding: ids) and plain output y."""
    raise NotImplementedError

  def adapt_output(self, p, x, y, module):
    """Of an embedding that is the output layer too: x (…, D), y = x @ table.T -> (…, V)."""
    raise NotImplementedError

  def merge(self, p, kernel, bias, layer: Layer):
    """Returns (kernel, bias) float32 of the bare model; a bias there is none of stays None."""
    raise NotImplementedError


def init(adapter: Adapter, config, variables, rng, head=(), *, chosen=None,
         also=lambda path: False) -> tune.Tuned:
  """Returns the adapters, the head and what `also` finds as trainable, all else frozen.

  Args:
    adapter: the method.
    config: the section `tune`; `targets` and `also_train` are read.
    variables: of the bare model.
    rng: a key for what is new.
    head: path prefixes of the head; it trains in full and is never adapted.
    chosen: {module path: Found}, in place of those that `config.targets` names.
    also: path of a parameter -> whether it trains in full beside the adapters.

  Raises:
    UserError: a target matches no layer or one that the method cannot adapt.
  """
  also_train = tune.matcher(getattr(config, "also_train", ()), variables, "tune.also_train")
  if chosen is None:
    chosen = targets(config.targets, variables, head, adapter.KINDS)
  flat = tune.flatten(variables)
  chosen = {path: found for path, found in chosen.items() if not also_train(_places(flat, path)[0])}
  groups = {path: expand(path, found, flat.get(f"params/{path}/bias"), rng)
            for path, found in chosen.items()}
  every = [layer for group in groups.values() for layer in group]
  trainable, fixed = ({f"{COLLECTION}/{name}": jnp.asarray(a) for name, a in part.items()}
                      for part in adapter.shared(every, generator(rng, COLLECTION)))
  for path, group in groups.items():
    parts = [adapter.create(layer) for layer in group]
    for tree, part in ((trainable, 0), (fixed, 1)):
      for name in parts[0][part]:
        values = [made[part][name] for made in parts]
        if any(np.shape(value) != np.shape(values[0]) for value in values):
          raise errors.UserError(
            f"tune: the layers of {path} would get adapters of different shapes, but model.scan "
            "stacks them; set model.scan=False, or give them the same rank")
        stacked = stacking.is_stacked(path)
        tree[f"{COLLECTION}/{path}/{name}"] = (
          jnp.asarray(np.stack(values)) if stacked else jnp.asarray(values[0]))
  trained, frozen = tune.split(
    variables, lambda path: tune.under(path, head) or also_train(path) or also(path))
  frozen = tune.combine(frozen, tune.unflatten(fixed))
  merge_trees = _merger(adapter, groups) if adapter.mergeable else None
  return tune.build(
    tune.combine(trained, tune.unflatten(trainable)), frozen, head,
    merge=merge_trees, interceptor=Interceptor(adapter),
  )


def beside(leaves, config, variables, head=(), **more) -> tune.Tuned:
  """Returns what methods that add parameters but adapt no layer by itself make of them.

  Args:
    leaves: {path: array}, below COLLECTION; they train, as do the head and `tune.also_train`.
    config, variables, head: see `init`.
    more: other fields of tune.Tuned; plain weights cannot compute the same.
  """
  also_train = tune.matcher(config.also_train, variables, "tune.also_train")
  trained, frozen = tune.split(
    variables, lambda path: tune.under(path, head) or also_train(path))
  added = tune.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()})
  return tune.build(tune.combine(trained, added), frozen, head, merge=None, **more)


def _merger(adapter, groups):
  # Without their weights: a closure that holds those would keep them in memory.
  groups = {path: [dataclasses.replace(layer, _leaf=None) for layer in group]
            for path, group in groups.items()}

  def merge(frozen, trainable):
    flat = tune.flatten(tune.combine(frozen, trainable))
    plain = {path: leaf for path, leaf in flat.items() if not path.startswith(COLLECTION + "/")}
    common = {path.removeprefix(COLLECTION + "/"): leaf for path, leaf in flat.items()
              if path.startswith(COLLECTION + "/") and path.count("/") == 1}
    for path, group in groups.items():
      own = {name.rpartition("/")[2]: leaf for name, leaf in flat.items()
             if name.rpartition("/")[0] == f"{COLLECTION}/{path}"}
      place, bias_place = _places(plain, path)
      kernel, bias = plain[place], plain.get(bias_place)
      stacked = stacking.is_stacked(path)
      kernels, biases = [], []
      for i, layer in enumerate(group):
        at = (lambda leaf, i=i: leaf[i]) if stacked else (lambda leaf: leaf)
        p = {**common, **{name: at(leaf) for name, leaf in own.items()}}
        new, new_bias = adapter.merge(
          p, at(kernel).astype(jnp.float32).reshape(layer.shape),
          None if bias is None else at(bias).astype(jnp.float32), layer)
        if bias is None and new_bias is not None:
          raise errors.UserError(f"{path} has no bias, so its adapter cannot be merged into it")
        kernels.append(new.reshape(at(kernel).shape).astype(kernel.dtype))
        biases.append(None if bias is None else new_bias.astype(bias.dtype))
      plain[place] = jnp.stack(kernels) if stacked else kernels[0]
      if bias is not None:
        plain[bias_place] = jnp.stack(biases) if stacked else biases[0]
    return tune.unflatten(plain)
  return merge


def _places(flat, path: str) -> tuple[str, str]:
  """Returns the paths of a layer's kernel or table, and of its bias."""
  kernel = f"params/{path}/kernel"
  return (kernel if kernel in flat else f"params/{path}/embedding"), f"params/{path}/bias"


class Found(NamedTuple):
  """A layer's kernel or table (of a scanned stack with its leading axis), and its kind."""

  leaf: Any
  kind: str


def layers_of(variables, head=()) -> dict[str, Found]:
  """Returns {module path: Found} of the layers below the head that adapters know, sorted."""
  found = {}
  for path, leaf in tune.flatten(variables).items():
    module, _, name = path.rpartition("/")
    if path.startswith("params/") and not tune.under(path, head):
      if kind := _kind(path, name, leaf):
        found[module.removeprefix("params/")] = Found(leaf, kind)
  return found


def _kind(path: str, name: str, leaf) -> str:
  """Returns the kind of a layer (see `Layer`), given its kernel or table; "" if it is neither.

  Three axes alone do not tell a stack of matrices from a depthwise kernel (h, w, C).
  """
  axes = leaf.ndim - stacking.is_stacked(path)
  if name == "embedding":
    return "embedding" if axes == 2 else ""
  if name == "kernel" and axes == 4:
    return "pointwise" if leaf.shape[-4:-2] == (1, 1) else "conv"
  return {2: "linear", 3: "depthwise"}.get(axes, "") if name == "kernel" else ""


def expand(path: str, found: Found, bias, rng) -> list[Layer]:
  """Returns the layers behind a path: one, or those of a stack."""
  stacked = stacking.is_stacked(path)
  shape = tuple(found.leaf.shape[1:] if stacked else found.leaf.shape)
  shape = shape[-2:] if found.kind == "pointwise" else shape
  size = 0 if bias is None else bias.shape[-1]
  if not stacked:
    return [Layer(path, found.kind, shape, size, generator(rng, path), found.leaf)]
  alone = [stacking.numbered(path, i) for i in range(found.leaf.shape[0])]
  return [Layer(one, found.kind, shape, size, generator(rng, one), found.leaf, i)
          for i, one in enumerate(alone)]


def generator(rng, path: str) -> np.random.Generator:
  """Returns randomness that depends on a key and a path only."""
  key = rng if rng.dtype == jnp.uint32 else jax.random.key_data(rng)
  return np.random.default_rng([*np.asarray(key).tolist(), zlib.crc32(path.encode())])


def targets(wanted, variables, head=(), kinds=LINEAR) -> dict[str, Found]:
  """Returns {module path: Found} of the layers that `tune.targets` names.

  Args:
    wanted: expressions that are searched in module paths; ALL stands for all matrices.
    variables, head: of the model; layers of the head are never found.
    kinds: what the method can adapt.

  Raises:
    UserError: an expression is not valid, matches nothing, or a layer that cannot be adapted.
  """
  known = layers_of(variables, head)
  matrices = [path for path, found in known.items() if found.kind in LINEAR]
  chosen = set()
  for target in [wanted] if isinstance(wanted, str) else wanted:
    found = matrices if target == ALL else _search(target, known)
    if not found:
      raise errors.UserError(
        f"tune.targets: {target!r} matches no layer{errors.suggest(target, known)}; "
        "the linear layers are:\n  " + "\n  ".join(matrices)
      )
    for path in found:
      if known[path].kind not in kinds:
        shape = "x".join(map(str, known[path].leaf.shape))
        raise errors.UserError(
          f"tune.targets: {target!r} matches {path}, a layer of kind {known[path].kind} with "
          f"{shape} weights; this method adapts only {', '.join(kinds)} layers"
        )
    chosen.update(found)
  if not chosen:
    raise errors.UserError(f"tune.targets is empty: name layers, or use [{ALL!r}]")
  return {path: known[path] for path in sorted(chosen)}


def _search(target: str, paths) -> list[str]:
  try:
    return [path for path in paths if re.search(target, path)]
  except re.error as e:
    raise errors.UserError(f"tune.targets: {target!r} is no regular expression: {e}") from e


def check_rank(rank: int, layer: Layer, key: str = "tune.rank") -> None:
  """Raises UserError where an update of this rank would be no smaller than the layer."""
  inputs, outputs = math.prod(layer.shape[:-1]), layer.shape[-1]
  if rank > min(inputs, outputs):
    raise errors.UserError(
      f"{key}={rank} is larger than the smaller side of {layer.path} "
      f"({inputs} x {outputs}); use at most {min(inputs, outputs)}, "
      "or leave that layer out of tune.targets"
    )


def kaiming(rng: np.random.Generator, shape: tuple[int, ...], inputs: int) -> np.ndarray:
  """Returns the start that torch gives a linear layer of so many inputs, uniform and float32."""
  bound = 1 / math.sqrt(inputs)
  return rng.uniform(-bound, bound, shape).astype(np.float32)


def refuse_peft(given: Mapping, *keys: str) -> None:
  """Raises UserError where an adapter_config.json sets one of these keys, which we do not compute.

  Its dropouts need no refusal: they act in training only.
  """
  for key in keys:
    if given.get(key):
      raise errors.UserError(
        f"adapter_config.json: {key}={given[key]!r} is not supported for "
        f"{given.get('peft_type', 'this method')}; save the adapter without it")


def dropout(module, x, rate: float):
  """Returns x with a share of its elements zeroed, in training only; the rest is scaled up."""
  if not rate or not module.has_rng("dropout"):
    return x
  keep = layers.keep_mask(module.make_rng("dropout"), x.shape, rate)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Interceptor:
  """Calls a method's hooks where layers call theirs, and says which adapters never acted.

  It works under `nn.scan` and `nn.remat` where the scan carries the collection on its axis.
  """

  def __init__(self, adapter: Adapter):
    self._adapter = adapter
    self._hooks = {name for name in HOOKS
                   if getattr(type(adapter), name) is not getattr(Adapter, name)}
    self._trace = threading.local()

  def __call__(self, call, args, kwargs, context):
    module, name = context.module, context.method_name
    if name == "__call__" and not module.path:
      return self._root(call, args, kwargs, module)
    if name not in self._hooks or not isinstance(module, LAYERS):
      return call(*args, **kwargs)
    own = {key: leaf for key, leaf in module.variables.get(COLLECTION, {}).items()
           if not isinstance(leaf, Mapping)}
    if not own:
      return call(*args, **kwargs)
    getattr(self._trace, "used", set()).add("/".join(module.path))
    p = {**getattr(self._trace, "shared", {}), **own}
    return getattr(self, "_" + name)(p, call, args, kwargs, module)

  def _root(self, call, args, kwargs, module):
    there = tune.flatten(module.variables.get(COLLECTION, {}))
    self._trace.used = set()
    self._trace.shared = {path: leaf for path, leaf in there.items() if "/" not in path}
    outputs = call(*args, **kwargs)
    idle = {path.rpartition("/")[0] for path in there if "/" in path} - self._trace.used
    if idle:
      logging.log_first_n(
        logging.WARNING, "%d adapters act on nothing in this forward pass: %s", 1,
        len(idle), ", ".join(sorted(idle)))
    return outputs

  def _prepare(self, p, call, args, kwargs, module):
    return self._adapter.prepare(p, call(*args, **kwargs), module)

  def _weights(self, p, call, args, kwargs, module):
    kernel, bias = call(*args, **kwargs)
    kernel = layers.read(kernel)
    pointwise = kernel.ndim == 4 and kernel.shape[:2] == (1, 1)
    matrix = kernel.reshape(kernel.shape[2:]) if pointwise else kernel
    new, bias = self._adapter.weights(p, matrix, bias, module)
    return new.reshape(kernel.shape), bias

  def _adapt(self, p, call, args, kwargs, module):
    x, y = args[0], call(*args, **kwargs)
    if getattr(module, "size", 0) == 1 and getattr(module, "stride", 1) > 1:
      x = x[:, ::module.stride, ::module.stride]  # what a strided 1x1 convolution reads
    return self._adapter.adapt(p, x, y, module).astype(y.dtype)

  def _adapt_output(self, p, call, args, kwargs, module):
    y = call(*args, **kwargs)
    return self._adapter.adapt_output(p, args[0], y, module).astype(y.dtype)
