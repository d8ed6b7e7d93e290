"""Given only data and a model: task and settings by rules, then a race of a few ways to tune.

The rules are few and written down on the card. What they leave open is raced on validation: a small
portfolio by successive halving within a budget of minutes, as one search of `ft/sweep.py` whose
points are all named. The winner is judged on test, and stands in the run's folder as if it had been
asked for.
"""

import importlib
import math
import os
import pathlib
import shutil
from collections.abc import Callable

from absl import logging

from ft import card, errors, models, sweep, workdir
from ft import config as config_lib
from ft import train as train_lib
from ft.card import search
from ft.data import sources

# Roles of the rows -> task; the first whose roles are all there.
TASKS = (
  (("words", "label"), "tag"), (("image", "mask"), "segment"), (("label",), "classify"),
  (("turns",), "chat"), (("chosen", "rejected"), "prefer"), (("prompt", "completion"), "chat"),
  (("text", "text_b"), "embed"), (("audio", "target"), "transcribe"), (("image", "target"),
                                                                       "regress"),
)
OF_MODALITY = {"series": "forecast", "interactions": "recommend"}
SEEN = 500  # rows of each class that training sees, some more than once
MOST_EPOCHS, FEWEST_STEPS = 10, 50
FEW, MANY = 16, 1000  # rows a class: pairs pay up to the first, full fine-tuning from the second
# LoRA's rates, the likeliest first; full fine-tuning takes a tenth (arXiv:2602.04998).
RATES = (1e-3, 3e-4, 3e-3)
FULL = 0.1
HEAD = {"lora": 3.0, "full": 5.0}  # a new head's rate over the rest's
RACE = "race"  # the folder of the trials, in that of the run
FILES = ("card.json", "config.json")  # of the winner, moved last


def train(config, folder: os.PathLike, command: str = "",
          run: Callable = train_lib.train) -> dict | None:
  """Chooses, races, judges; returns the card's record, None where the folder had a card.

  Args:
    config: complete ConfigDict; what it says of task.name, tune, optim.rate, train.batch and
      train.steps is replaced where the rules say something, the rest stays.
    folder: of the run, and of the race in `race/`.
    command: what the card gives as the way to repeat it.
    run: `train.train`.

  Raises:
    UserError: the data fits no task, the folder is that of another config, or what a run raises.
    TrainingFailed: no way to tune went to its end.
  """
  folder = pathlib.Path(folder)
  # The config that was asked for is kept with the race; the folder's own will be the winner's.
  plain = (folder / "config.json").is_file() and not (folder / RACE).is_dir()
  with workdir.Workdir(folder if plain else folder / RACE, config):
    if (folder / card.JSON).is_file():
      logging.info("%s: this run is finished; card.html shows its results", folder)
      return None
    return _race(config, folder, command, run)


def _race(config, folder, command, run) -> dict:
  """The choice and the race of `train`."""
  chosen, portfolio, half, reasons = plan(config)
  for reason in reasons:
    logging.info("auto: %s", reason)
  load = lambda more: config_lib.changed(config, {**chosen, **dict(more)})  # noqa: E731
  settings = sweep.Settings(trials=len(portfolio), rates=0, pruner="halving", keep=2,
                            spare="head", minutes=config.minutes, rung=half)
  race = sweep.Sweep(load, folder / RACE, {}, settings, first=portfolio, train=run)
  race.go()
  if race.best() is None:
    raise errors.TrainingFailed("no way to tune went to its end; the log says why")
  winner = folder / RACE / race.best().user_attrs["folder"]
  record = card.read(winner) if (winner / card.JSON).is_file() else race.judge(command)
  account = race.record()
  card.write_text(folder / "race.html", search.page(account))
  record["notes"] = [*record["notes"], told(account)]
  card.write(record, winner)
  _move_up(winner, folder)
  logging.info("auto: %s The winner is in %s, for predict.py --run too.", told(account), folder)
  return record


def plan(config) -> tuple[dict, list[dict], int, list[str]]:
  """Chooses by rules: (keys that all share, the portfolio, half of the steps, why, in sentences).

  Args:
    config: complete ConfigDict; its data is read.
  """
  info = models.inspect(config.model.source, config.model.family)
  config = config_lib.changed(config, {"data.modality": info.modality})
  modality = importlib.import_module(f"ft.data.{info.modality}")
  preprocess = modality.Preprocess(config.data, info)
  data = getattr(preprocess, "load", sources.load)(config.data)
  task = task_of(info.modality, set(data.columns), config.task.name)
  shared = {"data.modality": info.modality, "task.name": task, "auto": False, "seeds": 1}
  reasons = [f"the rows have {', '.join(sorted(data.columns)) or 'series'}: the task is {task}"]
  labels = list((data.report["labels"].get("train") or {}).values())
  rows = len(data.splits["train"])
  untrained = config.model.random or config.model.source.startswith(models.SCRATCH)
  if task == "classify" and len(labels) > 1:
    shared |= length(rows, len(labels))
  if untrained:
    found = [{"tune.method": "full", "optim.rate": rate} for rate in RATES]
    reasons.append("all weights are random, so that nothing is worth keeping as it is: rates of "
                   "full training are raced")
  elif task == "classify" and len(labels) > 1:
    found, why = classifying(sorted(labels)[(len(labels) - 1) // 2], rows, len(labels),
                             "text" in data.columns)
    reasons += [why]
    for point in found:
      if point["tune.method"] == "head":  # on cached features ten times the steps take seconds
        point["train.steps"] = 10 * shared["train.steps"]
  else:
    found = tuned(("full",) if task == "forecast" else ("lora", "full"))
    reasons.append("rates of LoRA and of full fine-tuning are raced" if task != "forecast" else
                   "forecasters are small: rates of full fine-tuning are raced")
  reasons.append(f"{len(found)} ways are raced within {config.minutes:g} minutes; at half of the "
                 "steps the better half goes on; validation decides, test is judged once")
  half = max(1, steps(config_lib.changed(config, shared), rows) // 2)
  notes = [*config.notes, *(f"Chosen by rule: {reason}." for reason in reasons)]
  return {**shared, "notes": notes}, found, half, reasons


def steps(config, rows: int) -> int:
  """Steps that a config takes over so many rows of train, before a task packs or pairs them."""
  c = config.train
  return c.steps or max(1, round(c.epochs * math.ceil(rows / c.batch)))


def task_of(modality: str, roles: set, said: str) -> str:
  """The task for rows of these roles; what the config says, if that is not the default.

  Raises:
    UserError: no rule knows the roles.
  """
  if said != config_lib.SELECTORS["task.name"][0]:
    return said
  if modality in OF_MODALITY:
    return OF_MODALITY[modality]
  for needs, task in TASKS:
    if roles.issuperset(needs):
      return task
  raise errors.UserError(
    f"auto: no rule knows the task of rows with {', '.join(sorted(roles))}; name columns in "
    "data.columns (such as label=…), or the task in task.name")


def length(rows: int, classes: int) -> dict:
  """Batch and steps: about SEEN rows of each class are seen, each row one to ten times."""
  batch = 64 if rows >= 2000 else 32 if rows >= 320 else 16
  epochs = min(max(SEEN * classes / rows, 1.0), MOST_EPOCHS)
  return {"train.batch": batch, "train.steps": max(FEWEST_STEPS, math.ceil(epochs * rows / batch)),
          "train.eval_every": 0.25}


def classifying(per_class: int, rows: int, classes: int, texts: bool) -> tuple[list[dict], str]:
  """The portfolio of a classifier, cheapest and likeliest first, and why.

  Args:
    per_class: rows of the class in the middle (of two, the smaller). rows, classes: of train.
    texts: whether rows have a text.
  """
  said = f"{rows:,} rows, {classes} classes, {per_class:,} rows in the one in the middle: "
  probe = {"tune.method": "head", "optim.rate": 1e-2}
  # A uniform target keeps the features of many classes apart (see configs/classify_text.py).
  smooth = {"task.label_smoothing": 0.1} if classes > 20 else {}
  lora, full = tuned(("lora",), smooth), tuned(("full",), smooth)
  if per_class <= FEW:
    pairs = {"task.name": "few_shot", "task.iterations": 5, "tune.method": "full",
             "optim.rate": 5e-5, "optim.head_rate_factor": 200.0}
    return [probe, *([pairs] if texts else []), lora[0]], (
      said + f"up to {FEW} a class, the frozen probe"
      + (", contrastive pairs (SetFit)" if texts else "") + " and LoRA")
  if per_class > MANY and rows > 5000:
    return [probe, *full, lora[0]], said + (
      f"above {MANY:,} a class and 5,000 in all, full fine-tuning at {len(full)} rates, LoRA and "
      "the frozen probe")
  return [probe, *lora, full[0]], said + (
    f"up to {MANY:,} a class or 5,000 in all, LoRA at {len(lora)} rates, full fine-tuning and the "
    "frozen probe")


def tuned(methods, more: dict | None = None) -> list[dict]:
  """Points of each method at each rate; ten times lower rates where all weights train.

  Args:
    methods: of tune.method. more: keys of every point, of a model with a new label head; or None.
  """
  return [{"tune.method": method, "optim.rate": rate * (FULL if method == "full" else 1),
           **({} if more is None else {"optim.head_rate_factor": HEAD[method], **more})}
          for method in methods for rate in RATES]


def told(account: dict) -> str:
  """The race in a sentence, best first."""
  rows = [row for row in search.ranked(account) if row["value"] is not None]
  said = [f"{sweep.describe({k: v for k, v in row['point'].items() if k in _SHOWN})}: "
          f"{search.words.number(row['value'], account['metric'])}"
          f"{'' if row['state'] == 'complete' else ' when it was ended'}" for row in rows]
  metric = search.words.unit(account["metric"])
  return f"Raced on validation ({metric}): {'; '.join(said)}."


_SHOWN = ("task.name", "tune.method", "optim.rate")


def _move_up(winner: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes the winner's folder the run's; the card comes last, as it says that all is there."""
  paths = sorted(winner.iterdir(), key=lambda path: (path.name in FILES, path.name == card.JSON))
  for path in paths:
    shutil.move(path, folder / path.name)
