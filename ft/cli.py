"""What every script shares: absl flags, `--config.key=value` overrides, exit statuses."""

import logging as standard_logging
import os
import pathlib
import signal
import sys

from absl import app, flags, logging

from ft import config as config_lib
from ft import errors

FLAGS = flags.FLAGS
_overrides: list[tuple[str, str]] = []


def run(main, description: str, with_config: bool = False, words: bool = False):
  """Runs `main(argv)` under absl and turns what ends it into an exit status.

  Args:
    main: the script; argv[1:] holds the words that are no flags.
    description: the script's docstring, for --help.
    with_config: whether `--config.key=value` are overrides of a config.
    words: whether words that are no flags are allowed.

  0 done; 2 the user's input is wrong; 3 training failed; 75 preempted, run me again. The first
  three come with one message on stderr and no traceback; a traceback means a defect in ft.
  """

  def guarded(argv):
    _quiet_logs()
    try:
      main(argv)
    except (errors.UserError, errors.RowError) as error:
      _end("error", error, errors.UserError.exit_status)
    except errors.TrainingFailed as error:
      _end("failed", error, error.exit_status)
    except errors.Preempted as error:
      _end("preempted", error, error.exit_status)
    except KeyboardInterrupt:
      sys.exit(128 + signal.SIGINT)

  _use_huge_pages()
  app.run(guarded, flags_parser=lambda argv: _parse(argv, description, with_config, words))


def _use_huge_pages():
  """Starts the process over with glibc asking for huge pages, where nobody set it otherwise.

  A training step on a CPU frees and allocates hundreds of MiB; in pages of 4 KiB a fifth of its
  time went into page faults (MiniLM, batch 64 x 32: 178,000 faults a step, 700 with huge pages).
  The setting is read once, before Python starts.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _quiet_logs():
  """Shows what ft says, and of the libraries below it warnings only, one plain line each."""
  logging.use_absl_handler()
  logging.set_verbosity(max(FLAGS.verbosity, logging.INFO))
  handler, ours = logging.get_absl_handler(), str(config_lib.ROOT)
  handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  handler.addFilter(
    lambda record: record.levelno >= standard_logging.WARNING or record.pathname.startswith(ours)
  )


def config(more: list[tuple[str, str]] = ()):
  """The config that `--config`, its overrides and `more` of them describe."""
  if not FLAGS.config:
    raise errors.UserError("--config=configs/NAME.py is missing; `ls configs` shows what there is")
  return config_lib.load(FLAGS.config, [*_overrides, *more])


def overrides() -> list[tuple[str, str]]:
  """What `--config.key=value` said, in order."""
  return list(_overrides)


def _parse(argv: list[str], description: str, with_config: bool, words: bool) -> list[str]:
  if any(word in ("--help", "-h", "-help", "--helpfull") for word in argv[1:]):
    print(f"{description.strip()}\n\nflags:")
    print(FLAGS.module_help(sys.modules["__main__"]).strip())
    if with_config:
      print("\nconfig keys, with their defaults:\n" + config_lib.table())
    sys.exit(0)
  try:
    rest = FLAGS(argv, known_only=True)
  except flags.Error as error:
    _end("error", error, errors.UserError.exit_status)
  for word in rest[1:]:
    key, equals, value = word.partition("=")
    if with_config and key.startswith("--config.") and equals:
      _overrides.append((key.removeprefix("--config."), value))
    elif not words or word.startswith("-"):
      known = [f"--{name}" for name in FLAGS]
      hint = " (write --config.key=value)" if key.startswith("--config.") else ""
      _end("error", f"{word}: no such flag{errors.suggest(key, known)}{hint}; try --help", 2)
  return rest[:1] if with_config else rest


def _end(kind: str, error, status: int):
  print(f"{kind}: {error}", file=sys.stderr, flush=True)
  sys.exit(status)


def run_folder(flag: str) -> pathlib.Path:
  """The folder of a finished or running run, checked."""
  folder = pathlib.Path(flag or "")
  if not flag or not (folder / "config.json").is_file():
    raise errors.UserError(f"--run={flag}: not the folder of a run (it holds no config.json)")
  return folder
