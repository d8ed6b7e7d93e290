"""Sounds: decoding, rates, features, augmentation, sources, and what is refused."""

import io
import json
import types

import jax
import numpy as np
import pytest
from tasks import speech_models

from ft import config as configs
from ft import errors, models
from ft.data import audio, loader, sounds, sources

soundfile = pytest.importorskip("soundfile")
RATE = speech_models.RATE


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whisper")
  speech_models.export_whisper(folder)
  return folder


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
  folder = tmp_path_factory.mktemp("letters")
  speech_models.export_letters(folder)
  return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
  return speech_models.write(tmp_path_factory.mktemp("data") / "recordings")


def wav(sound, rate=RATE, subtype="PCM_16", kind="WAV") -> bytes:
  file = io.BytesIO()
  soundfile.write(file, sound, rate, subtype, format=kind)
  return file.getvalue()


def whole(*sounds_of_rows):
  """A batch as the loader makes it, of examples padded to the longest."""
  lengths = np.array([len(x) for x in sounds_of_rows], np.int32)
  batch = np.zeros((len(lengths), lengths.max()), np.int16)
  for row, sound in zip(batch, sounds_of_rows, strict=True):
    row[:len(sound)] = sound
  return {"audio": batch, "audio_length": lengths}


# ---- Reading ----


def test_samples_of_the_models_rate_arrive_as_they_are(whisper, tmp_path):
  made = speech_models.preprocess(whisper)
  sound = np.random.default_rng(0).integers(-2**15, 2**15, 4000).astype(np.int16)
  (tmp_path / "a.wav").write_bytes(wav(sound))
  for source in (tmp_path / "a.wav", wav(sound), wav(sound, kind="FLAC"),
                 {"array": sound, "sampling_rate": RATE},
                 {"bytes": wav(sound), "path": "elsewhere.wav"}):
    example = made({"audio": source})
    assert example["audio"].dtype == np.int16 and np.array_equal(example["audio"], sound)
    assert example["audio_length"] == 4000
  floats = made({"audio": wav(sound / 2**15, subtype="FLOAT")})
  assert np.array_equal(floats["audio"], sound)
  assert not any(made.counts.values())


def test_stereo_and_other_rates_are_converted_and_counted(whisper):
  made = speech_models.preprocess(whisper)
  for rate in (8000, 44100):
    time = np.arange(rate) / rate
    left, right = 0.5 * np.sin(2 * np.pi * 440 * time), 0.3 * np.sin(2 * np.pi * 440 * time)
    got = made({"audio": wav(np.stack([left, right], 1), rate)})["audio"] / 2**15
    assert len(got) == RATE
    want = 0.4 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert np.abs(got - want)[500:-500].max() < 2e-3  # the filter's edges apart
  assert made.counts == {"resampled": 2, "from_a_lower_rate": 1, "mixed_down": 2, "cut": 0}
  # What the lower rate cannot hold is filtered out, and not folded back.
  high = np.sin(2 * np.pi * 10000 * np.arange(44100) / 44100)
  assert np.abs(made({"audio": wav(0.5 * high, 44100)})["audio"][500:-500]).max() < 300
  made({"audio": wav(np.zeros(3 * RATE))})
  assert made.counts["cut"] == 1


@pytest.mark.parametrize("source, said", [
  (wav(np.zeros(0)), "zero length"), (np.zeros((0,), np.int16), "zero length"),
  (wav(np.zeros(90), 1000), "sampling rate of 1000 Hz"),
  (wav(np.full(90, np.nan), subtype="FLOAT"), "not finite"),
  (b"RIFFnothing of the kind", "unreadable sound"), ("absent.wav", "no such file"),
  (None, "no audio in the row"), (np.zeros((2, 2, 2), np.int16), "no sound"), (3.5, "no sound"),
  (wav(np.zeros(90000)), "more than data.max_seconds=5"),
])
def test_what_is_no_sound_is_named(whisper, source, said):
  made = speech_models.preprocess(whisper, array_rate=RATE, max_seconds=5.0)
  with pytest.raises(errors.RowError, match=said):
    made({"audio": source})


def test_an_array_needs_a_rate(whisper):
  with pytest.raises(errors.RowError, match="data.array_rate"):
    speech_models.preprocess(whisper)({"audio": np.zeros(90, np.int16)})


@pytest.mark.parametrize("given, said", [
  ({"seconds": 40.0}, "data.seconds=40.0: the model's clips have 1.0"),
  ({"noise": (40, 10)}, "data.noise"), ({"noise": ("a", 1)}, "data.noise"),
])
def test_values_that_do_not_fit(whisper, given, said):
  with pytest.raises(errors.UserError, match=said):
    speech_models.preprocess(whisper, **given)


def test_values_that_do_not_fit_waveforms(letters):
  for given, said in (({"frequency_masks": 1}, "frequency_masks"),
                      ({"clip_buckets": (0,)}, "clip_buckets")):
    with pytest.raises(errors.UserError, match=said):
      speech_models.preprocess(letters, **given)
  assert speech_models.preprocess(letters, seconds=3.0).buckets == (16000, 32000, 48000)


def test_windows_cover_a_long_sound_and_end_where_it_is_quiet():
  rng = np.random.default_rng(0)
  sound = (rng.normal(size=95 * RATE) * 5000).astype(np.int16)
  quiet = (27, 53.5, 82)
  for second in quiet:
    sound[int((second - 0.2) * RATE):int((second + 0.2) * RATE)] //= 1000
  found = sounds.windows(sound, 30 * RATE, RATE)
  assert [start for start, _ in found[1:]] == [end for _, end in found[:-1]]
  assert found[0][0] == 0 and found[-1][1] == len(sound)
  assert all(end - start <= 30 * RATE for start, end in found)
  assert np.allclose([end / RATE for _, end in found[:-1]], quiet, atol=0.2)
  assert sounds.windows(sound[:30 * RATE], 30 * RATE, RATE) == [(0, 30 * RATE)]


# ---- Features, on the device ----


def test_log_mel_is_that_of_transformers(whisper):
  transformers = pytest.importorskip("transformers")
  made = speech_models.preprocess(whisper)
  rng = np.random.default_rng(0)
  rows = [(speech_models.tone(i, rng, 0.3 + 0.2 * i, RATE) * 2**15).astype(np.int16)
          for i in range(3)]
  batch = loader.Loader(loader.from_examples([made.clip(x) for x in rows], made), 3,
                        pad=made.pad, buckets=made.buckets).batch(0)
  inputs = {key: batch[key] for key in audio.BATCH if key in batch}
  got = jax.jit(made.finish)(inputs)
  extractor = transformers.WhisperFeatureExtractor.from_pretrained(whisper)
  want = extractor([x / np.float32(2**15) for x in rows], sampling_rate=RATE,
                   return_tensors="np")["input_features"]
  assert set(got) == {"input_features"} and got["input_features"].shape == (3, 8, 100)
  assert np.abs(got["input_features"] - want).max() < 1e-4


@pytest.mark.parametrize("masked", [True, False])
def test_waveforms_are_those_of_transformers(masked, tmp_path):
  transformers = pytest.importorskip("transformers")
  speech_models.export_letters(tmp_path, masked)
  made = speech_models.preprocess(tmp_path)
  rng = np.random.default_rng(0)
  rows = [(speech_models.tone(i, rng, 0.3 + 0.2 * i, RATE) * 2**14 + 900).astype(np.int16)
          for i in range(3)]
  got = jax.jit(made.finish)(whole(*rows))
  extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
  read = lambda rows: extractor([x / np.float32(2**15) for x in rows], padding=True,  # noqa: E731
                                sampling_rate=RATE, return_tensors="np")
  assert set(got) == {"input_values", *(["attention_mask"] if masked else [])}
  if masked:
    for key, value in read(rows).items():
      assert np.abs(got[key] - value).max() < 1e-4
  # Without a mask theirs makes a row's values depend on the longest row beside it; ours never do.
  for values, row in zip(got["input_values"], rows, strict=True):
    assert np.abs(values[:len(row)] - read([row])["input_values"][0]).max() < 1e-4
    assert not values[len(row):].any()


# ---- What training changes ----


def test_changes_are_a_function_of_the_seed(whisper):
  made = speech_models.preprocess(whisper, noise=(5, 20), shift=0.2, time_masks=1,
                                  frequency_masks=1)
  assert made.augments and not speech_models.preprocess(whisper).augments
  rng = np.random.default_rng(0)
  example = made.clip((speech_models.tone(2, rng, 0.5, RATE) * 2**15).astype(np.int16))
  examples = loader.from_examples([example] * 4, made)
  make = lambda seed: loader.Loader(  # noqa: E731
    examples, 4, seed=seed, pad=made.pad, buckets=made.buckets, augment=made.augment,
    shuffle=True)
  finish = jax.jit(lambda batch: made.finish({key: batch[key] for key in audio.BATCH}))
  first, again, other = (finish(make(seed).batch(0))["input_features"] for seed in (0, 0, 1))
  assert np.array_equal(first, again) and not np.array_equal(first, other)
  assert all(not np.array_equal(first[0], row) for row in first[1:])
  assert not np.array_equal(make(0).batch(0)["audio_seed"], make(0).batch(1)["audio_seed"])


def test_noise_has_its_ratio_and_leaves_padding_of_waveforms(letters, whisper):
  rng = np.random.default_rng(0)
  row = (speech_models.tone(2, rng, 0.5, RATE) * 2**15).astype(np.int16)
  batch = {**whole(row, np.zeros(RATE, np.int16)), "audio_seed": np.uint32([5, 6])}
  for folder, everywhere in ((letters, False), (whisper, True)):
    made = speech_models.preprocess(folder, noise=(10, 10))
    noisy, _ = jax.jit(made.sounds)(batch)
    clean, _ = speech_models.preprocess(folder).sounds(batch)
    noise = np.asarray(noisy - clean)[0]
    ratio = np.square(clean[0, :len(row)]).mean() / np.square(noise[:len(row)]).mean()
    assert abs(10 * np.log10(ratio) - 10) < 0.3
    assert noise[len(row):].any() == everywhere
    assert np.isfinite(np.asarray(noisy)).all()


def test_a_shift_keeps_the_whole_sound(letters):
  made = speech_models.preprocess(letters, shift=0.25)
  row = np.arange(1, 8001, dtype=np.int16)
  batch = {"audio": np.stack([np.pad(row, (0, 8000))] * 20), "audio_length": np.full(20, 8000),
           "audio_seed": np.arange(20, dtype=np.uint32)}
  sound, length = jax.jit(made.sounds)(batch)
  by = np.asarray(length) - 8000
  assert len(set(by.tolist())) > 10 and by.min() >= 0 and by.max() <= 4000
  for one, start in zip(np.asarray(sound), by, strict=True):
    assert np.allclose(one[start:start + 8000] * 2**15, row) and not one[:start].any()
  full = {**batch, "audio": batch["audio"][:, :8000]}
  assert np.array_equal(made.sounds(full)[1], full["audio_length"])  # no room


def test_spec_augment_blanks_stretches_within_the_sound():
  blank = jax.jit(jax.vmap(lambda seed: audio.spec_augment(
    np.ones((80, 300), np.float32), 200, seed, 1, 0.1, 1, 20)))
  made = np.asarray(blank(np.arange(60, dtype=np.uint32))) == 0
  times, bins = made.all(1), made.all(2)
  assert np.array_equal(made, times[:, None] | bins[:, :, None])
  assert times.sum(1).max() <= 20 and bins.sum(1).max() <= 20
  assert times.sum(1).max() > 15 and bins.sum(1).max() > 15
  assert not times[:, 200:].any() and times[:, 100:].any() and bins[:, 60:].any()
  edges = np.abs(np.diff(np.pad(times, ((0, 0), (1, 1))).astype(int))).sum(1)
  assert edges.max() == 2  # one stretch


# ---- Sources ----

PATTERN = r"(?P<label>\d)_(?P<speaker>[a-z]+)_(?P<take>\d)"


def load(**given):
  given = {"modality": "audio", **given}
  return sources.load(configs.complete({f"data.{k}": v for k, v in given.items()}).data)


def test_names_give_labels_and_speakers_stay_apart(recordings):
  data = load(train=str(recordings), pattern=PATTERN, group="speaker")
  seen = {name: {row["group"] for row in rows} for name, rows in data.splits.items()}
  assert set().union(*seen.values()) == {"ann", "bob", "cy", "dee", "eve"}
  assert sum(map(len, seen.values())) == 5 and all(seen.values())
  row = data.splits["train"][0]
  assert row["audio"].name.startswith(f"{row['label']}_{row['group']}_")
  assert set(data.report["labels"]["test"]) == set("0123")


def test_speakers_of_spoken_digits_stay_apart(shared):
  data = load(train=str(shared / "data/speech-fsdd/recordings"), pattern=PATTERN, group="speaker",
              validation_fraction=0.17, test_fraction=0.33)
  seen = {name: {row["group"] for row in rows} for name, rows in data.splits.items()}
  assert [len(seen[name]) for name in ("train", "validation", "test")] == [3, 1, 2]
  assert len(set().union(*seen.values())) == 6
  assert [len(rows) for rows in data.splits.values()] == [1500, 500, 1000]


def test_folders_by_class_and_manifests(recordings, tmp_path):
  for digit in "01":
    (tmp_path / "classes" / digit).mkdir(parents=True)
    for file in recordings.glob(f"{digit}_*"):
      (tmp_path / "classes" / digit / file.name).write_bytes(file.read_bytes())
  (tmp_path / "classes" / "notes.txt").write_text("no sound")
  data = load(train=str(tmp_path / "classes"))
  assert {row["label"] for row in data.splits["train"]} == {"0", "1"}
  names = sorted(file.name for file in recordings.iterdir())
  rows = [{"file": f"{recordings}/{name}", "text": "zero"} for name in names]
  (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (tmp_path / "m.csv").write_text("file,text\n" + "\n".join(
    f"{row['file']},{row['text']}" for row in rows))
  for name in ("m.csv", "m.jsonl"):
    data = load(train=str(tmp_path / name), columns={"audio": "file"}, pattern=PATTERN,
                group="speaker")
    row = data.splits["test"][0]
    assert row["text"] == "zero" and row["audio"].is_file() and row["group"] in row["audio"].name


@pytest.mark.parametrize("given, said", [
  ({"pattern": "("}, "no regular expression"), ({"pattern": "[a-z]+"}, "named groups"),
  ({"pattern": r"(?P<label>x)_"}, r"is not found in its name, 0_ann_0.wav"),
])
def test_patterns_that_do_not_fit(recordings, given, said):
  with pytest.raises(errors.UserError, match=said):
    load(train=str(recordings), **given)


def test_a_folder_without_sounds(tmp_path):
  (tmp_path / "a.txt").write_text("x")
  with pytest.raises(errors.UserError, match="no audio in it"):
    load(train=str(tmp_path))
  with pytest.raises(errors.UserError, match="no sounds in it"):
    audio.read_rows(str(tmp_path))
  with pytest.raises(errors.UserError, match="no such file"):
    audio.read_rows(str(tmp_path / "absent"))


def test_rows_for_prediction_and_the_preprocessing_of_a_finished_run(recordings, letters, whisper):
  rows = list(audio.read_rows(str(recordings)))
  assert len(rows) == 60 and rows[0]["audio"].name == "0_ann_0.wav"
  for folder in (letters, whisper):
    made = speech_models.preprocess(folder, seconds=0.5, noise=(1, 2))
    again = audio.from_spec(json.loads(json.dumps(made.spec())), folder)
    assert again.spec() == json.loads(json.dumps(made.spec())) and not again.augments
    assert again.samples == made.samples and again.buckets == made.buckets
    assert np.array_equal(again(rows[0])["audio"], made(rows[0])["audio"])
    assert "sound of 0.40 s at 16000 Hz, peak 0.4" in made.show(made(rows[0]))


def test_features_without_a_preprocessor_config(letters):
  info = models.inspect(str(letters))
  bare = types.SimpleNamespace(folder=None, hf_config=info.hf_config, family="wav2vec2")
  config = {key: default for key, (default, *_) in audio.KEYS.items()}
  made = audio.Preprocess(types.SimpleNamespace(**config), bare)
  assert made.features == speech_models.preprocess(letters).features
  bare.hf_config = {"model_type": "whisper", "num_mel_bins": 128}
  made = audio.Preprocess(types.SimpleNamespace(**config), bare)
  assert made.features.feature_size == 128 and made.samples == 480000
