"""Bias: for whom does the model fail?

By every column of data.attributes, and by pairs of them: the metric of each group with its
interval, the worst one, equalised-odds and demographic-parity differences, calibration. Without
such columns: the worst class, and the worst cluster of what the model sees (k-means on the untuned
features). There always is a worst group; whether chance alone makes one as bad is said by
permutation. Definitions and sources: `ft/fairness.py`. With `probes`, causal language models are
asked for stereotypes before and after tuning, see `ft/language_bias.py`.
"""

import itertools

import numpy as np
from absl import logging

from ft import errors, fairness, guards, language_bias, stats

KEYS = {
  "on": (True, "measure whom the model fails"),
  "attributes": ((), "those of data.attributes that groups are made by; (): all"),
  "crossed": (True, "also by pairs of attributes"),
  "fewest": (30, "rows below which a group is flagged, and in no difference", (1, None)),
  "positive": ("", "label whose rates are compared; empty: the second of two, of more all"),
  "clusters": (10, "clusters of the features that are compared; 0: none", (0, 100)),
  "gap": (0.05, "accuracy that a group lies below the average that counts as a warning",
          (0.0, 1.0)),
  "odds": (0.1, "equalised-odds difference that counts as a warning", (0.0, 1.0)),
  "part_gap": (0.15, "as gap, of the worst class or cluster", (0.0, 1.0)),
  "error": (0.2, "share by which a group's error is above the average that counts as a warning, "
            "where the metric is an error", (0.0, None)),
  "alarm": (0.3, "any of these, less error, that counts as an alarm", (0.0, 1.0)),
  "probes": (None, "stereotypes of a causal language model before and after tuning: crows_pairs, "
             "bbq, winogender -> its file or folder", "dict"),
  "probe_rows": (500, "most rows of a probe that both models are asked", (1, None)),
  "probe_gap": (0.05, "share or score that tuning goes further from even on a probe that counts as "
                "a warning", (0.0, 1.0)),
}
CHANCE = 0.05  # level at which a worst group is no accident
MOST = 20_000  # test rows that are looked at
SMALLEST = 0.01  # share of the rows below which a cluster is none
COMPARED = 4_000  # rows that the clusters are made of


def gather(config, context):
  """Asks both models the probes, where any are named; see `language_bias.ask`."""
  if not config.probes:
    return {}
  try:
    return language_bias.ask(dict(config.probes.items()), config.probe_rows, context)
  # As in `guards.gather`: what the probes cannot do must not cost the groups.
  except Exception as error:  # noqa: BLE001
    logging.exception("guard bias: the probes failed")
    return {"probes": [], "missing": [f"the probes failed: {type(error).__name__}: {error}"]}


def measure(config, evidence):
  """The guard; its numbers are those of `_by_rows`, and with guard.bias.probes
  those of `language_bias.ask`: "probes", and in "missing" reasons why there are no more.
  """
  found, asked = _by_rows(config, evidence), evidence.gathered.get("bias")
  if not asked:
    return found
  verdict, said = language_bias.judged(asked, config.probe_gap)
  verdicts = [v for v in (verdict, found["verdict"]) if v != "not measured"]
  worst = max(verdicts, key=guards.VERDICTS.index) if verdicts else "not measured"
  missing = [*found["numbers"].get("missing", []), *asked["missing"]]
  return guards.result(worst, f"{said} {found['words']}",
                       {**found["numbers"], "probes": asked["probes"], "missing": missing})


def _by_rows(config, evidence):
  """What the rows of test say.

  Numbers: n; metric; mode; average; "by": one dict an attribute or pair of them, with by, groups
  (group, n, few, value, interval; of classifiers ece, and of two classes the rates of
  `fairness.rates`), worst (`fairness.worst`, None where there is none), equalised_odds,
  demographic_parity, chance (what equalised odds stay below by chance), positive, and of two
  classes thresholds: what one a group, fitted on validation, would do on test, at, accuracy,
  accuracy_before, equalised_odds, n of validation, or None with the reason in untold; "missing":
  reasons why attributes were left out; "classes": label, n, few, recall, interval, worst first;
  worst_class; "clusters": n, groups (group, n, value, interval, label), worst; None where there are
  no features; temperature, which ece is after.
  """
  outputs = evidence.outputs.get("test", {}).get(guards.TUNED)
  if outputs is None:
    return guards.not_measured("no results row by row of the test split were recorded")
  if evidence.score is None:
    return guards.not_measured(f"{evidence.metric.replace('_', ' ') or 'the metric'} is no mean "
                               "over rows, so that groups of rows have no part in it")
  outputs = _some(_known(outputs))
  n = len(next(iter(outputs.values())))
  if n < config.fewest:
    return guards.not_measured(f"the test split has {n} rows, fewer than {config.fewest}")
  score = np.asarray(evidence.score(outputs), np.float64)
  if score.shape != (n,) or not np.isfinite(score).all():
    return guards.not_measured("what the rows add to the metric is not finite")
  groups, missing = _groups(config, evidence, outputs)
  before = _validation(config, evidence)
  numbers = {"n": n, "metric": evidence.metric, "mode": evidence.mode,
             "average": float(score.mean()), "missing": missing,
             "temperature": _temperature(evidence, outputs)}
  numbers["by"] = [_by(config, evidence, outputs, score, name, group, numbers["temperature"])
                   for name, group in groups.items()]
  for found in numbers["by"]:
    if found["worst"] is None:
      missing.append(f"by {found['by']}: fewer than two groups have {config.fewest} rows")
    if "positive" in found and np.shape(outputs["logits"])[1] == 2:
      found |= _thresholds(config, evidence, found, outputs, groups, before)
  numbers |= _classes(config, evidence, outputs)
  numbers["clusters"] = _clusters(config, evidence, outputs, score)
  for part, worst in (("classes", numbers["worst_class"]),
                      ("clusters", (numbers["clusters"] or {}).get("worst"))):
    if numbers[part] and worst is None:
      missing.append(f"by {part}: fewer than two have rows enough")
  if not _compared(numbers):
    reason = "; ".join(missing) or "there are no groups, classes or features"
    return guards.result("not measured", f"Not measured: {reason}.", numbers)
  return guards.result(*_verdict(config, numbers), numbers)


def _known(outputs):
  """The rows whose label the model has a class for."""
  label = np.asarray(outputs.get("label", ()))
  if label.ndim != 1 or "logits" not in outputs or not len(label):
    return outputs
  return {key: np.asarray(value)[label >= 0] for key, value in outputs.items()}


def _some(outputs):
  n = len(next(iter(outputs.values())))
  kept = np.arange(n)
  if n > MOST:
    kept = np.sort(np.random.default_rng(0).choice(n, MOST, replace=False))
  return {key: np.asarray(value)[kept] for key, value in outputs.items()}


def _groups(config, evidence, outputs, split="test"):
  """({name: (N,) groups}, reasons why there are no more)."""
  rows, index = evidence.rows.get(split), outputs.get("index")
  if rows is None or index is None or not len(rows):
    return {}, [f"the {split} rows were not kept"]
  seen = [rows[int(i)].get("attributes") or {} for i in index]
  there = list(dict.fromkeys(key for row in seen for key in row))
  missing = [f"{name} of data.attributes is no column of the {split} rows"
             f"{errors.suggest(name, rows.table.columns)}" for name in getattr(rows, "absent", ())]
  if not there and not config.attributes:
    return {}, missing or [
        "no column of data.attributes is in the test rows, so that there are no groups"]
  found, like = {}, _like(evidence, split)
  for name in config.attributes or there:
    if name not in there:
      missing.append(f"{name} is no column of data.attributes that the {split} rows have")
      continue
    _add(found, missing, name, fairness.bands([row.get(name, "") for row in seen],
                                              [row.get(name, "") for row in like]))
  pairs = list(itertools.combinations(found, 2)) if config.crossed else []
  for a, b in pairs:
    _add(found, missing, f"{a} × {b}",
         np.array([f"{x}, {y}" for x, y in zip(found[a], found[b], strict=True)]))
  return found, missing


def _add(found, missing, name, group):
  """Adds (N,) groups by an attribute, or the reason why they are none."""
  count = len(np.unique(group))
  if count < 2:
    missing.append(f"{name} has one value only, {group[0]}, in the test rows")
  elif count > fairness.MOST:
    missing.append(f"{name} has {count} values, more than {fairness.MOST} groups")
  else:
    found[name] = group


def _like(evidence, split):
  """Attributes of the rows that say where bands of numbers begin, the same for all splits."""
  rows = next(part for part in map(evidence.rows.get, ("validation", "train", split)) if part)
  return [rows[i].get("attributes") or {} for i in range(0, len(rows), -(-len(rows) // MOST))]


def _temperature(evidence, outputs):
  """The temperature that makes validation calibrated; None where there are no class scores."""
  known = evidence.outputs.get("validation", {}).get(guards.TUNED)
  if not _classifies(outputs) or known is None or "logits" not in known:
    return None
  known = _known(known)
  if not np.isfinite(known["logits"]).all():
    return None
  return stats.fit_temperature(known["logits"], known["label"])


def _classifies(outputs):
  return "logits" in outputs and np.ndim(outputs.get("label")) == 1 \
      and np.ndim(outputs["logits"]) == 2


def _by(config, evidence, outputs, score, name, group, temperature):
  """What is said of the groups of one attribute."""
  table = []
  for value in np.unique(group):
    here = group == value
    row = {"group": str(value), **_share(score[here]), "few": bool(here.sum() < config.fewest)}
    if temperature is not None:
      probs = stats.softmax(np.asarray(outputs["logits"])[here] / temperature)
      row["ece"] = stats.ece(probs, np.asarray(outputs["label"])[here])
    table.append(row)
  found = {"by": name, "groups": table,
           "worst": fairness.worst(score, group, evidence.mode, config.fewest)}
  return found | _odds(config, evidence, outputs, group, table) if _classifies(outputs) else found


def _odds(config, evidence, outputs, group, table):
  """Differences of the class whose rates are furthest apart, of two classes of the positive one."""
  classes = np.shape(outputs["logits"])[1]
  said, label = np.argmax(outputs["logits"], 1), np.asarray(outputs["label"])
  names = list(evidence.labels) or [str(i) for i in range(classes)]
  picked = [names.index(config.positive)] if config.positive in names else \
      [1] if classes == 2 else range(classes)
  furthest = None
  for i in picked:
    rates = fairness.rates(said == i, label == i, group)
    apart = {**fairness.differences(rates, config.fewest), "positive": names[i],
             "chance": fairness.odds_by_chance(rates, config.fewest)}
    value = np.nan_to_num(apart["equalised_odds"], nan=-1.0)
    if furthest is None or value > furthest[0]:
      furthest = value, apart, rates
  _, apart, rates = furthest
  if len(picked) == 1:
    for row, more in zip(table, rates, strict=True):
      row |= {key: value for key, value in more.items() if key not in row}
  return {key: _finite(value) for key, value in apart.items()}


def _validation(config, evidence):
  """(outputs, groups) of validation, where there are classes; else None."""
  outputs = evidence.outputs.get("validation", {}).get(guards.TUNED)
  if outputs is None or "index" not in outputs or not _classifies(outputs):
    return None
  outputs = _some(_known(outputs))
  return outputs, _groups(config, evidence, outputs, "validation")[0]


def _thresholds(config, evidence, found, outputs, groups, before):
  """{"thresholds": what one a group would do, or None, "untold": why}."""
  name = found["by"]
  if found["equalised_odds"] is None:
    return _untold(f"fewer than two groups have {config.fewest} rows of both labels")
  known, there = before or (None, {})
  if name not in there:
    return _untold(f"validation has no groups by {name}")
  lacking = {row["group"] for row in found["groups"] if not row["few"]} - set(there[name])
  if lacking:
    return _untold(f"validation has no rows of {', '.join(sorted(lacking))}")
  at = list(evidence.labels).index(found["positive"]) if evidence.labels else 1
  scores, seen = (stats.softmax(part["logits"])[:, at] for part in (known, outputs))
  fitted = fairness.thresholds(scores, np.asarray(known["label"]) == at, there[name],
                               config.fewest)
  truth = np.asarray(outputs["label"]) == at
  said = fairness.decided(seen, groups[name], fitted)
  apart = fairness.differences(fairness.rates(said, truth, groups[name]), config.fewest)
  return {"untold": None, "thresholds": {
      "at": fitted, "n": len(scores), "accuracy": float(np.mean(said == truth)),
      "accuracy_before": float(np.mean((seen > 0.5) == truth)),
      "equalised_odds": _finite(apart["equalised_odds"])}}


def _untold(reason):
  return {"thresholds": None, "untold": reason}


def _share(score):
  """{"n", "value", "interval"} of mean scores: Wilson where they are hits, else bootstrap."""
  hits = np.isin(score, (0.0, 1.0)).all()
  pair = stats.wilson(int(score.sum()), len(score)) if hits else stats.bootstrap(score, 1000)
  return {"n": len(score), "value": float(score.mean()), "interval": list(map(float, pair))}


def _classes(config, evidence, outputs):
  """Recall of each class that occurs, and whether the worst is no accident."""
  if not _classifies(outputs):
    return {"classes": [], "worst_class": None}
  label, said = np.asarray(outputs["label"]), np.argmax(outputs["logits"], 1)
  names = list(evidence.labels) or [str(i) for i in range(np.shape(outputs["logits"])[1])]
  right, table = (said == label).astype(np.float64), []
  for i in np.unique(label):
    share = _share(right[label == i])
    table.append({"label": names[i], "recall": share.pop("value"), **share,
                  "few": share["n"] < config.fewest})
  named = np.array(names)[label]
  # Test sets of many classes have few rows of each, and permutation takes account of it.
  fewest = config.fewest if sum(not row["few"] for row in table) > 1 else 10
  return {"classes": sorted(table, key=lambda row: row["recall"]),
          "worst_class": fairness.worst(right, named, "max", fewest)}


def _clusters(config, evidence, outputs, score):
  """The metric in each cluster of the features; None where there are none to be made of them."""
  part = evidence.features.get("test") or {}
  features, index = part.get("features"), part.get("index")
  if not config.clusters or features is None or index is None or np.ndim(features) != 2 \
      or "index" not in outputs:
    return None
  place = {int(row): i for i, row in enumerate(index)}
  kept = [i for i, row in enumerate(outputs["index"]) if int(row) in place]
  if len(kept) > COMPARED:
    kept = np.sort(np.random.default_rng(0).choice(kept, COMPARED, replace=False))
  if len(kept) < 2 * config.fewest:
    return None
  x = np.asarray(features, np.float32)[[place[int(outputs["index"][i])] for i in kept]]
  group, score = _kmeans(x, min(config.clusters, len(kept) // config.fewest)), score[kept]
  fewest = max(config.fewest, int(np.ceil(SMALLEST * len(kept))))
  label = np.asarray(outputs["label"])[kept] if _classifies(outputs) else None
  table = []
  for value in np.unique(group):
    here = group == value
    row = {"group": str(value), **_share(score[here]), "few": bool(here.sum() < fewest)}
    if label is not None and evidence.labels:
      row["label"] = evidence.labels[int(np.bincount(label[here]).argmax())]
    table.append(row)
  return {"n": len(kept), "groups": table,
          "worst": fairness.worst(score, group, evidence.mode, fewest)}


def _kmeans(x, k):
  """(N,) names of clusters."""
  import threadpoolctl
  from sklearn import cluster

  with threadpoolctl.threadpool_limits(1):
    found = cluster.KMeans(k, n_init=1, max_iter=30, random_state=0).fit_predict(x)
  return np.array([f"cluster {i + 1}" for i in found])


def _verdict(config, numbers):
  """(verdict, words)."""
  metric, share = numbers["metric"], _is_share(numbers)
  faults, said = [], []
  for found in numbers["by"]:
    worst, odds = found["worst"], found.get("equalised_odds")
    if worst and share and worst["p"] < CHANCE and worst["gap"] > config.gap:
      faults.append((worst["gap"], _lies_below(worst, metric, f"by {found['by']}")))
    if worst and _errs(config, numbers, worst):
      faults.append((0.0, _lies_above(worst, metric, f"by {found['by']}")))
    if odds is not None and odds > max(config.odds, found["chance"]):
      faults.append((odds, f"error rates for {found['positive']!r} are up to {100 * odds:.1f} "
                     f"points apart by {found['by']}"))
  for worst, what in ((numbers["worst_class"], "class"),
                      ((numbers["clusters"] or {}).get("worst"), "cluster of similar rows")):
    if worst and (share or what == "class") and worst["p"] < CHANCE \
        and worst["gap"] > config.part_gap:
      faults.append((worst["gap"], _lies_below(
          worst, "recall" if what == "class" else metric, f"the worst {what}")))
    elif worst and what != "class" and _errs(config, numbers, worst):
      faults.append((0.0, _lies_above(worst, metric, f"the worst {what}")))
  faults.sort(key=lambda fault: -fault[0])
  said = [words for _, words in faults[:3]]
  more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
  verdict = "ok" if not faults else "alarm" if faults[0][0] > config.alarm else "warning"
  lacking = f" Not measured: {'; '.join(numbers['missing'])}." if numbers["missing"] else ""
  if faults:
    return verdict, f"{_capital('; '.join(said))}{more} (n = {numbers['n']:,}).{lacking}"
  looked = _compared(numbers)
  return verdict, (f"No part of test is worse than the others by more than stated limits and "
                   f"chance; compared were {', '.join(looked)} (n = {numbers['n']:,}).{lacking}")


def _compared(numbers):
  """What had two groups with rows enough, in words."""
  clusters = numbers["clusters"] or {}
  return [*[f"groups by {found['by']}" for found in numbers["by"] if found["worst"]],
          *["classes"] * bool(numbers["worst_class"]), *["clusters"] * bool(clusters.get("worst"))]


def _is_share(numbers):
  """Whether the metric is a share of rows: limits in points make sense of no other."""
  values = [row["value"] for found in numbers["by"] for row in found["groups"]]
  return numbers["mode"] == "max" and all(0 <= v <= 1 for v in [numbers["average"], *values])


def _lies_below(worst, metric, where):
  return (f"{where}, {worst['group']} has {100 * worst['value']:.1f} % {metric} against "
          f"{100 * worst['average']:.1f} % on average (n = {worst['n']:,})")


def _errs(config, numbers, worst):
  """Whether a group's error is further above the average than chance and the limit."""
  return (numbers["mode"] == "min" and worst["p"] < CHANCE
          and worst["gap"] > config.error * abs(worst["average"]))


def _lies_above(worst, metric, where):
  return (f"{where}, {worst['group']} has {worst['value']:.3g} {metric} against "
          f"{worst['average']:.3g} on average (n = {worst['n']:,})")


def _capital(text):
  return text[:1].upper() + text[1:]


def _finite(value):
  """JSON has no NaN."""
  return None if isinstance(value, float) and not np.isfinite(value) else value
