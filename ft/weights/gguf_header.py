"""Reads the header of a GGUF file: its key-value pairs, and where each tensor is.

The `gguf` package has a reader too, which makes several objects for each word of a vocabulary (two
seconds and 100 MiB for 49,152 words) and does not check what it reads; this one takes a tenth of
that and refuses whatever leaves the file. Versions 2 and 3, little-endian.

Source: the format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import struct
from typing import Any, NamedTuple

import numpy as np

from ft.weights.lazy import MAX_NDIM, corrupt

# Type numbers of values, as numpy has them; 8 is a string and 9 an array.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
            10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32


class Entry(NamedTuple):
  """A tensor in the file: `shape` outermost first, `kind` a ggml type, `offset` from its start."""

  shape: tuple[int, ...]
  kind: int
  offset: int


class Header(NamedTuple):
  """`fields`: key -> number, str, bool, or a list of these; `tensors`: GGUF name -> Entry."""

  fields: dict[str, Any]
  tensors: dict[str, Entry]


def read_header(path) -> Header:
  """Returns the header of a GGUF file; that tensors end inside the file is the caller's to check.

  Raises:
    UserError: not a GGUF file, cut short, contradicting itself, big-endian, or of another version.
  """
  with open(path, "rb") as file:
    return _Reader(path, file).read()


class _Reader:
  """Takes values from a file one after the other; what would leave the file is an error."""

  def __init__(self, path, file):
    self._path, self._file = path, file
    self._size = os.fstat(file.fileno()).st_size
    self._at = 0

  def read(self) -> Header:
    if self._take(min(4, self._size)) != b"GGUF":
      raise corrupt(self._path, "it does not start as a GGUF file")
    version = self._number("<u4")
    if version not in _VERSIONS:
      what = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
      raise corrupt(self._path, f"{what} of GGUF; little-endian of version 2 or 3 is read")
    tensors, pairs = self._count("<u8", 24), self._count("<u8", 13)
    fields = {}
    for _ in range(pairs):
      key = self._string()
      if key in fields:
        raise corrupt(self._path, f"its key {key!r} stands twice")
      fields[key] = self._value(self._number("<u4"))
    entries = {}
    for _ in range(tensors):
      name, entry = self._entry()
      if name in entries:
        raise corrupt(self._path, f"its tensor {name!r} stands twice")
      entries[name] = entry
    start = self._data_start(fields)
    return Header(fields, {k: e._replace(offset=start + e.offset) for k, e in entries.items()})

  def _data_start(self, fields) -> int:
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
      raise corrupt(self._path, f"its alignment {alignment!r} is no power of two")
    return -(-self._at // alignment) * alignment

  def _entry(self) -> tuple[str, Entry]:
    name = self._string()
    ndim = self._number("<u4")
    if ndim > MAX_NDIM:
      raise corrupt(self._path, f"{name} has {ndim} axes")
    shape = struct.unpack(f"<{ndim}Q", self._take(8 * ndim))
    if math.prod(shape) >= 2**63:
      raise corrupt(self._path, f"{name} has the impossible shape {shape[::-1]}")
    kind, offset = struct.unpack("<IQ", self._take(12))
    return name, Entry(shape[::-1], kind, offset)

  def _value(self, kind: int):
    if kind in _SCALARS:
      return self._number(_SCALARS[kind])
    if kind == _STRING:
      return self._string()
    if kind != _ARRAY:
      raise corrupt(self._path, f"a value of the unknown type {kind}")
    inner = self._number("<u4")
    if inner in _SCALARS:
      dtype = np.dtype(_SCALARS[inner])
      count = self._count("<u8", dtype.itemsize)
      return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
    if inner == _STRING:
      return [self._string() for _ in range(self._count("<u8", 8))]
    raise corrupt(self._path, f"an array of values of type {inner}")

  def _number(self, dtype: str):
    dtype = np.dtype(dtype)
    return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

  def _count(self, dtype: str, each: int) -> int:
    """Returns a number of things of at least `each` bytes that the rest of the file can hold."""
    count = self._number(dtype)
    if count * each > self._size - self._at:
      raise corrupt(self._path, f"it ends before the {count} values that its header announces")
    return count

  def _string(self) -> str:
    data = self._take(struct.unpack("<Q", self._take(8))[0])
    try:
      return data.decode("utf-8")
    except UnicodeDecodeError:
      raise corrupt(self._path, f"a string in its header is not UTF-8: {data[:40]!r}") from None

  def _take(self, count: int) -> bytes:
    if count > self._size - self._at:
      raise corrupt(self._path, f"its header ends in the middle, at byte {self._size}")
    data = self._file.read(count)
    if len(data) != count:
      raise corrupt(self._path, f"its header ends in the middle, at byte {self._at + len(data)}")
    self._at += count
    return data
