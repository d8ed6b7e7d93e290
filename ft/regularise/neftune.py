"""NEFTune: noise on the word embeddings while training.

U(-1, 1) alpha / sqrt(L D) is added to every element, L being the row's tokens and D the width (Jain
et al. 2023, arXiv:2310.05914). Evaluation and passes of the base see none. Cost: one draw an
element of the embeddings; no further pass.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ft import anchor, errors
from ft.models import layers

KEYS = {"alpha": (0.0, "size of the noise, 5 as a rule; 0: off", (0.0, None))}


def make(config, context) -> anchor.Part | None:
  """Returns the wrap; see `ft.anchor.make`."""
  if not config.alpha:
    return None
  words = getattr(context.run.pretrained.config, "vocab_size", 0)
  if context.run.config.data.modality != "text" or not words or context.tuned.only_head:
    raise errors.UserError("regularise.neftune.alpha: noise goes on word embeddings below what "
                           "trains, and there are none here; set it to 0")
  return anchor.Part(wrap=wrap(config.alpha, words))


def wrap(alpha: float, words: int):
  """Returns loss -> loss whose training passes see noise.

  Args:
    alpha: size of the noise.
    words: rows of the word table, by which it is told from other embeddings.
  """
  def around(loss):
    def value(apply, variables, batch, rng, base):
      def noisy(variables, inputs, rng=None):
        if rng is None:
          return apply(variables, inputs)
        with nn.intercept_methods(_interceptor(alpha, words, inputs.get("attention_mask"))):
          return apply(variables, inputs, rng)

      return loss(noisy, variables, batch, rng, base)

    return value

  return around


def _interceptor(alpha: float, words: int, mask):
  def intercept(call, args, kwargs, context):
    module, y = context.module, call(*args, **kwargs)
    if not isinstance(module, layers.Embedding) or context.method_name != "adapt":
      return y
    if module.size != words or not module.has_rng("dropout") or y.ndim != 3:
      return y
    same = mask is not None and mask.shape == y.shape[:2]  # the decoder's tokens are others
    tokens = jnp.sum(mask != 0, -1)[:, None, None] if same else y.shape[1]
    size = alpha / jnp.sqrt(jnp.maximum(tokens, 1) * y.shape[-1])
    noise = jax.random.uniform(module.make_rng("dropout"), y.shape, minval=-1.0, maxval=1.0)
    return y + (size * noise).astype(y.dtype)

  return intercept
