"""The card in a real browser: it draws, nothing overflows a phone, nothing is logged or fetched."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading

import numpy as np
import pytest
from card import fake_runs
from PIL import Image

from ft import card
from ft.card import compare, schema

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
                 if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which was not found")

# Appended to a copy of the page: what it measures is read back from the dumped document.
PROBE = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(e =>
    !e.closest(".scroll, svg, details:not([open])") &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const flat = [...document.querySelectorAll("svg")].filter(e => e.clientHeight < 40).length;
  document.title = JSON.stringify({width: document.documentElement.scrollWidth,
    inner: innerWidth, wide: wide, flat: flat, loaded: performance.getEntriesByType("resource")
    .length});
});
</script>"""


def chromium(*arguments):
  with tempfile.TemporaryDirectory() as profile:
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}", *arguments],
        capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cards")
  (folder / "text").mkdir()
  card.write(fake_runs.sentiment(), folder / "text")
  runs = [(f"run-{i}", schema.normalise(fake_runs.quality(config={"rate": i}))) for i in (1, 2)]
  (folder / "compare.html").write_text(compare.page(runs))
  (folder / "many").mkdir()
  card.write(fake_runs.intents(), folder / "many")
  return folder


@pytest.fixture
def server(folder):
  """(address, list of paths asked for) of a web server of the folder."""
  asked = []

  class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, form, *values):
      asked.append(self.path)

  handler = functools.partial(Handler, directory=str(folder))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    running.shutdown()


def test_no_console_message_and_no_request_but_the_page(server):
  address, asked = server
  done = chromium("--enable-logging=stderr", "--v=0", "--dump-dom", f"{address}/text/card.html")
  assert "CONSOLE" not in done.stderr
  assert done.stdout.count("<section ") == 10
  assert [path for path in asked if path != "/favicon.ico"] == ["/text/card.html"]


@pytest.mark.parametrize("name", ["text/card.html", "many/card.html", "compare.html"])
def test_nothing_is_wider_than_a_phone(folder, tmp_path, name):
  page = (folder / name).read_text()
  # Scripts are forbidden by the page itself; the copy lifts that to be measured.
  page = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</body>", PROBE + "</body>")
  (tmp_path / "page.html").write_text(page)
  frame = ('<body style="margin:0"><iframe id="f" src="page.html" width="390" height="800" '
           'style="border:0"></iframe><script>addEventListener("load", () => setTimeout(() => '
           '{ document.body.append(document.getElementById("f").contentDocument.title); }, 300))'
           "</script></body>")
  (tmp_path / "frame.html").write_text(frame)
  done = chromium("--allow-file-access-from-files", "--virtual-time-budget=2000", "--dump-dom",
                  f"file://{tmp_path}/frame.html")
  found = re.search(r"\{.*?\}", done.stdout[done.stdout.index("</script>"):]).group(0)
  found = json.loads(found)
  assert found["inner"] == 390 and found["width"] <= 390
  assert found["wide"] == [] and found["flat"] == 0 and found["loaded"] == 0


@pytest.mark.parametrize("dark", [False, True])
def test_it_draws_in_light_and_dark(folder, tmp_path, dark):
  shot = tmp_path / "card.png"
  chromium(f"--screenshot={shot}", "--window-size=1000,1600",
           *(["--blink-settings=preferredColorScheme=0"] if dark else []),
           f"file://{folder}/text/card.html")
  pixels = np.asarray(Image.open(shot).convert("L"), np.float64)
  assert pixels.shape == (1600, 1000)
  paper = pixels[5, 5]
  assert (paper < 60) if dark else (paper > 200)
  ink = np.abs(pixels - paper) > 60
  assert 0.01 < ink.mean() < 0.2
  assert ink[:400].any() and ink[1200:].any()
