"""Loading streams: the host never holds a checkpoint twice."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from ft.weights import tensors

ROOT = pathlib.Path(__file__).resolve().parents[2]
MIB = 1 << 20
SIZES = {"vocab_size": 60_000, "hidden_size": 768, "num_hidden_layers": 12,
         "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
         "type_vocab_size": 2}
PROGRAM = """
import functools, json, sys
import jax
from ml_collections import ConfigDict
from ft import mesh, models
from ft.models import layers

def kib(name):
  line = next(l for l in open("/proc/self/status") if l.startswith(name + ":"))
  return int(line.split()[1])

jax.numpy.zeros(1).block_until_ready()
models.families()
models.family_module("bert")
devices, scan = int(sys.argv[2]), sys.argv[3] == "scan"
grid = mesh.make(ConfigDict(dict(data=-1, fsdp=devices, tensor=1)))
before = kib("VmRSS")
loaded = models.load(sys.argv[1], sharding=functools.partial(mesh.shard, grid),
                     compute=layers.Compute(scan=scan))
jax.block_until_ready(loaded.variables)
leaves = jax.tree.leaves(loaded.variables)
size = sum(leaf.nbytes for leaf in leaves)
held = [sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == d)
        for d in jax.devices()]
assert len(held) == devices and max(held) < 1.1 * size / devices, held
print(json.dumps({"bytes": size, "growth": (kib("VmHWM") - before) * 1024}))
"""


class Random(tensors.LazyTensor):
  """A tensor that is made when it is written."""

  def __init__(self, shape):
    self.shape, self.dtype = shape, np.dtype(np.float32)

  def read(self):
    return np.random.default_rng(0).standard_normal(self.shape, np.float32) * 0.02


def bert_tensors():
  """Returns {name: tensor} of a BERT of SIZES, 135 M parameters."""
  hidden, wide = SIZES["hidden_size"], SIZES["intermediate_size"]
  found = {}

  def linear(name, out, into):
    found[f"{name}.weight"], found[f"{name}.bias"] = Random((out, into)), Random((out,))

  def norm(name):
    found[f"{name}.weight"], found[f"{name}.bias"] = Random((hidden,)), Random((hidden,))

  for kind, count in (("word", SIZES["vocab_size"]), ("position", 512), ("token_type", 2)):
    found[f"embeddings.{kind}_embeddings.weight"] = Random((count, hidden))
  norm("embeddings.LayerNorm")
  for i in range(SIZES["num_hidden_layers"]):
    layer = f"encoder.layer.{i}"
    for part in ("query", "key", "value"):
      linear(f"{layer}.attention.self.{part}", hidden, hidden)
    linear(f"{layer}.attention.output.dense", hidden, hidden)
    norm(f"{layer}.attention.output.LayerNorm")
    linear(f"{layer}.intermediate.dense", wide, hidden)
    linear(f"{layer}.output.dense", hidden, wide)
    norm(f"{layer}.output.LayerNorm")
  linear("pooler.dense", hidden, hidden)
  return found


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("devices,scan", [(1, ""), (8, ""), (8, "scan")])
def test_peak_memory_of_loading(tmp_path, devices, scan):
  tensors.write_safetensors(tmp_path / "model.safetensors", bert_tensors(), {"format": "pt"})
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES}))
  done = subprocess.run(
      [sys.executable, "-c", PROGRAM, str(tmp_path), str(devices), scan], cwd=ROOT, text=True,
      capture_output=True, timeout=300, env={
          **os.environ, "JAX_PLATFORMS": "cpu",
          "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"})
  (tmp_path / "model.safetensors").unlink()  # half a gigabyte
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["bytes"] > 4 * 130e6
  assert found["growth"] <= 1.2 * found["bytes"] + 300 * MIB, (
      f"{found['growth'] / MIB:.0f} MiB for a model of {found['bytes'] / MIB:.0f} MiB")
