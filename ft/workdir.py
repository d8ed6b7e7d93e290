"""The folder of a run: one config, one process at a time, finished once."""

import fcntl
import json
import os
import pathlib

from ft import config as config_lib
from ft import errors


class Workdir:
  """Context that holds a run's folder.

  Args:
    folder: made if absent.
    config: complete config; compared with the one a run before left there.
    writer: whether this process writes (process 0) or only looks on.
  Raises:
    UserError: not writable, in use by another process, or the folder of another config.
  """

  def __init__(self, folder: os.PathLike, config, writer: bool = True):
    self.path = pathlib.Path(folder)
    self.config = config_lib.to_json(config)
    self.writer = writer
    self._lock = None

  def __enter__(self):
    if not self.writer:
      return self
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = open(self.path / ".lock", "a+")
    except OSError as error:
      raise errors.UserError(
        f"--workdir={self.path}: cannot write there ({error.strerror}); choose a folder of your own"
      ) from None
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      self._lock.seek(0)
      owner = self._lock.read().strip() or "unknown"
      raise errors.UserError(
        f"--workdir={self.path}: in use by another process (pid {owner}); "
        f"wait for it, or choose another folder"
      ) from None
    self._lock.truncate(0)
    self._lock.write(str(os.getpid()))
    self._lock.flush()
    self._compare()
    return self

  def __exit__(self, *_):
    if self._lock:
      self._lock.close()

  def _compare(self):
    path = self.path / "config.json"
    if path.is_file():
      try:
        before = json.loads(path.read_text())
      except ValueError:
        raise errors.UserError(f"{path}: not JSON; the folder is damaged, choose another") from None
      changed = config_lib.difference(before, self.config)
      if changed:
        raise errors.UserError(
          f"--workdir={self.path}: holds a run of a different config; choose another folder, or "
          f"go on with what it has:\n  " + "\n  ".join(changed)
        )
    else:
      write_atomic(path, json.dumps(self.config, indent=1) + "\n")

  @property
  def finished(self) -> bool:
    """Whether a run ended here as a success."""
    return (self.path / "card.json").is_file()


def write_atomic(path: pathlib.Path, data: str | bytes) -> None:
  """Writes a file whole or not at all."""
  unfinished = path.with_name(path.name + ".saving")
  unfinished.write_bytes(data.encode() if isinstance(data, str) else data)
  os.replace(unfinished, path)
