"""Rows in, predictions out, with the preprocessing and the calibration the run was made with."""

import importlib
import json
import pathlib
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from ft import errors, generation, models, state, tune
from ft.data import loader as loaders
from ft.tune import saving

_PASSED = ("id", "times", "unseen_items")  # what an answer repeats of its row


class Predictor:
  """A tuned model ready to answer.

  Args:
    folder: of a run, or its `model/` or `adapter/` (wherever it was copied to).
    batch: rows that are computed together.
  Raises:
    UserError: the folder holds no exported model.
  """

  def __init__(self, folder, batch: int = 32):
    self.folder = exported(pathlib.Path(folder))
    spec, self.preprocess = description(self.folder)
    task = importlib.import_module(f"ft.tasks.{spec['task']['name']}")
    self.task = task.Task.from_spec(spec["task"], self.preprocess)
    self.example = getattr(self.task, "unlabelled", self.preprocess)
    self.calibration = spec["calibration"]
    self.batch = batch
    self.rows = self.preprocess.read_rows
    self.state = state.State(None, None, {}, {}, None, None)
    apply, pretrained, interceptor, self.variables = load(self.folder)
    if hasattr(self.task, "restore"):
      self.variables = {**self.variables, tune.COMPANY: self.task.restore(self.folder)}
    combine = lambda frozen, trainable: frozen  # noqa: E731
    self.step = state.make_predict_step(self.task.predict, apply, combine)
    self.write, self._buckets = None, self.preprocess.buckets
    if generation.writes(self.task):
      self.write = generation.make_step(self.task, pretrained, combine, interceptor)
      self.example, self._buckets = self.task.prompt, generation.buckets(self.task)

  def __call__(self, rows: Iterable) -> Iterator[dict]:
    """Yields one JSON-able dict a row, in order, as soon as its batch is full.

    Args:
      rows: dicts with the roles the preprocessing reads (`text`, `image`, …), or RowError for
        rows that could not be read: they yield {"error": …} and stop nothing.
    """
    waiting = []
    for row in rows:
      waiting.append(row)
      if len(waiting) == self.batch:
        yield from self._answer(waiting)
        waiting = []
    if waiting:
      yield from self._answer(waiting)

  def _answer(self, rows: list) -> list[dict]:
    answers, examples, where = [None] * len(rows), [], []
    cut = getattr(self.task, "parts", lambda row: [row])  # of what is longer than the model reads
    parts = [[] for _ in rows]
    for place, row in enumerate(rows):
      try:
        if isinstance(row, errors.RowError):
          raise row
        answers[place] = {key: row[key] for key in _PASSED if key in row}
        parts[place] = cut(row)
        made = [self.example(part) for part in parts[place]]
        examples += made
        where += [place] * len(made)
      except errors.RowError as error:
        answers[place] = {**(answers[place] or {}), "error": str(error)}
    found = [None] * len(examples)
    for part in _alike(examples, self.preprocess.pad):
      chosen = loaders.from_examples([examples[i] for i in part], self.preprocess)
      loader = loaders.Loader(
        chosen, self.batch, pad=self.preprocess.pad, buckets=self._buckets
      )
      for batch in loader.iterate():
        outputs = jax.device_get((self.write or self.step)({}, {}, self.variables, batch))
        for at, index in enumerate(outputs["index"]):
          if index >= 0:
            one = {key: np.asarray(value[at]) for key, value in outputs.items()}
            found[part[index]] = self.task.describe(one, self.calibration)
    for place in sorted(set(where)):
      of_row = [answer for at, answer in zip(where, found, strict=True) if at == place]
      whole = of_row[0] if len(of_row) == 1 else self.task.joined(parts[place], of_row)
      answers[place] |= whole
    return answers


def exported(folder: pathlib.Path) -> pathlib.Path:
  """Returns what a run left, its `model/`, else its `adapter/`; or the folder, if it is such a one.

  Raises:
    UserError: there is neither.
  """
  for place in (folder / "model", folder / "adapter", folder):
    if (place / "ft.json").is_file():
      return place
  raise errors.UserError(
    f"{folder}: no exported model there (model/ft.json and adapter/ft.json are missing); "
    f"is the run finished, with train.export on?"
  )


def description(folder: pathlib.Path) -> tuple:
  """Returns what ft.json of an exported model says, and the preprocessing it was tuned with."""
  spec = json.loads((folder / "ft.json").read_text())
  modality = importlib.import_module(f"ft.data.{spec['modality']}")
  return spec, modality.Preprocess.from_spec(spec["preprocess"], folder)


def load(folder: pathlib.Path):
  """Returns (apply, model, interceptor, variables) of an exported model, or of adapter and base."""
  if not saving.is_adapter(folder):
    pretrained = models.load(str(folder))
    return state.make_apply(pretrained.module), pretrained, None, pretrained.variables
  pretrained, tuned, trainable = saving.load(folder)
  apply = state.make_apply(pretrained.module, tuned.interceptor, tuned.around)
  return apply, pretrained, tuned.interceptor, tuned.combine(tuned.frozen, trainable)


def _alike(examples: list[dict], pad: dict) -> list[list[int]]:
  """Groups examples whose fixed shapes are equal: only those can share a batch."""
  groups = {}
  for i, example in enumerate(examples):
    shape = tuple((k, np.shape(v)) for k, v in sorted(example.items()) if k not in pad)
    groups.setdefault(shape, []).append(i)
  return list(groups.values())
