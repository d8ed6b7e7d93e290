"""The parts of the page about data (leakage, labels, drift): what they say, and safe markup."""

import html.parser

import numpy as np
import pytest
from card import fake_runs

from ft import card, guards
from ft.card import evidence
from ft.data import formats, sources

HOSTILE = "<script>alert(1)</script>&\"'"
GUARDS = ("leak", "labels", "drift")


class Reader(html.parser.HTMLParser):
  """Collects text, tags and whether every element is closed in order."""

  VOID = ("meta", "br", "hr", "col", "line", "circle", "rect", "path", "polyline", "img")

  def __init__(self, page):
    super().__init__()
    self.said, self.tags, self.open, self.images = [], [], [], []
    self.feed(page)
    assert not self.open
    self.text = " ".join(" ".join(self.said).split())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag == "img":
      self.images.append(dict(attrs)["src"])
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.said.append(data)


def rows(name, records, attributes=(), group=""):
  roles = {role: role for role in sources.ROLES if role in records[0]}
  roles |= {"group": group} if group else {}
  table = formats.Table(f"{name}.csv", tuple(records[0]), records,
                        lambda i: f"{HOSTILE}/{name}.csv: line {i + 2}")
  return sources.Rows(name, table, roles, np.arange(len(records)), None, attributes)


def record(images=False):
  """The guards' findings on rows with hostile texts and labels, every part of them filled."""
  rng = np.random.default_rng(0)
  data, features, outputs = {}, {}, {}
  kinds = [f"a{HOSTILE}", "b"]
  train = rng.normal(size=(300, 12))
  for name, n in (("train", 300), ("test", 120), ("elsewhere", 60)):
    x = train if name == "train" else rng.normal(size=(n, 12))
    if name == "test":
      x[:50] = train[:50]
    label = (x[:, 0] > 0).astype(int)
    label[::12] = 1 - label[::12]
    pixel = np.random.default_rng(1 if name == "train" else 2)
    made = [{"label": kinds[k], "who": f"w{HOSTILE}{i % 40}", "site": kinds[k],
             "date": f"2024-{1 + i % 12:02d}-02",
             **({"image": pixel.integers(0, 255, (12, 12), np.uint8)} if images else
                {"text": f"{HOSTILE} row {i} of {['all', 'some', 'none'][i % 3]} {i * 7919 % 97}"})}
            for i, k in enumerate(label)]
    data[name] = rows(name, made, ("site",), "who")
    features[name] = {"features": x.astype(np.float32), "label": label, "index": np.arange(n)}
    logits = np.eye(2)[np.where(rng.random(n) < 0.8, label, 1 - label)]
    if name != "train":
      outputs[name] = {guards.TUNED: {"logits": logits, "label": label, "index": np.arange(n)}}
  found = guards.measure(None, guards.Evidence(
    metric="accuracy", rows=data, features=features, labels=tuple(kinds), outputs=outputs,
    score=fake_runs.score, metrics=fake_runs.metrics, extra=("elsewhere",)), GUARDS)
  assert all(part["numbers"] for part in found.values()), found
  return fake_runs.quality(guards={**fake_runs.quality()["guards"], **found})


def parts(made):
  made = card.schema.normalise(made)
  built = {name: build(made) for name, _, build in evidence.sections() if name in GUARDS}
  return {name: Reader(part) for name, part in built.items() if part}


@pytest.fixture(scope="module")
def shown():
  return parts(record())


def test_what_the_parts_say(shown):
  leak = shown["leak"].text
  for words in ("test rows that are in train, %", "inflation", "Rows whose group is in train too",
                "Times of train and of the other splits", "How well a single column predicts",
                "Pairs to look at", "cosine of its raw features above 0.95"):
    assert words in leak, words
  labels = shown["labels"].text
  for words in ("Labels that look wrong, %", "probe right, %", "Which labels look wrong most often",
                "rows to look at", "look before you relabel"):
    assert words in labels, words
  drift = shown["drift"].text
  for words in ("Class shares against train", "of telling train from the split", "chance:",
                "levels: rows are no windows of series"):
    assert words in drift, words


def test_hostile_text_stays_text(shown):
  for name, part in shown.items():
    assert "script" not in part.tags
    if name != "drift":
      assert "<script>alert(1)</script>" in part.text


def test_the_whole_page_is_written(tmp_path):
  _, page = card.write(record(), tmp_path)
  text = page.read_text()
  assert "<script" not in text
  for key in GUARDS:
    assert f'id="{key}"' in text


def test_images_are_shown_within_the_page():
  shown = parts(record(images=True))
  for name in ("leak", "labels"):
    assert shown[name].images and all(src.startswith("data:image/png;base64,")
                                      for src in shown[name].images)


def test_nothing_but_what_must_be_there_is_enough():
  """A run that compared next to nothing has a page too."""
  texts = {name: rows(name, [{"text": f"{name} {i}"} for i in range(40)])
           for name in ("train", "test")}
  found = guards.measure(None, guards.Evidence(rows=texts), GUARDS)
  shown = parts({**fake_runs.quality(), "guards": found})
  assert shown.keys() == set(GUARDS)
  assert all("Not measured" in shown[name].text for name in ("leak", "labels"))
