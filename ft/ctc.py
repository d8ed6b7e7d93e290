"""Texts read off the frames of a CTC model: each frame's likeliest letter, or a beam search.

Shapes: B batch, T frames, V letters and the blank, W beams, K most letters of a text.
Source: Graves et al., Connectionist Temporal Classification (2006); the search over prefixes is
that of Hannun et al. (2014), arXiv:1408.2873, without a language model.
"""

import jax
import jax.numpy as jnp

NONE = -1e30  # log of a probability of nothing, which stays finite in sums


def greedy(logits, real, blank: int, size: int) -> tuple:
  """Returns (ids (B, K) int32, lengths (B,)): the likeliest of each frame.

  Frames that repeat the one before, and those of the blank, are left out.

  Args:
    logits: (B, T, V). real: (B, T), 1 where a frame is of the sound, and no padding.
    blank: id of no letter. size: K, at least T.
  """
  best = jnp.argmax(logits, -1).astype(jnp.int32)
  before = jnp.pad(best[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  kept = (best != before) & (best != blank) & (real > 0)
  order = jnp.argsort(~kept, axis=1, stable=True)
  ids = jnp.take_along_axis(best, order, 1)
  return jnp.pad(ids, ((0, 0), (0, max(0, size - best.shape[1])))), kept.sum(1)


def beams(logits, real, blank: int, size: int, width: int) -> tuple:
  """Returns (ids (B, K) int32, lengths (B,)): the likeliest text that a beam search meets.

  A text's probability is the sum over all ways in which the frames can spell it, of which `greedy`
  sees one. With as many beams as there are texts the search is exact.

  Args:
    width: W; for the rest see `greedy`.
  """
  logs = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
  ids, lengths = jax.vmap(lambda one, there: _search(one, there, blank, size, width))(logs, real)
  return ids, lengths


def _search(logs, real, blank, size, width):
  """`beams` of one sound: logs (T, V) of probabilities, real (T,)."""
  letters = logs.shape[1]
  start = {
    "ids": jnp.zeros((width, size), jnp.int32), "length": jnp.zeros(width, jnp.int32),
    "blank": jnp.full(width, NONE).at[0].set(0.0),  # of the ways that end with a blank,
    "letter": jnp.full(width, NONE),  # and with the last letter
  }
  places = jnp.arange(size)

  def frame(beam, at):
    log, there = at
    total = jnp.logaddexp(beam["blank"], beam["letter"])
    last = beam["ids"][jnp.arange(width), jnp.maximum(beam["length"] - 1, 0)]
    last = jnp.where(beam["length"] > 0, last, -1)
    longer = log[None] + jnp.where(jnp.arange(letters)[None] == last[:, None],
                                   beam["blank"][:, None], total[:, None])  # (W, V)
    longer = jnp.where((jnp.arange(letters) == blank)[None] | (beam["length"] >= size)[:, None],
                       NONE, longer)
    # A beam that another becomes by its own last letter takes that one's ways; none stands twice.
    cut = jnp.where(places[None] < beam["length"][:, None] - 1, beam["ids"], 0)
    whole = jnp.where(places[None] < beam["length"][:, None], beam["ids"], 0)
    parent = ((beam["length"][:, None] == beam["length"][None] + 1)
              & (cut[:, None] == whole[None]).all(-1) & (total > NONE / 2)[None])  # (child, parent)
    taken = jnp.where(parent, longer[:, jnp.maximum(last, 0)].T, NONE)
    stay = jnp.where(last >= 0, beam["letter"] + log[jnp.maximum(last, 0)], NONE)
    stay = jnp.logaddexp(stay, taken.max(1))
    gone = (parent[:, :, None] & (jnp.arange(letters)[None, None] == last[:, None, None])).any(0)
    longer = jnp.where(gone, NONE, longer)
    ends = total + log[blank]
    scores = jnp.concatenate([jnp.logaddexp(ends, stay), longer.reshape(-1)])
    _, best = jax.lax.top_k(scores, width)
    grown = best >= width
    origin = jnp.where(grown, (best - width) // letters, best)
    letter = (best - width) % letters
    length = beam["length"][origin]
    ids = jnp.where(grown[:, None] & (places[None] == length[:, None]), letter[:, None],
                    beam["ids"][origin])
    after = {"ids": ids, "length": length + grown,
             "blank": jnp.where(grown, NONE, ends[origin]),
             "letter": jnp.where(grown, longer.reshape(-1)[jnp.maximum(best - width, 0)],
                                 stay[origin])}
    return jax.tree.map(lambda new, old: jnp.where(there > 0, new, old), after, beam), None

  beam, _ = jax.lax.scan(frame, start, (logs, real))
  best = jnp.argmax(jnp.logaddexp(beam["blank"], beam["letter"]))
  return beam["ids"][best], beam["length"][best]
