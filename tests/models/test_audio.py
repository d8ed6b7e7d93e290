"""Features of sound against transformers' extractors, and convolutions against the library's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft import errors
from ft.models import audio, convolution


def sounds():
  """Returns three sounds at 16 kHz of unequal length: tones and noise, speech-like in loudness."""
  rng = np.random.default_rng(0)
  out = []
  for count in (32000, 20011, 9600):
    seconds = np.arange(count) / 16000
    tone = 0.3 * np.sin(2 * np.pi * (200 + 300 * seconds) * seconds)
    out.append((tone + 0.01 * rng.normal(size=count)).astype(np.float32))
  return out


@pytest.mark.parametrize("bins", [80, 128])
def test_log_mel_is_that_of_transformers(bins):
  transformers = pytest.importorskip("transformers")
  extractor = transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=2)
  want = extractor(sounds(), sampling_rate=16000, return_tensors="np")["input_features"]
  settings = audio.from_hf(extractor.to_dict())
  assert settings == audio.LogMel(feature_size=bins, chunk_length=2)
  waveform, _ = audio.clips(sounds(), settings.samples)
  got = jax.jit(settings)(waveform)
  assert got.shape == want.shape == (3, bins, 200)
  assert np.abs(got - want).max() <= 1e-4
  filters = audio.mel_filters(201, bins, 16000)
  assert np.abs(filters - extractor.mel_filters).max() <= 1e-7


def test_log_mel_of_silence_and_of_other_lengths():
  settings = audio.LogMel()
  silent = jax.jit(settings)(np.zeros((1, 1600), np.float32))
  assert np.allclose(silent, (np.log10(1e-10) + 4) / 4)
  assert settings(np.zeros((2, 1759), np.float32)).shape == (2, 80, 10)
  assert settings.samples == 480000


@pytest.mark.parametrize("masked", [False, True])
def test_normalised_waveform_is_that_of_transformers(masked):
  transformers = pytest.importorskip("transformers")
  extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked, padding_value=0.5)
  settings = audio.from_hf(extractor.to_dict())
  assert settings == audio.Waveform(return_attention_mask=masked, padding_value=0.5)
  clips = [x + 0.2 for x in sounds()] if masked else sounds()[:1]
  want = extractor(clips, sampling_rate=16000, padding=masked, return_tensors="np")
  waveform, mask = audio.clips(clips, 32000, settings.padding_value)
  got = jax.jit(settings)(waveform, mask if masked else None)
  assert np.abs(got - want["input_values"]).max() <= 1e-4
  if masked:
    assert np.array_equal(mask, want["attention_mask"])


def test_waveform_as_it_is():
  waveform = sounds()[0][None]
  assert np.array_equal(audio.Waveform(do_normalize=False)(waveform), waveform)


def test_clips_are_cut_and_filled():
  waveform, mask = audio.clips([np.ones(3), np.ones(7)], 5, padding_value=-1.0)
  assert waveform.tolist() == [[1, 1, 1, -1, -1], [1, 1, 1, 1, 1]]
  assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("wrong", [
    {"feature_extractor_type": "WhisperFeatureExtractor", "dither": 0.1},
    {"feature_extractor_type": "WhisperFeatureExtractor", "hop_length": "160"},
    {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 2},
    {"feature_extractor_type": "SeamlessM4TFeatureExtractor"}, {}])
def test_other_features_are_refused(wrong):
  with pytest.raises(errors.UserError):
    audio.from_hf(wrong)


def gradients(function, *args):
  weights = np.random.default_rng(1).normal(size=function(*args).shape).astype(np.float32)
  return jax.grad(lambda *a: (function(*a) * weights).sum(), argnums=(0, 1))(*args)


def same(function, *args):
  """Asserts equal values and gradients of both implementations."""
  results = {}
  for name in convolution.IMPLEMENTATIONS:
    with convolution.using(name):
      results[name] = (function(*args), *gradients(function, *args))
  for got, want in zip(*results.values(), strict=True):
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("length, width, stride, padding", [(11, 3, 2, (1, 1)), (23, 5, 4, (0, 0)),
                                                            (6, 2, 2, (0, 1)), (4, 1, 1, (0, 0))])
def test_convolution_is_the_librarys(length, width, stride, padding):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, length, 3)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(width, 3, 5)), jnp.float32)
  same(functools.partial(audio.convolve, stride=stride, padding=padding), x, kernel)


@pytest.mark.parametrize("width, groups", [(18, 3), (5, 2), (16, 6), (1, 1)])
def test_grouped_convolution_is_the_librarys(width, groups):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 13, 6)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(width, 6 // groups, 6)), jnp.float32)
  same(functools.partial(audio.convolve_grouped, groups=groups), x, kernel)
  assert audio.convolve_grouped(x, kernel, groups).shape == x.shape
