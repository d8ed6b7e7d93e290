"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their ways of reaching further.

Follows transformers' `modeling_rope_utils.py` (Apache-2.0). Features are rotated in two halves:
feature i with feature i + d / 2, as Hugging Face's checkpoints are laid out.

    default   the paper's wavelengths
    linear    positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)
    llama3    long wavelengths stretched, short ones kept (Llama 3.1, arXiv:2407.21783)
    yarn      the same by the number of turns, and sharper attention (arXiv:2309.00071)
    longrope  a factor for each wavelength, one set for short and one for long texts (Phi-3,
              arXiv:2402.13753)
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from ft import errors

# What each kind must state; None may stand for what transformers computes from other keys.
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
}
TYPES = tuple(_NEEDS)


@dataclasses.dataclass(frozen=True)
class Rope:
  """Angles per position.

  Attributes:
    size: d, how many of a head's features are rotated; the rest pass through.
    theta: base of the wavelengths.
    kind: one of TYPES.
    settings: sorted ((key, value), …) of the other keys of config.json's rope_parameters.
  """

  size: int
  theta: float = 10000.0
  kind: str = "default"
  settings: tuple = ()

  @classmethod
  def from_hf(cls, hf: dict, head_size: int, theta: float = 10000.0) -> "Rope":
    """Reads rope_parameters (transformers 5), or rope_theta and rope_scaling (before).

    Args:
      hf: config.json, or the part of rope_parameters for one kind of layer under that key.
      head_size: features of a head.
      theta: where none is stated.

    Raises:
      UserError: a kind that is not in TYPES, or a setting that it needs is missing or misshapen.
    """
    stated = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = stated.pop("rope_type", None) or stated.pop("type", None) or "default"
    stated.pop("type", None)
    if kind in ("su", "yarn") and "short_factor" in stated:
      kind = "longrope"  # its names in Phi-3's first files
    if kind not in TYPES:
      raise errors.UserError(f"config.json: rope type {kind!r} is not supported; "
                             f"supported are {', '.join(TYPES)}")
    theta = float(stated.pop("rope_theta", None) or hf.get("rope_theta") or theta)
    part = stated.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
    size = int(head_size * part)
    if kind not in ("default", "linear"):
      stated = _lengths(stated, hf)
    _check(kind, stated, size)
    settings = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in stated.items()
                            if v is not None))
    return cls(size, theta, kind, settings)

  def to_hf(self, head_size: int) -> dict:
    """Returns config.json's rope_parameters; the inverse of from_hf."""
    stated = {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings}
    if self.size != head_size:  # a little more than the quotient, which may be rounded down
      stated["partial_rotary_factor"] = (self.size + 0.5) / head_size
    return {"rope_type": self.kind, "rope_theta": self.theta, **stated}

  def frequencies(self, long: bool = False) -> np.ndarray:
    """Returns radians per position of each pair of features, (d / 2,) float32.

    Args:
      long: longrope only: those for texts of more than original_max_position_embeddings.
    """
    exponents = np.arange(0, self.size, 2, dtype=np.float32) / np.float32(self.size)
    wavelengths = np.float32(self.theta)**exponents  # over 2 pi
    settings = dict(self.settings)
    if self.kind == "linear":
      return 1 / wavelengths / np.float32(settings["factor"])
    if self.kind == "llama3":
      return _llama3(1 / wavelengths, settings)
    if self.kind == "yarn":
      return _yarn(1 / wavelengths, settings, self.size, self.theta)
    if self.kind == "longrope":
      return 1 / (np.float32(settings["long_factor" if long else "short_factor"]) * wavelengths)
    return 1 / wavelengths

  def scale(self) -> float:
    """Returns what cosine and sine are multiplied by: the attention factor of yarn and longrope."""
    settings = dict(self.settings)
    if self.kind not in ("yarn", "longrope"):
      return 1.0
    if "attention_factor" in settings:
      return settings["attention_factor"]
    factor = settings["factor"]
    if self.kind == "longrope":
      original = settings["original_max_position_embeddings"]
      return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    over, under = settings.get("mscale"), settings.get("mscale_all_dim")
    return _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor, 1)


def angles(rope: Rope, positions, dtype=jnp.float32, length: int | None = None) -> tuple:
  """Returns (cos, sin), each (B, T, 1, d / 2), of positions (B, T).

  Args:
    rope: which angles.
    positions: (B, T) int.
    dtype: of the result; it is computed in float32.
    length: longrope only: how long the text may become, which decides between its two sets; the
      largest position plus one if None. With a cache it has to be the number of slots, since keys
      that were rotated by one set and queries by the other do not match.
  """
  frequencies = rope.frequencies()
  if rope.kind == "longrope":
    length = positions.max() + 1 if length is None else length
    original = dict(rope.settings)["original_max_position_embeddings"]
    frequencies = jnp.where(length > original, rope.frequencies(long=True), frequencies)
  turned = positions.astype(jnp.float32)[..., None, None] * frequencies
  return ((jnp.cos(turned) * rope.scale()).astype(dtype),
          (jnp.sin(turned) * rope.scale()).astype(dtype))


def rotate(x, cos, sin):
  """Returns x (B, T, H, D) with its first d features rotated by the angles (B, T, 1, d / 2)."""
  half = cos.shape[-1]
  first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _lengths(stated: dict, hf: dict) -> dict:
  """Returns the settings with the length before stretching, and the factor that follows from it."""
  longest = hf.get("max_position_embeddings")
  original = (hf.get("original_max_position_embeddings")
              or stated.get("original_max_position_embeddings") or longest)
  factor = stated.get("factor")
  if factor is None and original and longest:
    factor = longest / original
  return {**stated, "original_max_position_embeddings": original, "factor": factor}


def _check(kind: str, stated: dict, size: int) -> None:
  def fail(what):
    raise errors.UserError(f"config.json: rope type {kind!r} {what}")

  if missing := [key for key in _NEEDS[kind] if stated.get(key) is None]:
    fail(f"needs {', '.join(missing)}")
  for key, value in stated.items():
    if isinstance(value, dict):
      fail(f"has settings of its own for {key}, which is not supported")
  for key in ("short_factor", "long_factor"):
    if kind == "longrope" and len(stated[key]) != (size + 1) // 2:
      fail(f"needs {(size + 1) // 2} numbers in {key}, not {len(stated[key])}")


def _llama3(plain, settings):
  """Long wavelengths stretched by a factor, short ones kept, a ramp between."""
  old = settings["original_max_position_embeddings"]
  low, high = settings["low_freq_factor"], settings["high_freq_factor"]
  wavelengths = 2 * math.pi / plain
  ramp = np.clip((old / wavelengths - low) / (high - low), 0, 1)
  return ((1 - ramp) * plain / settings["factor"] + ramp * plain).astype(np.float32)


def _yarn(plain, settings, size, theta):
  """Pairs that turn fewer than beta_slow times in the old length are stretched, those of more than
  beta_fast are kept, a ramp over the pairs' numbers between."""

  def pair(turns):
    original = settings["original_max_position_embeddings"]
    return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

  first, last = pair(settings.get("beta_fast") or 32), pair(settings.get("beta_slow") or 1)
  if settings.get("truncate", True):
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, size - 1)
  last += 0.001 if first == last else 0
  ramp = np.clip((np.arange(len(plain), dtype=np.float32) - first) / (last - first), 0, 1)
  return (plain / settings["factor"] * ramp + plain * (1 - ramp)).astype(np.float32)


def _mscale(factor, weight) -> float:
  return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
