"""Small images within a page: as PNG files in data URIs, and with a map of scores over them."""

import base64
import io

import numpy as np

SIDE = 144  # pixels: largest side of an image on the card
_COLOURS = 64
_HOT, _STRENGTH = np.float32([220, 30, 30]), 0.75


def uri(pixels) -> str:
  """Returns (H, W, 3) uint8 as a data URI of a PNG of few colours, its sides at most SIDE."""
  import PIL.Image

  image = PIL.Image.fromarray(np.asarray(pixels, np.uint8))
  image.thumbnail((SIDE, SIDE))
  file = io.BytesIO()
  image.quantize(_COLOURS).save(file, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def heat(pixels, scores, low: float, high: float) -> np.ndarray:
  """Returns the image (H, W, 3) uint8, redder where scores (H, W) go from low to high."""
  share = np.clip((scores - low) / max(high - low, 1e-12), 0, 1)[..., None] * _STRENGTH
  return ((1 - share) * pixels + share * _HOT).round().astype(np.uint8)
