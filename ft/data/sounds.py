"""Sounds on the host: decoding, resampling, and windows of what is long.

What is read is not trusted: the length in the header is checked before a sample is decoded, and
whatever a decoder raises ends as a RowError that names the file.
"""

import io
import math
import os
import pathlib

import numpy as np

from ft import errors

FULL = 32768.0  # of int16
_RATES = (4000, 384000)  # of what is taken for a sound


def decode(source, array_rate: int = 0, max_seconds: float = math.inf) -> tuple:
  """Reads a sound.

  Args:
    source: path, the file's bytes, an array (N,) or (N, channels) of floats in [-1, 1] or of
      integers of full range, or a dict with bytes, path, or array and sampling_rate.
    array_rate: samples a second of an array that comes without; 0: unknown.
    max_seconds: what is longer is refused undecoded.

  Returns:
    (sound (N, channels) float32 in [-1, 1], samples a second).

  Raises:
    RowError: for whatever reason it cannot be had, or if there is nothing in it.
  """
  if isinstance(source, dict):
    if source.get("array") is not None:
      array_rate = source.get("sampling_rate") or array_rate
    found = (source.get(key) for key in ("array", "bytes", "path"))
    source = next((value for value in found if value is not None), None)
  if isinstance(source, (list, tuple)):
    source = np.asarray(source)
  if isinstance(source, np.ndarray):
    name, (sound, rate) = f"array of shape {source.shape}", _of_array(source, array_rate)
  elif isinstance(source, (str, bytes, os.PathLike)):
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    sound, rate = _of_file(source, name, max_seconds)
  else:
    raise errors.RowError(f"{type(source).__name__} is no sound: give a file or an array")
  if not len(sound):
    raise errors.RowError(f"{name}: a sound of zero length")
  if not _RATES[0] <= rate <= _RATES[1]:
    raise errors.RowError(f"{name}: a sampling rate of {rate} Hz, expected {_RATES[0]} to "
                          f"{_RATES[1]}")
  if not np.isfinite(sound).all():
    raise errors.RowError(f"{name}: samples that are not finite")
  return sound, rate


def _of_file(source, name: str, max_seconds: float) -> tuple:
  library = errors.require("soundfile", "audio")
  try:
    if not isinstance(source, bytes) and not pathlib.Path(source).is_file():
      raise errors.RowError(f"{name}: no such file")
    stream = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    with library.SoundFile(stream) as file:
      if file.frames > max_seconds * file.samplerate:
        raise errors.RowError(f"{name}: {file.frames / file.samplerate:.0f} s are more than "
                              f"data.max_seconds={max_seconds:g}")
      return file.read(dtype="float32", always_2d=True), file.samplerate
  except (library.LibsndfileError, RuntimeError, OSError, TypeError, ValueError) as e:
    raise errors.RowError(f"{name}: unreadable sound ({e})") from e


def _of_array(array: np.ndarray, rate: int) -> tuple:
  if not rate:
    raise errors.RowError("an array says no sampling rate; set data.array_rate")
  if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
    raise errors.RowError(f"array of shape {array.shape} and type {array.dtype} is no sound: give "
                          "(samples,) or (samples, channels)")
  sound = array if array.ndim == 2 else array[:, None]
  if array.dtype.kind == "f":
    return sound.astype(np.float32), int(rate)
  info = np.iinfo(array.dtype)
  middle = (int(info.max) + int(info.min) + 1) // 2
  return ((sound.astype(np.float64) - middle) / (int(info.max) - middle + 1)).astype(
    np.float32), int(rate)


def resample(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
  """Returns a sound (N,) of floats in [-1, 1] as int16 at another rate, low-pass filtered.

  Source: scipy.signal.resample_poly, a polyphase filter with a Kaiser window.
  """
  if rate != wanted:
    from scipy import signal

    common = math.gcd(rate, wanted)
    sound = signal.resample_poly(sound.astype(np.float32), wanted // common, rate // common)
  return np.clip(np.rint(sound * FULL), -FULL, FULL - 1).astype(np.int16)


def windows(sound: np.ndarray, most: int, rate: int) -> list[tuple[int, int]]:
  """Returns (start, end) of the parts, of at most `most` samples, that a long sound is read in.

  A part ends where the last sixth of what it could have is quietest, so that words stay whole.
  """
  hop, parts, start = rate // 50, [], 0
  while len(sound) - start > most:
    first = start + most - most // 6
    count = max(1, (start + most - first) // hop)
    stretch = sound[first:first + count * hop].astype(np.float32).reshape(count, -1)
    power = np.convolve(np.square(stretch).mean(1), np.ones(5) / 5, "same")
    end = first + int(power.argmin()) * hop + hop // 2
    parts.append((start, end))
    start = end
  return [*parts, (start, len(sound))]
