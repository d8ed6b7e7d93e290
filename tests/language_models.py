"""What an exported language model says of a sentence by itself, for tests of what compares two."""

import functools
import types

import jax
import numpy as np
from scipy import special

from ft import models
from ft.data import text


@functools.cache
def answering(folder):
  """(preprocessing, ids (1, T) -> logits) of a model."""
  made = models.load(str(folder), head="lm")
  preprocess = text.Preprocess(
    types.SimpleNamespace(max_length=16, truncation="truncate-right", buckets=(16,)),
    models.inspect(str(folder)))
  return preprocess, jax.jit(lambda ids: made.module.apply(made.variables, input_ids=ids)["logits"])


def log_probs(folder, sentence):
  """(tokens, (T, V) log-probabilities) of a model on a sentence."""
  preprocess, logits = answering(folder)
  ids = preprocess({"text": sentence})["input_ids"]
  return ids, special.log_softmax(np.asarray(logits(ids[None])[0], np.float64), axis=-1)
