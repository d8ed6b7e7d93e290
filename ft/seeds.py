"""The same config with several seeds: how much of a result is chance of the training itself.

A paired interval says how sure a difference is over test rows, of this one training. Another order
of batches, another draw of new parameters, gives another model; the spread over seeds says how far
apart such models are. The rows of the splits stay the same (`data.split_seed`).
"""

import copy
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from ft import card, workdir
from ft import train as train_lib


def train(config, folder: os.PathLike, command: str = "", run: Callable = train_lib.train) -> dict:
  """Runs a config once for each of `config.seeds` seeds, in `folder/seed-N`, and sums them up.

  Runs that are finished stay as they are, one that was interrupted goes on. The folder's own card
  is that of the first seed, which nobody chose, with mean and spread over all beside it.

  Args:
    config: complete ConfigDict.
    folder: of the seeds' folders and of the card over them.
    command: what the cards give as the way to repeat the runs.
    run: `train.train`.

  Returns:
    The record of the folder's card; None where it had one.

  Raises:
    UserError, TrainingFailed, Preempted: as `train.train`.
  """
  numbers = list(range(config.seed, config.seed + config.seeds))
  folder, writer = pathlib.Path(folder), jax.process_index() == 0
  with workdir.Workdir(folder, config, writer) as home:
    if home.finished:
      logging.info("%s: these runs are finished; card.html shows their results", folder)
      return None
    for number in numbers:
      one = copy.deepcopy(config)
      one.seed, one.seeds = number, 1
      logging.info("seed %d of %s", number, ", ".join(map(str, numbers)))
      run(one, folder / f"seed-{number}", command)
    if not writer:
      return None
    records = [card.read(folder / f"seed-{number}") for number in numbers]
    record = {**records[0], "config": home.config, "seeds": summary(numbers, records)}
    card.write(record, folder)
    logging.info("\n%s", card.summary(record))
    return record


def summary(numbers: list[int], records: list[dict]) -> dict:
  """The card's field `seeds`: mean and standard deviation (n - 1) of the judged metric over seeds.

  Args:
    numbers: the seeds. records: their cards, in this order.

  Returns:
    {"numbers", "metric", "results": split -> row name -> {"mean", "sd", "values"}, "differences":
    split -> "fine-tuned - <baseline>" -> {"mean", "sd", "values", "verdicts"}}; values are in the
    order of the seeds, None where a seed's is no finite number.
  """
  metric = records[0]["task"]["metric"]
  results, differences = {}, {}
  for split, rows in records[0]["results"].items():
    for name in rows:
      values = [record["results"][split][name]["metrics"].get(metric) for record in records]
      results.setdefault(split, {})[name] = _spread(values)
  for split, rows in records[0]["differences"].items():
    for name in rows:
      found = [record["differences"][split][name] for record in records]
      differences.setdefault(split, {})[name] = {
        **_spread([row["difference"] for row in found]),
        "verdicts": [row["verdict"] for row in found]}
  return {"numbers": numbers, "metric": metric, "results": results, "differences": differences}


def _spread(values) -> dict:
  known = [value for value in values if value is not None]
  return {"mean": float(np.mean(known)) if known else None,
          "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None, "values": values}

