"""A folder of images by class: the label of an image is the name of its folder.

Masks are found where they lie as in the MVTec data sets: of `test/crack/000.png` in
`ground_truth/crack/000_mask.png` beside `test`; and in `masks` beside a folder `images`, under the
name of their image, in a folder that holds these two alone.
"""

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
  if folders == ["images", "masks"]:
    return _masked(path, found, options)
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
  masks = [_ground_truth(path, p) for p in found]
  if any(masks):
    records = [{**record, "mask": mask} for record, mask in zip(records, masks, strict=True)]
  return Table(options.display, tuple(records[0]), records, lambda i: str(found[i]), path)


def _ground_truth(path: pathlib.Path, image: pathlib.Path) -> pathlib.Path | None:
  """Returns the mask of an image of a split's folder, or None."""
  mask = path.parent / "ground_truth" / image.relative_to(path).parent / f"{image.stem}_mask.png"
  return mask if mask.is_file() else None


def _masked(path: pathlib.Path, found: list[pathlib.Path], options: Options) -> Table:
  """Returns images with the masks of their names; UserError names an image without one."""
  of = {p.relative_to(path / "masks").with_suffix(""): p for p in found
        if (path / "masks") in p.parents}
  images = [p for p in found if (path / "images") in p.parents]
  records = [{"image": p, "mask": of.get(p.relative_to(path / "images").with_suffix(""))}
             for p in images]
  bare = [str(record["image"]) for record in records if record["mask"] is None]
  if bare:
    raise errors.UserError(f"{options.display}: {len(bare)} of {len(images)} images have no mask "
                           f"in {path / 'masks'} under their name, such as {bare[0]}.")
  return Table(options.display, ("image", "mask"), records, lambda i: str(images[i]), path)


def _hidden(path: pathlib.Path) -> bool:
  return any(part.startswith((".", "__")) for part in path.parts)
