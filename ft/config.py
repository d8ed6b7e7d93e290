"""Configs: every key is declared once, checked before anything runs, and explained by `--help`.

A key stands in the `KEYS` table of the file that reads it:

    KEYS = {"rank": (16, "rank of the update", (1, None))}        # default, meaning, domain

The domain is a list of choices, an inclusive range (None = open), or the name of a type where the
default is None. `SECTIONS` below says which files fill which section; where the file depends on a
choice (`task.name`, `tune.method`, `data.modality`) only the chosen file's keys are allowed, so
that a key nobody reads is an error. The tables are read from the source text, not imported:
`--help` needs no jax.

A config file defines `get_config()` that returns the keys that differ from the defaults, as a
dict or an ml_collections ConfigDict; its arguments are the words after the colon of
`--config=configs/name.py:key=value,…`. Config files are Python and run as such: treat one from
elsewhere as code.
"""

import ast
import functools
import importlib.util
import inspect
import json
import pathlib

from ft import errors

ROOT = pathlib.Path(__file__).parent
KEYS = {
  "title": ("", "what the run is called on its card"),
  "notes": ((), "sentences that the card repeats, such as limits of the data", "list"),
  "seed": (0, "seed of shuffling, dropout and new parameters", (0, 2147483647)),
  "seeds": (1, "runs of the same config, with seeds seed, seed + 1, …; above 1 each has a folder "
            "seed-N in the workdir, whose card gives mean ± sd", (1, 1000)),
  "auto": (False, "choose task, method and settings by rules and a race; see ft/auto.py"),
  "minutes": (15.0, "auto: budget of the race", (0.0, None)),
}
SELECTORS = {
  "data.modality": ("text", "what the model reads: the file in ft/data/"),
  "task.name": ("classify", "the kind of problem: a file in ft/tasks/"),
  "tune.method": ("full", "what trains: a file in ft/tune/"),
}
SECTIONS = {
  "": ("config.py",),
  "model": ("models/__init__.py",),
  "data": ("data/sources.py", "data/loader.py", "data/{modality}.py"),
  "task": ("tasks/{name}.py",),
  "tune": ("tune/__init__.py", "tune/{method}.py"),
  "optim": ("optim.py",),
  "train": ("train.py",),
  "mesh": ("mesh.py",),
  "anchor": ("anchor/*.py",),
  "regularise": ("regularise/*.py",),
  "average": ("averaging.py",),
  "guard": ("guards/*.py",),
}
TYPES = {"str": str, "int": int, "float": float, "dict": dict, "list": (list, tuple)}


@functools.cache
def _keys(path: pathlib.Path) -> dict | None:
  """The literal KEYS table of one source file; None where it has none."""
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "KEYS":
      try:
        return ast.literal_eval(node.value)
      except ValueError as error:
        raise ValueError(f"{path}: KEYS must be a literal table ({error})") from None
  return None


def _components(pattern: str) -> list[pathlib.Path]:
  """The files that a pattern such as data/{modality}.py chooses from.

  That is those with a KEYS table, empty or not; others in the room are what these share.
  """
  folder, shared = ROOT / pattern.split("/")[0], {p for part in SECTIONS.values() for p in part}
  return [path for path in sorted(folder.glob("*.py"))
          if str(path.relative_to(ROOT)) not in shared and _keys(path) is not None]


def _files(section: str, chosen: dict | None):
  """Yields (prefix, file, selector value) of the files that fill a section."""
  for pattern in SECTIONS[section]:
    if "{" in pattern:
      selector = pattern[pattern.index("{") + 1 : pattern.index("}")]
      for path in _components(pattern):
        name = f"{section}.{selector}"
        if not chosen or chosen[name] == path.stem:
          yield section, path, f"{name}={path.stem}"
    elif "*" in pattern:
      for path in sorted(ROOT.glob(pattern)):
        if path.stem != "__init__":
          yield f"{section}.{path.stem}", path, ""
    else:
      yield section, ROOT / pattern, ""


def schema(chosen: dict | None = None) -> dict:
  """Dotted key -> (default, meaning, domain, selector), of the chosen components or of all."""
  table = {}
  for name, default, meaning, domain, selector in _entries(chosen):
    if name in table:
      selector = _joined(table[name][3], selector)
    table[name] = (default, meaning, domain, selector)
  return table


def _entries(chosen: dict | None):
  """Yields (dotted key, default, meaning, domain, selector) of every file that has the key."""
  for key, entry in SELECTORS.items():
    yield key, *entry, choices(key), ""
  for section in SECTIONS:
    for prefix, path, selector in _files(section, chosen):
      for key, (default, meaning, *domain) in (_keys(path) or {}).items():
        name = f"{prefix}.{key}" if prefix else key
        yield name, default, meaning, domain[0] if domain else None, selector


def _joined(first: str, second: str) -> str:
  """"tune.method=lora" and "tune.method=vera" -> "tune.method=lora, vera"."""
  return f"{first}, {second.rpartition('=')[2]}"


def choices(selector: str) -> list[str]:
  """The components there are for `task.name`, `tune.method` or `data.modality`."""
  section, name = selector.split(".")
  pattern = next(p for p in SECTIONS[section] if "{" in p)
  return [path.stem for path in _components(pattern)]


def load(name: str, overrides: list[tuple[str, str]] = ()):
  """Returns the complete, checked ConfigDict of a config file and its command line overrides.

  Args:
    name: path of a config file, with `:key=value,…` after it for the arguments of `get_config`.
    overrides: (dotted key, text) pairs, as `--config.dotted.key=text` gives them.
  Raises:
    UserError: file or key unknown, value of a wrong type or out of range.
  """
  path, _, words = name.partition(":")
  given = _flatten(_call(pathlib.Path(path), words))
  said = {**given, **dict(overrides)}
  chosen = {key: said.get(key, default) for key, (default, _) in SELECTORS.items()}
  table = {**schema(), **schema(chosen)}  # what the chosen components say of a key counts
  for key, text in overrides:
    parent, _, entry = key.rpartition(".")
    if _is_dict(parent) and key not in schema():
      given[parent] = {**(given.get(parent) or {}), entry: text}
    else:
      given[key] = _parse(key, text, table)
  return complete(given)


def complete(given: dict):
  """Fills the defaults in and checks every key; `given` maps dotted keys to values."""
  from ml_collections import config_dict

  chosen = {}
  for key, (default, _) in SELECTORS.items():
    chosen[key] = given.get(key, default)
    if chosen[key] not in choices(key):
      near, there = errors.suggest(str(chosen[key]), choices(key)), ", ".join(choices(key))
      raise errors.UserError(f"{key}={chosen[key]!r}: no such choice{near}; there are: {there}")
  table = schema(chosen)
  for key in given:
    if key not in table:
      raise errors.UserError(_unknown(key, table, chosen))
  config = config_dict.ConfigDict({})
  for key, (default, _, domain, _) in table.items():
    value = _check(key, given[key], default, domain) if key in given else default
    section, _, rest = key.rpartition(".")
    place = config
    for part in section.split(".") if section else []:
      if part not in place:
        place[part] = config_dict.ConfigDict({})
      place = place[part]
    place[rest] = config_dict.ConfigDict(value) if isinstance(value, dict) else value
  return config.lock()


def changed(config, given: dict):
  """Returns a complete config with some keys changed.

  Args:
    config: complete ConfigDict.
    given: dotted key -> value, or text as on the command line. Where another component is chosen,
      the keys of the one before fall away and its own have their defaults.
  Raises:
    UserError: as `complete`.
  """
  flat = _flatten(_plain(config))
  before = {key: flat[key] for key in SELECTORS}
  chosen = {key: given.get(key, value) for key, value in before.items()}
  other = {key for key in SELECTORS if chosen[key] != before[key]}
  gone = {key for key, (*_, reader) in schema(before).items() if reader.partition("=")[0] in other}
  table = schema(chosen)
  values = {key: _parse(key, value, table) if isinstance(value, str) else value
            for key, value in given.items()}
  return complete({key: value for key, value in flat.items() if key not in gone} | values)


def section(selector: str, component: str, given: dict):
  """Returns a section as a component reads it: section("task.name", "lm", {"packing": "best-fit"}).

  Args:
    selector: of SELECTORS.
    component: its value.
    given: key within the section -> value, or text as on the command line; the rest are defaults.
  Raises:
    UserError: as `complete`.
  """
  name = selector.partition(".")[0]
  chosen = {key: default for key, (default, _) in SELECTORS.items()} | {selector: component}
  values = {f"{name}.{key}": value for key, value in given.items()}
  table = schema(chosen)
  values = {key: _parse(key, value, table) if isinstance(value, str) else value
            for key, value in values.items()}
  return complete({selector: component, **values})[name]


def _unknown(key: str, table: dict, chosen: dict) -> str:
  everything = schema()
  if key in everything:
    reader = everything[key][3]
    section = key.split(".")[0]
    now = ", ".join(f"{k}={v}" for k, v in chosen.items() if k.startswith(section))
    return f"config key {key}: nothing reads it with {now}; it belongs to {reader}"
  near = errors.suggest(key, table) or errors.suggest(key, everything)
  if not near:
    last = key.rpartition(".")[2]
    same = [k for k in table if k.rpartition(".")[2] == last]
    near = f" (did you mean {same[0]!r}?)" if same else ""
  return f"config key {key}: there is no such key{near}; `scripts/train.py --help` lists them all"


def _call(path: pathlib.Path, words: str):
  """Runs get_config of a config file."""
  if not path.is_file():
    there = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    raise errors.UserError(
      f"--config={path}: no such file{errors.suggest(str(path), there)}; "
      f"there are: {', '.join(there) or 'none in that folder'}"
    )
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"--config={path}: the file defines no get_config()")
  arguments = {}
  known = inspect.signature(module.get_config).parameters
  for word in filter(None, words.split(",")):
    key, equals, value = word.partition("=")
    if not equals or key not in known:
      raise errors.UserError(
        f"--config={path}:{words}: {word!r} is not one of the words this config knows: "
        f"{', '.join(f'{k}={p.default}' for k, p in known.items()) or 'none'}"
      )
    arguments[key] = value
  return module.get_config(**arguments)


def _flatten(config, prefix="") -> dict:
  """Nested mapping -> dotted keys; dictionaries that are values (`data.columns`) stay whole."""
  everything, flat = schema(), {}
  for key, value in config.items():
    name = prefix + key
    mapping = hasattr(value, "items")
    if mapping and name not in everything:
      flat.update(_flatten(value, name + "."))
    else:
      flat[name] = _plain(value)
  return flat


def _is_dict(key: str) -> bool:
  """Whether a key's value is a dictionary, so that `key.entry=text` sets one of its entries."""
  everything = schema()
  return key in everything and _kind(everything[key][0], everything[key][2]) is dict


def _parse(key: str, text: str, table: dict):
  """Text of the command line -> value of the key's type in a schema."""
  if key not in table:
    return text
  default, _, domain, _ = table[key]
  kind = _kind(default, domain)
  if kind is str:
    return text
  if text.lower() in ("none", "") and default is None:
    return None
  if kind is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
    return text.lower() in ("true", "1", "yes")
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if kind in (list, tuple, TYPES["list"]) and not isinstance(value, (list, tuple)):
    value = [word for word in text.split(",") if word] if isinstance(value, str) else [value]
  return value


def _kind(default, domain):
  if default is None:
    return TYPES[domain] if isinstance(domain, str) else str
  return TYPES["list"] if isinstance(default, (list, tuple)) else type(default)


def _check(key: str, value, default, domain):
  """Returns the value in the key's type, or raises UserError with what would be right."""
  kind = _kind(default, domain)
  if value is None and default is None:
    return None
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  wrong_bool = isinstance(value, bool) and kind is not bool
  if not isinstance(value, kind) or wrong_bool:
    names = kind.__name__ if isinstance(kind, type) else "list"
    raise errors.UserError(f"config key {key}={value!r}: expected {names}, like {default!r}")
  if isinstance(domain, list) and value not in domain:
    near = errors.suggest(str(value), map(str, domain))
    raise errors.UserError(f"config key {key}={value!r}: expected one of {domain}{near}")
  if isinstance(domain, tuple):
    low, high = domain
    if (low is not None and not value >= low) or (high is not None and not value <= high):
      low, high = "…" if low is None else low, "…" if high is None else high
      raise errors.UserError(f"config key {key}={value!r}: expected a value from {low} to {high}")
  return tuple(value) if isinstance(value, list) else value


def _plain(value):
  """ConfigDicts and lists as plain dicts and tuples."""
  if hasattr(value, "items"):
    return {k: _plain(v) for k, v in value.items()}
  return tuple(_plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def to_json(config) -> dict:
  """A ConfigDict as JSON types; what config.json of a run holds."""
  return json.loads(json.dumps(_plain(config)))


def from_json(values: dict):
  """The ConfigDict of a run's config.json."""
  return complete(_flatten(values))


def difference(old: dict, new: dict) -> list[str]:
  """Lines "key: old -> new" of the keys in which two configs (as JSON) differ."""
  old, new = _flatten(old), _flatten(new)
  keys = sorted(old.keys() | new.keys())
  return [
    f"{k}: {old.get(k, 'absent')!r} -> {new.get(k, 'absent')!r}"
    for k in keys
    if old.get(k, "absent") != new.get(k, "absent")
  ]


def table(markdown: bool = False) -> str:
  """All keys with default, meaning and domain, as text for `--help` or as README's table."""
  lines = ["| key | default | meaning |", "|---|---|---|"] if markdown else []
  order = {key: i for i, key in enumerate(schema())}
  rows = {}  # a key that means the same in several files is one row
  for *entry, selector in _entries(None):
    same = repr(entry)
    rows[same] = (*entry, _joined(rows[same][-1], selector) if same in rows else selector)
  ordered = sorted(rows.values(), key=lambda row: order[row[0]])
  for key, default, meaning, domain, selector in ordered:
    where = f" [{selector}]" if selector else ""
    allowed = ""
    if isinstance(domain, list):
      allowed = " (" + " | ".join(map(str, domain)) + ")"
    elif isinstance(domain, tuple):
      low, high = ("" if bound is None else bound for bound in domain)
      allowed = f" ({low}…{high})"
    if markdown:
      meaning = f"{meaning}{allowed}{where}".replace("|", "\\|")
      lines.append(f"| `{key}` | `{default!r}` | {meaning} |")
    else:
      lines.append(f"  --config.{key}={default!r}\n      {meaning}{allowed}{where}")
  return "\n".join(lines)


if __name__ == "__main__":
  print(table(markdown=True))
