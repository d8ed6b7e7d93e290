"""Leakage: is what the model is tested on already in what it was trained on?

Rows of validation, test and further splits that are in train too: the same (normalised text, bytes
of images and sounds), nearly the same to the untuned model (cosine of its features), by their
characters (MinHash, verified by Jaccard), as pictures (perceptual hash, verified by correlation),
or as overlapping windows of a series; groups and times that straddle splits, and columns that
give the label away. Then the metric on the rows that leaked and on the rest.
Sources: Lee et al., Deduplicating Training Data Makes Language Models Better (2022); Broder, On the
Resemblance and Containment of Documents (1997); Kapoor and Narayanan, Leakage and the
Reproducibility Crisis (2023).
"""

import dataclasses

import numpy as np

from ft import duplicates, guards, leaks, overlaps, stats
from ft.guards import overfit

KEYS = {
    "on": (True, "look for test rows that are in train, and for columns that give labels away"),
    "rows": (20000, "most rows of a split that are compared; a sample where there are more",
             (100, None)),
    "images": (4000, "most images of a split that are compared as pictures; a sample where there "
               "are more", (0, None)),
    "cosine": (0.95, "cosine of features above which rows are near-duplicates", (0.0, 1.0)),
    "jaccard": (0.6, "Jaccard similarity of 4-character shingles from which texts are "
                "near-duplicates", (0.1, 1.0)),
    "bits": (6, "of the 64 bits of a perceptual hash, how many near-duplicates may differ in",
             (0, 20)),
    "exact": (0.01, "share of test rows that are in train that counts as a warning", (0.0, 1.0)),
    "near": (0.05, "share of test rows with a near-duplicate in train that counts as a warning",
             (0.0, 1.0)),
    "inflation": (0.02, "how much better the test metric is than without them that counts as an "
                  "alarm; of a metric that is no share, relative to it", (0.0, None)),
    "column": (0.95, "accuracy of a single column that counts as a warning", (0.0, 1.0)),
}

FEWEST = 30  # Below this many rows a half has no metric worth its name.
ANY = "any"
_EXAMPLES = 12
_LATER = 0.05  # share of train that may be later than the median of test
_RESAMPLES = 500
LONG = {"exact": "exact", "embedding": "embedding", "minhash": "MinHash",
        "picture": "perceptual hash", "windows": "windows of time", ANY: "any of these"}
# What any rows could have; pictures, say, are not missed where rows are texts.
LOOKED = {"exact": "exact duplicates", "groups": "groups in two splits", "times": "order of time",
          "columns": "columns that give labels away"}


def measure(config, evidence):
  """The guard.

  Returns numbers (train is what other splits are compared with; shares have Wilson intervals):
    splits: [{"split", "n": compared, "of"}].
    between: [{"split", "method", "n", "rows": with a duplicate in train, "share", "interval",
      "same_label": share of these with the label of their duplicate, None without labels}]; methods
      exact, embedding, minhash, picture, windows, and any of them.
    inside: [{"split", "method", "n", "rows": that repeat an earlier one, "share", "interval"}].
    halves: [{"split", "method", "model", "metric", "leaked", "clean", "all": {"n", "value", "lo",
      "hi"}, "inflation": all less clean, better is positive}], of the tuned model and the probe;
      a half below 30 rows has no value.
    groups, times, columns: see ft/leaks.py.
    examples: [{"split", "method", "similarity", "place", "text", "picture": a data URI or "",
      "label", "train_place", "train_text", "train_picture", "train_label"}] of test, else of
      another split.
    settings: the thresholds, and whether the features were "raw" or "centred".
    missing: [{"part", "reason"}], what was not measured.
  """
  parts = overlaps.collect(evidence, config.rows, config.images)
  if "train" not in parts or len(parts) < 2:
    return guards.not_measured("there are no rows of train, or of no other split, to compare")
  numbers = {"splits": [{"split": name, "n": len(part.index), "of": part.of}
                        for name, part in parts.items()],
             "between": [], "inside": [], "halves": [], "examples": [], "missing": [],
             "settings": {"cosine": config.cosine, "jaccard": config.jaccard,
                          "bits": config.bits, "characters": duplicates.CHARACTERS}}
  found = search(config, parts, numbers)
  for split in parts:
    _between(numbers, split, parts, found)
    _inside(numbers, split, parts, found)
  for split in parts:
    if split not in ("train", "validation"):
      _halves(numbers, evidence, split, parts, found)
  _examples(numbers, evidence, parts, found)
  for name, look in (("groups", leaks.groups), ("times", leaks.times), ("columns", leaks.columns)):
    numbers[name] = _try(numbers, name, lambda look=look: look(evidence.rows)) or []
  numbers["between"] += [{**row, "method": "windows", "same_label": None}
                         for row in leaks.windows(evidence.rows)]
  if not any(numbers[key] for key in ("between", "groups", "times", "columns")):
    reasons = "; ".join(row["reason"] for row in numbers["missing"])
    return guards.not_measured(f"nothing of the rows could be compared ({reasons})")
  return guards.result(_verdict(config, numbers), _words(config, numbers), numbers)


def search(config, parts, numbers) -> dict:
  """Runs every finder that the rows allow; method -> what it found, see ft/overlaps.py."""
  found = {}
  for method, find in overlaps.FINDERS.items():
    result = _try(numbers, LONG[method], lambda find=find: find(parts, config, numbers["settings"]))
    if result:
      found[method] = result
  return found


def _try(numbers, part, look):
  """What `look()` gives; None where something is missing, with the reason in the numbers."""
  try:
    return look()
  except guards.Missing as reason:
    numbers["missing"].append({"part": part, "reason": str(reason)})
    return None


# ---- Numbers -------------------------------------------------------------------------------------


def _leaked(found, split, size, method=ANY):
  """(n,) whether each row has a duplicate in train by a method, or by any."""
  chosen = found.values() if method == ANY else [found[method]]
  return np.any([of[split][0] >= 0 for of in chosen], axis=0) if found else np.zeros(size, bool)


def _between(numbers, split, parts, found):
  if split == "train" or not found:
    return
  part, train = parts[split], parts["train"]
  for method in (*found, ANY):
    hit = _leaked(found, split, len(part.index), method)
    nearest = np.full(len(part.index), -1)  # by the first finder that has one
    for entry in [found[method]] if method != ANY else found.values():
      nearest = np.where(nearest >= 0, nearest, entry[split][0])
    same = None
    if part.label is not None and train.label is not None and hit.any():
      same = float(np.mean([part.label[i] == train.label[nearest[i]]
                            for i in np.flatnonzero(hit)]))
    numbers["between"].append({"split": split, "method": method, **_share(hit),
                               "same_label": same})


def _inside(numbers, split, parts, found):
  marks = {method: of[split][2] for method, of in found.items()}
  if marks:
    marks[ANY] = np.any(list(marks.values()), axis=0)
  numbers["inside"] += [{"split": split, "method": method, **_share(hit)}
                        for method, hit in marks.items()]


def _share(hit):
  n, rows = len(hit), int(hit.sum())
  return {"n": n, "rows": rows, "share": rows / n if n else float("nan"),
          "interval": stats.wilson(rows, n)}


def _halves(numbers, evidence, split, parts, found):
  """The metric of tuned model and probe on the rows that leaked and on the rest."""
  part, outputs = parts[split], evidence.outputs.get(split) or {}
  for method in (*found, ANY):
    hit = _leaked(found, split, len(part.index), method)
    if not hit.any() or method == "exact" and hit.sum() < FEWEST:
      continue
    for model in (guards.TUNED, guards.PROBE):
      place = _places(outputs.get(model), part)
      if place is None:
        continue
      halves = {"leaked": place[hit], "clean": place[~hit], "all": place}
      row = {name: _judged(evidence, outputs[model], at) for name, at in halves.items()}
      sign = 1 if evidence.mode == "max" else -1
      gap = None
      if row["clean"]["value"] is not None:
        gap = sign * (row["all"]["value"] - row["clean"]["value"])
      numbers["halves"].append({"split": split, "method": method, "model": model,
                                "metric": evidence.metric, **row, "inflation": gap})


def _places(outputs, part):
  """(n,) where the compared rows are among a model's outputs; None where that is not known."""
  if outputs is None:
    return None
  size = len(next(iter(outputs.values())))
  index = outputs.get("index")
  if index is None:
    if size != part.of and size != len(part.index):
      return None
    return part.index if size == part.of else np.arange(size)
  order = np.argsort(index, kind="stable")
  at = np.searchsorted(np.asarray(index)[order], part.index)
  at = order[np.minimum(at, size - 1)]
  return at if np.array_equal(np.asarray(index)[at], part.index) else None


def _judged(evidence, outputs, at):
  """{"n", "value", "lo", "hi"} of some rows; nothing but n below FEWEST."""
  if len(at) < FEWEST:
    return {"n": len(at), "value": None, "lo": None, "hi": None}
  chosen = {key: np.asarray(value)[at] for key, value in outputs.items()}
  alone = dataclasses.replace(evidence, outputs={"test": {guards.TUNED: chosen}})
  entry = overfit.results(alone, _RESAMPLES)["test"][guards.TUNED]
  lo, hi = entry["interval"][evidence.metric]
  return {"n": len(at), "value": entry["metrics"][evidence.metric], "lo": lo, "hi": hi}


def _examples(numbers, evidence, parts, found):
  """A few pairs of every method, from test where it has any: the closest that are not equal."""
  order = sorted((split for split in parts if split != "train"), key=lambda s: s != "test")
  for method, of in found.items():
    for split in order:
      nearest, similarity, _ = of[split]
      hit = np.flatnonzero(nearest >= 0)
      if not len(hit):
        continue
      equal = found["exact"][split][0][hit] >= 0 if "exact" in found else np.zeros(len(hit), bool)
      equal &= method != "exact"
      ranked = hit[np.lexsort([-similarity[hit], equal])]
      step = max(1, len(ranked) // (_EXAMPLES // len(found)))
      for at in ranked[::step][:_EXAMPLES // len(found)]:
        numbers["examples"].append({
            "split": split, "method": method, "similarity": float(similarity[at]),
            **_row(evidence, parts, split, at, ""),
            **_row(evidence, parts, "train", nearest[at], "train_")})
      break


def _row(evidence, parts, split, at, prefix):
  """Where a row stands and what it says, for the card."""
  part, i = parts[split], int(parts[split].index[at])
  label = None if part.label is None else str(part.label[at])
  row = evidence.rows[split][i]
  text = part.texts[at] or ", ".join(f"{key} {value}" for key, value
                                     in row.get("record", {}).items())
  return {f"{prefix}place": evidence.rows[split].where(i), f"{prefix}label": label,
          f"{prefix}text": duplicates.excerpt({"text": text}),
          f"{prefix}picture": duplicates.thumbnail(row)}


# ---- Verdict -------------------------------------------------------------------------------------


def _test(rows, **given):
  """The row of test, or of what else is given; None where there is none."""
  return next((row for row in rows if row["split"] == "test"
               and all(row[key] == value for key, value in given.items())), None)


def _inflated(config, row):
  """Whether the rows that leaked surely lift the metric of a split by more than is allowed."""
  if row is None or row["inflation"] is None or row["leaked"]["value"] is None:
    return False
  scale = 1.0 if row["metric"] in overfit.SHARES else abs(row["all"]["value"])
  apart = row["leaked"]["lo"] > row["clean"]["hi"] or row["leaked"]["hi"] < row["clean"]["lo"]
  return apart and row["inflation"] > config.inflation * scale


def _verdict(config, numbers):
  between, groups = numbers["between"], _test(numbers["groups"])
  if _inflated(config, _test(numbers["halves"], method=ANY, model=guards.TUNED)):
    return "alarm"
  windows = _test(between, method="windows")
  if groups and groups["share"] > config.near or windows and windows["rows"]:
    return "alarm"
  exact, near, times = (_test(between, method="exact"), _test(between, method=ANY),
                        _test(numbers["times"]))
  bad = (exact and exact["share"] > config.exact, near and near["share"] > config.near,
         groups and groups["rows"], times and times["later"] > _LATER,
         any(told(config, row) for row in numbers["columns"]))
  return "warning" if any(bad) else "ok"


def told(config, row):
  """Whether a column gives the label away: right nearly always, and far more than the majority."""
  return row["accuracy"] >= config.column and 1 - row["accuracy"] < 0.5 * (1 - row["majority"])


def _words(config, numbers):
  parts = []
  found = _test(numbers["between"], method=ANY)
  if found:
    single = [f"{LONG[row['method']]} {100 * row['share']:.1f} %" for row in numbers["between"]
              if row["split"] == "test" and row["method"] != ANY]
    parts.append(f"{_percent(found)} of test rows have a duplicate or near-duplicate in train "
                 f"({', '.join(single)})")
    parts += _metric_words(numbers)
  windows = _test(numbers["between"], method="windows")
  if windows:
    parts.append(f"{windows['rows']:,} of {windows['n']:,} test windows are of times that train "
                 "learnt to forecast")
  groups, times = _test(numbers["groups"]), _test(numbers["times"])
  if groups:
    parts.append(f"{groups['rows']:,} of {groups['n']:,} test rows are of a group that is in train")
  if times and times["later"] > _LATER:
    parts.append(f"{100 * times['later']:.0f} % of train rows are later than half of the test rows")
  parts += [f"the column {row['column']} alone gives {100 * row['accuracy']:.1f} % of the labels"
            for row in numbers["columns"] if told(config, row)]
  if not parts:
    parts = ["no group, time or column was seen to leak"]
  text = "; ".join(parts)
  lacking = [LOOKED[row["part"]] for row in numbers["missing"] if row["part"] in LOOKED]
  more = f" Not measured: {', '.join(lacking)}." if lacking else ""
  return text[0].upper() + text[1:] + "." + more


def _metric_words(numbers):
  row = _test(numbers["halves"], method=ANY, model=guards.TUNED)
  if row is None:
    return []
  leaked, clean = row["leaked"], row["clean"]
  if leaked["value"] is None or clean["value"] is None:
    few = min(leaked["n"], clean["n"])
    return [f"too few for a metric of their own (n = {few})"]
  share = row["metric"] in overfit.SHARES
  shown = [f"{100 * half['value']:.1f}" if share else f"{half['value']:.3f}"
           for half in (leaked, clean, row["all"])]
  return [f"{row['metric'].replace('_', ' ')} {shown[0]} on them, {shown[1]} on the other "
          f"{clean['n']:,}, {shown[2]} on all".replace("-", "−")]


def _percent(row):
  lo, hi = row["interval"]
  return f"{100 * row['share']:.1f} % [{100 * lo:.1f}, {100 * hi:.1f}]"
