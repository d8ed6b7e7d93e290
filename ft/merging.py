"""Several tuned models made one: soups, task arithmetic, TIES, DARE, SLERP.

Pure functions of {path: array}. All arithmetic is float32 on the host, results have the dtype of
the first model. Leaves that are no floating-point numbers are taken from the first model. Cost: no
training; the models in memory at once, `greedy` an evaluation a model.

A task vector is τ = θ - θ0, what fine-tuning added to the base's weights θ0. A leaf that the base
does not have (a head that was new) has no task vector: its mean is taken.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from ft import errors

Leaves = Mapping[str, np.ndarray]


def check(models: Sequence[Leaves], names: Sequence[str] | None = None, least: int = 1) -> None:
  """Raises UserError unless there are `least` models with the same paths and shapes.

  Args:
    models: path -> array of each.
    names: what to call them.
    least: how many the method takes.
  """
  names = names or [f"model {i + 1}" for i in range(len(models))]
  if len(models) < least:
    raise errors.UserError(f"merging takes at least {least} model{'s' * (least > 1)}, "
                           f"{len(models)} given")
  for model, name in zip(models[1:], names[1:], strict=True):
    odd = sorted(models[0].keys() ^ model.keys())
    if odd:
      there = names[0] if odd[0] in models[0] else name
      raise errors.UserError(f"{names[0]} and {name} are different models: only {there} has "
                             f"{odd[0]}; merge models of one family, size and head")
    for path in sorted(model):
      one, other = np.shape(models[0][path]), np.shape(model[path])
      if one != other:
        raise errors.UserError(f"{names[0]} and {name} are different models: {path} is {one} and "
                               f"{other}; merge models of one family, size and head")


def mean(models: Sequence[Leaves], weights: Sequence[float] | None = None) -> dict:
  """Uniform soup: the (weighted) mean of the weights (Wortsman et al. 2022, arXiv:2203.05482).

  Args:
    models: path -> array of each.
    weights: one a model; they are divided by their sum. None: all the same.
  """
  check(models)
  weights = [1.0] * len(models) if weights is None else list(weights)
  if len(weights) != len(models) or not all(map(math.isfinite, weights)) or sum(weights) <= 0:
    raise errors.UserError(f"weights={weights}: {len(models)} models need as many weights, whose "
                           "sum is above 0")
  if len(models) == 1:
    return dict(models[0])
  shares = [weight / sum(weights) for weight in weights]
  return _map(lambda path, *leaves: sum(s * x for s, x in zip(shares, leaves, strict=True)), models)


def greedy(models: Sequence[Leaves], evaluate: Callable[[dict], float]) -> tuple[dict, list[int]]:
  """Greedy soup (Wortsman et al. 2022): from the best model on, each is kept if it does not harm.

  Args:
    models: path -> array of each.
    evaluate: weights -> validation metric; higher is better.

  Returns:
    (the soup, which models are in it, best first).
  """
  check(models)
  values = [evaluate(dict(model)) for model in models]
  order = sorted(range(len(models)), key=lambda i: -values[i])
  chosen, soup, best = order[:1], dict(models[order[0]]), values[order[0]]
  for number in order[1:]:
    candidate = mean([models[i] for i in (*chosen, number)])
    value = evaluate(candidate)
    if value >= best:
      chosen, soup, best = [*chosen, number], candidate, value
  return soup, chosen


def arithmetic(base: Leaves, models: Sequence[Leaves], scale: float | None = None) -> dict:
  """θ0 + scale Σ τ (Ilharco et al. 2023, arXiv:2212.04089); a negative scale takes away.

  Args:
    base: path -> array; may lack some.
    models: of each task.
    scale: None: one over their number, their mean.
  """
  check(models)
  scale = 1 / len(models) if scale is None else scale
  return _added(base, models, [_task(base, model) for model in models], lambda path, *vectors:
                scale * sum(vectors))


def ties(base: Leaves, models: Sequence[Leaves], density: float = 0.2, scale: float = 1.0) -> dict:
  """TIES (Yadav et al. 2023, arXiv:2306.01708): trim, elect a sign, average what agrees with it.

  Of each task vector the share `density` of largest elements, over all leaves together, is kept;
  each element's sign is that of the sum of what is left; those of the other sign do not count; the
  mean of the others, zeros left out, is scaled and added.

  Args:
    base: path -> array; may lack some.
    models: of each task.
    density: share of each task vector that is kept, above 0, at most 1.
    scale: factor of what is added.
  """
  check(models)
  if not 0 < density <= 1:
    raise errors.UserError(f"density={density}: expected a share above 0, at most 1")
  trimmed = []
  for model in models:
    task = _task(base, model)
    limit = _limit(task, density)
    trimmed.append({path: np.where(np.abs(v) >= limit, v, 0) for path, v in task.items()})

  def merged(path, *vectors):
    elected = np.sign(sum(vectors))
    agree = [np.where(np.sign(v) == elected, v, 0) for v in vectors]
    count = sum((v != 0).astype(np.float32) for v in agree)
    return scale * sum(agree) / np.maximum(count, 1)

  return _added(base, models, trimmed, merged)


def dare(base: Leaves, models: Sequence[Leaves], drop: float = 0.9, scale: float | None = None,
         seed: int = 0) -> dict:
  """DARE (Yu et al. 2024, arXiv:2311.03099): task arithmetic of thinned task vectors.

  Each element of a task vector is dropped with a probability and the rest divided by what is kept.

  Args:
    base: path -> array; may lack some.
    models: of each task.
    drop: the probability, at least 0, below 1.
    scale: of the sum; None: one over their number.
    seed: of what is dropped.
  """
  check(models)
  if not 0 <= drop < 1:
    raise errors.UserError(f"drop={drop}: expected a probability at least 0 and below 1")
  scale = 1 / len(models) if scale is None else scale
  thinned = []
  for number, model in enumerate(models):
    rng = np.random.default_rng([seed, number])
    thinned.append({
      path: np.where(rng.random(v.shape, np.float32) >= drop, v / np.float32(1 - drop), 0)
      for path, v in sorted(_task(base, model).items())})
  return _added(base, models, thinned, lambda path, *vectors: scale * sum(vectors))


def slerp(one: Leaves, other: Leaves, t: float = 0.5) -> dict:
  """Each leaf on the great circle between two models (Shoemake 1985): t = 0 is one, 1 the other.

  (sin((1 - t) Ω) a + sin(t Ω) b) / sin Ω with Ω the angle between the leaves as vectors; where they
  are parallel or one is zero, the straight line.
  """
  check([one, other])
  if t in (0, 1):
    return dict(other if t else one)

  def between(path, a, b):
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    cosine = float(np.vdot(a, b)) / norms if norms else 1.0
    if abs(cosine) > 0.9995:
      return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)

  return _map(between, [one, other])


def _floating(leaf) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def _map(function, models) -> dict:
  """function(path, leaf of each model as float32), in the dtype of the first model's leaf."""
  out = {}
  for path, leaf in models[0].items():
    out[path] = leaf
    if _floating(leaf):
      made = function(path, *(np.asarray(model[path], np.float32) for model in models))
      out[path] = np.asarray(made, np.float32).astype(leaf.dtype)
  return out


def _task(base: Leaves, model: Leaves) -> dict:
  """The task vector: path -> float32 array, of the leaves that both have."""
  shared = {path: leaf for path, leaf in model.items() if path in base}
  check([shared, {path: base[path] for path in shared}], ["the model", "the base"])
  if not shared:
    raise errors.UserError("the base has none of the models' parameters; name the model that they "
                           "were tuned from")
  return {path: np.asarray(leaf, np.float32) - np.asarray(base[path], np.float32)
          for path, leaf in shared.items() if _floating(leaf)}


def _added(base: Leaves, models: Sequence[Leaves], vectors: Sequence[dict], merged) -> dict:
  """The base plus merged(path, task vector of each); leaves it lacks are the models' mean."""
  out = mean(models)
  for path in vectors[0]:
    change = merged(path, *(vector[path] for vector in vectors))
    value = np.asarray(base[path], np.float32) + change
    out[path] = value.astype(models[0][path].dtype)
  return out


def _limit(task: dict, density: float) -> float:
  """The smallest size that is among the share `density` of largest elements of a task vector."""
  sizes = np.concatenate([np.abs(value).ravel() for value in task.values()])
  keep = max(1, round(density * sizes.size))
  return float(np.partition(sizes, sizes.size - keep)[sizes.size - keep])
