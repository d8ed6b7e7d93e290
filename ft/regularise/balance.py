"""Reweighting: every class, group or combination of them counts the same in the loss.

A row of a cell with n_g of the N training rows, of G cells, has the weight N / (G n_g); the strong
simple baseline of Idrissi et al. 2022, arXiv:2110.14503. Cost: none. Do not stack it with
task.class_weights or task.logit_adjustment: together they over-correct.
"""

import jax.numpy as jnp
import numpy as np

from ft import anchor, errors

KEYS = {"by": ((), "columns whose combinations count the same: label, or of data.attributes; "
               "(): off")}


def make(config, context) -> anchor.Part | None:
  """Returns the wrap; see `ft.anchor.make`."""
  if not config.by:
    return None
  _, cell = cells(context.run, config.by, "regularise.balance.by")
  return anchor.Part(wrap=wrap(weights(cell)))


def weights(cell) -> np.ndarray:
  """Returns (N,) weights of mean 1 of rows in cells (N,) int, numbered from 0."""
  counts = np.bincount(cell)
  return (len(cell) / (np.sum(counts > 0) * counts[cell])).astype(np.float32)


def wrap(of_row):
  """Returns loss -> loss in which row i of train weighs of_row[i] (N,)."""
  of_row = jnp.asarray(of_row)

  def around(loss):
    def value(apply, variables, batch, rng, base):
      more = of_row[jnp.maximum(batch["index"], 0)]  # padding has weight 0
      return loss(apply, variables, {**batch, "weight": batch["weight"] * more}, rng, base)

    return value

  return around


def cells(run, columns, key: str, split: str = "train") -> tuple[list[str], np.ndarray]:
  """Returns (names of the cells, (N,) the cell of each row of a split).

  Args:
    run: `run.Run`.
    columns: "label", or names of data.attributes.
    key: in whose name errors speak.

  Raises:
    UserError: a column is not there or has one value, or the task makes other rows of these.
  """
  if hasattr(run.task, "training"):
    raise errors.UserError(f"{key}: task.name={run.config.task.name} does not train on single rows")
  rows, names = run.data.splits[split], []
  for column in columns:
    if column == "label":
      values = None if rows.labels is None else [str(label) for label in rows.labels]
    else:
      there = rows[0].get("attributes") or {}
      values = [row["attributes"][column] for row in rows] if column in there else None
    if values is None:
      raise errors.UserError(f"{key}: {split} has no {column!r}; name label, or a column of "
                             "data.attributes that the rows have")
    if len(set(values)) < 2:
      raise errors.UserError(f"{key}: {column!r} has one value only in {split}, {values[0]!r}")
    names.append(values)
  joined = [", ".join(parts) for parts in zip(*names, strict=True)]
  found, cell = np.unique(joined, return_inverse=True)
  return [str(name) for name in found], cell
