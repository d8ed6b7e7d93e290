"""The table of a suite: means over runs, tasks and groups, and what is wrong with its runs."""

import copy

import numpy as np
import pytest
from card import fake_runs
from commands import script

from ft import card, errors
from ft.card import suite

RATES = {"validation": (60, 0.7, 0.8), "test": (200, 0.7, 0.8)}


def run(task, method, seed=0):
  return fake_runs.record(["a", "b", "c"], RATES, seed=seed, title=f"VTAB-1k {task}: {method}")


@pytest.fixture(scope="module")
def records():
  return [run("natural/pets", "lora", 0), run("natural/pets", "lora", 1),
          run("natural/svhn", "lora", 2), run("structured/dmlab", "lora", 3),
          run("natural/pets", "head", 4)]


def tuned(record):
  result = record["results"]["test"]["fine-tuned"]
  low, high = result["interval"]["accuracy"]
  return result["metrics"]["accuracy"], (high - low) / 2


def test_means(records):
  rows = suite.collect(records)
  assert list(rows) == ["majority class", "frozen probe", "lora", "head"]
  values, halves = np.array([tuned(record) for record in records]).T
  pets = rows["lora"]["natural", "pets"]
  assert pets["value"] == pytest.approx(values[:2].mean())
  assert pets["half"] == pytest.approx(halves[:2].mean())
  found = suite.means(rows["lora"])
  assert found["natural"]["value"] == pytest.approx((values[:2].mean() + values[2]) / 2)
  assert found["all"]["value"] == pytest.approx((values[:2].mean() + values[2] + values[3]) / 3)
  # Independent test sets: variances add up.
  want = np.sqrt(halves[:2].mean()**2 + halves[2]**2 + halves[3]**2) / 3
  assert found["all"]["half"] == pytest.approx(want) and found["all"]["tasks"] == 3
  probes = [r["results"]["test"]["probe"]["metrics"]["accuracy"] for r in records]
  mean = rows["frozen probe"]["natural", "pets"]["value"]
  assert mean == pytest.approx((probes[0] + probes[1] + probes[4]) / 3)


def test_the_table_says_what_is_missing(records):
  lines = suite.table(records).splitlines()
  assert lines[0] == "| accuracy, % | majority class | frozen probe | lora | head |"
  assert [line.split("|")[1].strip() for line in lines[2:]] == [
    "pets", "svhn", "dmlab", "**mean of natural (2)**", "**mean of structured (1)**",
    "**mean of all (3)**"]
  assert lines[3].endswith("| – |") and "(of 1)" in lines[-1] and "(of 1)" in lines[5]
  assert lines[6].endswith("| – |")
  value, half = tuned(records[3])
  assert f"| {100 * value:.1f} ± {100 * half:.1f} |" in lines[4]


def test_messages(records):
  with pytest.raises(errors.UserError, match="'A run' is not of a suite"):
    suite.table([fake_runs.record(["a", "b"], RATES)])
  other = {**records[0], "title": "GLUE text/cola: lora"}
  with pytest.raises(errors.UserError, match="several suites: GLUE, VTAB-1k"):
    suite.table([*records, other])
  bare = copy.deepcopy(records[0])
  del bare["results"]["test"]
  with pytest.raises(errors.UserError, match="VTAB-1k natural/pets: lora: it has no result"):
    suite.table([bare])


def test_the_script(records, tmp_path):
  for i, record in enumerate(records[:2]):
    (tmp_path / str(i)).mkdir()
    card.write(record, tmp_path / str(i))
  done = script("vtab", f"--run={tmp_path / '0'}", f"--run={tmp_path / '1'}",
                f"--output={tmp_path / 'table.md'}")
  assert done.stdout.strip() == str(tmp_path / "table.md")
  assert (tmp_path / "table.md").read_text() == suite.table(records[:2]) + "\n"
