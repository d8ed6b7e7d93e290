"""Mixout: in each training pass, some elements of the weights are back where they started.

Each element of a trained parameter that the checkpoint gave is its pretrained value with
probability p, and the rest are scaled so that the mean is kept: θ0 + m (θ - θ0) / (1 - p) with
m ~ Bernoulli(1 - p) (Lee et al. 2020, arXiv:1909.11299). It is dropout that falls back on what was
known, and commonly takes its place (model.dropout=0). Cost: a copy of what trains and one mixed
copy in the step; no further pass.
"""

import jax
import jax.numpy as jnp

from ft import anchor, tune
from ft.models import layers

KEYS = {
  "p": (0.0, "chance of each weight to be its pretrained value in a pass; 0: off", (0.0, 0.99)),
}
_STREAM = 0x6D786F  # keeps its draws apart from those of dropout


def make(config, context) -> anchor.Part | None:
  """Returns the point at which training evaluates; see `ft.anchor.make`."""
  if not config.p:
    return None
  return anchor.Part(point=point(config.p, context.need_known("anchor.mixout.p")), start=True)


def point(p: float, known):
  """Returns (trainable, {"start": tree}, rng) -> trainable; `known`: paths that are mixed."""
  def mixed(trainable, fixed, rng):
    flat, start = tune.flatten(trainable), tune.flatten(fixed["start"])
    rng = jax.random.fold_in(rng, _STREAM)
    for number, path in enumerate(sorted(known)):
      keep = layers.keep_mask(jax.random.fold_in(rng, number), flat[path].shape, p)
      origin = start[path].astype(flat[path].dtype)
      flat[path] = origin + jnp.where(keep, (flat[path] - origin) / (1 - p), 0)
    return tune.unflatten(flat)

  return mixed
