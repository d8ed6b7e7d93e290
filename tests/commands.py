"""The scripts as a user starts them, each in a process of its own."""

import atexit
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


@functools.cache
def _cache() -> str:
  """A cache that all scripts of a test process share, so that they compile the same once."""
  folder = tempfile.mkdtemp(prefix="ft-tests-")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def environment(**extra) -> dict:
  return {**os.environ, "JAX_PLATFORMS": "cpu", "FT_CACHE": _cache(), **extra}


def script(name, *flags, status=0, given=None, **env):
  """Runs scripts/<name>.py to its end and checks the exit status; returns the finished process."""
  done = subprocess.run(
    [sys.executable, f"scripts/{name}.py", *map(str, flags)], cwd=ROOT, env=environment(**env),
    capture_output=True, text=True, timeout=300, input=given)
  assert done.returncode == status, done.stderr[-3000:]
  return done
