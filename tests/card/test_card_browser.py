"""The card in a real browser: it draws, nothing overflows a phone, nothing is logged or fetched."""

import functools
import html
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

from ft import card, errors, guards
from ft.card import compare, evidence, schema, screenshot

CHROMIUM = next((path for name in screenshot.BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which was not found")

DARK = ("--blink-settings=preferredColorScheme=0",)
HOSTILE = '</td></style></script><script>alert(1)</script><img src=x onerror="alert(2)">\'"'
# Appended to a copy of the page: what it measures is read back from the dumped document.
PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const visible = e => e.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true});
  const all = [...document.querySelectorAll("body *")].filter(visible);
  const wide = all.filter(e => !e.closest(".scroll, svg, .skip") &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const flat = all.filter(e => e.tagName == "svg" && e.clientHeight < 40).length;
  // WCAG 2 contrast of every text against the nearest background that is painted behind it.
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = css => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css;
    canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const known = new Map();
  const light = css => known.get(css) ?? (known.set(css, compute(css)), known.get(css));
  const compute = css => rgba(css).slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const paint = getComputedStyle(e).backgroundColor;
    if (rgba(paint)[3] == 255) return paint; } return "white"; };
  let weakest = [99, ""], texts = 0;
  for (const e of all) {
    if (e.closest("script") || ![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
      continue;
    const style = getComputedStyle(e), a = light(e.closest("svg") ? style.fill : style.color);
    const b = light(behind(e)), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    texts += 1;
    if (ratio < weakest[0]) weakest = [ratio, e.tagName + " " + e.textContent.slice(0, 40)];
  }
  document.title = JSON.stringify({width: document.documentElement.scrollWidth,
    inner: innerWidth, wide: wide, flat: flat, texts: texts, weakest: weakest,
    links: all.filter(e => e.tagName == "NAV").length,
    shut: [...document.querySelectorAll(".evidence")].filter(e => !visible(e)).map(e => e.id),
    hidden: [...document.querySelectorAll(".evidence, details table, details pre")]
      .filter(e => !visible(e)).length,
    loaded: performance.getEntriesByType("resource").length});
}, 100));
</script>"""


def chromium(*arguments):
  with tempfile.TemporaryDirectory() as profile:
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}", *arguments],
        capture_output=True, text=True, timeout=120, check=True)


def hostile():
  """A record whose labels, splits, rows and guards' words try to be markup."""
  rates = {"validation": (60, 0.7, 0.8), "test": (80, 0.6, 0.8), HOSTILE: (50, 0.6, 0.7)}
  made = fake_runs.record((HOSTILE, "b"), rates, title=HOSTILE, notes=[HOSTILE], command=HOSTILE)
  made["guards"] = {name: guards.result(verdict, HOSTILE + words)
                    for name, (verdict, words) in fake_runs.RISKS.items()}
  made["data"]["first_example"] = HOSTILE * 20
  made["samples"] = [{"where": HOSTILE, "source": HOSTILE, "answers": {HOSTILE: HOSTILE}}]
  return made


def all_open(page):
  return page.replace("<details>", '<details open="">')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cards")
  (folder / "text").mkdir()
  card.write(fake_runs.risks(), folder / "text")
  (folder / "hostile").mkdir()
  card.write(hostile(), folder / "hostile")
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


def test_no_console_message_and_no_request_but_the_page(folder, server):
  address, asked = server
  done = chromium("--enable-logging=stderr", "--v=0", "--dump-dom", f"{address}/text/card.html")
  assert "CONSOLE" not in done.stderr
  record = card.read(folder / "text")
  titles = ["Verdict", "Results", "Learning curves", "Where it errs", "Samples", "Data",
            "What was trained", "What was loaded", "Cost", "Reproduce"]
  titles += [title for _, title, _ in evidence.sections()]
  shown = re.findall(r"<h2 id=[^>]*>(.*?)</h2>", done.stdout)
  assert set(titles) <= set(shown) and len(shown) == done.stdout.count("<section ")
  assert all(name in done.stdout for name in record["guards"])
  assert [path for path in asked if path != "/favicon.ico"] == ["/text/card.html"]


# One start of the browser measures many pages: (page, width) -> how the copy differs.
PAGES = ("text/card.html", "many/card.html", "hostile/card.html", "compare.html")
VIEWS = {"folded": (360, lambda page: page), "unfolded": (360, all_open),
         "wide": (1000, all_open),
         "switched": (360, lambda page: page.replace('id="all"', 'id="all" checked')),
         "paper": (700, lambda page: page.replace("@media print", "@media screen")),
         "linked": (360, lambda page: page.replace("</body>", LINK + "</body>"))}
LINK = '<script>location.hash = "#reproduce"</script>'


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def measured(request, folder, tmp_path_factory):
  """(page, view) -> what PROBE finds; scripts, which the page forbids, are let into the copies."""
  there, frames = tmp_path_factory.mktemp("measured"), []
  wanted = [(name, view) for name in PAGES for view in VIEWS
            if name == PAGES[0] or view in ("folded", "unfolded", "wide")]
  for i, (name, view) in enumerate(wanted):
    width, change = VIEWS[view]
    page = re.sub(r"<meta http-equiv=[^>]*>", "", change((folder / name).read_text()))
    (there / f"{i}.html").write_text(page.replace("</body>", PROBE + "</body>"))
    frames.append(f'<iframe id="{name} {view}" src="{i}.html" width="{width}" height="800" '
                  'style="border:0"></iframe>')
  collect = """<script>addEventListener("load", () => setTimeout(() => {
    const found = [...document.querySelectorAll("iframe")].map(f =>
      [f.id, JSON.parse(f.contentDocument.title)]);
    document.body.textContent = JSON.stringify(Object.fromEntries(found)); }, 500))</script>"""
  (there / "all.html").write_text(f"<body>{''.join(frames)}{collect}</body>")
  done = chromium("--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom",
                  *(DARK if request.param else ()), f"file://{there}/all.html")
  text = html.unescape(re.search(r"<body>(.*)</body>", done.stdout, re.S).group(1))
  found = json.loads(text)
  assert len(found) == len(wanted)
  return found


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_a_phone(measured, name):
  for view in ("folded", "unfolded"):
    found = measured[f"{name} {view}"]
    assert found["inner"] == 360 and found["width"] <= 360
    assert found["wide"] == [] and found["flat"] == 0 and found["loaded"] == 0
  assert found["hidden"] == 0


@pytest.mark.parametrize("name", PAGES)
def test_every_text_stands_out_from_what_is_behind_it(measured, name):
  for view in ("wide", "unfolded"):
    found = measured[f"{name} {view}"]
    assert found["texts"] > 50 and found["weakest"][0] >= 4.5, found["weakest"]


def test_folds_open_by_link_by_switch_and_on_paper(measured):
  shut = measured["text/card.html folded"]["shut"]
  assert "reproduce" in shut and "results" not in shut
  assert set(shut) - set(measured["text/card.html linked"]["shut"]) == {"reproduce"}
  # What is folded inside a section unfolds with it.
  for view in ("switched", "paper"):
    assert measured[f"text/card.html {view}"]["hidden"] == 0
  assert measured["text/card.html folded"]["hidden"] > len(shut)
  assert measured["text/card.html folded"]["links"] == 1
  assert measured["text/card.html paper"]["links"] == 0  # Links are of no use there.


def test_paper_has_the_same_pages_whatever_is_folded(folder, tmp_path):
  page = (folder / "text" / "card.html").read_text()
  shut = page.replace("details::details-content", "details::nothing")
  counts = []
  for name, text in (("folded", page), ("open", all_open(page)), ("shut", shut)):
    (tmp_path / f"{name}.html").write_text(text)
    chromium("--no-pdf-header-footer", f"--print-to-pdf={tmp_path}/{name}.pdf",
             f"file://{tmp_path}/{name}.html")
    counts.append(len(re.findall(rb"/Type ?/Page\b", (tmp_path / f"{name}.pdf").read_bytes())))
  assert counts[0] == counts[1] > counts[2] >= 1


def test_hostile_words_are_shown_as_they_are(folder):
  done = chromium("--enable-logging=stderr", "--v=0", "--dump-dom",
                  f"file://{folder}/hostile/card.html")
  assert "CONSOLE" not in done.stderr
  # The browser's own parser found no element that the page does not make.
  assert "<script" not in done.stdout and "<img" not in done.stdout
  assert done.stdout.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8


@pytest.mark.parametrize("dark", [False, True])
def test_it_draws_in_light_and_dark(folder, tmp_path, dark):
  shot = tmp_path / "card.png"
  chromium(f"--screenshot={shot}", "--window-size=1000,1600",
           *(DARK if dark else ()),
           f"file://{folder}/text/card.html")
  pixels = np.asarray(Image.open(shot).convert("L"), np.float64)
  assert pixels.shape == (1600, 1000)
  paper = pixels[5, 5]
  assert (paper < 60) if dark else (paper > 200)
  ink = np.abs(pixels - paper) > 60
  assert 0.01 < ink.mean() < 0.2
  assert ink[:400].any() and ink[1200:].any()


def test_a_picture_for_a_gallery_is_small(folder, tmp_path):
  screenshot.take(folder / "text" / "card.html", tmp_path / "card.png")
  image = Image.open(tmp_path / "card.png")
  assert image.size == screenshot.SIZE and len(image.getcolors()) > 8
  assert (tmp_path / "card.png").stat().st_size < 150_000
  with pytest.raises(errors.UserError, match="cannot write"):
    screenshot.take(folder / "text" / "card.html", tmp_path / "card.odd")
