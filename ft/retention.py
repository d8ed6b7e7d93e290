"""What a tuned model has kept of the pretrained one: both are asked the same, and compared.

The pretrained model is never held as a whole where it can be put together from what did not train:
of adapters it is the frozen weights without them, else what trained is read from the checkpoint
again, at the cost of one more copy of that.

Shapes: B batch, N rows, D features.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ft import averaging, evaluate, mesh, passes, state, tune
from ft import run as runs
from ft.weights import stacking

_LAYER = re.compile(r"^(.*(?:^|/)(?:layer|block|stage|level)_\d+)(?:/|$)")


@dataclasses.dataclass(frozen=True)
class Side:
  """One of the two models, as a step of `state.make_predict_step` takes it.

  Attributes:
    combine, apply: see `tune.Tuned` and `state.make_apply`.
    state: `state.State` with its trainable and mutable trees.
    frozen: the rest.
  """

  combine: Callable
  apply: Callable
  state: Any
  frozen: Any

  def variables(self) -> dict:
    return {**self.combine(self.frozen, self.state.trainable), **self.state.mutable}


def sides(context) -> tuple[Side, Side]:
  """Returns (base, tuned) of a finished run, `guards.Context`."""
  run, final = context.run, context.final
  tuned, trained = final.tuned, final.state
  apply = state.make_apply(run.pretrained.module, tuned.interceptor, tuned.around)
  after = Side(tuned.combine, apply, trained, final.frozen)
  trees = {"trainable": trained.trainable or {}, "mutable": trained.mutable or {}}
  if final.tuned is not context.tuned:  # mixed: no leaf is known to be the pretrained one
    trees["frozen"] = final.frozen
  flat = {name: tune.flatten(tree) for name, tree in trees.items()}
  made = averaging.fresh(run, {path for part in flat.values() for path in part})
  changed = {path for part in flat.values() for path in part
             if path not in made and path.startswith(("params/", "batch_stats/"))}
  if changed:
    base = averaging.read_again(run)
    for name, part in flat.items():
      trees[name] = tune.unflatten({path: base[path] if path in changed and path in base else leaf
                                    for path, leaf in part.items()})
    del base
  plain = tuned.interceptor is tuned.reader and tuned.around is None
  before = trained.replace(
    trainable=trees["trainable"] if trained.trainable is not None else None,
    mutable=trees["mutable"])
  return Side(tuned.combine,
              # One function for both compiles once for both.
              apply if plain else state.make_apply(run.pretrained.module, tuned.reader),
              before, trees.get("frozen", final.frozen)), after


def untrained(run, side: Side) -> bool:
  """Whether a model's weights are as they were drawn: no offset or scale has ever moved.

  Training moves every bias from 0 and every scale of a norm from 1; both are vectors of one value
  as long as nothing was learnt. A model without any such vector counts as trained. What no
  checkpoint gave is left out: it is the tuned one's on both sides.
  """
  flat = tune.flatten(side.variables())
  made = averaging.fresh(run, flat)
  vectors = [leaf for path, leaf in flat.items() if path not in made and np.size(leaf) > 1
             and path.startswith(("params/", "batch_stats/"))
             and np.ndim(leaf) == 1 + stacking.is_stacked(path)]
  return bool(vectors) and all(float(jnp.max(leaf)) == float(jnp.min(leaf)) or _by_layer(leaf)
                               for leaf in vectors)


def _by_layer(leaf) -> bool:
  return np.ndim(leaf) == 2 and bool(jnp.all(leaf == leaf[:, :1]))


class Asker:
  """Asks both models the same rows; what is compiled for one serves the other where it can."""

  def __init__(self, run, base: Side, tuned: Side):
    self.run, self.base, self.tuned, self._steps = run, base, tuned, {}

  def __call__(self, ask: Callable, examples, size: int, buckets=()) -> tuple[dict, dict]:
    """Returns what `ask(apply, variables, batch)` gives of (base, tuned), arrays (N, …).

    Args:
      ask: gives per-example arrays; equal functions are compiled once.
      examples: loader.Examples. size: rows of a batch. buckets: lengths to pad to.
    """
    found = []
    for side in (self.base, self.tuned):
      key = ask, id(side.apply)
      if key not in self._steps:
        self._steps[key] = state.make_predict_step(
          ask, side.apply, side.combine, mesh.replicated(self.run.mesh))
      load = runs.loader(self.run, examples, size, buckets=buckets)
      found.append(evaluate.run(self._steps[key], side.state, side.frozen, load, self.run.place,
                                self.run.poll))
    return tuple(found)

  def apart(self, measure: Callable, examples, size: int, buckets=()) -> dict:
    """Returns {"total", "weight": (N,)} of measure(apply, tuned, base, batch), row by row.

    Args:
      measure: as `divergence` of a task: sums over a batch's rows of how far two models are apart.
      examples, size, buckets: see `__call__`.
    """
    sides = {"base": self.base, "tuned": self.tuned}

    def apply(variables, inputs, rng=None):
      name, own = variables
      return sides[name].apply(own, inputs, rng)[0]

    def step(trees, batch):
      own = {name: {**sides[name].combine(frozen, trainable), **mutable}
             for name, (trainable, mutable, frozen) in trees.items()}

      def row(one):
        one = {key: value[None] for key, value in one.items()}
        return measure(apply, ("tuned", own["tuned"]), ("base", own["base"]), one)

      # Row by row, as a sum over a batch would not tell how sure the mean is.
      total, weight = jax.lax.map(row, batch)
      return {"total": total, "weight": weight, "index": batch["index"]}

    trees = {name: (side.state.trainable, side.state.mutable, side.frozen)
             for name, side in sides.items()}
    jitted = jax.jit(step, out_shardings=mesh.replicated(self.run.mesh))
    load = runs.loader(self.run, examples, size, buckets=buckets)
    return evaluate.run(lambda trainable, mutable, frozen, batch: jitted(trees, batch),
                        self.tuned.state, self.tuned.frozen, load, self.run.place, self.run.poll)


def pooled(function: Callable) -> Callable:
  """Returns ask(apply, variables, batch) of `Asker`: function's outputs, and each part's mean.

  "part/<path>" (B, D) is the mean over the tokens or places of what a layer, block or stage gave,
  padding left out; "part/last" that of what a label head reads, or of the last hidden states.

  Args:
    function: (apply, variables, batch) -> per-example arrays; the first call of apply counts.
  """
  def ask(apply, variables, batch):
    parts, last = {}, {}

    def watched(variables, inputs, rng=None):
      if parts or last:
        return apply(variables, inputs, rng)
      outputs, seen = passes.parts_of(lambda: apply(variables, inputs, rng))
      parts.update(seen)
      last.update(outputs)
      return outputs

    found = function(watched, variables, batch)
    end = next((last[key] for key in ("features", "last_hidden_state", "logits") if key in last),
               None)
    seen = {**parts, **({} if end is None else {"last": end})}
    means = {f"part/{path}": _mean(made, batch) for path, made in seen.items()}
    return {**found, **{path: mean for path, mean in means.items() if mean is not None}}

  return ask


def _mean(made, batch: dict):
  """Returns (B, D) of (B, …, D), of sides next to each other too; None for anything else."""
  made, rows = made[0] if isinstance(made, tuple) else made, len(batch["weight"])
  if not hasattr(made, "ndim") or made.ndim < 2 or made.shape[0] % rows:
    return None
  made, mask = made.astype(jnp.float32), batch.get("attention_mask")
  if made.ndim == 3 and mask is not None and mask.shape == made.shape[:2]:
    weight = mask[..., None].astype(jnp.float32)
    return jnp.sum(made * weight, 1) / jnp.maximum(jnp.sum(weight, 1), 1.0)
  return jnp.mean(made.reshape(rows, -1, made.shape[-1]), 1)


def cka(x, y) -> float:
  """Returns linear CKA of features (N, D) and (N, E) of the same rows, from 0 to 1.

  ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features, Frobenius norms (Kornblith et al. 2019,
  arXiv:1905.00414): 1 for features that differ by a rotation and a scale alone. With few rows for
  their width features that have nothing in common are alike by chance; see `chance`. NaN where
  either is constant.
  """
  x, y = (np.asarray(part, np.float64) for part in (x, y))
  x, y = x - x.mean(axis=0), y - y.mean(axis=0)
  size = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
  return float(np.linalg.norm(y.T @ x)**2 / size) if size > 0 else float("nan")


def chance(x, y, seed: int = 0) -> float:
  """Returns CKA of the same features where rows are matched at random: what says nothing."""
  return cka(x, np.asarray(y)[np.random.default_rng(seed).permutation(len(y))])


def moved(tuned: tune.Tuned, base: Side, after: Side) -> list[dict]:
  """Returns ‖θ - θ0‖ / ‖θ0‖ of each layer's parameters, in their order: "layer", "relative".

  Args:
    tuned: of the final model; its `merge` is used.
    base, after: of `sides`.
  """
  end = tune.flatten({"params": tuned.merge(after.frozen, after.state.trainable)["params"]})
  kept = {**(base.state.trainable or {})}.get("params", {})
  start = tune.flatten(tune.combine(
    {"params": tuned.plain(base.frozen).get("params", {})}, {"params": kept}))
  sums = {}
  for path, leaf in end.items():
    if path not in start or np.shape(start[path]) != np.shape(leaf):
      continue
    was, now = (jnp.asarray(part, jnp.float32) for part in (start[path], leaf))
    axes = tuple(range(1, was.ndim)) if stacking.is_stacked(path) else None
    change, norm = (np.atleast_1d(jnp.sum(jnp.square(part), axes)) for part in (now - was, was))
    for i, (delta, size) in enumerate(zip(change, norm, strict=True)):
      name = layer_of(stacking.numbered(path, i) if axes is not None else path)
      total = sums.setdefault(name, np.zeros(2))
      total += float(delta), float(size)
  order = sorted(sums, key=lambda name: [int(word) if word.isdigit() else word
                                         for word in re.split(r"(\d+)", name)])
  return [{"layer": name, "relative": float(np.sqrt(sums[name][0] / max(sums[name][1], 1e-30)))}
          for name in order]


def layer_of(path: str) -> str:
  """"encoder/layer_3" of a parameter's path in it, else its module's: "classifier"."""
  path = path.removeprefix("params/")
  found = _LAYER.match(path)
  return found[1] if found else path.rpartition("/")[0] or path
