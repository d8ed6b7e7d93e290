"""Checkpoints that can be trusted: saved by Orbax, sealed with checksums, verified on restore.

Orbax alone restores a file with a flipped bit in silence and has no way back from a broken step.
Here a step is written to `step_N.saving`, gets a manifest of sha256 sums once everything is on
disk, and only then its name. What has no name is never read; what does not match its manifest is
set aside and the step before it is used.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil

import jax
import orbax.checkpoint as ocp
from absl import logging

from ft import errors, mesh
from ft.weights import stacking

NAME = re.compile(r"step_(\d{9})$")


class Checkpoints:
  """The steps of one run.

  Args:
    folder: where they stand.
    keep: how many of the newest stay; the best one stays besides.
  """

  def __init__(self, folder: os.PathLike, keep: int = 2):
    self.folder = pathlib.Path(folder).absolute()
    self.keep = keep
    self._saver = ocp.StandardCheckpointer()
    self._pending = None
    with _disk_errors(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      for unfinished in self.folder.glob("*.saving"):
        shutil.rmtree(unfinished)
    mesh.barrier("checkpoints cleaned")

  def steps(self) -> list[int]:
    """Sealed steps, ascending."""
    found = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
    return sorted(int(match[1]) for match in found if match)

  def path(self, step: int) -> pathlib.Path:
    return self.folder / f"step_{step:09d}"

  def save(self, step: int, state, host: dict) -> None:
    """Starts to save; the step counts once `finish` has sealed it.

    Args:
      step: its number.
      state: the pytree of arrays.
      host: what the loop must know to go on, as JSON types; `host["best_step"]` is kept.
    """
    self.finish()
    if step in self.steps():
      return
    place = self.path(step).with_suffix(".saving")
    with _disk_errors(self.folder, place):
      if jax.process_index() == 0:
        place.mkdir()
        (place / "host.json").write_text(json.dumps(host))
      mesh.barrier(f"save {step}")
      self._saver.save(place / "state", stacking.apart(state))  # stored layer by layer
    self._pending = (step, place, host.get("best_step"))

  def finish(self) -> None:
    """Waits for the save in progress, seals it, and removes steps no longer wanted."""
    if self._pending is None:
      return
    (step, place, best), self._pending = self._pending, None
    with _disk_errors(self.folder, place):
      self._saver.wait_until_finished()
      mesh.barrier(f"written {step}")
      if jax.process_index() == 0:
        manifest = {str(p.relative_to(place)): _sha256(p) for p in _files(place)}
        (place / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
        for path in _files(place):
          _sync(path)
        os.rename(place, self.path(step))
        _sync(self.folder)
        for old in self.steps()[: -self.keep]:
          if old != best:
            shutil.rmtree(self.path(old))
    mesh.barrier(f"sealed {step}")

  def restore_newest(self, like):
    """Returns (state, host) of the newest step whose files are what was written, or None.

    Args:
      like: pytree of arrays or ShapeDtypeStructs with shardings, the form of the state.
    Raises:
      UserError: there are steps and none of them is good.
    """
    steps, faults = self.steps(), []
    for step in reversed(steps):
      restored, fault = self._restore(step, like)
      if not fault:
        return restored
      faults.append(fault)
    if steps:
      raise errors.UserError(
        f"{self.folder}: none of the checkpoints is intact: {'; '.join(faults)}. "
        f"Remove the folder to start afresh"
      )
    return None

  def restore_best(self, step: int, like):
    """Returns (state, host) of one step, or of the newest good one where that is damaged."""
    if step in self.steps():
      restored, fault = self._restore(step, like)
      if not fault:
        return restored
    logging.warning("the best checkpoint (step %d) is lost; the newest good one is used", step)
    return self.restore_newest(like)

  def _restore(self, step: int, like):
    """((state, host), "") or (None, what is wrong); a damaged step is set aside."""
    place = self.path(step)
    fault = verify(place)
    if not fault:
      abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
      state = self._saver.restore(place / "state", stacking.apart(abstract))
      state = stacking.together(state, abstract)
      return (state, json.loads((place / "host.json").read_text())), ""
    logging.error("checkpoint %s: %s; set aside, going back to the step before", place, fault)
    mesh.barrier(f"fault {step}")
    if jax.process_index() == 0:
      aside = place.with_suffix(".damaged")
      shutil.rmtree(aside, ignore_errors=True)
      place.rename(aside)
    mesh.barrier(f"aside {step}")
    return None, f"{place.name}: {fault}"


def verify(place: pathlib.Path) -> str:
  """Compares a step with its manifest; returns what is wrong, or an empty string."""
  try:
    manifest = json.loads((place / "manifest.json").read_text())
  except (OSError, ValueError) as error:
    return f"manifest.json cannot be read ({error})"
  for name, digest in manifest.items():
    path = place / name
    if not path.is_file():
      return f"{name} is missing"
    if _sha256(path) != digest:
      return f"{name} is not what was written (its checksum differs)"
  return ""


def _files(place: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in place.rglob("*") if p.is_file() and p.name != "manifest.json")


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


@contextlib.contextmanager
def _disk_errors(folder: pathlib.Path, unfinished: pathlib.Path | None = None):
  """Turns a full disk or a missing permission into one message; good steps stay as they are."""
  try:
    yield
  except Exception as error:
    text = f"{error}"
    code = getattr(error, "errno", None)
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    if not full and not isinstance(error, OSError) and "Permission denied" not in text:
      raise
    if unfinished is not None:
      shutil.rmtree(unfinished, ignore_errors=True)
    what = "the disk is full" if full else text
    raise errors.UserError(
      f"{folder}: cannot write a checkpoint: {what}. Steps saved before are intact; make room or "
      f"choose another --workdir, then run the same command again"
    ) from error
