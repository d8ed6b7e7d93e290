"""Runs a model over a split: every example exactly once, on any number of devices."""

import os

import jax
import numpy as np

from ft import logs

FEATURES = "features.npz"  # in the folder of a run that is not finished


def run(step, state, frozen, loader, place, poll=lambda: None, show=lambda done: None) -> dict:
  """Returns the per-example outputs of a split as host arrays (N, …), in the order of its rows.

  Args:
    step: what `state.make_predict_step` returns, with replicated outputs.
    state: train state whose trainable and mutable trees are used.
    frozen: frozen tree.
    loader: a Loader with shuffle=False.
    place: puts a host batch on the devices.
    poll: called before each batch; may raise to stop.
    show: called with the number of batches done.
  Raises:
    RuntimeError: an example was met twice or never: the result would not be the split's.
  """
  parts = []
  for done, batch in enumerate(loader.iterate(0, loader.steps_per_epoch), start=1):
    poll()
    outputs = step(state.trainable, state.mutable, frozen, place(batch))
    parts.append(outputs)
    if len(parts) > 2:  # two batches in flight keep the device busy and memory bounded
      parts[-3] = jax.device_get(parts[-3])
    show(done)
  return in_order(jax.device_get(parts), loader.examples.indices)


def in_order(parts: list[dict], rows: np.ndarray) -> dict:
  """Joins batches of outputs, drops padding, sorts by row index.

  Args:
    parts: dicts of arrays (B, …) with an `index` (B,), -1 for padding.
    rows: (N,) the row indices the split has.
  """
  joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
  order = np.argsort(joined["index"], kind="stable")
  order = order[joined["index"][order] >= 0]
  result = {key: value[order] for key, value in joined.items()}
  if not np.array_equal(result["index"], np.sort(rows)):
    raise RuntimeError(
      f"evaluation met {len(result['index'])} examples, the split has {len(rows)}: "
      f"a metric over part of a split is no metric"
    )
  return result


def once(kept, step, state, frozen, loaders: dict, place, poll) -> dict:
  """Outputs of several splits, kept in a file so that a run that goes on has them already.

  Args:
    kept: pathlib.Path of the npz file.
    loaders: split -> Loader with shuffle=False; for the rest see `run`.
  Returns:
    split -> dict of arrays (N, …).
  """
  if kept.is_file():
    with np.load(kept) as file:
      return {
        name: {key.split("/")[1]: file[key] for key in file.files if key.startswith(name + "/")}
        for name in loaders
      }
  found = {}
  for name, loader in loaders.items():
    bar = logs.Progress(f"features of {name}", loader.steps_per_epoch)
    found[name] = run(step, state, frozen, loader, place, poll, bar.show)
  if jax.process_index() == 0:
    unfinished = kept.with_suffix(".saving.npz")
    np.savez(unfinished, **{f"{n}/{k}": v for n, part in found.items() for k, v in part.items()})
    os.replace(unfinished, kept)
  return found
