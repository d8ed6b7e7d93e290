"""Every kind of image ends as upright RGB bytes, or as an error that names it."""

import io
import json
import pickle
import struct
import types
import zlib

import numpy as np
import PIL.Image
import pytest

from ft import errors
from ft.data import image, loader

LITE = {"image_size": 224, "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}


def _info(folder=None, **hf_config):
  return types.SimpleNamespace(hf_config=hf_config or LITE, folder=folder)


def _config(**values):
  defaults = {key: default for key, (default, *_) in image.KEYS.items()}
  assert values.keys() <= defaults.keys()
  return types.SimpleNamespace(**{**defaults, **values})


def _make(info=None, **values):
  return image.Preprocess(_config(**{"resize": "none", **values}), info or _info())


def _pixels(source, **values):
  return _make(**values)({"image": source})["pixel_values"]


def _gradient(height=40, width=60):
  """Red grows to the right, green downwards: orientation shows."""
  y, x = np.mgrid[:height, :width]
  return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 0 * x], -1).astype(np.uint8)


def _encode(pixels, format="PNG", mode=None, **kwargs):
  picture = PIL.Image.fromarray(pixels)
  out = io.BytesIO()
  (picture.convert(mode) if mode else picture).save(out, format, **kwargs)
  return out.getvalue()


def _close(a, b, most=8):
  assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
  assert np.abs(a.astype(int) - b).max() <= most


@pytest.mark.parametrize("format", ["PNG", "BMP", "JPEG", "WEBP"])
@pytest.mark.parametrize("kind", ["bytes", "path", "str", "parquet"])
def test_formats_and_sources(format, kind, tmp_path):
  data = _encode(_gradient(), format, quality=95)
  path = tmp_path / "a.image"
  path.write_bytes(data)
  source = {"bytes": data, "path": path, "str": str(path),
            "parquet": {"bytes": data, "path": None}}[kind]
  _close(_pixels(source), _gradient(), 0 if format in ("PNG", "BMP") else 12)


def test_grey_palette_bilevel_and_arrays():
  grey = _gradient()[..., 0]
  rgb = np.repeat(grey[..., None], 3, -1)
  _close(_pixels(_encode(grey)), rgb, 0)
  _close(_pixels(grey), rgb, 0)
  _close(_pixels(grey[..., None]), rgb, 0)
  _close(_pixels(_gradient()), _gradient(), 0)
  _close(_pixels(_encode(grey, mode="P")), rgb, 0)
  _close(_pixels(_encode((grey > 99) * np.uint8(255), mode="1")), (rgb > 99) * np.uint8(255), 0)
  _close(_pixels(grey > 99), (rgb > 99) * np.uint8(255), 0)
  assert _pixels(np.zeros((28, 28), np.uint8)).shape == (28, 28, 3)


def test_sixteen_bits_use_their_full_range():
  deep = np.array([[0, 257, 32896, 65535]], np.uint16)
  expected = np.repeat(np.array([[0, 1, 128, 255]], np.uint8)[..., None], 3, -1)
  _close(_pixels(_encode(deep)), expected, 0)
  _close(_pixels(deep), expected, 0)


def test_transparent_pixels_show_white():
  rgba = np.zeros((4, 4, 4), np.uint8)
  rgba[:2] = (200, 0, 0, 255)
  rgba[2:] = (0, 90, 0, 0)
  expected = np.full((4, 4, 3), 255, np.uint8)
  expected[:2] = (200, 0, 0)
  for source in [rgba, _encode(rgba), _encode(rgba, "WEBP", lossless=True)]:
    _close(_pixels(source), expected, 0)
  grey = np.zeros((4, 4), np.uint8)
  white = _pixels(_encode(grey, transparency=0))
  assert (white == 255).all()


def test_cmyk_jpeg():
  flat = np.zeros((16, 16, 3), np.uint8)
  flat[:] = (200, 100, 50)
  _close(_pixels(_encode(flat, "JPEG", mode="CMYK", quality=95)), flat, 10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
  turn = PIL.Image.Transpose
  stored = {1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
            5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
  picture = PIL.Image.fromarray(_gradient())
  if orientation > 1:
    picture = picture.transpose(stored[orientation])
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  for format in ["JPEG", "PNG", "WEBP"]:
    out = io.BytesIO()
    picture.save(out, format, exif=exif, quality=95)
    _close(_pixels(out.getvalue()), _gradient(), 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored():
  data = _encode(_gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 12)
  _close(_pixels(data), _gradient(), 80)


def _bomb(width, height):
  """A small PNG whose header declares a huge image."""
  def chunk(kind, body):
    return (struct.pack(">I", len(body)) + kind + body
            + struct.pack(">I", zlib.crc32(kind + body)))
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
          + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [7_100, 12_000, 60_000])
def test_giant_images_are_refused_undecoded(side, tmp_path):
  path = tmp_path / "bomb.png"
  path.write_bytes(_bomb(side, side))
  with pytest.raises(errors.RowError, match="bomb.png: .*pixels.*data.max_pixels=50000000"):
    _pixels(path)


def test_max_pixels_holds_for_every_source():
  for source in [_gradient(), _encode(_gradient())]:
    assert _pixels(source, max_pixels=2400).shape == (40, 60, 3)
    with pytest.raises(errors.RowError, match="60x40 pixels are more than data.max_pixels=2399"):
      _pixels(source, max_pixels=2399)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(format):
  with pytest.raises(errors.RowError, match="bytes: not an image of the formats JPEG, PNG"):
    _pixels(_encode(_gradient(32, 32), format))


def test_formats_can_be_narrowed_but_not_widened():
  assert _pixels(_encode(_gradient()), formats=["PNG"]).shape == (40, 60, 3)
  with pytest.raises(errors.RowError, match="formats PNG"):
    _pixels(_encode(_gradient(), "JPEG"), formats=["PNG"])
  with pytest.raises(errors.UserError, match="'GIF' is not among"):
    _make(formats=["GIF"])
  with pytest.raises(errors.UserError, match="did you mean 'JPEG'"):
    _make(formats=["jpg"])


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff\xe0" + b"\0" * 50],
                         ids=["empty", "text", "header"])
def test_what_is_no_image(data, tmp_path):
  path = tmp_path / "bad.jpg"
  path.write_bytes(data)
  with pytest.raises(errors.RowError, match="bad.jpg"):
    _pixels(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncated_and_scrambled_files_never_raise_anything_else(format, tmp_path):
  data = _encode(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8), format)
  path = tmp_path / "broken"
  path.write_bytes(data[:len(data) // 2])
  with pytest.raises(errors.RowError, match="broken: unreadable image|broken: not an image"):
    _pixels(path)
  rng = np.random.default_rng(1)
  for _ in range(60):
    scrambled = np.frombuffer(data, np.uint8).copy()
    scrambled[rng.integers(0, min(200, len(data)), 6)] = rng.integers(0, 256, 6)
    try:
      assert _pixels(scrambled.tobytes(), max_pixels=10**6).dtype == np.uint8
    except errors.RowError:
      pass


def test_missing_file_folder_and_pipe(tmp_path):
  with pytest.raises(errors.RowError, match="gone.png: no such file"):
    _pixels(tmp_path / "gone.png")
  with pytest.raises(errors.RowError, match="not a regular file"):
    _pixels(tmp_path)
  with pytest.raises(errors.RowError, match="not a regular file"):
    _pixels("/dev/zero")
  with pytest.raises(errors.RowError, match="no image in the row, which has text"):
    _make()({"text": "x"})


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.float32), np.zeros((3, 8, 9), np.uint8),
                                   np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8),
                                   np.zeros((4, 4), np.int64)])
def test_arrays_that_are_no_images(array):
  with pytest.raises(errors.RowError, match="no image|no known range"):
    _pixels(array)


def test_resize_policies():
  wide = np.zeros((40, 80, 3), np.uint8)
  wide[:, :20], wide[:, 60:] = (255, 0, 0), (0, 0, 255)
  squashed = _pixels(wide, resize="squash", size=20)
  assert squashed.shape == (20, 20, 3)
  assert squashed[10, 1, 0] > 240 and squashed[10, -2, 2] > 240
  centre = _pixels(wide, resize="shorter", size=20)
  assert centre.shape == (20, 20, 3) and (centre < 32).all()
  assert _pixels(wide).shape == (40, 80, 3)
  cut = _pixels(wide, size=60)  # cropped in width, padded in height
  assert cut.shape == (60, 60, 3) and (cut[:10] == 0).all() and (cut[10:50, :10, 0] == 255).all()
  assert _pixels(wide, resize="shorter").shape == (224, 224, 3)


def test_large_jpeg_is_scaled_like_its_full_decoding():
  large = np.asarray(PIL.Image.fromarray(_gradient()).resize((1200, 900)))
  data = _encode(large, "JPEG", quality=95)
  full = PIL.Image.open(io.BytesIO(data)).resize((64, 64), PIL.Image.Resampling.BICUBIC)
  _close(_pixels(data, resize="squash", size=64), np.asarray(full), 3)


def test_mean_and_std_come_from_the_checkpoint_or_the_config(tmp_path):
  lite = _make()
  x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
  got = lite.finish({"pixel_values": x, "label": x[0]})
  expected = (x.astype(np.float32) - 127) / 128
  np.testing.assert_allclose(got["pixel_values"], expected, atol=1e-6)
  assert got["pixel_values"].dtype == np.float32 and got["label"] is not None
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(
      {"image_mean": [0.1, 0.2, 0.3], "image_std": 0.5, "crop_size": {"height": 96}}))
  own = image.Preprocess(_config(), _info(tmp_path))
  assert (own.mean, own.std, own.size) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), 96)
  told = _make(_info(tmp_path), mean=[0, 0, 0], std=(1, 1, 1), size=12)
  assert (told.mean, told.std, told.size) == ((0, 0, 0), (1, 1, 1), 12)


@pytest.mark.parametrize("hf_config,size", [
    ({"image_size": 32}, 32), ({"image_size": [48, 48]}, 48), ({"size": {"shortest_edge": 56}}, 56),
    ({"size": {"height": 64, "width": 64}}, 64)])
def test_size_of_the_checkpoint(hf_config, size):
  assert image.Preprocess(
      _config(), _info(**{**LITE, "image_size": None, **hf_config})).size == size


def test_what_the_checkpoint_does_not_say():
  with pytest.raises(errors.UserError, match="set data.size"):
    image.Preprocess(_config(), _info(image_mean=[0] * 3, image_std=[1] * 3))
  with pytest.raises(errors.UserError, match="no image_mean: set data.mean"):
    image.Preprocess(_config(), _info(image_size=4))
  with pytest.raises(errors.UserError, match=r"data.mean: \[1, 2\] should be three"):
    _make(mean=[1, 2])
  with pytest.raises(errors.UserError, match="data.std.*above 0"):
    _make(std=[0.5, 0, 1])


AUGMENTATIONS = [
    {"crop": "pad"}, {"crop": "pad", "crop_pixels": 500}, {"crop": "resized"}, {"flip": "h"},
    {"flip": "v"}, {"flip": "hv"}, {"rotate90": True}, {"colour": 0.4},
    {"crop": "resized", "flip": "hv", "rotate90": True, "colour": 1.0}]


@pytest.mark.parametrize("values", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(40, 60), (32, 32), (1, 1)])
def test_augmentation_is_a_function_of_the_rng_and_keeps_shape_and_type(values, shape):
  example = {"pixel_values": np.random.default_rng(5).integers(0, 256, (*shape, 3), np.uint8),
             "label": np.int32(3)}
  before = example["pixel_values"].copy()
  example["pixel_values"].flags.writeable = False
  preprocess = _make(**values)
  assert preprocess.augments
  results = [preprocess.augment(example, np.random.default_rng([1, i]))["pixel_values"]
             for i in range(12)]
  for i, got in enumerate(results):
    assert got.shape == (*shape, 3) and got.dtype == np.uint8
    again = preprocess.augment(example, np.random.default_rng([1, i]))
    np.testing.assert_array_equal(again["pixel_values"], got)
    assert again["label"] == 3
  assert shape == (1, 1) or len({got.tobytes() for got in results}) > 1
  np.testing.assert_array_equal(example["pixel_values"], before)


def test_flips_and_turns_only_move_pixels():
  pixels = _gradient(32, 32)
  preprocess = _make(flip="hv", rotate90=True)
  seen = set()
  for i in range(200):
    got = preprocess.augment({"pixel_values": pixels}, np.random.default_rng(i))["pixel_values"]
    assert np.array_equal(np.sort(got.reshape(-1, 3), 0), np.sort(pixels.reshape(-1, 3), 0))
    seen.add(got.tobytes())
  assert len(seen) == 8  # the symmetries of the square


def test_no_augmentation_by_default():
  preprocess = _make()
  assert not preprocess.augments
  example = {"pixel_values": _gradient()}
  got = preprocess.augment(example, np.random.default_rng(0))
  np.testing.assert_array_equal(got["pixel_values"], example["pixel_values"])


def test_jitter_agrees_with_its_definition_and_keeps_grey_grey():
  pixels = np.random.default_rng(0).integers(60, 190, (9, 9, 3), np.uint8)
  b, c, s = np.random.default_rng(3).uniform(0.8, 1.2, 3)
  x = pixels.astype(float)
  weights = [0.299, 0.587, 0.114]
  x = s * x + (1 - s) * (x @ weights)[..., None]
  x = b * (c * x + (1 - c) * (x @ weights).mean())
  _close(image.jitter(pixels, 0.2, np.random.default_rng(3)), np.uint8(np.clip(x + 0.5, 0, 255)), 1)
  grey = np.repeat(pixels[..., :1], 3, -1)
  got = image.jitter(grey, 0.2, np.random.default_rng(3))
  assert (np.ptp(got.astype(int), axis=-1) <= 1).all()


def test_spec_rebuilds_the_same_preprocessing_without_augmentation():
  preprocess = image.Preprocess(
      _config(size=48, resize="squash", resample="bilinear", flip="h", colour=0.3), _info())
  spec = json.loads(json.dumps(preprocess.spec()))
  again = image.from_spec(spec, None)
  assert again.spec() == preprocess.spec() and not again.augments
  for source in [_gradient(), _encode(_gradient(), "JPEG")]:
    a, b = preprocess({"image": source}), again({"image": source})
    np.testing.assert_array_equal(a["pixel_values"], b["pixel_values"])
    np.testing.assert_array_equal(
        preprocess.finish(a)["pixel_values"], again.finish(b)["pixel_values"])


def test_counts_show_and_pickle():
  preprocess = _make(resize="shorter", size=50)
  example = preprocess({"image": _gradient(40, 60)})
  preprocess({"image": _gradient(100, 60)})
  preprocess({"image": _gradient(50, 50)[..., 0]})
  assert preprocess.counts == {"resized": 2, "enlarged": 1, "converted": 1}
  assert preprocess.show(example).startswith("image 50x50x3 uint8, mean 8")
  assert "--run='my run' --input=" in preprocess.try_it("my run")
  assert pickle.loads(pickle.dumps(preprocess)).spec() == preprocess.spec()


def test_a_split_of_different_sizes_says_what_to_do(tmp_path):
  rows = [{"image": _gradient(40, 60)}] * 5 + [{"image": _gradient(41, 60)}]
  with pytest.raises(errors.UserError, match=(
      "pixel_values 40x60x3 uint8 in 5 rows .*41x60x3 uint8 in 1 row .first: row 5.. "
      "Set data.resize to 'shorter'")):
    loader.prepare(rows, _make())


def test_unreadable_rows_are_counted(tmp_path):
  rows = [{"image": _encode(_gradient())}, {"image": b"no"}, {"image": tmp_path / "gone.png"}]
  examples = loader.prepare(rows, _make())
  assert examples.report["dropped"] == 2 and examples.report["resized"] == 0
  assert "gone.png: no such file" in examples.report["dropped_rows"][1]


def test_read_rows(tmp_path, monkeypatch):
  (tmp_path / "b").mkdir()
  for name in ["b/2.PNG", "1.gif", "notes.txt"]:
    (tmp_path / name).write_bytes(b"")
  assert [row["id"] for row in image.read_rows(tmp_path)] == [
      str(tmp_path / "1.gif"), str(tmp_path / "b/2.PNG")]
  assert next(image.read_rows(tmp_path / "notes.txt"))["image"].name == "notes.txt"
  monkeypatch.setattr("sys.stdin", io.StringIO("a.png\n\nb c.png\n"))
  assert [row["id"] for row in image.read_rows("-")] == ["a.png", "b c.png"]
  with pytest.raises(errors.UserError, match="no such file"):
    image.read_rows(tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.UserError, match="no images in it"):
    image.read_rows(tmp_path / "empty")
