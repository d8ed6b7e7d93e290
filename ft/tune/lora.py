"""LoRA: frozen linear layers y = x W + b get a trained update, y + s (x A) B, of low rank.

Source: Hu et al., LoRA (2021); the scale alpha/sqrt(r): Kalajdzievski, rsLoRA (2023). A starts as
in the reference implementation `peft` (Kaiming uniform), B at zero, so training starts at the
pretrained function. Adapters are a collection of their own that mirrors the module paths:
adapters/<module>/lora_a (in, r) and lora_b (r, out), with the leading axis of stacked (scanned)
layers where the kernel has one. W + A B is never formed in training.
"""

import math
import re
import threading
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ft import errors, tune
from ft.weights import stacking

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "rank": (16, "rank of each update", (1, None)),
  "alpha": (32.0, "size of the updates; the scale is a function of it and the rank"),
  "scale": ("alpha/r", "how alpha and rank give the scale", ["alpha/r", "alpha/sqrt(r)"]),
  "dropout": (0.0, "share of an update's inputs set to zero in training", (0.0, 0.99)),
}

COLLECTION = "adapters"
ALL = "all-linear"


def init(config, variables, rng, head=()) -> tune.Tuned:
  """Returns adapters and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, or the rank is larger than
      the smaller side of a layer.
  """
  kernels = targets(config, variables, head)
  check_rank(config.rank, kernels)
  adapters = {}
  for path, kernel in kernels.items():
    a, b = initial(rng, path, kernel, config.rank)
    adapters |= {f"{COLLECTION}/{path}/lora_a": a, f"{COLLECTION}/{path}/lora_b": b}
  trained, frozen = tune.split(variables, lambda path: tune.under(path, head))
  scale = scaling(config)
  return tune.build(
    tune.combine(trained, tune.unflatten(adapters)), frozen, head,
    merge=lambda frozen, trainable: merge(tune.combine(frozen, trainable), scale),
    interceptor=Interceptor(scale, config.dropout),
  )


def scaling(config) -> float:
  """The factor of the update: alpha/r or alpha/sqrt(r)."""
  return config.alpha / (math.sqrt(config.rank) if config.scale == "alpha/sqrt(r)" else config.rank)


def layers(variables, head=()) -> dict:
  """Returns {module path: kernel} of the layers below the head that have a kernel, sorted.

  Kernels are (in, out), (L, in, out) of a scanned stack, or (h, w, …) of a convolution.
  """
  found = {}
  for path, leaf in tune.flatten(variables).items():
    module, _, name = path.rpartition("/")
    if path.startswith("params/") and name == "kernel" and not tune.under(path, head):
      found[module.removeprefix("params/")] = leaf
  return found


def is_linear(path: str, kernel) -> bool:
  """Whether a kernel is a matrix, a stack of them, or the (1, 1, in, out) of a pointwise conv.

  Three axes alone do not tell: a depthwise kernel is (k, k, C).
  """
  if kernel.ndim == 3:
    return stacking.is_stacked(path)
  return kernel.ndim == 2 or (kernel.ndim == 4 and kernel.shape[:2] == (1, 1))


def targets(config, variables, head=()) -> dict:
  """Returns {module path: kernel} of the layers that `config.targets` names."""
  known = layers(variables, head)
  linear = [path for path, kernel in known.items() if is_linear(path, kernel)]
  chosen = set()
  for target in [config.targets] if isinstance(config.targets, str) else config.targets:
    found = linear if target == ALL else _search(target, known)
    spatial = [path for path in found if path not in linear]
    if spatial:
      raise errors.UserError(
        f"tune.targets: {target!r} matches {spatial[0]}, a convolution with a "
        f"{'x'.join(map(str, known[spatial[0]].shape))} kernel; only linear layers and 1x1 "
        "convolutions can be adapted"
      )
    if not found:
      raise errors.UserError(
        f"tune.targets: {target!r} matches no layer{errors.suggest(target, known)}; "
        "the linear layers are:\n  " + "\n  ".join(linear)
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


def check_rank(rank: int, kernels: dict) -> None:
  """Raises UserError where an update of this rank would be no smaller than the layer."""
  path, kernel = min(kernels.items(), key=lambda item: min(item[1].shape[-2:]))
  if rank > min(kernel.shape[-2:]):
    raise errors.UserError(
      f"tune.rank={rank} is larger than the smaller side of {path} "
      f"({kernel.shape[-2]} x {kernel.shape[-1]}); use at most {min(kernel.shape[-2:])}, "
      "or leave that layer out of tune.targets"
    )


def _generator(rng, path: str) -> np.random.Generator:
  """Randomness of this layer alone: adding or removing targets leaves the others' start unchanged.

  Numpy's, as jax would compile a program for every shape there is.
  """
  key = rng if rng.dtype == jnp.uint32 else jax.random.key_data(rng)
  return np.random.default_rng([*np.asarray(key).tolist(), zlib.crc32(path.encode())])


def initial(rng, path: str, kernel, rank: int):
  """Returns (A, B) float32 of one layer, or of a stack of them, which start as they would alone.

  A is uniform within 1/sqrt(in) as in peft, B is zero.
  """
  inputs, outputs = kernel.shape[-2:]
  if kernel.ndim == 3:
    alone = [stacking.numbered(path, i) for i in range(kernel.shape[0])]
    a, b = zip(*(initial(rng, path, kernel[0], rank) for path in alone), strict=True)
    return jnp.stack(a), jnp.stack(b)
  bound = 1 / math.sqrt(inputs)
  a = _generator(rng, path).uniform(-bound, bound, (inputs, rank)).astype(np.float32)
  return jnp.asarray(a), jnp.zeros((rank, outputs), jnp.float32)


def merge(variables, scale: float):
  """Returns plain variables in which every adapted kernel is W + scale * A B, in W's dtype."""
  flat = tune.flatten(variables)
  merged = {path: leaf for path, leaf in flat.items() if not path.startswith(COLLECTION + "/")}
  for path, a in flat.items():
    if path.startswith(COLLECTION + "/") and path.endswith("/lora_a"):
      module = path.removesuffix("/lora_a")
      delta = jnp.matmul(a, flat[f"{module}/lora_b"], precision="highest") * scale
      place = f"params/{module.removeprefix(COLLECTION + '/')}/kernel"
      kernel = merged[place]
      total = kernel.astype(jnp.float32) + delta.reshape(kernel.shape)
      merged[place] = total.astype(kernel.dtype)
  return tune.unflatten(merged)


class Interceptor:
  """Adds the update where a layer calls its `adapt(x, y)` hook, and says which were never added.

  Dropout acts on the update's input, only where the apply has a stream "dropout". It works under
  `nn.scan` and `nn.remat` where the scan carries the collection "adapters" on its axis.
  """

  def __init__(self, scale: float, dropout: float = 0.0):
    self._scale = scale
    self._dropout = dropout
    self._trace = threading.local()

  def __call__(self, call, args, kwargs, context):
    if context.method_name == "adapt":
      return self._adapt(context.module, *args, call(*args, **kwargs))
    if context.method_name == "__call__" and not context.module.path:
      return self._root(call, args, kwargs, context.module)
    return call(*args, **kwargs)

  def _root(self, call, args, kwargs, module):
    self._trace.used = set()
    outputs = call(*args, **kwargs)
    there = tune.flatten(module.variables.get(COLLECTION, {}))
    idle = {path.rpartition("/")[0] for path in there} - self._trace.used
    if idle:
      logging.log_first_n(
        logging.WARNING, "LoRA: %d adapters act on nothing in this forward pass: %s", 1,
        len(idle), ", ".join(sorted(idle)))
    return outputs

  def _adapt(self, module, x, y, adapted):
    del y
    a = module.get_variable(COLLECTION, "lora_a")
    if a is None:
      return adapted
    if x.shape[:-1] != adapted.shape[:-1]:
      raise errors.UserError(
        f"tune.targets: {'/'.join(module.path)} changes the shape {x.shape[:-1]} of its input to "
        f"{adapted.shape[:-1]}, which a low-rank update cannot follow; leave it out"
      )
    getattr(self._trace, "used", set()).add("/".join(module.path))
    b = module.get_variable(COLLECTION, "lora_b")
    rows = self._drop(module, x.reshape(-1, x.shape[-1]))
    # Two thin products over 2-D operands; the scale goes on the (rows, r) side, the smallest.
    delta = (rows @ a.astype(rows.dtype) * self._scale) @ b.astype(rows.dtype)
    return adapted + delta.reshape(adapted.shape).astype(adapted.dtype)

  def _drop(self, module, rows):
    if not self._dropout or not module.has_rng("dropout"):
      return rows
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - self._dropout, rows.shape)
    return jnp.where(keep, rows / (1 - self._dropout), 0).astype(rows.dtype)
