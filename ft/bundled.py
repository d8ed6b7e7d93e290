"""Tables that scikit-learn brings along (BSD), as CSV files that a run can read."""

import csv
import pathlib

from ft import errors


def write(path, name: str) -> int:
  """Writes a table with a header and the column `label`; returns its number of rows.

  Args:
    path: file to be made.
    name: of a classification table, such as breast_cancer (Wolberg et al. 1995).

  Raises:
    UserError: the file is there already.
  """
  from sklearn import datasets

  path = pathlib.Path(path)
  if path.exists():
    raise errors.UserError(f"{path} is there already; name a file to be made, or use this one")
  table = getattr(datasets, f"load_{name}")()
  columns = [column.replace(" ", "_") for column in table.feature_names]
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow([*columns, "label"])
    for values, target in zip(table.data, table.target, strict=True):
      writer.writerow([*map(float, values), table.target_names[target]])
  return len(table.target)
