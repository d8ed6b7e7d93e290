"""Whether decoding keeps up: rows a second of the loader alone, and of the EfficientNet step.

Nothing is kept in memory, so that every pass opens, decodes, scales and augments each file again:

    JPEG, 500 x 375  FILES crops of scikit-learn's two photographs, scaled to 224 pixels
    JPEG, 640 x 427  as many files of the photographs as they are
    WAV              FILES recordings of noise, 44.1 kHz and two channels, to 16 kHz and one

Loader and step run one after the other, each with all cores: in a run they share them, so that the
loader should be at least three times as fast (`ratio`).
"""

import pathlib
import statistics
import tempfile
import time
import types
import wave

FILES, BATCH, SECONDS = 128, 16, 3
WANTED = 3.0  # times the step


def measure(rounds: int, step) -> list[dict]:
  """Returns [{"what", "rows_per_s", "low", "high", "step_per_s", "ratio"}].

  Args:
    rounds: passes over the files, and timed steps.
    step: makes a function that runs a training step of BATCH images.
  """
  run = step()
  run(), run()  # the first compiles
  consumed = BATCH / statistics.median(_seconds(run) for _ in range(rounds))
  results = []
  with tempfile.TemporaryDirectory() as folder:
    for what, loader in _loaders(pathlib.Path(folder)).items():
      _empty(loader)  # the first pass imports what threads need
      rates = [FILES / _seconds(lambda loader=loader: _empty(loader)) for _ in range(rounds)]
      median = statistics.median(rates)
      results.append({"what": what, "rows_per_s": median, "low": min(rates), "high": max(rates),
                      "step_per_s": consumed, "ratio": median / consumed})
  return results


def table(results) -> str:
  """Returns the results of `measure` as a Markdown table."""
  lines = ["| loader alone | rows/s | step of EfficientNet-Lite0, rows/s | ratio |",
           "|---|---|---|---|"]
  for r in results:
    said = "" if r["ratio"] >= WANTED else f" (below {WANTED:g})"
    lines.append(f"| {r['what']} | {r['rows_per_s']:.0f} ({r['low']:.0f}–{r['high']:.0f}) "
                 f"| {r['step_per_s']:.1f} | **{r['ratio']:.1f}**{said} |")
  return "\n".join(lines)


def _seconds(call) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def _empty(loader) -> None:
  """Takes the batches of one epoch."""
  for batch in loader.iterate():
    del batch


def _loaders(folder: pathlib.Path) -> dict:
  """Returns what -> a loader of the files of that kind, which it writes."""
  from ft.data import audio, image

  pictures = image.Preprocess(_section(image, size=224, mean=(0.5,), std=(0.5,), crop="pad",
                                       crop_pixels=16, flip="h"))
  sounds = audio.Preprocess(_section(audio, seconds=SECONDS, noise=(5.0, 30.0)),
                            types.SimpleNamespace(folder=None, hf_config={}))
  return {
    "JPEG, 500 x 375 to 224 pixels, moved": _loader(
      pictures, [{"image": file} for file in _photographs(folder / "crops", (500, 375))]),
    "JPEG, 640 x 427 to 224 pixels, moved": _loader(
      pictures, [{"image": file} for file in _photographs(folder / "whole", None)]),
    f"WAV, {SECONDS} s, 44.1 kHz stereo to 16 kHz, noise": _loader(
      sounds, [{"audio": file} for file in _recordings(folder / "sounds")]),
  }


def _section(module, **given):
  """Returns a `data` section of defaults, as one modality reads it, but for the keys given."""
  return types.SimpleNamespace(**{key: spec[0] for key, spec in module.KEYS.items()} | given)


def _loader(preprocess, rows):
  from ft.data import loader as loaders

  examples = loaders.prepare(rows, preprocess, cache_bytes=0)
  return loaders.Loader(examples, BATCH, shuffle=True, augment=preprocess.augment,
                        pad=preprocess.pad, buckets=preprocess.buckets)


def _photographs(folder: pathlib.Path, size) -> list:
  """Returns JPEG files of crops of this (width, height); None: whole photographs."""
  import numpy as np
  import PIL.Image
  from sklearn import datasets

  folder.mkdir()
  rng, files = np.random.default_rng(0), []
  photographs = datasets.load_sample_images().images
  for i in range(FILES):
    pixels = photographs[i % len(photographs)]
    if size:
      top, left = (rng.integers(side - cut + 1) for side, cut in zip(pixels.shape, size[::-1],
                                                                     strict=False))
      pixels = pixels[top:top + size[1], left:left + size[0]]
    files.append(folder / f"{i}.jpg")
    PIL.Image.fromarray(pixels).save(files[-1], quality=90)
  return files


def _recordings(folder: pathlib.Path) -> list:
  """Returns WAV files of noise, two channels of 16 bits at 44.1 kHz."""
  import numpy as np

  folder.mkdir()
  rng, files = np.random.default_rng(0), []
  for i in range(FILES):
    files.append(folder / f"{i}.wav")
    with wave.open(str(files[-1]), "wb") as file:
      file.setnchannels(2)
      file.setsampwidth(2)
      file.setframerate(44_100)
      file.writeframes(rng.normal(0, 3000, (SECONDS * 44_100, 2)).astype("<i2").tobytes())
  return files
