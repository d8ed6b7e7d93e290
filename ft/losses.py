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
                  block: int = BLOCK) -> dict:
  """Next-token cross-entropy, summed over each row's tokens.

  Args:
    head: (hidden (B, t, D), number of the block) -> logits (B, t, V).
    hidden: (B, T, D), the states that the logits are made of.
    targets: (B, T) int, the token each state should predict.
    weights: (B, T), 0 masks a token; its target may be anything within the vocabulary.
    smoothing: share of the target that is spread over the vocabulary (Szegedy et al. 2016).
    block: most logits held at once.

  Returns:
    {"loss", "nll"}: (B,) float32 nats, weighted sums; they differ by the smoothing.
  """
  def function(arrays, number):
    hidden, targets, weights = arrays
    logits = head(hidden, number).astype(jnp.float32)
    norm = jax.nn.logsumexp(logits, -1)
    nll = norm - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    loss = nll if not smoothing else (
      (1 - smoothing) * nll + smoothing * (norm - logits.mean(-1)))
    return {"loss": jnp.sum(loss * weights, -1), "nll": jnp.sum(nll * weights, -1)}

  arrays = hidden, targets, weights.astype(jnp.float32)
  return _counted(function, arrays, _size(head, hidden, block))


def divergence(head: Callable, base_head: Callable, hidden, base_hidden, weights,
               temperature: float = 1.0, block: int = BLOCK):
  """Kullback-Leibler divergence of a model from another, summed over each row's tokens.

  T² KL(softmax(base / T) || softmax(logits / T)), whose gradient does not shrink with the
  temperature T (Hinton et al. 2015, arXiv:1503.02531). Both sides pass gradients on, which a base
  that does not train ignores.

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
    base = base_head(base_hidden, number).astype(jnp.float32)
    logits = head(hidden, number).astype(jnp.float32)
    known = jax.nn.log_softmax(base / temperature)
    apart = known - jax.nn.log_softmax(logits / temperature)
    return jnp.sum(jnp.sum(jnp.exp(known) * apart, -1) * weights, -1) * temperature**2

  arrays = hidden, base_hidden, weights.astype(jnp.float32)
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
