"""Several seeds: folders, mean and deviation against numpy, and what is finished stays."""

import json

import numpy as np
import pytest
from card import fake_runs

from ft import card, errors, seeds
from ft import config as config_lib
from ft.card import html

GIVEN = {"model.source": "some/model", "data.train": "some.csv", "seed": 5, "seeds": 3}


@pytest.fixture
def run():
  """A run that leaves a card whose rows depend on its seed, and remembers that it was asked."""
  asked = []

  def leave(config, folder, command):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / card.JSON).is_file():
      asked.append((config.seed, config.seeds))
      card.write(fake_runs.sentiment(seed=config.seed, command=command), folder)

  leave.asked = asked
  return leave


def test_each_seed_runs_once_in_its_folder_and_is_summed_up(run, tmp_path):
  record = seeds.train(config_lib.complete(GIVEN), tmp_path, "the command", run)
  assert run.asked == [(5, 1), (6, 1), (7, 1)]
  cards = [card.read(tmp_path / f"seed-{n}") for n in (5, 6, 7)]
  values = [one["results"]["test"]["fine-tuned"]["metrics"]["accuracy"] for one in cards]
  found = record["seeds"]["results"]["test"]["fine-tuned"]
  assert found["values"] == values
  assert len(set(values)) > 1
  assert found["mean"] == pytest.approx(np.mean(values))
  assert found["sd"] == pytest.approx(np.std(values, ddof=1))
  gains = [one["differences"]["test"]["fine-tuned - probe"]["difference"] for one in cards]
  told = record["seeds"]["differences"]["test"]["fine-tuned - probe"]
  assert told["mean"] == pytest.approx(np.mean(gains))
  assert told["verdicts"] == ["gained"] * 3


def test_the_card_of_the_folder_is_valid_and_says_mean_and_deviation(run, tmp_path):
  seeds.train(config_lib.complete(GIVEN), tmp_path, "the command", run)
  record = card.read(tmp_path)
  spread = record["seeds"]["results"]["test"]["fine-tuned"]
  shown = f"{100 * spread['mean']:.2f} ± {100 * spread['sd']:.2f}"
  assert f"Over 3 seeds, mean ± sd: test {shown}" in card.summary(record)
  assert len(card.summary(record).splitlines()) <= 12
  assert "Over 3 seeds" in html.page(record)
  assert shown in html.page(record)
  assert record["config"]["seeds"] == 3
  assert record["results"] == card.read(tmp_path / "seed-5")["results"]


def test_an_interrupted_series_goes_on_where_it_stopped(run, tmp_path):
  def stops(config, folder, command):
    if config.seed == 6:
      raise errors.Preempted("asked to stop")
    run(config, folder, command)

  with pytest.raises(errors.Preempted):
    seeds.train(config_lib.complete(GIVEN), tmp_path, "", stops)
  assert run.asked == [(5, 1)]
  assert not (tmp_path / card.JSON).exists()
  seeds.train(config_lib.complete(GIVEN), tmp_path, "", run)
  assert run.asked == [(5, 1), (6, 1), (7, 1)]
  assert seeds.train(config_lib.complete(GIVEN), tmp_path, "", run) is None
  assert len(run.asked) == 3


def test_a_seed_without_a_finite_metric_is_left_out_of_the_mean():
  cards = [{"task": {"metric": "r2"}, "differences": {},
            "results": {"test": {"fine-tuned": {"metrics": {"r2": value}}}}}
           for value in (0.5, None, 0.7)]
  found = seeds.summary([0, 1, 2], cards)["results"]["test"]["fine-tuned"]
  assert found["mean"] == pytest.approx(0.6)
  assert found["values"] == [0.5, None, 0.7]


def test_train_script_with_two_seeds(tiny, tmp_path):
  words = ("--config.seeds=2", "--config.train.steps=6", "--config.train.eval_every=3")
  done = tiny.train(tmp_path / "runs", *words)
  assert "Over 2 seeds" in done.stderr
  folders = [tmp_path / "runs" / f"seed-{n}" for n in (0, 1)]
  cards = [json.loads((folder / "card.json").read_text()) for folder in folders]
  assert [one["config"]["seed"] for one in cards] == [0, 1]
  assert cards[0]["data"]["splits"] == cards[1]["data"]["splits"]  # the rows stay the same
  before = [(folder / "card.json").stat().st_mtime_ns for folder in folders]
  assert "finished" in tiny.train(tmp_path / "runs", *words).stderr
  assert before == [(folder / "card.json").stat().st_mtime_ns for folder in folders]
