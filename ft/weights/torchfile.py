"""Reads torch's two pickled formats (zip, and the older stream) and executes nothing in them.

A pickle is admitted only if its opcodes are those that tensors need; every global but torch's own
tensor builders is refused by name. Tensors become places in the file, read when asked for.

Source: torch's `torch/serialization.py`, whose persistent ids and `_rebuild_tensor_v2` arguments
are followed here.
"""

import collections
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable

import ml_dtypes
import numpy as np

from ft import errors
from ft.weights.lazy import MAX_NDIM, FileTensor, corrupt, counts

SUFFIXES = (".pth", ".pt", ".bin")
_TORCH_DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAX_PICKLE = 50_000_000  # bytes
_STATE_KEYS = ("state_dict", "model_state_dict", "model")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# What a pickle of tensors is made of. Others make objects (NEWOBJ, INST, …) or need no admission.
_OPCODES = frozenset("""PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1
  BININT2 LONG LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE SHORT_BINSTRING BINSTRING SHORT_BINBYTES
  TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM
  SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
  """.split())


def open_torch(path) -> dict[str, FileTensor]:
  """Opens a file of torch.save that holds tensors, in a dict or one level below it.

  Args:
    path: a file in the zip format or in the older stream format.

  Returns:
    {name: FileTensor}. No tensor has been read and nothing of the pickle was executed.

  Raises:
    UserError: damaged, or the pickle wants more than tensors.
  """
  tree = _open_torch_zip(path) if zipfile.is_zipfile(path) else _open_torch_stream(path)
  if isinstance(tree, dict):
    for key in _STATE_KEYS:
      if isinstance(tree.get(key), dict):
        tree = tree[key]
        break
  tensors = {}
  if isinstance(tree, dict):
    tensors = {k: v for k, v in tree.items() if isinstance(v, FileTensor) and isinstance(k, str)}
  if not tensors:
    raise errors.UserError(f"{path} holds no dict of tensors")
  return tensors


def _open_torch_zip(path):
  try:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as f:
      members = {info.filename: info for info in archive.infolist()}
      pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
      if len(pickles) != 1:
        raise corrupt(path, "a zip file, but not one that torch.save wrote (no data.pkl)")
      root = pickles[0].removesuffix("data.pkl")
      order = members.get(root + "byteorder")
      if order and archive.read(order)[:16] != b"little":
        raise corrupt(path, "it was written on a big-endian machine, which is not supported")
      if members[pickles[0]].file_size > _MAX_PICKLE:
        raise corrupt(path, f"its pickle takes more than {_MAX_PICKLE} bytes")

      def storage(key, size):
        return _member_offset(path, f, members.get(f"{root}data/{key}"), size)

      return _unpickle(path, archive.read(pickles[0]), storage)
  except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as e:
    raise corrupt(path, str(e)) from None


def _member_offset(path, f, info, size) -> int:
  """Returns where in the file an uncompressed zip member of at least `size` bytes has its data."""
  if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < size:
    raise corrupt(path, "a tensor's storage is absent, too short, or compressed")
  f.seek(info.header_offset)
  head = f.read(30)
  if len(head) < 30 or head[:4] != b"PK\x03\x04":
    raise corrupt(path, "a zip member without its header")
  return info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))


def _open_torch_stream(path):
  """Opens the format before torch 1.6.

  Pickles of the magic number, the version, the machine, the tree and the keys of storages; then
  each storage as its count (int64) and its bytes, in the order of the keys.
  """
  with open(path, "rb") as f:
    if _plain_pickle(path, f) != _LEGACY_MAGIC:
      raise corrupt(path, "neither a zip nor a stream that torch.save wrote")
    _plain_pickle(path, f)
    machine = _plain_pickle(path, f)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
      raise corrupt(path, "it was written on a big-endian machine, which is not supported")
    body = _next_pickle(path, f)
    widths = {}  # storage key -> (elements, bytes an element), as the tree's tensors say
    _unpickle(path, body, lambda key, size: 0, widths)
    keys = _plain_pickle(path, f)
    offsets, at, end = {}, f.tell(), path.stat().st_size
    for key in keys if isinstance(keys, list) else ():
      count, width = widths.get(key, (None, None))
      f.seek(at)
      if count is None or f.read(8) != struct.pack("<q", count) or at + 8 + count * width > end:
        raise corrupt(path, "a storage is cut short or not as its tensor says")
      offsets[key] = at + 8
      at += 8 + count * width
    if widths.keys() - offsets.keys():
      raise corrupt(path, "a tensor's storage is absent")
    return _unpickle(path, body, lambda key, size: offsets[key])


def _plain_pickle(path, f):
  return _unpickle(path, _next_pickle(path, f), None)


def _next_pickle(path, f) -> bytes:
  """Returns the bytes of the pickle that stands next in a file."""
  begin = f.tell()
  try:
    for _, _, position in pickletools.genops(f):
      if position - begin > _MAX_PICKLE:
        raise corrupt(path, f"its pickle takes more than {_MAX_PICKLE} bytes")
  except (ValueError, IndexError, MemoryError, OverflowError) as e:
    raise corrupt(path, f"neither a zip nor a stream that torch.save wrote ({e})") from None
  end = f.tell()
  f.seek(begin)
  return f.read(end - begin)


def _unpickle(path, data: bytes, storage: Callable | None, widths: dict | None = None):
  """Returns what a pickle of tensors holds; tensors become FileTensors.

  Args:
    path: the file, for errors and for the tensors.
    data: one pickle.
    storage: (key, bytes) -> the storage's place in the file; None: no tensors are due here.
    widths: filled with key -> (elements, bytes an element).
  """
  _check_opcodes(path, data)
  unpickler = _Unpickler(path, data, storage, {} if widths is None else widths)
  try:
    return unpickler.load()
  except errors.UserError:
    raise
  except Exception as e:  # a damaged pickle can raise nearly anything
    raise corrupt(path, f"its pickle cannot be read ({type(e).__name__}: {e})") from None


def _check_opcodes(path, data: bytes) -> None:
  """Refuses a pickle with opcodes that tensors do not need, or with a memo made to fill memory."""
  try:
    for opcode, argument, _ in pickletools.genops(data):
      if opcode.name not in _OPCODES:
        raise errors.UserError(f"{path} holds more than tensors (pickle opcode {opcode.name}); "
                               "refused. Ask for the weights as safetensors")
      if opcode.name.endswith("PUT") and argument > len(data):
        raise corrupt(path, "its pickle's memo is larger than the pickle")
  except (ValueError, IndexError, MemoryError, OverflowError) as e:
    raise corrupt(path, f"its pickle cannot be read ({e})") from None


class _Unpickler(pickle.Unpickler):
  """Admits dicts, numbers, strings and tensors; the name of anything else is an error."""

  def __init__(self, path, data, storage, widths):
    super().__init__(io.BytesIO(data), encoding="utf-8")
    self._path, self._storage, self._widths = path, storage, widths

  def find_class(self, module, name):
    if self._storage is not None:
      if (module, name) == ("collections", "OrderedDict"):
        return _Dict
      if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
        return self._tensor
      if (module, name) == ("torch._utils", "_rebuild_parameter"):
        return self._parameter
      if module == "torch" and name in _TORCH_DTYPES:
        return _StorageType(np.dtype(_TORCH_DTYPES[name]))
    raise errors.UserError(f"{self._path} wants to execute {module}.{name}; refused. "
                           "Only tensors are read; ask for the weights as safetensors")

  def persistent_load(self, pid):
    kind, storage_type, key, _, count, *view = pid
    if (self._storage is None or kind != "storage" or not isinstance(storage_type, _StorageType)
        or not isinstance(key, str) or not counts([count]) or view not in ([], [None])):
      raise corrupt(self._path, "a storage that is not as torch.save writes them")
    dtype = storage_type.dtype
    if self._widths.setdefault(key, (count, dtype.itemsize)) != (count, dtype.itemsize):
      raise corrupt(self._path, "a storage with two sizes")
    return _Storage(self._storage(key, count * dtype.itemsize), dtype, count)

  def _parameter(self, data, requires_grad=True, hooks=None):
    del requires_grad, hooks
    return data

  def _tensor(self, storage, offset, shape, strides, *rest):
    del rest  # requires_grad, backward hooks, metadata
    shape, strides = list(shape), list(strides)
    if not (isinstance(storage, _Storage) and counts([offset]) and counts(shape)
            and counts(strides) and len(shape) == len(strides) <= MAX_NDIM):
      raise corrupt(self._path, "a tensor that is not as torch.save writes them")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if count and (last >= storage.count or count > storage.count):
      raise corrupt(self._path, "a tensor larger than its storage")
    place = storage.offset + offset * storage.dtype.itemsize
    return FileTensor(self._path, place, storage.dtype, shape, strides)


_Storage = collections.namedtuple("_Storage", "offset dtype count")
_StorageType = collections.namedtuple("_StorageType", "dtype")


class _Dict(dict):
  """Stands for OrderedDict; attributes that the pickle would set on it are dropped."""

  __slots__ = ()

  def __setstate__(self, state):
    del state
