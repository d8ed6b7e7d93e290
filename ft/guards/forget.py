"""Forgetting: what did the pretrained model know that the tuned one no longer does?

Both models are asked the same after training: language models for general text (nats a token),
every model for the run's own validation rows (forward KL divergence, or how far the features went
where the label head is new) and for what its layers make of general text or those rows (linear CKA,
Kornblith et al. 2019), and with `probe` what a frozen probe reads of another task. Beside it stands
what the pretrained model did on the further test sets without training, how far each layer's
weights moved, and, where average.wise was swept, the curve between the two models.

Cost: forward passes, as many as `share` of the training's work allows, and one read of the
checkpoint where pretrained weights trained. Nothing is asked of a model that started from random
weights, or of which only the head trained.
Source: forward KL on new rows is what forgetting follows (arXiv:2509.04259).
"""

import time

import numpy as np
from absl import logging
from ml_collections import config_dict

from ft import errors, guards, probes, retention, stats, tune
from ft import models as families
from ft.data import loader as loaders
from ft.data import sources
from ft.guards import overfit
from ft.tasks import lm

KEYS = {
    "on": (True, "measure what the pretrained model knew and the tuned one lost"),
    "source": ("editorials", "general text: editorials (of vaderSentiment, in the package index), "
               "or a source of texts as data.train; '': none"),
    "column": ("text", "column of its texts"),
    "rows": (512, "most rows that both models are asked", (32, None)),
    "tokens": (64, "general texts of more tokens than this are left out", (8, None)),
    "share": (0.05, "most that asking may compute, over what training computed", (0.0, None)),
    "probe": (None, "another task: {source, columns, …} of rows with labels, as in data.extra",
              "dict"),
    "nats": (0.1, "nats a token of general text more than before that count as a warning",
             (0.0, None)),
    "nats_alarm": (0.5, "nats a token of general text more than before that count as an alarm",
                   (0.0, None)),
    "cka": (0.5, "similarity of any layer to the pretrained one's below which is a warning",
            (0.0, 1.0)),
    "points": (0.05, "accuracy that the probe of another task may lose before it is a warning",
               (0.0, 1.0)),
}

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014"
EDITORIALS = {
    "source": f"pypi:vaderSentiment==3.3.2/{ARCHIVE}/nytEditorialSnippets_GroundTruth.txt",
    "format": "tsv", "header": False, "names": ("id", "rating", "text")}
FEWEST = 30
RESAMPLES = 300  # of metrics that are no mean: each resample is computed anew
AT_LEAST = 64  # rows that are asked however short the training was
SHORT = 32  # tokens that most general texts fit in
PARTS = 5  # of the cross-validated probe
STRENGTH = 30.0  # of that probe, see ft/probes.py


def gather(config, context):
  """Asks both models; returns the numbers of `measure` but for those of the further test sets."""
  run, began = context.run, time.monotonic()
  if not run.pretrained.report.matched:
    raise guards.Missing("nothing was pretrained: the run started from random weights")
  if not context.tuned.table:
    raise guards.Missing("nothing trained")
  if context.tuned.only_head and run.config.model.batch_stats != "train":
    return {"only_head": True}
  base, tuned = retention.sides(context)
  if retention.untrained(run, base):
    raise guards.Missing("nothing was pretrained: the checkpoint's weights are random")
  asker = retention.Asker(run, base, tuned)
  found = {"missing": [], "tradeoff": list(context.final.tradeoff)}
  for part in (_general, _divergence, _similarity, _probe, _weights):
    try:
      found |= part(config, context, asker, found)
    except guards.Missing as reason:
      found["missing"].append(str(reason))
    except errors.UserError as reason:
      found["missing"].append(f"{part.__name__.strip('_')}: {reason}")
    except errors.Preempted:
      raise
    # As in `guards.gather`: what one part cannot do must not cost the others.
    except Exception as error:  # noqa: BLE001
      logging.exception("guard forget: %s failed", part.__name__)
      found["missing"].append(f"{part.__name__.strip('_')} failed: {type(error).__name__}: {error}")
  found["seconds"] = time.monotonic() - began
  return {key: value for key, value in found.items() if key != "asked"}


def measure(config, evidence):
  """The guard; numbers, each part absent where `missing` (a list of reasons) says why.

  only_head: True where the body is the pretrained one, bit for bit, and nothing else is there.
  text: source, n (texts), tokens, before, after, difference (nats/token), interval.
  divergence: kind, value, interval, unit, n. cka: inputs, n, layers: layer, cka; chance (of the
  last layer, rows matched at random). weights: layer, relative. probe: source, before, after,
  difference, interval (accuracies, out-of-fold), n, classes. retention, of further test sets:
  split, metric, before, after, difference, lo, hi, n, verdict. tradeoff: see `averaging.Final`.
  seconds: that asking took.
  """
  found = evidence.gathered.get("forget")
  if found is None:
    return guards.not_measured("the models were not asked after training")
  if found.get("only_head"):
    return guards.result("ok", "Only the head trained: the body is the pretrained one, bit for "
                         "bit, and has forgotten nothing.", found)
  found = {**found, "retention": _retention(evidence)}
  verdicts, words = [], []
  for judge in (_judge_text, _judge_cka, _judge_divergence, _judge_probe, _judge_retention,
                _judge_tradeoff):
    verdict, said = judge(config, found)
    verdicts += [verdict] if verdict else []
    words += [said] if said else []
  if not verdicts:
    return {**guards.not_measured("; ".join(found["missing"]) or "no model could be asked"),
            "numbers": found}
  text = "; ".join(words) + "."
  return guards.result(max(verdicts, key=guards.VERDICTS.index), text[0].upper() + text[1:], found)


# ---- Asking both models --------------------------------------------------------------------------


def _general(config, context, asker, found):
  """Nats a token of general text, and what the layers make of it."""
  run = context.run
  family = families.family_module(run.pretrained.family).Model
  if run.config.data.modality != "text":
    return {}
  own = run.task.metric[0] == "nats_per_token" and not run.task.needs
  if hasattr(family, "decode") and not own:
    return {}
  if not config.source:
    raise guards.Missing("no general text: guard.forget.source is empty")
  writes = getattr(run.pretrained.config, "head", "") == "lm" and not hasattr(family, "decode")
  task = lm.Task.from_spec({}, run.preprocess) if writes else run.task if own else None
  rows = read_texts(config)
  limit = _limit(config, context, tokens=SHORT)
  # Some are too long or too short: three times as many are looked at.
  rows = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:3 * limit]))
  examples = loaders.prepare(rows, task.example if task else lambda row: run.preprocess(
    {"text": row["text"]}), preprocess=run.preprocess)
  short = np.flatnonzero(examples.lengths <= config.tokens)
  if len(short) < FEWEST:
    raise guards.Missing(f"general text: {len(short)} of {len(examples)} texts have at most "
                         f"guard.forget.tokens={config.tokens} tokens, fewer than {FEWEST}")
  examples = examples.select(short[:limit])
  ask = retention.pooled(task.predict if task else _forward(run))
  base, tuned = asker(ask, examples, _size(run), buckets=(SHORT,))
  numbers = {"asked": (f"general text ({config.source})", base, tuned)}
  if task:
    numbers["text"] = {"source": config.source, **_nats(base, tuned)}
  return numbers


def read_texts(config):
  """The rows {"text"} of guard.forget.source; Missing where there are none."""
  spec = EDITORIALS if config.source == "editorials" else config.source
  data = _data("text", {"text": config.column})
  try:
    rows = sources.read(data, spec, name="guard.forget.source")
  except errors.UserError as error:
    raise guards.Missing(f"general text: {error}") from error
  if not len(rows):
    raise guards.Missing(f"general text: {config.source} is empty")
  return rows


def _divergence(config, context, asker, found):
  """How far the answers to the run's own validation rows are from those of the base."""
  run, task = context.run, context.run.task
  fresh = any(tune.under(path, run.pretrained.head)
              for path in run.pretrained.report.initialised)
  kind = "drift" if fresh and hasattr(task, "drift") else "divergence"
  if not hasattr(task, kind):
    raise guards.Missing(f"divergence: task.name={run.config.task.name} has no distribution to "
                         "compare")
  if fresh and kind == "divergence":
    raise guards.Missing("divergence: the head is new, so the pretrained model has no answer of "
                         "its own")
  most = max(FEWEST, _limit(config, context) // 4)  # row by row, and longer than general texts
  examples = loaders.take(context.examples["validation"], most, 0)
  if len(examples) < FEWEST:
    raise guards.Missing(f"divergence: validation has {len(examples)} rows, fewer than {FEWEST}")
  made = asker.apart(getattr(task, kind), examples, _size(run), _buckets(run))
  total, weight = np.asarray(made["total"], np.float64), np.asarray(made["weight"], np.float64)
  lo, hi = stats.bootstrap_metric(lambda t, w: t.sum() / max(w.sum(), 1e-12), (total, weight))
  unit = "of their squared length" if kind == "drift" else (
    "nats a token" if isinstance(task, lm.Task) else "nats a row")
  if run.config.task.name == "forecast":
    unit = "half a squared standard deviation a value"
  return {"divergence": {
      "kind": "features" if kind == "drift" else "answers", "unit": unit,
      "value": float(total.sum() / max(weight.sum(), 1e-12)), "interval": [lo, hi],
      "n": len(total)}}


def _similarity(config, context, asker, found):
  """Linear CKA of each layer, on general text where it was read, else on validation rows."""
  run = context.run
  inputs, base, tuned = found.get("asked") or (None, None, None)
  if base is None:
    examples = loaders.take(context.examples["validation"], _limit(config, context), 0)
    inputs = "validation rows"
    base, tuned = asker(retention.pooled(_own_pass(run)), examples, _size(run), _buckets(run))
  count = len(base["index"])
  if count < FEWEST:
    raise guards.Missing(f"similarity of layers: {count} rows, fewer than {FEWEST}")
  layers = [{"layer": key.removeprefix("part/"), "cka": retention.cka(base[key], tuned[key])}
            for key in base if key.startswith("part/") and key in tuned]
  layers = [row for row in layers if np.isfinite(row["cka"])]
  if not layers:
    raise guards.Missing("similarity of layers: the model shows none of them")
  last = f"part/{layers[-1]['layer']}"
  return {"cka": {"inputs": inputs, "n": count, "layers": layers,
                  "chance": retention.chance(base[last], tuned[last])}}


def _probe(config, context, asker, found):
  """Accuracy, out of fold, of a logistic regression on what the head reads of another task."""
  if not config.probe:
    return {}
  run, spec = context.run, dict(config.probe.items())
  data = _data(run.config.data.modality, {})
  rows = sources.read(data, spec, name="guard.forget.probe")
  if rows.classes is None:
    raise guards.Missing("probe: its rows have no label; name the column in guard.forget.probe."
                         "columns.label")
  limit = 2 * _limit(config, context)
  rows = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:limit]))
  names, target = np.unique([str(label) for label in rows.classes], return_inverse=True)
  examples = loaders.prepare(rows, lambda row: run.preprocess(
    {key: row[key] for key in sources.INPUTS if key in row}), preprocess=run.preprocess)
  target = target[examples.indices]
  few = np.bincount(target, minlength=len(names)).min()
  if len(names) < 2 or few < PARTS:
    raise guards.Missing(f"probe: {len(names)} labels, the rarest on {few} rows of {len(target)}; "
                         f"two and {PARTS} are needed")
  base, tuned = asker(retention.pooled(_forward(run)), examples, _size(run), _buckets(run))
  right = [_out_of_fold(part["part/last"], target) == target for part in (base, tuned)]
  difference, lo, hi = stats.paired_bootstrap(right[1].astype(float), right[0].astype(float))
  return {"probe": {"source": spec.get("source"), "before": float(right[0].mean()),
                    "after": float(right[1].mean()), "difference": difference,
                    "interval": [lo, hi], "n": len(target), "classes": len(names)}}


def _weights(config, context, asker, found):
  """How far each layer's weights went; of adapters, what they add is folded in."""
  tuned = context.final.tuned
  if tuned.merge is None or context.run.config.tune.quantize != "none":
    raise guards.Missing("change of weights: this way of tuning leaves none that could be compared")
  return {"weights": retention.moved(tuned, asker.base, asker.tuned)}


def _own_pass(run):
  """As `_forward`, of the run's own rows, which the task knows how to read."""
  def own_pass(apply, variables, batch):
    run.task.features(apply, variables, batch)
    return {}

  return own_pass


def _forward(run):
  """(apply, variables, batch) -> {}: a pass over the batch's inputs, for `retention.pooled`."""
  def forward(apply, variables, batch):
    inputs = {key: value for key, value in batch.items() if key not in ("weight", "index")}
    apply(variables, run.preprocess.finish(inputs), None)
    return {}

  return forward


def _nats(base, tuned) -> dict:
  """Numbers of nats a token before and after, and their paired difference."""
  tokens = np.asarray(base["tokens"], np.float64)
  nats = [np.asarray(part["nll"], np.float64) for part in (base, tuned)]
  before, after = (float(part.sum() / tokens.sum()) for part in nats)
  lo, hi = stats.bootstrap_metric(lambda d, t: d.sum() / t.sum(), (nats[1] - nats[0], tokens))
  return {"n": len(tokens), "tokens": int(tokens.sum()), "before": before, "after": after,
          "difference": after - before, "interval": [lo, hi]}


def _out_of_fold(features, target):
  """Predicted labels (N,) of rows by a probe that was fitted without them."""
  from sklearn import model_selection

  said = np.empty(len(target), int)
  folds = model_selection.StratifiedKFold(PARTS, shuffle=True, random_state=0)
  for known, rest in folds.split(features, target):
    probe = next(probes.probes(features[known], target[known], target.max() + 1, (STRENGTH,)))
    said[rest] = probe(features[rest]).argmax(1)
  return said


def _limit(config, context, tokens: int = 0) -> int:
  """Rows whose passes through both models cost `share` of what training computed.

  A step of training is three forward passes, and asking two models is two.

  Args:
    tokens: of the rows that are asked, where they are other rows than those of training.
  """
  c = context.run.config.train
  seen = c.steps * c.batch or c.epochs * len(context.training)
  known = tokens and context.tokens_each is not None
  seen *= context.tokens_each / tokens if known else context.rows_each
  return int(min(config.rows, max(AT_LEAST, config.share * 1.5 * seen)))


def _size(run) -> int:
  return run.config.train.eval_batch or 2 * run.config.train.batch


def _buckets(run) -> tuple:
  return getattr(run.preprocess, "buckets", ())


def _data(modality: str, columns: dict):
  """A `data` section of defaults: another source is not written as the run's own."""
  defaults = {key: entry[0] for key, entry in sources.KEYS.items()}
  return config_dict.ConfigDict({**defaults, "modality": modality, "columns": columns})


# ---- Judging -------------------------------------------------------------------------------------


def _retention(evidence) -> list[dict]:
  """What the pretrained model did on the further test sets, and what the tuned one does."""
  found = []
  for split in evidence.extra:
    rows = evidence.outputs.get(split, {})
    row = overfit.differences(guards.Evidence(
      metric=evidence.metric, mode=evidence.mode, score=evidence.score, metrics=evidence.metrics,
      value=evidence.value, count=evidence.count, blocks=evidence.blocks,
      outputs={split: {name: rows[name] for name in (guards.ZERO_SHOT, guards.TUNED)
                       if name in rows}}), RESAMPLES).get(split)
    if row:
      row = next(iter(row.values()))
      before, after = (float(evidence.metrics(rows[name])[row["metric"]])
                       for name in (guards.ZERO_SHOT, guards.TUNED))
      found.append({"split": split, "before": before, "after": after, **row})
  return found


def _judge_text(config, found):
  text = found.get("text")
  if not text:
    return None, ""
  change, clear = text["difference"], text["interval"][0] > 0
  verdict = ("alarm" if clear and change > config.nats_alarm
             else "warning" if clear and change > config.nats else "ok")
  row = {"difference": change, "lo": text["interval"][0], "hi": text["interval"][1]}
  return verdict, (f"general text ({text['source']}): {overfit.signed(row, 'nats_per_token')}, "
                   f"{text['before']:.2f} → {text['after']:.2f}, n = {text['n']:,} texts")


def _judge_cka(config, found):
  similar = found.get("cka")
  if not similar:
    return None, ""
  lowest = min(similar["layers"], key=lambda row: row["cka"])
  verdict = "warning" if lowest["cka"] < config.cka else "ok"
  return verdict, (f"on {similar['inputs']} the layers resemble the pretrained ones by at least "
                   f"{lowest['cka']:.2f} ({lowest['layer']}; 1: the same, {similar['chance']:.2f}: "
                   f"chance; n = {similar['n']:,})")


def _judge_divergence(config, found):
  apart = found.get("divergence")
  if not apart:
    return None, ""
  lo, hi = apart["interval"]
  return "ok", (f"{apart['kind']} on validation went {apart['value']:.3g} [{lo:.3g}, {hi:.3g}] "
                f"{apart['unit']} away (n = {apart['n']:,})")


def _judge_probe(config, found):
  probe = found.get("probe")
  if not probe:
    return None, ""
  lo, hi = probe["interval"]
  lost = hi < 0 and -probe["difference"] > config.points
  row = {"difference": probe["difference"], "lo": lo, "hi": hi}
  return "warning" if lost else "ok", (
    f"a probe of another task: {overfit.signed(row, 'accuracy')} ({100 * probe['before']:.1f} → "
    f"{100 * probe['after']:.1f} %, n = {probe['n']:,})")


def _judge_retention(config, found):
  rows = found.get("retention") or []
  lost = [row for row in rows if row["verdict"] == "lost"]
  if not rows:
    return None, ""
  said = ", ".join(f"{row['split']} {overfit.signed(row, row['metric'])}" for row in lost)
  return ("warning", f"worse than before training on {said}") if lost else (
    "ok", f"no worse than before training on {', '.join(row['split'] for row in rows)}")


def _judge_tradeoff(config, found):
  chosen = [row["alpha"] for row in found.get("tradeoff") or () if row.get("chosen")]
  return (None, f"of the mixtures with the pretrained weights, {chosen[0]:g} of the tuned ones was "
          "best on validation and is what was judged (see the curve)") if chosen else (None, "")
