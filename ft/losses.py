"""Losses over large vocabularies, in memory that does not grow with the number of tokens.

The logits of B x T tokens over a vocabulary V are most of a small language model's memory: 4 rows
of 2,048 tokens and 49,152 words are 1.6 GB in float32, and as much again for their gradient. Here
they are made block by block of time, and made again in the backward pass, so that one block's
logits are held at any moment. Blocks are cut along T: the rows stay on the devices that hold them.
Before that, the tokens that count are moved to the front of each row, and blocks in which none
counts are left out: of a conversation only the assistant's tokens meet the head.

Shapes: B batch, T tokens, D hidden size, V vocabulary. A `head` is a function (B, t, D) -> logits
(B, t, V); losses are float32, whatever it computes in.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 1 << 24  # most logits held at once: 64 MiB of float32
_FINE = 128  # tokens of all rows that a block has at least, where blocks are cut to be left out
_PARTS = 8  # blocks that are cut so


def blocks(function: Callable, arrays, size: int):
  """Returns the sum over blocks of time of function(block), of which one is held at a time.

  Args:
    function: (block of arrays, number of the block) -> pytree of sums. It may close over arrays,
      which get their gradients. It must give zero where `arrays` are zero: the last block is
      filled up with zeros.
    arrays: pytree of arrays (B, T, …).
    size: most time steps in a block.
  """
  length = jax.tree.leaves(arrays)[0].shape[1]
  count = -(-length // size)
  if count == 1:
    return function(arrays, 0)
  size = -(-length // count)  # of like length, so that little is filled up

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

  def body(sums, block):
    return jax.tree.map(jnp.add, sums, function(*block)), None

  xs = jax.tree.map(cut, arrays), jnp.arange(count)
  shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], xs))
  start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(jax.checkpoint(body), start, xs)[0]


def cross_entropy(head: Callable, hidden, targets, weights, smoothing: float = 0.0,
                  block: int = BLOCK, hits: bool = False) -> dict:
  """Cross-entropy of tokens, summed over each row's.

  Args:
    head: (hidden (B, t, D), number of the block) -> logits (B, t, V).
    hidden: (B, T, D), the states that the logits are made of.
    targets: (B, T) int, the token each state should predict.
    weights: (B, T), 0 masks a token; its target may be anything within the vocabulary.
    smoothing: share of the target that is spread over the vocabulary (Szegedy et al. 2016).
    block: most logits held at once.
    hits: also count the tokens that have the largest logit.

  Returns:
    {"loss", "nll"}: (B,) float32 nats, weighted sums; they differ by the smoothing. With hits also
    {"hits"}: (B,), the weighted count.
  """
  def function(arrays, number):
    hidden, targets, weights = arrays
    logits = head(hidden, number).astype(jnp.float32)
    found = _of_tokens(logits, targets, smoothing)
    if hits:
      found["hits"] = logits.argmax(-1) == targets
    return {key: jnp.sum(value * weights, -1) for key, value in found.items()}

  arrays = hidden, targets, weights.astype(jnp.float32)
  return _counted(function, arrays, _size(head, hidden, block))


def _of_tokens(logits, targets, smoothing: float) -> dict:
  """Returns {"loss", "nll"}: (B, t) of logits (B, t, V)."""
  norm = jax.nn.logsumexp(logits, -1)
  nll = norm - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  smoothed = (1 - smoothing) * nll + smoothing * (norm - logits.mean(-1)) if smoothing else nll
  return {"loss": smoothed, "nll": nll}


def apart(base, logits, temperature: float = 1.0, beta: float = 0.0):
  """Divergence of distributions from a base's, whose gradient does not shrink with T.

  With p = softmax(base / T) and q = softmax(logits / T) it is T² times: beta 0, KL(p || q); beta 1,
  the reverse, KL(q || p); between, the generalised Jensen-Shannon divergence
  beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al. 2024,
  arXiv:2306.13649, equation 1; Hinton et al. 2015, arXiv:1503.02531, for T²).

  Args:
    base, logits: (…, V).
    temperature: T; above 1, unlikely answers count for more.
    beta: 0 covers all that the base might say, 1 seeks what it most likely says.

  Returns:
    (…) float32 nats.
  """
  p = jax.nn.log_softmax(base.astype(jnp.float32) / temperature)
  q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  if beta in (0, 1):
    first, second = (p, q) if beta == 0 else (q, p)
    found = _kl(first, second)
  else:
    middle = jnp.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    found = beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)
  return temperature**2 * found


def _kl(p, q):
  """Returns KL(exp p || exp q) over the last axis of log-probabilities."""
  return jnp.sum(jnp.exp(p) * (p - q), -1)


def divergence(head: Callable, base_head: Callable, hidden, base_hidden, weights,
               temperature: float = 1.0, block: int = BLOCK):
  """Divergence of a model from another, KL(base || model), summed over each row's tokens.

  See `apart`. Both sides pass gradients on, which a base that does not train ignores.

  Args:
    head: (hidden (B, t, D), number of the block) -> logits (B, t, V) of what trains.
    base_head: the same of the base.
    hidden: (B, T, D) of what trains.
    base_hidden: (B, T, D) of the base.
    weights: (B, T), 0 masks a token.
    temperature: above 1, unlikely tokens count for more.
    block: most logits held at once, of each of the two.

  Returns:
    (B,) float32 nats, weighted sums.
  """
  def function(arrays, number):
    hidden, base_hidden, weights = arrays
    found = apart(base_head(base_hidden, number), head(hidden, number), temperature)
    return jnp.sum(found * weights, -1)

  arrays = hidden, base_hidden, weights.astype(jnp.float32)
  return _counted(function, arrays, _size(head, hidden, block))


def distillation(head: Callable, base_head: Callable, hidden, base_hidden, targets, weights,
                 temperature: float = 1.0, beta: float = 0.0, smoothing: float = 0.0,
                 block: int = BLOCK) -> dict:
  """Cross-entropy and divergence from a base of the same pass, summed over each row's tokens.

  The logits are made once for both; the base's pass no gradient on.

  Args:
    head, base_head: (hidden (B, t, D), number of the block) -> logits (B, t, V).
    hidden, base_hidden: (B, T, D) of each.
    targets, weights, smoothing: as in `cross_entropy`.
    temperature, beta: as in `apart`.
    block: most logits held at once, of each of the two.

  Returns:
    {"loss", "nll", "base_nll", "apart"}: (B,) float32 nats, weighted sums; base_nll is the base's.
  """
  def function(arrays, number):
    hidden, base_hidden, targets, weights = arrays
    logits = head(hidden, number).astype(jnp.float32)
    base = jax.lax.stop_gradient(base_head(base_hidden, number)).astype(jnp.float32)
    found = {**_of_tokens(logits, targets, smoothing),
             "base_nll": _of_tokens(base, targets, 0.0)["nll"],
             "apart": apart(base, logits, temperature, beta)}
    return {key: jnp.sum(value * weights, -1) for key, value in found.items()}

  arrays = hidden, base_hidden, targets, weights.astype(jnp.float32)
  return _counted(function, arrays, _size(head, hidden, block))


def _counted(function: Callable, arrays, size: int):
  """Returns `blocks` over the tokens that count, where there are several blocks.

  Args:
    function: as `blocks` takes it; it gives zeros where no token counts.
    arrays: tuple of (B, T, …), the weights last.
    size: most time steps in a block.
  """
  if arrays[-1].shape[1] <= size:
    return function(arrays, 0)
  order = jnp.argsort(arrays[-1] == 0, axis=1, stable=True)
  arrays = jax.tree.map(lambda x: jax.vmap(lambda row, at: row[at])(x, order), arrays)

  def unless_empty(arrays, number):
    shapes = jax.eval_shape(function, arrays, number)
    nothing = lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
    return jax.lax.cond(jnp.any(arrays[-1] != 0), function, nothing, arrays, number)

  return blocks(unless_empty, arrays, size)


def _size(head: Callable, hidden, block: int) -> int:
  """How many time steps' logits a block may hold."""
  rows, vocabulary = hidden.shape[0], jax.eval_shape(head, hidden[:, :1], 0).shape[-1]
  most = max(1, block // (rows * vocabulary))
  if hidden.shape[1] * rows * vocabulary <= block // 4:  # little to gain
    return most
  fine = max(-(-hidden.shape[1] // _PARTS), -(-_FINE // rows))
  return min(most, fine)
