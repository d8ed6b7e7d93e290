"""The record behind a card: its fields, its check and its JSON form (schema "ft-card/1").

`FIELDS` is the documentation: one row a field with path, type and meaning. In a path `*` stands for
any name. Types: str, int, number, bool, dict, list, any; "a list of" is written list[type], and `!`
marks what must be there. A number may be null when `missing` says why.

A field that is added leaves the version as it is, so that older cards stay readable; one that goes,
moves or means something else takes a new version, and cards of another version are refused.
"""

import math

import numpy as np

from ft import errors, guards

VERSION = "ft-card/1"

FIELDS = (
    ("schema", "str!", "version of this table"),
    ("title", "str!", "name of the run in a few words"),
    ("notes", "list[str]", "what a reader must know first, e.g. that images are simulated"),
    ("command", "str", "exact command line that produced the run"),
    ("config", "dict", "the whole config, defaults included"),
    ("created", "str", "date and time of the end of the run, ISO 8601"),
    ("versions", "dict", "package or 'device' -> version or description"),
    ("data.splits.*.rows", "int!", "rows of the split that were used"),
    ("data.splits.*.labels", "dict", "label -> rows that have it"),
    ("data.splits.*.fingerprint", "str", "hash of the split's rows; equal means the same rows"),
    ("data.report", "dict", "what loading the data found, free form"),
    ("data.counts", "dict", "rows truncated, dropped, …: name -> count"),
    ("data.first_example", "str", "the first training example as the model sees it, decoded"),
    ("model.source", "str", "where the pretrained model came from"),
    ("model.family", "str", "model family, e.g. bert"),
    ("model.parameters", "int", "parameters of the model"),
    ("model.trainable", "int", "parameters that were trained"),
    ("model.share", "number", "trainable / parameters"),
    ("model.table", "list", "what trained: rows (path, shape, count) or dicts of these"),
    ("model.load_report", "dict", "matched, initialised, ignored: counts or lists of names"),
    ("task.name", "str!", "kind of problem, e.g. classify"),
    ("task.metric", "str!", "the metric that selection and verdicts are about"),
    ("task.mode", "str", "max (default) or min: what is better"),
    ("task.signatures", "dict", "score -> library, version and settings that computed it"),
    ("task.teacher", "str", "source of the model that a student learnt from"),
    ("task.labels", "list[str]", "label names by class index"),
    ("task.protocol", "str", "how the metric was taken, where it is taken in several ways"),
    ("task.resampled", "str", "what intervals resample, where that is not single rows"),
    ("history", "list[dict]", "a dict a log point: step, train/loss, validation/accuracy, …"),
    ("best.step", "int", "step whose parameters were kept"),
    ("best.metric", "str", "metric it was chosen by"),
    ("best.value", "number", "its validation value"),
    ("results.*.*.metrics", "dict!", "split, then majority | probe | fine-tuned: metric -> value"),
    ("results.*.*.interval", "dict", "metric -> [lo, hi], 95 % bootstrap"),
    ("results.*.*.n", "int!", "rows the metrics are over"),
    ("results.*.*.scores", "str", "0/1 score of every row in order, for paired comparisons"),
    ("results.*.*.values", "str", "the tuned model's score of every row, where it is not 0 or 1"),
    ("results.*.*.blocks", "str", "number of every row; rows of one number are resampled together"),
    ("differences.*.*.metric", "str!", "split, then 'fine-tuned - probe', …: metric compared"),
    ("differences.*.*.difference", "number!", "mean paired difference"),
    ("differences.*.*.lo", "number!", "lower end of its 95 % paired bootstrap interval"),
    ("differences.*.*.hi", "number!", "upper end"),
    ("differences.*.*.n", "int!", "rows compared"),
    ("differences.*.*.verdict", "str", "gained | did not gain | lost"),
    ("intervals.level", "number!", "share of targets that prediction intervals were made to hold"),
    ("intervals.coverage", "dict", "split -> share that they hold"),
    ("confusion.labels", "list[str]!", "labels by class index"),
    ("confusion.matrix", "list[list]!", "test rows by true class (row) and predicted (column)"),
    ("calibration.temperature", "number", "fitted on validation"),
    ("calibration.before", "dict", "ece, log_loss, brier, reliability on test at temperature 1"),
    ("calibration.after", "dict", "the same at the fitted temperature"),
    ("calibration.*", "any", "further numbers of the calibrate guard"),
    ("abstention.threshold", "number!", "of the confidence, fitted on validation"),
    ("abstention.splits.*", "dict", "split -> answered, accuracy_answered, unknown_refused, …"),
    ("group_thresholds.by", "str!", "column of data.attributes whose groups have a threshold"),
    ("group_thresholds.positive", "str!", "label that counts as positive"),
    ("group_thresholds.at.*", "number", "group -> probability from which it is decided"),
    ("group_thresholds.splits.*", "dict", "split -> n, without (rows of no group), accuracy and "
     "equalised_odds with intervals, before the thresholds too, change"),
    ("screening.positive", "str!", "label that counts as positive"),
    ("screening.threshold", "number!", "probability from which rows are flagged, from validation"),
    ("screening.asked", "number!", "specificity that the threshold was chosen for"),
    ("screening.validation", "number!", "share of positives of validation"),
    ("screening.splits.*", "dict", "split -> n, positives, prevalence, sensitivity, specificity, "
     "ppv, npv, auroc, each with _interval, and the decision curve"),
    ("guards.*.verdict", "str!", "ok | warning | alarm | not measured"),
    ("guards.*.words", "str!", "one sentence with the numbers"),
    ("guards.*.numbers", "dict", "the numbers behind it"),
    ("cost", "dict", "numbers of the cost guard: phases, compile_seconds, peak_host_bytes, …"),
    ("tradeoff", "list[dict]", "of average.wise: alpha, chosen, values: split -> metric"),
    ("samples", "list[dict]", "texts written for rows of test: where, what to compare, answers"),
    ("pictures", "list[dict]", "images of test: where, words, images: name -> data URI of a PNG"),
    ("seeds.numbers", "list[int]!", "seeds of the runs; the rest of the record is of the first"),
    ("seeds.metric", "str!", "the metric they are compared by"),
    ("seeds.results.*.*", "dict", "split, row name: mean, sd (n - 1), values by seed"),
    ("seeds.differences.*.*", "dict", "split, 'fine-tuned - probe', …: the same, and verdicts"),
    ("missing", "dict", "path of a null number -> why it has no value"),
)

_TYPES = {"str": str, "int": int, "number": (int, float), "dict": dict, "list": list,
          "bool": bool, "any": object}


def normalise(record):
  """A copy of the record that JSON can hold exactly.

  Numpy values become Python's, keys become str, tuples lists; numbers that are not finite become
  null and are named with their reason under `missing`; text that UTF-8 cannot hold is escaped.
  """
  missing = dict(record.get("missing") or {})
  body = {key: value for key, value in record.items() if key != "missing"}
  clean = _clean(body, "", missing)
  return {**clean, "schema": record.get("schema", VERSION), "missing": missing}


def validate(record):
  """Checks a normalised record against `FIELDS`.

  Raises:
    errors.UserError: one message that names every field that is missing, unknown or of wrong type.
  """
  if not isinstance(record, dict):
    raise errors.UserError(f"a card must be an object, this is {type(record).__name__}")
  version = record.get("schema")
  if version != VERSION:
    raise errors.UserError(f"the card has schema {version!r}; this version reads {VERSION!r}")
  problems = []
  _check(record, _tree(), "", problems)
  if not problems:  # What follows relies on the types.
    problems += [*_guards(record), *_intervals(record), *_confusion(record)]
  if problems:
    raise errors.UserError("the card's record is not valid: " + "; ".join(problems))


def _guards(record):
  for name, guard in (record.get("guards") or {}).items():
    if guard["verdict"] not in guards.VERDICTS:
      yield f"guards.{name}.verdict is {guard['verdict']!r}, not one of {guards.VERDICTS}"
    if not guard["words"].strip():
      yield f"guards.{name}.words is empty: every verdict says why"


def _intervals(record):
  for split, rows in (record.get("results") or {}).items():
    for row, entry in rows.items():
      for metric, pair in (entry.get("interval") or {}).items():
        ends = pair if isinstance(pair, list) else []
        if len(ends) != 2 or all(_fits(end, "number") and end is not None for end in ends) and (
            ends[0] > ends[1]):
          yield f"results.{split}.{row}.interval.{metric} must be [lo, hi], got {pair!r}"


def _confusion(record):
  found = record.get("confusion") or {}
  labels, matrix = found.get("labels") or [], found.get("matrix") or []
  if {len(matrix), *map(len, matrix)} - {len(labels)}:
    yield f"confusion.matrix must have a row and a column for each of {len(labels)} labels"


def markdown():
  """`FIELDS` as a Markdown table, for README."""
  rows = [f"| `{path}` | {kind.replace('!', '')} | {meaning} |" for path, kind, meaning in FIELDS]
  return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _clean(value, path, missing):
  if isinstance(value, dict):
    return {_text(key): _clean(item, f"{path}.{_text(key)}".lstrip("."), missing)
            for key, item in value.items()}
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, (list, tuple, set, frozenset)):
    items = sorted(value) if isinstance(value, (set, frozenset)) else value
    return [_clean(item, f"{path}.{i}", missing) for i, item in enumerate(items)]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    missing[path] = f"not a finite number ({value})"
    return None
  if value is None or isinstance(value, (bool, int, float)):
    return value
  return _text(value)


def _text(value):
  return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _tree():
  """FIELDS as a nested dict; a leaf is the type string."""
  tree = {}
  for path, kind, _ in FIELDS:
    node, parts = tree, path.split(".")
    for part in parts[:-1]:
      node = node.setdefault(part, {})
    node[parts[-1]] = kind
  return tree


def _check(value, node, path, problems):
  """Appends to problems what is wrong with the value at path."""
  if isinstance(node, str):
    if not _fits(value, node.rstrip("!")):
      problems.append(f"{path} must be {node.rstrip('!')}, got {type(value).__name__}")
    return
  if not isinstance(value, dict):
    problems.append(f"{path} must be dict, got {type(value).__name__}")
    return
  for name, item in value.items():
    child = node.get(name, node.get("*"))
    if child is None:
      problems.append(f"unknown field {_join(path, name)}{errors.suggest(name, node)}")
    elif item is not None or _required(child):
      _check(item, child, _join(path, name), problems)
  for name, child in node.items():
    if _required(child) and name not in value and name != "*":
      problems.append(f"{_join(path, name)} is missing")
  # Of the sections only the task is owed: a run may well have no confusion matrix.
  if not path and "task" not in value:
    problems.append("task is missing")


def _join(path, name):
  return f"{path}.{name}" if path else name


def _required(node):
  return isinstance(node, str) and node.endswith("!")


def _fits(value, kind):
  if kind.startswith("list["):
    return isinstance(value, list) and all(_fits(item, kind[5:-1]) for item in value)
  if kind == "number" and value is None:
    return True
  if isinstance(value, bool) and kind in ("int", "number"):
    return False
  return isinstance(value, _TYPES[kind])
