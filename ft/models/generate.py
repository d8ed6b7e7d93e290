"""Text from a language model: prefill, then one jitted loop over a cache of static shape.

Greedy, sampled and beam search, for decoder-only models (the prompt is left-padded and continued)
and encoder-decoders (the input is encoded once, the decoder starts with decoder_start_token_id).
Follows transformers' `generation/utils.py` (Apache-2.0); greedy and beam search give its tokens.

What a family gives (see ft.models): `__call__` or `decode` with cache_index, and a collection
"cache" of keys and values that `layers.cached` fills. Shapes: B rows, N = B x beams, S slots.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import decoding
from ft.weights import stacking

Settings = decoding.Settings
_STOP_CHUNK = 8  # tokens between looks for stop strings


@dataclasses.dataclass
class Generated:
  """What was generated.

  Attributes:
    tokens: (B, K) int32, new tokens only, padded behind their end.
    lengths: (B,) how many of them count, the token that ends a text included.
    scores: (B,) of beam search: log-probability over length to the power of length_penalty.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  scores: np.ndarray | None = None


def generate(pretrained, inputs: dict, settings: Settings | None = None, *, rng=None, prompt=None,
             decode: Callable | None = None, callback: Callable | None = None, chunk: int = 1,
             variables=None, interceptor=None) -> Generated:
  """Generates text.

  Args:
    pretrained: a loaded model with head "lm".
    inputs: input_ids (B, T) and attention_mask (B, T), padded on either side; of an encoder-decoder
      what `encode` takes.
    settings: see decoding.Settings; None: as the checkpoint says.
    rng: key of draws; needed with do_sample.
    prompt: encoder-decoders: (P,) or (B, P) ids the decoder starts with; None: its start token.
    decode: list of ids -> str; needed with stop strings.
    callback: called with (B, k) new tokens as they are made, `chunk` of them at a time.
    variables: instead of pretrained.variables, such as those with adapters.
    interceptor: of adapters, around every apply (Tuned.interceptor).

  Raises:
    UserError: no language head, a prompt without tokens, or more slots than the model has
      positions.
  """
  settings = Settings.of(pretrained) if settings is None else settings
  if pretrained.config.head != "lm":
    raise errors.UserError(f"this model has no language head (its head is "
                           f"{pretrained.config.head!r}); load it with head=\"lm\"")
  if settings.stop and decode is None:
    raise errors.UserError("generation: stop strings need `decode`, ids -> text")
  if settings.do_sample and rng is None:
    raise errors.UserError("generation: do_sample=True needs an rng")
  variables = pretrained.variables if variables is None else variables
  rng = jax.random.key(0) if rng is None else rng
  module, start = pretrained.module, None
  if hasattr(module, "decode"):
    inputs = {key: jnp.asarray(value) for key, value in inputs.items()}
    rows = next(iter(inputs.values())).shape[0]
    tokens = _start(pretrained.config, prompt, rows)
    mask = np.ones_like(tokens)
    start = inputs
  else:
    tokens, mask = left_padded(inputs["input_ids"], inputs.get("attention_mask"))
  total = tokens.shape[1] + settings.max_new_tokens
  engine = _Engine(module, settings, interceptor, tokens.shape[1], total)
  padded = np.full((tokens.shape[0], total), settings.pad_token_id, np.int32)
  padded[:, :tokens.shape[1]] = tokens
  real = np.ones((tokens.shape[0], total), np.int32)
  real[:, :tokens.shape[1]] = mask
  if settings.num_beams > 1:
    return _beams(engine, variables, padded, real, start)
  return _sequential(engine, variables, padded, real, start, rng, decode, callback, chunk)


def program(module, settings: Settings, interceptor=None) -> Callable:
  """Returns generation as one function of arrays, to be traced within a larger program.

  It makes the tokens that `generate` makes, without a look from the host in between: for batches
  on any number of devices and processes. Stop strings need the host.

  Args:
    module: the linen module of a model with head "lm".
    settings: see decoding.Settings.
    interceptor: of adapters, around every apply.

  Returns:
    f(variables, inputs, prompt=None, rng=None) -> (tokens (B, max_new_tokens) int32, padded behind
    their end; how many of them count (B,)). Arguments as in `generate`; every row of inputs has a
    token, and with do_sample there is an rng.

  Raises:
    UserError: settings that need the host.
  """
  if settings.stop:
    raise errors.UserError("generation within a program knows no stop strings")

  def run(variables, inputs, prompt=None, rng=None):
    if settings.do_sample and rng is None:
      raise errors.UserError("generation: do_sample=True needs an rng")
    if hasattr(module, "decode"):
      tokens = jnp.asarray(_start(module.config, prompt, next(iter(inputs.values())).shape[0]))
      mask, source = jnp.ones_like(tokens), inputs
    else:
      order = jnp.argsort(inputs["attention_mask"], axis=1, stable=True)
      tokens, mask = (jnp.take_along_axis(inputs[key], order, 1)
                      for key in ("input_ids", "attention_mask"))
      source = None
    size = tokens.shape[1]
    engine = _Engine(module, settings, interceptor, size, size + settings.max_new_tokens)
    room = ((0, 0), (0, settings.max_new_tokens))
    tokens = jnp.pad(tokens, room, constant_values=settings.pad_token_id)
    real = jnp.pad(mask, room, constant_values=1)
    if settings.num_beams > 1:
      sequences, _, lengths = _search(engine)(variables, tokens, real, source)
      made, lengths = sequences[:, 0, size:], lengths[:, 0]
    else:
      rng = jax.random.key(0) if rng is None else rng
      state = _begin(engine)(variables, tokens, real, source, rng)
      state = _continue(engine)(variables, real, source, rng, jnp.int32(engine.total), state)
      made = state[1][:, size:]
      hit = decoding.ends(made, settings)
      lengths = jnp.where(hit.any(1), hit.argmax(1) + 1, made.shape[1])
    counts = jnp.arange(made.shape[1]) < lengths[:, None]
    return jnp.where(counts, made, settings.pad_token_id), lengths

  return run


def left_padded(input_ids, attention_mask=None) -> tuple:
  """Returns (ids, mask) (B, T) with each row's real tokens at the right end, as decoding needs."""
  ids = np.asarray(input_ids, np.int32)
  mask = np.ones_like(ids) if attention_mask is None else (np.asarray(attention_mask) != 0)
  mask = mask.astype(np.int32)
  if not mask.any(1).all():
    raise errors.UserError(f"row {int((~mask.any(1)).argmax())} of the prompts has no token; a "
                           "prompt needs at least one, such as the model's first token")
  order = np.argsort(mask, axis=1, kind="stable")
  return np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)


def _start(config, prompt, rows) -> np.ndarray:
  if prompt is None:
    token = getattr(config, "decoder_start_token_id", None)
    if token is None:
      raise errors.UserError("config.json has no decoder_start_token_id; give a prompt")
    prompt = [token]
  return np.broadcast_to(np.asarray(prompt, np.int32), (rows, np.shape(prompt)[-1])).copy()


@dataclasses.dataclass(frozen=True)
class _Engine:
  """The compiled parts: what is static about a generation is what this holds."""

  module: nn.Module
  settings: Settings
  interceptor: Any
  prompt: int
  total: int

  def apply(self, variables, *args, **kwargs):
    with nn.intercept_methods(self.interceptor) if self.interceptor else contextlib.nullcontext():
      return self.module.apply(variables, *args, **kwargs)

  def first(self, variables, tokens, real, inputs):
    """Returns (scores (B, V) of the first new token, cache) after the prompt."""
    slots = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)  # the cache is made as for all of them
    ids = tokens[:, :self.prompt]
    if inputs is None:
      positions = jnp.maximum(jnp.cumsum(real[:, :self.prompt], 1) - 1, 0)
      empty = jax.eval_shape(lambda ids: self.apply(
          variables, ids, attention_mask=real, cache_index=0, mutable=["cache"])[1], slots)
      run = functools.partial(self.apply, attention_mask=real, position_ids=positions)
    else:
      encoded = self.apply(variables, **inputs, method="encode")["encoder_last_hidden_state"]
      known = {"encoder_hidden_states": encoded}
      if "attention_mask" in inputs and "input_ids" in inputs:
        known["attention_mask"] = inputs["attention_mask"]
      empty = jax.eval_shape(lambda ids: self.apply(
          variables, ids, **known, cache_index=0, mutable=["cache"], method="decode")[1], slots)
      run = functools.partial(self.apply, method="decode", **known)
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), empty)
    out, cache = run({**variables, **cache}, ids, cache_index=0, mutable=["cache"])
    return self.scores(variables, out["last_hidden_state"][:, -1]), cache

  def next(self, variables, cache, token, real, length, inputs):
    """Returns (scores (N, V), cache) after one more token (N,) in slot `length` - 1."""
    if inputs is None:
      before = (jnp.arange(self.total) < length) * real
      run = functools.partial(self.apply, attention_mask=real,
                              position_ids=before.sum(1, keepdims=True) - 1)
    else:
      known = {}
      if "attention_mask" in inputs and "input_ids" in inputs:
        copies = token.shape[0] // inputs["attention_mask"].shape[0]
        known["attention_mask"] = jnp.repeat(inputs["attention_mask"], copies, axis=0)
      run = functools.partial(self.apply, method="decode", **known)
    out, cache = run({**variables, **cache}, token[:, None], cache_index=length - 1,
                     mutable=["cache"])
    return self.scores(variables, out["last_hidden_state"][:, -1]), cache

  def scores(self, variables, hidden):
    return self.apply(variables, hidden, method="lm_logits").astype(jnp.float32)

  def process(self, scores, tokens, real, length):
    filled = (real != 0) & (jnp.arange(self.total) < length)
    return decoding.process(scores, tokens, filled, length, self.prompt, self.settings, self.total)


  def choose(self, scores, state_of, real, rng):
    """Returns (tokens, length, done) with one more token for scores (B, V)."""
    tokens, length, done = state_of
    scores = self.process(scores, tokens, real, length)
    token = decoding.choose(scores, jax.random.fold_in(rng, length), self.settings)
    token = jnp.where(done, self.settings.pad_token_id, token)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], length, axis=1)
    return tokens, length + 1, done | decoding.ends(token, self.settings)


@functools.lru_cache(maxsize=32)
def _begin(engine: _Engine):
  """Returns the jitted start of greedy and sampled decoding: prompt and first token."""

  def begin(variables, tokens, real, inputs, rng):
    scores, cache = engine.first(variables, tokens, real, inputs)
    state = (tokens, jnp.int32(engine.prompt), jnp.zeros(tokens.shape[0], bool))
    return cache, *engine.choose(scores, state, real, rng)

  return jax.jit(begin)


@functools.lru_cache(maxsize=32)
def _continue(engine: _Engine):
  """Returns the jitted loop of greedy and sampled decoding: state -> state at `until` slots."""

  def loop(variables, real, inputs, rng, until, state):
    def body(state):
      cache, tokens, length, done = state
      last = jax.lax.dynamic_index_in_dim(tokens, length - 1, axis=1, keepdims=False)
      scores, cache = engine.next(variables, cache, last, real, length, inputs)
      return cache, *engine.choose(scores, (tokens, length, done), real, rng)

    return jax.lax.while_loop(lambda s: (s[2] < until) & ~s[3].all(), body, state)

  return jax.jit(loop, donate_argnums=5)


def _sequential(engine, variables, tokens, real, inputs, rng, decode, callback, chunk):
  """Greedy or sampled decoding."""
  settings, rows = engine.settings, tokens.shape[0]
  tokens, real = jnp.asarray(tokens), jnp.asarray(real)
  state = _begin(engine)(variables, tokens, real, inputs, rng)
  step = chunk if callback else _STOP_CHUNK if settings.stop else engine.total
  lengths, seen = np.full(rows, -1), 0
  while True:
    made = int(state[2]) - engine.prompt
    host, done = np.array(state[1])[:, engine.prompt:engine.prompt + made], np.array(state[3])
    for row in np.flatnonzero(lengths < 0) if settings.stop else ():
      end = _stopped(host[row], seen, decode, settings.stop)
      if end and end <= _end(host[row], settings):
        lengths[row], done[row] = end, True
    if callback:
      callback(host[:, seen:])
    if done.all() or made == settings.max_new_tokens:
      break
    seen = made
    until = jnp.int32(min(engine.prompt + made + step, engine.total))
    state = (*state[:3], jnp.asarray(done))
    state = _continue(engine)(variables, real, inputs, rng, until, state)
  lengths = np.array([known if known >= 0 else _end(row, settings)
                      for known, row in zip(lengths, host, strict=True)])
  host[np.arange(host.shape[1]) >= lengths[:, None]] = settings.pad_token_id
  return Generated(host[:, :lengths.max()], lengths)


def _end(row, settings) -> int:
  """Returns how many tokens of a row count: up to the first that ends a text."""
  found = np.flatnonzero(np.isin(row, settings.eos_token_id))
  return int(found[0]) + 1 if found.size else len(row)


def _stopped(row, known: int, decode, stop) -> int:
  """Returns after how many tokens a stop string is complete; 0 if none is. `known` were checked."""
  if not any(text in decode(row.tolist()) for text in stop):
    return 0
  for count in range(known + 1, len(row) + 1):
    if any(text in decode(row[:count].tolist()) for text in stop):
      return count
  return len(row)


def _beams(engine, variables, tokens, real, inputs) -> Generated:
  """Beam search (one program; the best finished beam of each row)."""
  run = _search(engine)
  found = run(variables, jnp.asarray(tokens), jnp.asarray(real), inputs)
  sequences, scores, lengths = jax.device_get(found)
  host, lengths = np.array(sequences[:, 0, engine.prompt:]), np.array(lengths[:, 0])
  host[np.arange(host.shape[1]) >= lengths[:, None]] = engine.settings.pad_token_id
  return Generated(host[:, :lengths.max()], lengths, scores[:, 0])


@functools.lru_cache(maxsize=32)
def _search(engine: _Engine):
  """Returns jitted beam search: -> (sequences (B, beams, S), scores, lengths), best first."""
  settings, beams = engine.settings, engine.settings.num_beams
  keep = max(2, 1 + len(settings.eos_token_id)) * beams
  always = settings.early_stopping is True

  def search(variables, tokens, real, inputs):
    rows = tokens.shape[0]
    scores, cache = engine.first(variables, tokens, real, inputs)
    cache = _gather(cache, jnp.repeat(jnp.arange(rows), beams))
    scores = jnp.repeat(scores, beams, axis=0)
    real = jnp.repeat(real, beams, axis=0)
    running = jnp.repeat(tokens[:, None], beams, axis=1)
    low = jnp.full((rows, beams), -1e9)
    state = dict(
        running=running, running_scores=low.at[:, 0].set(0.0), sequences=running,
        finished_scores=low, lengths=jnp.zeros((rows, beams), jnp.int32),
        finished=jnp.zeros((rows, beams), bool), hopeful=jnp.ones((rows, 1), bool),
        length=jnp.int32(engine.prompt))

    def body(carry):
      cache, s = carry
      cache = _gather(cache, s["origin"], own=True)
      last = jax.lax.dynamic_index_in_dim(s["running"], s["length"] - 1, axis=2, keepdims=False)
      scores, cache = engine.next(variables, cache, last.reshape(-1), real, s["length"], inputs)
      return cache, step(scores, real, s)

    carry = (cache, step(scores, real, state))
    final = jax.lax.while_loop(lambda carry: carry[1]["more"], body, carry)[1]
    return final["sequences"], final["finished_scores"], final["lengths"]

  def step(scores, real, s):
    rows = s["running"].shape[0]
    length, flat = s["length"], s["running"].reshape(rows * beams, -1)
    logs = engine.process(jax.nn.log_softmax(scores), flat, real, length)
    vocab = logs.shape[-1]
    logs = (logs.reshape(rows, beams, vocab) + s["running_scores"][..., None]).reshape(rows, -1)
    best, index = jax.lax.top_k(logs, keep)
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    grown = jnp.take_along_axis(s["running"], parent[..., None], axis=1)
    grown = jax.lax.dynamic_update_slice_in_dim(grown, token[..., None], length, axis=2)
    hit = decoding.ends(token, settings) | (length + 1 >= engine.total)

    # The best beams that go on.
    open_scores, chosen = jax.lax.top_k(best + hit * -1e9, beams)
    running = jnp.take_along_axis(grown, chosen[..., None], axis=1)
    origin = jnp.take_along_axis(parent, chosen, axis=1)

    # The best that have ended, of before and now; only the first `beams` candidates count.
    just = hit & (jnp.arange(keep) < beams)
    made = (length + 1 - engine.prompt).astype(jnp.float32)
    ended = best / made**settings.length_penalty
    full = s["finished"].all(-1, keepdims=True) & always
    ended = ended + full * -1e9 + ~s["hopeful"] * -1e9 + ~just * -1e9
    merged = jnp.concatenate([s["finished_scores"], ended], 1)
    finished_scores, kept = jax.lax.top_k(merged, beams)
    pick = lambda old, new: jnp.take_along_axis(  # noqa: E731
        jnp.concatenate([old, new], 1), kept.reshape(kept.shape + (1,) * (old.ndim - 2)), axis=1)
    sequences = pick(s["sequences"], grown)
    finished = pick(s["finished"], just)
    counts = jnp.broadcast_to(length + 1 - engine.prompt, best.shape)
    lengths = pick(s["lengths"], counts)

    # Can one that goes on still become better than the worst that has ended?
    length = length + 1
    reach = engine.total if settings.early_stopping == "never" and settings.length_penalty > 0 \
        else length
    possible = open_scores[:, :1] / jnp.float32(reach - engine.prompt)**settings.length_penalty
    worst = jnp.where(finished, finished_scores.min(1, keepdims=True), -1e9)
    hopeful = s["hopeful"] & (possible > worst).any(-1, keepdims=True)
    more = hopeful.any() & ~(finished.all() & always) & ~hit.all()

    origin = (jnp.arange(rows)[:, None] * beams + origin).reshape(-1)
    return dict(running=running, running_scores=open_scores, sequences=sequences,
                finished_scores=finished_scores, lengths=lengths, finished=finished,
                hopeful=hopeful, length=length, more=more, origin=origin)

  return jax.jit(search)


def _gather(cache, rows, own: bool = False):
  """Returns the cache with its rows in another order; `own`: but what beams share is left alone."""

  def one(path, leaf):
    keys = [getattr(entry, "key", "") for entry in path]
    if own and str(keys[-1]).startswith("source_"):
      return leaf
    return jnp.take(leaf, rows, axis=1 if stacking.is_stacked("/".join(map(str, keys))) else 0)

  return jax.tree_util.tree_map_with_path(one, cache)
