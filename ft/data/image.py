"""Images: files, bytes or arrays become uint8 pixels; casting and normalising happen on the device.

What is read is not trusted: only four formats are opened, the size in the header is checked before
a pixel is decoded, and whatever a decoder raises ends as a RowError that names the file.
"""

import io
import json
import os
import pathlib
import shlex
import struct
import sys
import threading
import types

import numpy as np

from ft import errors

KEYS = {
    "size": (0, "side of what the model sees; 0 = the model's own, native with resize none",
             (0, 8192)),
    "resize": ("shorter", "shorter: centre square, scaled; squash: all of it, scaled; none",
               ["none", "squash", "shorter"]),
    "resample": ("bicubic", "filter of the scaling", ["nearest", "bilinear", "bicubic", "lanczos"]),
    "mean": (None, "per channel, of pixels in 0…1; by default the checkpoint's", "list"),
    "std": (None, "per channel, of pixels in 0…1; by default the checkpoint's", "list"),
    "formats": (("JPEG", "PNG", "WEBP", "BMP"), "formats that are opened", "list"),
    "max_pixels": (50_000_000, "images of more pixels are not decoded", (1, 170_000_000)),
    "crop": ("none", "training: shifted by up to crop_pixels; or a part of it scaled back to size",
             ["none", "pad", "resized"]),
    "crop_pixels": (4, "furthest shift of crop pad", (1, None)),
    "crop_area": (0.35, "smallest share of the image that crop resized keeps", (0.01, 1.0)),
    "flip": ("none", "training: mirrored half of the time along these axes",
             ["none", "h", "v", "hv"]),
    "rotate90": (False, "training: turned by a multiple of 90° (180° if not square)"),
    "colour": (0.0, "training: largest relative change of brightness, contrast, saturation",
               (0.0, 1.0)),
}

_SAFE_FORMATS = KEYS["formats"][0]
# Also those that are not opened: such a file gets its own error instead of silence.
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_GREY = np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's L
_COUNT_LOCK = threading.Lock()  # of the module, so that a Preprocess can be sent to a process


class Preprocess:
  """Turns a row with an image into {"pixel_values": (height, width, 3) uint8}.

  Attributes:
    augments: whether `augment` changes anything.
    pad, buckets: empty, no key has a variable length.
    counts: images that were resized, of these enlarged; and converted from another pixel format.
    threaded: decoding leaves Python's lock, so several threads are faster than one.
    shape_hint: what to do about images of different shapes.
  """

  pad = types.MappingProxyType({})
  buckets = ()
  threaded = True
  shape_hint = ("Set data.resize to 'shorter' or 'squash' (and data.size), or with data.resize="
                "'none' a data.size to which larger images are cropped and smaller ones padded.")

  def __init__(self, config, info=None):
    """Settles size, mean and std.

    Args:
      config: the `data` section with this module's KEYS.
      info: what `models.inspect` found, for what the config leaves open.

    Raises:
      UserError: the checkpoint does not say what the config leaves open, or a value is wrong.
    """
    self._config = types.SimpleNamespace(**{key: getattr(config, key) for key in KEYS})
    upstream = _upstream(info)
    self.size, self.resize = config.size, config.resize
    if self.resize != "none" and not self.size:
      self.size = _side(upstream)
    self.mean = _channels("mean", config.mean, upstream)
    self.std = _channels("std", config.std, upstream)
    if min(self.std) <= 0:
      raise errors.UserError(f"data.std {list(self.std)}: must be above 0")
    self.formats = tuple(config.formats)
    for name in self.formats:
      if name not in _SAFE_FORMATS:
        raise errors.UserError(f"data.formats: {name!r} is not among {', '.join(_SAFE_FORMATS)}"
                               + errors.suggest(name.upper(), _SAFE_FORMATS))
    self.augments = (config.crop != "none" or config.flip != "none" or config.rotate90
                     or config.colour > 0)
    self.counts = {"resized": 0, "enlarged": 0, "converted": 0}

  def __call__(self, row: dict) -> dict:
    """Returns the row's "image" (path, bytes or array) as the model's input.

    Raises:
      RowError: it cannot be read, is too large, or its format is not admitted.
    """
    if row.get("image") is None:
      raise errors.RowError(f"no image in the row, which has {', '.join(row) or 'nothing'}")
    image, converted = self._open(row["image"])
    width, height = image.size
    pixels = np.asarray(self._fit(image))
    scaled = self.resize != "none" and pixels.shape[:2] != (height, width)
    with _COUNT_LOCK:
      self.counts["resized"] += scaled
      self.counts["enlarged"] += scaled and min(width, height) < self.size
      self.counts["converted"] += converted
    return {"pixel_values": pixels}

  def mask(self, row: dict) -> np.ndarray:
    """Returns the row's "mask" at the size of its image as the model sees it: (height, width).

    Values are uint8 as they are in the file, not scaled and not mixed; all 0 where mask is None.

    Raises:
      RowError: it cannot be read, has several channels, or another size than its image.
    """
    import PIL.Image
    image, _ = self._open(row["image"], whole=True)
    if row["mask"] is None:
      found = PIL.Image.new("L", image.size)
    else:
      found = decode_mask(row["mask"], self._config.max_pixels, self.formats)
    if found.size != image.size:
      sides = ["x".join(map(str, one.size)) for one in (found, image)]
      raise errors.RowError(f"{_name(row['mask'])}: the mask has {sides[0]} pixels, its image "
                            f"{sides[1]}; they have to be of one size")
    return np.asarray(self._fit(found, "nearest"))

  def augment(self, example: dict, rng: np.random.Generator) -> dict:
    """Returns the example with its pixels changed as a function of rng alone; shape and type stay.

    Args:
      example: "pixel_values" (height, width, 3) uint8, which is left as it is.
      rng: source of every random choice.
    """
    config, pixels = self._config, example["pixel_values"]
    if config.crop == "pad":
      pixels = shift(pixels, config.crop_pixels, rng)
    elif config.crop == "resized":
      pixels = resized_crop(pixels, config.crop_area, _filter(config.resample), rng)
    if "h" in config.flip and rng.random() < 0.5:
      pixels = pixels[:, ::-1]
    if "v" in config.flip and rng.random() < 0.5:
      pixels = pixels[::-1]
    if config.rotate90:
      square = pixels.shape[0] == pixels.shape[1]
      pixels = np.rot90(pixels, rng.integers(4) if square else 2 * rng.integers(2))
    if config.colour:
      pixels = jitter(pixels, config.colour, rng)
    return {**example, "pixel_values": np.ascontiguousarray(pixels)}

  def finish(self, batch: dict) -> dict:
    """Normalises on the device: (x / 255 - mean) / std, uint8 -> float32, inside jit."""
    import jax.numpy as jnp
    mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
    pixels = batch["pixel_values"].astype(jnp.float32)
    return {**batch, "pixel_values": pixels * (1 / (255 * std)) - mean / std}

  def length(self, example: dict) -> int:
    """Returns 1: images of a split have one shape."""
    return 1

  def show(self, example: dict) -> str:
    """Returns one line about an example for log and card."""
    pixels = np.asarray(example["pixel_values"])
    return (f"image {'x'.join(map(str, pixels.shape))} {pixels.dtype}, mean {pixels.mean():.1f}, "
            f"range {pixels.min()}-{pixels.max()}")

  def read_rows(self, source: str):
    """Returns rows for prediction; see the function of that name."""
    return read_rows(source)

  def try_it(self, folder) -> str:
    """Returns the command that predicts on images of the user's own with the run in a folder."""
    return f"python scripts/predict.py --run={shlex.quote(str(folder))} --input=IMAGE_OR_FOLDER"

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON: all that decides the pixels at prediction."""
    return {"modality": "image", "size": self.size, "resize": self.resize,
            "resample": self._config.resample, "mean": list(self.mean), "std": list(self.std),
            "formats": list(self.formats), "max_pixels": self._config.max_pixels}

  @classmethod
  def from_spec(cls, spec: dict, folder=None) -> "Preprocess":
    """Rebuilds the preprocessing of a run for prediction: the same pixels, no augmentation."""
    values = {key: default for key, (default, *_) in KEYS.items()}
    values.update({key: value for key, value in spec.items() if key in KEYS})
    return cls(types.SimpleNamespace(**values))

  def _open(self, source, whole: bool = False):
    """Returns (RGB image, whether its pixels were of another kind); `whole`: of its own size."""
    if isinstance(source, dict):  # as Hugging Face's parquet files keep an image
      source = source.get("bytes") or source.get("path")
    if isinstance(source, np.ndarray):
      return decode_array(source, self._config.max_pixels)
    # Pillow can decode a large JPEG at a fraction of its size, far faster; twice the size is left.
    near = 2 * self.size if self.resize != "none" and not whole else 0
    return decode(source, self._config.max_pixels, self.formats, near)

  def _fit(self, image, resample: str = ""):
    """Returns the image at the size the model sees; `resample`: in place of the filter set."""
    width, height = image.size
    if not self.size or (width, height) == (self.size, self.size):
      return image
    if self.resize == "none":
      return _crop_or_pad(image, self.size)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if self.resize == "shorter" else None
    return image.resize((self.size, self.size), _filter(resample or self._config.resample), box)


from_spec = Preprocess.from_spec


def read_rows(source):
  """Returns an iterator of {"image": path, "id": path as given} for prediction.

  Args:
    source: an image file, a folder (all images in and below it, sorted), or "-" for paths on
      standard input, one a line.

  Raises:
    UserError: there is nothing of that name, or a folder without images.
  """
  if source == "-":
    names = (line.rstrip("\r\n") for line in sys.stdin)
    return ({"image": pathlib.Path(name), "id": name} for name in names if name)
  path = pathlib.Path(source)
  if not path.exists():
    raise errors.UserError(f"{source}: no such file or folder")
  files = [path]
  if path.is_dir():
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
      raise errors.UserError(f"{source}: no images in it (names ending in "
                             f"{', '.join(_IMAGE_SUFFIXES)})")
  return ({"image": file, "id": str(file)} for file in files)


def decode(source, max_pixels: int, formats=_SAFE_FORMATS, near: int = 0):
  """Opens an encoded image as upright 8-bit RGB; transparent pixels show a white ground.

  Args:
    source: path, or the file's bytes.
    max_pixels: images whose header says more are refused undecoded.
    formats: names of Pillow's formats to try.
    near: where > 0, a JPEG may be decoded at a smaller size that has no side below it.

  Returns:
    (PIL image, whether its pixels were not 8-bit RGB).

  Raises:
    RowError: for whatever reason it cannot be had, naming the file.
  """
  import PIL.Image
  name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
  try:
    with PIL.Image.open(_stream(source), formats=formats) as image:
      width, height = image.size
      if width * height <= max_pixels:
        mode = image.mode
        if near:
          image.draft("RGB", (near, near))
        return _rgb(_upright(image)), mode != "RGB"
      reason = f"{width}x{height} pixels are more than data.max_pixels={max_pixels}"
  except PIL.UnidentifiedImageError:
    reason = f"not an image of the formats {', '.join(formats)}"
  except PIL.Image.DecompressionBombError:
    reason = f"more pixels than data.max_pixels={max_pixels}"
  except FileNotFoundError:
    reason = "no such file"
  except Exception as e:  # decoders raise anything from SyntaxError to struct.error
    raise errors.RowError(f"{name}: unreadable image ({e})") from e
  raise errors.RowError(f"{name}: {reason}")


def decode_array(array: np.ndarray, max_pixels: int):
  """Takes pixels: (H, W) or (H, W, 1 | 3 | 4), uint8, uint16 (full range) or bool.

  Returns:
    As `decode`.

  Raises:
    RowError: another shape or type, or too many pixels.
  """
  import PIL.Image
  pixels = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
  if not (pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[-1] in (3, 4)) or not pixels.size:
    raise errors.RowError(f"array of shape {array.shape} is no image: give (height, width) or "
                          "(height, width, 1, 3 or 4)")
  if pixels.shape[0] * pixels.shape[1] > max_pixels:
    raise errors.RowError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels are more than "
                          f"data.max_pixels={max_pixels}")
  if pixels.dtype == np.uint16:
    pixels = _eight_bits(pixels)
  elif pixels.dtype == bool:
    pixels = pixels * np.uint8(255)
  elif pixels.dtype != np.uint8:
    raise errors.RowError(f"pixels of type {pixels.dtype} have no known range: give uint8 0…255")
  converted = pixels.ndim == 2 or pixels.shape[-1] == 4 or array.dtype != np.uint8
  return _rgb(PIL.Image.fromarray(np.ascontiguousarray(pixels))), converted


def decode_mask(source, max_pixels: int, formats=_SAFE_FORMATS):
  """Opens a mask: a number a pixel, as it is in the file (of a palette, the index).

  Args:
    source: path, bytes, or array (H, W) of integers from 0 to 255.
    max_pixels, formats: see `decode`.

  Returns:
    PIL image of mode L.

  Raises:
    RowError: as `decode`, or it has several channels or numbers beyond 255.
  """
  import PIL.Image
  pixels = source
  if not isinstance(source, np.ndarray):
    decode(source, max_pixels, formats)  # whatever is wrong with it is said here
    with PIL.Image.open(_stream(source), formats=formats) as image:
      pixels = np.asarray(image)
  if pixels.ndim != 2 or pixels.dtype.kind not in "bui" or pixels.size and (
      pixels.min() < 0 or pixels.max() > 255):
    raise errors.RowError(f"{_name(source)}: a mask has one channel of whole numbers from 0 to "
                          f"255; this is {pixels.dtype} {'x'.join(map(str, pixels.shape))}")
  return PIL.Image.fromarray(pixels.astype(np.uint8))


def _name(source) -> str:
  if isinstance(source, (bytes, np.ndarray)):
    return f"{len(source)} {'bytes' if isinstance(source, bytes) else 'rows of pixels'}"
  return str(source)


def shift(pixels, most: int, rng):
  """Returns the image moved by up to `most` pixels each way, its edge mirrored into the gap."""
  height, width = pixels.shape[:2]
  most = min(most, height - 1, width - 1)
  padded = np.pad(pixels, ((most, most), (most, most), (0, 0)), "reflect")
  top, left = rng.integers(2 * most + 1, size=2)
  return padded[top:top + height, left:left + width]


def resized_crop(pixels, least_area: float, resample, rng):
  """Returns a random part, of area least_area … 1 and aspect 3/4 … 4/3, scaled to the full size.

  Source: Szegedy et al. 2015, "Going deeper with convolutions", section 6.
  """
  import PIL.Image
  height, width = pixels.shape[:2]
  area = rng.uniform(least_area, 1)
  aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
  w = min(1.0, np.sqrt(area * aspect)) * width
  h = min(1.0, np.sqrt(area / aspect)) * height
  left, top = rng.random(2) * (width - w, height - h)
  box = (left, top, min(left + w, width), min(top + h, height))
  return np.asarray(PIL.Image.fromarray(pixels).resize((width, height), resample, box))


def jitter(pixels, strength: float, rng):
  """Returns the image with brightness, contrast and saturation scaled by 1 ± strength each."""
  brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
  x = pixels.astype(np.float32)
  grey = sum(x[..., i] * weight for i, weight in enumerate(_GREY))
  centre = grey.mean()
  # All three are linear: x' = b (c (s x + (1 - s) grey) + (1 - c) mean(grey)).
  x *= brightness * contrast * saturation
  x += (brightness * contrast * (1 - saturation) * grey)[..., None]
  x += brightness * (1 - contrast) * centre + 0.5
  return np.clip(x, 0, 255, out=x).astype(np.uint8)


def _stream(source):
  if isinstance(source, bytes):
    return io.BytesIO(source)
  path = pathlib.Path(source)
  if path.is_dir() or not (path.is_file() or not path.exists()):
    raise OSError("not a regular file")  # a pipe or device would never end
  return os.fspath(path)


def _upright(image):
  """Applies the orientation of the EXIF block; one that cannot be read counts as none."""
  import PIL.Image
  turn = PIL.Image.Transpose
  turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
           6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
  try:
    orientation = image.getexif().get(0x0112, 1)
  except (SyntaxError, LookupError, ArithmeticError, TypeError, ValueError, OSError, struct.error):
    orientation = 1
  return image.transpose(turns[orientation]) if orientation in turns else image


def _rgb(image):
  """Returns any mode as RGB: 16-bit grey scaled from its full range, alpha over white."""
  import PIL.Image
  if image.mode.startswith("I"):
    image = PIL.Image.fromarray(_eight_bits(np.asarray(image)))
  if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
    image = image.convert("RGBA")
    ground = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(ground, image).convert("RGB")
  return image.convert("RGB")


def _eight_bits(pixels):
  return (np.clip(pixels, 0, 65535).astype(np.uint32) * 255 // 65535).astype(np.uint8)


def _crop_or_pad(image, size):
  """Returns the centre, size x size, unscaled; black where the image does not reach."""
  width, height = image.size
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))


def _filter(name):
  import PIL.Image
  return PIL.Image.Resampling[name.upper()]


def _upstream(info) -> dict:
  """Returns what the checkpoint says about its images, preprocessor_config.json first."""
  if info is None:
    return {}
  path = pathlib.Path(info.folder or ".") / "preprocessor_config.json"
  own = {}
  if info.folder and path.is_file():
    try:
      own = json.loads(path.read_text("utf-8"))
    except ValueError as e:
      raise errors.UserError(f"{path}: not JSON: {e}") from e
  return {**(info.hf_config or {}), **own}


def _side(upstream) -> int:
  """Returns the side of the model's input."""
  for key in ("crop_size", "image_size", "size"):
    value = upstream.get(key)
    if isinstance(value, dict):
      value = value.get("height") or value.get("shortest_edge")
    if isinstance(value, (list, tuple)) and value:
      value = value[0]
    if isinstance(value, int) and value > 0:
      return value
  raise errors.UserError("the checkpoint does not say its image size: set data.size")


def _channels(name, value, upstream):
  """Returns three numbers per channel from the config or the checkpoint."""
  where = f"data.{name}"
  if value is None:
    where, value = f"image_{name} of the checkpoint", upstream.get(f"image_{name}")
  if value is None:
    raise errors.UserError(f"the checkpoint has no image_{name}: set data.{name}, three numbers "
                           "for pixels in 0…1")
  value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
  if len(value) == 1:
    value *= 3
  if len(value) != 3 or not all(
      isinstance(v, (int, float)) and np.isfinite(v) for v in value):
    raise errors.UserError(f"{where}: {list(value)} should be three numbers")
  return tuple(float(v) for v in value)
