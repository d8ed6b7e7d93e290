"""SIGTERM and SIGINT: a request to stop that the run answers at the next safe point."""

import os
import signal

from absl import logging

from ft import errors


class Preemption:
  """Notes the signals of a context; a second one ends the process at once.

  Orbax's own hook never fires in a run of a single process, hence this one.
  """

  signals = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.requested = ""
    self._before = {}

  def __enter__(self):
    self._before = {number: signal.signal(number, self._note) for number in self.signals}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number, _):
    if self.requested:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    self.requested = signal.Signals(number).name
    logging.warning("%s: stopping at the next safe point; again to stop at once", self.requested)

  def poll(self) -> None:
    """Raises Preempted once a signal has come."""
    if self.requested:
      raise errors.Preempted(f"{self.requested} received; the same command goes on")
