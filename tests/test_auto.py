"""The rules of auto, and its race: what is raced, who wins, what is left behind."""

import json

import commands
import pytest
from card import fake_runs

from ft import auto, card, errors
from ft import config as config_lib
from ft.data import sources

pytest.importorskip("optuna")


class Trainer:
  """Runs whose validation is best with LoRA at the highest rate; they leave what runs leave."""

  def __init__(self, stop=False, steps=0):
    self.points, self.steps, self.judged, self.stop = [], [], [], stop
    self.total = steps  # where the config gives epochs

  def __call__(self, config, folder, command="", watch=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_lib.to_json(config)))
    if watch is None:
      self.judged.append(config.tune.method)
      (folder / "model").mkdir()
      card.write(fake_runs.sentiment(notes=list(config.notes), command=command), folder)
      return
    self.points.append((config.tune.method, config.optim.rate))
    total = config.train.steps or self.total
    self.steps.append(total)
    if self.stop and len(self.points) == 2:
      self.stop = False
      raise errors.Preempted("a signal was received")
    value = {"head": 0.7, "lora": 0.8, "full": 0.6}[config.tune.method] + 10 * config.optim.rate
    for step in (total // 2, total):
      watch({"step": step, "validation/accuracy": value}, ("accuracy", "max"))
    return {"best": value, "best_step": total}


@pytest.fixture
def config(tiny):
  return config_lib.complete({
      "model.source": str(tiny.model), "data.train": str(tiny.csv), "auto": True,
      "data.columns": {"text": "text", "label": "label"}, "optim.weight_decay": 0.05})


def test_a_race_leaves_the_winner_in_the_folder(config, tmp_path):
  trainer = Trainer()
  auto.train(config, tmp_path, "the command", trainer)
  assert trainer.points[0] == ("head", 1e-2)
  assert trainer.steps[0] == 10 * trainer.steps[1]
  assert {method for method, _ in trainer.points} == {"head", "lora", "full"}
  assert trainer.judged == ["lora"]
  left = json.loads((tmp_path / "config.json").read_text())
  assert left["tune"]["method"] == "lora"
  assert left["optim"] | {"rate": 3e-3, "weight_decay": 0.05} == left["optim"]
  assert left["auto"] is False
  record = card.read(tmp_path)
  assert record["command"] == "the command"
  assert any("LoRA at 3 rates" in note for note in record["notes"])
  assert record["notes"][-1].startswith("Raced on validation (accuracy, %): tune.method=lora")
  assert (tmp_path / "model").is_dir() and (tmp_path / "race.html").is_file()
  assert auto.train(config, tmp_path, "the command", trainer) is None
  assert len(trainer.judged) == 1


def test_an_interrupted_race_goes_on(config, tmp_path):
  trainer = Trainer(stop=True)
  with pytest.raises(errors.Preempted):
    auto.train(config, tmp_path, "", trainer)
  assert not (tmp_path / card.JSON).exists()
  auto.train(config, tmp_path, "", trainer)
  assert trainer.judged == ["lora"]
  assert trainer.points.count(trainer.points[1]) == 2


def test_the_probe_is_no_yardstick_for_those_that_are_half_way(config, tmp_path):
  class Slow(Trainer):
    """LoRA is behind the probe at half of its steps, and ahead at the end."""

    def __call__(self, config, folder, command="", watch=None):
      if watch is None or config.tune.method != "lora":
        return super().__call__(config, folder, command, watch)
      folder.mkdir(parents=True, exist_ok=True)
      (folder / "config.json").write_text(json.dumps(config_lib.to_json(config)))
      watch({"step": config.train.steps // 2, "validation/accuracy": 0.65}, ("accuracy", "max"))
      watch({"step": config.train.steps, "validation/accuracy": 0.9}, ("accuracy", "max"))
      return {"best": 0.9, "best_step": config.train.steps}

  trainer = Slow()
  auto.train(config, tmp_path, "", trainer)
  assert trainer.judged == ["lora"]


def test_halving_ends_the_worse_at_half_of_the_steps(config, tmp_path):
  auto.train(config, tmp_path, "", Trainer())
  assert "when it was ended" in card.read(tmp_path)["notes"][-1]


def test_half_of_the_steps_is_known_where_the_config_gives_epochs(config, tmp_path):
  config = config_lib.changed(config, {"task.name": "masked_lm", "train.epochs": 10.0})
  rows = len(sources.load(config.data).splits["train"])
  total = 10 * -(-rows // config.train.batch)
  _, portfolio, half, _ = auto.plan(config)
  assert half == total // 2 > 10
  trainer = Trainer(steps=total)
  auto.train(config, tmp_path, "", trainer)
  assert trainer.steps == [total] * len(portfolio)
  assert "when it was ended" in card.read(tmp_path)["notes"][-1]


@pytest.mark.parametrize("given", [{"model.source": "scratch:tabular"}, {"model.random": True}])
def test_random_weights_are_trained_in_full(config, given):
  if "model.source" in given:
    given = {**given, "data.modality": "table", "data.columns": {"label": "label"}}
  _, portfolio, _, reasons = auto.plan(config_lib.changed(config, given))
  assert [point["tune.method"] for point in portfolio] == ["full"] * len(auto.RATES)
  assert any("all weights are random" in reason for reason in reasons)


def test_a_folder_of_another_config_is_told(config, tmp_path):
  other = config_lib.changed(config, {"optim.weight_decay": 0.01})
  trainer = Trainer()
  auto.train(config, tmp_path / "auto", "", trainer)
  with pytest.raises(errors.UserError, match="different config.*\n.*optim.weight_decay"):
    auto.train(other, tmp_path / "auto", "", trainer)
  (tmp_path / "run").mkdir()
  for name in auto.FILES:  # of a run that was no race
    (tmp_path / "run" / name).write_bytes((tmp_path / "auto" / name).read_bytes())
  with pytest.raises(errors.UserError, match="holds a run of a different config"):
    auto.train(config, tmp_path / "run", "", trainer)
  assert len(trainer.judged) == 1


@pytest.mark.parametrize("modality,roles,task", [
    ("text", {"text", "label"}, "classify"), ("text", {"words", "label"}, "tag"),
    ("image", {"image", "mask"}, "segment"), ("audio", {"audio", "target"}, "transcribe"),
    ("text", {"turns"}, "chat"), ("text", {"text", "text_b"}, "embed"),
    ("series", set(), "forecast"), ("interactions", {"user", "item"}, "recommend")])
def test_the_task_follows_from_the_roles(modality, roles, task):
  assert auto.task_of(modality, roles, "classify") == task


def test_a_named_task_stays_and_unknown_roles_are_told():
  assert auto.task_of("text", {"text", "target"}, "regress") == "regress"
  with pytest.raises(errors.UserError, match="no rule knows the task of rows with text"):
    auto.task_of("text", {"text"}, "classify")


@pytest.mark.parametrize("per_class,rows,classes,methods", [
    (8, 616, 77, ["head", "full", "lora"]),
    (120, 9_503, 77, ["head", "lora", "lora", "lora", "full"]),
    (1900, 3_900, 2, ["head", "lora", "lora", "lora", "full"]),
    (3500, 7_000, 2, ["head", "full", "full", "full", "lora"])])
def test_the_portfolio_follows_from_the_rows_a_class(per_class, rows, classes, methods):
  points, said = auto.classifying(per_class, rows, classes, texts=True)
  assert [point["tune.method"] for point in points] == methods
  assert f"{per_class:,} rows in the one in the middle" in said
  few = [point for point in points if point.get("task.name") == "few_shot"]
  assert len(few) == (per_class == 8)


def test_the_length_is_what_was_found_by_hand():
  assert auto.length(9_503, 77)["train.steps"] == pytest.approx(4 * 9_503 / 64, rel=0.02)
  assert auto.length(3_900, 2)["train.steps"] == pytest.approx(3_900 / 64, abs=1)
  assert auto.length(120, 2)["train.steps"] == auto.FEWEST_STEPS + 13  # 8.3 epochs of 16 rows


def test_every_point_of_every_portfolio_is_a_config():
  base = config_lib.complete({"model.source": "m", "data.train": "t", "data.columns":
                              {"text": "text", "label": "label"}})
  points = [p for args in ((8, 616, 77), (120, 9_503, 77), (3500, 7_000, 2))
            for p in auto.classifying(*args, texts=True)[0]]
  for point in [*points, *auto.tuned(("lora", "full"))]:
    made = config_lib.changed(base, {**auto.length(616, 77), **point})
    assert made.tune.method == point["tune.method"]


@pytest.mark.slow
def test_the_script_chooses_trains_and_predicts(tiny, tmp_path):
  words = ("--config.auto=True", "--config.minutes=20", "--config.train.steps=8")
  done = tiny.train(tmp_path / "auto", *words)
  assert "auto: Raced on validation" in done.stderr
  record = card.read(tmp_path / "auto")
  assert record["results"]["test"].keys() >= {"probe", "fine-tuned"}
  assert "finished" in tiny.train(tmp_path / "auto", *words).stderr
  rows = tmp_path / "rows.txt"
  rows.write_text("a great film\n")
  commands.script("predict", f"--run={tmp_path / 'auto'}", f"--input={rows}",
                  f"--output={tmp_path / 'out.jsonl'}")
