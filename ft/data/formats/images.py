"""A folder of images by class: the label of an image is the name of its folder."""

import pathlib

from absl import logging

from ft import errors
from ft.data.formats import Options, Table

FORMATS = ("images",)
SUFFIXES = {}
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def read(path: pathlib.Path, options: Options) -> Table:
  """Lists a folder of images; see `listed`."""
  return listed(path, options, "image", IMAGES)


def listed(path: pathlib.Path, options: Options, role: str, suffixes: tuple) -> Table:
  """Lists a folder, files sorted; those that lie in it directly (or a single file) have no label.

  Files of other suffixes are left out and counted in the log.

  Args:
    path: folder or file.
    options: of the source.
    role: the column of the files' paths, "image" or "audio".
    suffixes: in lower case, of the files that are meant.
  """
  if not path.is_dir():
    records = [{role: path}]
    return Table(options.display, (role,), records, lambda i: options.display, path.parent)
  files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
  found = [p for p in files if p.suffix.lower() in suffixes]
  folders = sorted({p.relative_to(path).parts[0] for p in found if p.parent != path})
  if not found:
    raise errors.UserError(
        f"{options.display}: no {options.format} in it (looked for {' '.join(suffixes)}); it holds "
        f"{', '.join(sorted(p.name for p in path.iterdir())[:12]) or 'nothing'}.")
  if folders and {f.lower() for f in folders} <= SPLITS:
    raise errors.UserError(
        f"{options.display}: its folders {', '.join(folders)} look like splits, not classes; set "
        f"data.train to the one to train on ({path / folders[-1]}, say), and so on.")
  if len(found) < len(files):
    logging.info("%s: %d files are no %s and are left out", options.display,
                 len(files) - len(found), options.format)
  loose = [p.name for p in found if p.parent == path]
  if loose and folders:
    raise errors.UserError(
        f"{options.display}: {loose[0]} and {len(loose) - 1} more files lie beside the class "
        f"folders {', '.join(folders)}; move them into one.")
  records = [{role: p, **({"label": p.relative_to(path).parts[0]} if folders else {})}
             for p in found]
  return Table(options.display, tuple(records[0]), records, lambda i: str(found[i]), path)


def _hidden(path: pathlib.Path) -> bool:
  return any(part.startswith((".", "__")) for part in path.parts)
