"""Embeddings of texts, for similarity and search.

A row is one of three kinds, told by its columns:

    text, text_b[, negative]   a question and what it should find, and perhaps what it should not
    text, text_b, target       two texts and how similar they are, as a cosine
    text, label                a text of a class: pairs are drawn from the rows of train

A text is embedded as the model pools it (model.pooling) and brought to length one, so that products
are cosines. All texts of a row are padded to one length: cut long ones with data.max_length.

Search is judged with every split as its own corpus: a question should find its text_b among those
of all rows, a text of a class the others of its class. Splits of other sizes do not compare.

Shapes: B batch, T tokens, S texts of a row, D size of an embedding, N rows of a split.
"""

import zlib
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from ft import contrastive, errors, ranking
from ft.tasks import regress

KEYS = {
  "loss": ("contrastive", "the own text among all of the batch (InfoNCE); triplets with a margin; "
           "or the squared error of the cosine", ["contrastive", "margin", "cosine"]),
  "temperature": (0.05, "contrastive: of the softmax over cosines", (0.001, None)),
  "margin": (0.3, "margin: how much nearer the own text has to be, in cosines", (0.0, 2.0)),
  "pairs": ("oversampling", "cosine with labels: which pairs are drawn, as SetFit does",
            ["oversampling", "undersampling", "unique"]),
  "iterations": (0, "cosine with labels: pairs of each kind a row; 0: as task.pairs says",
                 (0, None)),
  "metric": ("mrr", "what the best checkpoint is chosen by; scored pairs: spearman",
             ["mrr", "ndcg@10", "recall@1", "recall@5", "recall@10", "spearman"]),
}

# What a batch holds beside the model's inputs.
BOOKKEEPING = ("group", "target", "label", "weight", "index", "stop")


class Task:
  """Losses, embeddings, metrics and baselines of search and similarity; pure functions, no loop.

  Everywhere `apply(variables, inputs, rng)` returns the model's outputs, of which "features" (B, D)
  are used; rng None is evaluation.

  Attributes:
    kind: "pairs", "scored" or "classes".
    metric: (name, "max").
    model_args: what the model has to be loaded with.
    needs: roles that a row has to have beside the model's inputs.
    head_features: False: there is no head.
    score: outputs -> (N,) the metric of each row; None for spearman, which is no mean.
  """

  model_args = {"head": "none"}
  head_features = False

  def __init__(self, config, data, preprocess):
    """Settles what kind the rows are of.

    Args:
      config: the section `task`.
      data: a `sources.Data` of texts.
      preprocess: of texts, row -> example.

    Raises:
      UserError: the columns make none of the three kinds, or one that loss or metric do not fit.
    """
    columns = set(data.columns)
    kind = ("scored" if {"text_b", "target"} <= columns else "pairs" if "text_b" in columns
            else "classes" if "label" in columns else None)
    if kind is None or "text" not in columns:
      raise errors.UserError(
        "task.name=embed needs two texts a row, or texts of classes: name their columns in "
        "data.columns.text and data.columns.text_b, or data.columns.label")
    if (config.metric == "spearman") != (kind == "scored"):
      raise errors.UserError(f"task.metric={config.metric}: rows with data.columns.target are "
                             "judged by spearman, and no others are")
    if kind == "pairs" and config.loss == "cosine" or kind == "scored" and config.loss != "cosine":
      raise errors.UserError(f"task.loss={config.loss}: the error of a cosine needs how similar "
                             "texts are in data.columns.target, or labels, and nothing else does")
    self._rows, self._config = data.splits, config
    negative = kind == "pairs" and "negative" in columns
    self._settle(kind, config.metric, negative, preprocess)

  def _settle(self, kind, metric, negative, preprocess):
    self.kind, self.metric, self.preprocess = kind, (metric, "max"), preprocess
    self.needs = {"pairs": ("text_b",), "scored": ("text_b", "target"),
                  "classes": ("label",)}[kind]
    self.score = None if kind == "scored" else lambda outputs: self._found(outputs)[metric]
    self._sides = ("text", "text_b", *(("negative",) if negative else ()))

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"kind": self.kind, "metric": self.metric[0]}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can predict and describe (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(spec["kind"], spec["metric"], False, preprocess)
    return task

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    return {"mode": self.metric[1]}

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns the example of a row.

    Pairs and scored: the preprocessing's keys (T, S), "group": () int32, equal where text_b is, and
    of scored "target": () float32. Classes: its keys (T,) and "label": () int32, equal where the
    label is.

    Raises:
      RowError: a text or target is empty.
      UserError: the target is no number.
    """
    if self.kind == "classes":
      return {**self.unlabelled(row), "label": _group(str(row["label"]))}
    texts = [" ".join(row.get(role, "").split()) for role in self._sides]
    for role, text in zip(self._sides, texts, strict=True):
      if not text:
        raise errors.RowError(f"{role} is empty: a pair needs both its sides")
    made = contrastive.side_by_side(
      [self.preprocess({"text": row[role]}) for role in self._sides], self.preprocess.pad)
    made["group"] = _group(texts[1].casefold())
    if self.kind == "scored":
      target = regress.number(row["target"], "a row")
      if target is None:
        raise errors.RowError("no target")
      made["target"] = np.asarray(target, np.float32)
    return made

  def unlabelled(self, row: dict) -> dict:
    """Returns the example of a text alone, to be embedded: the preprocessing's keys (T,)."""
    return self.preprocess({"text": row.get("text", "")})

  def show(self, example: dict) -> str:
    """Returns what the model reads of each text, for log and card."""
    keys = [key for key in example if key in self.preprocess.pad]
    parts = [example] if self.kind == "classes" else [
      {key: example[key][:, side] for key in keys} for side in range(len(self._sides))]
    return " | ".join(self.preprocess.show(part) for part in parts)

  def training(self, examples):
    """Returns the examples that steps go over: pairs of rows, where these are of classes."""
    if self.kind != "classes":
      return examples
    labels = np.array([int(examples[i]["label"]) for i in range(len(examples))])
    if self._config.loss == "cosine":
      first, second, same = contrastive.label_pairs(
        labels, self._config.pairs, self._config.iterations)
    else:
      first, second = contrastive.positives(labels)
      same = np.ones(len(first), np.float32)
    return contrastive.Pairs(examples, first, second, self.preprocess.pad, target=same,
                             group=labels[first].astype(np.int32))

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over the batch's rows: (total, weight, {"cosine": of each with its own})."""
    vectors = self._vectors(apply, variables, batch, rng)
    anchors, others = vectors[:, 0], vectors[:, 1]
    negatives = vectors[:, 2] if vectors.shape[1] > 2 else None
    weight, c = batch["weight"], self._config
    if c.loss == "cosine":
      each = contrastive.cosine_error(anchors, others, batch["target"])
    elif c.loss == "margin":
      each = contrastive.triplet(anchors, others, batch["group"], weight, c.margin, negatives)
    else:
      each = contrastive.in_batch(anchors, others, batch["group"], weight, c.temperature,
                                  negatives)
    near = jnp.sum(anchors * others, -1)
    return jnp.sum(each * weight), jnp.sum(weight), {"cosine": jnp.sum(near * weight)}

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns, by what the batch holds.

    Pairs: "query" and "document" (B, D) with "group" (B,). Scored: "cosine" and "target" (B,).
    A text alone: "embedding" (B, D) and, where the batch has it, "label" (B,).
    """
    vectors = self._vectors(apply, variables, batch, None)
    if vectors.ndim == 2:
      return {"embedding": vectors, **({"label": batch["label"]} if "label" in batch else {})}
    if self.kind == "scored":
      return {"cosine": jnp.sum(vectors[:, 0] * vectors[:, 1], -1), "target": batch["target"]}
    return {"query": vectors[:, 0], "document": vectors[:, 1], "group": batch["group"]}

  # What baselines are made of: here the pretrained model's own predictions.
  features = predict

  def _vectors(self, apply, variables, batch, rng):
    """Returns embeddings (B, S, D) of length one, or (B, D) of texts alone."""
    inputs = {key: value for key, value in batch.items() if key not in BOOKKEEPING}
    count = None
    if next(iter(inputs.values())).ndim == 3:
      inputs, count = contrastive.sides(inputs)
    features = apply(variables, self.preprocess.finish(inputs), rng)["features"]
    vectors = contrastive.normalise(features)
    return vectors if count is None else vectors.reshape(-1, count, vectors.shape[-1])

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the metrics of a split as its own corpus, see `ranking.measure`; scored: spearman.

    Args:
      outputs: what `predict` gives, over a split; or of search by words "similarity", see there.
    """
    if self.kind == "scored":
      return {"spearman": self.value(outputs)}
    return {name: float(values.mean()) for name, values in self._found(outputs).items()}

  def value(self, outputs: dict) -> float:
    """Returns the selection metric of a split."""
    if self.kind == "scored":
      return regress.spearman(outputs["cosine"], outputs["target"])
    return float(self._found(outputs)[self.metric[0]].mean())

  def _found(self, outputs: dict) -> dict[str, np.ndarray]:
    """Returns the measures of each row: name -> (N,)."""
    if "mrr" in outputs:  # of a search by words, measured already
      return {name: np.asarray(values) for name, values in outputs.items()}
    if self.kind == "classes":
      vectors = np.asarray(outputs["embedding"])
      return _search(lambda rows: vectors[rows] @ vectors.T, outputs["label"], None)
    queries, documents = np.asarray(outputs["query"]), np.asarray(outputs["document"])
    _, once = np.unique(outputs["group"], return_index=True)
    return _search(lambda rows: queries[rows] @ documents[once].T, outputs["group"], once)

  def calibrate(self, outputs: dict) -> dict:
    """Returns {}: nothing is fitted."""
    del outputs
    return {}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one row as JSON types: {"embedding": D numbers of length one}."""
    del calibration
    return {"embedding": [round(float(x), 7) for x in outputs["embedding"]]}

  def evidence(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the card's further fields about the tuned outputs: none."""
    del outputs, calibration
    return {}

  def baselines(self, features: dict) -> dict:
    """Returns {"zero-shot": what the pretrained model gives, "BM25": what shared words give}."""
    return {"zero-shot": features,
            "BM25": {split: self._by_words(split, part) for split, part in features.items()}}

  def _by_words(self, split: str, part: dict) -> dict:
    rows = [self._rows[split][int(i)] for i in part["index"]]
    texts = [row["text"] for row in rows]
    others = texts if self.kind == "classes" else [row["text_b"] for row in rows]
    group, once = part.get("label"), None
    if self.kind == "pairs":
      group, once = part["group"], np.unique(part["group"], return_index=True)[1]
      others = [others[i] for i in once]
    asked, weighed = ranking.bm25(texts, others)
    if self.kind == "scored":
      return {"cosine": np.asarray(asked.multiply(weighed).sum(1)).ravel(),
              "target": part["target"]}
    return _search(lambda at: (asked[at] @ weighed.T).toarray(), group, once)


def _group(text: str):
  """Returns () int32, equal for equal texts."""
  return np.asarray(zlib.crc32(text.encode("utf-8", "surrogatepass")) & 0x7FFFFFFF, np.int32)


def _search(similarity: Callable, group, once) -> dict[str, np.ndarray]:
  """Returns the measures of each row: name -> (N,).

  Args:
    similarity: rows of queries (slice) -> (q, M).
    group: (N,), equal where rows should find each other.
    once: (M,) the rows that are the corpus; None: all but the query itself.
  """
  group = np.asarray(group)

  def near(rows):
    found = np.array(similarity(rows), np.float64)
    if once is None:
      found[np.arange(len(found)), np.arange(len(group))[rows]] = -np.inf
    return found

  def relevant(rows):
    wanted = group[rows, None] == group[None] if once is None else group[rows, None] == group[once]
    if once is None:
      wanted[np.arange(len(wanted)), np.arange(len(group))[rows]] = False
    return wanted

  return ranking.measure(near, relevant, len(group), len(group) if once is None else len(once))
