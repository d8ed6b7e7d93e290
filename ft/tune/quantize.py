"""A quantised base: frozen kernels and embedding tables kept in few bits, read in each product.

`tune.quantize` goes with every method that leaves layers frozen. What is kept of a layer stands in
a collection of its own at the module's path, quantized/<module>/<name>, in place of its kernel or
table, with the leading axis of stacked layers; an interceptor gives it to the hooks `weights`,
`rows` and `table`. The method that tunes has seen the full-precision weights before.

int8: codes of 8 bits, symmetric, a float32 scale for each output channel (of a table: each row).
nf4: Dettmers et al., QLoRA (2023), arXiv:2305.14314. The 16 quantiles of a normal distribution that
the paper's implementation bitsandbytes uses, times the largest magnitude of 64 weights along the
input axis; those magnitudes are kept in 8 bits, less their mean, in groups of 256 with a float32
scale: 4.127 bits a weight. Embedding tables, and output layers named lm_head, stay int8.
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import config_dict

from ft import errors, mesh, models, state, tune
from ft.models import layers
from ft.tune import adapters
from ft.weights import stacking

COLLECTION = "quantized"
BLOCK, GROUP = 64, 256  # weights that share a magnitude; magnitudes that share a scale
SMALLEST = 4096  # weights; smaller layers, unless they are named, are not worth a loss
KINDS = ("linear", "pointwise", "embedding")
NF4 = np.array([
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
  -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
  0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0], np.float32)


class Kept(NamedTuple):
  """What was known of a leaf before it was quantised: its path, form, shape and dtype."""

  path: str
  form: str
  shape: tuple[int, ...]
  dtype: Any


def apply(tuned: tune.Tuned, config, head=(), context=None) -> tune.Tuned:
  """Returns a split whose frozen kernels and tables are quantised, as the section `tune` says.

  Args:
    tuned: of any method.
    config: `quantize` and `quantize_targets` are read.
    head: path prefixes of the head, which is quantised only if a target names it.
    context: tune.Context; with a loaded model, layers that read their weights in ways of their own
      are left alone; with `report`, `notes` says how the outputs change.

  Raises:
    UserError: nothing is left to quantise, or a target names what trains or cannot be quantised.
  """
  if config.get("quantize", "none") == "none":
    if config.get("quantize_targets"):
      raise errors.UserError("tune.quantize_targets has no effect with tune.quantize='none'; set "
                             "tune.quantize to 'nf4' or 'int8'")
    return tuned
  if COLLECTION in tuned.frozen:  # a run's adapter at tune.init has brought its quantised base
    return tuned
  chosen = _choose(tuned, config, head, context)
  flat, kept = tune.flatten(tuned.frozen), {}
  before = sum(math.prod(leaf.shape) for path, leaf in flat.items() if path.startswith("params/"))
  for module, found in chosen.items():
    path = _place(module, found.kind)
    leaf = flat.pop(path)
    kept[module] = Kept(path, _form(module, found.kind, config.quantize), leaf.shape, leaf.dtype)
    flat |= {f"{COLLECTION}/{module}/{name}": array
             for name, array in _encoded(leaf, kept[module]).items()}
  plain = functools.partial(_plain, kept)
  inner = tuned.merge  # not `tuned`, which holds the full-precision weights
  merge = inner and (lambda frozen, trainable: inner(plain(frozen), trainable))
  after = dataclasses.replace(
    tuned, frozen=tune.unflatten(flat), merge=merge, plain=plain,
    interceptor=tune.chain(tuned.interceptor, Interceptor()), reader=Interceptor())
  size = sum(leaf.nbytes for path, leaf in flat.items()
             if path.startswith(("params/", COLLECTION + "/")))
  note = (f"tune.quantize={config.quantize} keeps the frozen weights in {size / 1e6:,.3g} MB, "
          f"{size / (2 * before):.3f} of their size in bfloat16")
  if context and context.report:
    change = difference(context.pretrained, tuned, after)
    note += (f"; it changes the outputs on a probe batch by {100 * change:.2g} % (root mean "
             "square), and merged or exported weights have that change in them")
  logging.info("%s", note)
  values = {key: config[key] for key in ("quantize", "quantize_targets")}
  settings = config_dict.ConfigDict({**(tuned.settings or config), **values})
  return dataclasses.replace(after, notes=(*tuned.notes, note + "."), settings=settings)


def _choose(tuned, config, head, context) -> dict[str, adapters.Found]:
  """Returns {module path: Found} of what is to be quantised."""
  variables = tuned.combine(tuned.frozen, tuned.trainable)
  known = adapters.layers_of(variables)
  if context and context.pretrained:
    hooked = _hooked(context.pretrained, variables)
    known = {path: found for path, found in known.items() if path in hooked}
  trained = tune.flatten(tuned.trainable)
  frozen = {path: found for path, found in known.items() if found.kind in KINDS
            and _place(path, found.kind) not in trained}
  if config.quantize_targets:
    return _named(config.quantize_targets, known, frozen)
  chosen = {path: found for path, found in frozen.items()
            if not tune.under(f"params/{path}", head) and _size(path, found.leaf) >= SMALLEST}
  if not chosen:
    raise errors.UserError(
      f"tune.quantize={config.quantize!r} finds nothing to quantise: quantising a layer that "
      f"trains is not possible, and tune.method={config.method!r} leaves no linear layer or "
      f"embedding of {SMALLEST} weights frozen. Use a method that does, such as "
      "tune.method='lora', or tune.quantize='none'")
  return chosen


def _named(targets, known, frozen) -> dict[str, adapters.Found]:
  """Returns what the expressions `targets` find; UserError unless all of it can be quantised."""
  chosen = {}
  for target in [targets] if isinstance(targets, str) else targets:
    try:
      found = [path for path in known if re.search(target, path)]
    except re.error as e:
      raise errors.UserError(
        f"tune.quantize_targets: {target!r} is no regular expression: {e}") from e
    if not found:
      raise errors.UserError(
        f"tune.quantize_targets: {target!r} matches no layer{errors.suggest(target, frozen)}; "
        "these can be quantised:\n  " + "\n  ".join(frozen))
    for path in found:
      if known[path].kind not in KINDS:
        raise errors.UserError(
          f"tune.quantize_targets: {target!r} matches {path}, a layer of kind {known[path].kind}; "
          f"only layers of kind {', '.join(KINDS)} can be quantised")
      if path not in frozen:
        raise errors.UserError(
          f"tune.quantize_targets: {target!r} matches {path}, and quantising a layer that trains "
          "is not possible; name frozen layers only, or leave tune.quantize_targets empty for "
          "all of them")
      chosen[path] = known[path]
  return chosen


def _hooked(pretrained, variables) -> set[str]:
  """Returns the paths of modules that read their weights through the hooks; computes no value."""
  seen = set()

  def note(call, args, kwargs, context):
    if context.method_name in ("weights", "rows", "table"):
      seen.add("/".join(context.module.path))
    return call(*args, **kwargs)

  apply = state.make_apply(pretrained.module, note)
  jax.eval_shape(lambda variables: apply(variables, _probe(pretrained)), variables)
  return seen


def _probe(pretrained) -> dict:
  return models.family_module(pretrained.family).probe_inputs(pretrained.config)


def _place(module: str, kind: str) -> str:
  return f"params/{module}/" + ("embedding" if kind == "embedding" else "kernel")


def _size(path: str, leaf) -> int:
  """Returns the number of weights of one layer."""
  return math.prod(leaf.shape[1:] if stacking.is_stacked(path) else leaf.shape)


def _form(module: str, kind: str, quantize: str) -> str:
  """Returns "rows" | "int8" | "nf4": how a layer is kept."""
  if kind == "embedding":
    return "rows"
  return "int8" if module.rpartition("/")[2] == "lm_head" else quantize


def difference(pretrained, before: tune.Tuned, after: tune.Tuned) -> float:
  """Returns how much the outputs on the family's probe batch change from one split to another.

  The root of the mean squared change over the root of the mean square, of the output where it is
  largest.
  """
  def outputs(tuned):
    apply = state.make_apply(pretrained.module, tuned.interceptor, tuned.around)
    variables = tuned.combine(tuned.frozen, tuned.trainable)
    return jax.jit(lambda variables: apply(variables, _probe(pretrained))[0])(variables)

  @jax.jit
  def change(old, new):
    old, new = (jnp.nan_to_num(x.astype(jnp.float32)) for x in (old, new))
    return jnp.sqrt(jnp.square(new - old).mean() / jnp.maximum(jnp.square(old).mean(), 1e-30))

  pairs = zip(jax.tree.leaves(outputs(before)), jax.tree.leaves(outputs(after)), strict=True)
  return max(float(change(old, new)) for old, new in pairs
             if jnp.issubdtype(old.dtype, jnp.floating))


def int8(weights, axis: int) -> dict:
  """Returns {codes, scale} of weights (in, out); one scale for all weights along `axis`."""
  scale = jnp.abs(weights).max(axis) / 127
  codes = jnp.round(weights / jnp.expand_dims(jnp.where(scale > 0, scale, 1), axis))
  return {"codes": codes.astype(jnp.int8), "scale": scale}


def nf4(weights) -> dict:
  """Returns {codes, absmax, absmax_scale, absmax_mean} of weights (in, out).

  With n = ⌈in / 64⌉ blocks, the last one filled up with zeros: codes (32 n, out) uint8, of each
  block the first 32 weights in the high and the others in the low four bits; absmax (n, out) int8;
  absmax_scale (⌈n out / 256⌉,); absmax_mean ().
  """
  inputs, outputs = weights.shape
  blocks = jnp.pad(weights, ((0, -inputs % BLOCK), (0, 0))).reshape(-1, BLOCK, outputs)
  absmax = jnp.abs(blocks).max(1)
  mean = absmax.mean()
  off = (absmax - mean).reshape(-1)
  groups = jnp.pad(off, (0, -off.size % GROUP)).reshape(-1, GROUP)
  scale = jnp.abs(groups).max(1) / 127
  codes = jnp.round(groups / jnp.where(scale > 0, scale, 1)[:, None]).astype(jnp.int8)
  kept = {"absmax": codes.reshape(-1)[:off.size].reshape(absmax.shape),
          "absmax_scale": scale, "absmax_mean": mean}
  absmax = _absmax(kept)[:, None]  # as it will be read: the nearest value makes up for its error
  shares = blocks / jnp.where(absmax > 0, absmax, 1)
  middles = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
  codes = (shares[..., None] > middles).sum(-1, dtype=jnp.uint8)
  packed = codes[:, :BLOCK // 2] << 4 | codes[:, BLOCK // 2:]
  return {"codes": packed.reshape(-1, outputs), **kept}


def _absmax(kept):
  """Returns the magnitudes (n, out) float32."""
  codes = kept["absmax"]
  scale = jnp.repeat(kept["absmax_scale"], GROUP)[:codes.size].reshape(codes.shape)
  return jnp.maximum(codes * scale + kept["absmax_mean"], 0)


def read(kept: dict, inputs: int):
  """Returns the weights (inputs, out) float32 of what `int8` along axis 0, or `nf4`, gave."""
  if "absmax" not in kept:
    return kept["codes"] * kept["scale"]
  packed = kept["codes"].reshape(-1, BLOCK // 2, kept["codes"].shape[-1])
  codes = jnp.concatenate([packed >> 4, packed & 15], axis=1)
  values = jnp.asarray(NF4).at[codes].get(mode="promise_in_bounds")
  return (values * _absmax(kept)[:, None]).reshape(-1, packed.shape[-1])[:inputs]


def read_rows(kept: dict):
  """Returns the table (V, D) float32 of what `int8` along axis 1 gave."""
  return kept["codes"] * kept["scale"][:, None]


def _encode(form: str, stacked: bool, leaf):
  matrix = leaf.reshape(*leaf.shape[:stacked], *leaf.shape[-2:]).astype(jnp.float32)
  one = {"nf4": nf4, "int8": functools.partial(int8, axis=0),
         "rows": functools.partial(int8, axis=1)}[form]
  return jax.lax.map(one, matrix) if stacked else one(matrix)  # a stack's layers one after another


def _encoded(leaf, kept: Kept) -> dict:
  """Returns what is kept of a leaf, on the mesh of the leaf."""
  encode = functools.partial(_encode, kept.form, stacking.is_stacked(kept.path))
  placement = None
  if isinstance(leaf.sharding, jax.sharding.NamedSharding):
    placement = mesh.shardings(leaf.sharding.mesh, jax.eval_shape(encode, leaf))
  return jax.jit(encode, out_shardings=placement)(leaf)


def _decode(form: str, inputs: int, kept: dict):
  return read_rows(kept) if form == "rows" else read(kept, inputs)


def _plain(kept: dict[str, Kept], frozen: tune.Tree) -> tune.Tree:
  """Returns a frozen tree with the kernels and tables that its codes stand for."""
  flat = tune.flatten(frozen)
  for module, was in kept.items():
    own = {name: flat.pop(f"{COLLECTION}/{module}/{name}") for name in _NAMES[was.form]}
    decode = functools.partial(_decode, was.form, was.shape[-2])
    decode = jax.vmap(decode) if stacking.is_stacked(was.path) else decode
    flat[was.path] = jax.jit(lambda own, decode=decode, was=was:
                             decode(own).reshape(was.shape).astype(was.dtype))(own)
  return tune.unflatten(flat)


_NAMES = {"rows": ("codes", "scale"), "int8": ("codes", "scale"),
          "nf4": ("codes", "absmax", "absmax_scale", "absmax_mean")}


class Interceptor:
  """Answers the hooks of layers whose weights are quantised; what is read lives for one product."""

  def __call__(self, call, args, kwargs, context):
    module, name = context.module, context.method_name
    if name not in ("weights", "rows", "table") or not isinstance(module, adapters.LAYERS):
      return call(*args, **kwargs)
    own = module.variables.get(COLLECTION)
    if own is None:
      return call(*args, **kwargs)
    return getattr(self, "_" + name)(dict(own), module, *args)

  def _weights(self, kept, module: nn.Module, in_features: int):
    bias = module.get_variable("params", "bias") if module.use_bias else None
    kernel = layers.Stored(kept, functools.partial(read, inputs=in_features))
    if isinstance(module, layers.Linear):
      return kernel, bias
    return layers.read(kernel).reshape(module.kernel_shape(in_features)), bias

  def _rows(self, kept, module, ids):
    codes = jnp.take(kept["codes"], ids, axis=0, mode="clip")
    scale = jnp.take(kept["scale"], ids, axis=0, mode="fill")  # not-a-number outside the table
    return codes * scale[..., None]

  def _table(self, kept, module):
    return layers.Stored(kept, read_rows)
