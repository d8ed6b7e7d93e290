"""What tests of remedies need of a run: the toy encoder, a task of its labels, a context."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tune import toys

from ft import anchor, state, tune
from ft.models import layers
from ft.tasks import classify
from ft.weights import names

ROWS = 8


class Toy(toys.Encoder):
  """The encoder with the inputs' upstream names, and dropout before the head."""

  rate: float = 0.0

  def setup(self):
    super().setup()
    self.drop = layers.Dropout(self.rate)

  def __call__(self, input_ids, attention_mask=None):
    del attention_mask
    features = self.encoder(self.embeddings(input_ids)).mean(1) - self.mean.value
    return {"features": features, "logits": self.classifier(self.drop(features))}


class Setting:
  """A toy classifier, all of which trains, and what a remedy may look at."""

  def __init__(self, rate=0.0, fresh=True, method="full", **values):
    self.module = Toy(rate=rate, depth=1, width=16)
    _, self.variables, _ = toys.make(depth=1, width=16)
    self.tuned = toys.init(method, self.variables, **values)
    self.apply = state.make_apply(self.module, self.tuned.interceptor)
    task = classify.Task.from_spec(
      {"labels": ["a", "b"], "labels_kind": "single", "metric": "accuracy"},
      types.SimpleNamespace(finish=lambda inputs: inputs))
    task._config = types.SimpleNamespace(
      class_weights="none", logit_adjustment=0.0, label_smoothing=0.0, mixup=0.0, cutmix=0.0)
    task._set_priors(np.array([4, 4]), 8)
    self.task = task
    made = ["params/classifier/kernel", "params/classifier/bias"] if fresh else []
    pretrained = types.SimpleNamespace(
      report=names.Report(initialised=made), head=toys.HEAD,
      config=types.SimpleNamespace(vocab_size=11))
    config = types.SimpleNamespace(
      tune=types.SimpleNamespace(method=method), data=types.SimpleNamespace(modality="text"),
      task=types.SimpleNamespace(name="classify"))
    self.run = types.SimpleNamespace(task=task, pretrained=pretrained, config=config)
    self.context = anchor.Context(self.run, self.tuned, self.tuned.frozen, {}, self.apply)

  def step(self, extras, accumulate=1, average=0.0, tx=None):
    """(step(state, batch, fixed) -> (state, metrics), the state before)."""
    tx = tx or optax.sgd(0.1)
    step = state.make_train_step(
      self.task.loss, self.apply, self.tuned.combine, tx, accumulate, extras=extras)
    now = state.create(jax.tree.map(jnp.array, self.tuned.trainable), {}, tx, 0, average)
    return lambda now, batch, fixed=None: step(now, self.tuned.frozen, batch, fixed), now

  def call(self, variables, inputs, rng=None):
    return self.apply(variables, inputs, rng)[0]


def batch(seed=0, rows=ROWS, padding=0):
  rng = np.random.default_rng(seed)
  weight = np.ones(rows, np.float32)
  weight[rows - padding:] = 0
  return {
    "input_ids": rng.integers(0, 11, (rows, 5)).astype(np.int32),
    "attention_mask": np.ones((rows, 5), np.int32),
    "label": rng.integers(0, 2, rows).astype(np.int32), "weight": weight,
    "index": np.where(weight > 0, np.arange(rows), -1).astype(np.int32),
  }


def settings(module, **values):
  """A remedy's section of the config."""
  return types.SimpleNamespace(
    **{key: entry[0] for key, entry in module.KEYS.items()} | values)


def moved(tree, size=0.05, seed=7):
  """A tree of the same form, every leaf changed."""
  return toys.shaken(tree, seed, size)


@pytest.fixture(scope="session")
def toy():
  return Setting()


def flat(tree):
  return tune.flatten(tree)
