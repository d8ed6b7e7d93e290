"""Unpacks zip and tar archives nobody has vetted: plain files and folders only, inside one folder.

Nothing in an archive is trusted: not its names (no absolute path, no `..`), not its kinds of member
(no links, no devices), not the sizes it states (bytes are counted as they are written), no modes.
"""

import lzma
import pathlib
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from ft import errors

SUFFIXES = (".zip", ".whl", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_MEMBERS = 500_000
MAX_BYTES = 100 << 30
FREE_BYTES = 1 << 30  # an archive that unpacks to less than this is never called a bomb
MAX_RATIO = 200
_CHUNK = 1 << 20
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError,
           RuntimeError, ValueError)


class _Member(NamedTuple):
  name: str
  folder: bool
  open: object  # () -> a binary file


def is_archive(path) -> bool:
  """Says by its name whether a path is an archive that `unpack` opens."""
  return str(path).lower().endswith(SUFFIXES)


def unpack(source: pathlib.Path, target: pathlib.Path) -> None:
  """Unpacks an archive into a new folder.

  Args:
    source: the archive; zip or tar by its suffix.
    target: a folder that is there and empty. After an error it holds whatever came before it, so
      unpack into a temporary folder and rename.

  Raises:
    UserError: the archive is damaged, unpacks to far more than it should, or holds a member that
      leaves the folder or is no plain file.
  """
  budget = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * source.stat().st_size))
  try:
    for count, member in enumerate(_members(source)):
      if count >= MAX_MEMBERS:
        raise errors.UserError(f"{source} holds more than {MAX_MEMBERS:,} members; refused.")
      path = target / _safe(member.name, source)
      if member.folder:
        path.mkdir(parents=True, exist_ok=True)
        continue
      path.parent.mkdir(parents=True, exist_ok=True)
      with member.open() as stream, open(path, "wb") as out:
        budget -= _copy(stream, out, budget, source)
  except _DAMAGE as e:
    if getattr(e, "errno", None):  # the disk's fault (full, read-only), not the archive's
      raise errors.UserError(f"cannot unpack {source} into {target}: {e}") from e
    raise errors.UserError(f"{source} is damaged and cannot be unpacked: {e}") from e


def _members(source: pathlib.Path) -> Iterator[_Member]:
  if source.name.lower().endswith((".zip", ".whl")):
    yield from _zip_members(source)
  else:
    yield from _tar_members(source)


def _zip_members(source: pathlib.Path) -> Iterator[_Member]:
  with zipfile.ZipFile(source) as archive:
    for info in archive.infolist():
      kind = stat.S_IFMT(info.external_attr >> 16)
      if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        _refuse(source, info.filename, "a link or a device")
      yield _Member(info.filename, info.is_dir(), lambda info=info: archive.open(info))


def _tar_members(source: pathlib.Path) -> Iterator[_Member]:
  with tarfile.open(source) as archive:
    for info in archive:
      if not (info.isfile() or info.isdir()):
        _refuse(source, info.name, "a link or a device")
      yield _Member(info.name, info.isdir(), lambda info=info: archive.extractfile(info))


def _safe(name: str, source: pathlib.Path) -> pathlib.PurePosixPath:
  """Returns the member's path below the target folder, or refuses it."""
  path = pathlib.PurePosixPath(name)
  if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
    _refuse(source, name, "a path that leaves the folder")
  if path.parts and ":" in path.parts[0] and len(path.parts[0]) == 2:
    _refuse(source, name, "a drive")
  return path


def _refuse(source, name: str, what: str):
  raise errors.UserError(f"{source} holds {name!r}, which is {what}; refused, nothing was kept.")


def _copy(stream: IO[bytes], out: IO[bytes], budget: int, source) -> int:
  """Copies at most `budget` bytes and returns how many there were."""
  count = 0
  while chunk := stream.read(_CHUNK):
    count += len(chunk)
    if count > budget:
      raise errors.UserError(
          f"{source} unpacks to far more than an archive of its size should; refused.")
    out.write(chunk)
  return count
