"""The tuned model as one serialized StableHLO program, weights inside.

The artifact is for serving: jax promises to read it for about six months. The durable form of a
model is its safetensors folder.
"""

import importlib
import json
import pathlib

import jax
import numpy as np
from jax import export

from ft import errors
from ft.workdir import write_atomic


def write(pretrained, folder: pathlib.Path) -> None:
  """Writes model.stablehlo and inputs.json, reads them back and compares the outputs.

  Args:
    pretrained: a loaded model.
    folder: where to; made if absent.
  Raises:
    TrainingFailed: the program read back computes something else.
  """
  errors.require("flatbuffers", "export")
  family = importlib.import_module(f"ft.models.{pretrained.family}")
  probe = {k: np.asarray(v) for k, v in family.probe_inputs(pretrained.module.config).items()}
  scope = export.SymbolicScope()
  shapes = {}
  for key, value in probe.items():
    # The batch is free; so is the length of token inputs, which are the two-dimensional ones.
    names = ("batch", "length")[: 2 if value.ndim == 2 else 1]
    shape = ",".join([*names, *map(str, value.shape[len(names) :])])
    shapes[key] = jax.ShapeDtypeStruct(
      export.symbolic_shape(shape, scope=scope), value.dtype
    )

  @jax.jit
  def call(inputs):
    return pretrained.module.apply(pretrained.variables, **inputs)

  written = export.export(call)(shapes)
  folder.mkdir(parents=True, exist_ok=True)
  write_atomic(folder / "model.stablehlo", bytes(written.serialize()))
  described = {
    key: {"shape": [str(d) for d in spec.shape], "dtype": spec.dtype.name}
    for key, spec in shapes.items()
  }
  write_atomic(folder / "inputs.json", json.dumps(described, indent=1))

  again = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
  got = again.call(probe)
  for key, want in call(probe).items():
    same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-5), got[key], want)
    if not jax.tree.all(same):
      raise errors.TrainingFailed(f"{folder}: the program read back gives another {key}")
