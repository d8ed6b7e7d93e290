"""Adapters that `peft` wrote, read into a method of ours; the counterpart of ft/tune/peft.py.

The file's peft_type decides the method and its configuration the settings. Nothing is guessed: a
tensor without a layer, a layer without its tensors and a tensor of another shape are errors, and
so are files that mean something only together with code that they name.
"""

import importlib
import json
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from absl import logging

from ft import errors, tune
from ft.tune import adapters, peft, saving
from ft.weights import names, stacking, tensors

_SHOWN = 10
# What bias="all" leaves in files beside the biases themselves; `peft` ignores it, too.
_LEAKED = re.compile(r"\.(modules_to_save|original_module)\.(\w+\.)*bias$")
TIED = " (output layer)"  # behind the path of an embedding: the layer that has the same weights


def locate(folder) -> pathlib.Path:
  """Returns the folder that holds adapter_config.json: this, or its only sub-folder that does.

  Raises:
    UserError: there is none, or there are several.
  """
  folder = pathlib.Path(folder)
  if (folder / peft.CONFIG).is_file():
    return folder
  inner = sorted(path.parent for path in folder.glob(f"*/{peft.CONFIG}"))
  if len(inner) == 1:
    return inner[0]
  if inner:
    raise errors.UserError(f"tune.init={folder}: holds several adapters, name one: "
                           + ", ".join(map(str, inner)))
  raise errors.UserError(f"tune.init={folder}: no adapter there; it should hold {peft.CONFIG} and "
                         f"{peft.WEIGHTS}, or be the adapter/ of a run")


def open_folder(folder) -> tuple[dict, dict]:
  """Returns (configuration, {name: LazyTensor}) of an adapter; see `locate`.

  Raises:
    UserError: damaged, pickled, or of a kind that we do not compute.
  """
  folder = locate(folder)
  path = folder / peft.CONFIG
  try:
    conf = json.loads(path.read_text())
  except (ValueError, OSError) as e:
    raise errors.UserError(f"{path}: cannot be read as JSON: {e}") from None
  if not isinstance(conf, dict) or not isinstance(conf.get("peft_type"), str):
    raise errors.UserError(f"{path}: has no peft_type, so the method is not known")
  known = peft.types()
  if conf["peft_type"] not in known:
    near = errors.suggest(conf["peft_type"].upper(), known)
    raise errors.UserError(f"{path}: peft_type {conf['peft_type']!r} is none that can be read{near}"
                           f": {', '.join(sorted(known))}")
  if not (folder / peft.WEIGHTS).is_file():
    if (folder / peft.PICKLE).is_file():
      raise errors.UserError(
        f"{folder / peft.PICKLE} is a pickle, which can run code when it is opened, and is "
        "refused; where you trust it, load it with peft and save_pretrained: that writes "
        "safetensors")
    raise errors.UserError(f"{folder}: {peft.WEIGHTS} is missing")
  return conf, tensors.open_tensors(folder / peft.WEIGHTS)


def start(config, variables, rng, head, context) -> tune.Tuned:
  """Returns the split of a method with the adapter at `config.init` in it; see `ft.tune.init`.

  The folder is one of PEFT's, or the adapter/ of a run; its settings replace the config's.

  Raises:
    UserError: no adapter there, or it is of another method, or does not fit the model.
  """
  if context is None or context.pretrained is None:
    raise errors.UserError("tune.init needs the loaded model; it is read by runs only")
  if saving.is_adapter(config.init):
    return saving.start(config, variables, rng, head, context)
  conf, opened = open_folder(config.init)
  kind = conf["peft_type"]
  method_name = peft.types()[kind]
  if config.method != method_name:
    raise errors.UserError(f"tune.init={config.init} is a {kind} adapter: set "
                           f"tune.method={method_name} (it is {config.method})")
  method = importlib.import_module(f"ft.tune.{method_name}")
  reader = _Reader(config.init, conf, opened, variables, head, context.pretrained)
  if hasattr(method, "peft_leaves"):
    return reader.of_inputs(method, config, rng, context)
  if kind == peft.NORMS:
    return reader.of_norms(config, rng, context)
  return reader.of_layers(method, config, rng, context)


class _Reader:
  """The tensors of one file, sorted by where they belong."""

  def __init__(self, where, conf, opened, variables, head, pretrained):
    self.where, self.conf, self.variables, self.head = where, conf, variables, head
    self.pretrained = pretrained
    self.modules = peft.Modules(pretrained)
    self.whole = tune.flatten(variables)
    self.apart = stacking.unstack(self.whole)
    self.layers: dict[str, dict] = {}  # our module path -> suffix -> tensor
    self.named: dict[str, str] = {}  # our module path -> upstream's name in this file
    self.values: dict[str, np.ndarray] = {}  # path of a parameter -> value
    self.shared: dict[str, tensors.LazyTensor] = {}
    self.unmatched: list[str] = []
    for name, tensor in opened.items():
      self._sort(name, tensor)

  def _sort(self, name: str, tensor) -> None:
    if self.conf.get("bias") == "all" and _LEAKED.search(name):
      return
    rest = name.removeprefix(peft.ROOT) if name.startswith(peft.ROOT) else (
      name.removeprefix("base_model."))
    if "." not in rest:
      self.shared[rest] = tensor
      return
    plain = re.sub(r"\.(base_layer|ln_tuning_layers|modules_to_save)\.(weight|bias)$", r".\2", rest)
    path, rule = names.ours(plain, self.modules.rules, self.modules.config)
    if path in self.apart and rule.transform != "tied":
      self._value(name, path, rule, tensor)
      return
    parts = rest.split(".")
    for cut in range(len(parts) - 1, 0, -1):
      module, suffix = ".".join(parts[:cut]), ".".join(parts[cut:])
      path, rule = names.ours(module + ".weight", self.modules.rules, self.modules.config)
      if path in self.apart:
        ours = path.removeprefix("params/").rpartition("/")[0]
        place = ours + (TIED if rule.transform == "tied" else "")
        self.layers.setdefault(place, {})[suffix] = tensor
        self.named[place] = module
        return
    self.unmatched.append(name)

  def _value(self, name, path, rule, tensor) -> None:
    array = np.asarray(rule.functions().load(tensor.read()))
    if array.shape == self.apart[path].shape:
      self.values[path] = array
    elif tune.under(path, self.head):
      logging.warning("%s: %s is a head for other labels, %s; this run's starts anew", self.where,
                      name, array.shape)
    else:
      raise errors.UserError(f"tune.init={self.where}: {name} has shape {tensor.shape}; {path} of "
                             f"this model has {tuple(self.apart[path].shape)}")

  def of_layers(self, method, config, rng, context) -> tune.Tuned:
    """Of a method that adapts layers one by one."""
    known = adapters.layers_of(self.variables, self.head)
    apart = {layer.path: path for path, found in known.items()
             for layer in adapters.expand(path, found, None, rng)}
    self._ties(method)
    lost = {path for path in self.layers if path not in apart}
    self.unmatched += [f"{self.named[path]}.{suffix}" for path in sorted(lost)
                       for suffix in self.layers[path]]
    for path in lost:
      del self.layers[path]
    if not self.layers:
      raise errors.UserError(self._nothing(known))
    self._check_unmatched()
    values = {**method.peft_values(self.conf), **self._patterns(method)}
    places = sorted({apart[path] for path in self.layers})
    self._check_stacks(places, apart)
    if "targets" in method.KEYS:
      values["targets"] = [f"^{re.escape(path)}$" for path in places]
    values["also_train"] = [*config.also_train, *self._modules(method, values)]
    settings = _settings(config, values, self.where)
    tuned = method.init(settings, self.variables, rng, self.head, context)
    leaves = self._leaves(method.METHOD(settings), known, apart, tuned, rng)
    return self._filled(tuned, {**leaves, **self.values}, settings)

  def _ties(self, method) -> None:
    """Drops a tied output layer's share of an embedding's adapter, which acts on both sides here.

    Raises UserError where the method would adapt one of the two sides only.
    """
    table = [path for path in self.layers if f"params/{path}/embedding" in self.apart]
    shared = {path for path in table if names.tied(
      f"params/{path}/embedding", self.modules.rules, self.modules.config)}
    if table and hasattr(method, "check_tying"):
      method.check_tying(self.conf, bool(shared))
    for path in shared:
      self.layers.pop(path + TIED, None)

  def _patterns(self, method) -> dict:
    """Returns settings that follow from what the configuration says of single modules."""
    by_name = {self.named[path]: path for path in self.layers}
    values = {}
    if hasattr(method, "patterns_from_peft"):
      values |= method.patterns_from_peft(self.conf, by_name)
    given = self.conf.get("feedforward_modules")
    if given is not None:
      fits = (lambda module: re.fullmatch(given, module)) if isinstance(given, str) else (
        lambda module: module.endswith(tuple(given)))
      values["feedforward"] = [f"^{re.escape(path)}$" for module, path in by_name.items()
                               if fits(module)]
    return values

  def _check_stacks(self, places, apart) -> None:
    torn = [path for path, place in apart.items()
            if place in places and path not in self.layers]
    if torn:
      raise errors.UserError(
        f"tune.init={self.where}: has nothing for {', '.join(torn[:_SHOWN])}, which model.scan "
        "stacks with layers that it adapts; set model.scan=False")

  def _modules(self, method, values) -> list[str]:
    """Returns expressions of what the file holds in full, beside the head and the biases."""
    bias = values.get("bias", "none") if "bias" in getattr(method, "KEYS", {}) else "none"
    return [f"^{re.escape(place)}$" for place in sorted({
      path if path in self.whole else stacking.split(path)[0] for path in self.values
      if not tune.under(path, self.head) and not (bias != "none" and path.endswith("/bias"))
      and path.removeprefix("params/").rpartition("/")[0] not in self.layers})]

  def _leaves(self, adapter, known, apart, tuned, rng) -> dict:
    """Returns {path: array} of all adapters; checks names and shapes of the file's tensors."""
    flat = stacking.unstack({path: leaf for tree in (tuned.trainable, tuned.frozen)
                             for path, leaf in tune.flatten(tree).items()
                             if path.startswith(adapters.COLLECTION + "/")})
    own: dict[str, dict] = {}
    for path, leaf in flat.items():
      module, _, name = path.removeprefix(adapters.COLLECTION + "/").rpartition("/")
      own.setdefault(module, {})[name] = leaf
    leaves, problems = {}, []
    common = own.pop("", {})
    if common:
      problems += _differences("", adapter.shared_to_peft(common), self.shared)
    elif self.shared:
      problems += [f"  without a layer: {name}" for name in self.shared]
    groups = {place: adapters.expand(place, known[place], self.whole.get(f"params/{place}/bias"),
                                     rng) for place in {apart[path] for path in self.layers}}
    every = [layer for group in groups.values() for layer in group]
    for layer in every:
      made, wrong = self._layer(adapter, layer, own.get(layer.path, {}))
      problems += wrong
      leaves |= {f"{adapters.COLLECTION}/{layer.path}/{name}": a for name, a in made.items()}
    if problems:
      more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
      raise errors.UserError(f"tune.init={self.where} does not fit the model:\n"
                             + "\n".join(problems[:_SHOWN] + more))
    if common:
      for part in adapter.shared_from_peft({k: v.read() for k, v in self.shared.items()}):
        leaves |= {f"{adapters.COLLECTION}/{k}": np.asarray(v) for k, v in part.items()}
    return leaves

  def _layer(self, adapter, layer, own: dict) -> tuple[dict, list]:
    """Returns ({name: array} of one layer, lines on names and shapes that do not fit it)."""
    found = self.layers[layer.path]
    wanted = {suffix: peft.with_axes(np.asarray(array), suffix, layer)
              for suffix, array in adapter.to_peft(own, layer).items()}
    problems = _differences(self.named[layer.path] + ".", wanted, found)
    if problems and set(wanted) != set(found):
      return {}, problems
    try:  # which also takes what a file may leave out, such as ranks that were pruned
      made = adapter.from_peft({suffix: peft.without_axes(tensor.read(), suffix, layer)
                                for suffix, tensor in found.items()}, layer)
    except (ValueError, IndexError, errors.UserError):
      if not problems:
        raise
      return {}, problems
    made = {name: np.asarray(array) for part in made for name, array in part.items()}
    same = {name: a.shape for name, a in made.items()} == {n: a.shape for n, a in own.items()}
    return made, [] if same else problems

  def of_norms(self, config, rng, context) -> tune.Tuned:
    """Of a file that holds norms in full."""
    self.unmatched += [f"{self.named[path]}.{suffix}" for path, found in self.layers.items()
                       for suffix in found]
    chosen = sorted({path if path in self.whole else stacking.split(path)[0]
                     for path in self.values if not tune.under(path, self.head)})
    if not chosen:
      raise errors.UserError(self._nothing({}))
    self._check_unmatched()
    train = [f"^{re.escape(path)}$" for path in chosen]
    settings = _settings(config, {"select": "regex", "train": train}, self.where)
    method = importlib.import_module("ft.tune.freeze")
    return self._filled(method.init(settings, self.variables, rng, self.head, context),
                        self.values, settings)

  def of_inputs(self, method, config, rng, context) -> tune.Tuned:
    """Of a method that changes the model's inputs."""
    self._check_unmatched()
    settings = _settings(config, method.peft_values(self.conf), self.where)
    found = {name: np.asarray(tensor.read(), np.float32) for name, tensor in self.shared.items()}
    tuned = method.init(settings, self.variables, rng, self.head, context)
    leaves = stacking.unstack({path: np.asarray(leaf) for path, leaf in
                               method.peft_leaves(found, settings, context).items()})
    return self._filled(tuned, {**leaves, **self.values}, settings)

  def _filled(self, tuned, leaves: Mapping, settings) -> tune.Tuned:
    return saving.fill(tuned, leaves, f"tune.init={self.where}", settings, rest=True)

  def _nothing(self, known) -> str:
    there = sorted({self.modules.of(f"params/{path}/kernel") for path in known
                    if f"params/{path}/kernel" in self.apart})
    return (f"tune.init={self.where}: the adapter matches nothing in this model "
            f"({self.modules.architecture}); unmatched: {_some(self.unmatched)}"
            + (f"; the model's layers are named as {_some(there)}" if there else ""))

  def _check_unmatched(self) -> None:
    if self.unmatched:
      raise errors.UserError(f"tune.init={self.where}: the adapter fits this model "
                             f"({self.modules.architecture}) only in part; tensors without a layer:"
                             "\n  " + _some(self.unmatched, "\n  "))


def _differences(module: str, wanted: Mapping, found: Mapping) -> list[str]:
  """Returns lines on names and shapes in which a file's tensors differ from a layer's."""
  lines = [f"  without a layer: {module}{name}" for name in found if name not in wanted]
  for name, like in wanted.items():
    if name not in found:
      lines.append(f"  missing: {module}{name} {tuple(np.shape(like))}")
    elif tuple(found[name].shape) != tuple(np.shape(like)):
      lines.append(f"  {module}{name}: has {tuple(found[name].shape)}, needs "
                   f"{tuple(np.shape(like))}")
  return lines


def _settings(config, values: Mapping, where):
  """Returns the section `tune` with a file's values in place of its own; logs what changed."""
  settings = config.copy_and_resolve_references()
  settings.unlock()
  changed = {key: value for key, value in values.items() if settings.get(key) != value}
  with settings.ignore_type():
    settings.update({**values, "init": ""})
  if changed:
    shown = {key: value if len(str(value)) < 60 else f"{len(value)} entries"
             for key, value in changed.items()}
    logging.info("tune.init=%s sets %s", where,
                 ", ".join(f"tune.{key}={value}" for key, value in sorted(shown.items())))
  return settings


def _some(items: list, by: str = ", ") -> str:
  more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
  return by.join([*items[:_SHOWN], *more])
