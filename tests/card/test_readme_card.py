"""The model card of the Hugging Face Hub: read back by the Hub's parser, hostile or not."""

import html
import itertools
import json
import re

import pytest
from card import fake_runs
from huggingface_hub import ModelCard

from ft import card
from ft.card import readme, schema

HOSTILE = ("a\n---\nlicense: mit\n| b | `c` | <script>alert(1)</script> [x](javascript:y) ![z](u) "
           "**d** _e_ $f$ &lt; ```\n# g\x00\x1b[31m\u202e\\")


def loaded(record, library="transformers"):
  record = schema.normalise(record)
  schema.validate(record)
  return ModelCard(readme.markdown(record, library))


def test_the_hub_reads_back_what_the_run_measured():
  record = fake_runs.risks()
  found = loaded(record)
  data = found.data
  assert data.library_name == "transformers" and data.license == "apache-2.0"
  assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
  assert data.datasets == ["vaderSentiment"] and data.pipeline_tag == "text-classification"
  assert "accuracy" in data.metrics and {"ft", "classify", "full"} <= set(data.tags)
  assert data.model_name == "Sentiment of movie reviews"
  for split in ("test", "editorials", "products", "tweets"):
    entry = record["results"][split]["fine-tuned"]
    one, = (e for e in data.eval_results
            if e.dataset_split == split and e.metric_type == "accuracy")
    assert one.metric_value == pytest.approx(entry["metrics"]["accuracy"])
    assert one.metric_args["interval"] == pytest.approx(entry["interval"]["accuracy"])
    assert one.metric_args["n"] == entry["n"] and "95 % interval [" in one.metric_name
  assert not any("/" in e.metric_type for e in data.eval_results)
  assert all(f"| {name} | {guard['verdict']} |" in found.text
             for name, guard in record["guards"].items())
  # Read back and written again, the block is the same.
  assert ModelCard(str(found)).data.to_dict() == data.to_dict()


def test_what_is_not_known_is_left_out():
  bare = loaded({"title": "Bare", "task": {"name": "odd", "metric": "accuracy"}}, "ft")
  assert set(bare.data.to_dict()) == {"library_name", "tags", "model_name"}
  assert "was not measured" in bare.text
  local = fake_runs.quality(model={"source": "/data/private/model", "family": "vit"})
  data = loaded(local).data.to_dict()
  assert "license" not in data and "base_model" not in data
  assert "licence of the base model: not known to this run" in loaded(local).text
  assert "/data/private" not in loaded(local).text
  hub = fake_runs.quality(model={"source": "hf:google/vit-base@main", "family": "vit"})
  assert loaded(hub).data.base_model == "google/vit-base"


def test_hostile_text_stays_text():
  rates = {"validation": (60, 0.7, 0.8), "test": (80, 0.6, 0.8), HOSTILE: (50, 0.6, 0.7)}
  record = fake_runs.record((HOSTILE, "b"), rates, title=HOSTILE, notes=[HOSTILE],
                            command=HOSTILE, versions={HOSTILE: HOSTILE})
  record["guards"] = {HOSTILE: {"verdict": "ok", "words": HOSTILE, "numbers": {}}}
  record["config"]["tune"]["method"] = HOSTILE
  found = loaded(record)
  assert found.data.license == "apache-2.0"  # Not the one planted in the title.
  assert found.content.startswith("---\n") and len(re.findall(r"(?m)^---\s*$", found.content)) == 2
  rows = [line for line in found.text.splitlines() if line.startswith("|")]
  for _, table in itertools.groupby(rows, lambda line: line.count("|") - line.count(r"\|")):
    assert len(list(table)) > 2  # A cell that ended early would leave a row of its own width.
  fence, = re.findall(r"(?m)^(`{4,})bash$", found.text)
  prose = re.sub(rf"(?ms)^{fence}bash.*?^{fence}$|^```bash.*?^```$", "", found.text)
  assert "<" not in prose.replace("\\<", "") and "](" not in prose
  assert len(re.findall(r"(?m)^# ", prose)) == 1
  assert "<script>alert(1)</script>" in html.unescape(prose)  # It is shown, as text.
  assert not set("\x00\x1b\u202e") & set(found.content)


@pytest.mark.parametrize("source, name", [
    ("pypi:gt-data==1.0/a/b.csv", "gt-data"), ("tfds:mnist:train[:10]", "mnist"),
    ("../data/intent-banking77/train.csv", "intent-banking77"), ("rows.csv[:20]", "data"),
    ("a/flickr/raw/train.en.gz,a/flickr/raw/train.de.gz", "flickr"), ("my films.npz", "my-films"),
    ("/x/testimonials.csv", "testimonials")])
def test_data_are_named_by_where_they_came_from(source, name):
  record = fake_runs.quality()
  record["config"]["data"]["train"] = source
  assert loaded(record).data.datasets == [name]


def test_a_run_writes_it_beside_its_weights(tmp_path):
  for name, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text("{}")
  card.write(fake_runs.quality(), tmp_path)
  libraries = [ModelCard.load(tmp_path / name / "README.md").data.library_name
               for name in ("model", "adapter")]
  assert libraries == ["transformers", "peft"]
  assert not (tmp_path / "README.md").exists()


def test_its_fault_costs_no_card(tmp_path, monkeypatch):
  (tmp_path / "model").mkdir()

  def fails(*_):
    raise KeyError("planted")

  monkeypatch.setattr(readme, "markdown", fails)
  card.write(fake_runs.sentiment(), tmp_path)
  assert card.read(tmp_path)["title"] == fake_runs.sentiment()["title"]
  assert not (tmp_path / "model" / readme.FILE).exists()


def test_an_export_takes_it_along(tmp_path):
  run, out = tmp_path / "run", [tmp_path / f"out{i}" for i in range(4)]
  for folder in (run, run / "model", tmp_path / "copied", *out):
    folder.mkdir()
  card.write(fake_runs.quality(model={"source": "x", "family": "ttm"}), run)
  (out[0] / "config.json").write_text("{}")
  readme.follow(run, out[0], card.read)
  readme.follow(run / "model", out[1], card.read)
  assert ModelCard.load(out[0] / "README.md").data.library_name == "ft"  # transformers has no TTM
  assert (out[1] / "README.md").read_text() == (out[0] / "README.md").read_text()
  (out[1] / "ft.json").write_text("{}")
  readme.follow(run, out[1], card.read)
  said = [(out[i] / "README.md").read_text() for i in range(2)]
  assert ["predict.py" in text for text in said] == [False, True]
  (run / "model" / "README.md").replace(tmp_path / "copied" / "README.md")
  readme.follow(tmp_path / "copied", out[2], card.read)
  assert (out[2] / "README.md").read_text() == (out[0] / "README.md").read_text()
  record = json.loads((run / "card.json").read_text()) | {"schema": "ft-card/0"}
  (run / "card.json").write_text(json.dumps(record))
  readme.follow(run, out[3], card.read)  # An old card costs no export.
  assert not (out[3] / "README.md").exists()
