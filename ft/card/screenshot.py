"""A small PNG of the top of a page, taken by the browser that is installed; for galleries."""

import os
import pathlib
import shutil
import subprocess
import tempfile

from ft import errors

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = (1000, 1250)  # CSS pixels of the window


def take(page, output):
  """Writes what a browser shows of a page, light scheme, as PNG.

  Args:
    page: path of an HTML file. output: path of the PNG.

  Raises:
    errors.UserError: there is no browser, it fails, or the file cannot be written.
  """
  from PIL import Image

  browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
  if browser is None:
    raise errors.UserError(f"--png needs one of {', '.join(BROWSERS)} on PATH, and none was found; "
                           f"{page} opens in any browser")
  with tempfile.TemporaryDirectory() as place:
    shot = pathlib.Path(place) / "shot.png"
    command = [browser, "--headless", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
               "--disable-background-networking", f"--user-data-dir={place}/profile",
               *(["--no-sandbox"] if os.geteuid() == 0 else []),  # It refuses root otherwise.
               f"--screenshot={shot}", f"--window-size={SIZE[0]},{SIZE[1]}",
               pathlib.Path(page).resolve().as_uri()]
    try:
      subprocess.run(command, capture_output=True, timeout=120, check=True)
      image = Image.open(shot).convert("RGB")
      # A palette makes a page of text a third as large; median cut would lose the rare tones.
      image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    except (subprocess.SubprocessError, OSError) as error:
      raise errors.UserError(f"{browser} took no picture of {page}: {error}") from None
  try:
    image.save(output, optimize=True)
  except (OSError, ValueError) as error:  # ValueError: an ending that is no format.
    raise errors.UserError(f"cannot write {output}: {error}") from None
