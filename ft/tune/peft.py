"""Adapters in the form of the reference implementation `peft`: adapter_config.json and
adapter_model.safetensors.

A method that `peft` has says in its own file how one layer's parameters look there (`PEFT`,
`METHOD`, `peft_config`, `to_peft`; of prompts `peft_tensors`); this file gives the rest: names of
modules as transformers' newest class has them, through the family's name table; the head and other
modules that trained in full; the configuration. Reading is in ft/tune/peft_reading.py.

Source: peft 0.21.2, whose loader decides what is right.
"""

import ast
import functools
import importlib
import json
import pathlib

import jax
import numpy as np

from ft import errors, models, tune
from ft.models import exporting
from ft.tune import adapters, saving
from ft.weights import names, stacking, tensors

VERSION = "0.21.2"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model.model."
NORMS = "LN_TUNING"
# peft_types whose layers may be convolutions, embeddings, or GPT-2's linear layers, in `peft`.
CONVOLUTIONS = ("LORA", "ADALORA", "IA3", "OFT", "LOHA", "LOKR", "HIRA")
EMBEDDINGS = ("LORA", "OFT", "HIRA", "TRAINABLE_TOKENS")
TRANSPOSED = ("LORA", "ADALORA", "IA3", "VERA", "HIRA")
TIED = ("embed_tokens", "lm_head")  # what it knows as sharing weights
# What `peft` saves of its own accord for a task_type, whatever modules_to_save says.
CLASSIFIERS = ("classifier", "score")
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
          "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "MTModel": "SEQ_2_SEQ_LM",
          "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
_HALVES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def types() -> dict[str, str]:
  """Returns {peft_type: our method}, read from the sources without importing them."""
  return dict(_types())


@functools.cache
def _types() -> tuple:
  found = [(NORMS, "freeze")]
  for path in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py")):
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PEFT":
        found.append((ast.literal_eval(node.value), path.stem.removesuffix("_peft")))
  return tuple(found)


class Modules:
  """Names of a model's modules in transformers' class for its architecture."""

  def __init__(self, pretrained: models.Pretrained):
    self.family = models.family_module(pretrained.family)
    self.rules, self.config = self.family.NAMES, pretrained.config
    self.architecture = (pretrained.config.to_hf().get("architectures") or [""])[0]
    prefix = self.family.prefixed(self.config) if hasattr(self.family, "prefixed") else None
    if prefix is None:
      usual = names.optional_part(pretrained.layout, self.rules) or True
      prefix = usual if self.config.head != "none" else False
    self.prefix = prefix

  def tensor(self, path: str) -> tuple[str, names.Rule]:
    """Returns (upstream's name, its rule) of a parameter of one layer, params/…."""
    name, rule = names.theirs(path, self.rules, self.config, self.prefix)
    if "/" in name:
      raise errors.UserError(f"{path} has no place in {self.architecture}, and so none in PEFT's "
                             "files; use --format=merged")
    return name, rule

  def of(self, path: str) -> str:
    """Returns upstream's name of the module that a parameter belongs to."""
    name, _ = self.tensor(path)
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
      raise errors.UserError(f"{path} is {name} upstream, which is no weight or bias of a module; "
                             "PEFT's files cannot hold it; use --format=merged")
    return module

  def task(self) -> str | None:
    """Returns PEFT's task_type."""
    for suffix, task in _TASKS.items():
      if self.architecture.endswith(suffix):
        return task
    bare = self.config.head == "none" and self.family.MODALITY == "text"
    return "FEATURE_EXTRACTION" if bare else None


def export(run, folder) -> None:
  """Writes the adapter of a finished run in PEFT's form.

  Args:
    run: folder of the run, or its adapter/.
    folder: see `write`.

  Raises:
    UserError: the run has no adapter, or PEFT no form for it; says what works instead.
  """
  run = pathlib.Path(run)
  adapter = run / "adapter" if (run / "adapter").is_dir() else run
  if not saving.is_adapter(adapter):
    raise errors.UserError(f"--format=peft: {run} has no adapter/ (full fine-tuning leaves none); "
                           "use --format=merged")
  base = saving.describe(adapter)["base"]
  for change in models.CHANGES:
    if base.model.get(change):
      raise errors.UserError(f"--format=peft: model.{change} changed the base model, and peft "
                             "would look for the unchanged one; use --format=merged")
  pretrained, tuned, trainable = saving.load(adapter)
  write(folder, pretrained, tuned, trainable, base.model["source"])


def write(folder, pretrained: models.Pretrained, tuned: tune.Tuned, trainable,
          source: str = "") -> None:
  """Writes a folder that `PeftModel.from_pretrained(model, folder)` opens.

  Args:
    folder: new, empty, or of an earlier adapter, which is replaced.
    pretrained: the base model.
    tuned: how it was tuned, frozen tree included.
    trainable: what trained.
    source: of the base model, as the run's config has it.

  Raises:
    UserError: PEFT has no form for what was trained; says what works instead.
  """
  writer = _Writer(pretrained, tuned, trainable)
  settings, method = tuned.settings, importlib.import_module(f"ft.tune.{tuned.settings.method}")
  if hasattr(method, "peft_tensors"):
    conf, found = writer.of_inputs(method, settings, tune.Context(pretrained))
  elif hasattr(method, "PEFT"):
    conf, found = writer.of_layers(method, settings)
  else:
    conf, found = writer.of_norms()
  with exporting.whole(folder, lambda there: (there / CONFIG).is_file(), "adapter") as staging:
    tensors.write_safetensors(
      staging / WEIGHTS, {name: np.ascontiguousarray(value) for name, value in found.items()},
      {"format": "pt"})
    conf = {**_common(source, writer.modules.task()), **conf}
    (staging / CONFIG).write_text(json.dumps(conf, indent=2, sort_keys=True) + "\n")


def _common(source: str, task: str | None) -> dict:
  named = source.removeprefix("hf:").partition("@")
  return {
    "auto_mapping": None, "base_model_name_or_path": None if ":" in named[0] else named[0] or None,
    "revision": named[2] or None, "inference_mode": True, "peft_version": VERSION,
    "task_type": task,
  }


class _Writer:
  """The content of the two files, for the three kinds of methods that PEFT has."""

  def __init__(self, pretrained, tuned, trainable):
    self.pretrained, self.modules = pretrained, Modules(pretrained)
    whole = tune.flatten(tuned.combine(tuned.plain(tuned.frozen), trainable))
    self.tree, self.flat = whole, stacking.unstack(whole)
    self.head = [path for path in self.flat if tune.under(path, pretrained.head)]
    trained = stacking.unstack(tune.flatten(trainable))
    self.also = [path for path in trained if path.startswith("params/") and path not in self.head]

  def of_inputs(self, method, settings, context) -> tuple[dict, dict]:
    """Of methods that change the model's inputs; their tensors have no module."""
    self._nothing_else("a prompt")
    found = {name: np.asarray(value, np.float32)
             for name, value in method.peft_tensors(self.flat, settings, context).items()}
    # Its head stands one level higher than that of other methods.
    found |= self._values(self.head, "base_model.")
    return {"peft_type": method.PEFT, **method.peft_config(settings, context)}, found

  def of_norms(self) -> tuple[dict, dict]:
    """Of runs that trained norms and the head only."""
    layers = sorted({path.rpartition("/")[0] for path in self.also})
    if not layers or not all("norm" in path.rpartition("/")[2] for path in layers):
      forms = ", ".join(sorted(set(types().values())))
      raise errors.UserError(
        "PEFT's files have no form for what this run trained; --format=merged writes plain "
        f"weights, where the method has any. Methods with a PEFT form: {forms} (freeze: norms "
        "only)")
    paths = [path for path in self.flat if path.rpartition("/")[0] in layers
             and path.startswith("params/")]
    targets = sorted({self.modules.of(path) for path in paths})
    found = {}
    for path in paths:
      name, array = self._dumped(path)
      module, _, leaf = name.rpartition(".")
      found[f"{ROOT}{module}.ln_tuning_layers.{leaf}"] = array
    saved = self._saved(self.head)
    return ({"peft_type": NORMS, "target_modules": targets, "modules_to_save": saved or None},
            found | self._values(self.head))

  def of_layers(self, method, settings) -> tuple[dict, dict]:
    """Of methods that adapt layers one by one."""
    adapter, found = method.METHOD(settings), {}
    layers = self._layers()
    targets = {path: self.modules.of(_weight(layer)) for path, layer in layers.items()}
    self._check_kinds(method.PEFT, layers, targets)
    conf = {"peft_type": method.PEFT, "target_modules": sorted(targets.values()), "bias": "none",
            **method.peft_config(settings)}
    for path, layer in layers.items():
      own = adapter.to_peft(self._own(path), layer)
      for suffix, array in own.items():
        found[f"{ROOT}{targets[path]}.{suffix}"] = with_axes(np.asarray(array), suffix, layer)
      for module in self._output_layers(method.PEFT, adapter, layer, targets[path]):
        conf["ensure_weight_tying"] = True
        found |= {f"{ROOT}{module}.{suffix}": np.asarray(array) for suffix, array in
                  adapter.tied_to_peft(self._own(path), layer).items()}
    shared = self._own("")
    if shared:
      found |= {f"base_model.{name}": array
                for name, array in adapter.shared_to_peft(shared).items()}
    biases = [path for path in self.also if path.endswith("/bias")
              and settings.get("bias", "none") != "none"]
    rest = [path for path in self.also if path not in biases]
    whole = [path for path in self.flat if path.startswith("params/")
             and any(path.rpartition("/")[0] == one.rpartition("/")[0] for one in rest)]
    for path in biases:
      name, array = self._dumped(path)
      module = path.removeprefix("params/").rpartition("/")[0]
      key = f"{name.removesuffix('.bias')}.base_layer.bias" if module in layers else name
      found[ROOT + key] = array
    conf["modules_to_save"] = self._saved([*self.head, *whole]) or None
    conf |= self._modules_of(adapter, layers, targets)
    return conf, found | self._values([*self.head, *whole])

  def _output_layers(self, kind: str, adapter, layer, module: str) -> list[str]:
    """Returns names of output layers that share an adapted embedding's table, to be written, too.

    Raises:
      UserError: the method, or `peft` for a module of that name, adapts one of the two only.
    """
    if layer.kind != "embedding" or kind == "TRAINABLE_TOKENS":  # of those, `peft` ties both sides
      return []
    tied = names.tied(_weight(layer), self.modules.rules, self.modules.config, self.modules.prefix)
    tied = [name.removesuffix(".weight") for name in tied]
    known = all(name.rpartition(".")[2] in TIED for name in [module, *tied])
    if tied and not (known and hasattr(adapter, "tied_to_peft")):
      raise errors.UserError(f"PEFT's {kind} cannot adapt {module} and {tied[0]}, which share "
                             "their weights, alike; --format=merged writes plain weights")
    return tied

  def _modules_of(self, adapter, layers, targets) -> dict:
    """Returns what the configuration says of single modules."""
    conf = {}
    if hasattr(adapter, "patterns_to_peft"):
      conf |= adapter.patterns_to_peft(targets)
    if hasattr(adapter, "feedforward"):
      conf["feedforward_modules"] = sorted(
        targets[path] for path, layer in layers.items() if adapter.feedforward(layer))
    rules = [self.modules.tensor(_weight(layer))[1] for layer in layers.values()
             if layer.kind == "linear"]
    if any(rule.transform == "same" for rule in rules):
      conf["fan_in_fan_out"] = True
    return conf

  def _layers(self) -> dict[str, adapters.Layer]:
    """Returns {module path with its number: Layer} of what is adapted."""
    prefix = adapters.COLLECTION + "/"
    adapted = {path.removeprefix(prefix).rpartition("/")[0] for path in self.tree
               if path.startswith(prefix)} - {""}
    known = adapters.layers_of(self.pretrained.variables)  # a quantised base has no kernels
    layers = {}
    for path in sorted(adapted):
      bias = self.tree.get(f"params/{path}/bias")
      for layer in adapters.expand(path, known[path], bias, jax.random.PRNGKey(0)):
        layers[layer.path] = layer
    return layers

  def _own(self, path: str) -> dict:
    """Returns {name: array} of one layer's adapter; of "", what layers share."""
    place = f"{adapters.COLLECTION}/{path}".rstrip("/")
    return {name.rpartition("/")[2]: leaf for name, leaf in self.flat.items()
            if name.rpartition("/")[0] == place}

  def _check_kinds(self, kind: str, layers, targets) -> None:
    for what, allowed, kinds in (("convolutions", CONVOLUTIONS, ("conv", "pointwise", "depthwise")),
                                 ("embeddings", EMBEDDINGS, ("embedding",))):
      wrong = [path for path, layer in layers.items() if layer.kind in kinds]
      if wrong and kind not in allowed:
        raise errors.UserError(f"PEFT's {kind} has no form for {what}, such as {wrong[0]}; "
                               "--format=merged writes plain weights")
    turned = [path for path, layer in layers.items() if layer.kind == "linear"
              and self.modules.tensor(_weight(layer))[1].transform == "same"]
    if turned and kind not in TRANSPOSED:
      raise errors.UserError(
        f"PEFT's {kind} has no form for layers such as {targets[turned[0]]}, which hold their "
        "weights transposed; --format=merged writes plain weights")

  def _nothing_else(self, what: str) -> None:
    if self.also:
      raise errors.UserError(f"PEFT's files cannot hold {', '.join(self.also[:3])} beside {what}")

  def _dumped(self, path: str) -> tuple[str, np.ndarray]:
    """Returns (upstream's name, array in its layout) of a parameter."""
    name, rule = self.modules.tensor(path)
    array = rule.functions().dump(np.asarray(self.flat[path]))
    return name, np.asarray(array, np.float32) if array.dtype.kind == "V" else array

  def _values(self, paths, root: str = ROOT) -> dict:
    return {root + name: array for name, array in map(self._dumped, paths)}

  def _saved(self, paths) -> list[str]:
    """Returns modules_to_save, the classifier as a whole where `peft` saves that anyway."""
    found = {self.modules.of(path) for path in paths}
    top = {module: module.partition(".")[0] for module in found}
    return sorted({top[module] if top[module] in CLASSIFIERS else module for module in found})


def _weight(layer: adapters.Layer) -> str:
  """Returns the path of a layer's kernel or table."""
  return f"params/{layer.path}/{'embedding' if layer.kind == 'embedding' else 'kernel'}"


def with_axes(array: np.ndarray, suffix: str, layer: adapters.Layer) -> np.ndarray:
  """Returns a matrix of LoRA with the two axes of a 1x1 convolution, which torch has and we not."""
  if layer.kind != "pointwise" or suffix not in _HALVES or array.ndim == 4:
    return array
  return array[None, :, None, None] if array.ndim == 1 else array[:, :, None, None]


def without_axes(array: np.ndarray, suffix: str, layer: adapters.Layer) -> np.ndarray:
  """The inverse of `with_axes`."""
  if layer.kind != "pointwise" or suffix not in _HALVES:
    return array
  return array.reshape(-1) if suffix == "lora_magnitude_vector" else array[:, :, 0, 0]
