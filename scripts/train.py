"""Fine-tunes a pretrained model as a config says; the same command resumes an interrupted run.

    python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart

--config.seeds=3 runs it with three seeds, each in a folder of its own, and gives mean ± sd;
--config.auto=True chooses task, method and settings by rules and a race.
Exit status: 0 done; 2 the input is wrong; 3 training failed; 75 preempted, run me again.
"""

import shlex
import sys

from absl import flags

from ft import cli

flags.DEFINE_string("config", "", "config file, as configs/NAME.py or configs/NAME.py:key=value,…")
flags.DEFINE_string("workdir", "", "folder of the run, made if absent; a run in it goes on")


def main(_):
  from ft import auto, compilation, control, errors, seeds, train

  if not flags.FLAGS.workdir:
    raise errors.UserError("--workdir=DIR is missing: the folder that will hold the run")
  config = cli.config()
  compilation.cache()
  if config.auto and config.seeds > 1:
    raise errors.UserError("auto and seeds: race first, then run the winner with several seeds")
  control.check(config)
  start = auto.train if config.auto else seeds.train if config.seeds > 1 else train.train
  start(config, flags.FLAGS.workdir, "python " + shlex.join(sys.argv))
  if config.guard.cost.scratch:
    control.from_scratch(flags.FLAGS.workdir)


if __name__ == "__main__":
  cli.run(main, __doc__, with_config=True)
