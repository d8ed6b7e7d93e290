"""Where LoRA's A and B start: at no update, or at a share of the pretrained weights.

Sources: Hu et al., LoRA (2021); Meng et al., PiSSA (2024); Büyükakyüz, OLoRA (2024). The papers
take the share out of the frozen weights, W - s A0 B0; here W stays as it is, so that files and
checkpoints of the base are never another's, and A0 and B0 stand beside A and B as fixed leaves.
Everything is computed on the host and is a function of the weights alone, signs included, so that a
resumed run finds the same A0 and B0.
"""

import math

import jax
import numpy as np
import scipy.linalg
from jax.experimental import multihost_utils

from ft.tune import adapters


def create(start: str, layer, rank: int, scale: float) -> tuple[dict, dict]:
  """Returns (trainable, fixed) of a matrix or convolution.

  Args:
    start: "zero" | "pissa" | "olora".
    layer: an `adapters.Layer`; its kernel is seen as (all inputs, out).
    rank: r.
    scale: s of the update s A B.

  Returns:
    ({lora_a (…, r), lora_b (r, out)}, the same as lora_a0 and lora_b0 or {}), float32.
  """
  inputs, outputs = math.prod(layer.shape[:-1]), layer.shape[-1]
  shape = (*layer.shape[:-1], rank)
  if start == "zero":
    a = adapters.kaiming(layer.rng, shape, inputs)  # as in `peft`
    return {"lora_a": a, "lora_b": np.zeros((rank, outputs), np.float32)}, {}
  kernel = host(layer).reshape(inputs, outputs).astype(np.float64)
  a, b = _principal(kernel, rank, scale) if start == "pissa" else _orthogonal(kernel, rank)
  signs = np.sign(a[np.abs(a).argmax(axis=0), np.arange(rank)])
  a = (a * signs).reshape(shape).astype(np.float32)
  b = (b * signs[:, None]).astype(np.float32)
  return {"lora_a": a, "lora_b": b}, {"lora_a0": a, "lora_b0": b}


def _principal(kernel, rank: int, scale: float):
  """PiSSA: s A B is the best approximation of the kernel of this rank, shared out evenly.

  Of the symmetric product of the smaller side only the eigenvectors that are needed are computed,
  in float64: a tenth of a full decomposition's time.
  """
  wide = kernel.shape[0] <= kernel.shape[1]
  square = kernel @ kernel.T if wide else kernel.T @ kernel
  last = square.shape[0] - 1
  values, vectors = scipy.linalg.eigh(square, subset_by_index=[last - rank + 1, last])
  singular, vectors = np.sqrt(np.maximum(values[::-1], 0)), vectors[:, ::-1]
  other = vectors.T @ kernel if wide else (kernel @ vectors).T  # singular * the other side's
  root = np.sqrt(singular / scale)
  rest = other / np.maximum(singular, 1e-30)[:, None] * root[:, None]
  own = vectors * root
  return (own, rest) if wide else (rest.T, own.T)


def _orthogonal(kernel, rank: int):
  """OLoRA, as `peft` computes it: the first r vectors of the QR decomposition of the torch side."""
  q, r = np.linalg.qr(kernel.T)
  return r[:rank].T, q[:, :rank].T


def host(layer) -> np.ndarray:
  """Returns a layer's kernel as a float32 array in this process's memory, whole."""
  kernel = layer.kernel()
  if isinstance(kernel, jax.Array) and not kernel.is_fully_addressable:
    kernel = multihost_utils.process_allgather(kernel, tiled=True)
  return np.asarray(kernel, np.float32)
