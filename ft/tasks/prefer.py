"""Preference tuning: an answer that people prefer becomes likelier than one that they do not.

A row has a context and two answers to it (roles `prompt`, `chosen`, `rejected`) or, for task.loss=
kto, one answer that is good or bad (`prompt`, `completion`, `label`); `ft.data.answers` says in
which layouts. What is learnt of an answer is its tokens and the one that ends the turn, as in
task.name=chat. Both answers go through the model side by side, in one pass.

task.loss: dpo (label_smoothing above 0: conservative), ipo, hinge, robust and kto compare with a
reference, which is the model as it was loaded; orpo, simpo and cpo do not; reward makes a reward
model, a scalar head on the last token. See `ft.preferences` for formulas and papers. The loss is a
mean over rows, and the chosen answer's own loss (orpo and cpo have it) a mean over its tokens.

The reference is never in memory beside what trains: its log-probabilities of every row are computed
once, before the first step, and kept in the run's folder until the run is finished.

data.truncation=truncate-left shortens the context and never an answer. Shapes: B batch, T tokens, S
sides (2 answers or 1; one more for kto), N rows of a split.
"""

import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ft import contrastive, errors, preferences, stats
from ft.data import answers
from ft.tasks import chat, regress

KEYS = {
  "loss": ("dpo", "what is minimised; reward: a reward model (Bradley-Terry)",
           ["dpo", "ipo", "hinge", "robust", "orpo", "simpo", "cpo", "kto", "reward"]),
  "beta": (0.1, "scale of the margin; ipo: tau, orpo: lambda, simpo: 2 as a rule", (1e-6, None)),
  "label_smoothing": (0.0, "dpo, robust, simpo, cpo: share of pairs that are the wrong way round",
                      (0.0, 0.49)),
  "reference_free": (False, "dpo, ipo, hinge, robust: compare with no reference model"),
  "simpo_gamma": (0.5, "simpo: by how much the scaled nats a token should differ", (0.0, None)),
  "sft_weight": (None, "weight of the chosen answer's nats a token; not set: 1 for orpo and cpo, 0 "
                 "for others", "float"),
  "desirable_weight": (1.0, "kto: weight of good answers", (0.0, None)),
  "undesirable_weight": (1.0, "kto: weight of bad answers", (0.0, None)),
}

_SFT = ("orpo", "cpo")  # whose papers have the chosen answer's own loss beside theirs
# Keys that only some losses read.
_READERS = {
  "label_smoothing": ("dpo", "robust", "simpo", "cpo"),
  "reference_free": ("dpo", "ipo", "hinge", "robust"),
  "simpo_gamma": ("simpo",),
  "sft_weight": tuple(preferences.LOSSES),
  "desirable_weight": ("kto",),
  "undesirable_weight": ("kto",),
}
_TRIES = 20  # rows of train that are looked at for an answer to another context


class Task(chat.Task):
  """Losses, scores and metrics of preferences; pure functions, no loop.

  Attributes:
    metric: accuracy, the share of pairs whose chosen answer has the higher score; of single answers
      auroc, the share of (good, bad) pairs of them whose good one has.
    model_args: what the model has to be loaded with.
    needs: roles that a row has to have beside the model's inputs.
    head_features: whether `features` are what a reward head reads.
    refer: outputs of `features` -> what the loss needs of the reference; None without one.
    score: outputs -> (N,) 1 where the pair is right; None for single answers.
  """

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data` whose rows have answers.
      preprocess: text.Preprocess.

    Raises:
      UserError: no columns of answers that the loss can learn from, or a key that it does not read.
    """
    for key, losses in _READERS.items():
      if config[key] != KEYS[key][0] and config.loss not in losses:
        raise errors.UserError(f"task.{key}={config[key]}: task.loss={config.loss} does not read "
                               f"it, only {', '.join(losses)}")
    paired = {"chosen", "rejected"} <= set(data.columns)
    if not paired and (config.loss != "kto" or not {"completion", "label"} <= set(data.columns)):
      single = ("; or data.columns.completion and data.columns.label, of single answers"
                if config.loss == "kto" else "")
      raise errors.UserError(
        f"task.loss={config.loss} learns from two answers a row; name their columns in "
        f"data.columns.chosen and data.columns.rejected{single}")
    self._config, self._others = config, data.splits["train"]
    self._target = "target" in data.columns and config.loss == "reward"
    preprocess.columns = {} if config.loss == "reward" else {"turns": "turns"}
    self._settle(preprocess, {
      "loss": config.loss, "beta": float(config.beta), "paired": paired,
      "reference_free": bool(config.reference_free)})

  def _settle(self, preprocess, spec: Mapping) -> None:
    super()._settle(preprocess, {"generate_rows": 0, "max_reply": 1})
    self._spec, self._paired = dict(spec), spec["paired"]
    self._roles = ("chosen", "rejected") if self._paired else ("completion",)
    self._answers = answers.Answers(preprocess, self._roles)
    self.needs = self._roles if self._paired else ("completion", "label")
    self.metric = ("accuracy" if self._paired else "auroc", "max")
    self.score = self._right if self._paired else None
    name = spec["loss"]
    self._loss = preferences.LOSSES.get(name, preferences.Loss(None, False, name == "kto", ()))
    self._compares = self._loss.reference and not spec["reference_free"]
    self.refer = (lambda outputs: {"reference": outputs["logp"]}) if self._compares else None
    self.head_features = name == "reward"
    if self.head_features:
      self.model_args = {"head": "classify", "num_labels": 1, "labels": ["reward"]}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can score and be measured (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._others, task._target = None, False
    task._settle(preprocess, spec)
    return task

  # Rows.

  def example(self, row: dict) -> dict:
    """Returns the example of a row: the answers side by side behind their context.

    int32 (tokens, S): the model's inputs, and loss_mask, 1 for an answer's tokens. For kto the last
    side is the answer of another row of train behind this row's context, and single answers have
    "desirable" (). A reward's margin is "margin" ().

    Raises:
      RowError: the answers are equal, empty, too long, or answer no common prompt.
      UserError: an unknown role, no chat template, or a label or target that is none.
    """
    context, found = self._answers.read(row)
    if self._spec["loss"] == "kto" and self._others is not None:
      found = [*found, self._stranger(context, found)]
    made = self._answers.example(context, found)
    if not self._paired:
      made["desirable"] = np.asarray(_desirable(row["label"]), np.int32)
    if self._target:
      margin = regress.number(row["target"], "a row")
      if margin is None:
        raise errors.RowError("no target, by which chosen should be better")
      made["margin"] = np.asarray(margin, np.float32)
    return made

  unlabelled = chat.Task.example  # a conversation or a text by itself, to be scored

  def show(self, example: dict) -> str:
    """Returns every side as the model reads it, with the answers in ⟦ ⟧."""
    sides = range(example["input_ids"].shape[1])
    real = example["attention_mask"] > 0
    return " | ".join(super(Task, self).show(
      {key: example[key][real[:, side], side] for key in ("input_ids", "loss_mask")})
      for side in sides)

  def _stranger(self, context, found):
    """Returns the answer of another row of train, always the same one for a row."""
    start = zlib.crc32(repr((context, found)).encode("utf-8", "surrogatepass"))
    for step in range(_TRIES):
      try:
        _, others = self._answers.read(self._others[(start + step) % len(self._others)])
      except errors.RowError:
        continue
      other = others[start % len(others)]
      if other not in found and isinstance(other, type(found[0])):
        return other
    raise errors.RowError("kto compares with the answers of other rows, and those of train are "
                          "equal to this one")

  # On the device.

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over the batch's rows: (total, weight, {"accuracy", "margin"}), kto also "kl".

    Weight 0 masks a row. For kto every answer counts as a row, and "kl" is its baseline.

    Raises:
      UserError: rows without log-probabilities of the reference, while training.
    """
    weight, config = batch["weight"], self._config
    if self._spec["loss"] == "reward":
      scores = self._rewards(apply, variables, batch, rng)[0]
      each = preferences.bradley_terry(*scores.T, batch.get("margin", 0.0))
      return jnp.sum(each * weight), jnp.sum(weight), _agreement(scores, weight)
    count = len(self._roles)
    logp, tokens = self._logp(apply, variables, batch, rng, slice(count))
    ratio = logp - self._reference(batch, logp, rng, slice(count))
    if self._spec["loss"] == "kto":
      return self._kto(apply, variables, batch, rng, ratio)
    each = self._loss.function(
      *(ratio / tokens if self._loss.mean else ratio).T,
      **{key: config[key] for key in self._loss.settings})
    sft = config.sft_weight
    sft = float(self._spec["loss"] in _SFT) if sft is None else sft
    each = each - sft * logp[:, 0] / tokens[:, 0]
    scores = self._score(ratio, tokens)
    return jnp.sum(each * weight), jnp.sum(weight), _agreement(scores, weight)

  def _kto(self, apply, variables, batch, rng, ratio) -> tuple:
    """Returns what `loss` does, given the log-ratios (B, S) of a row's own answers."""
    side, config = slice(ratio.shape[1], None), self._config
    strange = self._logp(apply, jax.lax.stop_gradient(variables), batch, rng, side)[0]
    strange = strange - self._reference(batch, strange, rng, side)
    weight, good = batch["weight"], jnp.asarray([[1, 0]])
    if not self._paired:
      good = batch["desirable"][:, None]
    baseline = preferences.kto_baseline(strange[:, 0], weight)
    each = preferences.kto(ratio, good, baseline, config.beta, config.desirable_weight,
                           config.undesirable_weight)
    total, rows = jnp.sum(each * weight[:, None]), jnp.sum(weight) * ratio.shape[1]
    aux = {"kl": baseline * rows}
    if self._paired:
      aux |= _agreement(config.beta * ratio, 2 * weight)
    return total, rows, aux

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns "logp" and "tokens" (B, S) float32, what the model gives answers and how many they
    are; of a reward model "reward" in place of logp. Of the batch "reference" and "desirable" as
    they are.
    """
    if self._spec["loss"] == "reward":
      rewards, tokens = self._rewards(apply, variables, batch, None)
      return {"reward": rewards, "tokens": tokens}
    logp, tokens = self._logp(apply, variables, batch, None)
    kept = {key: batch[key] for key in ("reference", "desirable") if key in batch}
    return {"logp": logp, "tokens": tokens, **kept}

  def features(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns what baselines and the reference are made of: what `predict` does.

    Of a reward model it is what the head reads, "features" (B, S, D) float32, with "tokens" (B, S).
    """
    if self._spec["loss"] != "reward":
      return self.predict(apply, variables, batch)
    found = apply(variables, self._inputs(self._flat(batch)), None)["features"]
    margin = {"margin": batch["margin"]} if "margin" in batch else {}
    return {"features": found.astype(jnp.float32).reshape(*_shape(batch), -1),
            "tokens": self._count(batch), **margin}

  def _rewards(self, apply, variables, batch, rng) -> tuple:
    """Returns (rewards, answers' tokens), (B, S) each."""
    if "features" in batch:  # cached, for a head that trains alone
      features = batch["features"]
      made = apply(variables, {"features": features.reshape(-1, features.shape[-1])}, rng)
      return made["logits"].astype(jnp.float32).reshape(features.shape[:2]), batch["tokens"]
    made = apply(variables, self._inputs(self._flat(batch)), rng)["logits"]
    return made.astype(jnp.float32).reshape(_shape(batch)), self._count(batch)

  def _logp(self, apply, variables, batch, rng, sides=slice(None)) -> tuple:
    """Returns (log-probabilities in nats, tokens) of the answers of some sides, (B, S) each."""
    rows = self._flat({**batch, "weight": jnp.ones_like(batch["weight"])}, sides)
    found, weights = self._cross_entropy(apply, variables, rows, rng, 0.0)
    shape = (len(batch["weight"]), -1)
    return -found["nll"].reshape(shape), jnp.sum(weights, -1).reshape(shape)

  def _reference(self, batch, logp, rng, sides):
    """Returns the reference's log-probabilities (B, S), 0 for losses without one."""
    if not self._compares:
      return 0.0
    if "reference" in batch:
      return batch["reference"][:, sides]
    if rng is not None:
      raise errors.UserError("task.loss compares with a reference, which is known of the run's own "
                             "rows alone; set anchor.replay.loss=kl, or replay none")
    return jax.lax.stop_gradient(logp)  # before training the model is its own reference

  def _states(self, apply, variables, batch, rng) -> tuple:
    return super()._states(apply, variables, self._flat(batch), rng)

  def _flat(self, batch: dict, sides=slice(None)) -> dict:
    """Returns some sides of a batch as rows next to each other; rows of one side as they are."""
    if batch["input_ids"].ndim == 2:
      return batch
    keys = [key for key in self.preprocess.pad if key in batch]
    rows, count = contrastive.sides({key: batch[key][..., sides] for key in keys})
    return {**rows, "weight": jnp.repeat(batch["weight"], count)}

  def _inputs(self, rows: dict) -> dict:
    return self.preprocess.finish({key: value for key, value in rows.items()
                                   if key in self.preprocess.pad and key != "loss_mask"})

  def _count(self, batch: dict):
    """Returns how many tokens the answers have, (B, S) float32."""
    return jnp.sum(batch["loss_mask"], 1).astype(jnp.float32).reshape(_shape(batch))

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the metrics of a split.

    accuracy or auroc: by the score that the loss trains, β (log π - log π_ref) or what takes its
    place (ipo, orpo, simpo: means over tokens; reward: the reward). Baselines, and rows whose
    reference is not known (scripts/evaluate.py), are scored by nats a token.
    margin: mean score of chosen less that of rejected, of good answers less that of bad ones.
    likelihood_accuracy: accuracy by nats a token, which every language model has.
    nats_per_token: of chosen, or of good answers.
    kl_to_reference: nats a token over all answers, see `preferences.divergence`.

    Args:
      outputs: what `predict` gives, over a split; or "score" (N, S) of a baseline.
    """
    scores = self._scores(outputs)
    found = {self.metric[0]: self.value(outputs)}
    if "score" not in outputs:
      found["margin"] = float(_margin(scores, outputs))
    if "logp" not in outputs:
      return found
    count = len(self._roles)
    logp, tokens = (np.asarray(outputs[key], np.float64)[:, :count] for key in ("logp", "tokens"))
    if self._paired:
      found["likelihood_accuracy"] = float(np.mean(_higher(logp / tokens)))
    good = slice(None) if self._paired else np.asarray(outputs["desirable"]) > 0
    found["nats_per_token"] = float(-logp[good, 0].sum() / tokens[good, 0].sum())
    if "reference" in outputs:
      ratio = logp - np.asarray(outputs["reference"], np.float64)[:, :count]
      apart = preferences.divergence(ratio, tokens)
      found["kl_to_reference"] = float(np.sum(apart) / np.sum(tokens))
    return found

  def value(self, outputs: dict) -> float:
    """Returns the selection metric of a split."""
    if self._paired:
      return float(self._right(outputs).mean())
    return stats.auroc(self._scores(outputs)[:, 0], np.asarray(outputs["desirable"]))

  def _right(self, outputs: dict) -> np.ndarray:
    """Returns (N,) 1.0 where chosen has the higher score."""
    return _higher(self._scores(outputs))

  def _scores(self, outputs: dict) -> np.ndarray:
    """Returns the scores (N, S) of the answers; see `metrics`."""
    count = len(self._roles)
    for key in ("score", "reward"):
      if key in outputs:
        return np.asarray(outputs[key], np.float64)[:, :count]
    logp, tokens = (np.asarray(outputs[key], np.float64)[:, :count] for key in ("logp", "tokens"))
    if self._compares and "reference" not in outputs:
      return logp / tokens
    reference = np.asarray(outputs["reference"])[:, :count] if self._compares else 0.0
    return self._score(logp - reference, tokens)

  def _score(self, ratio, tokens):
    """Returns the scores (B, S) that the loss compares."""
    return self._spec["beta"] * (ratio / tokens if self._loss.mean else ratio)

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for a conversation as JSON types: its reward, or nats_per_token of the
    assistant's words and their tokens."""
    if "reward" in outputs:
      return {"reward": float(outputs["reward"][0])}
    return super().describe({"nll": -outputs["logp"][0], "tokens": outputs["tokens"][0]},
                            calibration)

  def baselines(self, features: dict) -> dict:
    """Returns what no training gets: split -> outputs with "score", by name.

    "zero-shot" scores by the pretrained model's nats a token, "longer answer" by the number of
    tokens; of a reward model "probe" is a linear one, by logistic regression on the features.
    """
    longer = {split: {"score": part["tokens"], **_kept(part)} for split, part in features.items()}
    if self._spec["loss"] == "reward":
      return {"probe": self._probe(features), "longer answer": longer}
    known = {split: {**part, "score": part["logp"] / part["tokens"]}
             for split, part in features.items()}
    return {"zero-shot": known, "longer answer": longer}

  def _probe(self, features: dict) -> dict:
    import threadpoolctl
    from sklearn import linear_model

    apart = {split: np.asarray(part["features"], np.float64) for split, part in features.items()}
    apart = {split: x[:, 0] - x[:, 1] for split, x in apart.items()}
    scale = np.maximum(np.sqrt(np.mean(np.square(apart["train"]), 0)), 1e-9)
    train = apart["train"] / scale
    both, labels = np.concatenate([train, -train]), np.repeat([1, 0], len(train))
    best, most = None, -1.0
    with threadpoolctl.threadpool_limits(1):  # as in ft/probes.py
      for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        model = linear_model.LogisticRegression(C=strength, fit_intercept=False, max_iter=300)
        weights = model.fit(both, labels).coef_[0] / scale
        right = float(np.mean(apart["validation"] @ weights > 0))
        if right > most:
          best, most = weights, right
    return {split: {"score": np.asarray(part["features"], np.float64) @ best}
            for split, part in features.items()}


def _shape(batch: dict) -> tuple:
  """Returns (B, S) of a batch whose sides are its last axis, S = 1 where it has none."""
  ids = batch["input_ids"]
  return len(ids), ids.shape[2] if ids.ndim == 3 else 1


def _agreement(scores, weight) -> dict:
  """Returns the sums accuracy and margin of scores (B, 2) of chosen and rejected."""
  margin = scores[:, 0] - scores[:, 1]
  return {"accuracy": jnp.sum((margin > 0) * weight), "margin": jnp.sum(margin * weight)}


def _higher(scores) -> np.ndarray:
  return (scores[:, 0] > scores[:, 1]).astype(np.float64)


def _margin(scores, outputs: dict):
  if scores.shape[1] == 2:
    return np.mean(scores[:, 0] - scores[:, 1])
  good = np.asarray(outputs["desirable"]) > 0
  return scores[good].mean() - scores[~good].mean() if 0 < good.sum() < len(good) else np.nan


def _kept(outputs: dict) -> dict:
  return {"desirable": outputs["desirable"]} if "desirable" in outputs else {}


def _desirable(label) -> int:
  """Returns 1 or 0 of a label; UserError for anything that says neither."""
  said = str(label).strip().lower()
  if said not in ("1", "0", "true", "false"):
    raise errors.UserError(f"label {said[:40]!r} does not say whether an answer is good: "
                           "data.columns.label should name a column of true and false, or 1 and 0")
  return int(said in ("1", "true"))
