"""A table of many runs: methods by tasks, and means over tasks, from the runs' cards.

Runs of a suite are told apart by their title, "SUITE group/task: method", as in
"VTAB-1k natural/pets: lora". Several runs of a task and method, such as seeds, are averaged; the
rows that need no training are averaged over all runs of the task.
"""

import collections
import re
import statistics

from ft import errors, guards
from ft.card import words

TITLE = re.compile(r"(?P<suite>.+) (?P<group>[^\s/]+)/(?P<task>[^\s/]+): (?P<method>\S+)")


def collect(records) -> dict[str, dict[tuple[str, str], dict]]:
  """Returns row -> (group, task) -> {"value", "half"}: the mean over runs, and half its interval.

  Rows are baselines as `words.row_name` calls them, then the methods, each in order of appearance.

  Args:
    records: of cards, of one suite and metric.

  Raises:
    UserError: a title of another form, several suites or metrics, or no result on test.
  """
  parts = [_parsed(record) for record in records]
  for what, found in (("suites", {part["suite"] for part in parts}),
                      ("metrics", {record["task"]["metric"] for record in records})):
    if len(found) > 1:
      raise errors.UserError(f"the runs are of several {what}: {', '.join(sorted(found))}")
  cells, methods = collections.defaultdict(lambda: collections.defaultdict(list)), {}
  for part, record in zip(parts, records, strict=True):
    rows = (record.get("results") or {}).get("test") or {}
    if guards.TUNED not in rows:
      raise errors.UserError(f"{record['title']}: it has no result on test")
    for name in words.rows_in_order(rows):
      row = part["method"] if name == guards.TUNED else words.row_name(name)
      if name == guards.TUNED:
        methods[row] = None
      cells[row][part["group"], part["task"]].append(_entry(rows[name], record["task"]["metric"]))
  order = [*(row for row in cells if row not in methods), *methods]
  return {row: {task: _mean(entries) for task, entries in cells[row].items()} for row in order}


def means(row: dict[tuple[str, str], dict]) -> dict[str, dict]:
  """Returns {group, …, "all"} -> {"value", "half", "tasks"}: means over tasks, each weighing 1.

  half: half the 95 % interval that follows from the tasks' own, as far as these come from the rows
  of test; how far runs differ by their seed is not in it.
  """
  groups = dict.fromkeys(group for group, _ in row)
  found = {}
  for name in (*groups, "all"):
    part = [entry for (group, _), entry in row.items() if name in (group, "all")]
    squares = sum(entry["half"]**2 for entry in part)
    found[name] = {"value": statistics.fmean(entry["value"] for entry in part),
                   "half": squares**0.5 / len(part), "tasks": len(part)}
  return found


def table(records) -> str:
  """Returns Markdown: a line a task, then the means of groups and of all, a column a row."""
  rows, metric = collect(records), records[0]["task"]["metric"]
  tasks = sorted({task for row in rows.values() for task in row})
  groups = list(dict.fromkeys(group for group, _ in tasks))
  lines = [f"| {words.unit(metric)} | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
  for group, task in tasks:
    cells = [_cell(row.get((group, task)), metric) for row in rows.values()]
    lines.append(f"| {task} | {' | '.join(cells)} |")
  over = {name: means(row) for name, row in rows.items()}
  for group in [*groups, "all"]:
    count = sum(group in (of, "all") for of, _ in tasks)
    cells = [_cell(found.get(group), metric, count) for found in over.values()]
    lines.append(f"| **mean of {group} ({count})** | {' | '.join(cells)} |")
  return "\n".join(lines)


def _parsed(record) -> dict:
  match = TITLE.fullmatch(record["title"])
  if not match:
    raise errors.UserError(f"the title {record['title']!r} is not of a suite; it should be like "
                           "'VTAB-1k natural/pets: lora'")
  return match.groupdict()


def _entry(result, metric) -> dict:
  low, high = (result.get("interval") or {}).get(metric) or (None, None)
  known = words.finite(low) and words.finite(high)
  return {"value": result["metrics"][metric], "half": (high - low) / 2 if known else float("nan")}


def _mean(entries) -> dict:
  # Of the same rows of test: more seeds do not make their interval narrower.
  return {key: statistics.fmean(entry[key] for entry in entries) for key in ("value", "half")}


def _cell(entry, metric, count=0) -> str:
  """A value with half its interval, and of how many tasks it is if these are not all `count`."""
  if entry is None:
    return "–"
  text = words.number(entry["value"], metric)
  if words.finite(entry["half"]):
    text += f" ± {words.number(entry['half'], metric)}"
  fewer = entry.get("tasks", count) < count
  return f"{text} (of {entry['tasks']})" if fewer else text
