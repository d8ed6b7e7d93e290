"""Convolutions and batch normalisation over images in NHWC layout.

XLA's grouped convolution is up to 60 times slower on a CPU than the same sum written as shifted
products, and its reductions of products over images and positions are as slow. On a CPU a depthwise
convolution therefore is a sum of k*k shifted, strided products with a hand-written gradient of the
same kind. On GPU and TPU the library's convolution is used. Which of the two is decided by
`jax.default_backend()` when a function is traced; `using` overrides it. A 1x1 convolution is one
2-D product everywhere.

Shapes: B images, H and W positions, C channels, k the kernel's height and width.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

IMPLEMENTATIONS = ("shifted", "library")
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_FUSED_TAPS = 25  # of a kernel, up to which its sum is left to the compiler
_ROW_GROUPS = 12  # rows of a gradient that one pass over it adds up in registers

_forced = contextvars.ContextVar("implementation", default="")


@contextlib.contextmanager
def using(implementation: str):
  """Traces the convolutions inside the context as "shifted" or "library", whatever the backend.

  Functions that jax.jit has traced before keep what they were traced with.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation {implementation!r} is none of {IMPLEMENTATIONS}")
  token = _forced.set(implementation)
  try:
    yield
  finally:
    _forced.reset(token)


def implementation() -> str:
  """Returns "shifted" on a CPU, "library" elsewhere, or what `using` says."""
  return _forced.get() or ("shifted" if jax.default_backend() == "cpu" else "library")


def same_padding(size, kernel, stride, dilation=1) -> tuple:
  """Returns ((top, bottom), (left, right)) of TensorFlow's SAME padding.

  Args:
    size: (height, width) of the input.
    kernel: (height, width) of the kernel.
    stride: of both axes.
    dilation: distance of the kernel's taps.

  The output has ceil(size / stride) positions; the odd pixel of padding comes last.
  """
  total = [max((-(-n // stride) - 1) * stride + (k - 1) * dilation + 1 - n, 0)
           for n, k in zip(size, kernel, strict=True)]
  return tuple((t // 2, t - t // 2) for t in total)


def round_channels(features: float) -> int:
  """Returns the nearest multiple of 8 that is not more than a tenth below, at least 8."""
  rounded = max(8, int(features + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * features else rounded


def convolve(x, kernel, stride=1, padding=((0, 0), (0, 0)), dilation=1):
  """Convolution of x (B, H, W, C) with kernel (k, k, C, features) -> (B, H', W', features).

  Without padding, a 1x1 kernel of any stride, and a kernel as large as the stride (patches), are
  one 2-D product.
  """
  size, features = kernel.shape[:2], kernel.shape[-1]
  if any(map(any, padding)) or size not in ((1, 1), (stride, stride)) or dilation != 1:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding,
                                    rhs_dilation=(dilation, dilation), dimension_numbers=_LAYOUT)
  if size == (1, 1):
    x = x[:, ::stride, ::stride]
  else:
    x = _patches(x, stride)
  y = x.reshape(-1, math.prod(kernel.shape[:3])) @ kernel.reshape(-1, features)
  return y.reshape(*x.shape[:3], features)


def _patches(x, size):
  """Returns (B, H // size, W // size, size, size, C) of x (B, H, W, C); the rest is cut off."""
  height, width = (n // size for n in x.shape[1:3])
  x = x[:, :height * size, :width * size]
  x = x.reshape(x.shape[0], height, size, width, size, x.shape[-1])
  return x.transpose(0, 1, 3, 2, 4, 5)


def convolve_depthwise(x, kernel, stride=1, padding=((0, 0), (0, 0))):
  """Convolution of each channel of x (B, H, W, C) with its own kernel of (k, k, C).

  Returns (B, H', W', C). The CPU's form has a reverse-mode gradient only; forward-mode
  differentiation needs `using("library")`.
  """
  padding = tuple(map(tuple, padding))
  if implementation() == "shifted":
    return _shifted(x, kernel, stride, padding)
  return lax.conv_general_dilated(x, kernel[:, :, None], (stride, stride), padding,
                                  dimension_numbers=_LAYOUT, feature_group_count=x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted(x, kernel, stride, padding):
  """`convolve_depthwise` as a sum of shifted products."""
  height, width = _output_size(x, kernel, stride, padding)
  padded = _pad(x, *padding)
  y = 0
  for i, j in _taps(kernel):
    y = y + _window(padded, i, j, height, width, stride) * kernel[i, j]
  return _in_memory(y, kernel)


def _shifted_forward(x, kernel, stride, padding):
  return _shifted(x, kernel, stride, padding), (x, kernel)


def _shifted_backward(stride, padding, saved, dy):
  x, kernel = saved
  dx = _in_memory(_input_gradient(dy, kernel, x.shape[1:3], stride, padding), kernel)
  return (dx, _kernel_gradient(_pad(x, *padding), dy, kernel, stride))


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _in_memory(y, kernel):
  """Returns y, a sum over a kernel's taps, such that a sum of many taps stays one loop.

  Where such a sum has several readers, as a normalisation is, the compiler cuts it into pieces that
  each go through memory, four to ten times slower. What keeps it whole is a loop behind it, of no
  rounds, which the compiler cannot know. (It removes an optimization_barrier before it fuses.)
  """
  if kernel.shape[0] * kernel.shape[1] <= _FUSED_TAPS:
    return y
  rounds = jnp.isnan(kernel[0, 0, 0]).astype(jnp.int32)
  # Not even a kernel that is not a number, and has a round, changes y.
  body = lambda c: (c[0] + 1, jnp.where(c[0] < rounds, c[1], -c[1]))  # noqa: E731
  return lax.while_loop(lambda c: c[0] < rounds, body, (jnp.int32(0), y))[1]


def _kernel_gradient(padded, dy, kernel, stride):
  """Returns the gradient (k, k, C), given the padded input and the output's gradient.

  Each tap is the sum over images and positions of a product. Adding up groups of rows in one
  elementwise pass leaves a tenth of the numbers; the product with a vector of ones, a fast matrix
  kernel, adds up those. (XLA's own reduction is ten times slower here.) Rows are grouped and
  not images, so that a batch that is split over devices stays where it is. The taps are a loop,
  because the compiler would take seconds for each convolution written out.
  """
  height, width, channels = dy.shape[1:]
  rows = max(height // _ROW_GROUPS, 1)

  def tap(position):
    i, j = position // kernel.shape[1], position % kernel.shape[1]
    sums = []
    total = 0
    for first in range(0, height, rows):
      count = min(rows, height - first)
      size = (dy.shape[0], (count - 1) * stride + 1, (width - 1) * stride + 1, channels)
      window = lax.dynamic_slice(padded, (0, i + first * stride, j, 0), size)
      part = window[:, ::stride, ::stride] * dy[:, first:first + count]
      if count == rows:
        total = total + part
      else:
        sums.append(channel_sums(part))
    return sum(sums, channel_sums(total))

  taps = lax.map(tap, jnp.arange(kernel.shape[0] * kernel.shape[1]))
  return taps.reshape(kernel.shape).astype(kernel.dtype)


def _input_gradient(dy, kernel, size, stride, padding):
  """Returns the gradient (B, H, W, C) of the input, given the output's gradient (B, H', W', C).

  Input positions of one remainder modulo the stride read the same taps: each such phase is a sum of
  shifted products of dy, and the phases are interleaved.
  """
  rows, columns = (-(-n // stride) for n in size)
  phases = [[_phase(kernel, stride, padding, (a, b)) for b in range(stride)] for a in range(stride)]
  every = [tap for row in phases for phase in row for tap in phase]
  reach = [(min((0, *(tap[axis] for tap in every))), max((0, *(tap[axis] for tap in every))))
           for axis in (0, 1)]
  lowest = [-low for low, _ in reach]
  after = [max(high + n - m, 0)
           for (_, high), n, m in zip(reach, (rows, columns), dy.shape[1:3], strict=True)]
  padded = _pad(dy, (lowest[0], after[0]), (lowest[1], after[1]))
  parts = []
  for row in phases:
    for phase in row:
      part = jnp.zeros((dy.shape[0], rows, columns, dy.shape[3]), dy.dtype) if not phase else 0
      for dh, dw, i, j in phase:
        window = _window(padded, lowest[0] + dh, lowest[1] + dw, rows, columns, 1)
        part = part + window * kernel[i, j]
      parts.append(part)
  if stride == 1:
    return parts[0]
  grid = jnp.stack([jnp.stack(parts[a * stride:(a + 1) * stride], 3) for a in range(stride)], 2)
  full = grid.reshape(dy.shape[0], rows * stride, columns * stride, dy.shape[3])
  return full[:, :size[0], :size[1]]


def _phase(kernel, stride, padding, remainder):
  """Returns [(row offset, column offset, i, j)] of the taps that reach inputs of this remainder.

  Input row stride * m + a is read by output row (stride * m + a + top - i) / stride through tap i.
  """
  (top, _), (left, _) = padding
  height, width = kernel.shape[:2]
  return [((remainder[0] + top - i) // stride, (remainder[1] + left - j) // stride, i, j)
          for i in range((remainder[0] + top) % stride, height, stride)
          for j in range((remainder[1] + left) % stride, width, stride)]


def _taps(kernel):
  return [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]


def _window(padded, top, left, height, width, stride):
  """Returns height x width positions of `padded`, `stride` apart, from (top, left) on."""
  batch, channels = padded.shape[0], padded.shape[3]
  stop = (batch, top + (height - 1) * stride + 1, left + (width - 1) * stride + 1, channels)
  return lax.slice(padded, (0, top, left, 0), stop, (1, stride, stride, 1))


def _output_size(x, kernel, stride, padding):
  sizes = [(n + sum(pad) - k) // stride + 1
           for n, k, pad in zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)]
  if min(sizes) < 1:
    raise ValueError(f"an input of {x.shape[1]} x {x.shape[2]} is too small for the convolution")
  return sizes


def _pad(x, rows, columns):
  """Returns x padded by zeros, in memory: fused into its readers it would cost them k*k times."""
  if not any(rows + columns):
    return x
  return lax.optimization_barrier(jnp.pad(x, ((0, 0), rows, columns, (0, 0))))


def max_pool(x, size, stride, padding=((0, 0), (0, 0))):
  """Returns the maxima (B, H', W', C) of x's windows of size x size, `stride` apart.

  The padding is never a maximum. The gradient goes to the first maximum of a window, as in torch.
  """
  pool = _pooled if implementation() == "shifted" else _library_pool
  return pool(x, size, stride, tuple(map(tuple, padding)))


def _library_pool(x, size, stride, padding):
  return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1),
                           ((0, 0), *padding, (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _pooled(x, size, stride, padding):
  """`max_pool` whose gradient is a sum of shifted selections: five times faster on a CPU."""
  return _library_pool(x, size, stride, padding)


def _pooled_forward(x, size, stride, padding):
  y = _pooled(x, size, stride, padding)
  return y, (x, y)


def _pooled_backward(size, stride, padding, saved, dy):
  x, y = saved
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
  ends = [n - (m - 1) * stride - 1 for n, m in zip(padded.shape[1:3], y.shape[1:3], strict=True)]
  dx, free, zero = 0, True, jnp.zeros((), dy.dtype)
  for i in range(size):
    for j in range(size):
      hit = free & (_window(padded, i, j, *y.shape[1:3], stride) == y)
      free = free & ~hit
      places = ((0, 0, 0), (i, ends[0] - i, stride - 1), (j, ends[1] - j, stride - 1), (0, 0, 0))
      dx = dx + lax.pad(jnp.where(hit, dy, zero), zero, places)
  top, left = padding[0][0], padding[1][0]
  return (dx[:, top:top + x.shape[1], left:left + x.shape[2]],)


_pooled.defvjp(_pooled_forward, _pooled_backward)


def channel_sums(x):
  """Returns the sums (C,) of x (..., C) over all other axes, in float32."""
  rows = x.reshape(-1, x.shape[-1])
  if implementation() == "library":
    return rows.sum(0, dtype=jnp.float32)
  ones = jnp.ones((1, rows.shape[0]), rows.dtype)
  return jnp.matmul(ones, rows, preferred_element_type=jnp.float32)[0]


@jax.custom_vjp
def add_channels(x, bias):
  """Returns x (..., C) + bias (C,), with a gradient of the bias that is fast on a CPU."""
  return x + bias.astype(x.dtype)


def _add_channels_forward(x, bias):
  return add_channels(x, bias), jnp.zeros((), bias.dtype)


def _add_channels_backward(like, dy):
  return dy, channel_sums(dy).astype(like.dtype)


add_channels.defvjp(_add_channels_forward, _add_channels_backward)


@jax.custom_vjp
def relu6(x):
  """min(max(x, 0), 6); the gradient at 0 and 6 is 0, as torch's.

  Its gradient reads the output, which the next layer keeps anyway, so the input need not be kept.
  """
  return jnp.clip(x, 0, 6)


def _relu6_forward(x):
  y = relu6(x)
  return y, y


def _relu6_backward(y, dy):
  return (jnp.where((y > 0) & (y < 6), dy, 0),)


relu6.defvjp(_relu6_forward, _relu6_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normalise(x, scale, bias, mean, variance, epsilon):
  """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias; the statistics are x's own."""
  factor = scale * lax.rsqrt(variance + epsilon)
  return (x * factor + (bias - mean * factor)).astype(x.dtype)


def _normalise_forward(x, scale, bias, mean, variance, epsilon):
  y = _normalise(x, scale, bias, mean, variance, epsilon)
  return y, (x, scale, bias, mean, variance)


def _normalise_backward(epsilon, saved, dy):
  x, scale, bias, mean, variance = saved
  inverse = lax.rsqrt(variance + epsilon)
  normal = (x - mean) * inverse
  d_bias = channel_sums(dy)
  d_scale = channel_sums(dy * normal)
  count = x.size // x.shape[-1]
  dx = scale * inverse * (dy - d_bias / count - normal * (d_scale / count))
  zeros = jnp.zeros_like(mean)  # x's share of them is in dx
  return dx.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype), zeros, zeros


_normalise.defvjp(_normalise_forward, _normalise_backward)


def probe_images(size, channels: int = 3) -> np.ndarray:
  """Returns two fixed random images (2, height, width, channels); `size`: a side, or both."""
  height, width = size if isinstance(size, tuple) else (size, size)
  return np.random.default_rng(0).normal(size=(2, height, width, channels)).astype(np.float32)


def _depthwise_init(rng, shape, dtype=jnp.float32):
  """Normal with variance 2 / k*k: the fan-out of one channel."""
  return jax.random.normal(rng, shape, dtype) * math.sqrt(2 / (shape[0] * shape[1]))


class Conv(nn.Module):
  """Convolution: (B, H, W, C) -> (B, H', W', features).

  Parameters: kernel (k, k, C, features), with use_bias also bias (features,). Tuning may intercept
  `prepare`, `weights` and `adapt`, as in `layers.Linear`.

  Attributes:
    features: output channels.
    size: k.
    stride: of both axes.
    padding: ((top, bottom), (left, right)), or "SAME": TensorFlow's rule at the input's own size.
    dtype: of the computation.
    kernel_init: initialiser of the kernel.
    use_bias: whether the layer has a bias.
    dilation: distance of the kernel's taps; not of a depthwise one.
  """

  features: int
  size: int = 1
  stride: int = 1
  padding: Any = "SAME"
  dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
  use_bias: bool = False
  dilation: int = 1

  def prepare(self, x):
    """Returns the input (B, H, W, C) that is convolved; a hook."""
    return x

  @nn.compact
  def weights(self, in_features: int):
    """Returns (kernel of `kernel_shape`, bias (features,) or None)."""
    kernel = self.param("kernel", self.kernel_init, self.kernel_shape(in_features))
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return kernel, bias

  def kernel_shape(self, in_features: int) -> tuple:
    """Returns (k, k, in_features, features)."""
    return (self.size, self.size, in_features, self.features)

  def product(self, x, kernel):
    """Returns the convolution of x with a kernel of the layer's shape, without bias and `adapt`."""
    return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self._pads(x),
                    self.dilation)

  def _pads(self, x):
    if self.padding != "SAME":
      return self.padding
    return same_padding(x.shape[1:3], (self.size, self.size), self.stride, self.dilation)

  def adapt(self, x, y):
    """Returns the layer's output, given its input x and plain output y; a hook."""
    del x
    return y

  def __call__(self, x):
    kernel, bias = self.weights(x.shape[-1])
    y = self.product(self.prepare(x), kernel)
    return self.adapt(x, y if bias is None else add_channels(y, bias))


class DepthwiseConv(Conv):
  """Convolution of each channel by itself: (B, H, W, C) -> (B, H', W', C).

  Parameters: kernel (k, k, C), with use_bias also bias (C,). `features` is C.
  """

  kernel_init: Callable = _depthwise_init

  def kernel_shape(self, in_features: int) -> tuple:
    """Returns (k, k, in_features)."""
    return (self.size, self.size, in_features)

  def product(self, x, kernel):
    """Returns the convolution of x with a kernel of the layer's shape, without bias and `adapt`."""
    return convolve_depthwise(x.astype(self.dtype), kernel.astype(self.dtype), self.stride,
                              self._pads(x))


class BatchNorm(nn.Module):
  """Batch normalisation over all but the last axis (Ioffe & Szegedy 2015, arXiv:1502.03167).

  Where "batch_stats" is mutable in this apply, the batch's own statistics normalise it and the
  running ones move towards them by 1 - momentum (the variance unbiased, as torch does); elsewhere
  the running statistics do. A batch that is split over devices is one batch.

  Parameters: scale (C,), bias (C,). batch_stats: mean (C,), var (C,). Statistics in float32.
  """

  momentum: float = 0.99
  epsilon: float = 1e-3

  @nn.compact
  def variables_of(self, features: int):
    """Returns (scale, bias, mean, var): two parameters, two variables."""
    return (self.param("scale", nn.initializers.ones, (features,)),
            self.param("bias", nn.initializers.zeros, (features,)),
            self.variable("batch_stats", "mean", jnp.zeros, (features,)),
            self.variable("batch_stats", "var", jnp.ones, (features,)))

  def uses_batch(self) -> bool:
    """Returns whether the batch's own statistics are used in this apply."""
    return self.is_mutable_collection("batch_stats")

  def affine(self, features: int):
    """Returns (factor, shift), both (features,): the layer under its running statistics."""
    scale, bias, mean, variance = self.variables_of(features)
    factor = scale * lax.rsqrt(variance.value + self.epsilon)
    return factor, bias - mean.value * factor

  def __call__(self, x):
    if not self.uses_batch():
      factor, shift = self.affine(x.shape[-1])
      return add_channels(x * factor.astype(x.dtype), shift)
    scale, bias, mean, variance = self.variables_of(x.shape[-1])
    count = x.size // x.shape[-1]
    values = lax.stop_gradient(x).astype(jnp.float32)
    batch_mean = channel_sums(values) / count
    batch_variance = channel_sums(jnp.square(values - batch_mean)) / count
    if not self.is_initializing():
      unbiased = batch_variance * (count / max(count - 1, 1))
      mean.value += (1 - self.momentum) * (batch_mean - mean.value)
      variance.value += (1 - self.momentum) * (unbiased - variance.value)
    return _normalise(x, scale, bias, batch_mean, batch_variance, self.epsilon)


class ConvNorm(nn.Module):
  """A convolution without bias and its batch normalisation: (B, H, W, C) -> (B, H', W', features).

  Under running statistics the normalisation is affine and is folded into the kernel: two passes
  over the activations fewer, forwards and backwards, and the gradient of its scale becomes a sum
  over the kernel. Parameters: those of `conv` and of `norm`.
  """

  conv: Conv
  norm: BatchNorm

  def __call__(self, x):
    if self.norm.uses_batch():
      return self.norm(self.conv(x))
    kernel, _ = self.conv.weights(x.shape[-1])
    prepared = self.conv.prepare(x)
    # Dead code that the compiler drops, unless a tuning method intercepts the hook: its answer is
    # then about the unfolded output.
    plain = self.conv.product(prepared, kernel)
    adapted = self.conv.adapt(x, plain)
    if adapted is not plain:
      return self.norm(adapted)
    factor, shift = self.norm.affine(self.conv.features)
    return add_channels(self.conv.product(prepared, kernel * factor), shift)
