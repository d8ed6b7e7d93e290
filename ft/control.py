"""What pretraining saved: the same model from random weights, under the same training.

Rates and steps are those of the run, chosen for pretrained weights; from random weights a longer
training at another rate may reach more. What is compared is what the same compute buys.
"""

import pathlib

import jax
from absl import logging

from ft import card, errors, mesh, train
from ft import config as configs
from ft.card import compare, words
from ft.guards import cost, overfit

FOLDER = "scratch"  # in the run's folder
# What the control leaves out: it is there for one number.
PLAIN = {"model": {"random": True}, "train": {"baselines": False, "export": False},
         "average": {"wise": ()}}


def check(config) -> None:
  """Raises UserError, before anything trains, where no control could be trained behind the run."""
  if not config.guard.cost.scratch:
    return
  mesh.start(config.mesh)
  if jax.process_count() > 1:
    raise errors.UserError(
        f"guard.cost.scratch is for runs of one process, and this one has {jax.process_count()}; "
        "leave it at False, or train with --config.model.random=True in a folder of its own")


def from_scratch(folder) -> dict | None:
  """Trains the control of a finished run and writes what it reached on the run's card.

  Args:
    folder: the run's; a control that was begun goes on, one that is on the card is left alone.

  Returns:
    The numbers that guards.cost.numbers has under "scratch": metric, value, interval, n, seconds,
    difference, lo, hi (tuned minus control, paired; absent where rows have no scores), best (on
    validation), reached_at and steps: the first evaluation at which the run from pretrained weights
    was at least as good, None where it never was.
  """
  folder = pathlib.Path(folder)
  record = card.read(folder)
  numbers = record["guards"]["cost"]["numbers"]
  if "scratch" in numbers:
    return None
  logging.info("training the same model from random weights, in %s", folder / FOLDER)
  # The card's config is what trained, where the one given left the choice to a race.
  train.train(changed(configs.from_json(record["config"])), folder / FOLDER)
  other = card.read(folder / FOLDER)
  numbers["scratch"] = compared(record, other)
  record["cost"] = numbers
  record["guards"]["cost"]["words"] += " " + said(numbers["scratch"])
  card.write(record, folder)
  return numbers["scratch"]


def changed(config):
  """Returns the control's config: all as it is, from random weights, without guards and export."""
  values = configs.to_json(config)
  for section, given in PLAIN.items():
    values[section] |= given
  for name, section in values["guard"].items():
    section["on"] = name == "cost"
  values["guard"]["cost"]["scratch"] = False
  values["title"] = f"{config.title or config.model.source}, from random weights"
  return configs.from_json(values)


def compared(record: dict, other: dict) -> dict:
  """Returns what `from_scratch` does, of the records of a run and of its control."""
  metric = record["task"]["metric"]
  entry = other["results"]["test"]["fine-tuned"]
  found = {"metric": metric, "value": entry["metrics"][metric], "n": entry["n"],
           "interval": entry["interval"][metric], "seconds": other["cost"]["phases"]["training"]}
  difference, _ = compare.paired(record, other, "test")
  if difference is not None:
    found |= {"difference": difference["difference"], "lo": difference["lo"],
              "hi": difference["hi"]}
  chosen, sign = record["best"]["metric"], _sign(record)
  found |= {"best": other["best"]["value"], "chosen_by": chosen,
            "steps": record["history"][-1]["step"]}
  reached = [row["step"] for row in record["history"]
             if words.finite(row.get(f"validation/{chosen}"))
             and sign * row[f"validation/{chosen}"] >= sign * other["best"]["value"]]
  found["reached_at"] = min(reached, default=None)
  return found


def said(found: dict) -> str:
  """Returns the control in a sentence."""
  metric = found["metric"]
  text = (f"From random weights the same training reached {words.metric_name(metric)} "
          f"{words.number(found['value'], metric)} {words.interval(found['interval'], metric)} "
          f"on test in {cost.duration(found['seconds'])}")
  if "difference" in found:
    row = {key: found[key] for key in ("difference", "lo", "hi")}
    text += f" (pretrained weights: {overfit.signed(row, metric)})"
  at = found["reached_at"]
  if at is None:
    return text + "; the run from pretrained weights never was as good on validation."
  return (f"{text}; from pretrained weights validation was as good by step {at:,} of "
          f"{found['steps']:,}.")


def _sign(record: dict) -> int:
  """1 where more of the metric that the best step was chosen by is better, else -1."""
  if record["best"]["metric"] == record["task"]["metric"]:
    return -1 if record["task"].get("mode") == "min" else 1
  rows = [row[f"validation/{record['best']['metric']}"] for row in record["history"]
          if words.finite(row.get(f"validation/{record['best']['metric']}"))]
  return 1 if record["best"]["value"] >= max(rows) else -1
