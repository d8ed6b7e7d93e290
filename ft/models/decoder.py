"""What decoder-only language models share: their inputs, positions, outputs and heads.

Shapes: B batch, T tokens, S slots of the cache or T without one, D hidden size, V vocabulary, C
labels.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ft.models import attention, layers


class Decoder(nn.Module):
  """A decoder: token ids -> a dict, see `__call__`. Dropout acts iff given a "dropout" rng.

  A family's model gives `setup`, with embed_tokens, norm, and where they are due lm_head (not if
  config.tie_word_embeddings) and classifier; and `body`.
  """

  config: Any
  compute: layers.Compute = layers.Compute()

  def body(self, input_ids, position_ids, mask: attention.Mask):
    """Returns the state (B, T, D) after the layers, before the last norm."""
    raise NotImplementedError

  @nn.compact
  def __call__(self, input_ids, attention_mask=None, position_ids=None, segment_ids=None,
               cache_index=None):
    """Applies the model.

    Args:
      input_ids: (B, T) int.
      attention_mask: (B, S), 1 for real tokens and 0 for padding on either side; None: all are
        real. With a cache it speaks of all slots, those still to be filled included.
      position_ids: (B, T) int; None: the slot's number.
      segment_ids: (B, T) int, the document of each token where a row holds several; give
        position_ids with them. Not with a cache.
      cache_index: slot of the first token; keys and values are then kept in the collection
        "cache", and those of all slots are attended to. None: no cache.

    Returns:
      last_hidden_state (B, T, D), features (B, D), which are the last real token's, and logits
      float32: (B, T, V) of a language model, (B, C) of a classifier.
    """
    if position_ids is None:
      position_ids = self.positions(input_ids.shape[1], cache_index)
    mask = attention.Mask(attention_mask, segment_ids, cache_index, causal=True)
    x = self.norm(self.body(input_ids, position_ids, mask))
    real = attention_mask if cache_index is None else None
    outputs = {"last_hidden_state": x, "features": layers.last_token(x, real)}
    if self.config.head == "lm":
      outputs["logits"] = self.lm_logits(x)
    elif self.config.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    return outputs

  def positions(self, length, cache_index):
    """Returns the positions (1, T) of tokens whose slots count them."""
    return jnp.arange(length)[None] + (0 if cache_index is None else cache_index)

  def lm_logits(self, hidden):
    """Returns the scores (…, V) float32 of the next token, for last_hidden_state (…, D)."""
    output = self.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
    return output(hidden).astype(jnp.float32)

  def head(self, features):
    """Returns the logits (B, C) float32 of features (B, D)."""
    return self.classifier(features).astype(jnp.float32)


def linear(config, compute, features, bias, name=None) -> layers.Linear:
  """Returns a linear layer that starts as the config says."""
  init = nn.initializers.normal(config.initializer_range)
  return layers.Linear(features, bias, compute.dtype, init, name=name)


def probe_tokens(vocab_size: int, length: int = 12) -> dict:
  """Returns a small fixed batch, with padding, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  mask = np.ones((2, length), np.int32)
  mask[1, length // 2 + 1:] = 0
  return {"input_ids": rng.integers(0, vocab_size, mask.shape, np.int32), "attention_mask": mask}
