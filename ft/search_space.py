"""What a search may set: config keys, each with a range of numbers or a choice of values."""

import dataclasses
import math

from ft import config as config_lib
from ft import errors


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from low to high; whole ones where both are ints."""

  low: float
  high: float
  log: bool = False

  def suggest(self, trial, key):
    ask = trial.suggest_int if isinstance(self.low, int) else trial.suggest_float
    return ask(key, self.low, self.high, log=self.log)

  def holds(self, value) -> bool:
    return isinstance(value, (int, float)) and self.low <= value <= self.high

  def grid(self, count: int) -> list:
    """`count` values from low to high with equal steps, or equal ratios."""
    shares = [i / max(count - 1, 1) for i in range(count)] if count > 1 else [0.5]
    if self.log:
      values = [self.low * (self.high / self.low)**share for share in shares]
    else:
      values = [self.low + (self.high - self.low) * share for share in shares]
    values = [min(max(value, self.low), self.high) for value in values]
    return sorted({round(value) for value in values}) if isinstance(self.low, int) else values


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of some values, as text of the command line."""

  values: tuple[str, ...]

  def suggest(self, trial, key):
    return trial.suggest_categorical(key, self.values)

  def holds(self, value) -> bool:
    return value in self.values

  def grid(self, count: int) -> list:
    del count
    return list(self.values)


def read(words: list[str]) -> dict:
  """Reads a search space: ["optim.rate=log:1e-5:1e-3", "tune.method=full,lora", "tune.rank=4:32"].

  Returns:
    config key -> Range or Choice, selectors such as tune.method first.

  Raises:
    UserError: no such key, no such value, or nothing to choose from.
  """
  found, table = {}, config_lib.schema()
  for word in words:
    key, equals, text = word.partition("=")
    if key not in table:
      raise errors.UserError(f"--space={word}: there is no config key {key!r}"
                             f"{errors.suggest(key, table)}")
    if not equals or not text:
      raise errors.UserError(f"--space={word}: write KEY=log:LOW:HIGH, KEY=LOW:HIGH or KEY=A,B,…")
    found[key] = _domain(word, key, text, table)
  return dict(sorted(found.items(), key=lambda item: item[0] not in config_lib.SELECTORS))


def _domain(word, key, text, table):
  bounds = text.removeprefix("log:").split(":")
  if len(bounds) != 2:
    values = tuple(text.split(","))
    if len(set(values)) < 2 or text.startswith("log:"):
      raise errors.UserError(f"--space={word}: write KEY=log:LOW:HIGH, KEY=LOW:HIGH or KEY=A,B,…")
    if key in config_lib.SELECTORS:
      for value in values:
        if value not in config_lib.choices(key):
          raise errors.UserError(f"--space={word}: {key} has no {value!r}"
                                 f"{errors.suggest(value, config_lib.choices(key))}")
    return Choice(values)
  log, whole = text.startswith("log:"), isinstance(table[key][0], int)
  try:
    low, high = (int(bound) if whole else float(bound) for bound in bounds)
  except ValueError:
    raise errors.UserError(f"--space={word}: {' and '.join(bounds)} are not two "
                           f"{'whole ' if whole else ''}numbers") from None
  if not (math.isfinite(low) and math.isfinite(high) and low < high) or log and low <= 0:
    raise errors.UserError(f"--space={word}: the first number has to be below the second"
                           f"{', and above 0' if log else ''}")
  return Range(low, high, log)
