"""Layers every family is built from.

Three things set them apart from linen's own. Products flatten their activations to two dimensions
first, because the gradient of a three-dimensional product misses the fast matrix kernels on a CPU
(a factor of two on the layer). Each `Linear` offers two methods that tuning may intercept with
`nn.intercept_methods`: `weights`, which yields its parameters, and `adapt`, for its output. Dropout
acts if and only if an rng stream "dropout" was given to `apply`; there are no train flags.

Shapes: B batch, T and S positions, H heads, D features, N = product of all leading axes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def product(x, kernel, bias=None, dtype=jnp.float32):
  """Returns x (..., in) times kernel (in, out) plus bias (out,), computed as one 2-D product."""
  rows = x.astype(dtype).reshape(-1, x.shape[-1])
  y = rows @ kernel.astype(dtype)
  if bias is not None:
    y = y + bias.astype(dtype)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nn.Module):
  """y = x @ kernel + bias over the last axis: (..., in) -> (..., features).

  Parameters: kernel (in, features), bias (features,). Tuning intercepts `weights` and `adapt`.
  """

  features: int
  use_bias: bool = True
  dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.normal(0.02)

  @nn.compact
  def weights(self, in_features: int):
    """Returns (kernel (in_features, features), bias (features,) or None)."""
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
    return self.adapt(x, product(x, *self.weights(x.shape[-1]), self.dtype))


def fused(modules: Sequence[Linear], x) -> list:
  """Applies several Linear modules to the same x (..., in) as one product.

  Returns one output (..., module.features) a module, in order. The parameters stay separate; the
  concatenation of kernels costs little beside the product it makes larger. All of the modules
  have a bias or none has.
  """
  weights = [module.weights(x.shape[-1]) for module in modules]
  kernel = jnp.concatenate([kernel for kernel, _ in weights], axis=1)
  bias = None
  if modules[0].use_bias:
    bias = jnp.concatenate([bias for _, bias in weights])
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


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450).

  Parameters: scale (D,), bias (D,). Statistics in float32, output in `dtype`.
  """

  epsilon: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + self.epsilon)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


class Embedding(nn.Module):
  """A table of vectors: ids (...) -> (..., features). Parameter: embedding (size, features).

  An id outside the table gives not-a-number: a tokenizer of another model shall not go unnoticed.
  """

  size: int
  features: int
  dtype: Any = jnp.float32
  embedding_init: Callable = nn.initializers.normal(0.02)

  @nn.compact
  def __call__(self, ids):
    table = self.param("embedding", self.embedding_init, (self.size, self.features))
    return jnp.take(table, ids, axis=0, mode="fill").astype(self.dtype)


def attention(q, k, v, bias=None, drop: Callable | None = None):
  """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), plain XLA.

  Args:
    q: (B, T, H, D). k, v: (B, S, H, D).
    bias: added to the scores, broadcastable to (B, H, T, S); `padding_bias` makes one of a mask.
    drop: applied to the probabilities (B, H, T, S): a Dropout module.

  Returns:
    (B, T, H, D) in v's dtype. The softmax is computed in float32.
  """
  scores = jnp.einsum("bthd,bshd->bhts", q * q.shape[-1]**-0.5, k,
                      preferred_element_type=jnp.float32)
  if bias is not None:
    scores = scores + bias
  probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  if drop is not None:
    probabilities = drop(probabilities)
  return jnp.einsum("bhts,bshd->bthd", probabilities, v)


def padding_bias(mask):
  """Returns the attention bias (B, 1, 1, S) of a padding mask (B, S) that is 1 for real tokens."""
  return jnp.where(mask[:, None, None, :] != 0, 0.0, jnp.finfo(jnp.float32).min)


def gelu(x):
  """The exact Gaussian error linear unit, x * Phi(x) (Hendrycks & Gimpel, arXiv:1606.08415)."""
  return x * (0.5 + 0.5 * jax.lax.erf(x * jnp.asarray(0.5**0.5, x.dtype)))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
