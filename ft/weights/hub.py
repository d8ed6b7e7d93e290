"""Fetches a model from the Hugging Face Hub: its weights once, in the best format that it offers.

Everything about the connection is huggingface_hub's own: HF_ENDPOINT, HF_TOKEN, HF_HOME and
HF_HUB_CACHE, HF_HUB_OFFLINE, proxies, resuming. Without a network, what is in the cache is used.
"""

import fnmatch
import glob
import pathlib
import re
import urllib.parse
from typing import NamedTuple

from absl import logging

from ft import errors

_SMALL = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja")
# Other formats of the same weights, and states of training.
_OTHERS = ("onnx/*", "openvino/*", "coreml/*", "original/*", "*/onnx/*", "checkpoint-*/*", "runs/*",
           "training_args.bin", "optimizer.bin", "scheduler.bin")
_FORMATS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")  # best first
_SOURCE = re.compile(
    r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)"
    r"(?:@(?P<revision>refs/\w+/[\w.-]+|[\w.%-]+))?(?:/(?P<file>[^\\]+))?")


class Source(NamedTuple):
  """`hf:name[@revision][/file]`; `revision` None is the default branch, `file` "" all of it."""

  name: str
  revision: str | None
  file: str


def parse(source: str) -> Source:
  """Returns the parts of a source; UserError if it is not of the form.

  A slash in the name of a branch is written %2F, except in refs/pr/1.
  """
  match = _SOURCE.fullmatch(source)
  short = match and match["file"] and "/" not in match["name"] and not match["revision"]
  if not match or short or not _safe(match["file"] or ""):
    raise errors.UserError(f"{source!r} is not of the form hf:organisation/name[@revision][/file].")
  revision = match["revision"] and urllib.parse.unquote(match["revision"])
  return Source(match["name"], revision, match["file"] or "")


def fetch(source: str) -> pathlib.Path:
  """Returns the local folder of a model on the Hub, or one file of it, fetched on first use.

  Args:
    source: hf:org/name[@revision][/file].

  Raises:
    UserError: no such model, revision or file; no permission; no network and not in the cache;
      or a repository whose names of files would leave its folder.
  """
  wanted = parse(source)
  import huggingface_hub  # slow to import, and only needed here
  try:
    folder = pathlib.Path(_snapshot(huggingface_hub, wanted, source))
  except errors.UserError:
    raise
  except Exception as e:  # those of its HTTP library, which has changed between versions, included
    raise errors.UserError(
        f"cannot fetch {source} from the Hugging Face Hub: {_first_line(e)}. Check the name, the "
        "revision, the network (HF_ENDPOINT, HF_HUB_OFFLINE) and, for a private or gated model, "
        "HF_TOKEN.") from e
  path = folder / wanted.file
  if not path.exists():
    raise errors.UserError(f"{source}: {wanted.file} is not in the cache ({folder}); fetch it once "
                           "with a network, without HF_HUB_OFFLINE")
  return path


def choose(names: list[str], file: str = "", where: str = "the repository") -> list[str]:
  """Returns which files of a repository are fetched: small ones, and weights in one format.

  Args:
    names: all of its files.
    file: the one file of weights that is asked for; "": the best format that there is.
    where: what errors call the repository.

  Raises:
    UserError: a name leaves the folder, `file` is not there, or several GGUF files are.
  """
  if bad := [name for name in names if not _safe(name)]:
    raise errors.UserError(f"{where} lists a file {bad[0]!r}, which leaves its folder; refused.")
  usable = [name for name in names if not _matches(name, _OTHERS)]
  small = [name for name in usable if _matches(name, _SMALL)]
  if file:
    if file not in names:
      raise errors.UserError(f"{where} has no file {file}{errors.suggest(file, names)}; it has: "
                             f"{', '.join(sorted(names)[:20])}")
    return [*small, file] if file not in small else small
  # Weights at the top decide; those in folders (of a sentence-transformers layer) come with them.
  for candidates in ([name for name in usable if "/" not in name], usable):
    for suffix in _FORMATS:
      if any(name.endswith(suffix) for name in candidates):
        return small + _weights(usable, suffix, where)
  return small


def _weights(names, suffix: str, where: str) -> list[str]:
  found = [name for name in names if name.endswith(suffix)]
  if suffix == ".gguf" and len(found) > 1:
    raise errors.UserError(f"{where} holds several GGUF files; name one, as in hf:…/{found[0]}: "
                           f"{', '.join(found[:20])}")
  if suffix != ".safetensors" and suffix != ".gguf":
    found += [name for name in names if name.endswith(".safetensors")]
  merged = [name for name in found if not _matches(name, ("consolidated*",))]
  return merged or found  # Mistral's repositories hold all weights twice


def _snapshot(huggingface_hub, wanted: Source, source: str) -> str:
  """Returns the folder of a snapshot that holds what is wanted."""
  try:
    info = huggingface_hub.HfApi().model_info(wanted.name, revision=wanted.revision)
  except Exception as e:
    status = getattr(getattr(e, "response", None), "status_code", 500)
    if status < 500:
      raise
    logging.warning("cannot ask the Hugging Face Hub for %s, looking into the cache: %s", source,
                    _first_line(e))
    try:
      return _cached(huggingface_hub, wanted)
    except Exception:
      raise e from None
  names = choose([sibling.rfilename for sibling in info.siblings or ()], wanted.file, source)
  logging.info("fetching %s (%s), unless it is in the cache", source, info.sha)
  return huggingface_hub.snapshot_download(
      wanted.name, revision=wanted.revision, allow_patterns=[glob.escape(n) for n in names])


def _cached(huggingface_hub, wanted: Source) -> str:
  # config.json only, since a snapshot lacks the formats of weights that were not chosen.
  return huggingface_hub.snapshot_download(
      wanted.name, revision=wanted.revision, local_files_only=True, allow_patterns=["config.json"])


def _matches(name: str, patterns) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _safe(name: str) -> bool:
  path = pathlib.PurePosixPath(name)
  return not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name)


def _first_line(e: Exception) -> str:
  """Returns an error of the Hub's client in one line; it puts the server's words last."""
  lines = [line.strip() for line in str(e).splitlines() if line.strip()]
  return " ".join(lines[:2]) or type(e).__name__
