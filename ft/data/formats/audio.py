"""A folder of sounds, by class or by a pattern in their names: see `data.pattern`."""

import pathlib

from ft.data.formats import Options, Table, images

FORMATS = ("audio",)
SUFFIXES = {}
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au")


def read(path: pathlib.Path, options: Options) -> Table:
  """Lists a folder of sounds: the label of one is the name of its folder; see `images.listed`."""
  return images.listed(path, options, "audio", SOUNDS)
