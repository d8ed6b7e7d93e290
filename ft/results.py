"""The end of a run: results with intervals, guards, the card, the exported model."""

import dataclasses
import importlib
import json
import pathlib
import platform
import time

import jax
import numpy as np
from absl import logging

from ft import card, logs, models, stats
from ft import config as config_lib

TUNED = "fine-tuned"


def export(run, variables: dict, calibration: dict) -> None:
  """Writes the tuned model to `model/` with all that prediction needs; see `models.export`.

  Raises:
    TrainingFailed: the written files do not give the same outputs.
  """
  spec = {
    "modality": run.config.data.modality,
    "preprocess": run.preprocess.spec(),
    "task": {"name": run.config.task.name, **run.task.spec()},
    "calibration": calibration,
  }
  files = {**run.pretrained.files, "ft.json": json.dumps(spec, indent=1).encode()}
  tuned = dataclasses.replace(run.pretrained, variables=variables, files=files)
  models.export(tuned, run.folder / "model")


def compare(task, outputs: dict[str, dict]) -> tuple[dict, dict]:
  """Metrics with 95 % bootstrap intervals by row, and paired differences to the tuned row.

  Args:
    task: gives metrics and per-example scores.
    outputs: row name -> outputs of one split, over the same examples.
  Returns:
    (row -> {metrics, interval, n}, "fine-tuned - row" -> {metric, difference, lo, hi, n})
  """
  key, _ = task.metric
  rows, differences, scores = {}, {}, {}
  for name, out in outputs.items():
    scores[name] = task.score(out)
    low, high = stats.bootstrap(scores[name])
    rows[name] = {
      "metrics": task.metrics(out),
      "interval": {key: [low, high]},
      "n": len(scores[name]),
    }
  for name in outputs:
    if name != TUNED:
      difference, low, high = stats.paired_bootstrap(scores[TUNED], scores[name])
      differences[f"{TUNED} - {name}"] = {
        "metric": key, "difference": difference, "lo": low, "hi": high, "n": len(scores[name]),
      }
  return rows, differences


def conclude(run, tuned, outputs, baseline, calibration, host, examples, command, writer) -> dict:
  """Builds the record of the run, writes its card and tells the terminal; returns the record."""
  judged = [name for name in outputs if name != "validation"]
  results, differences = {}, {}
  for name in ["validation", *judged]:
    rows = {b: splits[name] for b, splits in (baseline or {}).items() if name in splits}
    results[name], differences[name] = compare(run.task, {**rows, TUNED: outputs[name]})
  run.lap("results")
  record = {
    "title": run.config.title or f"{run.config.model.source}: {run.config.task.name}",
    "notes": list(run.config.notes),
    "command": command,
    "config": config_lib.to_json(run.config),
    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "versions": versions(),
    "data": describe_data(run, examples),
    "model": describe_model(run, tuned),
    "task": {"name": run.config.task.name, "metric": run.task.metric[0], **run.task.describe_task()},
    "history": host["history"],
    "best": {"step": host["best_step"], "metric": run.task.metric[0], "value": host["best"]},
    "results": results,
    "differences": {name: differences[name] for name in judged},
    **run.task.evidence(outputs, calibration),
    "cost": describe_cost(run, tuned, host),
  }
  record["guards"] = {
    path.stem: importlib.import_module(f"ft.guards.{path.stem}").measure(
      record, run.config.guard[path.stem]
    )
    for path in sorted((pathlib.Path(__file__).parent / "guards").glob("[a-z]*.py"))
  }
  if writer:
    card.write(record, run.folder)
    (run.folder / "features.npz").unlink(missing_ok=True)
    logging.info("\n%s", card.summary(record))
    if run.config.train.export:
      logging.info("predict with: %s", run.preprocess.try_it(run.folder))
  return record


def describe_data(run, examples: dict) -> dict:
  splits = {}
  for name, rows in run.data.splits.items():
    splits[name] = {"rows": len(rows), **run.data.report.get("splits", {}).get(name, {})}
  counts = {name: part.report for name, part in examples.items() if getattr(part, "report", None)}
  first = run.preprocess.show(run.task.example(run.data.splits["train"][0]))
  return {"splits": splits, "report": run.data.report, "counts": counts, "first_example": first}


def describe_model(run, tuned) -> dict:
  size = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))  # noqa: E731
  trainable, frozen = size(tuned.trainable), size(tuned.frozen)
  return {
    "source": run.config.model.source,
    "family": run.pretrained.family,
    "parameters": trainable + frozen,
    "trainable": trainable,
    "share": trainable / (trainable + frozen),
    "method": run.config.tune.method,
    "table": [[row.path, list(row.shape), row.count] for row in tuned.table],
    "load_report": dataclasses.asdict(run.pretrained.report),
  }


def describe_cost(run, tuned, host: dict) -> dict:
  training = run.seconds.get("training", 0.0)
  saved = run.folder / "checkpoints"
  return {
    "seconds": {phase: round(value, 2) for phase, value in run.seconds.items()},
    "total_seconds": round(sum(run.seconds.values()), 2),
    "compile_seconds": round(host["compile_seconds"], 2),
    "examples_per_second": host["examples"] / training if training else None,
    "peak_bytes": logs.peak_memory(),
    "checkpoint_bytes": sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()),
    "devices": jax.device_count(),
    "processes": jax.process_count(),
  }


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
