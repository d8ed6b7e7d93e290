r"""Searches settings on Optuna: rates first, then the rest; test is judged once, for the winner.

    python scripts/sweep.py --config=configs/NAME.py --workdir=runs/sweep --trials=20 \
      --space=optim.rate=log:1e-5:1e-3 --space=tune.method=full,lora --space=tune.rank=4:64

KEY=log:LOW:HIGH and KEY=LOW:HIGH are ranges, KEY=A,B,… a choice; a key that a trial's components do
not read is left out of it. Trials are folders of ordinary runs, chosen by validation. The same
command resumes. Workers on many machines share --storage=postgresql://user:password@host/db and,
for the winner's sake, a --workdir. Leaves sweep.html and sweep.json.
"""

import json
import pathlib
import shlex

from absl import flags

from ft import cli

flags.DEFINE_string("config", "", "config file, as configs/NAME.py or configs/NAME.py:key=value,…")
flags.DEFINE_string("workdir", "", "folder of the trials, made if absent; a search in it goes on")
flags.DEFINE_multi_string("space", [], "what is searched, as KEY=log:LOW:HIGH, KEY=LOW:HIGH or "
                          "KEY=A,B,…; give it several times")
flags.DEFINE_integer("trials", 20, "settings that are tried in all", lower_bound=1)
flags.DEFINE_integer("rates", 5, "points of the grid of optim.rate that is tried first, for each "
                     "choice of tune.method and the like; 0: none", lower_bound=0)
flags.DEFINE_enum("pruner", "median", ["median", "halving", "none"], "what ends a trial early: "
                  "being below the median, or successive halving, where a third goes on")
flags.DEFINE_float("minutes", 0.0, "budget, from which nothing more is tried; 0: none",
                   lower_bound=0.0)
flags.DEFINE_string("storage", "", "database; empty: a SQLite file in the workdir")
flags.DEFINE_string("study", "", "name of the search in the database; empty: the workdir's")
flags.DEFINE_integer("seed", 0, "of what is tried", lower_bound=0)
flags.DEFINE_boolean("judge", True, "judge test for the winner and write its card")


def main(_):
  from ft import card, compilation, errors, search_space, sweep
  from ft.card import search

  f = flags.FLAGS
  if not f.workdir:
    raise errors.UserError("--workdir=DIR is missing: the folder that will hold the trials")
  if not f.space:
    raise errors.UserError("--space=KEY=… is missing: what is searched, such as "
                           "--space=optim.rate=log:1e-5:1e-3")
  compilation.cache()
  settings = sweep.Settings(trials=f.trials, rates=f.rates, pruner=f.pruner, minutes=f.minutes,
                            seed=f.seed)
  found = sweep.Sweep(cli.config, f.workdir, search_space.read(f.space), settings, f.storage,
                      f.study)
  folder = pathlib.Path(f.workdir)

  def account():
    record = found.record()
    card.write_text(folder / "sweep.json", json.dumps(record, indent=1) + "\n")
    card.write_text(folder / "sweep.html", search.page(record))
    return record

  try:
    found.go(account)
  finally:
    record = account()
  print(search.lines(record))
  print(search.conclusion(record))
  if found.best() is None:
    raise errors.TrainingFailed("no trial went to its end; sweep.html says why")
  command = again(found, folder)
  print(command)
  if f.judge:
    found.judge(command)
    account()
  print(folder / "sweep.html")


def again(found, folder) -> str:
  """The command that runs the winner; in its folder it goes on from what was trained."""
  from ft import sweep

  best = found.best().user_attrs
  words = [f"--config.{key}={value}" for key, value in [*cli.overrides(),
                                                       *sweep.words(best["point"])]]
  return "python " + shlex.join(["scripts/train.py", f"--config={flags.FLAGS.config}",
                                 f"--workdir={folder / best['folder']}", *words])


if __name__ == "__main__":
  cli.run(main, __doc__, with_config=True)
