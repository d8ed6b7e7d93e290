"""TensorFlow Datasets, prepared as array_record or Parquet, read without TensorFlow.

Whole splits only: a Parquet-backed source silently returns the whole split for any slice, so
slicing is ours, and the length is checked against the data set's own count.
"""

import pathlib
from collections.abc import Sequence

from absl import logging

from ft import errors
from ft.data.formats import Options, Table

FORMATS = ("tfds",)
SUFFIXES = {}


class _Records(Sequence):
  """Rows of a random access source, with text decoded and class numbers turned into names."""

  def __init__(self, source, features):
    self._source, self._features = source, features

  def __len__(self):
    return len(self._source)

  def __getitem__(self, i):
    record = self._source[int(i)]
    return {name: _value(value, self._features[name]) for name, value in record.items()}


def read(name: pathlib.Path | str, options: Options) -> Table:
  """Reads a split of a data set: its name, or the folder it was prepared in.

  Images stay encoded (bytes): the image reader's format and size limits apply to them as well.
  """
  import tensorflow_datasets as tfds  # slow to import, and only needed here
  builder = _builder(tfds, str(name), options)
  splits = builder.info.splits
  if options.split not in splits:
    near = errors.suggest(options.split, splits)
    raise errors.UserError(f"{options.display}: needs one of its splits after a colon: "
                           f"{', '.join(splits) or 'it has none'}{near}.")
  features = builder.info.features
  images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
  try:
    source = builder.as_data_source(
        split=options.split, decoders={k: tfds.decode.SkipDecoding() for k in images} or None)
    count = len(source)
  except Exception as e:  # its readers raise what they like
    raise errors.UserError(
        f"{options.display}: cannot be read without TensorFlow ({_first_line(e)}); prepare it with "
        'file_format="array_record".') from e
  if count != splits[options.split].num_examples:
    raise errors.UserError(f"{options.display}: the source has {count} rows, but its split "
                           f"{options.split} says {splits[options.split].num_examples}.")
  display = f"{options.display}: row "
  return Table(options.display, tuple(features), _Records(source, features),
               lambda i: f"{display}{i}", None, _roles(builder.info.supervised_keys, images))


def _builder(tfds, name: str, options: Options):
  try:
    if pathlib.Path(name).expanduser().is_dir():
      return tfds.builder_from_directory(pathlib.Path(name).expanduser())
    builder = tfds.builder(name)
    if not builder.is_prepared():
      logging.info("preparing %s in %s", name, builder.data_dir)
      builder.download_and_prepare(file_format="array_record")
    return builder
  except Exception as e:  # unknown name, network, disk, a builder's own
    raise errors.UserError(
        f"{options.display}: {_first_line(e)}. It should be the name of a TFDS data set, or the "
        "folder of one that is prepared (it holds dataset_info.json).") from e


def _first_line(error: Exception) -> str:
  lines = [line for line in str(error).splitlines() if line.strip()]
  return lines[0].rstrip(".") if lines else type(error).__name__


def _roles(supervised, images) -> dict[str, str]:
  if not supervised or not all(isinstance(key, str) for key in supervised):
    return {}
  return {"image" if supervised[0] in images else "text": supervised[0], "label": supervised[1]}


def _value(value, feature):
  names = getattr(feature, "names", None)
  if names and getattr(value, "ndim", 0) == 0:
    return names[int(value)] if int(value) >= 0 else None  # -1: TFDS's word for "no label"
  if isinstance(value, bytes) and type(feature).__name__ != "Image":
    return value.decode("utf-8", "replace")
  return value
