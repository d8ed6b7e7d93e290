"""What the families share: config.json read, checked and written; rules of their name tables."""

import dataclasses
import json
import types
import typing
from typing import Any, ClassVar

from ft import errors
from ft.weights.names import Rule


@dataclasses.dataclass(frozen=True)
class HFConfig:
  """A config.json as a frozen dataclass. A family adds fields, named as in config.json.

  Attributes:
    num_labels: C of the label head; 0 for none.
    labels: their names; empty if they have none.
    head: what stands on the body, a key of HEADS.
    model_type: config.json's.
    source: config.json as it was read, JSON; keys that are no fields are given back on export.

  Class attributes that a family sets:
    HEADS: head -> names of the upstream classes ("{}" stands for the model type's PREFIX), the one
      that is written first. "none" is the body alone.
    PREFIXES: model_type -> what its upstream class names start with; the first is the default type.
    DEFAULTS: model_type -> {field: value} where upstream's default is not the field's.
    ALIASES: field -> names it has in other files, such as an older version's.
    OURS: fields that are not in config.json.
  """

  num_labels: int = 0
  labels: tuple = ()
  head: str = "none"
  model_type: str = ""
  source: str = dataclasses.field(default="{}", repr=False, compare=False)

  HEADS: ClassVar[dict] = {"none": ("{}Model",)}
  PREFIXES: ClassVar[dict] = {}
  DEFAULTS: ClassVar[dict] = {}
  ALIASES: ClassVar[dict] = {}
  OURS: ClassVar[tuple] = ()
  LABEL_HEADS: ClassVar[tuple] = ("classify", "tag")

  def __post_init__(self):
    if self.num_labels and self.head == "none":
      object.__setattr__(self, "head", "classify")
    if not self.model_type:
      object.__setattr__(self, "model_type", next(iter(self.PREFIXES), ""))

  @classmethod
  def from_hf(cls, hf: dict):
    """Returns the Config of a config.json; UserError for a value that is not supported."""
    kind = hf.get("model_type") or next(iter(cls.PREFIXES), "")
    values = dict(cls.DEFAULTS.get(kind, {}))
    hints = typing.get_type_hints(cls)
    for name in cls.upstream():
      for key in (name, *cls.ALIASES.get(name, ())):
        if hf.get(key) is not None:
          values[name] = typed(key, hf[key], hints[name])
          break
        if key in hf and type(None) in typing.get_args(hints[name]):
          values[name] = None  # such as Mistral's sliding_window, whose default is a number
    values.update(model_type=kind, source=json.dumps(hf), head=cls.stated_head(hf, kind))
    if values["head"] in cls.LABEL_HEADS:
      values["labels"] = read_labels(hf.get("id2label") or {})
      # transformers leaves out id2label where there are the two labels of its default.
      values["num_labels"] = len(hf.get("id2label") or ()) or hf.get("num_labels") or 2
    values.update(cls.derived(hf, values))
    config = cls(**values)
    config.check(hf)
    return config

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    """Returns fields that follow from others; a family overrides it."""
    del hf, values
    return {}

  def check(self, hf: dict) -> None:
    """Raises UserError for what the family does not compute; a family overrides it."""

  @classmethod
  def stated_head(cls, hf: dict, kind: str) -> str:
    """Returns the head that config.json's architectures state; "none" if it states none."""
    stated = (hf.get("architectures") or [""])[0]
    for head, classes in cls.HEADS.items():
      if stated in [name.format(cls.PREFIXES.get(kind, "")) for name in classes]:
        return head
    return "none"

  @classmethod
  def upstream(cls) -> tuple:
    """Returns the names of the fields that are keys of config.json."""
    ours = {field.name for field in dataclasses.fields(HFConfig)} | set(cls.OURS)
    return tuple(f.name for f in dataclasses.fields(cls) if f.name not in ours)

  def to_hf(self) -> dict:
    """Returns what config.json holds; `from_hf` gives an equal Config back."""
    source = json.loads(self.source)
    hf = dict(source)
    was = type(self).from_hf(source) if source else None
    for name in self.upstream():
      value = getattr(self, name)
      if was is not None and getattr(was, name) == value:
        continue  # as it was read, under the name and in the form that it was read
      key = next((k for k in (name, *self.ALIASES.get(name, ())) if k in source), name)
      hf[key] = plain(value)
    hf["model_type"] = self.model_type or next(iter(self.PREFIXES))
    if was is None or was.head != self.head:
      name = self.HEADS[self.head][0].format(self.PREFIXES.get(hf["model_type"], ""))
      hf["architectures"] = [name]
    if was is None or (was.labels, was.num_labels) != (self.labels, self.num_labels):
      for key in ("id2label", "label2id", "num_labels"):
        hf.pop(key, None)
      if self.num_labels:
        hf.update(label_maps(self.labels or [f"LABEL_{i}" for i in range(self.num_labels)]))
    return hf


def typed(key: str, value: Any, kind) -> Any:
  """Returns a value of config.json as a field's type; UserError if it is of another."""
  kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  kinds = [typing.get_origin(k) or k for k in kinds if k is not type(None)]
  if Any in kinds:
    return frozen(value)
  if isinstance(value, list) and tuple in kinds:
    return frozen(value)
  if isinstance(value, dict) and dict in kinds:
    return value
  for k in kinds:
    if k is float and isinstance(value, (int, float)) and not isinstance(value, bool):
      return float(value)
    if isinstance(value, k) and (k is bool or not isinstance(value, bool)):
      return value
  wanted = " or ".join(k.__name__ for k in kinds)
  raise errors.UserError(f"config.json: {key} is {value!r}, should be of type {wanted}")


def frozen(value: Any) -> Any:
  """Returns lists as tuples, all the way down, so that a Config can be hashed."""
  if isinstance(value, (list, tuple)):
    return tuple(frozen(v) for v in value)
  if isinstance(value, dict):
    return tuple(sorted((k, frozen(v)) for k, v in value.items()))
  return value


def plain(value: Any) -> Any:
  """Returns tuples as lists, which is what JSON makes of them."""
  return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def read_labels(id2label: dict) -> tuple:
  """Returns the names of labels in order; none where they are LABEL_0, LABEL_1, …."""
  try:
    labels = tuple(str(id2label[i]) for i in sorted(id2label, key=int))
  except (ValueError, TypeError, AttributeError):
    raise errors.UserError("config.json: id2label should map numbers to names") from None
  generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
  return () if generic else labels


def label_maps(labels) -> dict:
  """Returns config.json's two maps of label names."""
  return {"id2label": {str(i): label for i, label in enumerate(labels)},
          "label2id": {label: i for i, label in enumerate(labels)}}


def one_of(config: HFConfig, field: str, allowed) -> None:
  """Raises UserError unless a field has one of the values that the family computes."""
  value = getattr(config, field)
  if value not in allowed:
    raise errors.UserError(f"config.json: {field} {value!r} is not supported; supported are "
                           + ", ".join(map(repr, allowed)))


def multiple(config: HFConfig, field: str, of: str) -> None:
  """Raises UserError unless one field is a positive multiple of another."""
  value, unit = getattr(config, field), getattr(config, of)
  if not unit or unit < 0 or value % unit:
    raise errors.UserError(f"config.json: {field} {value} is not a multiple of {of} {unit}")


def only(hf: dict, key: str, value: Any) -> None:
  """Raises UserError if config.json states another value for a key that the family ignores."""
  if hf.get(key, value) != value and hf.get(key) is not None:
    raise errors.UserError(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")


def linear_rules(theirs: str, ours: str, only: str = "") -> list[Rule]:
  """Returns the two rules of a linear layer."""
  return [Rule(theirs + ".weight", ours + "/kernel", "transpose", only),
          Rule(theirs + ".bias", ours + "/bias", only=only)]


def norm_rules(theirs: str, ours: str, only: str = "") -> list[Rule]:
  """Returns the two rules of a norm; files converted from TensorFlow say gamma and beta."""
  return [Rule(theirs + ".(weight|gamma)", ours + "/scale", only=only),
          Rule(theirs + ".(bias|beta)", ours + "/bias", only=only)]
