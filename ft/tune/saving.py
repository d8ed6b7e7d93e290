"""What a run leaves beside a merged model: `adapter/`, the parameters that it made or changed.

The folder holds ft_adapter.safetensors (our paths -> arrays, layer by layer), the tokenizer and the
like, and ft.json: what prediction needs, the base model as the run loaded it, and the section
`tune`. `load` puts all of it together again, also for methods that plain weights cannot compute.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import config_dict

from ft import config as config_lib
from ft import errors, models, state, tune
from ft.models import exporting
from ft.tune import adapters, quantize
from ft.weights import stacking, tensors

WEIGHTS = "ft_adapter.safetensors"
_SAMPLE = 64  # values of a frozen leaf that the base is recognised by


@dataclasses.dataclass(frozen=True)
class Base:
  """How a run loaded the model that an adapter stands on.

  Attributes:
    model: the section `model` as JSON types.
    arguments: what the task asked of it; see `models.load_config`.
    seed: of the run; frozen parameters that were made anew and random projections follow from it.
    path: where a source that is a folder was; "" for pypi: and hf:.
    fingerprint: of the frozen parameters; "" is not compared.
  """

  model: dict
  arguments: dict
  seed: int
  path: str = ""
  fingerprint: str = ""

  def load(self, sharding=None) -> models.Pretrained:
    """Returns the model; UserError if it is not found."""
    known = {key: entry[0] for key, entry in models.KEYS.items()}  # of adapters older than a key
    section = config_dict.ConfigDict({**known, **self.model, "source": self.source()})
    return models.load_config(section, self.arguments, jax.random.PRNGKey(self.seed), sharding)

  def source(self) -> str:
    """Returns the source, a folder where it was or as it was named; UserError if it is gone."""
    named = self.model["source"]
    if not self.path:
      return named
    for place in (self.path, named):
      if pathlib.Path(place).exists():
        return place
    raise errors.UserError(
      f"the base model of this adapter, {named}, is not at {self.path} any more; put it back, or "
      'correct "path" under "base" in the adapter\'s ft.json')


def save(folder, pretrained, tuned: tune.Tuned, frozen, changed, base: Base, spec: dict) -> None:
  """Writes an adapter folder, reads it back, compares outputs, then puts it in place.

  Args:
    folder: where to: new, empty, or an earlier adapter, which is replaced.
    pretrained: the base model; its variables are not looked at.
    tuned: how it was tuned; its trees are not looked at.
    frozen: `tuned.frozen` where it is now.
    changed: the trained tree, with statistics that training updated.
    base: how to load the base model; path and fingerprint are filled in here.
    spec: JSON types; further content of ft.json.

  Raises:
    TrainingFailed: what was written does not read back, or gives other outputs.
    UserError: the folder holds something else, or cannot be written.
  """
  source = str(base.model["source"])
  named = source.startswith(("pypi:", "hf:", models.SCRATCH))
  there = "" if named else str(pathlib.Path(source).absolute())
  base = dataclasses.replace(base, path=there, fingerprint=_fingerprint(frozen))
  fixed = {path: leaf for path, leaf in tune.flatten(frozen).items()
           if path.startswith(adapters.COLLECTION + "/")}
  leaves = stacking.unstack({**fixed, **tune.flatten(changed)})
  content = {**spec, "base": dataclasses.asdict(base), "tune": config_lib.to_json(tuned.settings)}
  with exporting.whole(folder, is_adapter, "adapter") as staging:
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    tensors.write_safetensors(staging / WEIGHTS, arrays)
    for name, data in pretrained.files.items():
      (staging / name).parent.mkdir(parents=True, exist_ok=True)
      (staging / name).write_bytes(data)
    (staging / "ft.json").write_text(json.dumps(content, indent=1) + "\n")
    _compare(staging, pretrained, tuned, tuned.combine(frozen, changed), arrays)


def is_adapter(folder) -> bool:
  """Returns whether a folder is one that `save` wrote."""
  return (pathlib.Path(folder) / WEIGHTS).is_file()


def describe(folder) -> dict:
  """Returns what ft.json of an adapter folder holds; UserError if it is damaged or not there."""
  path = pathlib.Path(folder) / "ft.json"
  try:
    spec = json.loads(path.read_text())
    return {**spec, "base": Base(**spec["base"]), "tune": config_dict.ConfigDict(spec["tune"])}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.UserError(
      f"{path}: not the description of an adapter that ft wrote ({e})") from None


def load(folder, sharding=None) -> tuple[models.Pretrained, tune.Tuned, tune.Tree]:
  """Loads an adapter and the base model it stands on.

  Args:
    folder: that `save` wrote.
    sharding: shape of a parameter -> jax Sharding; the default device if None.

  Returns:
    (base model, how it is tuned, what trained); `tuned.frozen` is complete.

  Raises:
    UserError: the folder is damaged, its base model is not found or is another one.
  """
  spec, leaves = describe(folder), read(folder)
  base, settings = spec["base"], spec["tune"]
  pretrained = base.load(sharding)
  tuned = _split(settings, pretrained, leaves, jax.random.PRNGKey(base.seed))
  tuned = fill(tuned, leaves, str(folder), settings)
  if base.fingerprint and base.fingerprint != _fingerprint(tuned.frozen):
    raise errors.UserError(f"{folder}: {base.source()} is another model than the one that this "
                           "adapter was trained on; the adapter would not mean the same there")
  return pretrained, tuned, tuned.trainable


def read(folder) -> dict[str, tensors.LazyTensor]:
  """Returns {our path, of one layer: tensor} of an adapter folder."""
  return tensors.open_tensors(pathlib.Path(folder) / WEIGHTS)


def _split(settings, pretrained, leaves: Mapping, rng, context=None) -> tune.Tuned:
  """Returns the split that a run had, without the values of `leaves`.

  Where no module has adapters, the paths say what trained, and the method need not choose again.
  """
  if any(path.startswith(adapters.COLLECTION + "/") for path in leaves):
    # Choices that a gradient made stand in the file; what stands in for it here decides nothing.
    some = lambda: {"params": pretrained.variables["params"]}  # noqa: E731
    return tune.init(settings, pretrained.variables, rng, pretrained.head,
                     context or tune.Context(pretrained, some))
  places = {place for path in leaves for place in (path, stacking.split(path)[0])}
  tuned = tune.build(*tune.split(pretrained.variables, lambda path: path in places),
                     pretrained.head)
  return quantize.apply(tuned, settings, pretrained.head, context or tune.Context(pretrained))


def start(config, variables, rng, head, context) -> tune.Tuned:
  """Returns the split of a method with a run's adapter at `config.init` in it; see `ft.tune.init`.

  The settings of that run replace the config's.

  Raises:
    UserError: it is of another method, or does not fit the model.
  """
  settings = describe(config.init)["tune"]
  if settings.method != config.method:
    raise errors.UserError(f"tune.init={config.init} was tuned by {settings.method}: set "
                           f"tune.method={settings.method} (it is {config.method})")
  logging.info("tune.init=%s brings the settings of its run: %s", config.init,
               config_lib.to_json(settings))
  leaves = dict(read(config.init))
  expected = stacking.unstack(tune.flatten(variables))
  for path in [path for path in leaves if tune.under(path, head) and path in expected]:
    if leaves[path].shape != expected[path].shape:
      logging.warning("tune.init=%s: %s is a head for other labels; this run's starts anew",
                      config.init, path)
      del leaves[path]
  tuned = _split(settings, context.pretrained, leaves, rng, context)
  return fill(tuned, leaves, f"tune.init={config.init}", settings, rest=True)


def fill(tuned: tune.Tuned, leaves: Mapping[str, Any], where: str, settings,
         rest: bool = False) -> tune.Tuned:
  """Returns a split whose leaves have other values.

  Args:
    tuned: the split.
    leaves: our path, of one layer -> array or LazyTensor; of what trains or is frozen.
    where: what errors call their origin.
    settings: the section `tune` in force.
    rest: whether what trains and is not among the leaves stays as it is.

  Raises:
    UserError: names leaves without a place, those that are missing, and those of another shape.
  """
  trees = {"trainable": tune.flatten(tuned.trainable), "frozen": tune.flatten(tuned.frozen)}
  place = {path: tree for tree in trees.values() for path in tree}
  apart = stacking.unstack({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                            for tree in trees.values() for path, leaf in tree.items()})
  problems = [f"  without a place in the model: {path}" for path in leaves if path not in apart]
  problems += [f"  {path}: has {tuple(leaves[path].shape)}, needs {tuple(apart[path].shape)}"
               for path in leaves if path in apart and leaves[path].shape != apart[path].shape]
  needed = stacking.unstack({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                             for path, leaf in trees["trainable"].items()})
  problems += [f"  missing: {path}" for path in needed if path not in leaves and not rest]
  if problems:
    shown = problems[:20] + [f"  and {len(problems) - 20} more"] * (len(problems) > 20)
    raise errors.UserError(f"{where} does not fit the model and its tuning:\n" + "\n".join(shown))
  groups = {}
  for path in leaves:
    target = path if path in place else stacking.split(path)[0]
    groups.setdefault(target, {})[stacking.split(path)[1]] = leaves[path]
  for target, parts in groups.items():
    old = place[target][target]
    if stacking.is_stacked(target):
      kept = {i: old[i] for i in range(old.shape[0]) if i not in parts}
      whole = {**kept, **{i: _array(part) for i, part in parts.items()}}
      new = np.stack([np.asarray(whole[i]) for i in range(old.shape[0])])
    else:
      (part,) = parts.values()
      new = _array(part)
    place[target][target] = jax.device_put(jnp.asarray(new, old.dtype), old.sharding)
  return dataclasses.replace(tuned, trainable=tune.unflatten(trees["trainable"]),
                             frozen=tune.unflatten(trees["frozen"]), settings=settings)


def _array(leaf) -> np.ndarray:
  return leaf.read() if isinstance(leaf, tensors.LazyTensor) else leaf


def _fingerprint(frozen) -> str:
  """Returns a digest of shapes and a few values of the frozen parameters; "" if there are none."""
  flat = stacking.unstack({path: leaf for path, leaf in tune.flatten(frozen).items()
                           if path.startswith("params/")})
  digest = hashlib.sha256()
  for path in sorted(flat)[::max(1, len(flat) // 8)]:
    values = np.asarray(flat[path].reshape(-1)[:_SAMPLE])
    digest.update(f"{path} {flat[path].shape} {values.dtype}".encode() + values.tobytes())
  return digest.hexdigest() if flat else ""


def _compare(folder, pretrained, tuned, variables, arrays) -> None:
  """Raises TrainingFailed unless the folder gives the same parameters and the same outputs."""
  try:
    again, tuning, trainable = load(folder)
  except errors.UserError as e:
    raise errors.TrainingFailed(f"the written adapter does not read back: {e}") from e
  now = stacking.unstack(tune.flatten(tuning.combine(tuning.frozen, trainable)))
  for path, array in arrays.items():
    if np.asarray(now[path]).tobytes() != array.tobytes():
      raise errors.TrainingFailed(f"the written adapter reads back with other values of {path}")
  want = probe(pretrained, tuned, variables)
  got = probe(again, tuning, tuning.combine(tuning.frozen, trainable))
  exact = pretrained.module.compute.dtype == jnp.float32
  worst = difference(want, got)
  if not worst <= (1e-5 if exact else 2e-2):
    raise errors.TrainingFailed(
      f"the written adapter gives other outputs on a probe batch, by {worst:.1e} of the largest")


def probe(pretrained, tuned, variables) -> dict:
  """Returns what a tuned model gives for its family's probe batch."""
  inputs = models.family_module(pretrained.family).probe_inputs(pretrained.config)
  apply = state.make_apply(pretrained.module, tuned.interceptor, tuned.around)
  return jax.device_get(jax.jit(lambda variables: apply(variables, inputs)[0])(variables))


def difference(want, got) -> float:
  """Returns the largest difference of two trees of outputs, relative to the largest value."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if a.shape != b.shape or not np.array_equal(np.isnan(a), np.isnan(b)):
      return float("inf")
    size = max(np.abs(np.nan_to_num(a)).max(initial=0), 1e-6)
    worst = max(worst, float(np.abs(np.nan_to_num(a) - np.nan_to_num(b)).max(initial=0) / size))
  return worst
