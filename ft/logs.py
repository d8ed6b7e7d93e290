"""What a run tells while it runs: metrics.jsonl, TensorBoard events, a progress bar."""

import json
import os
import pathlib
import resource
import shutil
import sys
import time

import jax
from absl import logging


class Metrics:
  """Appends a JSON line and TensorBoard scalars for each log point; process 0 writes.

  Args:
    folder: of the run.
    offset: bytes of metrics.jsonl to keep: what follows was written after the checkpoint that the
      run goes on from, and will be written again.
    step: first step to come, for TensorBoard to forget what it showed beyond.
  """

  def __init__(self, folder: pathlib.Path, offset: int = 0, step: int = 0):
    self._file = self._events = None
    if jax.process_index() == 0:
      from tensorboardX import SummaryWriter

      self._file = open(folder / "metrics.jsonl", "a+")
      self._file.truncate(offset)
      self._file.seek(0, os.SEEK_END)  # offset() asks for the position
      self._events = SummaryWriter(str(folder), purge_step=step or None, write_to_disk=True)

  def write(self, step: int, values: dict) -> None:
    """Writes floats of one step; names are paths like `validation/accuracy`."""
    if self._file:
      self._file.write(json.dumps({"step": step, **values}) + "\n")
      self._file.flush()
      for key, value in values.items():
        self._events.add_scalar(key, value, step)

  def offset(self) -> int:
    """Bytes of metrics.jsonl so far, safely on disk; a checkpoint notes them."""
    if not self._file:
      return 0
    os.fsync(self._file.fileno())
    return self._file.tell()

  def close(self) -> None:
    if self._file:
      self._file.close()
      self._events.close()


class Progress:
  """A line that says where the work stands: a bar on a terminal, a log line now and then elsewhere.

  Args:
    what: name of the work.
    total: its steps.
    start: steps done before.
  """

  def __init__(self, what: str, total: int, start: int = 0):
    self.what, self.total, self.start = what, total, start
    self.began = self._shown = time.monotonic()
    self._terminal = sys.stderr.isatty()

  def show(self, done: int, note: str = "") -> None:
    """Shows the state after `done` steps; cheap to call at every step."""
    now, last = time.monotonic(), done >= self.total
    if jax.process_index() or (not last and now - self._shown < (0.2 if self._terminal else 15)):
      return
    self._shown = now
    rate = (done - self.start) / max(now - self.began, 1e-9)
    left = (self.total - done) / rate if rate else 0
    line = f"{self.what} {done}/{self.total} {note} {_clock(left)} left"
    if not self._terminal:
      logging.info("%s", line)
      return
    width = shutil.get_terminal_size().columns
    filled = int(20 * done / max(self.total, 1))
    line = f"[{'=' * filled}{' ' * (20 - filled)}] {line}"[: width - 1]
    sys.stderr.write("\r" + line.ljust(width - 1) + ("\n" if last else ""))
    sys.stderr.flush()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def peak_memory() -> dict:
  """Peak bytes of this process on the host and, where the backend counts them, on a device."""
  # ru_maxrss is in KiB on Linux and in bytes on macOS.
  unit = 1 if sys.platform == "darwin" else 1024
  peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    peak["device"] = stats["peak_bytes_in_use"]
  return peak
