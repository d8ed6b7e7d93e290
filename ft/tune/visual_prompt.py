"""Visual prompts (Jia et al. 2022, arXiv:2203.12119): trained tokens among those of an image.

P tokens stand between the tokens before an image's patches (class, distillation, registers) and
the patches, for the layers of a vision transformer. Shallow: they enter the first layer. Deep:
each layer gets its own, and what the layer before made of its own is left out. They are taken out
behind the last layer, so that features mean what they meant: the class token, or the mean of the
patches. Leaves visual_prompt_tokens (P, D), at the encoder or at each of its layers; they start
uniformly, as in the paper. Plain weights cannot compute it.
"""

import math
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ft import errors, tune
from ft.tune import adapters
from ft.weights import stacking

KEYS = {
  "length": (10, "trained tokens among those of each image", (1, None)),
  "deep": (True, "tokens of their own in every layer; else in the first alone"),
}
LEAF = "visual_prompt_tokens"

_BEFORE = ("cls_token", "distillation_token", "register_tokens")
_PATCH = re.compile(r"^params/(.*?)embeddings/patch/kernel$")


class _Tower(NamedTuple):
  """A vision transformer: paths of its encoder and layers, their number if stacked (else None),
  width D, tokens before the patches, and values of a patch."""

  encoder: str
  layers: tuple
  stacked: int | None
  width: int
  before: int
  patch: int


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the tokens and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: the model is no vision transformer.
  """
  del context
  tower = _tower(variables)
  bound, leaves = math.sqrt(6 / (tower.patch + tower.width)), {}

  def draw(path):
    shape = config.length, tower.width
    return adapters.generator(rng, path).uniform(-bound, bound, shape).astype(np.float32)

  for path in tower.layers if config.deep else (tower.encoder,):
    stack = config.deep and tower.stacked
    leaves[f"{adapters.COLLECTION}/{path}/{LEAF}"] = (
      np.stack([draw(stacking.numbered(path, i)) for i in range(stack)]) if stack else draw(path))
  return adapters.beside(leaves, config, variables, head,
                         interceptor=_interceptor(tower, config.length, config.deep))


def _tower(variables) -> _Tower:
  flat = tune.flatten(variables)
  for path, kernel in flat.items():
    match = _PATCH.search(path)
    if not match or kernel.ndim != 4:
      continue
    base = match[1]
    layer = re.compile(rf"^params/({re.escape(base)}encoder/(?:layer_\d+|layers))/attention/query")
    layers = {m[1]: flat[p] for p in flat if (m := layer.search(p)) and p.endswith("/kernel")}
    if layers:
      leaf = next(iter(layers.values()))
      width = kernel.shape[-1]
      before = sum(flat[f"params/{base}embeddings/{name}"].size // width for name in _BEFORE
                   if f"params/{base}embeddings/{name}" in flat)
      stacked = leaf.shape[0] if stacking.is_stacked(next(iter(layers))) else None
      return _Tower(base + "encoder", tuple(layers), stacked, width, before,
                    math.prod(kernel.shape[:-1]))
  raise errors.UserError("tune.method='visual_prompt' needs a vision transformer (ViT, DeiT, "
                         "DINOv2, CLIP, SigLIP), and this model is none; lora fits any model")


def _interceptor(tower: _Tower, length: int, deep: bool):
  before, behind = tower.before, tower.before + length

  def put(x, tokens, rest):
    tokens = jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], length, x.shape[-1]))
    return jnp.concatenate([x[:, :before], tokens, x[:, rest:]], axis=1)

  def taken_out(x):
    return jnp.concatenate([x[:, :before], x[:, behind:]], axis=1)

  def run(call, args, kwargs, context):
    module = context.module
    path = "/".join(module.path)
    adapted = path == tower.encoder or deep and path in tower.layers
    if context.method_name != "__call__" or not adapted or (
        adapters.COLLECTION not in module.variables):
      return call(*args, **kwargs)
    x, *args = args
    if path != tower.encoder:
      return call(put(x, module.get_variable(adapters.COLLECTION, LEAF), behind), *args, **kwargs)
    # Deep prompts are filled in by the layers.
    tokens = jnp.zeros(x.shape[-1]) if deep else module.get_variable(adapters.COLLECTION, LEAF)
    x, kept = call(put(x, tokens, before), *args, **kwargs)
    return taken_out(x), [taken_out(y) for y in kept]

  return run
