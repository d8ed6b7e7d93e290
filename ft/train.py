"""The loop: a pretrained model becomes a specialist. Read `train` from top to bottom.

    data -> model -> tune -> task -> baselines -> state -> loop -> results -> card -> export

Nothing here knows which modality, model or task runs: those are files that the config names.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from ft import (
  anchor,
  averaging,
  checkpoint,
  errors,
  evaluate,
  generation,
  guards,
  last_layer,
  logs,
  mesh,
  optim,
  results,
  state,
  tune,
  workdir,
)
from ft.data import loader as loaders
from ft.preempt import Preemption
from ft.run import (
  Run,
  accompany,
  extract_features,
  make_loaders,
  prepare,
  probe_gradient,
  refer,
)

KEYS = {
  "batch": (32, "rows in a step, over all devices and micro-batches", (1, None)),
  "accumulate": (1, "micro-batches a step is cut into, to save memory", (1, None)),
  "epochs": (1.0, "passes over the training rows", (0, None)),
  "steps": (0, "steps instead of epochs", (0, None)),
  "eval_every": (0.25, "steps between evaluations; below 1: share of the run", (0, None)),
  "eval_batch": (0, "rows in a batch of evaluation; 0: twice train.batch", (0, None)),
  "train_sample": (512, "training rows evaluated beside the validation rows", (0, None)),
  "save_every": (0, "steps between checkpoints beside those of evaluations", (0, None)),
  "keep": (2, "newest checkpoints kept, beside the best", (1, None)),
  "patience": (0, "evaluations without a better metric before stopping; 0: never", (0, None)),
  "log_every": (10, "steps between log points", (1, None)),
  "bad_steps": (5, "steps in a row that are not finite before the run fails", (1, None)),
  "baselines": (True, "compare with what needs no training"),
  "export": (True, "write the tuned model to model/ and adapter/ at the end"),
}


def train(config, folder: os.PathLike, command: str = "",
          watch: Callable | None = None) -> dict | None:
  """Runs a config in a folder, from where it stands to the end; returns its card's record.

  Args:
    config: complete ConfigDict (`config.load`).
    folder: the run's folder; a run begun there goes on, a finished one is left alone (None).
    command: what the card gives as the way to repeat the run.
    watch: called as (line, task.metric) with what each evaluation found, those of a process before
      too; it may raise to end the run. The run then ends behind its last step and gives what the
      host knows: test is not judged until a call without it goes on from there.
  Raises:
    UserError, TrainingFailed, Preempted: see ft/errors.py.
  """
  mesh.start(config.mesh)
  writer = jax.process_index() == 0
  with workdir.Workdir(folder, config, writer) as home, Preemption() as preemption:
    if home.finished:
      logging.info("%s: this run is finished; card.html shows its results", folder)
      return None
    poll = preemption.poll if jax.process_count() == 1 else lambda: None

    # Data, model and task: what is learnt, from what, by whom.
    run, examples = prepare(config, home.path, poll)

    # What trains, and what stays as it was.
    tuned = tune.init(
      config.tune, run.pretrained.variables, jax.random.PRNGKey(config.seed), run.pretrained.head,
      tune.Context(run.pretrained, functools.partial(probe_gradient, run, examples), report=True),
    )
    tuned = accompany(run, tuned, examples)
    logging.info("%s", tune.describe(tuned))
    averaging.check(config, tuned)
    last_layer.check(run, tuned)
    generation.check(run.task, tuned)
    frozen, mutable = dict(tuned.frozen), {}
    if config.model.batch_stats == "train" and "batch_stats" in frozen:
      mutable = {"batch_stats": frozen.pop("batch_stats")}
    frozen = mesh.place(frozen, mesh.shardings(run.mesh, frozen))

    # What no training gets; with a frozen body the same features serve to train the head.
    features = baseline = None
    only_head = tuned.only_head and run.task.head_features
    compares = getattr(run.task, "refer", None)
    baselines = config.train.baselines and not watch
    if baselines or only_head or compares:
      features = extract_features(run, examples, frozen, mutable, tuned)
    if baselines:
      known = generation.before(run, examples, features, frozen, mutable, tuned)
      baseline = run.task.baselines(known)
    run.lap("baselines")
    if only_head and not run.preprocess.augments:
      examples = {name: loaders.from_arrays(arrays) for name, arrays in features.items()}
    if compares:
      examples = refer(run, examples, features)

    # What keeps it close to what was known, or from learning the rows by heart.
    load = make_loaders(run, examples)
    apply = state.make_apply(run.pretrained.module, tuned.interceptor, tuned.around)
    anchors = anchor.make(config, anchor.Context(run, tuned, frozen, mutable, apply))
    load["train"].beside = anchors.beside

    # The state: pretrained or resumed.
    total = config.train.steps or max(1, round(config.train.epochs * load["train"].steps_per_epoch))
    total = total if tuned.table else 0  # nothing trains
    heads = (*run.pretrained.head, *getattr(run.task, "head", ()))
    tx, schedule = optim.make(config.optim, tuned.trainable, total, heads, tuned)
    fresh = state.create(tuned.trainable, mutable, tx, config.seed, config.average.ema,
                         anchors.extras.memories)
    fresh = mesh.place(fresh, mesh.shardings(run.mesh, fresh))
    checkpoints = checkpoint.Checkpoints(home.path / "checkpoints", config.train.keep)
    now, host = checkpoints.restore_newest(fresh) or (fresh, new_host())
    run.pretrained = dataclasses.replace(run.pretrained, variables=None)
    for phase, seconds in host["seconds"].items():  # of the processes before this one
      run.seconds[phase] = run.seconds.get(phase, 0.0) + seconds
    run.meter.before = host.get("used", {})

    # The loop.
    step = state.make_train_step(
      run.task.loss, apply, tuned.combine, tx, config.train.accumulate, schedule, tuned.stages,
      anchors.extras,
    )
    predict = state.make_predict_step(
      run.task.predict, apply, tuned.combine, mesh.replicated(run.mesh)
    )
    loop = Loop(run, load, frozen, anchors.fixed, step, predict, checkpoints, total, preemption,
                tuned.stages, watch)
    now, host = loop.go(now, host)
    run.lap("training")
    if watch:
      return host

    # The best state, judged once on data that no choice was made on.
    if host["best_step"] != int(now.step):
      now, _ = checkpoints.restore_best(host["best_step"], now)
    final = averaging.Final(tuned, predict, state.averaged(now), frozen)
    if config.average.wise:
      final = averaging.sweep(run, final, load)
    if config.average.dfr:
      final = last_layer.retrain(run, final, load["validation"])
    outputs = {
      name: evaluate.run(final.predict, final.state, final.frozen, load[name], run.place, poll)
      for name in load if name not in ("train", "train_sample")
    }
    outputs["validation"] = final.unseen(outputs["validation"])
    outputs = generation.after(run, examples, outputs, final)
    run.lap("final evaluation")
    calibration = run.task.calibrate(outputs["validation"])
    if config.train.export:
      results.export(run, final.tuned, final.frozen, final.state, calibration, writer)
    run.lap("export")
    return results.conclude(
      guards.Context(run, examples, tuned, final, outputs), features, baseline, calibration, host,
      command, writer,
    )


def new_host() -> dict:
  """What the loop knows beside the state, before the first step; saved with every checkpoint."""
  return {
    "best_step": 0, "best": None, "since_best": 0, "evaluated": 0, "history": [], "offset": 0,
    "seconds": {}, "used": {}, "compile_seconds": 0.0, "examples": 0, "waited": 0.0,
  }


@dataclasses.dataclass
class Loop:
  """Order of a step: evaluate on the old state, save, next batch, step, log the step before.

  That order is what makes a resumed run the same as one never interrupted.
  """

  run: Run
  load: dict
  frozen: object
  fixed: dict
  step: Callable
  predict: Callable
  checkpoints: checkpoint.Checkpoints
  total: int
  preemption: Preemption
  stages: tune.Stages | None = None
  watch: Callable | None = None

  def go(self, now: state.State, host: dict) -> tuple[state.State, dict]:
    """Trains from a state to the last step; returns the state there and the host's record."""
    c, first, self.host = self.run.config.train, int(now.step), host
    self.pending, self.waited, self.since = None, 0.0, (time.monotonic(), first)
    self.metrics = logs.Metrics(self.run.folder, host["offset"], first)
    self.bar = logs.Progress("step", self.total, first)
    for line in host["history"] if self.watch else ():
      self.watch(line, self.run.task.metric)
    every = c.eval_every if c.eval_every >= 1 else c.eval_every * self.total
    every = max(1, math.ceil(every - 1e-6)) if every else self.total
    batches = self.load["train"].iterate(first, self.total, put=self.put)
    try:
      for number in range(first, self.total + 1):
        last = number == self.total
        if (last or number % every == 0) and number > host["evaluated"]:
          self.evaluate(now, number)
          self.save(now, number)
        elif c.save_every and number % c.save_every == 0 and number > first:
          self.save(now, number)
        if c.patience and host["since_best"] >= c.patience:
          logging.info("step %d: no better metric in %d evaluations; stopping", number, c.patience)
          break
        if not last:
          now = self.one(now, number, batches)
      self.flush()
      if int(now.bad):
        raise errors.TrainingFailed(f"the last {int(now.bad)} steps were not finite")
    except errors.Preempted as stop:
      self.save(now, int(now.step))
      self.checkpoints.finish()
      raise errors.Preempted(
        f"{stop}; saved at step {int(now.step)} of {self.total}"
      ) from None
    finally:
      batches.close()
      self.metrics.close()
    self.checkpoints.finish()
    return now, host

  def one(self, now: state.State, number: int, batches) -> state.State:
    """One step: stop if asked to, take the batch, dispatch, then log the step before."""
    self.run.poll()
    began = time.monotonic()
    index, batch = next(batches)
    waited = time.monotonic() - began
    self.waited, self.host["waited"] = self.waited + waited, self.host["waited"] + waited
    began, compiled = time.monotonic(), self.step._cache_size()
    stage = self.stages.of(number, self.total) if self.stages else 0
    now, metrics = self.step(now, self.frozen, batch, self.fixed, stage)
    if self.step._cache_size() > compiled:
      self.host["compile_seconds"] += time.monotonic() - began
    before, self.pending = self.pending, (number, metrics, index)
    if before and self.flush(before):
      raise errors.Preempted("a signal was received; the same command goes on")
    return now

  def put(self, batch: dict) -> tuple[np.ndarray, dict]:
    """A batch's row indices, and the batch on its devices, one step before its turn."""
    if jax.process_count() > 1:  # every process learns of a signal to any, at the same step
      batch["stop"] = np.full(len(batch["index"]), bool(self.preemption.requested))
    return batch["index"], self.run.place(batch)

  def flush(self, pending=None) -> bool:
    """Reads a finished step's metrics, checks and logs them; True if a process wants to stop."""
    if pending is None:
      pending, self.pending = self.pending, None
    if not pending:
      return False
    number, metrics, index = pending
    c, values = self.run.config.train, jax.device_get(metrics)
    if values["bad"]:
      logging.warning("step %d: loss %s is not finite; step skipped", number, values["loss"])
    if values["bad"] >= c.bad_steps:
      raise errors.TrainingFailed(
        f"loss or gradient not finite in {values['bad']} steps in a row, the last of them {number} "
        f"with rows {index[index >= 0].tolist()} of train; try a lower optim.rate"
      )
    self.host["examples"] += int((index >= 0).sum()) * jax.process_count()
    if (number + 1) % c.log_every == 0:
      now, (began, first) = time.monotonic(), self.since
      seconds = (now - began) / (number + 1 - first)
      shown = values.keys() - {"bad", "stop", "weight"}
      line = {f"train/{k}": float(values[k]) for k in sorted(shown)}
      line |= {
        "time/step_seconds": seconds,
        "time/examples_per_second": c.batch / seconds,
        "time/data_wait": self.waited / (now - began),
        **{f"memory/{k}_bytes": v for k, v in logs.peak_memory().items()},
      }
      self.metrics.write(number + 1, line)
      self.since, self.waited = (now, number + 1), 0.0
    speed = c.batch * (number + 1 - self.bar.start) / max(time.monotonic() - self.bar.began, 1e-9)
    note = f"loss {values['loss']:.4f} rate {values['rate']:.1e} {speed:.0f} examples/s"
    self.bar.show(number + 1, note)
    return bool(values.get("stop", False))

  def evaluate(self, now: state.State, number: int) -> None:
    """Metrics of the validation rows and a sample of the training rows, both in evaluation mode."""
    self.flush()
    run, host, line, now = self.run, self.host, {}, state.averaged(now)
    for name in ("validation", "train_sample"):
      if name in self.load:
        out = evaluate.run(self.predict, now, self.frozen, self.load[name], run.place, run.poll)
        where = "train" if name == "train_sample" else name
        line |= {f"{where}/{k}": float(v) for k, v in run.task.metrics(out).items() if "/" not in k}
    key, direction = run.task.metric
    value = line[f"validation/{key}"]
    if not np.isfinite(value):
      raise errors.TrainingFailed(f"step {number}: validation {key} is not finite")
    best = host["best"]
    better = best is None or (value > best if direction == "max" else value < best)
    if better:
      host["best"], host["best_step"] = value, number
    host["since_best"] = 0 if better else host["since_best"] + 1
    host["evaluated"] = number
    host["history"].append({"step": number, **line})
    self.metrics.write(number, line)
    shown = ", ".join(f"{k} {v:.4f}" for k, v in line.items() if k.endswith((f"/{key}", "loss")))
    logging.info("step %d: %s%s", number, shown, " (best so far)" if better else "")
    self.since, self.waited = (time.monotonic(), number), 0.0
    if self.watch:
      self.watch(host["history"][-1], run.task.metric)

  def save(self, now: state.State, number: int) -> None:
    """Starts a checkpoint that a run can go on from exactly."""
    self.flush()
    self.host["offset"] = self.metrics.offset()
    seconds = dict(self.run.seconds)
    seconds["training"] = seconds.get("training", 0.0) + time.monotonic() - self.run.started
    used = self.run.meter.read()
    self.checkpoints.save(number, now, {**self.host, "seconds": seconds, "used": used})
