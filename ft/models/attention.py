"""Attention, for every family behind one function.

`attention` picks how to compute by platform, dtype, mask and length, or does as it is told:

    xla     any mask, bias, cap and dropout, on any platform; scores of (B, H, T, S) in memory
    cudnn   NVIDIA GPUs, bfloat16 or float16 (jax.nn.dot_product_attention)
    splash  TPUs (jax's Pallas kernel): causal, windows, packed segments

Under `prefix`, further keys and values stand before a model's own.

Shapes: B batch, T queries, S keys, H heads, K key heads (H is a multiple of K), D features.
"""

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ft import errors

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
NO_WINDOW = 2**30
# Below this many queries the plain form is as fast as cuDNN's kernels, and takes any mask.
_SHORT = 512
_BLOCK = 128  # queries and keys that splash takes at a time
_PREFIX = contextvars.ContextVar("prefix", default=None)


@struct.dataclass
class Mask:
  """What a query may look at. Positions are slots: places in the keys, padding included.

  Attributes:
    padding: (B, S), nonzero for real keys; None: all are.
    segments: (B, T) and (B, S) alike, the number of each position's document in a packed row; None:
      one document.
    offset: slot of the first query, where keys come from a cache; None: without a cache, 0.
    causal: a query sees its own slot and those before it.
  """

  padding: Any = None
  segments: Any = None
  offset: Any = None
  causal: bool = struct.field(pytree_node=False, default=False)


@contextlib.contextmanager
def prefix(k, v):
  """Within it, `attention` puts keys and values before those it is given.

  Every query sees them, whatever mask, window and segments say of the others, and whether those
  come from a cache or not; a bias is 0 for them.

  Args:
    k, v: (P, K * D), the same for all rows of the batch.
  """
  token = _PREFIX.set((k, v))
  try:
    yield
  finally:
    _PREFIX.reset(token)


def attention(q, k, v, mask: Mask | None = None, *, window=NO_WINDOW, bias=None,
              scale: float | None = None, softcap: float = 0.0, drop: Callable | None = None,
              implementation: str = "auto"):
  """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762).

  Args:
    q: (B, T, H, D).
    k, v: (B, S, K, D); query heads h * H / K … share key head h (arXiv:2305.13245).
    mask: what each query may look at; None: everything.
    window: with a causal mask, how many slots a query sees, its own included; else how far it sees
      to each side. An int, or a traced scalar where layers differ.
    bias: added to the scaled scores, broadcastable to (B, H, T, S).
    scale: of the scores; 1 / sqrt(D) if None.
    softcap: c of c * tanh(score / c), before masks (Gemma 2); 0: none.
    drop: applied to the probabilities (B, H, T, S): a Dropout module.
    implementation: "auto" | "xla" | "cudnn" | "splash".

  Returns:
    (B, T, H, D) in v's dtype. The softmax is computed in float32. A query that may look at nothing
    gets finite values without meaning.

  Raises:
    UserError: the implementation that was asked for cannot compute this.
  """
  mask = Mask() if mask is None else mask
  scale = q.shape[-1]**-0.5 if scale is None else scale
  args = (q, k, v, mask, window, scale)
  extras = {"a bias": bias is not None, "a soft cap": bool(softcap), "dropout": _acts(drop),
            "a prefix": _PREFIX.get() is not None}
  if implementation == "auto":
    implementation = choose(q, k, mask, window, extras)
  elif implementation in _REFUSES:
    if reason := _REFUSES[implementation](q, k, mask, window, extras):
      raise errors.UserError(f"model.attention={implementation} cannot serve this model or batch: "
                             f"{reason}; use auto or xla")
  if implementation == "cudnn":
    return _cudnn(*args)
  if implementation == "splash":
    return _splash(*args)
  seen = visible(mask, q.shape[1], k.shape[1], window)
  k, v, seen, bias = _prefixed(k, v, seen, bias)
  return _xla(q, k, v, seen, scale, bias, softcap, drop)


def choose(q, k, mask: Mask, window, extras: dict) -> str:
  """Returns the implementation that "auto" means here: a kernel where it serves and pays."""
  kernel = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")
  if kernel == "xla" or q.shape[1] < _SHORT or _REFUSES[kernel](q, k, mask, window, extras):
    return "xla"
  return kernel


def visible(mask: Mask, queries: int, keys: int, window=NO_WINDOW):
  """Returns which keys each query sees, boolean, broadcastable to (B, 1, T, S); None: all."""
  parts = []
  distance = None
  if mask.causal or not _no_window(window, keys):
    first = 0 if mask.offset is None else mask.offset
    distance = (first + jnp.arange(queries))[:, None] - jnp.arange(keys)[None, :]
  if mask.causal:
    parts.append(distance >= 0)
    if not _no_window(window, keys):
      parts.append(distance < window)
  elif distance is not None:
    parts.append(jnp.abs(distance) <= window)
  parts = [part[None, None] for part in parts]
  if mask.padding is not None:
    parts.append((mask.padding != 0)[:, None, None, :])
  if mask.segments is not None:
    parts.append((mask.segments[:, :, None] == mask.segments[:, None, :])[:, None])
  seen = None
  for part in parts:
    seen = part if seen is None else seen & part
  return seen


def _no_window(window, keys) -> bool:
  # The number of keys is symbolic while a program is exported: then it is not compared.
  return isinstance(window, (int, np.integer)) and (window >= NO_WINDOW or window >= keys)


def _acts(drop) -> bool:
  return drop is not None and bool(getattr(drop, "rate", 1.0)) and drop.has_rng("dropout")


def _prefixed(k, v, seen, bias):
  """Returns keys, values, mask and bias with the prefix, where there is one, before them."""
  if _PREFIX.get() is None:
    return k, v, seen, bias
  keys = k.shape[1]

  def before(part, own):
    part = part.astype(own.dtype).reshape(-1, *own.shape[2:])
    return jnp.concatenate([jnp.broadcast_to(part, (own.shape[0], *part.shape)), own], axis=1)

  def widened(array, value):
    if array is None:
      return None
    array = jnp.broadcast_to(array, (*array.shape[:-1], keys))
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(k.shape[1] - keys, 0)],
                   constant_values=value)

  k, v = (before(part, own) for part, own in zip(_PREFIX.get(), (k, v), strict=True))
  return k, v, widened(seen, True), widened(bias, 0)


def _xla(q, k, v, seen, scale, bias, softcap, drop):
  batch, queries, heads, size = q.shape
  keys, groups = k.shape[1:3]
  q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, queries, groups, heads // groups, size)
  scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
  scores = scores.reshape(batch, heads, queries, keys)
  if softcap:
    scores = jnp.tanh(scores / softcap) * softcap
  if bias is not None:
    scores = scores + bias
  if seen is not None:
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
  probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  if drop is not None:
    probabilities = drop(probabilities)
  probabilities = probabilities.reshape(batch, groups, heads // groups, queries, keys)
  return jnp.einsum("bkgts,bskd->btkgd", probabilities, v).reshape(batch, queries, heads, -1)


def _cudnn(q, k, v, mask, window, scale):
  plain = mask.padding is None and mask.segments is None and mask.offset is None
  if plain and isinstance(window, (int, np.integer)):
    size = None if _no_window(window, k.shape[1]) else (window - 1, 0) if mask.causal else window
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=mask.causal, local_window_size=size,
        implementation="cudnn")
  seen = visible(mask, q.shape[1], k.shape[1], window)
  # A mask that broadcasts over queries is read wrongly (jax issue 28974).
  seen = jnp.broadcast_to(seen, (q.shape[0], 1, q.shape[1], k.shape[1]))
  return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=scale, implementation="cudnn")


def _refuses_cudnn(q, k, mask, window, extras) -> str:
  for what, there in extras.items():
    if there:
      return f"{what} needs xla"
  if jax.default_backend() != "gpu":
    return f"it needs an NVIDIA GPU, this is a {jax.default_backend()}"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it needs bfloat16 or float16, not {q.dtype}"
  if q.shape[-1] % 8 or q.shape[-1] > 128 or q.shape[1] % 2 or k.shape[1] % 2:
    return f"heads of {q.shape[-1]}, {q.shape[1]} queries or {k.shape[1]} keys do not fit it"
  return ""


def _splash(q, k, v, mask, window, scale, interpret: bool = False):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  shape = (q.shape[1], k.shape[1])
  if not _no_window(window, shape[1]):
    sides = (window - 1, 0) if mask.causal else (window, window)
    one = masks.LocalMask(shape, sides, 0)
  else:
    one = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
  call = kernel.make_splash_mha(masks.MultiHeadMask([one] * q.shape[2]), head_shards=1,
                                q_seq_shards=1, interpret=interpret)
  numbers = mask.segments
  if mask.padding is not None:  # padding is a document of its own
    numbers = jnp.ones_like(mask.padding) if numbers is None else numbers
    numbers = jnp.where(mask.padding != 0, numbers, -1)
  q, k, v = (a.swapaxes(1, 2) for a in (q * jnp.asarray(scale, q.dtype), k, v))
  if numbers is None:
    return jax.vmap(call)(q, k, v).swapaxes(1, 2)
  ids = kernel.SegmentIds(numbers.astype(jnp.int32), numbers.astype(jnp.int32))
  return jax.vmap(call)(q, k, v, ids).swapaxes(1, 2)


def _refuses_splash(q, k, mask, window, extras) -> str:
  for what, there in extras.items():
    if there:
      return f"{what} needs xla"
  if jax.default_backend() != "tpu":
    return f"it needs a TPU, this is a {jax.default_backend()}"
  if mask.offset is not None or not isinstance(window, (int, np.integer)):
    return "a cache, or windows that differ in a scan, need xla"
  if q.shape[1] % _BLOCK or k.shape[1] % _BLOCK:
    return f"{q.shape[1]} queries and {k.shape[1]} keys should be multiples of {_BLOCK}"
  if q.shape[1] != k.shape[1] and (mask.padding is not None or mask.segments is not None):
    return "padding and segments need as many queries as keys"
  return ""


_REFUSES = {"cudnn": _refuses_cudnn, "splash": _refuses_splash}
