"""Guards: each file measures one risk of a run from recorded numbers.

A guard is a module with `KEYS` (its config, `guard.<file>.<key>`) and

    measure(config, evidence) -> {"verdict": str, "words": one sentence, "numbers": {…}}

where the verdict is "ok", "warning", "alarm" or "not measured". One that has to ask the model what
the outputs of the splits do not tell also has

    gather(config, context) -> anything

which is called once, after the tuned model was judged and exported, and whose result `measure`
finds in `evidence.gathered[<file>]`. Guards are found by file name: a new one touches no other
file. What a guard needs and does not find is "not measured" with the reason (raise `Missing` from
`gather`); a guard never ends a run.
"""

import collections.abc
import dataclasses
import functools
import importlib
import pkgutil
import types

import numpy as np
from absl import logging

from ft import errors

VERDICTS = ("ok", "warning", "alarm", "not measured")

# Names of the rows of every results table, in reading order; other baselines come between.
TUNED, PROBE, MAJORITY, ZERO_SHOT = "fine-tuned", "probe", "majority", "zero-shot"
LOOKED_AT = 1000  # examples whose tokens are counted one by one
REFERENCES = ("teacher",)  # rows that no verdict is about: what a student learns from
NAMES = {PROBE: "frozen probe", MAJORITY: "majority class", ZERO_SHOT: "pretrained model",
         "knn": "kNN", "mean-image": "distance to the mean image",
         "nearest-image": "nearest whole image"}


@dataclasses.dataclass
class Evidence:
  """What a finished run has recorded; every field may be left empty.

  Attributes:
    metric: name of the metric that is judged, e.g. "accuracy".
    mode: "max" or "min", what is better.
    selection: (name, mode) of the metric that the best step was chosen by; None: the same.
    history: one dict a log point: "step", "train/loss" (training mode), "train/<metric>"
      (evaluation mode, on a sample), "validation/<metric>", "validation/loss" or "…/log_loss".
    outputs: split -> row name ("majority", "probe", "zero-shot", "fine-tuned") -> arrays (N, …) of
      the whole split in row order; of classifiers "label" (N,) or (N, C) and "logits" (N, C).
    score: outputs -> (N,) contribution of each example to the metric; None: it is no mean of them.
    metrics: outputs -> dict of metrics.
    value: outputs -> the selection metric alone; it is resampled where the metric is no mean of
      scores, and should then be cheap. Without it `metrics` is used.
    count: outputs -> how many rows the metric is of; None: all of them.
    blocks: outputs -> (N,) numbers of rows that depend on each other and are resampled together;
      None: rows are independent.
    features: split -> {"features" (N, D), "label", "index" (N,)}, what the label head reads of the
      model before tuning; {} where the task has no such features or baselines are off.
    rows: split -> its rows, dicts role -> value (`data.sources.Rows`), which are of use beside
      outputs and features by their "index"; rows that could not be used are in neither.
    labels: names of the classes by index, where there are any.
    gathered: guard name -> what its `gather` returned, or the `Missing` that it raised.
    extra: names of the splits beyond test that were never trained on, in display order.
    cost: see `ft/guards/cost.py`.
  """

  metric: str = ""
  mode: str = "max"
  selection: tuple[str, str] | None = None
  history: list[dict] = dataclasses.field(default_factory=list)
  outputs: dict[str, dict[str, dict]] = dataclasses.field(default_factory=dict)
  score: collections.abc.Callable | None = None
  metrics: collections.abc.Callable | None = None
  value: collections.abc.Callable | None = None
  count: collections.abc.Callable | None = None
  blocks: collections.abc.Callable | None = None
  features: dict[str, dict] = dataclasses.field(default_factory=dict)
  rows: dict[str, collections.abc.Sequence] = dataclasses.field(default_factory=dict)
  labels: tuple[str, ...] = ()
  gathered: dict = dataclasses.field(default_factory=dict)
  extra: tuple[str, ...] = ()
  cost: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Context:
  """The finished run as `gather` may use it.

  Attributes:
    run: `ft.run.Run`; `run.pretrained.variables` are gone by now, `averaging.pretrained` reads them
      again.
    examples: split -> `data.loader.Examples`.
    tuned: `tune.Tuned` of the run.
    final: `averaging.Final`, the model that was judged and exported.
    outputs: split -> what it gave.
  """

  run: object
  examples: dict
  tuned: object
  final: object
  outputs: dict

  @functools.cached_property
  def training(self):
    """The examples that steps went over: those of train, or what the task made of them.

    Such as pairs of rows, or rows that were packed; `rows_each` is how many rows one of them holds.
    """
    return getattr(self.run.task, "training", lambda part: part)(self.examples["train"])

  @property
  def rows_each(self) -> float:
    """Mean rows of train in an example of `training`; a row that stands in two counts twice."""
    return getattr(self.training, "rows_each", 1.0)

  @functools.cached_property
  def tokens_each(self) -> float | None:
    """Mean tokens of an example of `training` without padding; None where it has no length.

    Texts side by side, such as a question and its answer, are counted in LOOKED_AT examples.
    """
    part = self.training
    if part.lengths is None:
      return None
    if hasattr(part, "tokens"):
      return float(np.mean(part.tokens))
    if np.ndim(part[0].get("attention_mask")) != 2:
      return float(np.mean(part.lengths))
    looked = np.random.default_rng(0).permutation(len(part))[:LOOKED_AT]
    return float(np.mean([np.count_nonzero(part[int(i)]["attention_mask"]) for i in looked]))


class Missing(Exception):  # noqa: N818 (no fault: what could not be measured, and why)
  """Raised by `gather` where something that it needs is not there; its text is the reason."""


def names() -> list[str]:
  """All guards there are, by file name."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def defaults(name: str) -> types.SimpleNamespace:
  """The guard's config with every default filled in."""
  keys = importlib.import_module(f"{__name__}.{name}").KEYS
  return types.SimpleNamespace(**{key: spec[0] for key, spec in keys.items()})


def gather(config, context: Context) -> dict:
  """Lets every guard that is on ask the model: guard name -> what it found.

  Args:
    config: the `guard` section.
    context: the finished run.
  """
  found = {}
  for name in names():
    guard, section = importlib.import_module(f"{__name__}.{name}"), getattr(config, name)
    if not section.on or not hasattr(guard, "gather"):
      continue
    try:
      found[name] = guard.gather(section, context)
    except Missing as reason:
      found[name] = reason
    except errors.Preempted:
      raise
    # As in `measure`.
    except Exception as error:  # noqa: BLE001
      logging.exception("guard %s failed", name)
      found[name] = Missing(f"the guard failed: {type(error).__name__}: {error}")
  return found


def measure(config, evidence: Evidence, which=None) -> dict[str, dict]:
  """Runs every guard.

  Args:
    config: the `guard` section (attributes by guard name), or None for all defaults.
    evidence: what the run recorded.
    which: names of guards, in place of all.

  Returns:
    guard name -> {"verdict", "words", "numbers"}.
  """
  results = {}
  for name in names() if which is None else which:
    section = getattr(config, name, None) or defaults(name)
    if not section.on:
      results[name] = not_measured(f"switched off by config.guard.{name}.on=False")
      continue
    if isinstance(evidence.gathered.get(name), Missing):
      results[name] = not_measured(str(evidence.gathered[name]))
      continue
    try:
      results[name] = importlib.import_module(f"{__name__}.{name}").measure(section, evidence)
    # Whatever a guard's fault is, it is logged and must not cost the user a finished run.
    except Exception as error:  # noqa: BLE001
      logging.exception("guard %s failed", name)
      results[name] = not_measured(f"the guard failed: {type(error).__name__}: {error}")
  return results


def result(verdict: str, words: str, numbers: dict | None = None) -> dict:
  """One guard's result."""
  if verdict not in VERDICTS:
    raise ValueError(f"verdict {verdict!r} is not one of {VERDICTS}")
  if not words.strip():
    raise ValueError("a verdict says why: words are empty")
  return {"verdict": verdict, "words": words, "numbers": numbers or {}}


def not_measured(reason: str) -> dict:
  """The result of a guard that lacks what it needs."""
  return result("not measured", f"Not measured: {reason}.")
