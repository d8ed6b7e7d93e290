"""Trainable tokens: chosen rows of the word embedding train, everything else stays as it was.

For words that the model did not know: `model.vocab_size` adds their rows, and these train. Leaves
beside the table (V, D): tokens_delta (n, D), zero at the start, which is added to what is looked
up, and tokens_index (n,), the ids. Where the table is the output layer too, its rows there change
alike; an output layer of its own stays frozen, unless tune.also_train names it.
PEFT's TRAINABLE_TOKENS files hold the new rows, not what was added to the old ones.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from ft import errors, tune
from ft.models import layers
from ft.tune import adapters

KEYS = {
  "tokens": ((), "ids of words that train; (): those that model.vocab_size added"),
}
PEFT = "TRAINABLE_TOKENS"


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the rows and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: the model has no word embedding, an id is not in it, or no id is given and
      model.vocab_size added none.
  """
  path, found = word_table(variables, head, context)
  ids = [int(i) for i in config.tokens] or _added(context)
  wrong = [i for i in ids if not 0 <= i < found.leaf.shape[0]]
  if wrong or len(set(ids)) < len(ids):
    raise errors.UserError(
      f"tune.tokens: {', '.join(map(str, wrong)) or 'an id'} is "
      + (f"outside the word embedding's {found.leaf.shape[0]} rows; model.vocab_size adds rows"
         if wrong else "named twice"))
  config = config_dict.ConfigDict({**config, "tokens": tuple(ids)})
  tuned = adapters.init(Tokens(config), config, variables, rng, head, chosen={path: found})
  return dataclasses.replace(tuned, settings=config)


def word_table(variables, head=(), context=None) -> tuple:
  """Returns (module path, adapters.Found) of the embedding (V, D) that input_ids are looked up in.

  It is the one with as many rows as the config's vocab_size, an encoder's before a decoder's; the
  largest where there is no config.
  """
  pretrained = context and context.pretrained
  size = getattr(pretrained.config, "vocab_size", -1) if pretrained else 0
  tables = [(path, found) for path, found in adapters.layers_of(variables, head).items()
            if found.kind == "embedding" and size in (0, found.leaf.shape[0])]
  if not tables:
    raise errors.UserError("tune.method: prompt and tokens act on a word embedding, and this model "
                           "has none; they fit models of text")
  return min(tables, key=lambda item: ("decoder" in item[0], -item[1].leaf.shape[0]))


def _added(context) -> list[int]:
  """Returns the ids of the rows behind those of the checkpoint."""
  ids = []
  if context and context.pretrained:
    model = context.pretrained.config
    size = getattr(model, "vocab_size", 0)
    ids = list(range(json.loads(model.source).get("vocab_size", size), size))
  if not ids:
    raise errors.UserError("tune.tokens is empty, and model.vocab_size added no rows: name the ids "
                           "of the words that should train")
  return ids


class Tokens(adapters.Adapter):
  """The rows of one table."""

  KINDS = ("embedding",)

  def create(self, layer):
    index = np.asarray(self.config.tokens, np.int32)
    return ({"tokens_delta": np.zeros((len(index), layer.shape[1]), np.float32)},
            {"tokens_index": index})

  def adapt(self, p, x, y, module):
    index, delta = p["tokens_index"], p["tokens_delta"]
    order = jnp.argsort(index)
    place = jnp.minimum(jnp.searchsorted(index[order], x), len(index) - 1)
    row = order[place]
    return y + jnp.where((index[row] == x)[..., None], delta[row], 0).astype(y.dtype)

  def adapt_output(self, p, x, y, module):
    more = layers.product(x, p["tokens_delta"].T, dtype=y.dtype)
    return y.at[..., p["tokens_index"]].add(more)

  def merge(self, p, kernel, bias, layer):
    return kernel.at[p["tokens_index"]].add(p["tokens_delta"]), bias

  def to_peft(self, p, layer):
    rows = np.asarray(layer.kernel(), np.float32)[np.asarray(p["tokens_index"])]
    return {"trainable_tokens_delta": rows + np.asarray(p["tokens_delta"], np.float32)}

  def from_peft(self, tensors, layer):
    trainable, fixed = self.create(layer)
    rows = np.asarray(layer.kernel(), np.float32)[fixed["tokens_index"]]
    trainable["tokens_delta"] = np.asarray(tensors["trainable_tokens_delta"], np.float32) - rows
    return trainable, fixed


METHOD = Tokens


def peft_config(config) -> dict:
  """Returns this method's keys of adapter_config.json."""
  return {"token_indices": [int(i) for i in config.tokens], "init_weights": True}


def peft_values(adapter_config: dict) -> dict:
  """Returns values of tune.* that adapter_config.json states."""
  return {"tokens": tuple(adapter_config.get("token_indices") or ())}
