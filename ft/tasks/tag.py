"""Tagging: one label a word, such as named entities or parts of speech.

A row is a list of words and one of as many labels; to predict, a text is cut into words at white
space. The words are read as one text, apart by spaces. Each word is tagged by its first piece; the
others carry no loss. A word of which no piece is left (data.truncation) has the tag O, or the most
frequent one, and is judged with it.

Entities are told from tags, and counted, by seqeval: in its default mode, which is conlleval's
(Tjong Kim Sang and Buchholz 2000), or with task.strict, and always for BILOU, in its strict mode.

Shapes: B batch, T tokens, W words (data.max_length), C tags, N rows of a split.
"""

import collections
from collections.abc import Callable, Mapping
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft import errors
from ft.data import tags

KEYS = {
  "scheme": ("bio", "how labels mark entities; iob1 is made bio; none: plain tags",
             ["bio", "bilou", "iob1", "none"]),
  "strict": (False, "entities count only where their tags follow the scheme"),
}

# What a batch holds beside the model's inputs.
BOOKKEEPING = ("first", "gold", "words", "weight", "index", "stop")


class Task:
  """Loss, predictions, metrics and baseline of tagging; pure functions, no loop.

  Everywhere `apply(variables, inputs, rng)` returns the model's outputs, a dict with "logits"
  (B, T, C); rng None is evaluation.

  Attributes:
    labels: tags by index.
    metric: entity_f1, or accuracy over words where the scheme is none.
    model_args: what the model has to be loaded with.
    needs: roles that a row has to have beside the model's inputs.
    head_features: False: `features` are no head's inputs, and are not made of train.
    score: None: the metric is a ratio of sums, no mean over rows.
  """

  needs = ("label",)
  head_features = False
  score = None

  def __init__(self, config, data, preprocess):
    """Settles the tags from the training rows: every prefix of the scheme with every type there.

    Args:
      config: the section `task`.
      data: a `sources.Data` whose rows have words and labels.
      preprocess: of texts, row -> example.

    Raises:
      UserError: no words, not as many labels as words, labels that break the scheme, or one that
        train lacks.
    """
    for role in ("words", "label"):
      if role not in data.columns:
        raise errors.UserError(f"task.name=tag needs lists of words and of labels; name the column "
                               f"of the {role} in data.columns.{role}")
    self._rows, counts = data.splits, collections.Counter()
    for rows in data.splits.values():
      for i, row in enumerate(rows):
        try:
          found = tags.check(row["words"], row["label"], config.scheme)
        except errors.RowError as error:
          raise errors.UserError(f"{rows.where(i)}: {error}") from None
        counts.update(found if rows.name == "train" else ())
    labels = tags.everything(counts, config.scheme)
    outside = "O" if "O" in labels else counts.most_common(1)[0][0]
    self._settle(config.scheme, config.strict, labels, outside, preprocess)
    for rows in data.splits.values():
      self._check_known(rows)
    if len(labels) < 2:
      raise errors.UserError(f"train has the tag {', '.join(labels)} only; a tagger needs two")

  def _settle(self, scheme, strict, labels, outside, preprocess):
    self.labels, self.preprocess = list(labels), preprocess
    self.metric = ("accuracy" if scheme == "none" else "entity_f1", "max")
    self.model_args = {"head": "tag", "num_labels": len(self.labels), "labels": self.labels}
    self._scheme, self._strict, self._outside = scheme, strict or scheme == "bilou", outside
    self._index, self._width = {label: i for i, label in enumerate(labels)}, preprocess.max_length
    self._seqeval = None if scheme == "none" else errors.require("seqeval.metrics", "tag")
    self._counted = {}  # (gold, decided) of a row as bytes -> entities right, said, there

  def _check_known(self, rows):
    for i, row in enumerate(rows):
      for label in tags.check(row["words"], row["label"], self._scheme):
        if label not in self._index:
          raise errors.UserError(f"{rows.where(i)}: tag {label!r} of {rows.name} does not occur in "
                                 f"train{errors.suggest(label, self._index)}")

  # Saving and restoring for prediction.

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"scheme": self._scheme, "strict": self._strict, "labels": self.labels,
            "outside": self._outside}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess) -> "Task":
    """Returns a task that can predict and describe (not train), from what `spec` returned."""
    task = cls.__new__(cls)
    task._settle(spec["scheme"], spec["strict"], spec["labels"], spec["outside"], preprocess)
    return task

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    said = {"mode": self.metric[1], "labels": self.labels}
    if self._seqeval:
      how = f"mode:strict|scheme:{self._grammar().__name__}" if self._strict else "mode:default"
      version = metadata.version("seqeval")
      said["signatures"] = {"entity_f1": f"seqeval {version}|average:micro|{how}"}
    return said

  # On the device.

  def example(self, row: dict) -> dict:
    """Returns `unlabelled(row)` with "gold": (W,) int32 tags of the words, -1 behind the last."""
    made, gold = self.unlabelled(row), np.full(self._width, -1, np.int32)
    found = tags.check(row["words"], row["label"], self._scheme)
    for i, label in enumerate(found):
      if label not in self._index:
        raise errors.UserError(f"tag {label!r} does not occur in train"
                               f"{errors.suggest(label, self._index)}")
      gold[i] = self._index[label]
    return {**made, "gold": gold}

  def unlabelled(self, row: dict) -> dict:
    """Returns the example of a row with words or a text.

    The preprocessing's keys with "first": (W,) int32, the token that each word begins with, -1
    where there is none; and "words": () int32, their number.

    Raises:
      RowError: no words, or more of them than data.max_length.
    """
    words = tags.words(row["words"]) if "words" in row else row.get("text", "").split()
    if len(words) > self._width:
      raise errors.RowError(f"{len(words)} words, more than data.max_length={self._width}")
    text, encoding = self.preprocess.encode({"text": " ".join(words)})
    first, start, before = np.full(self._width, -1, np.int32), 0, None
    for i, word in enumerate(words):
      pieces = [encoding.char_to_token(place) for place in range(start, start + len(word))]
      pieces = [piece for piece in pieces if piece is not None]
      if pieces:  # the space before a word may be a piece of its own, and is the word's then
        first[i] = pieces[0] if before is None else before + 1
      before = pieces[-1] if pieces else None
      start += len(word) + 1
    return {**self.preprocess.arrays(encoding), "first": first,
            "words": np.asarray(len(words), np.int32)}

  def show(self, example: dict) -> str:
    """Returns what the model reads and the tags of its words, for log and card."""
    gold = ["(cut)" if first < 0 else self.labels[tag] for tag, first in
            zip(example["gold"], example["first"], strict=True) if tag >= 0]
    return f"{self.preprocess.show(example)}; tags of its words: {' '.join(gold)}"

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over the batch's words: (total nats, words, {"accuracy": right ones})."""
    logits, there = self._word_logits(apply, variables, batch, rng)
    gold = jnp.maximum(batch["gold"], 0)
    weight = there * (batch["gold"] >= 0) * batch["weight"][:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, gold)
    right = jnp.argmax(logits, -1) == gold
    return jnp.sum(losses * weight), jnp.sum(weight), {"accuracy": jnp.sum(right * weight)}

  def divergence(self, apply: Callable, variables, base_variables, batch: dict,
                 temperature: float = 1.0) -> tuple:
    """Returns sums over the batch's words: (Σ T² KL(base || model) of the tags, words)."""
    ours, there = self._word_logits(apply, variables, batch, None)
    base, _ = self._word_logits(apply, base_variables, batch, None)
    known, said = (jax.nn.log_softmax(logits / temperature) for logits in (base, ours))
    each = jnp.sum(jnp.exp(known) * (known - said), -1)
    weight = there * batch["weight"][:, None]
    return temperature**2 * jnp.sum(each * weight), jnp.sum(weight)

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns {"decided": (B, W) int32, "words": (B,)} and, where the batch has it, "gold"."""
    logits, there = self._word_logits(apply, variables, batch, None)
    tags_BW = jnp.where(there, jnp.argmax(logits, -1), self._index[self._outside])
    return {"decided": tags_BW.astype(jnp.int32), "words": batch["words"], **_gold(batch)}

  def features(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns what baselines are made of: the tags; nothing of the model is looked at."""
    del apply, variables
    return {"words": batch["words"], **_gold(batch)}

  def _word_logits(self, apply, variables, batch, rng) -> tuple:
    """Returns logits (B, W, C) float32 of the words' first pieces, and which there are (B, W)."""
    inputs = self.preprocess.finish({k: v for k, v in batch.items() if k not in BOOKKEEPING})
    logits = apply(variables, inputs, rng)["logits"].astype(jnp.float32)
    first = batch["first"]
    return jnp.take_along_axis(logits, jnp.maximum(first, 0)[..., None], 1), first >= 0

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns accuracy over words and, but for plain tags, seqeval's entity measures.

    entity_f1, entity_precision and entity_recall are over all entities (micro); f1/<type> of each
    type that occurs.

    Args:
      outputs: "gold" and "decided", (N, W); gold is -1 where there is no word.
    """
    gold, decided = np.asarray(outputs["gold"]), np.asarray(outputs["decided"])
    there = gold >= 0
    found = {"accuracy": float((gold == decided)[there].mean()) if there.any() else float("nan")}
    if not self._seqeval:
      return found
    how = {"mode": "strict", "scheme": self._grammar()} if self._strict else {}
    report = self._seqeval.classification_report(
      self._named(gold, there), self._named(decided, there), output_dict=True, zero_division=0,
      **how)
    total = report["micro avg"] if "micro avg" in report else dict.fromkeys(
      ("f1-score", "precision", "recall"), 0.0)
    found |= {"entity_f1": total["f1-score"], "entity_precision": total["precision"],
              "entity_recall": total["recall"]}
    found |= {f"f1/{kind}": row["f1-score"] for kind, row in report.items()
              if not kind.endswith(" avg")}
    return {key: float(value) for key, value in found.items()}

  def value(self, outputs: dict) -> float:
    """Returns the selection metric of a split; entities of a row are told apart once."""
    gold, decided = np.asarray(outputs["gold"]), np.asarray(outputs["decided"])
    if not self._seqeval:
      return self.metrics(outputs)["accuracy"]
    right, said, there = np.sum([self._count(*row) for row in zip(gold, decided, strict=True)], 0)
    return float(2 * right / (said + there)) if said + there else 0.0

  def _count(self, gold, decided) -> tuple[int, int, int]:
    """Returns how many entities of a row are right, were said, and are there."""
    key = gold.tobytes(), decided.tobytes()
    if key not in self._counted:
      there = (gold >= 0)[None]
      wanted, said = (self._entities(self._named(row[None], there)) for row in (gold, decided))
      self._counted[key] = len(wanted & said), len(said), len(wanted)
    return self._counted[key]

  def _entities(self, sentences: list) -> set:
    """Returns the entities of one sentence, by seqeval."""
    if not self._strict:
      return set(self._seqeval.sequence_labeling.get_entities(sentences[0]))
    from seqeval.scheme import Entities

    return {entity.to_tuple()[1:] for entity in
            Entities(sentences, scheme=self._grammar()).entities[0]}

  def _grammar(self):
    from seqeval import scheme

    return scheme.BILOU if self._scheme == "bilou" else scheme.IOB2

  def _named(self, numbers, there) -> list[list[str]]:
    return [[self.labels[i] for i in row[real]] for row, real in zip(numbers, there, strict=True)]

  def calibrate(self, outputs: dict) -> dict:
    """Returns {}: no temperature is fitted."""
    del outputs
    return {}

  def describe(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the answer for one row as JSON types: {"labels": a tag for each word}."""
    del calibration
    return {"labels": [self.labels[i] for i in outputs["decided"][:int(outputs["words"])]]}

  def evidence(self, outputs: dict, calibration: Mapping) -> dict:
    """Returns the card's further fields about the tuned outputs: none."""
    del outputs, calibration
    return {}

  def baselines(self, features: dict) -> dict:
    """Returns {"majority tag": split -> outputs}: each word's most frequent tag in train.

    Words that train lacks are outside (O), or have the most frequent tag of all.
    """
    counts = collections.defaultdict(collections.Counter)
    for row in self._rows["train"]:
      found = tags.check(row["words"], row["label"], self._scheme)
      for word, label in zip(tags.words(row["words"]), found, strict=True):
        counts[word][label] += 1
    usual = {word: self._index[min(seen, key=lambda label: (-seen[label], label))]
             for word, seen in counts.items()}
    made = {}
    for split, part in features.items():
      decided = np.full_like(part["gold"], self._index[self._outside])
      for row, index in zip(decided, part["index"], strict=True):
        said = [usual.get(word, self._index[self._outside])
                for word in tags.words(self._rows[split][int(index)]["words"])]
        row[:len(said)] = said
      made[split] = {"decided": decided, "words": part["words"], "gold": part["gold"]}
    return {"majority tag": made}


def _gold(batch: dict) -> dict:
  return {"gold": batch["gold"]} if "gold" in batch else {}
