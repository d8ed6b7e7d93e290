"""The card: record, page, terminal lines, comparison and script, on realistic records."""

import importlib.util
import itertools
import json
import math
import pathlib
import re
from html import parser

import numpy as np
import pytest
from card import fake_runs

from ft import card, errors, guards, stats
from ft.card import charts, compare, elements, evidence, html, markup, schema, screenshot, words
from ft.guards import overfit

SECTIONS = ("verdict", "results", "learning", "errors", "samples",
            *(name for name, *_ in evidence.sections()), "data", "trained", "loading", "reproduce")
HOSTILE = '</td></style><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\u202e\x00\'"'
VOID = {"meta", "br", "hr", "line", "circle", "polyline", "input"}


class Reader(parser.HTMLParser):
  """Elements, attributes and text of a page; fails on tags that do not nest."""

  def __init__(self, page):
    super().__init__()
    self.open, self.tags, self.attributes, self.words = [], [], [], []
    self.feed(page)
    self.close()
    assert self.open == []
    self.text = " ".join(" ".join(self.words).split())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    assert tag in VOID
    self.handle_starttag(tag, attrs)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.words.append(data)


@pytest.fixture(scope="module")
def sentiment():
  return fake_runs.sentiment()


def page(record):
  record = schema.normalise(record)
  schema.validate(record)
  return html.page(record)


# ---- The record


def test_write_makes_both_files_and_nothing_else(sentiment, tmp_path):
  paths = card.write(sentiment, tmp_path)
  assert {p.name for p in tmp_path.iterdir()} == {"card.json", "card.html"}
  assert [p.name for p in paths] == ["card.json", "card.html"]
  text = paths[0].read_text(encoding="utf-8")
  record = json.loads(text, parse_constant=pytest.fail)
  assert record["schema"] == schema.VERSION
  assert text == json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
  assert card.read(tmp_path) == record
  assert html.page(record) == paths[1].read_text(encoding="utf-8")


def test_every_field_is_documented_and_fakes_use_only_those(sentiment):
  schema.validate(schema.normalise(sentiment))
  table = schema.markdown()
  assert all(f"| `{path}` |" in table for path, *_ in schema.FIELDS)
  assert all(kind.replace("!", "").strip() and meaning for _, kind, meaning in schema.FIELDS)


def test_numbers_that_are_not_finite_become_null_with_a_reason(sentiment, tmp_path):
  results = {"test": {"fine-tuned": {
      "metrics": {"accuracy": np.float32(0.5), "auroc": float("nan")},
      "interval": {"accuracy": (math.inf, 1)}, "n": np.int64(4)}}}
  card.write(sentiment | {"results": results, "differences": {}}, tmp_path)
  record = card.read(tmp_path)
  assert record["results"]["test"]["fine-tuned"]["metrics"]["auroc"] is None
  assert record["missing"]["results.test.fine-tuned.metrics.auroc"] == "not a finite number (nan)"
  assert "results.test.fine-tuned.interval.accuracy.0" in record["missing"]
  assert "not a finite number" in (tmp_path / "card.html").read_text()


@pytest.mark.parametrize("change, said", [
    ({"schema": "ft-card/9"}, "schema 'ft-card/9'"),
    ({"result": {}}, "unknown field result (did you mean 'results'?)"),
    ({"title": None}, "title must be str"),
    ({"task": {"name": "classify"}}, "task.metric is missing"),
    ({"history": [3]}, "history must be list"),
    ({"data": {"splits": {"test": {"rows": "many"}}}}, "data.splits.test.rows must be int"),
    ({"results": {"test": {"probe": {"metrics": {}}}}}, "results.test.probe.n is missing"),
    ({"guards": {"leak": {"verdict": "fine", "words": "x"}}}, "guards.leak.verdict is 'fine'"),
    ({"guards": {"leak": {"verdict": "not measured", "words": " "}}}, "every verdict says why"),
    ({"guards": {"leak": {"verdict": "ok"}}}, "guards.leak.words is missing"),
    ({"results": {"test": {"probe": {"metrics": {}, "n": 3, "interval": {"mae": [2, 1]}}}}},
     "results.test.probe.interval.mae must be [lo, hi], got [2, 1]"),
    ({"results": {"test": {"probe": {"metrics": {}, "n": 3, "interval": {"mae": [1]}}}}},
     "must be [lo, hi], got [1]"),
    ({"confusion": {"labels": ["a", "b"], "matrix": [[1, 2]]}}, "a column for each of 2 labels"),
    ({"confusion": {"labels": ["a"], "matrix": [[1, 2]]}}, "a column for each of 1 labels"),
    ({"guards": []}, "guards must be dict, got list")])
def test_a_record_of_another_shape_is_refused_before_anything_is_written(
    sentiment, tmp_path, change, said):
  with pytest.raises(errors.UserError) as caught:
    card.write(sentiment | change, tmp_path)
  assert said in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_all_faults_are_named_at_once(sentiment):
  with pytest.raises(errors.UserError) as caught:
    schema.validate(schema.normalise({"titel": "x"}))
  for said in ("unknown field titel", "title is missing", "task is missing"):
    assert said in str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_message(sentiment, tmp_path):
  with pytest.raises(errors.UserError, match="cannot write .*card.html: No such file"):
    card.write(sentiment, tmp_path / "absent")


def test_a_failed_write_leaves_the_old_card_whole(sentiment, tmp_path, monkeypatch):
  card.write(sentiment, tmp_path)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.replace", full)
  with pytest.raises(errors.UserError, match="No space left"):
    card.write(sentiment | {"title": "Another"}, tmp_path)
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_fingerprint_tells_rows_apart():
  rows = [{"text": "a", "label": 1}, {"image": np.zeros((2, 2), np.uint8), "label": 0},
          {"image": pathlib.Path("/x/1.png"), "label": "é"}]
  moved = [*rows[:2], {"image": pathlib.Path("/y/1.png"), "label": "é"}]
  assert card.fingerprint(rows) == card.fingerprint(moved)
  assert card.fingerprint(rows) != card.fingerprint(rows[::-1])
  assert card.fingerprint([{"text": "ab"}]) != card.fingerprint([{"text": "a"}, {"text": "b"}])
  assert card.fingerprint([{"image": np.zeros(4)}]) != card.fingerprint([
      {"image": np.zeros((2, 2))}])


# ---- The page


def test_samples_are_shown_with_their_signatures(sentiment):
  sample = {"split": "test", "where": "a.en: line 3", "source": "<b>one</b>", "target": "eins",
            "answers": {"zero-shot": "x" * 3000, "fine-tuned": "ein"}}
  task = sentiment["task"] | {"signatures": {"bleu": "nrefs:1|tok:13a"}}
  text = page(sentiment | {"samples": [sample], "task": task})
  assert "a.en: line 3" in text and "&lt;b&gt;one&lt;/b&gt;" in text and "nrefs:1|tok:13a" in text
  assert "x" * 2000 + " …" in text and "x" * 2001 not in text
  assert "samples.jsonl" not in page(sentiment)


@pytest.mark.parametrize("make", [fake_runs.sentiment, fake_runs.intents, fake_runs.quality])
def test_page_is_whole_and_needs_no_network(make):
  text = page(make())
  reader = Reader(text)
  attributes = dict(reader.attributes)
  ids = [value for name, value in reader.attributes if name == "id"]
  assert [i for i in ids if not i.endswith("-title") and i != "all"] == list(SECTIONS)
  assert not {"script", "link", "iframe", "img"} & set(reader.tags)
  assert not {"src", "onclick", "onload"} & set(attributes)
  assert all(value.startswith("#") for name, value in reader.attributes if name == "href")
  assert "url(" not in html.el.STYLE and "@import" not in html.el.STYLE
  assert reader.tags.count("h1") == 1
  assert reader.tags.count("caption") == reader.tags.count("table")
  svgs = text.split("<svg ")[1:]
  assert svgs and all('role="img"' in s and 'aria-label="' in s for s in
                      (s.split(">")[0] for s in svgs))
  assert "None" not in reader.text and "nan" not in reader.text


def test_headings_are_in_order_and_every_link_leads_somewhere():
  text = page(fake_runs.risks())
  reader = Reader(text)
  levels = [int(tag[1]) for tag in reader.tags if re.fullmatch(r"h[1-6]", tag)]
  assert levels[0] == 1 and levels.count(1) == 1
  assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
  ids = [value for key, value in reader.attributes if key == "id"]
  assert len(ids) == len(set(ids))
  assert {value[1:] for key, value in reader.attributes if key == "href"} <= set(ids)
  assert text.index('href="#verdict"') < text.index("<h1>")
  assert {"header", "main", "nav", "footer"} <= set(reader.tags)
  cells = re.findall(r"<th(.*?)>", text.replace("<thead", ""))
  assert cells and all('scope="' in cell for cell in cells)


def test_results_and_what_a_guard_raised_start_unfolded():
  record = fake_runs.risks()
  record["guards"]["cost"] |= {"verdict": "warning"}
  text = page(record)
  unfolded = re.findall(r'<details open=""><summary><h2 id="([a-z]+)-title"', text)
  assert unfolded == ["results", "learning", "cost"]  # Where overfit's evidence is, and cost's.
  assert '<details><summary><h2 id="errors-title"' in text
  assert '<a href="#learning"><bdi>overfit</bdi></a>' in text
  assert "1 alarm</b> (leak), <b " in text
  assert "4 warnings</b> (cost, drift, labels, overfit)" in text


def test_a_part_that_cannot_be_drawn_costs_no_card(sentiment, tmp_path):
  broken = sentiment | {"history": [{"step": "ten", "validation/accuracy": 0.5}],
                        "confusion": {"labels": ["a"], "matrix": [["x"]]}}  # Not a count.
  card.write(broken, tmp_path)
  text = Reader((tmp_path / "card.html").read_text()).text
  assert "This part could not be drawn (TypeError: " in text and "Reproduce" in text


def test_long_tables_end_and_say_so():
  rows = [[f"row {i}", "x"] for i in range(1000)]
  text = str(elements.table("Many", ["", "x"], rows))
  assert "row 299" in text and "row 300" not in text
  assert "700 more rows are in card.json" in text and 'colspan="2"' in text
  assert "700 more" not in str(elements.table("Few", ["", "x"], rows[:300]))


def test_verdicts_come_first_and_say_who_did_not_gain(sentiment):
  text = Reader(page(sentiment)).text
  start = text[:text.index("Results accuracy") if "Results accuracy" in text else 2500]
  assert ("Fine-tuning gained on test: accuracy 86.5 % against 78.3 % of the frozen probe "
          "(+8.1 points [") in start
  assert "Elsewhere it gained on editorials and products, did not gain on tweets." in start


def test_a_run_that_gains_nothing_says_so():
  record = schema.normalise(fake_runs.quality())
  assert words.conclusion(record).startswith(
      "Fine-tuning did not gain on test: accuracy 76.0 % against 73.3 % of the frozen probe "
      "(+2.7 points [")
  assert "The images are simulated" in Reader(html.page(record)).text


def test_a_run_in_which_nothing_trained_is_not_called_fine_tuning():
  record = fake_runs.quality()
  record["model"] = {**record["model"], "trainable": 0}
  assert words.conclusion(schema.normalise(record)).startswith("The run did not gain on test: ")
  assert "The run did not gain on test: " in Reader(page(record)).text
  shown = card.summary(schema.normalise(record))
  assert "The run did not gain on test: " in shown and "Fine-tuning" not in shown
  record["differences"] = {}
  assert words.conclusion(record) == "Whether the run gained anything on test was not measured."


def test_many_labels_get_the_top_confusions_in_place_of_the_matrix(sentiment):
  many, few = page(fake_runs.intents()), page(sentiment)
  assert 'class="matrix"' in few and 'class="matrix"' not in many
  assert "Most frequent confusions" in many and "the 10 hardest of 77 labels" in many
  assert "Rows of each of the 77 labels" in many


def test_a_bare_record_still_has_every_section():
  text = page({"title": "Bare", "task": {"name": "classify", "metric": "accuracy"}})
  reader = Reader(text)
  assert all(f'id="{section}"' in text for section in SECTIONS)
  assert reader.text.count("Not recorded in this run.") == len(SECTIONS) - 1
  assert "gained anything on test was not measured" in reader.text


def test_hostile_text_never_becomes_markup(sentiment):
  record = fake_runs.record(
      (HOSTILE, "b"), {"validation": (60, 0.7, 0.8), "test": (80, 0.6, 0.8), HOSTILE: (50, .6, .7)},
      title=HOSTILE, notes=[HOSTILE], command=HOSTILE, created=HOSTILE,
      versions={HOSTILE: HOSTILE}, config={HOSTILE: {HOSTILE: HOSTILE}},
      model={"source": HOSTILE, "family": HOSTILE, "table": [[HOSTILE, HOSTILE, 3]],
             "load_report": {HOSTILE: [HOSTILE]}})
  record["data"]["first_example"] = HOSTILE + "\ud800"
  record["data"]["counts"] = {HOSTILE: HOSTILE}
  record["guards"][HOSTILE] = {"verdict": "ok", "words": HOSTILE, "numbers": {}}
  record["guards"]["cost"]["numbers"]["phases"][HOSTILE] = 1.0
  text = page(record)
  reader = Reader(text)  # Fails where a planted tag closed one of ours.
  assert not {"script", "img"} & set(reader.tags)
  assert "<script" not in text and "\x00" not in text
  assert not any(name.startswith("on") for name, _ in reader.attributes)
  assert "<script>alert(1)</script>" in reader.text  # It is shown, as text.
  text.encode("utf-8")


def test_hostile_text_in_a_comparison():
  runs = [(HOSTILE, schema.normalise(fake_runs.quality(title=HOSTILE, config={HOSTILE: i})))
          for i in (1, 2)]
  reader = Reader(compare.page(runs))
  assert not {"script", "img"} & set(reader.tags)


def test_long_text_is_cut(sentiment):
  data = sentiment["data"] | {"first_example": "x" * 50_000}
  text = page(sentiment | {"data": data, "config": {"names": "y" * 50_000}})
  assert "first 4,000 characters" in text and len(text) < 62_000


def test_markup_escapes_by_construction():
  assert markup.h("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'
  assert markup.h("p", markup.h("b", "x"), [None, 3]) == "<p><b>x</b>3</p>"
  assert markup.escape("a\x07b\x9f") == "a\ufffdb\ufffd"


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.48, 0.91), (-3, 1200), (1e-9, 2e-9),
                                       (99.99, 100.01)])
def test_ticks_are_round_and_inside(low, high):
  found = charts.ticks(low, high, 4)
  assert 2 <= len(found) <= 6
  assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_curves_with_one_point_or_flat_lines_draw():
  for points in ([(5, 0.5)], [(0, 0.0), (1, 0.0)]):
    svg = charts.lines([("train", points, "one")], "x", (5, "kept"))
    assert "nan" not in svg and "inf" not in svg
  assert charts.intervals([("a", None, None, True)], "accuracy", 0.0, 1.0, "x")
  svg = charts.lines([("train", [(0, 0.0), (100, 1.0)], "one")], "x", (100, "kept: 100"))
  mark, = re.findall(r'<line x1="([\d.]+)"[^>]*class="mark"', svg)
  assert f'<text x="{float(mark) + 5}" y="35" class="tick end">kept: 100' in svg


def test_long_names_stay_inside_the_figures():
  rows = [("distance to the nearest whole image", 0.5, (0.4, 0.6), True), ("a", 0.2, None, False)]
  svg = charts.intervals(rows, "accuracy", 0.0, 1.0, "x")
  assert '<text x="0" y="16" class="row halo strong">distance to' in svg
  curves = [(f"a split with a long name {i}", [(0, 0.1), (1, 0.2)], "one") for i in range(4)]
  svg = charts.lines([*curves, ("x" * 90, [(0, 0.1)], "two")], "x")
  keys = re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="tick">([^<]*)</text>', svg)
  assert len(keys) == 5 and all(float(x) + 6 * len(name) < charts.WIDTH for x, name in keys)
  assert keys[-1][1] == "x" * 39 + "…"


# ---- The terminal


def test_summary_is_short_and_holds_the_numbers(sentiment):
  lines = card.summary(sentiment).splitlines()
  assert len(lines) <= 12
  assert lines[0].split() == ["accuracy,", "%", "test", "editorials", "products", "tweets"]
  assert [line.split("  ")[0] for line in lines[1:4]] == [
      "majority class", "frozen probe", "fine-tuned"]
  assert "86.5 [84." in lines[3]
  assert lines[4].startswith("Fine-tuning gained on test: +8.1 points [")
  assert lines[5].startswith("Elsewhere, gained: editorials +5.")
  assert "; did not gain: tweets −0.5 [" in lines[5]


def test_summary_of_many_splits_stays_short():
  rates = {"validation": (50, 0.6, 0.7), "test": (50, 0.6, 0.7)}
  rates |= {f"domain {i}": (40, 0.6, 0.7) for i in range(15)}
  lines = card.summary(fake_runs.record(("a", "b"), rates)).splitlines()
  assert len(lines) <= 10 and "(10 more in card.html)" in lines[0]
  assert " more" in next(line for line in lines if line.startswith("Elsewhere"))


def test_summary_of_nine_risks_is_ten_lines_and_names_each():
  rates = {"validation": (50, 0.6, 0.7)} | {
      name: (40, 0.6, 0.7) for name in ("test", "a", "b", "c", "d")}
  measured = fake_runs.record(("x", "y"), rates)
  for found in (fake_runs.risks(), measured | {"guards": fake_runs.risks()["guards"]}):
    lines = card.summary(found).splitlines()
    assert len(lines) <= 10 and all(len(line) <= 160 for line in lines[6:])
    assert lines[6].startswith("alarm, leak: 31.2 % of 2,001 test rows")
    assert lines[7].startswith("warning, drift: ")
    assert lines[8] == "raised too: labels (warning), overfit (warning)"
    assert lines[9].startswith("Ok: ") and "not measured: bias (why is in card.html)" in lines[9]
    assert all(name in "\n".join(lines) for name in found["guards"])


def test_summary_of_a_bare_record():
  assert "accuracy" in card.summary({"title": "x", "task": {"name": "c", "metric": "accuracy"}})


def test_other_units_and_missing_intervals():
  row = {"metric": "mae", "difference": -0.1234, "lo": -0.2, "hi": -0.05, "n": 9}
  record = {"task": {"metric": "mae", "mode": "min"},
            "results": {"test": {}}, "differences": {"test": {"fine-tuned - probe": row}}}
  assert words.conclusion(record).startswith(
      "Fine-tuning gained on test: −0.123 [−0.200, −0.050] of MAE over the frozen probe (n = 9)")
  row |= {"lo": None}
  assert "was not measured" in words.conclusion(record)
  assert "interval is not defined" in words.verdict(record, "test")


# ---- Several runs


def test_comparison_pairs_runs_on_the_same_rows():
  first, second = (schema.normalise(fake_runs.quality(config={"rate": r})) for r in (1, 2))
  labels = fake_runs.record(("nominal", "local", "global"), {
      "validation": (90, 0.5, 0.5), "test": (150, 0.4, 0.45)})
  worse = schema.normalise(labels)
  row, reason = compare.paired(worse, first, "test")
  assert reason is None and row["n"] == 150 and row["hi"] < 0
  same, _ = compare.paired(second, first, "test")
  assert (same["difference"], same["lo"], same["hi"]) == (0, 0, 0)
  text = Reader(compare.page([("a", first), ("b", second), ("c", worse)])).text
  assert "not told apart" in text and "worse" in text and "Config keys that differ" in text
  assert "What each guard found" in text and text.index("worse") < text.index("calibrate")


def test_scores_that_are_no_shares_are_paired_too_and_blocks_resampled():
  rng = np.random.default_rng(0)
  block = np.repeat(np.arange(30), 10)
  shared = np.repeat(rng.normal(size=30), 10)  # What the windows of a block have in common.
  errors_of = {"a": np.abs(rng.normal(size=300)), "b": None}
  errors_of["b"] = errors_of["a"] + 0.1 + 0.2 * shared
  runs = {}
  for blocks in (None, lambda rows: block):
    for name, score in errors_of.items():
      evidence = guards.Evidence(
          metric="mae", mode="min", outputs={"test": {"fine-tuned": {"error": score}}},
          score=lambda rows: rows["error"], metrics=lambda rows: {"mae": rows["error"].mean()},
          blocks=blocks)
      runs[name] = schema.normalise({
          "title": name, "task": {"name": "forecast", "metric": "mae", "mode": "min"},
          "data": {"splits": {"test": {"rows": 300, "fingerprint": "x"}}},
          "results": overfit.results(evidence)})
      schema.validate(runs[name])
    row, reason = compare.paired(runs["b"], runs["a"], "test")
    wanted = stats.paired_bootstrap(errors_of["b"], errors_of["a"],
                                    blocks=block if blocks else None)
    assert reason is None
    assert (row["difference"], row["lo"], row["hi"]) == pytest.approx(wanted, abs=1e-5)
  text = Reader(compare.page([("a", runs["a"]), ("b", runs["b"])])).text
  assert "worse" in text or "not told apart" in text
  runs["b"]["results"]["test"]["fine-tuned"]["blocks"] = "1 2"
  assert "resampled together" in compare.paired(runs["b"], runs["a"], "test")[1]


def test_scores_of_many_rows_are_not_recorded():
  score = np.linspace(0, 1, overfit.MOST_VALUES + 1)
  evidence = guards.Evidence(metric="mae", outputs={"test": {"fine-tuned": {"e": score}}},
                             score=lambda rows: rows["e"],
                             metrics=lambda rows: {"mae": rows["e"].mean()})
  assert "values" not in overfit.results(evidence, 100)["test"]["fine-tuned"]


def test_comparison_says_why_runs_are_not_paired():
  first, second = (schema.normalise(fake_runs.quality()) for _ in range(2))
  second["data"]["splits"]["test"]["fingerprint"] = "other"
  assert "rows differ" in compare.paired(second, first, "test")[1]
  del second["data"]["splits"]["test"]["fingerprint"]
  assert "fingerprint is not recorded" in compare.paired(second, first, "test")[1]
  third = schema.normalise(fake_runs.quality())
  del third["results"]["test"]["fine-tuned"]["scores"]
  assert "scores by row are not recorded" in compare.paired(third, first, "test")[1]
  third["results"]["test"] = {}
  assert "no result on this split" in compare.paired(third, first, "test")[1]


@pytest.fixture
def script():
  from absl import flags

  path = pathlib.Path(__file__).parents[2] / "scripts" / "card.py"
  spec = importlib.util.spec_from_file_location("card_script", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  yield module
  for name in ("run", "output", "png"):
    delattr(flags.FLAGS, name)


def test_script_rebuilds_one_card_and_compares_several(script, sentiment, tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    card.write(sentiment | {"title": name}, tmp_path / name)
  before = (tmp_path / "a" / "card.html").read_text()
  (tmp_path / "a" / "card.html").unlink()
  assert script.build([str(tmp_path / "a")], "") == tmp_path / "a" / "card.html"
  assert (tmp_path / "a" / "card.html").read_text() == before
  output = tmp_path / "both.html"
  script.build([str(tmp_path / "a"), str(tmp_path / "b")], str(output))
  assert "Comparison of 2 runs" in Reader(output.read_text()).text


@pytest.mark.parametrize("content, said", [
    (None, "does not exist"), ("{", "is not a card"), ("[]", "must be an object"),
    ('{"schema": "x"}', "has schema 'x'"), (b"\xff\xfe", "is not a card")])
def test_bad_cards_are_one_message(script, tmp_path, content, said):
  if content is not None:
    path = tmp_path / "card.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(errors.UserError, match=said) as caught:
    script.build([str(tmp_path)], "")
  assert str(tmp_path) in str(caught.value)


def test_script_needs_a_run_and_an_output(script, sentiment, tmp_path):
  with pytest.raises(errors.UserError, match="--run is missing"):
    script.build([], "")
  card.write(sentiment, tmp_path)
  with pytest.raises(errors.UserError, match="--output is missing"):
    script.build([str(tmp_path)] * 2, "")


def test_a_picture_needs_a_browser(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", "")
  with pytest.raises(errors.UserError, match="--png needs one of chromium, "):
    screenshot.take(tmp_path / "card.html", tmp_path / "card.png")
  (tmp_path / "chrome").write_text("#!/bin/sh\nexit 3\n")
  (tmp_path / "chrome").chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(errors.UserError, match="took no picture of .* exit status"):
    screenshot.take(tmp_path / "card.html", tmp_path / "card.png")


def test_script_exit_status(tmp_path):
  import subprocess
  import sys

  repo = pathlib.Path(__file__).parents[2]
  done = subprocess.run([sys.executable, str(repo / "scripts" / "card.py"), f"--run={tmp_path}"],
                        capture_output=True, text=True, check=False,
                        env={"PYTHONPATH": str(repo), "PATH": ""})
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
