"""The end of a run: results with intervals, guards, the card, the exported model."""

import dataclasses
import json
import platform
import time

import jax
import numpy as np
from absl import logging

from ft import card, evaluate, generation, guards, logs, mesh, models, tune
from ft import config as config_lib
from ft.guards import overfit
from ft.tune import saving


def export(run, tuned, frozen, state, calibration: dict, writer: bool) -> None:
  """Writes what prediction needs: `model/`, and `adapter/` where a part of the model trained.

  Args:
    run, tuned: of the run.
    frozen: the placed tree `tuned.frozen`, batch statistics that train taken out.
    state: the best one.
    calibration: what the task fitted on validation.
    writer: whether this process writes; all of them have to call.

  A method that plain weights cannot compute leaves no `model/`, full fine-tuning no `adapter/`.

  Raises:
    TrainingFailed: the written files do not give the same outputs.
  """
  company = {}
  if hasattr(run.task, "save"):
    company = {**frozen.get(tune.COMPANY, {}), **state.trainable.get(tune.COMPANY, {})}
  frozen, trainable, mutable = tune.alone(frozen), tune.alone(state.trainable), state.mutable
  merged = None if tuned.merge is None else {**tuned.merge(frozen, trainable), **mutable}
  if jax.process_count() > 1:  # the writer must hold what it writes
    gather = jax.jit(lambda tree: tree, out_shardings=mesh.replicated(run.mesh))
    frozen, trainable, mutable, merged, company = gather(
      (frozen, trainable, mutable, merged, company))
  if not writer:
    return
  spec = {
    "modality": run.config.data.modality,
    "preprocess": run.preprocess.spec(),
    "task": {"name": run.config.task.name, **run.task.spec()},
    "calibration": calibration,
  }
  if merged is not None:
    own = run.task.save(company) if company else {}
    files = {**run.pretrained.files, **own, "ft.json": json.dumps(spec, indent=1).encode()}
    models.export(dataclasses.replace(run.pretrained, variables=merged, files=files),
                  run.folder / "model")
  if run.config.tune.method not in ("full", "none") and tuned.table:
    base = saving.Base(config_lib.to_json(run.config.model), run.task.model_args, run.config.seed)
    saving.save(run.folder / "adapter", run.pretrained, tuned, frozen, {**trainable, **mutable},
                base, spec)


def conclude(context: guards.Context, features, baseline, calibration, host, command, writer):
  """Builds the record of the run, writes its card and tells the terminal; returns the record.

  Where the task has `beside(tuned, pretrained) -> arrays (N, …)`, the tuned outputs of a split get
  these of both models' outputs, and its metrics may compare the two row by row.

  Args:
    context: the finished run.
    features: split -> what `run.extract_features` gave, or None.
    baseline: row name -> split -> what no training gives, or None.
    calibration: what the task fitted on validation.
    host: what the loop recorded.
    command: the command line of the run.
    writer: whether this process writes.
  """
  run, tuned, outputs = context.run, context.tuned, context.outputs
  gathered = guards.gather(run.config.guard, context)
  run.lap("guards")
  metric, mode = getattr(run.task, "judged", run.task.metric)
  rows = {
    split: {**{name: of[split] for name, of in (baseline or {}).items() if split in of},
            guards.TUNED: out}
    for split, out in outputs.items()
  }
  if hasattr(run.task, "beside"):
    for of in rows.values():
      if guards.ZERO_SHOT in of:
        of[guards.TUNED] = {**of[guards.TUNED],
                            **run.task.beside(of[guards.TUNED], of[guards.ZERO_SHOT])}
  evidence = guards.Evidence(
    metric=metric, mode=mode, selection=run.task.metric, history=host["history"], outputs=rows,
    score=run.task.score,
    metrics=run.task.metrics, value=run.task.value, count=getattr(run.task, "count", None),
    blocks=getattr(run.task, "blocks", None),
    features=features if features and run.task.head_features else {}, rows=run.data.splits,
    labels=tuple(getattr(run.task, "labels", ())), gathered=gathered,
    extra=tuple(name for name in outputs if name not in ("validation", "test")),
  )
  resamples = run.config.guard.overfit.resamples
  results = overfit.results(evidence, resamples)
  differences = overfit.differences(evidence, resamples)
  run.lap("results")
  others = [name for name in guards.names() if name != "cost"]
  found = guards.measure(run.config.guard, evidence, others)
  run.lap("guards")
  evidence.cost = describe_cost(run, tuned, host)  # with what the other guards took
  found |= guards.measure(run.config.guard, evidence, ["cost"])
  record = {
    "title": run.config.title or f"{run.config.model.source}: {run.config.task.name}",
    "notes": [*run.config.notes, *tuned.notes, *context.final.notes],
    "command": command,
    "config": config_lib.to_json(run.config),
    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "versions": versions(),
    "data": describe_data(run, context.examples),
    "model": describe_model(run, tuned),
    "task": {"name": run.config.task.name, "metric": metric, **run.task.describe_task()},
    "history": host["history"],
    "best": {"step": host["best_step"], "metric": run.task.metric[0], "value": host["best"]},
    "results": results,
    "differences": differences,
    **run.task.evidence(outputs, calibration),
    "calibration": found["calibrate"]["numbers"],
    "guards": found,
    "cost": found["cost"]["numbers"],
    "tradeoff": list(context.final.tradeoff),
    "samples": generation.samples(run, rows, writer),
  }
  if writer:
    card.write(record, run.folder)
    (run.folder / evaluate.FEATURES).unlink(missing_ok=True)
    logging.info("\n%s", card.summary(record))
    if run.config.train.export:
      logging.info("predict with: %s", run.preprocess.try_it(run.folder))
  return record


def describe_data(run, examples: dict) -> dict:
  """The card's account of the rows."""
  splits = {}
  for name, rows in run.data.splits.items():
    splits[name] = {
      "rows": len(examples[name]),
      "labels": run.data.report["labels"].get(name, {}),
      "fingerprint": card.fingerprint(rows[i] for i in range(len(rows))),
    }
  counts = {
    f"{name}, {key.replace('_', ' ')}": value
    for name, part in examples.items()
    for key, value in (getattr(part, "report", None) or {}).items()
    if value and key not in ("rows", "used")
  }
  return {
    "splits": splits, "report": run.data.report, "counts": counts,
    "first_example": run.first_example,
  }


def describe_model(run, tuned) -> dict:
  """The card's account of what was loaded and what trained."""
  trainable, frozen = count(tuned.trainable), count(tune.shapes(tuned))
  return {
    "source": run.config.model.source,
    "family": run.pretrained.family,
    "parameters": trainable + frozen,
    "trainable": trainable,
    "share": trainable / (trainable + frozen),
    "table": [list(row) for row in tuned.table],
    "load_report": dataclasses.asdict(run.pretrained.report),
  }


def describe_cost(run, tuned, host: dict) -> dict:
  """What the cost guard reads; see ft/guards/cost.py."""
  saved = sorted((run.folder / "checkpoints").glob("step_?????????"))
  newest = saved[-1:] and sum(p.stat().st_size for p in saved[-1].rglob("*") if p.is_file())
  loop = max(run.seconds.get("training", 0.0) - host["compile_seconds"], 1e-9)
  trainable = count(tuned.trainable)
  return {
    "phases": {phase: round(value, 2) for phase, value in run.seconds.items()},
    "examples": host["examples"],
    "examples_per_second": host["examples"] / loop,
    "compile_seconds": host["compile_seconds"],
    "data_wait_share": host["waited"] / loop,
    "parameters": trainable + count(tune.shapes(tuned)),
    "trainable": trainable,
    "checkpoint_bytes": newest or None,
    "devices": jax.device_count(),
    "peak_bytes": logs.peak_memory().get("device"),
    "platform": jax.default_backend(),
    "device_kind": jax.devices()[0].device_kind,
    "used": run.meter.read(),
  }


def count(tree) -> int:
  """Numbers of elements in a tree."""
  return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def versions() -> dict:
  """Versions of what decides the numbers, and the device they were computed on."""
  from importlib import metadata

  names = ("ft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  found = {}
  for name in names:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = "not installed as a package"
  device = jax.devices()[0]
  return {
    "python": platform.python_version(), **found,
    "device": f"{device.platform} {device.device_kind}", "machine": platform.machine(),
  }
