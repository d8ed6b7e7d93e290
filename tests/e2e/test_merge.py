"""scripts/merge.py on two finished runs: a soup that predicts, what was learnt added up, errors."""

import json

import numpy as np
import pytest
from commands import script

from ft import config, models, train
from ft.weights import names


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
  """Two runs that differ in their seed, trained a few steps."""
  folder = tmp_path_factory.mktemp("merge")
  for seed in (0, 1):
    words = [("train.steps", "6"), ("train.baselines", "false"), ("seed", str(seed)),
             ("guard.overfit.resamples", "100")]
    train.train(config.load(str(tiny.config), words), folder / f"run{seed}")
  return folder


def merge(tiny, runs, *flags, status=0):
  done = script("merge", f"--models={runs}/run0,{runs}/run1/model", *flags, status=status)
  return done.stderr if status else json.loads(done.stdout)


def leaves(folder, **more):
  return {path: np.asarray(leaf)
          for path, leaf in names.flatten(models.load(str(folder), **more).variables).items()}


def test_greedy_soup_predicts(tiny, runs, tmp_path):
  said = merge(tiny, runs, "--method=greedy", f"--data={tiny.csv}[:40]", f"--output={tmp_path}/m")
  assert said["metric"] == "accuracy" and len(said["values"]) == 2
  values = [said["values"][model] for model in said["in_soup"]]
  assert values[0] == max(said["values"].values()) and 0 < values[0] <= 1
  one, two, made = (leaves(f) for f in (runs / "run0/model", runs / "run1/model", tmp_path / "m"))
  path = next(p for p in made if p.endswith("query/kernel"))
  in_soup = [{"run0": one, "model": two}[model.rpartition("/")[2]] for model in said["in_soup"]]
  np.testing.assert_allclose(made[path], np.mean([x[path] for x in in_soup], 0), rtol=1e-5,
                             atol=1e-8)
  rows = tmp_path / "rows.txt"
  rows.write_text("a great film\ndull plot\n")
  done = script("predict", f"--run={tmp_path / 'm'}", f"--input={rows}")
  answers = [json.loads(line) for line in done.stdout.splitlines()]
  assert {answer["label"] for answer in answers} <= {"positive", "negative"} and len(answers) == 2


def test_task_arithmetic_on_the_base(tiny, runs, tmp_path):
  merge(tiny, runs, "--method=arithmetic", "--scale=1", f"--base={tiny.model}",
        f"--output={tmp_path}/m")
  one, two, made = (leaves(f) for f in (runs / "run0/model", runs / "run1/model", tmp_path / "m"))
  base = leaves(tiny.model)
  path = next(p for p in made if p.endswith("query/kernel"))
  np.testing.assert_allclose(made[path], one[path] + two[path] - base[path], atol=1e-6)
  head = next(p for p in made if p.endswith("classifier/kernel") or "classifier" in p)
  np.testing.assert_allclose(made[head], (one[head] + two[head]) / 2, atol=1e-6)


def test_what_cannot_be_merged(tiny, runs, tmp_path):
  said = merge(tiny, runs, "--method=ties", f"--output={tmp_path}/m", status=2)
  assert "--method=ties needs --base" in said
  said = merge(tiny, runs, "--weights=1,2,3", f"--output={tmp_path}/m", status=2)
  assert "2 models need as many weights" in said
  assert not (tmp_path / "m").exists()
