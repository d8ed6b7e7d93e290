"""Tensors that are somewhere until they are read, and the checks that readers of files share."""

import math

import numpy as np

from ft import errors

MAX_NDIM = 8


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


def counts(values) -> bool:
  """Returns whether a value from a file is a list of sizes: whole numbers, none negative."""
  return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def corrupt(path, reason: str) -> errors.UserError:
  """Returns the error for a file that contradicts itself or ends early."""
  return errors.UserError(f"{path} is damaged or not what its name says: {reason}")
