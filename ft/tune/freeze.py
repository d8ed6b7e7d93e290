"""Partial fine-tuning: some of the model's own parameters train, the others cost nothing.

`select` says which: those that regular expressions find; the last layers; all biases (BitFit, Ben
Zaken et al. 2022); all norms; or the layers with the largest relative gradient on a probe batch
(surgical fine-tuning, Lee et al. 2023: the criterion of its Auto-RGN). The head trains too.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ft import errors, tune
from ft.tune import parts
from ft.weights import stacking

KEYS = {
  "select": ("regex", "what trains: by tune.train, last layers, biases, norms, or by gradient",
             ["regex", "last", "bias", "norms", "surgical"]),
  "train": ((), "regex: expressions searched in paths as params/encoder/layer_5/output/kernel"),
  "layers": (1, "last, surgical: how many layers train", (1, None)),
  "train_head": (True, "train the head too, whether or not it is selected"),
}
BOTTOM = ("", 0)  # stands for embeddings, stem and the like; sorts before every layer


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the parameters that `config.select` names as trainable; see `ft.tune.init`.

  An expression is searched (`re.search`), so "layer_5" finds every parameter of that layer and
  "^params/encoder/.*bias$" is anchored. "last" takes the last layers of every stack of numbered
  layers, so of an encoder and of its decoder. "surgical" ranks numbered layers and, as one, what
  stands below them, by ‖gradient‖/‖parameters‖.

  Raises:
    UserError: nothing is found, or everything; a key has no effect with this `select`; layers are
      to be told apart that `model.scan` has stacked.
  """
  del rng
  _check(config)
  leaves = {path: leaf for path, leaf in tune.flatten(variables).items()
            if path.startswith("params/")}
  body = {path: leaf for path, leaf in leaves.items() if not tune.under(path, head)}
  if config.select == "regex":
    found = set(filter(tune.matcher(config.train, variables, "tune.train"), leaves))
  elif config.select == "bias":
    found = {path for path in body if path.endswith("/bias")}
  elif config.select == "norms":
    found = {path for path in body if parts.is_norm(path)}
  elif config.select == "last":
    found = _last(config.layers, body)
  else:
    found = _surgical(config.layers, body, context)
  if not found:
    raise errors.UserError(f"tune.select={config.select!r} finds nothing: this model has none")
  chosen = found | {path for path in leaves if config.train_head and tune.under(path, head)}
  if len(chosen) == len(leaves):
    how = f"train={list(config.train)}" if config.select == "regex" else f"select={config.select!r}"
    raise errors.UserError(
      f"tune.{how} leaves nothing frozen: select less, or use tune.method='full'")
  trainable, frozen = tune.split(variables, chosen.__contains__)
  return tune.build(trainable, frozen, head)


def _check(config) -> None:
  """Raises UserError for a missing key, or one that nothing reads."""
  if config.select == "regex" and not config.train:
    raise errors.UserError(
      "tune.method='freeze' needs tune.train, a list of regular expressions over parameter paths, "
      "such as ['layer_5', 'bias$'], or one of tune.select=last|bias|norms|surgical; to train the "
      "head alone use tune.method='head'"
    )
  readers = {"train": ("regex",), "layers": ("last", "surgical")}
  for key, words in readers.items():
    if config.select not in words and config[key] != KEYS[key][0]:
      raise errors.UserError(
        f"tune.{key}: nothing reads it with tune.select={config.select}; it belongs to "
        f"tune.select={'|'.join(words)}")


def _last(count: int, body: dict) -> set[str]:
  """The paths of the last layers of each stack."""
  _check_unrolled(body, "last")
  sizes = parts.counts(body)
  if not sizes:
    raise errors.UserError("tune.select='last': this model has no numbered layers; use tune.train")
  if count > max(sizes.values()):
    raise errors.UserError(f"tune.layers={count}: this model has {max(sizes.values())} layers")
  places = {path: parts.layer(path) for path in body}
  return {path for path, place in places.items() if place and place[1] >= sizes[place[0]] - count}


def _surgical(count: int, body: dict, context) -> set[str]:
  """The paths of the layers with the largest relative gradient; of equal ones the lower layer."""
  _check_unrolled(body, "surgical")
  if not (context and context.gradient):
    raise errors.UserError("tune.select='surgical' needs a probe batch, but no data is given")
  groups: dict[tuple[str, int], list[str]] = {}
  for path in body:
    place = parts.layer(path) or (BOTTOM if parts.is_bottom(path) else None)
    if place:
      groups.setdefault(place, []).append(path)
  if count > len(groups):
    raise errors.UserError(
      f"tune.layers={count}: this model has {len(groups)} layers, its embeddings counted as one")
  gradient = tune.flatten(context.gradient())
  squares = jax.jit(lambda tree: jax.tree.map(
    lambda x: jnp.sum(jnp.square(x.astype(jnp.float32))), tree))
  steep = jax.device_get(squares({path: gradient[path] for path in body}))
  large = jax.device_get(squares(body))
  share = {place: float(np.sqrt(sum(steep[path] for path in paths)
                                / max(sum(large[path] for path in paths), 1e-24)))
           for place, paths in groups.items()}
  if not all(map(np.isfinite, share.values())):
    raise errors.UserError("tune.select='surgical': the gradient of the probe batch is not finite")
  ranked = sorted(share, key=lambda place: (-share[place], place))
  logging.info("relative gradients, largest first: %s", ", ".join(
    f"{'embeddings' if place == BOTTOM else f'{place[0]}{place[1]}'} {share[place]:.3g}"
    for place in ranked))
  return {path for place in ranked[:count] for path in groups[place]}


def _check_unrolled(body: dict, select: str) -> None:
  if any(map(stacking.is_stacked, body)):
    raise errors.UserError(
      f"tune.select={select!r} trains some layers and freezes others, but model.scan stacks them "
      "into one array; set model.scan=False")
