"""Export: a model written in its upstream layout, read back, compared, then put in place."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors, models
from ft.weights import names, stacking, tensors

SHARD_BYTES = 5 * 10**9
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def export(pretrained, folder, metadata: dict | None = None,
           shard_bytes: int = SHARD_BYTES) -> None:
  """Writes a model in its upstream layout, reads it back and compares, then puts it in place.

  Args:
    pretrained: the model; `variables` without adapters.
    folder: where to: new, empty, or an earlier export, which is replaced.
    metadata: str -> str for the header of the weights.
    shard_bytes: a model of more is written in several files with an index.

  Raises:
    TrainingFailed: what was written does not read back as the same model.
    UserError: the folder holds something else, or cannot be written.
  """
  holds = lambda there: (there / "config.json").is_file() and any(  # noqa: E731
    (there / name).is_file() for name in _WEIGHTS)
  with whole(folder, holds, "model") as staging:
    _write(pretrained, staging, metadata or {}, shard_bytes)
    _compare(pretrained, staging)


@contextlib.contextmanager
def whole(folder, holds: Callable[[pathlib.Path], bool], what: str):
  """Gives a temporary folder that becomes `folder` at the end, unless an exception ends it.

  Args:
    folder: new, empty, or one that `holds` what was written before, which is replaced.
    holds: whether an existing folder is of that kind.
    what: "model" or "adapter", for messages.

  Raises:
    UserError: the folder holds something else, or cannot be written.
  """
  folder = pathlib.Path(folder).absolute()
  if folder.exists() and not (folder.is_dir() and (holds(folder) or not any(folder.iterdir()))):
    raise errors.UserError(f"{folder} exists and is not an exported {what}; name another folder")
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
      yield staging
      staging.chmod(0o777 & ~_umask())
      _swap(staging, folder)
    finally:
      shutil.rmtree(staging, ignore_errors=True)
  except OSError as e:
    raise errors.UserError(f"cannot write the {what} to {folder}: {e}") from e


def _write(pretrained, folder, metadata, shard_bytes) -> None:
  """Writes weights, config.json and companions into an empty folder."""
  module, config = models.family_module(pretrained.family), pretrained.config
  hf = config.to_hf()
  stated = json.loads(getattr(config, "source", "{}")).get("architectures")
  prefix = None if hf.get("architectures") == stated else config.head != "none"
  if hasattr(module, "prefixed"):
    prefix = module.prefixed(config)
  leaves = stacking.unstack(names.flatten(pretrained.variables))
  dumped = names.dump_tree(leaves, module.NAMES, pretrained.layout, config=config, prefix=prefix)
  parts = {}
  for name, tensor in dumped.items():
    part, _, name = name.rpartition("/")
    parts.setdefault(part, {})[name] = tensor
  for part, content in parts.items():
    (folder / part).mkdir(exist_ok=True)
    # transformers opens a file only if its header states this format.
    tensors.write_sharded(folder / part, content, shard_bytes, {"format": "pt", **metadata})
  floats = [t.dtype for t in parts.get("", {}).values() if jnp.issubdtype(t.dtype, np.floating)]
  widest = max(floats, key=lambda dtype: dtype.itemsize)
  hf.update({key: widest.name for key in ("dtype", "torch_dtype") if key in hf})
  files = pretrained.files
  if hasattr(module, "companions"):
    files = module.companions(config, files)
  (folder / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
  for name, content in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def _compare(pretrained, folder) -> None:
  """Raises TrainingFailed unless the folder reads back as the same model with the same outputs."""

  def fail(what):
    raise errors.TrainingFailed(f"the exported model does not read back as the same: {what}")

  try:
    again = models.load(str(folder), family=pretrained.family, compute=pretrained.module.compute)
  except errors.UserError as e:
    fail(e)
  for config in (pretrained.config, pretrained.module.config):
    if again.config != config:
      fail(f"its config is {again.config}, was {config}")
  if again.report.initialised or again.report.ignored:
    fail(str(again.report))
  was, now = names.flatten(pretrained.variables), names.flatten(again.variables)
  if was.keys() != now.keys():
    fail(f"parameters {sorted(was.keys() ^ now.keys())}")
  for path, leaf in was.items():
    now[path] = now[path].astype(leaf.dtype)
    if np.asarray(now[path]).tobytes() != np.asarray(leaf).tobytes():
      fail(f"{path} has other values")
  probe = models.family_module(pretrained.family).probe_inputs(pretrained.config)
  # Equal configs make equal modules, so one program serves both.
  run = jax.jit(lambda v: pretrained.module.apply(v, **probe))
  want, got = run(pretrained.variables), run(names.unflatten(now))
  for name, value in want.items():
    same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), value, got[name])
    if not jax.tree.all(same):
      fail(f"on a probe batch, {name} is another")


def _swap(staging, folder) -> None:
  """Puts a finished folder in the place of another, which stays until the last moment."""
  if not folder.exists():
    staging.rename(folder)
    return
  old = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
  folder.rename(old / "model")
  staging.rename(folder)
  shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
