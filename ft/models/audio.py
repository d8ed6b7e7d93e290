"""What audio models share: features of a waveform, computed on the device; convolution over time.

`LogMel` gives Whisper's log-mel spectrogram, `Waveform` the normalised waveform of wav2vec2; both
are read from preprocessor_config.json and may be jitted with the model that follows. They compute
what transformers' `WhisperFeatureExtractor` and `Wav2Vec2FeatureExtractor` (Apache-2.0) compute.

On a CPU, where XLA's gradient of a convolution over time is slow (that of a grouped one ten times),
convolutions are written as matrix products. Elsewhere they are the library's.
`ft.models.convolution.using` overrides the choice.

Shapes: B batch, N samples, F features, T frames, C channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ft import errors
from ft.models import base, convolution

# The scale of mel below 1000 Hz is linear, 200 / 3 Hz a mel; above, 27 mel are a factor of 6.4.
_LINEAR, _BREAK, _LOG_STEP = 200 / 3, 1000.0, np.log(6.4) / 27
_TAPS = 8  # of a grouped convolution that stand side by side in the input of its product


@dataclasses.dataclass(frozen=True)
class LogMel:
  """Whisper's log-mel spectrogram (Radford et al. 2022, arXiv:2212.04356).

  Attributes:
    feature_size: F, mel bins: 80, or 128 of the large-v3 models.
    sampling_rate: of the waveform, Hz.
    hop_length: samples from one frame to the next.
    n_fft: samples that a frame sees.
    chunk_length: seconds that a model's clip has.
    padding_value: of the samples that fill a clip up.
  """

  feature_size: int = 80
  sampling_rate: int = 16000
  hop_length: int = 160
  n_fft: int = 400
  chunk_length: int = 30
  padding_value: float = 0.0

  @classmethod
  def from_hf(cls, hf: dict) -> "LogMel":
    """Returns the settings of a preprocessor_config.json.

    Raises:
      UserError: a value of another type, or one that this does not compute.
    """
    base.only(hf, "dither", 0.0)
    base.only(hf, "do_normalize", False)
    return _settings(cls, hf)

  @property
  def samples(self) -> int:
    """Samples of a clip: 480,000 for 30 seconds."""
    return self.chunk_length * self.sampling_rate

  def __call__(self, waveform):
    """Returns input_features (B, F, N // hop_length) float32 of a waveform (B, N) in [-1, 1].

    Whisper expects clips of `samples`; see `clips`. Loudness is limited to the 80 dB below the
    loudest point of each clip.
    """
    power = jnp.square(jnp.abs(self._transform(waveform.astype(jnp.float32))))
    filters = jnp.asarray(mel_filters(self.n_fft // 2 + 1, self.feature_size, self.sampling_rate))
    mel = jnp.einsum("btk,kf->bft", power, filters, precision="highest")
    loud = jnp.log10(jnp.maximum(mel, 1e-10))
    loud = jnp.maximum(loud, loud.max((1, 2), keepdims=True) - 8.0)
    return (loud + 4.0) / 4.0

  def _transform(self, waveform):
    """Returns the Fourier transforms (B, T, n_fft / 2 + 1) of windowed frames."""
    half, hop, frames = self.n_fft // 2, self.hop_length, waveform.shape[1] // self.hop_length
    padded = jnp.pad(waveform, ((0, 0), (half, half)), mode="reflect")
    # A frame is some rows of `hop` samples, the last of them cut: slices, where a gather is slow.
    rows = -(-self.n_fft // hop)
    padded = padded[:, :(frames + rows - 1) * hop].reshape(waveform.shape[0], -1, hop)
    framed = jnp.concatenate([padded[:, i:i + frames] for i in range(rows)], axis=-1)
    window = np.hanning(self.n_fft + 1)[:-1].astype(np.float32)  # periodic
    return jnp.fft.rfft(framed[..., :self.n_fft] * window)


@dataclasses.dataclass(frozen=True)
class Waveform:
  """The waveform as wav2vec2 reads it.

  Attributes:
    sampling_rate: of the waveform, Hz.
    do_normalize: each clip gets zero mean and unit variance over its real samples.
    padding_value: of the samples beyond a clip's end.
    return_attention_mask: whether the model is to be given the mask: models with group norm in
      their feature extractor were trained without.
  """

  sampling_rate: int = 16000
  do_normalize: bool = True
  padding_value: float = 0.0
  return_attention_mask: bool = False

  @classmethod
  def from_hf(cls, hf: dict) -> "Waveform":
    """Returns the settings of a preprocessor_config.json.

    Raises:
      UserError: a value of another type, or one that this does not compute.
    """
    base.only(hf, "feature_size", 1)
    return _settings(cls, hf)

  def __call__(self, waveform, attention_mask=None):
    """Returns input_values (B, N) float32 of a waveform (B, N); attention_mask (B, N) or None."""
    if not self.do_normalize:
      return waveform.astype(jnp.float32)
    return normalise(waveform, attention_mask, self.padding_value)


def from_hf(hf: dict) -> LogMel | Waveform:
  """Returns the features that a preprocessor_config.json asks for; UserError if they are others."""
  kinds = {"WhisperFeatureExtractor": LogMel, "Wav2Vec2FeatureExtractor": Waveform}
  kind = hf.get("feature_extractor_type")
  if kind not in kinds:
    raise errors.UserError(f"preprocessor_config.json: feature_extractor_type {kind!r} is not "
                           f"supported; supported are {', '.join(kinds)}")
  return kinds[kind].from_hf(hf)


def normalise(waveform, attention_mask=None, padding_value: float = 0.0):
  """Returns (B, N) float32 of zero mean and unit variance over the real samples of each row.

  Args:
    waveform: (B, N).
    attention_mask: (B, N), 1 for real samples; None: all are. Others get padding_value.
    padding_value: see above.
  """
  x = waveform.astype(jnp.float32)
  real = jnp.ones(x.shape, bool) if attention_mask is None else attention_mask != 0
  count = jnp.maximum(real.sum(1, keepdims=True), 1)
  centred = x - jnp.where(real, x, 0).sum(1, keepdims=True) / count
  variance = jnp.where(real, jnp.square(centred), 0).sum(1, keepdims=True) / count
  return jnp.where(real, centred / jnp.sqrt(variance + 1e-7), padding_value)


def clips(waveforms: Sequence, samples: int, padding_value: float = 0.0) -> tuple:
  """Returns (waveform (B, samples) float32, attention_mask (B, samples) int32), on the host.

  Args:
    waveforms: arrays (N_i,); what is longer than `samples` is cut, what is shorter is padded.
    samples: of each row.
    padding_value: of the padding.
  """
  out = np.full((len(waveforms), samples), padding_value, np.float32)
  mask = np.zeros(out.shape, np.int32)
  for row, waveform in enumerate(waveforms):
    waveform = np.asarray(waveform, np.float32)[:samples]
    out[row, :len(waveform)], mask[row, :len(waveform)] = waveform, 1
  return out, mask


@functools.cache
def mel_filters(bins: int, count: int, rate: int) -> np.ndarray:
  """Returns (bins, count) float32: triangles of equal width in mel and equal area in Hz.

  The scale and the areas are those of Slaney's Auditory Toolbox (1998).

  Args:
    bins: of the Fourier transform, from 0 to rate / 2 Hz.
    count: F, of the mel scale, from 0 to 8000 Hz.
    rate: samples a second.
  """
  first_log = _BREAK / _LINEAR
  top = first_log + np.log(8000.0 / _BREAK) / _LOG_STEP
  mels = np.linspace(0.0, top, count + 2)
  corners = np.where(mels < first_log, mels * _LINEAR,
                     _BREAK * np.exp(_LOG_STEP * (mels - first_log)))
  widths, places = np.diff(corners), np.linspace(0.0, rate // 2, bins)
  distance = corners[None, :] - places[:, None]
  rising, falling = -distance[:, :-2] / widths[:-1], distance[:, 2:] / widths[1:]
  triangles = np.maximum(0.0, np.minimum(rising, falling))
  return (triangles * (2.0 / (corners[2:] - corners[:-2]))).astype(np.float32)


class Conv1d(nn.Module):
  """Convolution over time: x (B, T, C) -> (B, T', features).

  Parameters: kernel (width, C, features), bias (features,).
  """

  features: int
  width: int
  stride: int = 1
  padding: int = 0
  use_bias: bool = True
  dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.he_normal()

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", self.kernel_init, (self.width, x.shape[-1], self.features))
    y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, (self.padding,) * 2)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)
    return y


def convolve(x, kernel, stride: int = 1, padding: tuple = (0, 0)):
  """Convolution of x (B, T, C) with kernel (width, C, features) -> (B, T', features)."""
  if convolution.implementation() == "library":
    return _library(x, kernel, stride, padding, 1)
  x = jnp.pad(x, ((0, 0), padding, (0, 0)))
  columns = _columns(x, kernel.shape[0], stride)
  y = columns.reshape(-1, columns.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
  return y.reshape(*columns.shape[:2], -1)


def convolve_grouped(x, kernel, groups: int):
  """Convolution within groups of channels, as long as its input.

  Args:
    x: (B, T, C).
    kernel: (width, C / groups, C); width // 2 taps look back, the others ahead.
    groups: how many groups of C / groups channels.

  Returns:
    (B, T, C).
  """
  if convolution.implementation() == "library":
    return _grouped_library(x, kernel, groups)
  return _grouped(x, kernel, groups)


def _grouped_library(x, kernel, groups):
  width = kernel.shape[0]
  return _library(x, kernel, 1, (width // 2, width - 1 - width // 2), groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _grouped(x, kernel, groups):
  """The library's grouped convolution, with the gradient of the same sum as products."""
  return _grouped_library(x, kernel, groups)


def _grouped_forward(x, kernel, groups):
  return _grouped(x, kernel, groups), (x, kernel)


def _grouped_backward(groups, saved, dy):
  _, pull = jax.vjp(functools.partial(_grouped_product, groups=groups), *saved)
  return pull(dy)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _grouped_product(x, kernel, groups):
  """`convolve_grouped` as one product a group.

  _TAPS taps stand side by side in the product's input and the blocks of so many taps side by side
  in its output, to be added up, each shifted. All taps in the input would need `width` times the
  memory of x.
  """
  width, length, channels = kernel.shape[0], *x.shape[1:]
  taps, size = min(_TAPS, width), channels // groups
  blocks = -(-width // taps)
  x = jnp.pad(x, ((0, 0), (width // 2, blocks * taps - 1 - width // 2), (0, 0)))
  x = x.reshape(*x.shape[:2], groups, size).transpose(2, 0, 1, 3)
  columns = jax.vmap(lambda part: _columns(part, taps, 1))(x)
  kernel = jnp.pad(kernel, ((0, blocks * taps - width), (0, 0), (0, 0)))
  kernel = kernel.reshape(blocks, taps, size, groups, size).transpose(3, 1, 2, 0, 4)
  y = jnp.matmul(columns.reshape(groups, -1, taps * size), kernel.reshape(groups, taps * size, -1))
  y = y.reshape(*columns.shape[:3], blocks, size)
  total = sum(y[:, :, i * taps:i * taps + length, i] for i in range(blocks))
  return total.transpose(1, 2, 0, 3).reshape(-1, length, channels)


def _columns(x, width, stride):
  """Returns (B, T', width * C): what each position of a convolution of x (B, T, C) sees."""
  frames = (x.shape[1] - width) // stride + 1
  last = (frames - 1) * stride + 1
  return jnp.concatenate([x[:, i:i + last:stride] for i in range(width)], axis=-1)


def _library(x, kernel, stride, padding, groups):
  return lax.conv_general_dilated(x, kernel, (stride,), (padding,), feature_group_count=groups,
                                  dimension_numbers=("NWC", "WIO", "NWC"))


def _settings(cls, hf):
  """Returns a dataclass with those of its fields that a preprocessor_config.json states."""
  values = {field.name: base.typed(field.name, hf[field.name], field.type)
            for field in dataclasses.fields(cls) if hf.get(field.name) is not None}
  return cls(**values)
