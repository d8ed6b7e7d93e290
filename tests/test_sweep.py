"""The search for settings: its space, its order, what it survives, and that test is judged once."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import commands
import conftest
import pytest

from ft import config as config_lib
from ft import errors, search_space, sweep
from ft.card import search

optuna = pytest.importorskip("optuna")
GIVEN = {"model.source": "some/model", "data.train": "some.csv", "tune.method": "full"}
RATE = "optim.rate=log:1e-5:1e-1"


def load(overrides):
  """As `cli.config` without a file: overrides are text."""
  given = dict(GIVEN)
  chosen = {key: dict(overrides).get(key, given.get(key, default))
            for key, (default, _) in config_lib.SELECTORS.items()}
  table = config_lib.schema(chosen)
  given.update({key: config_lib._parse(key, text, table) for key, text in overrides})
  return config_lib.complete(given)


class Trainer:
  """A run whose validation is best at rate 1e-3, and a little better still with LoRA of rank 32."""

  def __init__(self, stop_at=None, mode="max"):
    self.seen, self.judged, self.stop_at, self.mode = [], [], stop_at, mode

  def value(self, config):
    value = 0.9 - 0.1 * (math.log10(config.optim.rate) + 3)**2
    if config.tune.method == "lora":
      value += 0.02 - 0.01 * abs(math.log2(config.tune.rank / 32))
    return value if self.mode == "max" else 1 - value

  def __call__(self, config, folder, command="", watch=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "checkpoints").mkdir(exist_ok=True)
    if watch is None:
      self.judged.append(folder.name)
      return
    self.seen.append((config.optim.rate, config.tune.method))
    if len(self.seen) == self.stop_at:
      raise errors.Preempted("a signal was received")
    for step in (10, 20, 30):
      watch({"step": step, "validation/accuracy": self.value(config) - 0.3 / step},
            ("accuracy", self.mode))
    return {"best": self.value(config), "best_step": 30}


def searched(folder, words=(RATE,), trainer=None, first=(), **settings):
  made = sweep.Sweep(load, folder, search_space.read(list(words)), sweep.Settings(**settings),
                     first=first, train=trainer or Trainer())
  made.go()
  return made


# ---- The space -----------------------------------------------------------------------------------


def test_ranges_and_choices_are_read_and_selectors_come_first():
  found = search_space.read(["tune.rank=log:4:64", RATE, "tune.method=full,lora",
                             "train.epochs=1:4"])
  assert list(found)[0] == "tune.method"
  assert found["tune.rank"] == search_space.Range(4, 64, True)
  assert isinstance(found["tune.rank"].low, int)
  assert found["train.epochs"] == search_space.Range(1.0, 4.0)
  assert found["tune.method"] == search_space.Choice(("full", "lora"))


def test_a_grid_has_equal_ratios():
  grid = search_space.Range(1e-5, 1e-1, True).grid(5)
  assert grid == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
  assert search_space.Range(1, 4).grid(4) == [1, 2, 3, 4]


@pytest.mark.parametrize("word,told", [
    ("optim.rat=1:2", "did you mean 'optim.rate'"),
    ("optim.rate", "write KEY=log:LOW:HIGH"),
    ("optim.rate=log:0:1", "above 0"),
    ("optim.rate=2:1", "below the second"),
    ("tune.rank=4:6.5", "whole numbers"),
    ("tune.method=full,lorra", "did you mean 'lora'"),
    ("tune.method=full", "write KEY=log:LOW:HIGH"),
])
def test_a_wrong_space_is_told(word, told):
  with pytest.raises(errors.UserError, match=told):
    search_space.read([word])


# ---- The search ----------------------------------------------------------------------------------


def test_rates_come_first_for_each_method_from_the_middle_out(tmp_path):
  trainer = Trainer()
  searched(tmp_path, (RATE, "tune.method=full,lora", "tune.rank=log:4:64"), trainer, trials=10,
           pruner="none")
  assert trainer.seen[:2] == [(pytest.approx(1e-3), "full"), (pytest.approx(1e-3), "lora")]
  grid = {round(math.log10(rate), 6) for rate, _ in trainer.seen}
  assert grid == {-5, -4, -3, -2, -1}


def test_the_planted_optimum_is_found_and_what_is_not_read_is_left_out(tmp_path):
  found = searched(tmp_path, (RATE, "tune.method=full,lora", "tune.rank=log:4:64"), trials=30)
  best = found.best().user_attrs["point"]
  assert best["tune.method"] == "lora"
  assert 3e-4 < best["optim.rate"] < 3e-3
  assert found.best().value > 0.9
  assert all("tune.rank" not in row["point"] for row in found.record()["trials"]
             if row["point"]["tune.method"] == "full")


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_bad_rates_are_ended_early(tmp_path, pruner):
  found = searched(tmp_path, trials=15, pruner=pruner)
  pruned = [row for row in found.record()["trials"] if row["state"] == "pruned"]
  assert pruned
  assert all(row["value"] < 0.9 and "others were better" in row["reason"] for row in pruned)


def test_a_metric_that_should_be_small_is_made_small(tmp_path):
  found = searched(tmp_path, trainer=Trainer(mode="min"), trials=8)
  record = found.record()
  best = next(row for row in record["trials"] if row["number"] == record["best"])
  assert record["mode"] == "min"
  assert best["value"] == pytest.approx(0.1, abs=0.02)
  assert best["value"] == min(row["value"] for row in record["trials"])


def test_the_same_command_goes_on_and_a_finished_search_tries_nothing(tmp_path):
  searched(tmp_path, trials=4)
  trainer = Trainer()
  searched(tmp_path, trainer=trainer, trials=6)
  assert len(trainer.seen) == 2
  searched(tmp_path, trainer=trainer, trials=6)
  assert len(trainer.seen) == 2


def test_a_trial_told_to_stop_is_tried_again_in_its_folder(tmp_path):
  trainer = Trainer(stop_at=3)
  with pytest.raises(errors.Preempted):
    searched(tmp_path, trainer=trainer, trials=5)
  stopped, again = trainer.seen[2], Trainer()
  found = searched(tmp_path, trainer=again, trials=5)
  assert stopped in again.seen
  assert len(found.begun()) == 5
  assert len(list(tmp_path.glob("trial-*"))) == 5


def test_a_dead_process_of_this_machine_is_taken_over(tmp_path):
  made = sweep.Sweep(load, tmp_path, search_space.read([RATE]), sweep.Settings(trials=5),
                     train=Trainer())
  trial = made.study.ask()
  point = made._point(trial)
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  trial.set_user_attr("process", [sweep.socket.gethostname(), gone.pid])
  trainer = Trainer()
  found = searched(tmp_path, trainer=trainer, trials=5)
  assert point["optim.rate"] in [rate for rate, _ in trainer.seen]
  assert len(found.begun()) == 5
  assert not found.trials("RUNNING")


def test_only_the_winner_is_judged_and_keeps_its_checkpoints(tmp_path):
  trainer = Trainer()
  found = searched(tmp_path, trainer=trainer, trials=6)
  assert trainer.judged == []
  best = found.best().user_attrs["folder"]
  assert [path.parent.name for path in tmp_path.glob("trial-*/checkpoints")] == [best]
  with pytest.raises(errors.UserError, match="does not exist"):
    found.judge("the command")  # this trainer leaves no card
  assert trainer.judged == [best]
  assert found.record()["judged"] == [best]


def test_a_failed_trial_is_noted_and_not_tried_again(tmp_path):
  class Fails(Trainer):
    def __call__(self, config, folder, command="", watch=None):
      if config.optim.rate > 0.05:
        self.seen.append((config.optim.rate, "failed"))
        raise errors.TrainingFailed("loss is not finite")
      return super().__call__(config, folder, command, watch)

  trainer = Fails()
  record = searched(tmp_path, trainer=trainer, trials=6, pruner="none").record()
  failed = [row for row in record["trials"] if row["state"] == "fail"]
  assert failed and failed[0]["reason"] == "loss is not finite"
  assert len(record["trials"]) == 6


class Refuses(Trainer):
  """Settings of a rank above 8 are impossible, or any at all."""

  def __init__(self, all_of_them=False):
    super().__init__()
    self.all_of_them = all_of_them

  def __call__(self, config, folder, command="", watch=None):
    if self.all_of_them or config.tune.method == "lora" and config.tune.rank > 8:
      self.seen.append((config.optim.rate, "refused"))
      raise errors.UserError("tune.rank is larger than the smallest side")
    return super().__call__(config, folder, command, watch)


IMPOSSIBLE = [{"tune.method": "lora", "tune.rank": 16, "optim.rate": 1e-3},
              {"tune.method": "lora", "tune.rank": 8, "optim.rate": 1e-3}]


def test_an_impossible_point_ends_no_search_and_is_not_asked_for_again(tmp_path):
  record = searched(tmp_path, trainer=Refuses(), first=IMPOSSIBLE, trials=2, rates=0).record()
  assert [row["state"] for row in record["trials"]] == ["fail", "complete"]
  assert record["trials"][0]["reason"] == "tune.rank is larger than the smallest side"
  again = Refuses()
  found = searched(tmp_path, trainer=again, first=IMPOSSIBLE, trials=3, rates=0)
  assert len(again.seen) == 1 and again.seen[0][1] == "full"
  assert len(found.begun()) == 3


def test_what_refuses_every_trial_is_told_and_can_be_put_right(tmp_path):
  refuses = Refuses(all_of_them=True)
  for _ in range(2):
    with pytest.raises(errors.UserError, match="tune.rank is larger"):
      searched(tmp_path, trainer=refuses, first=IMPOSSIBLE, trials=2, rates=0)
  assert len(refuses.seen) == 4
  trainer = Trainer()
  found = searched(tmp_path, trainer=trainer, first=IMPOSSIBLE, trials=2, rates=0)
  assert trainer.seen == [(1e-3, "lora")] * 2
  assert len(found.begun()) == 2
  searched(tmp_path, trainer=trainer, first=IMPOSSIBLE, trials=2, rates=0)
  assert len(trainer.seen) == 2


def test_a_spent_budget_ends_the_search_but_not_the_first_trial(tmp_path):
  found = searched(tmp_path, trials=50, minutes=1e-9)
  assert len(found.begun()) == 1
  assert found.best() is not None


def test_another_space_in_the_same_folder_is_told(tmp_path):
  searched(tmp_path, trials=1)
  with pytest.raises(errors.UserError, match="another config or space"):
    searched(tmp_path, ("optim.rate=log:1e-4:1e-1",), trials=1)


def test_a_storage_that_cannot_be_opened_is_told_without_its_password(tmp_path):
  with pytest.raises(errors.UserError) as told:
    sweep.Sweep(load, tmp_path, search_space.read([RATE]), sweep.Settings(),
                "postgresql://me:secret@localhost:1/none", train=Trainer())
  assert "localhost:1/none" in str(told.value)
  assert "secret" not in str(told.value)


def test_two_workers_share_one_search(tmp_path):
  url = f"sqlite:///{tmp_path / 'shared.db'}"
  workers = [sweep.Sweep(load, tmp_path / name, search_space.read([RATE]),
                         sweep.Settings(trials=6), url, "one", train=Trainer())
             for name in ("a", "b")]
  workers[0].settings = sweep.Settings(trials=3)
  for worker in workers:
    worker.go()
  assert len(workers[0].train.seen) == len(workers[1].train.seen) == 3
  assert workers[0].best().number == workers[1].best().number


@pytest.fixture
def server(tmp_path):
  """The URL of a PostgreSQL server on a socket of its own, which refuses to run as root."""
  if not (shutil.which("initdb") and shutil.which("pg_ctl")):
    pytest.skip("needs PostgreSQL's initdb and pg_ctl")
  data = pathlib.Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
  who = {"user": "nobody"} if os.geteuid() == 0 else {}
  if who:
    shutil.chown(data, "nobody")
  options = f"-c listen_addresses='' -c unix_socket_directories={data}"
  start = ["pg_ctl", "-D", f"{data}/db", "-w", "-l", f"{data}/log", "-o", options, "start"]
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": data}
  try:
    subprocess.run(["initdb", "-D", f"{data}/db", "-U", "ft", "-A", "trust"], check=True, **quiet,
                   **who)
    subprocess.run(start, check=True, **quiet, **who)
    yield f"postgresql://ft@/postgres?host={data}"
    subprocess.run(["pg_ctl", "-D", f"{data}/db", "-m", "fast", "stop"], check=True, **quiet, **who)
  finally:
    shutil.rmtree(data, ignore_errors=True)


def test_workers_at_once_share_a_postgresql_server(server, tmp_path):
  pytest.importorskip("psycopg")
  code = f"""
import pathlib, sys
sys.path.insert(0, {str(conftest.ROOT / "tests")!r})
import test_sweep
from ft import search_space, sweep
trainer = test_sweep.Trainer()
sweep.Sweep(test_sweep.load, pathlib.Path(sys.argv[1]), search_space.read([test_sweep.RATE]),
            sweep.Settings(trials=12), {server!r}, "shared", train=trainer).go()
print(len(trainer.seen))
"""
  workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)],
                              cwd=conftest.ROOT, stdout=subprocess.PIPE, text=True)
             for name in ("a", "b")]
  done = [int(worker.communicate(timeout=200)[0]) for worker in workers]
  assert 12 <= sum(done) <= 13  # both may begin the last one
  found = sweep.Sweep(load, tmp_path / "c", search_space.read([RATE]), sweep.Settings(trials=12),
                      server, "shared", train=Trainer())
  record = found.record()
  assert len(record["trials"]) == sum(done)
  rates = [round(row["point"]["optim.rate"], 12) for row in record["trials"]]
  assert sum(rates.count(rate) > 1 for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)) == 0


def test_settings_outside_the_space_are_tried_first(tmp_path):
  trainer = Trainer()
  found = searched(tmp_path, (RATE,), trainer, trials=2, rates=0,
                   first=[{"tune.method": "lora", "tune.rank": 32, "optim.rate": 1e-3}])
  assert trainer.seen[0] == (1e-3, "lora")
  assert found.best().user_attrs["point"]["tune.rank"] == 32


# ---- The account ---------------------------------------------------------------------------------


def test_the_page_and_the_lines_name_the_winner(tmp_path):
  record = searched(tmp_path, (RATE, "tune.method=full,lora"), trials=8).record()
  record = json.loads(json.dumps(record)) | {"title": "<script>"}
  page, said = search.page(record), search.lines(record)
  assert "<script>" not in page
  assert page.count("<svg") == 3  # rates, methods, the best so far
  assert said.splitlines()[1].split()[0] == str(record["best"])
  assert search.conclusion(record) in page


@pytest.mark.parametrize("mode,best", [("max", 0.9), ("min", 0.2)])
def test_the_best_of_each_choice_is_the_metric_s_best(mode, best, monkeypatch):
  drawn = []
  monkeypatch.setattr(search.charts, "intervals", lambda rows, *_: drawn.append(rows) or "<svg>")
  told = [("full", 0.2, True), ("full", 0.9, False), ("lora", 0.5, False)]
  search._choices(told, "label", "error", mode)
  assert drawn == [[("full", best, (0.2, 0.9), True), ("lora", 0.5, (0.5, 0.5), False)]]


def test_an_account_without_a_whole_trial():
  record = {"title": "t", "metric": "", "mode": "max", "space": {}, "best": None, "judged": [],
            "trials": []}
  assert "No trial has gone to its end" in search.page(record)


# ---- The script ----------------------------------------------------------------------------------


def flags(tiny, folder, *words):
  return [f"--config={tiny.config}", f"--workdir={folder}",
          "--space=optim.rate=log:1e-4:1e-1", "--rates=3", "--trials=3",
          "--config.train.steps=12", "--config.train.eval_every=4", *words]


def test_the_script_tries_as_many_as_it_is_told(tiny, tmp_path):
  words = ("--trials=1", "--rates=0", "--pruner=halving", "--minutes=9", "--seed=3", "--nojudge",
           "--config.train.steps=2", "--config.train.train_sample=0")
  commands.script("sweep", *flags(tiny, tmp_path / "sweep", *words))
  record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
  assert [row["state"] for row in record["trials"]] == ["complete"]
  assert record["judged"] == [] and (tmp_path / "sweep" / "sweep.html").is_file()


@pytest.mark.slow
def test_the_script_survives_a_signal_and_judges_the_winner_alone(tiny, tmp_path):
  folder = tmp_path / "sweep"
  command = [sys.executable, "scripts/sweep.py", *flags(tiny, folder)]
  started = subprocess.Popen(command, cwd=conftest.ROOT, env=commands.environment(),
                             stderr=subprocess.PIPE, text=True)
  for line in started.stderr:
    if "step 4" in line:
      os.kill(started.pid, signal.SIGTERM)
      break
  started.communicate(timeout=200)
  assert started.returncode == 75
  commands.script("sweep", *flags(tiny, folder))
  record = json.loads((folder / "sweep.json").read_text())
  best = next(row for row in record["trials"] if row["number"] == record["best"])
  cards = [path.parent.name for path in folder.glob("trial-*/card.json")]
  assert cards == record["judged"] == [best["folder"]]
  card = json.loads((folder / best["folder"] / "card.json").read_text())
  assert card["best"]["value"] == pytest.approx(best["value"])
  assert "scripts/train.py" in card["command"]
  assert card["results"]["test"].keys() >= {"probe", "fine-tuned"}
