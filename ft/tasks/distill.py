"""Distillation: a student learns its own task from the data and from a larger, frozen teacher.

The loss is (1 - alpha) x the task's own + alpha x the divergence of the student's distributions
from the teacher's (Hinton et al. 2015, arXiv:1503.02531), over tokens or over labels: forward KL,
the reverse, or the generalised Jensen-Shannon divergence between them (see `ft.losses.apart`). With
task.hidden, hidden states are held together too, through learned projections (Romero et al. 2015,
arXiv:1412.6550; Jiao et al. 2020, arXiv:1909.10351). With task.on_policy, in that share of the
steps the student continues texts itself, from its current weights, and is compared with the
teacher on what it wrote (Agarwal et al. 2024, arXiv:2306.13649); the data has no say in them.

Rows, examples, metrics and predictions are those of the student's own task, task.of. The teacher is
in no gradient, optimizer, checkpoint or export. Baselines are those of the own task, the student as
it was, and the teacher; kl_to_teacher, KL(teacher || student) in nats, is measured beside.

Cost: a forward pass of the teacher in each step and evaluation; with on_policy the writing too.
Shapes: B batch, T tokens, C classes, N rows of a split.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ft import config as config_lib
from ft import errors, losses, teaching, tune
from ft.models import generate, layers
from ft.passes import Once, layers_of

KEYS = {
  "teacher": ("", "model to learn from: as model.source, or the folder of a run; has to be set"),
  "of": ("lm", "the student's own task",
         ["lm", "chat", "seq2seq", "masked_lm", "span_lm", "classify"]),
  "own": (None, "keys of that task, such as packing or generate_rows", "dict"),
  "alpha": (0.5, "share of the teacher's distributions in the loss, the data's being the rest",
            (0.0, 1.0)),
  "beta": (0.0, "0: KL(teacher || student); 1: the reverse; between: Jensen-Shannon", (0.0, 1.0)),
  "temperature": (1.0, "T: above 1, unlikely answers count for more", (0.01, None)),
  "hidden": (0.0, "weight of the distance of hidden states; 0: off", (0.0, None)),
  "hidden_layers": ((), "pairs student:teacher from 0:0; (): all of the student's, spread evenly",
                    "list"),
  "hidden_loss": ("mse", "mean squared difference, or 1 - cosine", ["mse", "cosine"]),
  "on_policy": (0.0, "share of steps on texts that the student continues; lm and chat", (0.0, 1.0)),
  "max_new_tokens": (32, "on_policy: most tokens that it writes", (1, None)),
}
TEACHER = "teacher"  # row of results


class Task:
  """The student's own task with a teacher beside; what is not defined here is the own task's."""

  def __init__(self, config, data, preprocess):
    """Makes the task of a run.

    Args:
      config: the section `task`.
      data: a `sources.Data`, as the own task reads it.
      preprocess: text.Preprocess.

    Raises:
      UserError: no teacher, one of another tokenizer, keys that do not go together, or what the own
        task says.
    """
    if config.on_policy and config.of not in ("lm", "chat"):
      raise errors.UserError(f"task.on_policy: with task.of={config.of} the student continues no "
                             "text; set it to 0")
    self._teacher = teaching.Teacher.find(config.teacher, preprocess)
    given = dict((config.own or {}).items())
    section = config_lib.section("task.name", config.of, given)
    self.own = importlib.import_module(f"ft.tasks.{config.of}").Task(section, data, preprocess)
    self._config, self._match, self._write = config, None, None
    self._smoothing = float(section.get("label_smoothing", 0.0))
    self._words = preprocess.tokenizer.get_vocab_size()
    if config.on_policy and section.packing != "none":
      raise errors.UserError("task.on_policy: the student continues one text a row; set "
                             "task.own.packing=none")
    if config.on_policy and not config.alpha:
      raise errors.UserError("task.on_policy compares with the teacher, and task.alpha=0 leaves it "
                             "out; set alpha above 0")

  def __getattr__(self, name):
    if name == "own":  # not set yet, as while an instance is unpickled
      raise AttributeError(name)
    return getattr(self.own, name)

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON."""
    return {"teacher": self._config.teacher, "of": self._config.of, "own": self.own.spec()}

  @classmethod
  def from_spec(cls, spec: Mapping, preprocess):
    """Returns the own task, to predict and describe: the student stands alone now."""
    return importlib.import_module(f"ft.tasks.{spec['of']}").Task.from_spec(spec["own"], preprocess)

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    return {**self.own.describe_task(), "teacher": self._config.teacher}

  def company(self, pretrained, tuned, sharding) -> tuple[dict, dict]:
    """Loads the teacher: ({"projections": …} that trains, {"teacher": its variables}).

    Args:
      pretrained: the student.
      tuned: how it is tuned.
      sharding: shape of a parameter -> jax Sharding.

    Raises:
      UserError: the teacher lacks a head, or layers or the way to tune do not fit the keys.
    """
    c = self._config
    student = pretrained.module
    compute = layers.Compute(student.compute.dtype, student.compute.attention,
                             student.compute.scan and not c.hidden)
    variables = self._teacher.load(self.own.model_args, compute, sharding)
    if c.on_policy:
      if tuned.around is not None or hasattr(student, "decode"):
        raise errors.UserError("task.on_policy: no text can be written with this model and "
                               "tune.method; set it to 0")
      longest = self.preprocess.max_length + c.max_new_tokens
      if longest > self.preprocess.positions:
        raise errors.UserError(f"data.max_length and task.max_new_tokens make {longest} tokens, "
                               f"and the model has positions for {self.preprocess.positions}")
      self._write = generate.program(student, self._drawing(pretrained), tuned.interceptor)
    if not c.hidden:
      return {}, {"teacher": variables}
    if tuned.only_head:
      raise errors.UserError("task.hidden: only a head trains, so hidden states stay as they are; "
                             "set it to 0")
    self._match = teaching.Match.of(
      c.hidden_layers, c.hidden_loss == "cosine", student, self._teacher.module,
      {"student": pretrained.variables, "teacher": variables})
    return {"projections": self._match.projections()}, {"teacher": variables}

  def _drawing(self, pretrained) -> generate.Settings:
    """Returns how the student writes: drawn from its own distribution, as in GKD."""
    plain = getattr(self.own, "decoding", generate.Settings.of)(pretrained)
    return dataclasses.replace(
      plain, do_sample=True, num_beams=1, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=int(
        self._config.max_new_tokens), repetition_penalty=1.0, no_repeat_ngram_size=0)

  # On the device.

  def loss(self, apply: Callable, variables, batch: dict, rng) -> tuple:
    """Returns sums over the batch: (total, weight, aux), those of the own task with the teacher's.

    aux has the own task's, "divergence" as configured, "hidden", and "on_policy", 1 in a step on
    the student's own texts; there nats are of those. Without a teacher in the variables, the own
    task's loss.
    """
    if tune.COMPANY not in variables:
      return self.own.loss(apply, variables, batch, rng)
    if self._config.of == "classify":
      return self._of_labels(apply, variables, batch, rng)
    c = self._config
    if not c.on_policy or rng is None:
      return self._of_tokens(apply, variables, batch, rng)
    # Apart from the stream of dropout, whose keys are made of the same one.
    draw, key = jax.random.split(jax.random.fold_in(rng, 0x64697374))
    return jax.lax.cond(
      jax.random.uniform(draw) < c.on_policy,
      lambda: self._of_own_words(apply, variables, batch, rng, key),
      lambda: self._of_tokens(apply, variables, batch, rng))

  def _of_tokens(self, apply, variables, batch, rng) -> tuple:
    c, teacher = self._config, variables[tune.COMPANY]["teacher"]
    (hidden, targets, weights), ours = self._seen(
      lambda: self.own._states(apply, variables, batch, rng))
    (base, _, _), theirs = self._seen(
      lambda: self.own._states(self._teacher.apply, teacher, batch, None))
    found = losses.distillation(
      self._head(apply, variables, rng), self._head(self._teacher.apply, teacher), hidden, base,
      targets, weights, c.temperature, c.beta, self._smoothing)
    count, apart = jnp.sum(weights), jnp.sum(found["apart"])
    total = (1 - c.alpha) * jnp.sum(found["loss"]) + c.alpha * apart
    aux = {"nats_per_token": jnp.sum(found["nll"]), "divergence": apart}
    if c.on_policy:
      aux["on_policy"] = 0 * count
    return self._with_hidden(total, count, aux, variables, batch, ours, theirs)

  def _of_own_words(self, apply, variables, batch, rng, key) -> tuple:
    c, teacher = self._config, variables[tune.COMPANY]["teacher"]
    made = teaching.own_words(self._write, tune.alone(variables), batch, key)
    hidden, targets, _ = self.own._states(apply, variables, made, rng)
    base, _, _ = self.own._states(self._teacher.apply, teacher, made, None)
    weights = jnp.pad(made["loss_mask"][:, 1:], ((0, 0), (0, 1))) * made["weight"][:, None]
    found = losses.distillation(
      self._head(apply, variables, rng), self._head(self._teacher.apply, teacher), hidden, base,
      targets, weights, c.temperature, c.beta)
    count, apart = jnp.sum(weights.astype(jnp.float32)), jnp.sum(found["apart"])
    aux = {"nats_per_token": jnp.sum(found["nll"]), "divergence": apart, "on_policy": count}
    if self._match:
      aux["hidden"] = 0 * count
    return c.alpha * apart, count, aux

  def _of_labels(self, apply, variables, batch, rng) -> tuple:
    c, (kept, passes) = self._config, _kept(apply)
    (total, weight, aux), ours = self._seen(lambda: self.own.loss(kept, variables, batch, rng))
    (inputs, outputs), = passes  # of the same view of a row, the teacher says what it thinks
    logits, theirs = self._taught(variables, inputs, batch)
    each = self._apart(logits, outputs["logits"], c.temperature, c.beta)
    apart = jnp.sum(each * batch["weight"]) * weight / jnp.maximum(jnp.sum(batch["weight"]), 1e-9)
    total = (1 - c.alpha) * total + c.alpha * apart
    return self._with_hidden(total, weight, {**aux, "divergence": apart}, variables, batch, ours,
                             theirs)

  def _taught(self, variables, inputs, batch) -> tuple:
    """Returns the teacher's logits (B, C) in the student's order of labels, and its layers."""
    if "teacher_logits" in batch:  # where a head alone trains, on features that were made once
      return batch["teacher_logits"], {}
    teacher = variables[tune.COMPANY]["teacher"]
    outputs, theirs = self._seen(lambda: self._teacher.apply(teacher, inputs))
    order = np.array([self._teacher.labels.index(label) for label in self.own.labels])
    return jax.lax.stop_gradient(outputs["logits"])[:, order].astype(jnp.float32), theirs

  def _apart(self, base, logits, temperature=1.0, beta=0.0):
    """Returns the divergence of label distributions (B,); of several labels a row, their mean."""
    if not self.own.multi:
      return losses.apart(base, logits, temperature, beta)
    pair = lambda x: jnp.stack([x, 0 * x], -1)  # noqa: E731
    return jnp.mean(losses.apart(pair(base), pair(logits), temperature, beta), -1)

  def _seen(self, call: Callable) -> tuple:
    return layers_of(call) if self._match else (call(), {})

  def _with_hidden(self, total, weight, aux, variables, batch, ours, theirs) -> tuple:
    if self._match:
      real = batch["attention_mask"] * batch["weight"][:, None]
      found = weight * self._match.distance(
        variables[tune.COMPANY]["projections"], ours, theirs, real)
      total, aux = total + self._config.hidden * found, {**aux, "hidden": found}
    return total, weight, aux

  def _head(self, apply, variables, rng=None) -> Callable:
    """Returns the language model's head, over the words that student and teacher share."""
    def head(hidden, number):
      key = None if rng is None else jax.random.fold_in(rng, number + 1)
      return apply(variables, {"hidden": hidden}, key)["logits"][..., :self._words]

    return head

  def predict(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns what the own task predicts, with the teacher's answers.

    Of tokens "teacher_nll" and "kl", KL(teacher || student), each a sum over the row's tokens (B,);
    of labels "teacher_logits" (B, C) and "kl" (B,).
    """
    return self._beside(self.own.predict, apply, variables, batch)

  def features(self, apply: Callable, variables, batch: dict) -> dict:
    """Returns what baselines are made of; as `predict`."""
    return self._beside(self.own.features, apply, variables, batch)

  def _beside(self, own: Callable, apply, variables, batch) -> dict:
    if tune.COMPANY not in variables:
      return own(apply, variables, batch)
    kept, passes = _kept(apply)
    once = Once(kept)
    found = own(once, variables, batch)
    if self._config.of == "classify":
      inputs, outputs = passes[0]
      logits, _ = self._taught(variables, inputs, batch)
      return {**found, "teacher_logits": logits, "kl": self._apart(logits, outputs["logits"])}
    teacher = variables[tune.COMPANY]["teacher"]
    hidden, targets, weights = self.own._states(once, variables, batch, None)
    base, _, _ = self.own._states(self._teacher.apply, teacher, batch, None)
    both = losses.distillation(self._head(apply, variables), self._head(
      self._teacher.apply, teacher), hidden, base, targets, weights)
    return {**found, "teacher_nll": both["base_nll"], "kl": both["apart"]}

  # On the host, over whole splits.

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the own task's metrics and kl_to_teacher, in nats a token or a row."""
    found = self.own.metrics(outputs)
    if "kl" in outputs:
      count = np.sum(outputs.get("tokens", np.ones(len(outputs["kl"]))), dtype=np.float64)
      found["kl_to_teacher"] = float(np.sum(outputs["kl"], dtype=np.float64) / max(count, 1))
    return found

  def baselines(self, features: dict) -> dict:
    """Returns the own task's baselines and TEACHER; see `predict`."""
    found = self.own.baselines(features)
    return {**found, TEACHER: {split: _as_teacher(part) for split, part in features.items()}}


def _kept(apply: Callable) -> tuple[Callable, list]:
  """Returns an apply, and the list that it writes (inputs, outputs) of its calls to."""
  passes = []

  def call(variables, inputs, rng=None):
    passes.append((inputs, apply(variables, inputs, rng)))
    return passes[-1][1]

  return call, passes


def _as_teacher(part: dict) -> dict:
  """Returns the outputs of a split as if the teacher were the model."""
  if "teacher_logits" in part:
    return {"logits": part["teacher_logits"], "kl": 0 * part["kl"],
            **{key: part[key] for key in ("label", "index") if key in part}}
  return {"nll": part["teacher_nll"], "kl": 0 * part["kl"],
          **{key: part[key] for key in ("tokens", "bytes", "index") if key in part}}
