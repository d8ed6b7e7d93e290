"""The persistent compilation cache: a second start does not compile again."""

import os
import pathlib

import jax
from absl import logging


def cache() -> None:
  """Keeps compiled programs in a folder of this user alone.

  A compiled program is code that jax will run, hence the folder is private (0700); one that
  somebody else can write to is not used. JAX_COMPILATION_CACHE_DIR names another folder.
  """
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  root = os.environ.get("FT_CACHE") or pathlib.Path.home() / ".cache" / "ft"
  folder = pathlib.Path(root) / "compiled"
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    if folder.stat().st_uid != os.getuid():
      raise PermissionError(f"{folder} belongs to another user")
  except OSError as error:
    logging.warning("no compilation cache: %s", error)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
