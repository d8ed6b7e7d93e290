"""A threshold a group: decisions of two classes that are even-handed over an attribute of the rows.

What `fairness.thresholds` fits on validation is kept with the model and decides where a row has the
attribute at prediction; a row without it, or of a group that validation lacks, is decided as ever.
Shapes: N rows; logits (N, 2); labels (N,); codes (N,), the place of a row's group, -1 for none. The
second label is the positive one.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from ft import errors, fairness, stats

FEWEST = 30  # positives and negatives below which a group keeps 0.5, and is in no difference
RESAMPLES = 300


@dataclasses.dataclass(frozen=True)
class GroupThresholds:
  """Whose thresholds there are.

  Attributes:
    by: column of data.attributes.
    groups: its values in validation.
  """

  by: str
  groups: tuple[str, ...]

  def code(self, row: Mapping) -> np.ndarray:
    """Returns () int32, the place of the row's group; rows of a table have it in their record."""
    there = row.get("attributes") or row.get("record") or {}
    value = there.get(self.by)
    value = "" if value is None else str(value).strip()
    return np.asarray(self.groups.index(value) if value in self.groups else -1, np.int32)

  def fit(self, outputs: Mapping) -> dict[str, float]:
    """Returns group -> probability, before any temperature, from which its rows are positive."""
    scores, positive, group = self._known(outputs)
    return fairness.thresholds(scores[group != ""], positive[group != ""], group[group != ""],
                               FEWEST)

  def decide(self, logits, code: int, at: Mapping) -> int | None:
    """Returns the class of one row, given logits (2,); None where its group has no threshold."""
    group = self.group(code)
    return int(stats.softmax(logits)[1] >= at[group]) if group in at else None

  def group(self, code: int) -> str | None:
    """Returns a group's name; None for -1."""
    return self.groups[int(code)] if code >= 0 else None

  def account(self, outputs: Mapping, at: Mapping) -> dict:
    """Returns what the thresholds do to the rows of a split.

    n; without, rows of no group; accuracy and equalised_odds, and accuracy_before and
    equalised_odds_before of the ordinary decisions, each with "<name>_interval" (Wilson, or
    bootstrap); change, of accuracy: difference and paired interval. NaN where fewer than two groups
    have FEWEST positives or negatives.
    """
    scores, positive, group = self._known(outputs)
    said = {"": fairness.decided(scores, group, at), "_before": scores > 0.5}
    right = {name: made == positive for name, made in said.items()}
    found = {"n": len(scores), "without": int(np.sum(group == ""))}
    for name, made in said.items():
      found[f"accuracy{name}"] = float(np.mean(right[name]))
      found[f"accuracy{name}_interval"] = list(
        stats.wilson(int(right[name].sum()), len(scores)))
      of = tuple(part[group != ""] for part in (made, positive, group))
      found[f"equalised_odds{name}"] = _odds(*of)
      found[f"equalised_odds{name}_interval"] = list(stats.bootstrap_metric(_odds, of, RESAMPLES))
    found["change"] = list(stats.paired_bootstrap(right[""], right["_before"]))
    return found

  def _known(self, outputs) -> tuple:
    """(scores, positive, names of groups, "" for none) of the rows with a known label."""
    label = np.asarray(outputs["label"])
    scores = stats.softmax(np.asarray(outputs["logits"])[label >= 0])[:, 1]
    names = np.array([*self.groups, ""])[np.asarray(outputs["group"])[label >= 0]]
    return scores, label[label >= 0] == 1, names


def settle(by: str, labels, data, alone: bool) -> GroupThresholds | None:
  """Returns what task.thresholds asks for; None where it is empty.

  Args:
    labels: class names by index.
    data: a `sources.Data`.
    alone: whether nothing else of the task decides beside them.

  Raises:
    UserError: there are not two classes, or the column is absent, of one value, or of too many.
  """
  if not by:
    return None
  if len(labels) != 2:
    raise errors.UserError(f"task.thresholds is for two labels, one an example; train has "
                           f"{len(labels)}. Leave it empty")
  if not alone:
    raise errors.UserError("task.thresholds and task.coverage both decide; leave one of them out")
  rows = data.splits["validation"]
  there = getattr(rows, "attributes", ())
  if by not in there:
    raise errors.UserError(f"task.thresholds={by!r}: no such column of data.attributes is in "
                           f"validation{errors.suggest(by, there)}; it has "
                           f"{', '.join(there) or 'none'}")
  groups = sorted({row["attributes"][by] for row in rows} - {""})
  if not 2 <= len(groups) <= fairness.LEVELS:
    raise errors.UserError(f"task.thresholds={by!r}: it has {len(groups)} values in validation; "
                           f"groups are of two to {fairness.LEVELS}")
  return GroupThresholds(by, tuple(groups))


def _odds(said, positive, group) -> float:
  return fairness.differences(fairness.rates(said, positive, group), FEWEST)["equalised_odds"]
