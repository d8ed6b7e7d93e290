"""Reads and writes files of tensors that nobody has vetted, and executes nothing in them.

safetensors (one file, or shards with an index) and torch's two pickled formats (zip, and the older
stream that many published `.pth` files still have). A header is checked in full before a tensor is
read, a tensor's bytes are read only when it is asked for, and nothing is trusted: not offsets, not
shapes, not the names of shards, not what a pickle wants to import.

Sources: the safetensors format, https://github.com/huggingface/safetensors; torch's
`torch/serialization.py`, whose persistent ids and `_rebuild_tensor_v2` arguments are followed here.
"""

import collections
import io
import json
import math
import os
import pathlib
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from ft import errors

_SAFE_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}
_SAFE_NAMES = {np.dtype(dtype): name for name, dtype in _SAFE_DTYPES.items()}
_TORCH_DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAX_HEADER = 25_000_000  # bytes; a hundred thousand tensors need less
_MAX_PICKLE = 50_000_000
_MAX_NDIM = 8
_SHARD = re.compile(r"\w[\w.-]*\.(safetensors|bin)")
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                 "pytorch_model.bin.index.json")
_STATE_KEYS = ("state_dict", "model_state_dict", "model")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# What a pickle of tensors is made of. Others make objects (NEWOBJ, INST, …) or need no admission.
_OPCODES = frozenset("""PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1
  BININT2 LONG LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE SHORT_BINSTRING BINSTRING SHORT_BINBYTES
  TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM
  SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
  """.split())


class LazyTensor:
  """A tensor that is somewhere: `shape` (tuple), `dtype` (numpy), `read()` -> numpy array."""

  shape: tuple
  dtype: np.dtype

  def read(self) -> np.ndarray:
    """Returns the tensor, in memory that is the caller's own."""
    raise NotImplementedError


class ArrayTensor(LazyTensor):
  """An array that is in memory already."""

  def __init__(self, array):
    self._array = np.asarray(array)
    self.shape, self.dtype = self._array.shape, self._array.dtype

  def read(self):
    return self._array.copy()


class FileTensor(LazyTensor):
  """A tensor in a file: `shape` and `strides` (in elements) over bytes that start at `offset`."""

  def __init__(self, path, offset, dtype, shape, strides=None):
    self._path, self._offset, self._strides = path, offset, strides
    self.dtype, self.shape = np.dtype(dtype), tuple(shape)

  def read(self):
    span = math.prod(self.shape)
    if self._strides and span:
      span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self._strides, strict=True))
    try:
      flat = np.fromfile(self._path, self.dtype, span, offset=self._offset)
    except OSError as e:
      raise errors.UserError(f"cannot read {self._path}: {e}") from None
    if flat.size != span:
      raise errors.UserError(f"{self._path} ended in the middle of a tensor; is it being written?")
    if not self._strides or not span:
      return flat.reshape(self.shape)
    steps = [step * self.dtype.itemsize for step in self._strides]
    return np.lib.stride_tricks.as_strided(flat, self.shape, steps).copy()


def open_tensors(path) -> dict[str, LazyTensor]:
  """Opens a file of tensors, or a folder that holds one.

  Args:
    path: a .safetensors file, an index (.index.json) of shards, a .pth, .pt or .bin file of torch,
      or a folder with one of them (safetensors is preferred).

  Returns:
    {name: LazyTensor}, in the order of the file. No tensor has been read.

  Raises:
    UserError: not found, damaged, hostile, or of a kind that is not known.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = weight_file(path)
  if not path.is_file():
    raise errors.UserError(f"no such file of weights: {path}")
  try:
    if path.name.endswith(".index.json"):
      return _open_index(path)
    if path.suffix == ".safetensors":
      return _open_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
      return _open_torch(path)
  except PermissionError as e:
    raise errors.UserError(f"no permission to read {path}: {e}") from None
  raise errors.UserError(f"{path}: not a known kind of weights; "
                         f"known are .safetensors, .index.json, {', '.join(_TORCH_SUFFIXES)}")


def weight_file(folder) -> pathlib.Path:
  """Returns the file in a folder that open_tensors takes; UserError if none or several."""
  folder = pathlib.Path(folder)
  for name in _WEIGHT_FILES:
    if (folder / name).is_file():
      return folder / name
  for suffix in (".safetensors", *_TORCH_SUFFIXES):
    found = sorted(p for p in folder.glob("*" + suffix) if p.is_file())
    if len(found) == 1:
      return found[0]
    if found:
      raise errors.UserError(f"{folder} holds several files of weights, name one: "
                             + ", ".join(p.name for p in found))
  there = sorted(p.name for p in folder.iterdir())[:20]
  raise errors.UserError(f"no weights in {folder}; there are: {', '.join(there) or 'no files'}")


def write_safetensors(path, tensors: Mapping[str, LazyTensor | np.ndarray], metadata=None) -> None:
  """Writes a safetensors file, one tensor in memory at a time.

  Args:
    path: the file; its folder exists. Not atomic: write under a temporary name and rename.
    tensors: name -> array or LazyTensor.
    metadata: dict of str -> str for the header.

  Raises:
    OSError: the disk is full, or no permission.
  """
  lazy = {k: v if isinstance(v, LazyTensor) else ArrayTensor(v) for k, v in tensors.items()}
  # The reference implementation's order, widest items first, which keeps every tensor aligned.
  order = sorted(lazy, key=lambda name: (-lazy[name].dtype.itemsize, name))
  header, end = {}, 0
  if metadata:
    header["__metadata__"] = {str(k): str(v) for k, v in metadata.items()}
  for name in order:
    begin, end = end, end + math.prod(lazy[name].shape) * lazy[name].dtype.itemsize
    header[name] = {"dtype": _SAFE_NAMES[lazy[name].dtype], "shape": list(lazy[name].shape),
                    "data_offsets": [begin, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as f:
    f.write(struct.pack("<Q", len(text)) + text)
    for name in order:
      f.write(np.ascontiguousarray(lazy[name].read()).reshape(-1).view(np.uint8).data)
    f.flush()
    os.fsync(f.fileno())


def _open_safetensors(path) -> dict:
  header, start = _header(path)
  header.pop("__metadata__", None)
  length = path.stat().st_size - start
  entries = []
  for name, entry in header.items():
    dtype, shape, begin, end = _entry(path, name, entry)
    if math.prod(shape) * dtype.itemsize != end - begin:
      raise _corrupt(path, f"{name} of shape {shape} does not fill its {end - begin} bytes")
    entries.append((begin, end, name, dtype, shape))
  entries.sort(key=lambda entry: entry[:2])
  reached = 0
  for begin, end, name, _, _ in entries:
    if begin != reached:
      raise _corrupt(path, f"{name} starts at byte {begin} where {reached} is due "
                           f"({'an overlap' if begin < reached else 'a hole'})")
    reached = end
  if reached != length:
    raise _corrupt(path, f"tensors take {reached} bytes, the file has {length} for them "
                         f"({'cut short' if reached > length else 'more than the header says'})")
  return {name: FileTensor(path, start + begin, dtype, shape)
          for begin, _, name, dtype, shape in entries}


def _header(path) -> tuple[dict, int]:
  """Returns a safetensors file's header and the byte where tensors start."""
  size = path.stat().st_size
  with open(path, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
      raise _corrupt(path, f"its header should take {length} bytes of a file of {size}")
    if length > _MAX_HEADER:
      raise _corrupt(path, f"its header takes {length} bytes; at most {_MAX_HEADER} are read")
    text = f.read(length)
  if not text.startswith(b"{"):
    raise _corrupt(path, "its header is not a JSON object")
  try:
    header = json.loads(text, object_pairs_hook=_no_duplicates)
  except (ValueError, RecursionError) as e:
    raise _corrupt(path, f"its header is no valid JSON ({e})") from None
  return header, 8 + length


def _entry(path, name, entry) -> tuple:
  """Returns one header entry's (dtype, shape, begin, end), checked by themselves."""
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise _corrupt(path, f"the header's entry for {name!r} has not dtype, shape and data_offsets")
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in _SAFE_DTYPES:
    raise _corrupt(path, f"{name} has the unknown dtype {dtype!r}")
  if not _counts(shape) or len(shape) > _MAX_NDIM:
    raise _corrupt(path, f"{name} has an impossible shape")
  if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise _corrupt(path, f"{name} has impossible offsets")
  return np.dtype(_SAFE_DTYPES[dtype]), tuple(shape), *offsets


def _counts(values) -> bool:
  return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _no_duplicates(pairs) -> dict:
  out = dict(pairs)
  if len(out) != len(pairs):
    raise ValueError("a key stands twice")
  return out


def _open_index(path) -> dict:
  """Opens shards. Their names are plain, so that an index cannot point outside its own folder."""
  try:
    weight_map = json.loads(path.read_bytes())["weight_map"]
    shards = sorted(set(weight_map.values()))
    plain = all(isinstance(shard, str) and _SHARD.fullmatch(shard) for shard in shards)
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise _corrupt(path, f"not an index with a weight_map ({e!r})") from None
  if not plain:
    bad = next(s for s in shards if not isinstance(s, str) or not _SHARD.fullmatch(s))
    raise _corrupt(path, f"{bad!r} is not a plain file name of a shard; refused")
  out = {}
  for shard in shards:
    opened = open_tensors(path.parent / shard)
    if doubled := out.keys() & opened.keys():
      raise _corrupt(path, f"{min(doubled)} stands in two shards, {shard} and an earlier one")
    listed = {name for name, s in weight_map.items() if s == shard}
    if absent := listed - opened.keys():
      raise _corrupt(path, f"{min(absent)} should be in {shard} and is not")
    out.update(opened)
  return out


def _open_torch(path) -> dict:
  """Opens a file of torch.save that holds tensors, in a dict or one level below it."""
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
        raise _corrupt(path, "a zip file, but not one that torch.save wrote (no data.pkl)")
      root = pickles[0].removesuffix("data.pkl")
      order = members.get(root + "byteorder")
      if order and archive.read(order)[:16] != b"little":
        raise _corrupt(path, "it was written on a big-endian machine, which is not supported")
      if members[pickles[0]].file_size > _MAX_PICKLE:
        raise _corrupt(path, f"its pickle takes more than {_MAX_PICKLE} bytes")

      def storage(key, size):
        return _member_offset(path, f, members.get(f"{root}data/{key}"), size)

      return _unpickle(path, archive.read(pickles[0]), storage)
  except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as e:
    raise _corrupt(path, str(e)) from None


def _member_offset(path, f, info, size) -> int:
  """Returns where in the file an uncompressed zip member of at least `size` bytes has its data."""
  if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < size:
    raise _corrupt(path, "a tensor's storage is absent, too short, or compressed")
  f.seek(info.header_offset)
  head = f.read(30)
  if len(head) < 30 or head[:4] != b"PK\x03\x04":
    raise _corrupt(path, "a zip member without its header")
  return info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))


def _open_torch_stream(path):
  """Opens the format before torch 1.6.

  Pickles of the magic number, the version, the machine, the tree and the keys of storages; then
  each storage as its count (int64) and its bytes, in the order of the keys.
  """
  with open(path, "rb") as f:
    if _plain_pickle(path, f) != _LEGACY_MAGIC:
      raise _corrupt(path, "neither a zip nor a stream that torch.save wrote")
    _plain_pickle(path, f)
    machine = _plain_pickle(path, f)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
      raise _corrupt(path, "it was written on a big-endian machine, which is not supported")
    body = _next_pickle(path, f)
    widths = {}  # storage key -> (elements, bytes an element), as the tree's tensors say
    _unpickle(path, body, lambda key, size: 0, widths)
    keys = _plain_pickle(path, f)
    offsets, at, end = {}, f.tell(), path.stat().st_size
    for key in keys if isinstance(keys, list) else ():
      count, width = widths.get(key, (None, None))
      f.seek(at)
      if count is None or f.read(8) != struct.pack("<q", count) or at + 8 + count * width > end:
        raise _corrupt(path, "a storage is cut short or not as its tensor says")
      offsets[key] = at + 8
      at += 8 + count * width
    if widths.keys() - offsets.keys():
      raise _corrupt(path, "a tensor's storage is absent")
    return _unpickle(path, body, lambda key, size: offsets[key])


def _plain_pickle(path, f):
  return _unpickle(path, _next_pickle(path, f), None)


def _next_pickle(path, f) -> bytes:
  """Returns the bytes of the pickle that stands next in a file."""
  begin = f.tell()
  try:
    for _, _, position in pickletools.genops(f):
      if position - begin > _MAX_PICKLE:
        raise _corrupt(path, f"its pickle takes more than {_MAX_PICKLE} bytes")
  except (ValueError, IndexError, MemoryError, OverflowError) as e:
    raise _corrupt(path, f"neither a zip nor a stream that torch.save wrote ({e})") from None
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
    raise _corrupt(path, f"its pickle cannot be read ({type(e).__name__}: {e})") from None


def _check_opcodes(path, data: bytes) -> None:
  """Refuses a pickle with opcodes that tensors do not need, or with a memo made to fill memory."""
  try:
    for opcode, argument, _ in pickletools.genops(data):
      if opcode.name not in _OPCODES:
        raise errors.UserError(f"{path} holds more than tensors (pickle opcode {opcode.name}); "
                               "refused. Ask for the weights as safetensors")
      if opcode.name.endswith("PUT") and argument > len(data):
        raise _corrupt(path, "its pickle's memo is larger than the pickle")
  except (ValueError, IndexError, MemoryError, OverflowError) as e:
    raise _corrupt(path, f"its pickle cannot be read ({e})") from None


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
        or not isinstance(key, str) or not _counts([count]) or view not in ([], [None])):
      raise _corrupt(self._path, "a storage that is not as torch.save writes them")
    dtype = storage_type.dtype
    if self._widths.setdefault(key, (count, dtype.itemsize)) != (count, dtype.itemsize):
      raise _corrupt(self._path, "a storage with two sizes")
    return _Storage(self._storage(key, count * dtype.itemsize), dtype, count)

  def _parameter(self, data, requires_grad=True, hooks=None):
    del requires_grad, hooks
    return data

  def _tensor(self, storage, offset, shape, strides, *rest):
    del rest  # requires_grad, backward hooks, metadata
    shape, strides = list(shape), list(strides)
    if not (isinstance(storage, _Storage) and _counts([offset]) and _counts(shape)
            and _counts(strides) and len(shape) == len(strides) <= _MAX_NDIM):
      raise _corrupt(self._path, "a tensor that is not as torch.save writes them")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if count and (last >= storage.count or count > storage.count):
      raise _corrupt(self._path, "a tensor larger than its storage")
    place = storage.offset + offset * storage.dtype.itemsize
    return FileTensor(self._path, place, storage.dtype, shape, strides)


_Storage = collections.namedtuple("_Storage", "offset dtype count")
_StorageType = collections.namedtuple("_StorageType", "dtype")


class _Dict(dict):
  """Stands for OrderedDict; attributes that the pickle would set on it are dropped."""

  __slots__ = ()

  def __setstate__(self, state):
    del state


def _corrupt(path, reason: str) -> errors.UserError:
  return errors.UserError(f"{path} is damaged or not what its name says: {reason}")
