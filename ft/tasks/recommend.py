"""Recommendation: which item comes next, given those that a user chose before.

SASRec learns every next item of a history by cross-entropy over all items, which is where its
reported gap to BERT4Rec goes (Klenitskiy & Vasilev 2023, arXiv:2309.07602); BERT4Rec learns hidden
ones. Items are judged in a ranking of all of them, by a rule that the card repeats.

Shapes: B batch, N rows of a split, T items of a history, D width, V rows of the item table, K items
of a list. Logits (B, T, V) are never made as a whole, see `ft.losses`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors, losses, recommendations

KEYS = {
  "metric": ("ndcg@10", "what the best checkpoint is chosen by", ["ndcg@10", "hr@10", "mrr"]),
  "cutoffs": ((5, 10, 20), "lengths of the list at which HR and NDCG are taken, beside 10", "list"),
  "top": (10, "items recommended; coverage and popularity are of these", (1, None)),
  "seen": ("exclude", "items of a user's own history in the ranking: left out, the target too if "
           "it is one; or ranked like others", ["exclude", "rank"]),
  "mask_rate": (0.2, "BERT4Rec: share of a history's items that a step hides and predicts",
                (0.01, 0.9)),
  "last_only": (0.1, "BERT4Rec: share of the rows of a step in which the last item alone is "
                "hidden, as in prediction", (0.0, 1.0)),
}
START = "starting model"


class Task:
  """Loss, predictions, metrics and baselines of recommendation; pure functions, no loop.

  Everywhere `apply(variables, inputs, rng)` returns the model's outputs: "last_hidden_state"
  (B, T, D) and "logits" (B, V) of item_ids (B, T); inputs {"hidden": (B, t, D)} give {"logits":
  (B, t, V)}. rng None is evaluation.

  Attributes:
    metric: (name, "max").
    model_args: what the model has to be loaded with.
    needs: roles that a row has to have beside the model's inputs: none.
    head_features: False: `features` are recommendations, and are not made of train.
  """

  model_args = {"head": "rank"}
  needs = ()
  head_features = False

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data` of histories.
      preprocess: `ft.data.interactions.Preprocess`, after `load`.

    Raises:
      UserError: rows are no interactions, or a cutoff is no length.
    """
    if not hasattr(preprocess, "ranked"):
      raise errors.UserError("task.name=recommend reads interactions; set "
                             "data.modality=interactions")
    for k in config.cutoffs:
      if not isinstance(k, int) or k < 1:
        raise errors.UserError(f"task.cutoffs={list(config.cutoffs)}: expected lengths of a list, "
                               "whole numbers from 1")
    self._settle(config.metric, config.cutoffs, config.top, config.seen, preprocess)
    self._mask_rate, self._last_only = float(config.mask_rate), float(config.last_only)
    self._splits = data.splits

  def _settle(self, metric, cutoffs, top, seen, preprocess):
    self.metric, self._cutoffs = (metric, "max"), tuple(sorted({10, *cutoffs}))
    self._top, self._seen, self.preprocess = top, seen, preprocess
    self._unranked = ~preprocess.ranked

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"metric": self.metric[0], "cutoffs": list(self._cutoffs), "top": self._top,
            "seen": self._seen}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can predict and describe (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(spec["metric"], spec["cutoffs"], spec["top"], spec["seen"], preprocess)
    return task

  @property
  def protocol(self) -> str:
    """How the numbers were taken, in a line without a full stop."""
    items = int(self.preprocess.ranked.sum())
    rule = {"exclude": "those of the user's own history left out",
            "rank": "those of the user's own history ranked too"}[self._seen]
    return (f"{self.preprocess.divided}; one target a row, ranked among all {items:,} items, "
            f"{rule}, none sampled; ties count against the target")

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    return {"mode": self.metric[1], "protocol": self.protocol}

  # Examples.

  def example(self, row: dict) -> dict:
    """Returns preprocess(row) with "targets" (T,) and "target" (), rows of the item table."""
    return {**self.preprocess(row), **self.preprocess.targets(row)}

  def unlabelled(self, row: dict) -> dict:
    """Returns preprocess(row): an example of which the next item is not known."""
    return self.preprocess(row)

  def augment(self, example: dict, rng: np.random.Generator) -> dict:
    """Returns the example with other items hidden, for a step of training; SASRec's as it is."""
    mask = self.preprocess.mask
    if mask is None or rng.random() < self._last_only:
      return example
    ids = np.where(example["targets"] > 0, example["targets"], example["item_ids"])
    able = ids > 0
    chosen = able & (rng.random(len(ids)) < self._mask_rate)
    if not chosen.any():
      chosen[rng.choice(np.flatnonzero(able))] = True
    return {**example, "item_ids": np.where(chosen, mask, ids).astype(np.int32),
            "targets": np.where(chosen, ids, 0).astype(np.int32)}

  # On the device.

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over predicted items: (total nats, items, {"nats_per_item": nats}).

    The softmax is over the items that are ranked: padding and the mask have no share in it.
    """
    hidden, weights = self._states(apply, variables, batch, rng)
    head = self._head(apply, variables, rng)
    found = losses.cross_entropy(head, hidden, batch["targets"], weights)
    return jnp.sum(found["loss"]), jnp.sum(weights), {"nats_per_item": jnp.sum(found["nll"])}

  def divergence(self, apply: Callable, variables, base_variables, batch: dict,
                 temperature: float = 1.0) -> tuple:
    """Returns sums over predicted items: (Σ T² KL(base || model), items).

    Both are evaluated without dropout and pass gradients on. See `losses.divergence`.
    """
    hidden, weights = self._states(apply, variables, batch, None)
    base_hidden, _ = self._states(apply, base_variables, batch, None)
    total = losses.divergence(
      self._head(apply, variables, None), self._head(apply, base_variables, None), hidden,
      base_hidden, weights, temperature)
    return jnp.sum(total), jnp.sum(weights)

  def _states(self, apply, variables, batch, rng) -> tuple:
    """Returns hidden (B, T, D) and which of them predict an item that counts (B, T)."""
    outputs = apply(variables, {"item_ids": batch["item_ids"]}, rng)
    weights = (batch["targets"] > 0) * batch["weight"][:, None]
    return outputs["last_hidden_state"], weights.astype(jnp.float32)

  def _head(self, apply: Callable, variables, rng) -> Callable:
    """Returns (hidden (B, t, D), number of the block) -> logits (B, t, V) of what is ranked."""
    def head(hidden, number):
      key = None if rng is None else jax.random.fold_in(rng, number + 1)
      logits = apply(variables, {"hidden": hidden}, key)["logits"]
      return jnp.where(self._unranked, jnp.finfo(logits.dtype).min, logits)

    return head

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns the best items, and how far up the target is where there is one.

    "top" (B, K) rows of the item table, 0 where fewer are ranked, and their "scores" (B, K); with
    targets "target" (B,) and "rank" (B,), see `recommendations.place`, and where seen items are
    left out "rank_incl_seen" (B,), the rank if they were not.
    """
    logits = apply(variables, {"item_ids": batch["item_ids"]}, None)["logits"]
    out = jnp.broadcast_to(self._unranked, logits.shape)
    seen = jnp.unpackbits(batch["seen"], axis=1, count=logits.shape[1]).astype(bool)
    blocked = out | seen if self._seen == "exclude" else out
    scores, top = jax.lax.top_k(jnp.where(blocked, -jnp.inf, logits),
                                min(self._top, logits.shape[1]))
    found = {"top": jnp.where(jnp.isneginf(scores), 0, top), "scores": scores}
    if "target" in batch:
      found["target"] = batch["target"]
      found["rank"] = recommendations.place(jnp, logits, batch["target"], blocked)
      if self._seen == "exclude":
        found["rank_incl_seen"] = recommendations.place(jnp, logits, batch["target"], out)
    return found

  # What baselines are made of: here what the model recommends before it is tuned.
  features = predict

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the scores of a split; see `recommendations.summary`."""
    return recommendations.summary(outputs, self._cutoffs, self.preprocess.chosen,
                                   self.preprocess.ranked)

  def score(self, outputs: dict) -> np.ndarray:
    """Returns (N,) what each row gives to the metric; their mean is that of the split."""
    return recommendations.per_row(self.metric[0], outputs["rank"])

  def value(self, outputs: dict) -> float:
    """Returns the selection metric of a split."""
    return float(self.score(outputs).mean())

  def calibrate(self, outputs: dict) -> dict:
    """Returns {}: nothing is fitted to scores."""
    del outputs
    return {}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one row as JSON types: {"items": [ids], "scores": [logits]}."""
    del calibration
    kept = [i for i, row in enumerate(outputs["top"]) if row]
    return {"items": [self.preprocess.name(outputs["top"][i]) for i in kept],
            "scores": [float(outputs["scores"][i]) for i in kept]}

  def evidence(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the card's further fields about the tuned outputs: none."""
    del outputs, calibration
    return {}

  def baselines(self, features: dict) -> dict:
    """Returns what no training gets, of the interactions of train alone.

    Args:
      features: split -> what the model gives before it is tuned, with "index" (N,).

    Returns:
      "starting model", "popularity", "last-item kNN" and "item-kNN" (cosines of who chose what; its
      number of neighbours is chosen on validation) -> split -> what `predict` gives but scores.
    """
    train = self._splits["train"]
    chosen = [items[:stop] for items, stop in zip(train.log.items, train.known, strict=True)]
    near = recommendations.Neighbours(chosen, self.preprocess.size)
    tried = [lambda histories, n=n: near.items(histories, n) for n in recommendations.NEIGHBOURS]
    best = max(tried, key=lambda score: self.value(
      self._judged(score, "validation", features["validation"])))
    methods = {"popularity": near.popularity, "last-item kNN": near.last_item, "item-kNN": best}
    return {START: features, **{
      name: {split: self._judged(score, split, part) for split, part in features.items()}
      for name, score in methods.items()}}

  def _judged(self, score: Callable, split: str, part: dict) -> dict:
    rows = [self._splits[split][int(i)] for i in part["index"]]
    return {**recommendations.judged(score, rows, self.preprocess.ranked, self._top,
                                     self._seen == "exclude"), "index": part["index"]}
