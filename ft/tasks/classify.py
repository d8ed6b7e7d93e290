"""Classification: one label an example (softmax), or any number of them (sigmoid).

Shapes: B batch, N rows of a split, C classes, D features. Losses and metrics work on logits (B, C);
labels are int32 (B,), or multi-hot float32 (B, C) for `labels_kind="multi"`. The label -1 is one of
`data.unknown`, which the model has no class for: any answer to such a row is wrong.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from ft import (
  abstaining,
  errors,
  group_thresholds,
  mixing,
  neighbours,
  probes,
  screening,
  stats,
  tune,
  zero_shot,
)

KEYS = {
  "labels_kind": ("single", "one label an example, or several (a list, or a|b)",
                  ["single", "multi"]),
  "class_weights": ("none", "balanced: every class counts the same in the loss",
                    ["none", "balanced"]),
  "logit_adjustment": (0.0, "tau: training logits get tau * log prior, for rare classes",
                       (0.0, None)),
  "label_smoothing": (0.0, "share of the target spread over all classes", (0.0, 0.99)),
  "mixup": (0.0, "alpha of the Beta that mixes pairs of images and labels; 0: off", (0.0, None)),
  "cutmix": (0.0, "alpha of the Beta of the share that a box from another image takes; 0: off",
             (0.0, None)),
  "coverage": (0.0, "share of validation rows that are answered, and below whose confidence "
               "predictions abstain; 0: all are", (0.0, 1.0)),
  "specificity": (0.0, "share of negatives that the threshold from which rows are flagged as "
                  "positive leaves below it on validation; 0: none is flagged", (0.0, 1.0)),
  "thresholds": ("", "column of data.attributes whose groups get a threshold each, of two labels, "
                 "fitted on validation; rows of tables and texts have it at prediction; empty: no"),
  "prevalence": (0.0, "share of positives that predictive values and net benefit are stated for; "
                 "0: that of each split", (0.0, 1.0)),
  "positive": ("", "label that counts as positive; empty: the second of two"),
  "unseen": ("error", "labels that train lacks: an error, or classes of which nothing is learnt",
             ["error", "class"]),
  "neighbours": (0, "k of the baseline that asks the k nearest training rows, by cosine of the "
                 "untuned features; 0: none", (0, None)),
  "zero_shot": ("", "source of the CLIP that model.source names, too: its texts tell the classes "
                "in a baseline; empty: none"),
  "prompts": (("a photo of a {label}.",), "zero_shot: what its texts say, averaged", "list"),
  "metric": ("accuracy", "what the best checkpoint is chosen by",
             ["accuracy", "macro_f1", "auroc"]),
}

# What a batch holds beside the model's inputs.
BOOKKEEPING = ("label", "group", "weight", "index", "stop")
BEST = 5  # labels among which the true one may be, in a metric beside accuracy


class Task:
  """Losses, predictions, metrics and baselines of classification; pure functions, no loop.

  Everywhere `apply(variables, inputs, rng)` returns the model's outputs, a dict with "logits" and
  "features"; rng None is evaluation. A batch with "features" in place of inputs goes to the head.

  Attributes:
    labels: class names by index; integers in their order, other names sorted.
    model_args: what the model has to be loaded with.
    metric: (name, "max").
    needs: roles that a row has to have beside the model's inputs.
    head_features: `features` are what the head reads, so that a head alone can be trained on them.
  """

  needs = ("label",)
  head_features = True

  def __init__(self, config, data, preprocess):
    """Settles the classes from the training rows.

    Args:
      config: the section `task`.
      data: a `sources.Data`; every label of every split has to occur in its train rows.
      preprocess: the modality's, row -> example; `finish(batch)` runs on the device.

    Raises:
      UserError: no labels, a single class, a measured value as label, a label that train lacks,
        or mixup of something other than images.
    """
    for key in ("mixup", "cutmix"):
      if config[key] and "image" not in data.columns:
        raise errors.UserError(f"task.{key} mixes images, and the data has none; set it to 0")
    if config.labels_kind == "multi" and config.coverage:
      raise errors.UserError("task.coverage is for one label an example; set it to 0")
    named = {name: _named_labels(rows, config.labels_kind) for name, rows in data.splits.items()}
    known = named.values() if config.unseen == "class" else [named["train"]]
    labels = _order({label for rows in known for names in rows for label in names}
                    - set(getattr(data, "unknown", ())))
    for key, off in (("specificity", "0"), ("zero_shot", "''")):
      if config.labels_kind == "multi" and config[key]:
        raise errors.UserError(f"task.{key} is for one label an example; set it to {off}")
    self._settle(config.labels_kind, labels, config.metric, preprocess,
                 getattr(data, "unknown", ()), config.coverage,
                 (config.positive, config.specificity, config.prevalence))
    self._groups = group_thresholds.settle(
      config.thresholds, () if self.multi else labels, data, not config.coverage)
    for name, rows in data.splits.items():
      self._check_known(named[name], rows)
    there = _order({label for names in named["train"] for label in names})
    if len(there) < 2 - self.multi:
      raise errors.UserError(
        f"train has the label {', '.join(there) or '(none)'} only; a classifier needs two"
      )
    self._config = config
    counts = np.zeros(len(labels))
    for names in named["train"]:
      counts[[self._index[label] for label in names]] += 1
    self._set_priors(counts, len(named["train"]))

  def _settle(self, kind, labels, metric, preprocess, unknown=(), coverage=0.0,
              screens=("", 0.0, 0.0)):
    self.multi, self._unknown, self._coverage = kind == "multi", tuple(unknown), coverage
    self._groups = None
    self.labels = list(labels)
    self._screens, self._screening = screens, screening.settle(self.labels, *screens)
    self.metric = (metric, "max")
    self.model_args = {"num_labels": len(self.labels), "labels": self.labels,
                       **getattr(preprocess, "model_args", {})}
    self.preprocess = preprocess
    self._index = {label: i for i, label in enumerate(self.labels)}

  def _set_priors(self, counts, rows: int):
    """Class weights and log priors, constants of the loss, from the counts (C,) of train."""
    classes, weighted = len(counts), self._config.class_weights == "balanced"
    share = counts / rows
    if self.multi:
      # Half a row keeps labels that all or no rows have finite.
      share = (counts + 0.5) / (rows + 1)
      self._log_prior = np.log(share) - np.log1p(-share)
      balanced = np.stack([0.5 / (1 - share), 0.5 / share])
      self._class_weights = balanced if weighted else np.ones((2, classes))
    else:
      if not counts.all():  # as above, for classes that task.unseen adds
        share = (counts + 0.5) / (rows + 0.5 * classes)
      self._log_prior = np.log(share)
      self._class_weights = 1 / (classes * share) if weighted else np.ones(classes)

  def _check_known(self, named, rows):
    for i, names in enumerate(named):
      for label in names:
        if label not in self._index and label not in self._unknown:
          raise errors.UserError(
            f"{rows.where(i)}: label {label!r} of {rows.name} does not occur in train"
            f"{errors.suggest(label, self._index)}; train has {_some(self.labels)}"
          )

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"labels": self.labels, "labels_kind": "multi" if self.multi else "single",
            "metric": self.metric[0], "unknown": list(self._unknown), "coverage": self._coverage,
            "screening": list(self._screens),
            "thresholds": self._groups and [self._groups.by, list(self._groups.groups)]}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can predict and describe (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(spec["labels_kind"], spec["labels"], spec["metric"], preprocess,
                 spec.get("unknown", ()), spec.get("coverage", 0.0),
                 spec.get("screening", ("", 0.0, 0.0)))
    if named := spec.get("thresholds"):
      task._groups = group_thresholds.GroupThresholds(named[0], tuple(named[1]))
    return task

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    return {"labels": self.labels, "mode": self.metric[1]}

  def company(self, pretrained, tuned, sharding: Callable) -> tuple[dict, dict]:
    """Returns (nothing that trains; what `zero_shot.logits` needs, where task.zero_shot is set)."""
    del pretrained, tuned
    c = self._config
    if not c.zero_shot:
      return {}, {}
    made = zero_shot.classifier(c.zero_shot, self.labels, c.prompts)
    return {}, jax.tree.map(lambda x: jax.device_put(x, sharding(np.shape(x))), made)

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns `unlabelled(row)` with "label": () int32, or (C,) float32 multi-hot."""
    example = self.unlabelled(row)
    names = _names(row["label"], self.multi)
    if self.multi:
      label = np.zeros(len(self.labels), np.float32)
      label[[self._number(name) for name in names]] = 1
    else:
      label = np.int32(self._number(names[0]))
    return {**example, "label": np.asarray(label)}

  def unlabelled(self, row: dict) -> dict:
    """Returns preprocess(row): an example for what takes no loss of its label.

    With task.thresholds also "group": () int32, see `group_thresholds`.
    """
    example = self.preprocess(row)
    return {**example, "group": self._groups.code(row)} if self._groups else example

  def _number(self, name: str) -> int:
    if name in self._unknown:
      return -1
    if name not in self._index:
      raise errors.UserError(f"label {name!r} does not occur in train"
                             f"{errors.suggest(name, self._index)}; train has {_some(self.labels)}")
    return self._index[name]

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over the batch: (total, weight, {"accuracy": …}); weight 0 masks a row.

    Single: softmax cross-entropy against smoothed targets, rows weighted by class (normalised by
    the sum of the weights, as torch's CrossEntropyLoss). Multi: mean sigmoid cross-entropy over
    the classes. Logit adjustment: Menon et al. (2021).
    """
    inputs, hot = self._inputs(batch), self._hot(batch["label"])
    if (self._config.mixup or self._config.cutmix) and rng is not None:
      inputs, hot = mixing.mix(inputs, hot, batch["weight"], rng, self._config.mixup,
                               self._config.cutmix)
    raw = apply(variables, inputs, rng)["logits"].astype(jnp.float32)
    logits = raw + self._config.logit_adjustment * jnp.asarray(self._log_prior, jnp.float32)
    losses, rows = self._losses(logits, hot)
    rows = rows * batch["weight"]
    right = self._right(raw, hot)
    return jnp.sum(losses * batch["weight"]), jnp.sum(rows), {"accuracy": jnp.sum(rows * right)}

  def divergence(self, apply: Callable, variables, base_variables, batch: dict,
                 temperature: float = 1.0) -> tuple:
    """Returns (total, weight), sums over rows: T² KL(base ‖ ours) of the label distributions.

    Rows weigh as in the loss; of several labels a row, the mean over them. Both sides pass
    gradients on. T² keeps the gradient's size (Hinton et al. 2015, arXiv:1503.02531).
    """
    inputs = self._inputs(batch)
    ours, base = (apply(v, inputs, None)["logits"].astype(jnp.float32) / temperature
                  for v in (variables, base_variables))
    if self.multi:
      each = jnp.mean(_kl(jnp.stack([base, 0 * base], -1), jnp.stack([ours, 0 * ours], -1)), -1)
    else:
      each = _kl(base, ours)
    weight = self._row_weights(batch)
    return temperature**2 * jnp.sum(each * weight), jnp.sum(weight)

  def drift(self, apply: Callable, variables, base_variables, batch: dict) -> tuple:
    """Returns (total, weight), sums over rows: how far the head's features are from the base's.

    The squared distance over the squared norm of the base's: what a base whose label head is new
    can say of a row.
    """
    inputs = self._inputs(batch)
    ours, base = (apply(v, inputs, None)["features"].astype(jnp.float32)
                  for v in (variables, base_variables))
    rest = tuple(range(1, base.ndim))
    each = jnp.sum(jnp.square(ours - base), rest) / jnp.maximum(
      jnp.sum(jnp.square(base), rest), 1e-12)
    weight = self._row_weights(batch)
    return jnp.sum(each * weight), jnp.sum(weight)

  def _row_weights(self, batch: dict):
    """Returns (B,) how much rows weigh in the loss; those without a label by `weight` alone."""
    if "label" not in batch:
      return batch["weight"]
    hot = self._hot(batch["label"])
    return batch["weight"] * self._losses(jnp.zeros_like(hot), hot)[1]

  def _losses(self, logits, hot):
    """Returns weighted losses (B,) and the weights (B,) that normalise them."""
    weights = jnp.asarray(self._class_weights, jnp.float32)
    smooth = self._config.label_smoothing
    if self.multi:
      cells = hot * weights[1] + (1 - hot) * weights[0]
      targets = hot * (1 - smooth) + smooth / 2
      losses = optax.sigmoid_binary_cross_entropy(logits, targets)
      return jnp.mean(cells * losses, -1), jnp.mean(cells, -1)
    rows = hot @ weights
    targets = hot * (1 - smooth) + smooth / hot.shape[-1]
    return rows * optax.softmax_cross_entropy(logits, targets), rows

  def _right(self, logits, hot):
    """Returns (B,) whether the decision is the target's (its larger part's, where mixed)."""
    if self.multi:
      return jnp.all((logits > 0) == (hot > 0.5), -1)
    return jnp.argmax(logits, -1) == jnp.argmax(hot, -1)

  def _hot(self, label):
    return label if self.multi else jax.nn.one_hot(label, len(self.labels), dtype=jnp.float32)

  def _inputs(self, batch: dict) -> dict:
    """Returns the finished inputs of the model, or the cached features alone."""
    if "features" in batch:
      return {"features": batch["features"]}
    inputs = {key: value for key, value in batch.items() if key not in BOOKKEEPING}
    return self.preprocess.finish(inputs)

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"logits": (B, C) float32} and, where the batch has them, "label" and "group"."""
    logits = apply(variables, self._inputs(batch), None)["logits"].astype(jnp.float32)
    return {"logits": logits, **_beside(batch)}

  def features(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"features": (B, D) float32}, what the head reads, and what `predict` has beside.

    With task.zero_shot also "zero_shot" (B, C), the logits that prompts give.
    """
    outputs = apply(variables, self._inputs(batch), None)
    found = {"features": outputs["features"].astype(jnp.float32), **_beside(batch)}
    if "texts" in variables.get(tune.COMPANY, {}):
      found["zero_shot"] = zero_shot.logits(variables[tune.COMPANY], outputs["pooler_output"])
    return found

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the metrics of a split, at temperature 1.

    accuracy (multi: all labels of a row right), macro_f1, auroc, log_loss, ece, recall/<label> of
    the classes that occur, and top5_accuracy where there are more than five. All are NaN where a
    logit is not finite. Where labels are unknown: accuracy over all rows, the rest over the known
    ones, and what `abstaining.measure` gives. With task.specificity also
    sensitivity_at_specificity.

    Args:
      outputs: "logits" (N, C), "label" (N,) or (N, C).
    """
    raw, label = np.asarray(outputs["logits"], np.float64), np.asarray(outputs["label"])
    finite, logits = np.isfinite(raw).all(), np.where(np.isfinite(raw), raw, 0.0)
    whole, open_ = stats.accuracy(self._decisions(logits), label), {}
    if not self.multi and (label < 0).any():
      open_ = abstaining.measure(logits, label)
      logits, label = logits[label >= 0], label[label >= 0]
    probabilities, decisions = self._probabilities(logits), self._decisions(logits)
    found = {
      "accuracy": whole, **open_,
      "macro_f1": stats.macro_f1(decisions, label),
      "auroc": stats.auroc(probabilities, label),
      **self._among_best(logits, label),
      "log_loss": stats.log_loss(probabilities, label),
      "ece": stats.ece(probabilities, label),
      **self._recalls(decisions, label),
      **(self._screening.measure(probabilities, label) if self._screening else {}),
    }
    return {key: float(value) if finite else float("nan") for key, value in found.items()}

  def _among_best(self, logits, label) -> dict[str, float]:
    """Returns {"top5_accuracy"} where there are more than five classes, one a row."""
    if self.multi or len(self.labels) <= BEST or not len(label):
      return {}
    best = np.argpartition(-logits, BEST - 1, axis=1)[:, :BEST]
    return {f"top{BEST}_accuracy": (best == label[:, None]).any(axis=1).mean()}

  def _recalls(self, decisions, label) -> dict[str, float]:
    of = {i: (label[:, i] > 0 if self.multi else label == i) for i in range(len(self.labels))}
    said = {i: (decisions[:, i] if self.multi else decisions == i) for i in of}
    return {f"recall/{self.labels[i]}": said[i][rows].mean()
            for i, rows in of.items() if rows.any()}

  def _probabilities(self, logits):
    return stats.sigmoid(logits) if self.multi else stats.softmax(logits)

  def _decisions(self, logits):
    return np.asarray(logits) > 0 if self.multi else np.argmax(logits, axis=-1)

  def score(self, outputs: dict) -> np.ndarray:
    """Returns (N,) 1.0 where the row is decided right; their mean is the metric "accuracy"."""
    same = self._decisions(outputs["logits"]) == (np.asarray(outputs["label"]))
    return same.reshape(len(same), -1).all(axis=1).astype(np.float64)

  def value(self, outputs: dict) -> float:
    """Returns the selection metric of a split; for intervals where it is no mean of scores."""
    logits, label = np.asarray(outputs["logits"]), np.asarray(outputs["label"])
    if self.metric[0] != "accuracy" and not self.multi:
      logits, label = logits[label >= 0], label[label >= 0]
    if self.metric[0] == "auroc":
      return stats.auroc(self._probabilities(logits), label)
    measure = stats.macro_f1 if self.metric[0] == "macro_f1" else stats.accuracy
    return measure(self._decisions(logits), label)

  def calibrate(self, outputs: dict) -> dict:
    """Returns what is fitted to a split (validation).

    {"temperature": T} (`stats.fit_temperature`) and, with task.coverage, the "threshold" that this
    share of the rows' confidences, at that temperature, lies above; with task.specificity "flag",
    the calibrated probability from which a row is flagged as positive; with task.thresholds
    "groups", see `group_thresholds`.
    """
    found = {"temperature": stats.fit_temperature(outputs["logits"], outputs["label"])}
    if self._coverage:
      found["threshold"] = abstaining.threshold(outputs["logits"], found["temperature"],
                                                self._coverage)
    if self._screening:
      found["flag"] = self._screening.threshold(*self._known(outputs, found["temperature"]))
    if self._groups:
      found["groups"] = self._groups.fit(outputs)
    return found

  def _known(self, outputs: dict, temperature: float) -> tuple:
    """Returns calibrated probabilities (n, C) and labels (n,) of the rows with a known label."""
    label = np.asarray(outputs["label"])
    logits = np.asarray(outputs["logits"], np.float64)[label >= 0]
    return self._probabilities(logits / temperature), label[label >= 0]

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one row as JSON types.

    Args:
      outputs: "logits" (C,) and, with task.thresholds, "group" ().
      calibration: what `calibrate` returned.

    Returns:
      label (multi: list of the labels above one half; None where the confidence is below the
      threshold of task.coverage), confidence (calibrated probability of the
      label; multi: of the least certain of the decisions), probabilities {label: calibrated}; with
      task.specificity "flagged", whether the probability of the positive label reaches the
      threshold; with task.thresholds "group", whose threshold decided (None: the row has none).
    """
    logits = np.asarray(outputs["logits"], np.float64) / calibration["temperature"]
    chances = self._probabilities(logits)
    if self.multi:
      label = [name for name, p in zip(self.labels, chances, strict=True) if p > 0.5]
      confidence = np.maximum(chances, 1 - chances).min()
    else:
      label, confidence = self.labels[int(chances.argmax())], chances.max()
      if confidence < calibration.get("threshold", 0.0):
        label = None
    found = {
      "label": label, "confidence": float(confidence),
      "probabilities": {n: float(p) for n, p in zip(self.labels, chances, strict=True)},
    }
    if self._screening:
      found["flagged"] = bool(chances[self._screening.positive] >= calibration["flag"])
    if self._groups:
      found |= self._by_group(outputs, chances, calibration["groups"])
    return found

  def _by_group(self, outputs: dict, chances, at: Mapping) -> dict:
    """Returns "group" and, where that has a threshold, the "label" and "confidence" by it."""
    label = self._groups.decide(outputs["logits"], outputs["group"], at)
    if label is None:
      logging.log_first_n(logging.WARNING, "rows without a known %s are decided as ever; their "
                          "answers have group null", 1, self._groups.by)
      return {"group": None}
    return {"group": self._groups.group(outputs["group"]), "label": self.labels[label],
            "confidence": float(chances[label])}

  def evidence(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the card's fields about the tuned outputs: the confusion matrix of test, and what
    abstaining, flagging positives, and thresholds a group do on every split but validation."""
    test, found = outputs.get("test"), {}
    if self.multi or test is None:
      return {}
    matrix = stats.confusion(self._decisions(test["logits"]), test["label"], len(self.labels))
    found["confusion"] = {"labels": self.labels, "matrix": matrix.tolist()}
    if "threshold" in calibration:
      found["abstention"] = {"threshold": calibration["threshold"], "splits": {
        name: abstaining.account(part["logits"], part["label"], calibration)
        for name, part in outputs.items() if name != "validation"}}
    if self._screening:
      known = {name: self._known(part, calibration["temperature"])
               for name, part in outputs.items()}
      found["screening"] = {
        "positive": self.labels[self._screening.positive], "threshold": calibration["flag"],
        "asked": self._screening.specificity,
        "validation": float((known["validation"][1] == self._screening.positive).mean()),
        "splits": {name: self._screening.account(*part, calibration["flag"])
                   for name, part in known.items() if name != "validation"}}
    if self._groups:
      found["group_thresholds"] = {
        "by": self._groups.by, "positive": self.labels[1], "at": calibration["groups"],
        "splits": {name: self._groups.account(part, calibration["groups"])
                   for name, part in outputs.items() if name != "validation"}}
    return found

  def baselines(self, features: dict) -> dict:
    """Returns what no fine-tuning gets.

    Args:
      features: split -> {"features": (N, D), "label"}, with at least "train".

    Returns:
      "majority" (the shares of train), "probe" (logistic regression on the features, its
      regularisation chosen on validation), with task.neighbours "knn" (`ft/neighbours.py`) and with
      task.zero_shot "zero-shot" -> split -> {"logits": (N, C), "label"}.
    """
    train = features["train"]
    prior = np.asarray(self._log_prior, np.float32)
    found = {"majority": lambda x: np.broadcast_to(prior, (len(x), len(prior)))}
    if k := self._config.neighbours:
      found["knn"] = lambda x: neighbours.logits(x, train["features"], train["label"], k, prior)
    found["probe"] = self._probe(train, features.get("validation"))
    rows = {name: {split: {"logits": logits(part["features"]), "label": part["label"]}
                   for split, part in features.items()}
            for name, logits in found.items()}
    if "zero_shot" in train:
      rows["zero-shot"] = {
        split: {"logits": part["zero_shot"], "label": part["label"]}
        for split, part in features.items()}
    return rows

  def _probe(self, train: dict, validation: dict | None) -> Callable:
    """Returns features (N, D) -> logits (N, C) of the strength that is best on validation."""
    best, best_value = None, -np.inf
    for logits in probes.probes(train["features"], train["label"], len(self.labels)):
      if validation is None:
        return logits
      outputs = {"logits": logits(validation["features"]), "label": validation["label"]}
      value = self.value(outputs)
      if best is None or value > best_value:
        best, best_value = logits, value
    return best


def _kl(base, ours):
  """Returns KL(softmax(base) ‖ softmax(ours)) over the last axis."""
  known = jax.nn.log_softmax(base)
  return jnp.sum(jnp.exp(known) * (known - jax.nn.log_softmax(ours)), -1)


def _beside(batch: dict) -> dict:
  return {key: batch[key] for key in ("label", "group") if key in batch}


def _names(label, multi: bool) -> list[str]:
  """The class names of one row's label."""
  if not multi:
    return [str(label)]
  if isinstance(label, str):
    label = label.split("|")
  parts = label if isinstance(label, (list, tuple)) else [label]
  return [text for part in parts if (text := str(part).strip())]


def _named_labels(rows, kind: str) -> list[list[str]]:
  """The class names of each row of a split; UserError where a row has none that can be one."""
  labels = rows.labels
  if labels is None:
    raise errors.UserError(
      f"{rows.name} has no label; name its column in data.columns.label, "
      f"one of {', '.join(map(str, rows.table.columns))}"
    )
  for i, label in enumerate(labels):
    parts = label if isinstance(label, (list, tuple)) else [label]
    wrong = "is missing" if label is None else ""
    if any(isinstance(part, float) for part in parts):
      wrong = f"{label!r} is a measured value, no class; data.binarize makes classes of numbers"
    if kind == "single" and isinstance(label, (list, tuple)):
      wrong = f"{label!r} is a list; several labels an example need task.labels_kind='multi'"
    if wrong:
      raise errors.UserError(f"{rows.where(i)}: the label {wrong}")
  return [_names(label, kind == "multi") for label in labels]


def _order(labels) -> list[str]:
  """Integers by value, anything else by name."""
  try:
    return sorted(labels, key=int)
  except ValueError:
    return sorted(labels)


def _some(labels: list[str]) -> str:
  """The first labels, for a message."""
  more = f" and {len(labels) - 12} more" if len(labels) > 12 else ""
  return ", ".join(labels[:12]) + more
