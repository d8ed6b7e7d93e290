"""Searching settings on Optuna: rates first, then the rest, on validation alone.

A trial is the folder of an ordinary run that stops behind its last step: its test rows were never
judged. The winner's run goes on from there, and is the only one that sees them. Trials live in a
database: one file for a search by one process, a server for workers on many machines.

A trial that was interrupted is asked for again, and goes on from its checkpoint.
"""

import dataclasses
import gc
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import socket
import time
import warnings
from collections.abc import Callable

import jax
from absl import logging

from ft import card, errors
from ft import config as config_lib
from ft import train as train_lib
from ft.search_space import Range

RATE = "optim.rate"
PRUNERS = ("median", "halving", "none")
HEARTBEAT = 60  # seconds; a worker that is silent for three of them has died


class Pruned(Exception):  # noqa: N818 (no fault: a trial that ends early)
  """Ends a trial that others are better than, or that the budget has no time for."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to search.

  Attributes:
    trials: how many settings are tried, over all workers and starts.
    rates: points of the grid of rates that is tried first, for each choice of tune.method and of
      the other selectors; 0: none.
    pruner: of PRUNERS: end a trial that is worse than the median of the others at its step, or
      let the best one of `keep` go on at steps that grow as many times.
    keep, rung: of halving, and its first step; 0: a hundredth of the first whole trial's.
    spare: value of tune.method whose trials are neither ended early nor what others are held
      against, such as "head": what trains on cached features is done before others have begun.
    minutes: budget, from which no further trial starts and the running one ends; 0: none. The first
      one always goes to its end.
    seed: of what is tried; workers on one server draw freely.
  """

  trials: int = 20
  rates: int = 5
  pruner: str = "median"
  keep: int = 3
  rung: int = 0
  spare: str = ""
  minutes: float = 0.0
  seed: int = 0


class Sweep:
  """A search in a folder.

  Args:
    load: overrides, (key, text) pairs -> the complete config of a trial; `config.load` does it.
    folder: of the trials' folders, the database and the account.
    space: of `search_space.read`.
    settings: of the search.
    storage: URL of the database; empty: a file in the folder.
    name: of the search in the database; empty: that of the folder.
    first: settings to try before the grid of rates, key -> value; keys may be outside the space.
    train: `train.train`.

  Raises:
    UserError: the folder or the database cannot be used, or holds another search.
  """

  def __init__(self, load: Callable, folder: os.PathLike, space: dict, settings: Settings,
               storage: str = "", name: str = "", first: list[dict] = (),
               train: Callable = train_lib.train):
    self.folder, self.load, self.space, self.settings = pathlib.Path(folder), load, space, settings
    self.train, self.began, self.base = train, time.monotonic(), load([])
    self._refused = None  # the newest UserError of a trial
    if self.base.mesh.processes > 1:
      raise errors.UserError("mesh.processes: a trial is one process; start several workers with "
                             "one --storage in place of it")
    if self.base.seeds > 1:
      raise errors.UserError("seeds: a trial has one seed; run the winner's command with several")
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise errors.UserError(f"--workdir={folder}: cannot write there ({error.strerror})") from None
    self.optuna = errors.require("optuna", "sweep")
    self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
    name = name or self.folder.name
    self.study, made = self._open(storage or f"sqlite:///{self.folder.absolute() / 'sweep.db'}",
                                  name)
    if not made:  # another worker may be about to ask for the first trials
      _wait(lambda: "ready" in self.study.user_attrs)
    self._check(name)
    for point in [*first, *self._grid()]:
      self._ask(point)
    self.study.set_user_attr("ready", True)

  # The database.

  def _open(self, url, name) -> tuple:
    """(study, whether it is new)."""
    o, s = self.optuna, self.settings
    make = {"median": lambda: o.pruners.MedianPruner(n_startup_trials=4),
            "halving": lambda: o.pruners.SuccessiveHalvingPruner(s.rung or "auto",
                                                                 reduction_factor=s.keep),
            "none": o.pruners.NopPruner}[s.pruner]
    how = {"study_name": name, "storage": self._storage(url), "pruner": make()}
    try:
      study, made = o.create_study(direction="maximize", **how), True
    except o.exceptions.DuplicatedStudyError:
      study, made = o.load_study(**how), False
    # Workers, and a search that goes on, must not draw the same again.
    seed = s.seed + len(study.trials) if url.startswith("sqlite:") else None
    study.sampler = o.samplers.TPESampler(seed=seed, n_startup_trials=5)
    return study, made

  def _storage(self, url):
    o, shown = self.optuna, url.split("@")[-1]
    for last in (False, False, True):  # two workers that make the tables at once disturb each other
      try:
        with warnings.catch_warnings():
          warnings.simplefilter("ignore", o.exceptions.ExperimentalWarning)
          return o.storages.RDBStorage(
            url.replace("postgresql://", "postgresql+psycopg://", 1),
            heartbeat_interval=HEARTBEAT, grace_period=3 * HEARTBEAT,
            heartbeat_stale_trial_callback=lambda study, trial: self._ask_again(trial))
      except ImportError as error:
        raise errors.UserError(f"--storage={shown}: its driver is not installed; `pip install -e "
                               f"'.[sweep]'` brings PostgreSQL's ({error})") from None
      except Exception as error:  # noqa: BLE001 (each driver has errors of its own)
        if last:
          raise errors.UserError(f"--storage={shown}: cannot be opened ({type(error).__name__}: "
                                 f"{str(error).splitlines()[0]})") from None
        time.sleep(1)

  def _check(self, name) -> None:
    said = json.loads(json.dumps({"config": config_lib.to_json(self.base),
                                  "space": {key: str(entry) for key, entry in self.space.items()}}))
    before = self.study.user_attrs.get("said")
    if before is None:
      self.study.set_user_attr("said", said)
    elif before != said:
      changed = config_lib.difference(before["config"], said["config"])
      raise errors.UserError(
        f"the search {name!r} was begun with another config or space; choose another --workdir or "
        "--study:\n  " + "\n  ".join(changed or ["the space differs"]))

  def trials(self, *states) -> list:
    """Trials of the given states, such as "COMPLETE", by number; all if none is given."""
    return [trial for trial in self.study.get_trials(deepcopy=False)
            if not states or trial.state.name in states]

  def best(self):
    """The trial that went to its end with the best validation, or None."""
    return max(self.trials("COMPLETE"), key=lambda trial: trial.value, default=None)

  def begun(self) -> list:
    """Trials that count: all but those that wait, or were interrupted and are asked for again."""
    return [trial for trial in self.trials("COMPLETE", "PRUNED", "RUNNING", "FAIL")
            if trial.state.name != "FAIL" or not self._void(trial)]

  def _void(self, trial) -> bool:
    """Whether a failed trial says nothing of its settings: interrupted, or refused as all were."""
    return ("reason" not in trial.user_attrs
            or trial.number in self.study.user_attrs.get("void", []))

  # What is tried.

  def _grid(self) -> list[dict]:
    """Rates first: each point with each choice of the selectors, all else as the config says."""
    if RATE not in self.space or not self.settings.rates:
      return []
    said = {key: entry for key, entry in self.space.items() if key in config_lib.SELECTORS}
    found = []
    for rate, *chosen in itertools.product(_inside_out(self.space[RATE].grid(self.settings.rates)),
                                           *[entry.values for entry in said.values()]):
      point = {**dict(zip(said, chosen, strict=True)), RATE: rate}
      for key, entry in self.space.items():
        if key not in point and self._reads(point, key):
          value = self._usual(point, key)
          value = value if isinstance(entry, Range) else str(value)
          if entry.holds(value):
            point[key] = value
      found.append(point)
    return found

  def _reads(self, point, key) -> bool:
    """Whether the components that a point chooses read a key."""
    return key in self._schema(point)

  def _usual(self, point, key):
    """What the config says of a key, or else the default of the component that a point chooses."""
    try:
      return _value(self.base, key)
    except KeyError:
      return self._schema(point)[key][0]

  def _schema(self, point) -> dict:
    return config_lib.schema({name: point.get(name) or _value(self.base, name)
                              for name in config_lib.SELECTORS})

  def _ask(self, point) -> None:
    """Has a point tried, unless it was asked for before."""
    asked = digest(point)
    if all(trial.user_attrs.get("asked") != asked
           for trial in self.study.get_trials(deepcopy=False)):
      inside = {key: value for key, value in point.items() if key in self.space}
      outside = {key: value for key, value in point.items() if key not in self.space}
      self.study.enqueue_trial(inside, user_attrs={"asked": asked, "outside": outside})

  def _ask_again(self, trial) -> None:
    """Has the settings of a trial that was interrupted tried again, once."""
    told = {key: trial.user_attrs[key] for key in ("asked", "outside") if key in trial.user_attrs}
    later = [_identity(other) for other in self.trials() if other.number > trial.number]
    if _identity(trial) not in later:
      self.study.enqueue_trial(_params(trial), user_attrs=told)

  def _pick_up(self) -> None:
    """Asks again for trials that were told to stop, or whose process of this machine is no more."""
    for trial in self.trials("RUNNING"):
      host, process = trial.user_attrs.get("process", ("", 0))
      if host == socket.gethostname() and not _alive(process):
        self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
    for trial in self.trials("FAIL"):
      if self._void(trial):
        self._ask_again(trial)

  # The search.

  def go(self, after: Callable = lambda: None) -> None:
    """Tries settings until there are as many as asked for, or the budget is spent.

    Args:
      after: called behind each trial.

    Raises:
      Preempted: as `train.train`; a trial that fails in training is noted as such.
      UserError: no trial went to its end, and this is why the last one was refused. One that is
        refused beside others that are not, such as for a rank too large, is noted as failed.
    """
    self._pick_up()
    while len(self.begun()) < self.settings.trials and not self._spent():
      self.study.optimize(self._one, n_trials=1, catch=(errors.TrainingFailed, errors.UserError))
      self._tidy()
      after()
      gc.collect()
      jax.clear_caches()  # programs of one trial are of no use to the next
    if self._refused and self.best() is None:  # what all share is wrong, and may be put right
      self.study.set_user_attr("void", [trial.number for trial in self.trials("FAIL")])
      raise self._refused

  def _spent(self) -> bool:
    """Whether the budget is gone; the first trial always goes to its end."""
    minutes = self.settings.minutes
    return bool(minutes and self.best() and time.monotonic() - self.began > 60 * minutes)

  def _one(self, trial) -> float:
    """One trial, from its settings to its value: validation's, greater is better."""
    trial.set_user_attr("process", [socket.gethostname(), os.getpid()])
    point = self._point(trial)
    name = f"trial-{digest(point)}"
    trial.set_user_attr("point", point)
    trial.set_user_attr("folder", name)
    logging.info("trial %d: %s", trial.number, describe(point) or "as the config says")
    known = [other for other in self.trials("COMPLETE") if other.user_attrs.get("folder") == name]
    if known:
      for key in ("sign", "metric", "best_step", "seconds"):
        trial.set_user_attr(key, known[0].user_attrs[key])
      return known[0].value
    began = time.monotonic()
    try:
      host = self.train(self.config(point), self.folder / name, watch=self._watch(trial, point))
    except (Pruned, errors.TrainingFailed, errors.UserError) as reason:
      trial.set_user_attr("reason", str(reason))
      logging.info("trial %d ends: %s", trial.number, reason)
      if isinstance(reason, Pruned):
        raise self.optuna.TrialPruned(str(reason)) from None
      self._refused = reason if isinstance(reason, errors.UserError) else self._refused
      raise
    finally:
      trial.set_user_attr("seconds", time.monotonic() - began)
    trial.set_user_attr("best_step", host["best_step"])
    logging.info("trial %d: validation %s %.4f", trial.number, trial.user_attrs["metric"],
                 host["best"])
    return trial.user_attrs["sign"] * host["best"]

  def _point(self, trial) -> dict:
    """The trial's settings, key -> value: what was asked for it, the rest suggested."""
    point = dict(trial.user_attrs.get("outside", {}))
    for key, entry in self.space.items():
      if key in config_lib.SELECTORS or self._reads(point, key):
        point[key] = entry.suggest(trial, key)
    return point

  def config(self, point: dict):
    """The complete config of a trial."""
    return self.load(words(point))

  def _watch(self, trial, point):
    spared = self.settings.spare and point.get("tune.method") == self.settings.spare

    def watch(line, metric):
      name, mode = metric
      sign = 1 if mode == "max" else -1
      if "sign" not in trial.user_attrs:
        trial.set_user_attr("sign", sign)
        trial.set_user_attr("metric", name)
      if spared:
        return
      trial.report(sign * line[f"validation/{name}"], line["step"])
      if self._spent():
        raise Pruned("the budget was spent")
      if trial.should_prune():
        raise Pruned(f"others were better at step {line['step']}")

    return watch

  def _tidy(self) -> None:
    """Removes what is large in the folders of trials that will not be taken up again."""
    best = self.best()
    for trial in self.trials("COMPLETE", "PRUNED", "FAIL"):
      name, resumes = trial.user_attrs.get("folder"), "reason" not in trial.user_attrs
      if name and best and name != best.user_attrs["folder"] and not (
          trial.state.name == "FAIL" and resumes):
        shutil.rmtree(self.folder / name / "checkpoints", ignore_errors=True)

  def judge(self, command: str) -> dict | None:
    """Lets the winner's run go on to its end, which judges test, and gives its card's record.

    None where other workers still try settings, or the winner's folder is on another machine.
    """
    best, running = self.best(), self.trials("RUNNING")
    if best is None or running:
      logging.info("test is not judged: %s", f"{len(running)} trials still run, and whoever ends "
                   "last judges" if running else "no trial went to its end")
      return None
    folder = self.folder / best.user_attrs["folder"]
    if not (folder / "config.json").is_file():
      logging.info("the winner's folder is on %s; the command above judges it there",
                   best.user_attrs["process"][0])
      return None
    judged = self.study.user_attrs.get("judged", [])
    if folder.name not in judged:
      self.study.set_user_attr("judged", [*judged, folder.name])
    self.train(self.config(best.user_attrs["point"]), folder, command)
    return card.read(folder)

  def record(self) -> dict:
    """The account of the search as JSON types: metric, mode, space, trials, best, judged."""
    kept = ("point", "folder", "best_step", "seconds", "reason", "metric")
    rows, sign, metric = [], 1, ""
    for trial in self.study.get_trials(deepcopy=False):
      told = trial.user_attrs
      if trial.state.name == "WAITING" or trial.state.name == "FAIL" and "reason" not in told:
        continue
      sign, metric = told.get("sign", sign), told.get("metric", metric)
      last = trial.value if trial.value is not None else max(
        trial.intermediate_values.values(), default=None)
      rows.append({"number": trial.number, "state": trial.state.name.lower(),
                   "value": None if last is None else told.get("sign", 1) * last,
                   **{key: told[key] for key in kept if key in told}})
    best = self.best()
    return {"title": self.base.title or self.study.study_name, "metric": metric,
            "mode": "max" if sign > 0 else "min", "trials": rows,
            "space": {key: str(entry) for key, entry in self.space.items()},
            "best": best and best.number, "judged": self.study.user_attrs.get("judged", [])}


def words(point: dict) -> list[tuple[str, str]]:
  """A point as overrides of a config."""
  return [(key, str(value)) for key, value in point.items()]


def _params(trial) -> dict:
  """What a trial was given, or will be."""
  return trial.params or trial.system_attrs.get("fixed_params", {})


def _identity(trial) -> str:
  return digest({**_params(trial), **trial.user_attrs.get("outside", {})})


def digest(point: dict) -> str:
  """A short name of settings, the same for the same settings."""
  text = json.dumps({key: str(value) for key, value in point.items()}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:10]


def describe(point: dict) -> str:
  """"optim.rate=0.0003 tune.method=lora"."""
  return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                  for key, value in point.items())


def _value(config, key: str):
  for part in key.split("."):
    config = config[part]
  return config


def _wait(until: Callable, seconds: float = 30) -> None:
  """Waits until something holds, but no longer than that."""
  end = time.monotonic() + seconds
  while not until() and time.monotonic() < end:
    time.sleep(0.2)


def _inside_out(values: list) -> list:
  """The middle first: a search that is cut short has tried the likeliest."""
  middle = (len(values) - 1) / 2
  return sorted(values, key=lambda value: abs(values.index(value) - middle))


def _alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True
