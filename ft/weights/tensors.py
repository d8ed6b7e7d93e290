"""Reads and writes files of tensors that nobody has vetted, and executes nothing in them.

safetensors (one file, or shards with an index); torch's pickles through `torchfile`, GGUF through
`gguf`. A header is checked in full before a tensor is read, a tensor's bytes are read only when it
is asked for, and nothing is trusted: not offsets, not shapes, not the names or links of shards.

Source: the safetensors format, https://github.com/huggingface/safetensors; sharding as
huggingface_hub's `save_torch_state_dict` lays it out.
"""

import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from ft import errors
from ft.weights import torchfile
from ft.weights.lazy import MAX_NDIM, ArrayTensor, FileTensor, LazyTensor, corrupt, counts

_SAFE_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}
_SAFE_NAMES = {np.dtype(dtype): name for name, dtype in _SAFE_DTYPES.items()}
_MAX_HEADER = 25_000_000  # bytes; a hundred thousand tensors need less
_SHARD = re.compile(r"\w[\w.-]*\.(safetensors|bin)")
_OTHER_SUFFIXES = (*torchfile.SUFFIXES, ".gguf")
_PART = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                 "pytorch_model.bin.index.json")


def open_tensors(path) -> dict[str, LazyTensor]:
  """Opens a file of tensors, or a folder that holds one.

  Args:
    path: a .safetensors file, an index (.index.json) of shards, a .pth, .pt or .bin file of torch,
      a .gguf file (its tensors under Hugging Face names), or a folder with one of them, preferred
      in this order; `model.safetensors` goes before an index.

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
    if path.suffix in torchfile.SUFFIXES:
      return torchfile.open_torch(path)
    if path.suffix == ".gguf":
      from ft.weights import gguf  # needs an optional package
      return gguf.read(path).tensors
  except PermissionError as e:
    raise errors.UserError(f"no permission to read {path}: {e}") from None
  raise errors.UserError(f"{path}: not a known kind of weights; "
                         f"known are .safetensors, .index.json, {', '.join(_OTHER_SUFFIXES)}")


def weight_file(folder) -> pathlib.Path:
  """Returns the file in a folder that open_tensors takes; UserError if none or several."""
  folder = pathlib.Path(folder)
  for name in _WEIGHT_FILES:
    if (folder / name).is_file():
      return folder / name
  for suffix in (".safetensors", *_OTHER_SUFFIXES):
    found = sorted(p for p in folder.glob("*" + suffix) if p.is_file())
    if any(_PART.fullmatch(p.name) for p in found):
      raise errors.UserError(f"{folder} holds shards ({found[0].name}) but no index of them "
                             "(model.safetensors.index.json); copy it there too")
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
    begin, end = end, end + _nbytes(lazy[name])
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


def write_sharded(folder, tensors: Mapping[str, LazyTensor | np.ndarray], max_bytes: int = 5 << 30,
                  metadata=None) -> list[str]:
  """Writes `model.safetensors`, or shards and their `model.safetensors.index.json`.

  Args:
    folder: there, and without weights. Not atomic: write into a temporary folder and rename.
    tensors: name -> array or LazyTensor; one is in memory at a time.
    max_bytes: of tensors in a file; a single tensor that is larger gets a file of its own.
    metadata: dict of str -> str for the header of each file.

  Returns:
    The names of the files of tensors.

  Raises:
    OSError: the disk is full, or no permission.
  """
  folder = pathlib.Path(folder)
  lazy = {k: v if isinstance(v, LazyTensor) else ArrayTensor(v) for k, v in tensors.items()}
  shards = _split(lazy, max_bytes)
  if len(shards) < 2:
    write_safetensors(folder / "model.safetensors", lazy, metadata)
    return ["model.safetensors"]
  files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
  for file, shard in zip(files, shards, strict=True):
    write_safetensors(folder / file, shard, metadata)
  index = {"metadata": {"total_size": sum(map(_nbytes, lazy.values()))},
           "weight_map": {k: f for f, shard in zip(files, shards, strict=True) for k in shard}}
  text = json.dumps(index, indent=2, sort_keys=True) + "\n"
  (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
  return files


def _split(lazy: Mapping[str, LazyTensor], max_bytes: int) -> list[dict]:
  """Returns the tensors of each shard, in the order of huggingface_hub."""
  shards, current, size = [], {}, 0
  for name, tensor in lazy.items():
    if _nbytes(tensor) > max_bytes:
      shards.append({name: tensor})
      continue
    if size + _nbytes(tensor) > max_bytes:
      shards.append(current)
      current, size = {}, 0
    current[name] = tensor
    size += _nbytes(tensor)
  return [*shards, current] if current else shards


def _nbytes(tensor: LazyTensor) -> int:
  return math.prod(tensor.shape) * tensor.dtype.itemsize


def _open_safetensors(path) -> dict:
  header, start = _header(path)
  header.pop("__metadata__", None)
  length = path.stat().st_size - start
  entries = []
  for name, entry in header.items():
    dtype, shape, begin, end = _entry(path, name, entry)
    if math.prod(shape) * dtype.itemsize != end - begin:
      raise corrupt(path, f"{name} of shape {shape} does not fill its {end - begin} bytes")
    entries.append((begin, end, name, dtype, shape))
  entries.sort(key=lambda entry: entry[:2])
  reached = 0
  for begin, end, name, _, _ in entries:
    if begin != reached:
      raise corrupt(path, f"{name} starts at byte {begin} where {reached} is due "
                           f"({'an overlap' if begin < reached else 'a hole'})")
    reached = end
  if reached != length:
    raise corrupt(path, f"tensors take {reached} bytes, the file has {length} for them "
                         f"({'cut short' if reached > length else 'more than the header says'})")
  return {name: FileTensor(path, start + begin, dtype, shape)
          for begin, _, name, dtype, shape in entries}


def _header(path) -> tuple[dict, int]:
  """Returns a safetensors file's header and the byte where tensors start."""
  size = path.stat().st_size
  with open(path, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
      raise corrupt(path, f"its header should take {length} bytes of a file of {size}")
    if length > _MAX_HEADER:
      raise corrupt(path, f"its header takes {length} bytes; at most {_MAX_HEADER} are read")
    text = f.read(length)
  if not text.startswith(b"{"):
    raise corrupt(path, "its header is not a JSON object")
  try:
    header = json.loads(text, object_pairs_hook=_no_duplicates)
  except (ValueError, RecursionError) as e:
    raise corrupt(path, f"its header is no valid JSON ({e})") from None
  return header, 8 + length


def _entry(path, name, entry) -> tuple:
  """Returns one header entry's (dtype, shape, begin, end), checked by themselves."""
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise corrupt(path, f"the header's entry for {name!r} has not dtype, shape and data_offsets")
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in _SAFE_DTYPES:
    raise corrupt(path, f"{name} has the unknown dtype {dtype!r}")
  if not counts(shape) or len(shape) > MAX_NDIM:
    raise corrupt(path, f"{name} has an impossible shape")
  if not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise corrupt(path, f"{name} has impossible offsets")
  return np.dtype(_SAFE_DTYPES[dtype]), tuple(shape), *offsets


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
    raise corrupt(path, f"not an index with a weight_map ({e!r})") from None
  if not plain:
    bad = next(s for s in shards if not isinstance(s, str) or not _SHARD.fullmatch(s))
    raise corrupt(path, f"{bad!r} is not a plain file name of a shard; refused")
  out = {}
  for shard in shards:
    if not _stays(path.parent, shard):
      raise corrupt(path, f"{shard} is a link that leads out of its folder; refused")
    opened = open_tensors(path.parent / shard)
    if doubled := out.keys() & opened.keys():
      raise corrupt(path, f"{min(doubled)} stands in two shards, {shard} and an earlier one")
    listed = {name for name, s in weight_map.items() if s == shard}
    if absent := listed - opened.keys():
      raise corrupt(path, f"{min(absent)} should be in {shard} and is not")
    out.update(opened)
  return out


def _stays(folder, shard: str) -> bool:
  """Returns whether a shard is in its folder, or a link to a blob of the same repository's cache.

  The Hub's cache holds `REPO/blobs/HASH` and links to it from `REPO/snapshots/COMMIT/…/FILE`.
  """
  folder = pathlib.Path(folder).absolute()
  target = (folder / shard).resolve()
  if target.parent == folder.resolve():
    return True
  for place in (folder, folder.resolve()):
    for parent in place.parents:
      if parent.name == "snapshots" and target.parent == (parent.parent / "blobs").resolve():
        return True
  return False
