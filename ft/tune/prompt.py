"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): trained vectors before each text.

The vectors are the rows of words that the vocabulary does not have: input_ids get V, …, V + P - 1
on their left, and the word embedding (V, D) looks these up in the leaf prompt_vectors (P, D) that
stands beside it. Masks, token types (0) and positions are lengthened alike, and outputs for each
token are given back without the P first. The model's own pooling sees the longer text: a BERT that
pools its first token pools the prompt's first vector, a mean is over prompt and text; `peft`
computes the same. In an encoder-decoder the prompt stands before the encoder's text.
Plain weights cannot compute it, and `ft.models.generate`, which knows of no prompts, refuses.
"""

import contextlib
import contextvars

import jax.numpy as jnp
import numpy as np

from ft import errors, tune
from ft.tune import adapters, tokens

KEYS = {
  "length": (20, "trained vectors before each text", (1, None)),
  "start": ("words", "where they start: at vectors of words, or at noise", ["words", "noise"]),
  "words": ((), "start=words: ids of the words, repeated as needed; (): drawn at random"),
}
PEFT = "PROMPT_TUNING"
LEAF = "prompt_vectors"

_NOISE = 0.02  # standard deviation
_LENGTHENED = contextvars.ContextVar("lengthened", default=False)
# Inputs with one value a token, and outputs, which are per token where they have three axes.
_BEFORE = {"attention_mask": 1, "token_type_ids": 0}
_OUTPUTS = ("last_hidden_state", "features", "logits")


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the prompt and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: the model has no word embedding, no room for the prompt, or not the words that it
      should start at.
  """
  path, found = tokens.word_table(variables, head, context)
  size, limit = found.leaf.shape[0], positions(context)
  check_length(config.length, 1, limit)
  start = _start(config, found.leaf, adapters.generator(rng, path))
  return adapters.beside(
    {f"{adapters.COLLECTION}/{path}/{LEAF}": start}, config, variables, head,
    interceptor=_interceptor(path, size), around=_around(size, config.length, limit))


def positions(context) -> int | None:
  """Returns how many tokens a text can have; None where nothing says so."""
  config = context and context.pretrained and context.pretrained.config
  names = ("positions", "max_position_embeddings", "n_positions")
  return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


def check_length(length: int, text, limit: int | None) -> None:
  """Raises UserError if `length` vectors and a text of that many tokens exceed the positions."""
  if limit and isinstance(text, int) and length + text > limit:  # symbolic in an export
    raise errors.UserError(
      f"prompt longer than the context: tune.length={length} before a text of {text} tokens, and "
      f"the model has {limit} positions; lower tune.length or data.max_length")


def _start(config, table, rng) -> np.ndarray:
  size, width = table.shape
  if config.start == "noise":
    return rng.normal(0, _NOISE, (config.length, width)).astype(np.float32)
  ids = np.asarray([int(i) for i in config.words] or rng.integers(0, size, config.length))
  if ids.min() < 0 or ids.max() >= size:
    raise errors.UserError(f"tune.words: {ids.min() if ids.min() < 0 else ids.max()} is no id of "
                           f"the {size} words")
  return np.asarray(table[np.resize(ids, config.length)], np.float32)


def _interceptor(path: str, size: int):
  """Looks the ids behind the table up in the prompt."""

  def run(call, args, kwargs, context):
    module = context.module
    mine = context.method_name == "__call__" and "/".join(module.path) == path
    if not mine or not module.has_variable(adapters.COLLECTION, LEAF):
      return call(*args, **kwargs)
    if not _LENGTHENED.get():
      raise errors.UserError("this model has a trained prompt, which only whole passes over texts "
                             "read; generation knows of no prompts")
    ids, vectors = args[0], module.get_variable(adapters.COLLECTION, LEAF)
    count = vectors.shape[0]
    place = ids - size
    prompt = jnp.take(vectors, jnp.clip(place, 0, count - 1), axis=0).astype(module.dtype)
    added = (place >= 0) & (place < count)
    return jnp.where(added[..., None], prompt, call(jnp.where(added, 0, ids)))

  return run


def _around(size: int, length: int, limit):
  """Returns apply -> apply that puts the ids of the prompt before each text."""

  def around(apply):
    def lengthened(variables, inputs, *args, **kwargs):
      if {"features", "hidden"} & set(inputs):  # a head alone
        return apply(variables, inputs, *args, **kwargs)
      longer = _longer(inputs, size, length, limit)
      with _reading():
        outputs, updates = apply(variables, longer, *args, **kwargs)
      return _shorter(outputs, inputs, length), updates

    return lengthened

  return around


@contextlib.contextmanager
def _reading():
  token = _LENGTHENED.set(True)
  try:
    yield
  finally:
    _LENGTHENED.reset(token)


def _longer(inputs, size, length, limit) -> dict:
  if "input_ids" not in inputs:
    raise errors.UserError("tune.method='prompt' stands before input_ids, and these inputs are "
                           + ", ".join(inputs))
  if inputs.get("segment_ids") is not None:
    raise errors.UserError("tune.method='prompt' stands before one text; it cannot be tuned on "
                           "rows that hold several (segment_ids)")
  ids = jnp.asarray(inputs["input_ids"])
  check_length(length, ids.shape[1], limit)

  def put(values, before):
    values = jnp.asarray(values)
    before = jnp.broadcast_to(jnp.asarray(before, values.dtype), (values.shape[0], length))
    return jnp.concatenate([before, values], axis=1)

  longer = {**inputs, "input_ids": put(ids, size + jnp.arange(length))}
  for key, value in _BEFORE.items():
    if inputs.get(key) is not None:
      longer[key] = put(inputs[key], value)
  if inputs.get("position_ids") is not None:
    given = jnp.asarray(inputs["position_ids"])
    longer["position_ids"] = put(given + length, given[:, :1] + jnp.arange(length))
  return longer


def _shorter(outputs, inputs, length) -> dict:
  """Returns the outputs of the text's own tokens; those of a decoder with ids of its own are."""
  names = ("encoder_last_hidden_state",)
  if inputs.get("decoder_input_ids") is None:
    names += _OUTPUTS
  return {name: value[:, length:] if name in names and value.ndim == 3 else value
          for name, value in outputs.items()}


def peft_config(config, context) -> dict:
  """Returns this method's keys of adapter_config.json; `peft` reads what is None off its model."""
  _, found = tokens.word_table(context.pretrained.variables, context.pretrained.head, context)
  return {"num_virtual_tokens": config.length, "token_dim": found.leaf.shape[1],
          "num_transformer_submodules": 1, "num_layers": None, "num_attention_heads": None,
          "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
          "tokenizer_name_or_path": None, "tokenizer_kwargs": None}


def peft_values(adapter_config: dict) -> dict:
  """Returns values of tune.* that adapter_config.json states."""
  return {"length": adapter_config["num_virtual_tokens"]}


def peft_tensors(flat: dict, config, context) -> dict:
  """Returns {name in PEFT's file: array} of {path: leaf}."""
  del config, context
  vectors = next(array for path, array in flat.items() if path.endswith("/" + LEAF))
  return {"prompt_embeddings": np.asarray(vectors, np.float32)}


def peft_leaves(tensors: dict, config, context) -> dict:
  """Returns {path: leaf} of {name in PEFT's file: array}.

  PEFT makes 2 P vectors for an encoder-decoder and uses the first P.

  Raises:
    UserError: vectors of another size than the model's words, or fewer than the config says.
  """
  path, found = tokens.word_table(context.pretrained.variables, context.pretrained.head, context)
  array = np.asarray(tensors["prompt_embeddings"], np.float32)
  wanted = (config.length, found.leaf.shape[1])
  if array[:config.length].shape != wanted:
    raise errors.UserError(f"prompt_embeddings is of shape {array.shape}; this model and "
                           f"tune.length={config.length} need {wanted}")
  return {f"{adapters.COLLECTION}/{path}/{LEAF}": array[:config.length]}
