"""What can end a run early, and the exit status each one has."""

import difflib
import importlib


class UserError(Exception):
  """The user's input is wrong: one message with what, where, and what would be right."""

  exit_status = 2


class TrainingFailed(Exception):
  """The run itself failed (loss not finite, export not identical): its results are void."""

  exit_status = 3


class Preempted(Exception):
  """The run was asked to stop and has saved its state; the same command goes on."""

  exit_status = 75


class RowError(Exception):
  """One row of the data cannot be used; the caller counts it, reports it or stops."""


def suggest(name: str, known) -> str:
  """Returns " (did you mean 'x'?)" for the nearest known name, or an empty string."""
  near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
  return f" (did you mean {near[0]!r}?)" if near else ""


def require(module: str, extra: str):
  """Imports a package that only one task needs; its absence names the extra to install."""
  try:
    return importlib.import_module(module)
  except ImportError:
    raise UserError(f"{module} is not installed; `pip install -e '.[{extra}]'` brings it") from None
