"""Layers every family is built from.

Three things set them apart from linen's own. Products flatten their activations to two dimensions
first, because the gradient of a three-dimensional product misses the fast matrix kernels on a CPU
(a factor of two on the layer). Layers offer methods that tuning may intercept with
`nn.intercept_methods`: `prepare`, for a layer's input, `weights`, which yields its parameters, and
`adapt`, for its output (and `adapt_output` of an embedding that is the output layer too). Dropout
acts if and only if an rng stream "dropout" was given to `apply`; there are no train flags.

Shapes: B batch, T and S positions, H heads, D features, N = product of all leading axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_FEW = 16  # rows, below which a fused product does not pay
_GOLDEN = 0x9E3779B9
_REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a model computes; what it computes is its family's Config.

  Attributes:
    dtype: of products and activations; norms and softmax use float32.
    attention: "auto" | "xla" | "cudnn" | "splash", see ft.models.attention.
    scan: equal layers are stacked into one and run in a loop: compiled once, not once a layer.
    remat: what the backward pass computes again to save memory, layer by layer: "none" | "dots"
      (all but the products) | "full" (all).
  """

  dtype: Any = jnp.float32
  attention: str = "auto"
  scan: bool = False
  remat: str = "none"


@dataclasses.dataclass(frozen=True)
class Stored:
  """A kernel (in, out) in the form it is kept in, such as codes of few bits, that is read on use.

  A product's backward pass reads it again: what the forward pass read would stay in memory until
  then, for all layers at once.

  Attributes:
    arrays: what is kept, a pytree.
    read: arrays -> kernel.
  """

  arrays: Any
  read: Callable

  @property
  def T(self):  # noqa: N802  as an array's
    """The transposed kernel."""
    return Stored(self.arrays, lambda arrays: self.read(arrays).T)


def read(kernel):
  """Returns a kernel as an array, whether it is one or `Stored`."""
  return kernel.read(kernel.arrays) if isinstance(kernel, Stored) else kernel


def product(x, kernel, bias=None, dtype=jnp.float32):
  """Returns x (..., in) times kernel (in, out) plus bias (out,), computed as one 2-D product.

  The kernel is an array or `Stored`.
  """
  rows = x.astype(dtype).reshape(-1, x.shape[-1])
  if isinstance(kernel, Stored):
    y = _read_and_multiply(kernel.read, rows, kernel.arrays)
  else:
    y = rows @ kernel.astype(dtype)
  if bias is not None:
    y = y + bias.astype(dtype)
  return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_and_multiply(read, rows, arrays):
  """Returns rows (N, in) times what `read` makes of arrays, read when the rows are known."""
  return rows @ read(_after(rows, arrays)).astype(rows.dtype)


def _read_again(read, kept, gradient):
  rows, arrays = kept
  # What the caller does not differentiate, the codes above all, the compiler drops.
  return jax.vjp(lambda rows, arrays: rows @ read(arrays).astype(rows.dtype),
                 rows, _after(gradient, arrays))[1](gradient)


_read_and_multiply.defvjp(
  lambda read, rows, arrays: (_read_and_multiply(read, rows, arrays), (rows, arrays)), _read_again)


def _after(x, arrays):
  """Returns arrays as they are, but to the compiler they come after x.

  It would read the kernels of all layers first, and those of the backward pass only once.
  """
  if jax.default_backend() != "cpu":
    return jax.lax.optimization_barrier((x, arrays))[1]
  # The CPU's compiler removes barriers; it cannot know that this, of a float, always holds.
  known = x.reshape(-1)[0] * 0 != 1
  return jax.tree.map(lambda a: jnp.where(known, a, jnp.zeros_like(a)), arrays)


def _joined(kernels):
  """Returns kernels of equal input side by side."""
  if not any(isinstance(kernel, Stored) for kernel in kernels):
    return jnp.concatenate(kernels, axis=1)
  parts = [kernel if isinstance(kernel, Stored) else Stored(kernel, lambda array: array)
           for kernel in kernels]
  return Stored([part.arrays for part in parts], lambda arrays: jnp.concatenate(
    [part.read(array) for part, array in zip(parts, arrays, strict=True)], axis=1))


class Linear(nn.Module):
  """y = x @ kernel + bias over the last axis: (..., in) -> (..., features).

  Parameters: kernel (in, features), bias (features,). Hooks: `prepare`, `weights`, `adapt`.
  """

  features: int
  use_bias: bool = True
  dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.normal(0.02)

  def prepare(self, x):
    """Returns the input (..., in) that is multiplied; a hook."""
    return x

  @nn.compact
  def weights(self, in_features: int):
    """Returns (kernel (in_features, features), bias (features,) or None); a hook.

    The kernel that a hook gives may be `Stored`.
    """
    kernel = self.param("kernel", self.kernel_init, (in_features, self.features))
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return kernel, bias

  def adapt(self, x, y):
    """Returns the layer's output, given its input x (..., in) and plain output y; a hook."""
    del x
    return y

  def __call__(self, x):
    return self.adapt(x, product(self.prepare(x), *self.weights(x.shape[-1]), self.dtype))


def fused(modules: Sequence[Linear], x) -> list:
  """Applies several Linear modules to the same x (..., in) as one product.

  Returns one output (..., module.features) a module, in order. The parameters stay separate; the
  concatenation of kernels costs little beside the product it makes larger, except with few rows,
  as in decoding, where reading kernels is most of the work: then each is applied by itself, as it
  is where tuning changes the input of one of them. A module without bias among others with one
  (Whisper's key) is given zeros.
  """
  sizes = x.shape[:-1]
  few = all(isinstance(size, int) for size in sizes) and math.prod(sizes) < _FEW
  if few or any(module.prepare(x) is not x for module in modules):
    return [module(x) for module in modules]
  weights = [module.weights(x.shape[-1]) for module in modules]
  kernel = _joined([kernel for kernel, _ in weights])
  bias = None
  if any(module.use_bias for module in modules):
    bias = jnp.concatenate([jnp.zeros(module.features, modules[0].dtype) if bias is None else bias
                            for module, (_, bias) in zip(modules, weights, strict=True)])
  y = product(x, kernel, bias, modules[0].dtype)
  ends = [sum(m.features for m in modules[:i + 1]) for i in range(len(modules) - 1)]
  return [m.adapt(x, part) for m, part in zip(modules, jnp.split(y, ends, axis=-1), strict=True)]


def keep_mask(rng, shape, rate: float):
  """Returns a boolean mask of `shape`, each element True with probability 1 - rate.

  The bits are a hash of the element's index (two keyed rounds of the 32-bit finaliser of Wellons'
  hash-prospector), keyed by 64 bits drawn from `rng`: a few integer operations an element that
  fuse with what reads the mask, where threefry's twenty rounds cost more than the product before
  them. A function of (rng, index) only, so the mask is the same however the array is sharded.
  """
  seed = jax.random.bits(rng, (2,), jnp.uint32)
  index = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  bits = index * jnp.uint32(_GOLDEN) + seed[0]
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) ^ seed[1]
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
  bits = bits ^ (bits >> 16)
  return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


class Dropout(nn.Module):
  """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate).

  The identity where no rng stream "dropout" was passed to apply.
  """

  rate: float

  @nn.compact
  def __call__(self, x):
    if not 0.0 <= self.rate < 1.0:
      raise ValueError(f"dropout rate {self.rate} is outside [0, 1)")
    if self.rate == 0.0 or not self.has_rng("dropout"):
      return x
    keep = keep_mask(self.make_rng("dropout"), x.shape, self.rate)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - self.rate), x.dtype), jnp.zeros_like(x))


class DropPath(nn.Module):
  """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): a residual branch, dropped by rows.

  Each row of x (B, ...) is zeroed with probability `rate`, the rest scaled by 1 / (1 - rate). The
  rate may be traced. The identity where no rng stream "dropout" was passed to apply.
  """

  rate: Any

  @nn.compact
  def __call__(self, x):
    if isinstance(self.rate, (int, float)) and not self.rate or not self.has_rng("dropout"):
      return x
    draws = jax.random.uniform(self.make_rng("dropout"), (x.shape[0],) + (1,) * (x.ndim - 1))
    gate = jnp.where(draws < self.rate, 0.0, 1.0 / (1.0 - self.rate))
    return x * gate.astype(x.dtype)


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450).

  Parameters: scale (D,), bias (D,) with use_bias. Statistics in float32, output in `dtype`; `mean`,
  (..., D) -> (..., 1), computes them.
  """

  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  use_bias: bool = True
  mean: Callable = functools.partial(jnp.mean, axis=-1, keepdims=True)

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x = x.astype(jnp.float32)
    centred = x - self.mean(x)
    variance = self.mean(jnp.square(centred))
    y = centred * jax.lax.rsqrt(variance + self.epsilon) * scale.astype(jnp.float32)
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
    return y.astype(self.dtype)


class Embedding(nn.Module):
  """A table of vectors: ids (...) -> (..., features). Parameter: embedding (size, features).

  An id outside the table gives not-a-number: a tokenizer of another model shall not go unnoticed.
  """

  size: int
  features: int
  dtype: Any = jnp.float32
  embedding_init: Callable = nn.initializers.normal(0.02)

  @nn.compact
  def table(self):
    """Returns the parameter; a hook, which may give it `Stored`."""
    return self.param("embedding", self.embedding_init, (self.size, self.features))

  def rows(self, ids):
    """Returns the table's rows (..., features); a hook."""
    return jnp.take(self.table(), ids, axis=0, mode="fill")

  def adapt(self, ids, y):
    """Returns the output, given the ids (...) and their plain vectors y (..., features); a hook."""
    del ids
    return y

  def adapt_output(self, x, y):
    """Returns `attend`'s output, given its input x (..., features) and plain output y; a hook."""
    del x
    return y

  def __call__(self, ids):
    return self.adapt(ids, self.rows(ids).astype(self.dtype))

  def attend(self, x):
    """Returns x (..., features) times the transposed table: (..., size), a tied output layer."""
    return self.adapt_output(x, product(x, self.table().T, dtype=self.dtype))


class RMSNorm(nn.Module):
  """Root-mean-square normalisation over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

  Parameter: scale (D,). Statistics in float32, output in `dtype`. `offset` is added to the scale:
  1 in Gemma, whose files hold the scale's distance from one.
  """

  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  offset: float = 0.0

  @nn.compact
  def __call__(self, x):
    start = nn.initializers.constant(1.0 - self.offset)
    scale = self.param("scale", start, (x.shape[-1],)).astype(jnp.float32) + self.offset
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
    return (x * scale).astype(self.dtype)


def run_layers(layer: Callable, count: int, compute: Compute, x, *args, each: dict | None = None,
               name: str = "layer", keep: bool = False):
  """Runs x through `count` equal layers: x = layer(name=…)(x, *args, **each_i), one by one.

  Call it in a compact method. Unrolled, the layers are `{name}_0`, `{name}_1`, …; with
  compute.scan they are one module `layers` whose variables have a leading axis of `count`, and
  arrays of `each` reach the layer as traced scalars. compute.remat applies to both.

  Args:
    layer: name -> module; a module class with its other fields bound.
    count: how many.
    compute: scan and remat are read.
    x: the carry, any pytree.
    *args: the same for all layers; arrays, pytrees, None.
    each: keyword -> list of `count` values that differ between layers.
    name: prefix of the unrolled layers' names.
    keep: also return what each layer gave.

  Returns:
    x; with keep, (x, [x after each layer]).
  """
  each = each or {}

  def body(module, x, own):
    x = module(x, *args, **own)
    return x, (x if keep else None)

  if compute.remat != "none":
    body = nn.remat(body, policy=_REMAT[compute.remat], prevent_cse=not compute.scan)
  if compute.scan and count:
    own = {key: jnp.asarray(values) for key, values in each.items()}
    scan = nn.scan(body, variable_axes={True: 0}, split_rngs={True: True}, length=count)
    x, kept = scan(layer(name="layers"), x, own)
    return (x, [jax.tree.map(lambda a, i=i: a[i], kept) for i in range(count)]) if keep else x
  kept = []
  for i in range(count):
    x, after = body(layer(name=f"{name}_{i}"), x, {key: value[i] for key, value in each.items()})
    kept.append(after)
  return (x, kept) if keep else x


def cached(module: nn.Module, k, v, offset):
  """Returns the keys and values of all slots, k and v (B, T, H, D) put in from slot `offset` on.

  The slots (B, S, H, D) are variables of the collection "cache"; a first call where it is mutable
  and empty makes them in the shape of its own k and v. Without an offset there is no cache.
  """
  if offset is None:
    return k, v
  fresh = not module.has_variable("cache", "cached_key")
  slots = [module.variable("cache", name, jnp.zeros, a.shape, a.dtype)
           for name, a in (("cached_key", k), ("cached_value", v))]
  if not fresh:
    for slot, new in zip(slots, (k, v), strict=True):
      start = (0, offset, 0, 0)
      slot.value = jax.lax.dynamic_update_slice(slot.value, new.astype(slot.value.dtype), start)
  return slots[0].value, slots[1].value


def cached_source(module: nn.Module, make: Callable, source):
  """Returns the keys and values of cross-attention: make(source), or those of an earlier call.

  Args:
    module: the attention; where its collection "cache" is mutable, they are kept there.
    make: source (B, S, D) -> (k, v), each (B, S, H, D).
    source: the encoder's output; None: what was kept is used.
  """
  if source is None:
    return module.get_variable("cache", "source_key"), module.get_variable("cache", "source_value")
  k, v = make(source)
  if module.is_mutable_collection("cache") and not module.is_initializing():
    module.put_variable("cache", "source_key", k)
    module.put_variable("cache", "source_value", v)
  return k, v


def last_token(x, attention_mask=None):
  """Returns the vector (B, D) of each row's last real token, x (B, T, D), mask (B, T) or None."""
  if attention_mask is None:
    return x[:, -1]
  index = jnp.where(attention_mask != 0, jnp.arange(x.shape[1]), 0).max(-1)
  return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def gelu(x):
  """The exact Gaussian error linear unit, x * Phi(x) (Hendrycks & Gimpel, arXiv:1606.08415)."""
  return x * (0.5 + 0.5 * jax.lax.erf(x * jnp.asarray(0.5**0.5, x.dtype)))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
