"""The name table: the one place where upstream names stand, read both ways.

A family's `NAMES` is a list of `Rule`s. Loading reads it forwards, export backwards:

    Rule("[bert.]encoder.layer.{i}.output.dense.weight", "params/encoder/layer_{i}/output/kernel",
         "transpose")

Patterns of upstream names know: `{i}`, a number that our path repeats; `[bert.]`, a part that may
be absent (which of the two it was is remembered for export), also with alternatives,
`[vit.|deit.]`; `(weight|gamma)`, alternatives, of which the first is written for a tensor that was
not loaded; `{*}`, any rest (of tensors not used). Names of tensors in a sub-folder of the
checkpoint start with it: `2_Dense/linear.weight`.

Several rules may give the same path of ours: names of other versions of a checkpoint. The first is
written for a tensor that was not loaded. A rule with the transform "tied" is another name of a
tensor that has one already: a file may hold both, equal, or either.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from ft import errors
from ft.weights import tensors as tensors_lib

_SHOWN = 10  # mismatches of one kind that an error spells out


@dataclasses.dataclass(frozen=True)
class Transform:
  """An invertible change of layout of a numpy array: dump(load(a)) is a, bitwise."""

  load: Callable[[np.ndarray], np.ndarray]
  dump: Callable[[np.ndarray], np.ndarray]


# A family whose layout is none of these adds its own pair here by name.
TRANSFORMS = {
    "same": Transform(lambda a: a, lambda a: a),
    # A torch linear layer's (out, in) <-> kernel (in, out).
    "transpose": Transform(lambda a: a.T, lambda a: a.T),
    # A torch convolution's (out, in, height, width) <-> kernel (height, width, in, out).
    "conv": Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    # A torch convolution over time: (out, in, width) <-> kernel (width, in, out).
    "conv1d": Transform(lambda a: a.transpose(2, 1, 0), lambda a: a.transpose(2, 1, 0)),
    # A depthwise convolution's (channels, 1, height, width) <-> (height, width, channels).
    "depthwise": Transform(lambda a: a.squeeze(1).transpose(1, 2, 0),
                           lambda a: a.transpose(2, 0, 1)[:, None]),
    # A convolution over time of width 1, a linear layer: (out, in, 1) <-> kernel (in, out).
    "pointwise": Transform(lambda a: a.squeeze(2).T, lambda a: a.T[:, :, None]),
    # A value a channel, with axes for image and positions: (1, 1, 1, channels) <-> (channels,).
    "spatial": Transform(lambda a: a.squeeze((0, 1, 2)), lambda a: a[None, None, None]),
}

# What becomes of a tensor that is no parameter of ours (a rule with an empty `ours`):
# "ignore": dropped, and listed in the report; "keep": a buffer, carried along and written back as
# it was; "arange": the same, for a buffer that must hold 0, 1, 2, … along its last axis.
_SPECIAL = ("ignore", "keep", "arange")


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a name table.

  Attributes:
    theirs: pattern of the upstream tensor's name.
    ours: our path, "params/…" or "batch_stats/…"; empty for a tensor that is no parameter.
    transform: name in TRANSFORMS, or "ignore" | "keep" | "arange" where `ours` is empty.
    only: "field=value|value", the configs for which the rule holds; others ignore its tensors.
      Several conditions are joined by "&".
  """

  theirs: str
  ours: str = ""
  transform: str = "same"
  only: str = ""

  def __post_init__(self):
    known = (*TRANSFORMS, "tied") if self.ours else _SPECIAL
    if self.transform not in known:
      raise ValueError(f"rule {self.theirs!r}: unknown transform {self.transform!r}")

  def holds(self, config) -> bool:
    """Returns whether the rule is in force for this model config."""
    conditions = [c.partition("=") for c in self.only.split("&") if c]
    return all(str(getattr(config, field)) in values.split("|") for field, _, values in conditions)

  def functions(self) -> Transform:
    """Returns the change of layout; a tied tensor has none."""
    return TRANSFORMS["same" if self.transform == "tied" else self.transform]


@dataclasses.dataclass
class Layout:
  """What a file's own layout was, remembered so that export gives the same file back.

  Attributes:
    names: our path -> the upstream name it was read from.
    dtypes: upstream name -> the dtype it had in the file.
    buffers: upstream name -> its value, of tensors that are no parameters.
    tied: further upstream name -> our path that the file held it for, too.
  """

  names: dict = dataclasses.field(default_factory=dict)
  tied: dict = dataclasses.field(default_factory=dict)
  dtypes: dict = dataclasses.field(default_factory=dict)
  buffers: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Report:
  """What became of each tensor and parameter.

  Attributes:
    matched: our paths that were read from the file.
    initialised: our paths that the file does not give, made anew.
    ignored: upstream names that were not read.
    changed: what surgery made of the model, a sentence each.
  """

  matched: list = dataclasses.field(default_factory=list)
  initialised: list = dataclasses.field(default_factory=list)
  ignored: list = dataclasses.field(default_factory=list)
  changed: list = dataclasses.field(default_factory=list)

  def __str__(self):
    text = f"{len(self.matched)} tensors matched"
    for name in ("initialised", "ignored", "changed"):
      if values := getattr(self, name):
        text += f"; {name}: " + ", ".join(_some(values))
    return text


def flatten(tree: Mapping, prefix: str = "") -> dict:
  """Returns {"params/encoder/layer_0/kernel": leaf} of nested dicts."""
  out = {}
  for key, value in tree.items():
    path = f"{prefix}/{key}" if prefix else key
    out.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
  return out


def unflatten(leaves: Mapping) -> dict:
  """Returns the nested dicts of `flatten`'s result."""
  tree = {}
  for path, leaf in leaves.items():
    *folders, name = path.split("/")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[name] = leaf
  return tree


def under(path: str, prefixes: Iterable[str]) -> bool:
  """Returns whether a path is one of the prefixes or lies below one."""
  return any(path == p or path.startswith(p + "/") for p in prefixes)


def shapes(tensors: Mapping, rules: Iterable[Rule], config=None) -> dict:
  """Returns {our path: shape there} of the tensors that the rules know as parameters."""
  rules = tuple(r for r in rules if r.holds(config))
  found = {}
  for name, tensor in tensors.items():
    rule, path = _forwards(name, rules)
    if path:
      found[path] = _shape(rule.functions().load, tensor.shape)
  return found


def load_tree(tensors: Mapping, rules: Iterable[Rule], expected: Mapping, *, config=None,
              head: Iterable[str] = (), fresh: Iterable[str] = (), dtype=np.float32,
              place: Callable | None = None, where: str = "the checkpoint"):
  """Reads a checkpoint's tensors into parameters, one at a time.

  Args:
    tensors: upstream name -> LazyTensor, of tensors.open_tensors.
    rules: the family's name table.
    expected: our path -> anything with .shape, of every leaf of the model's variables.
    config: the model config that the rules' `only` conditions look at.
    head: path prefixes of the label head, whose leaves may be absent or of another shape: they are
      then listed as initialised, and the caller makes them.
    fresh: those of the head's prefixes for which no tensor is taken even where one fits.
    dtype: what floating-point tensors become.
    place: (path, numpy array) -> array on its device; the default device if None.
    where: what the error calls the checkpoint.

  Returns:
    ({our path: array}, Report, Layout).

  Raises:
    UserError: one that names all missing, unexpected, doubled and wrong-shape tensors.
  """
  rules = tuple(rules)
  plan, report, problems = _plan(tensors, rules, expected, config, tuple(head), tuple(fresh))
  if problems:
    raise errors.UserError(f"{where} does not fit the model:\n" + "\n".join(problems))
  place = place or _place
  leaves, layout = {}, Layout()
  for name, (rule, path) in plan.items():
    if path in layout.names:  # of another name that came first
      _check_tie(tensors, layout.names[path], name, where)
      layout.tied[name] = path
    elif rule.ours:
      array = rule.functions().load(tensors[name].read())
      leaves[path] = place(path, _cast(array, dtype))
      report.matched.append(path)
      layout.names[path] = name
    else:
      layout.buffers[name] = _buffer(name, rule, tensors[name], where)
    layout.dtypes[name] = np.dtype(tensors[name].dtype)
  return leaves, report, layout


def dump_tree(leaves: Mapping, rules: Iterable[Rule], layout: Layout | None = None, *,
              config=None, prefix: bool | None = None) -> dict:
  """Returns {upstream name: LazyTensor} of parameters, to be written one at a time.

  Args:
    leaves: our path -> array.
    rules: the family's name table.
    layout: what the file that they were loaded from looked like. Its names, its buffers and, if
      every leaf holds only values that the file's dtypes hold, its dtypes are written again.
    config: the model config that the rules' `only` conditions look at.
    prefix: whether to write the optional part of names, or which; None: as it was in the file.

  Raises:
    KeyError: a leaf that no rule names (a gap in the family's table).
  """
  rules = tuple(r for r in rules if r.holds(config))
  layout = layout or Layout()
  usual = prefix
  if prefix is None or prefix is True:  # as in the names of the file, if any has it
    usual = optional_part(layout, rules) or prefix
  prefix = usual if prefix is True else prefix
  sources = {}
  for path, leaf in leaves.items():
    theirs = layout.names.get(path, "")
    rule, groups = _parse(theirs, rules)
    if rule is None:
      rule, fields = _rule_of(path, rules)
      groups = {**fields, "optional": usual}
    sources[_write(rule.theirs, groups, prefix)] = (rule, leaf, layout.dtypes.get(theirs))
  for theirs, path in layout.tied.items():
    rule, groups = _parse(theirs, rules)
    if rule is not None and path in leaves:
      name = _write(rule.theirs, groups, prefix)
      sources[name] = (rule, leaves[path], layout.dtypes.get(theirs))
  floats = filter(_is_float, layout.dtypes.values())
  widest = max(floats, key=lambda d: d.itemsize, default=None)
  exact = all(_holds(leaf, dtype or widest) for _, leaf, dtype in sources.values())
  out = {}
  for name, (rule, leaf, dtype) in sources.items():
    out[name] = _Dumped(rule.functions().dump, leaf, dtype if exact else None)
  for name, value in layout.buffers.items():
    rule, groups = _parse(name, rules)
    if rule:
      out[_write(rule.theirs, groups, prefix)] = tensors_lib.ArrayTensor(value)
  return out


def ours(name: str, rules: Iterable[Rule], config=None) -> tuple[str, "Rule | None"]:
  """Returns (our path, its rule) of an upstream name of any version; ("", None) of no parameter."""
  rule, path = _forwards(name, tuple(r for r in rules if r.holds(config)))
  return (path, rule) if path else ("", None)


def theirs(path: str, rules: Iterable[Rule], config=None, prefix: bool | str = False) -> tuple:
  """Returns (upstream's name in memory, its rule) of one of our paths.

  Where a family's table has several names of one parameter, those of files come first and that of
  the newest upstream class, which its files need not have, comes last.

  Args:
    path: "params/…", of one layer (not of a stack).
    rules: the family's name table.
    config: the model config that the rules' `only` conditions look at.
    prefix: whether to write the optional part of names, or which.

  Raises:
    KeyError: no rule gives the path.
  """
  rule, groups = _rule_of(path, [r for r in rules if r.holds(config)][::-1])
  return _write(rule.theirs, groups, prefix), rule


def tied(path: str, rules: Iterable[Rule], config=None, prefix: bool | str = False) -> list[str]:
  """Returns the further upstream names of one of our paths, as of an output layer; see `theirs`."""
  return [_write(rule.theirs, {}, prefix) for rule in rules
          if rule.transform == "tied" and rule.ours == path and rule.holds(config)]


def optional_part(layout: Layout, rules: Iterable[Rule]) -> str:
  """Returns the optional part of names in the file that a model came from; "" if it has none."""
  rules = tuple(rules)
  found = (_parse(name, rules)[1].get("optional") for name in layout.names.values())
  return next(filter(None, found), "")


class _Dumped(tensors_lib.LazyTensor):
  """A parameter in its upstream layout, brought to the host only when it is read."""

  def __init__(self, dump, leaf, dtype):
    self._dump, self._leaf = dump, leaf
    self.dtype = np.dtype(dtype or leaf.dtype)
    self.shape = _shape(dump, leaf.shape)

  def read(self):
    return np.asarray(self._dump(np.asarray(self._leaf)), order="C").astype(self.dtype, copy=False)


def _plan(tensors, rules, expected, config, head, fresh):
  """Returns ({upstream name: (rule, our path or "")}, a Report begun, lines of what is wrong)."""
  active = tuple(r for r in rules if r.holds(config))
  plan, taken, report = {}, {}, Report()
  unexpected, doubled, misshapen = [], [], []
  for name, tensor in tensors.items():
    rule, path = _forwards(name, active)
    in_head = bool(path) and under(path, head)
    if rule is None and _forwards(name, rules)[0] is None:
      unexpected.append(f"{name} {tuple(tensor.shape)}")
    elif rule is None or rule.transform == "ignore" or in_head and (
        under(path, fresh) or path not in expected):
      report.ignored.append(name)
    elif not path:
      plan[name] = (rule, "")
    elif path not in expected:
      unexpected.append(f"{name} {tuple(tensor.shape)}: the model has no {path}")
    elif path in taken and not _tied(rule, plan.get(taken[path], (rule,))[0]):
      doubled.append(f"{taken[path]} and {name} are both {path}")
    elif _shape(rule.functions().load, tensor.shape) == tuple(expected[path].shape):
      plan[name] = (rule, path)
      taken.setdefault(path, name)
    elif in_head:
      report.ignored.append(name)
    else:
      taken[path] = name
      needed = _shape(rule.functions().dump, expected[path].shape)
      misshapen.append(f"{name}: has {tuple(tensor.shape)}, needs {needed} for {path}")
  _drop_torn_heads(plan, taken, expected, head, report)
  absent = [path for path in expected if path not in taken]
  report.initialised = [path for path in absent if under(path, head)]
  missing = [_missing(path, expected[path], active) for path in absent if not under(path, head)]
  problems = []
  for kind, lines in (("missing", missing), ("unexpected", unexpected), ("doubled", doubled),
                      ("wrong shape", misshapen)):
    if lines:
      problems += [f"  {kind} ({len(lines)}):"] + [f"    {line}" for line in _some(lines)]
  return plan, report, problems


def _tied(*rules) -> bool:
  return any(rule.transform == "tied" for rule in rules)


def _drop_torn_heads(plan, taken, expected, head, report):
  """Takes back what was matched of a head of which another part is absent or does not fit."""
  for prefix in head:
    paths = [path for path in expected if under(path, (prefix,))]
    if any(path not in taken for path in paths):
      for path in paths:
        if path in taken:
          report.ignored.append(taken[path])
          del plan[taken.pop(path)]


def _missing(path, leaf, rules) -> str:
  rule, fields = _rule_of(path, rules)
  shape = _shape(rule.functions().dump, leaf.shape)
  return f"{_write(rule.theirs, fields, None)} {shape} for {path}"


def _some(lines) -> list:
  lines = list(lines)
  rest = len(lines) - _SHOWN
  return lines[:_SHOWN] + ([f"… and {rest} more"] if rest > 0 else [])


@functools.cache
def _segments(pattern: str) -> tuple:
  """Returns a pattern's parts as (kind, text): literal, optional, choice, number, rest."""
  kinds = {"[": "optional", "(": "choice", "{": "number"}
  parts = re.findall(r"\[[^]]*\]|\([^)]*\)|\{[^}]*\}|[^[({]+", pattern)
  parts = [(kinds.get(p[0], "literal"), p if p[0] not in kinds else p[1:-1]) for p in parts]
  return tuple(("rest", "") if part == ("number", "*") else part for part in parts)


@functools.cache
def _regex(pattern: str) -> re.Pattern:
  out, seen = "", set()
  for k, (kind, text) in enumerate(_segments(pattern)):
    either = "|".join(map(re.escape, text.split("|")))
    if kind == "number":
      out += f"(?P={text})" if text in seen else rf"(?P<{text}>0|[1-9]\d*)"
      seen.add(text)
    elif kind == "optional":
      out += f"(?P<optional>{either})?"
    elif kind == "choice":
      out += f"(?P<choice{k}>{either})"
    else:
      out += ".*" if kind == "rest" else re.escape(text)
  return re.compile(out)


def _match(pattern: str, name: str) -> dict | None:
  """Returns the pattern's variable parts in a name, or None if the name is not of the pattern."""
  match = _regex(pattern).fullmatch(name)
  return match.groupdict() if match else None


def _write(pattern: str, groups: Mapping, prefix: bool | str | None) -> str:
  """Returns a pattern's name with these variable parts; `prefix` overrules the optional one."""
  out = ""
  for k, (kind, text) in enumerate(_segments(pattern)):
    first = text.split("|")[0]
    if kind == "number":
      out += groups[text]
    elif kind == "choice":
      out += groups.get(f"choice{k}") or first
    elif kind == "literal":
      out += text
    elif kind == "optional":
      chosen = groups.get("optional") if prefix is None else prefix
      out += (chosen if chosen in text.split("|") else first) if chosen else ""
  return out


def _parse(name: str, rules) -> tuple:
  """Returns (the rule that knows an upstream name, its variable parts), or (None, {})."""
  for rule in rules:
    groups = _match(rule.theirs, name)
    if groups is not None:
      return rule, groups
  return None, {}


def _forwards(name: str, rules) -> tuple:
  """Returns (rule, our path) of an upstream name; (None, "") if no rule knows it."""
  rule, groups = _parse(name, rules)
  return rule, (_write(rule.ours, groups, None) if rule else "")


def _rule_of(path: str, rules) -> tuple:
  """Returns (rule, variable parts) of one of our paths."""
  for rule in rules:
    groups = _match(rule.ours, path) if rule.ours and rule.transform != "tied" else None
    if groups is not None:
      return rule, groups
  raise KeyError(f"no rule of the name table gives {path}")


def _shape(function, shape) -> tuple | None:
  """Returns the shape that a transform makes of a shape; None if it has too few or many axes."""
  try:
    return function(np.broadcast_to(np.int8(0), shape)).shape  # no array of that size is made
  except (ValueError, IndexError):
    return None


def _is_float(dtype) -> bool:
  return jax.numpy.issubdtype(dtype, np.floating)


def _cast(array, dtype):
  array = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
  return array.astype(dtype, copy=False) if dtype is not None and _is_float(array.dtype) else array


def _check_tie(tensors, first, second, where) -> None:
  """Raises UserError unless two names of one parameter hold the same values."""
  if tensors[first].read().tobytes() != tensors[second].read().tobytes():
    raise errors.UserError(f"{where}: {first} and {second} should be equal, as config.json ties "
                           "them, and are not; if they are two parameters, set "
                           "tie_word_embeddings to false in config.json")


def _place(path, array):
  del path
  # A copy owned by the device: memory shared with numpy could not be donated to a training step.
  return jax.device_put(array, may_alias=False)


def _holds(leaf, dtype) -> bool:
  """Returns whether the dtype holds every value of the leaf exactly."""
  if dtype is None or leaf.dtype == dtype:
    return True
  array = np.asarray(leaf)
  with np.errstate(over="ignore"):
    return np.array_equal(array.astype(dtype).astype(array.dtype), array, equal_nan=True)


def _buffer(name, rule, tensor, where) -> np.ndarray:
  """Returns the value of a tensor that is carried along, checked if it is a derived one."""
  value = tensor.read()
  if rule.transform == "arange" and np.any(value - np.arange(value.shape[-1])):
    raise errors.UserError(f"{where}: {name} should count 0, 1, 2, … and does not; "
                           "a model with other positions is not supported")
  return value
