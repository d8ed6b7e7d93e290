"""Sounds: files, bytes or arrays become int16 samples at the model's rate; the rest is on device.

Stereo is mixed down and other rates are resampled when a row is read; log-mel or normalising, and
what training changes (noise, shift, SpecAugment), run in the step. Each example of a training batch
carries a seed, drawn with the order of the rows, and is changed as a function of it alone.

Shapes: B batch, N samples, F mel bins, M frames of the spectrogram.
"""

import dataclasses
import functools
import json
import math
import pathlib
import shlex
import sys
import threading
import types

import numpy as np

from ft import errors
from ft.data import sounds
from ft.data.formats import audio as folders

KEYS = {
    "seconds": (0.0, "length of a clip, longer ones are cut; 0: as the model's, at most 30",
                (0.0, 600.0)),
    "clip_buckets": ((1.0, 2.0, 4.0, 8.0, 16.0), "seconds that waveforms are padded to; the clips "
                     "of log-mel models all have data.seconds", "list"),
    "array_rate": (0, "samples a second of arrays, which do not say it; 0: they are refused",
                   (0, 1000000)),
    "max_seconds": (7200.0, "longer recordings are not decoded", (0.0, None)),
    "noise": ((), "training: two bounds, in dB, of the ratio of signal to white noise; (): none",
              "list"),
    "shift": (0.0, "training: starts up to so many seconds later, as far as the clip has room",
              (0.0, 600.0)),
    "time_masks": (0, "training: stretches of time that are blanked (SpecAugment)", (0, 100)),
    "time_width": (0.1, "longest such stretch, as a share of the clip", (0.0, 1.0)),
    "frequency_masks": (0, "training: bands of mel bins that are blanked (SpecAugment)", (0, 100)),
    "frequency_width": (15, "most mel bins in such a band", (1, None)),
}
BATCH = ("audio", "audio_length", "audio_seed")  # what an example consists of, seed in training

_LONGEST = 30.0  # seconds of a clip where the model sets no limit
_COUNT_LOCK = threading.Lock()  # of the module, so that a Preprocess can be sent to a process


class Preprocess:
  """Turns {"audio": path, bytes or array} into {"audio": (N,) int16, "audio_length": () int32}.

  A row whose audio is a dict, as Hugging Face's data sets have it, gives bytes, path, or array with
  sampling_rate.

  Attributes:
    features: `ft.models.audio.LogMel` or `Waveform`: what the model reads.
    samples: most samples of a clip.
    pad, buckets: of the loader; a clip is padded with zeros.
    augments: whether `augment` changes anything.
    counts: recordings at another rate, of these at a lower one; with several channels; cut.
    info: what models.inspect said; of a finished run the folder only.
    threaded: decoding leaves Python's lock.
  """

  pad = types.MappingProxyType({"audio": 0})
  threaded = True

  def __init__(self, config, info):
    """Settles what the model reads.

    Args:
      config: the `data` section with this module's KEYS.
      info: what `models.inspect` found: preprocessor_config.json lies in its folder; where it does
        not, config.json says enough.

    Raises:
      UserError: a value that does not fit the model.
    """
    self.info = info
    self._settle({key: getattr(config, key) for key in KEYS}, _features(info))

  def _settle(self, keys: dict, features) -> None:
    self._keys, self.features = types.SimpleNamespace(**keys), features
    self.rate, self.mel = features.sampling_rate, hasattr(features, "hop_length")
    most = float(features.chunk_length) if self.mel else math.inf
    if keys["seconds"] > most:
      raise errors.UserError(f"data.seconds={keys['seconds']}: the model's clips have {most} "
                             "seconds; set it to that or less")
    self.samples = round((keys["seconds"] or min(most, _LONGEST)) * self.rate)
    if self.mel:  # an even number of frames, which the encoder halves
      self.samples = -(-self.samples // (2 * features.hop_length)) * 2 * features.hop_length
    self.buckets = (self.samples,) if self.mel else _buckets(
      keys["clip_buckets"], self.rate, self.samples)
    self._noise = _bounds(keys["noise"])
    if keys["frequency_masks"] and not self.mel:
      raise errors.UserError("data.frequency_masks blanks mel bins, and this model reads the "
                             "waveform; set it to 0")
    self.augments = bool(self._noise or keys["shift"] or keys["time_masks"]
                         or keys["frequency_masks"])
    self.counts = dict.fromkeys(("resampled", "from_a_lower_rate", "mixed_down", "cut"), 0)

  # On the host.

  def __call__(self, row: dict) -> dict:
    """Returns the example of a row; RowError for what is no sound, or has none in it."""
    sound = self.sound(row)
    if len(sound) > self.samples:
      self._count("cut")
    return self.clip(sound)

  def sound(self, row: dict) -> np.ndarray:
    """Returns all of a row's sound, (N,) int16 at the model's rate.

    Raises:
      RowError: it cannot be read, is empty, or its rate is none that sounds have.
    """
    if row.get("audio") is None:
      raise errors.RowError(f"no audio in the row, which has {', '.join(row) or 'nothing'}")
    sound, rate = sounds.decode(row["audio"], self._keys.array_rate, self._keys.max_seconds)
    if sound.shape[1] > 1:
      self._count("mixed_down")
    if rate != self.rate:
      self._count("resampled")
    if rate < self.rate:
      self._count("from_a_lower_rate")
    return sounds.resample(sound.mean(1), rate, self.rate)

  def clip(self, sound: np.ndarray) -> dict:
    """Returns the example of samples (N,) int16, cut to the length of a clip."""
    sound = np.ascontiguousarray(sound[:self.samples])
    return {"audio": sound, "audio_length": np.asarray(len(sound), np.int32)}

  def _count(self, what: str) -> None:
    with _COUNT_LOCK:
      self.counts[what] += 1

  def augment(self, example: dict, rng: np.random.Generator) -> dict:
    """Returns the example with "audio_seed": () uint32, which `finish` changes it by."""
    return {**example, "audio_seed": np.asarray(rng.integers(2**32), np.uint32)}

  # On the device.

  def sounds(self, batch: dict) -> tuple:
    """Returns (sound (B, N) float32 in [-1, 1], samples that count (B,) int32), noise and shift in.
    """
    import jax
    import jax.numpy as jnp

    sound = batch["audio"].astype(jnp.float32) / sounds.FULL
    length = batch["audio_length"]
    if "audio_seed" not in batch:
      return sound, length
    change = functools.partial(_changed, shift=round(self._keys.shift * self.rate),
                               noise=self._noise, everywhere=self.mel)
    return jax.vmap(change)(sound, length, batch["audio_seed"])

  def finish(self, batch: dict) -> dict:
    """Returns the model's inputs, inside jit: input_features (B, F, M) or input_values (B, N).

    SpecAugment blanks log-mel with 0, as transformers' Whisper does, and the normalised waveform
    with 0, its mean.
    """
    import jax
    import jax.numpy as jnp

    rest = {key: value for key, value in batch.items() if key not in BATCH}
    sound, length = self.sounds(batch)
    if self.mel:
      x, frames = self.features(sound), -(-length // self.features.hop_length)
      made = {}
    else:
      mask = (jnp.arange(sound.shape[1]) < length[:, None]).astype(jnp.int32)
      x, frames = self.features(sound, mask)[:, None], length
      made = {"attention_mask": mask} if self.features.return_attention_mask else {}
    if "audio_seed" in batch and (self._keys.time_masks or self._keys.frequency_masks):
      keys = self._keys
      blank = functools.partial(
        spec_augment, time_masks=keys.time_masks, time_width=keys.time_width,
        frequency_masks=keys.frequency_masks, frequency_width=keys.frequency_width)
      x = jax.vmap(blank)(x, frames, batch["audio_seed"])
    made["input_features" if self.mel else "input_values"] = x if self.mel else x[:, 0]
    return {**rest, **made}

  # For log, card and prediction.

  def length(self, example: dict) -> int:
    """Returns the number of samples."""
    return len(example["audio"])

  def show(self, example: dict) -> str:
    """Returns one line about an example for log and card."""
    sound = np.asarray(example["audio"])
    return (f"sound of {len(sound) / self.rate:.2f} s at {self.rate} Hz, "
            f"peak {np.abs(sound.astype(np.int32)).max() / sounds.FULL:.2f}")

  def read_rows(self, source: str):
    """Returns rows for prediction; see the function of that name."""
    return read_rows(source)

  def try_it(self, folder) -> str:
    """Returns the command that predicts on sounds of the user's own with the run in a folder."""
    return f"python scripts/predict.py --run={shlex.quote(str(folder))} --input=SOUND_OR_FOLDER"

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    kept = ("seconds", "clip_buckets", "array_rate", "max_seconds")
    return {"modality": "audio", **{key: getattr(self._keys, key) for key in kept},
            "log_mel": self.mel, "features": dataclasses.asdict(self.features)}

  @classmethod
  def from_spec(cls, spec: dict, folder=None) -> "Preprocess":
    """Rebuilds the preprocessing of a run for prediction: the same features, no augmentation."""
    from ft.models import audio

    self = cls.__new__(cls)
    self.info = types.SimpleNamespace(folder=folder)
    keys = {key: spec.get(key, default) for key, (default, *_) in KEYS.items()}
    kind = audio.LogMel if spec["log_mel"] else audio.Waveform
    self._settle(keys, kind(**spec["features"]))
    return self


from_spec = Preprocess.from_spec


def spec_augment(x, frames, seed, time_masks: int, time_width: float, frequency_masks: int,
                 frequency_width: int):
  """Returns x with stretches of its real frames, and bands of its bins, set to 0.

  Source: Park et al. 2019, arXiv:1904.08779; widths are drawn evenly from 0 to the most there may
  be, places evenly among those where the stretch fits.

  Args:
    x: (F, M). frames: () how many of them are real. seed: () uint32.
    time_masks, time_width: how many, and the most of each as a share of the real frames.
    frequency_masks, frequency_width: how many, and the most bins of each.
  """
  import jax
  import jax.numpy as jnp

  key = jax.random.fold_in(jax.random.key(seed), 1)
  bins, length = x.shape
  for i in range(time_masks + frequency_masks):
    width, place = jax.random.uniform(jax.random.fold_in(key, i), (2,))
    of_time = i < time_masks
    size = frames if of_time else jnp.int32(bins)
    most = time_width * size if of_time else jnp.minimum(frequency_width, size)
    width = jnp.floor(width * (most + 1)).astype(jnp.int32)
    start = jnp.floor(place * (size - width + 1)).astype(jnp.int32)
    at = jnp.arange(length)[None] if of_time else jnp.arange(bins)[:, None]
    x = jnp.where((at >= start) & (at < start + width), 0.0, x)
  return x


def _changed(sound, length, seed, shift: int, noise: tuple, everywhere: bool):
  """Returns (sound (N,), length) of a sound (N,) that starts later and has noise over it.

  Args:
    shift: most samples that it may start later.
    noise: (lowest, highest) ratio of signal to noise, dB; () for none.
    everywhere: whether there is noise behind the sound's end, too.
  """
  import jax
  import jax.numpy as jnp

  later, ratio, hiss = jax.random.split(jax.random.key(seed), 3)
  where = jnp.arange(sound.shape[0])
  if shift:
    room = jnp.minimum(sound.shape[0] - length, shift)
    by = jnp.floor(jax.random.uniform(later) * (room + 1)).astype(jnp.int32)
    sound, length = jnp.roll(sound, by), length + by
  if noise:
    power = jnp.sum(jnp.square(sound)) / length
    level = jax.random.uniform(ratio, minval=noise[0], maxval=noise[1])
    hiss = jax.random.normal(hiss, sound.shape) * jnp.sqrt(power * 10 ** (-level / 10))
    sound = sound + jnp.where(everywhere | (where < length), hiss, 0.0)
  return sound, length


def read_rows(source: str):
  """Returns an iterator of {"audio": path, "id": path as given} for prediction.

  Args:
    source: a sound file, a folder (all sounds in and below it, sorted), or "-" for paths on
      standard input, one a line.

  Raises:
    UserError: there is nothing of that name, or a folder without sounds.
  """
  if source == "-":
    names = (line.rstrip("\r\n") for line in sys.stdin)
    return ({"audio": pathlib.Path(name), "id": name} for name in names if name)
  path = pathlib.Path(source)
  if not path.exists():
    raise errors.UserError(f"{source}: no such file or folder")
  files = [path]
  if path.is_dir():
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in folders.SOUNDS)
    if not files:
      raise errors.UserError(f"{source}: no sounds in it (names ending in "
                             f"{', '.join(folders.SOUNDS)})")
  return ({"audio": file, "id": str(file)} for file in files)


def _features(info):
  """Returns what the model reads, of preprocessor_config.json, or else of config.json."""
  from ft.models import audio

  path, hf = pathlib.Path(info.folder or ".") / "preprocessor_config.json", info.hf_config or {}
  if path.is_file():
    try:
      return audio.from_hf(json.loads(path.read_text("utf-8")))
    except ValueError as e:
      raise errors.UserError(f"{path}: not JSON: {e}") from e
  if "num_mel_bins" in hf:
    return audio.LogMel(feature_size=hf["num_mel_bins"])
  return audio.Waveform(return_attention_mask=hf.get("feat_extract_norm") == "layer")


def _buckets(given, rate: int, samples: int) -> tuple[int, ...]:
  """Returns the lengths, in samples, that waveforms are padded to."""
  for value in given:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
      raise errors.UserError(f"data.clip_buckets={list(given)}: give seconds, such as 1,2,4,8")
  lengths = {round(value * rate) for value in given}
  return (*sorted(n for n in lengths if n < samples), samples)


def _bounds(noise) -> tuple[float, ...]:
  """Returns data.noise as numbers, () for none."""
  numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in noise or ())
  if not noise:
    return ()
  if len(noise) != 2 or not numbers or noise[0] > noise[1]:
    raise errors.UserError(f"data.noise={list(noise)}: expected two ratios in dB, the lower first, "
                           "such as 10,40")
  return tuple(map(float, noise))
