"""How a generated token is chosen: what changes a model's scores, and settings of generation.

Follows transformers' `generation/logits_process.py` (Apache-2.0) in names, order and arithmetic.
Shapes: N rows (batch times beams), L slots of tokens, V vocabulary.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp

from ft import errors

_IGNORED = -1e9
# Keys of generation_config.json that would change what is generated and that are not computed.
_REFUSED = ("guidance_scale", "penalty_alpha", "sequence_bias", "bad_words_ids", "top_h", "min_p",
            "exponential_decay_length_penalty", "encoder_no_repeat_ngram_size", "epsilon_cutoff",
            "eta_cutoff", "watermarking_config", "constraints", "force_words_ids")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How text is generated; names and meaning as in transformers' generation_config.json.

  Attributes:
    max_new_tokens: most tokens made; min_new_tokens: no end before.
    num_beams: 1: greedy or sampled; more: beam search.
    do_sample: draw tokens instead of taking the likeliest; with temperature, top_k (0: all), top_p.
    length_penalty, early_stopping (False | True | "never"): of beam search.
    repetition_penalty: above 1 makes tokens that are there already less likely (arXiv:1909.05858).
    no_repeat_ngram_size: no n-gram comes twice; 0: off.
    forced_bos_token_id, forced_eos_token_id: the first token after the start, the last possible.
    suppress_tokens, begin_suppress_tokens: never made; not made first.
    eos_token_id: ids that end a text. pad_token_id: fills what follows.
    stop: strings that end a text once they are made.
  """

  max_new_tokens: int = 20
  min_new_tokens: int = 0
  num_beams: int = 1
  do_sample: bool = False
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  length_penalty: float = 1.0
  early_stopping: bool | str = False
  repetition_penalty: float = 1.0
  no_repeat_ngram_size: int = 0
  forced_bos_token_id: int | None = None
  forced_eos_token_id: int | None = None
  suppress_tokens: tuple = ()
  begin_suppress_tokens: tuple = ()
  eos_token_id: tuple = ()
  pad_token_id: int = 0
  stop: tuple = ()

  def __post_init__(self):
    for name, low in (("max_new_tokens", 1), ("num_beams", 1), ("top_k", 0), ("min_new_tokens", 0),
                      ("no_repeat_ngram_size", 0)):
      if getattr(self, name) < low:
        raise errors.UserError(f"generation: {name}={getattr(self, name)} should be at least {low}")
    if self.temperature <= 0 or self.repetition_penalty <= 0 or not 0 < self.top_p <= 1:
      raise errors.UserError(
          f"generation: temperature={self.temperature} and repetition_penalty="
          f"{self.repetition_penalty} should be above 0, top_p={self.top_p} above 0 and at most 1")
    if self.do_sample and self.num_beams > 1:
      raise errors.UserError("generation: do_sample=True goes with num_beams=1")
    if self.stop and self.num_beams > 1:
      raise errors.UserError("generation: stop strings go with num_beams=1")

  @classmethod
  def of(cls, pretrained, **changes) -> "Settings":
    """Returns what a checkpoint's generation_config.json and config.json say, with changes.

    Raises:
      UserError: generation_config.json is damaged, or asks for what is not computed.
    """
    try:
      stated = json.loads(pretrained.files.get("generation_config.json", b"{}"))
    except ValueError as e:
      raise errors.UserError(f"generation_config.json is no readable JSON: {e}") from None
    config = pretrained.config
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    source = json.loads(config.source)
    for key in ("eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id"):
      value = getattr(config, key, None) if hasattr(config, key) else source.get(key)
      if stated.get(key) is None and value is not None:
        stated[key] = value
    values = {key: stated[key] for key in fields if stated.get(key) is not None} | changes
    for key in _REFUSED:
      if stated.get(key) not in (None, 0, 0.0, 1, 1.0):
        raise errors.UserError(f"generation_config.json: {key}={stated[key]!r} is not supported; "
                               "remove it, or generate from a copy without it")
    for key, default in fields.items():
      if isinstance(default, tuple) and key in values:
        value = values[key]
        values[key] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    values.setdefault("pad_token_id", (values.get("eos_token_id") or (0,))[0])
    return cls(**values)


def process(scores, tokens, real, length, prompt: int, settings: Settings, last: int):
  """Returns scores (N, V) as the settings change them, before any sampling.

  Args:
    scores: (N, V) float32, logits or log-probabilities of the next token.
    tokens: (N, L) int32, what there is so far in the first `length` slots.
    real: (N, L) whether a slot holds a token that counts, not padding.
    length: scalar, how many slots are filled.
    prompt: how many slots the prompt (of the decoder) took.
    settings: see Settings.
    last: the greatest possible `length` after this token.
  """
  s, vocab = settings, scores.shape[1]
  eos = jnp.asarray(s.eos_token_id, jnp.int32)
  if s.repetition_penalty != 1.0:
    rows = jnp.arange(scores.shape[0])[:, None]
    seen = jnp.zeros(scores.shape, bool).at[rows, tokens].max(real)
    punished = jnp.where(scores < 0, scores * s.repetition_penalty, scores / s.repetition_penalty)
    scores = jnp.where(seen, punished, scores)
  if s.no_repeat_ngram_size:
    scores = jnp.where(_repeats(tokens, length, s.no_repeat_ngram_size, vocab), -jnp.inf, scores)
  if s.min_new_tokens and s.eos_token_id:
    early = scores.at[:, eos].set(-jnp.inf)
    scores = jnp.where(length - prompt < s.min_new_tokens, early, scores)
  if s.forced_bos_token_id is not None:
    scores = jnp.where(length == 1, _only(scores, s.forced_bos_token_id), scores)
  if s.forced_eos_token_id is not None:
    scores = jnp.where(length == last - 1, _only(scores, s.forced_eos_token_id), scores)
  if s.suppress_tokens:
    scores = scores.at[:, jnp.asarray(s.suppress_tokens)].set(-jnp.inf)
  if s.begin_suppress_tokens:
    begin = prompt if prompt > 1 or s.forced_bos_token_id is None else prompt + 1
    without = scores.at[:, jnp.asarray(s.begin_suppress_tokens)].set(-jnp.inf)
    scores = jnp.where(length == begin, without, scores)
  return scores


def choose(scores, rng, settings: Settings):
  """Returns the next token (N,) int32 of processed scores (N, V): the likeliest, or a draw."""
  if not settings.do_sample:
    return scores.argmax(-1).astype(jnp.int32)
  scores = scores / settings.temperature
  if settings.top_k:
    least = jax.lax.top_k(scores, min(settings.top_k, scores.shape[1]))[0][:, -1:]
    scores = jnp.where(scores < least, -jnp.inf, scores)
  if settings.top_p < 1.0:
    ordered = jnp.sort(scores, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) <= 1 - settings.top_p
    below = below.at[:, -1].set(False)  # the likeliest always stays
    least = jnp.where(below, jnp.inf, ordered).min(-1, keepdims=True)
    scores = jnp.where(scores < least, -jnp.inf, scores)
  return jax.random.categorical(rng, scores, axis=-1).astype(jnp.int32)


def ends(tokens, settings: Settings):
  """Returns which tokens end a text."""
  eos = jnp.asarray(settings.eos_token_id or (-1,), jnp.int32)
  return (tokens[..., None] == eos).any(-1)


def _only(scores, token):
  return jnp.full_like(scores, -jnp.inf).at[:, token].set(0.0)


def _repeats(tokens, length, size: int, vocab: int):
  """Returns which tokens (N, V) would complete an n-gram that is there already."""
  starts = tokens.shape[1] - size + 1
  if starts < 1:
    return jnp.zeros((tokens.shape[0], vocab), bool)
  same = jnp.broadcast_to(jnp.arange(starts) + size <= length, (tokens.shape[0], starts))
  for i in range(size - 1):  # the last size - 1 tokens against those at each start
    now = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(length - size + 1 + i, 0), 1, axis=1)
    same = same & (tokens[:, i:i + starts] == now)
  same = same & (length + 1 >= size)
  rows = jnp.arange(tokens.shape[0])[:, None]
  return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens[:, size - 1:]].max(same)
