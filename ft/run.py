"""What a run is made of before it trains: data, examples, loaders, the loaded model.

The chapters of `ft/train.py` hand a `Run` on to each other.
"""

import dataclasses
import functools
import importlib
import pathlib
import time
from collections.abc import Callable

import jax
from absl import logging

from ft import compute, errors, evaluate, logs, mesh, models, state, tune
from ft.data import loader as loaders
from ft.data import sources

PROBE = 8  # batches of train whose gradient a tuning method may look at


@dataclasses.dataclass
class Run:
  """What the chapters of one run hand on."""

  config: object
  folder: pathlib.Path
  mesh: jax.sharding.Mesh
  data: sources.Data
  task: object
  preprocess: object
  pretrained: models.Pretrained
  first_example: str
  poll: Callable
  started: float = dataclasses.field(default_factory=time.monotonic)
  seconds: dict = dataclasses.field(default_factory=dict)  # phase -> wall seconds
  meter: compute.Meter = dataclasses.field(default_factory=compute.Meter)

  def place(self, batch: dict) -> dict:
    return mesh.place_batch(batch, mesh.batch_sharding(self.mesh))

  def lap(self, phase: str) -> None:
    """Books the time since the last lap to a phase."""
    now = time.monotonic()
    self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.started
    self.started = now


def prepare(config, folder, poll) -> tuple[Run, dict]:
  """Reads the data, preprocesses it, and loads the model for the task."""
  started, meter = time.monotonic(), compute.Meter()
  grid = mesh.make(config.mesh)
  mesh.check_batch(grid, config.train.batch, config.train.accumulate)
  info = models.inspect(config.model.source, config.model.family)
  if info.modality != config.data.modality:
    raise errors.UserError(
      f"data.modality={config.data.modality}: {config.model.source} reads {info.modality}; "
      f"set data.modality={info.modality}"
    )
  modality = importlib.import_module(f"ft.data.{config.data.modality}")
  preprocess = modality.Preprocess(config.data, info)
  data = getattr(preprocess, "load", sources.load)(config.data)
  for name in {"train", "validation", "test"} - data.splits.keys():
    raise errors.UserError(
      f"data: there is no {name} split; name its source in data.{name}, or leave "
      f"data.{name}_fraction above 0 to carve it out of train"
    )
  task = importlib.import_module(f"ft.tasks.{config.task.name}").Task(config.task, data, preprocess)
  examples = {}
  for name, rows in data.splits.items():
    poll()
    examples[name] = loaders.prepare(
      rows, task.example, preprocess=preprocess,
      drop_policy=config.data.drop, cache_bytes=config.data.cache_bytes,
    )
  first = getattr(task, "show", preprocess.show)(examples["train"][0])
  logging.info("first example: %s", first)
  poll()
  pretrained = models.load_config(
    config.model, task.model_args, jax.random.PRNGKey(config.seed),
    sharding=functools.partial(mesh.shard, grid),
  )
  run = Run(config, folder, grid, data, task, preprocess, pretrained, first, poll, started,
            meter=meter)
  run.lap("data and model")
  return run, examples


def accompany(run: Run, tuned: tune.Tuned, examples: dict) -> tune.Tuned:
  """Adds the variables that the task has beside the model's, such as a teacher's.

  Where the task has `company(pretrained, tuned, sharding) -> (trainable, frozen)`, it finds both
  joined in variables["company"]. The frozen ones are in no checkpoint. None are in an export, but
  for what the task's `save(company) -> {file name: bytes}` gives, which lies beside the exported
  model, and which `restore(folder) -> company` reads for prediction.

  A task that learns without a gradient gives `fit(stream) -> frozen` in its place, such as a bank
  of features: `stream(split)` yields what its `observe(apply, variables, batch)` makes of each
  batch, as host arrays without padding.
  """
  if hasattr(run.task, "fit"):
    return tune.accompany(tuned, {}, run.task.fit(observer(run, tuned, examples)))
  if not hasattr(run.task, "company"):
    return tuned
  sharding = functools.partial(mesh.shard, run.mesh)
  return tune.accompany(tuned, *run.task.company(run.pretrained, tuned, sharding))


def observer(run: Run, tuned: tune.Tuned, examples: dict) -> Callable:
  """Returns `stream` of a task's `fit`; see `accompany`. Rows come once, in their order."""
  apply = state.make_apply(run.pretrained.module, tuned.reader)
  step = state.make_predict_step(
    run.task.observe, apply, tuned.combine, mesh.replicated(run.mesh)
  )
  c = run.config.train

  def stream(split: str):
    batches = loader(run, examples[split], c.eval_batch or 2 * c.batch)
    bar = logs.Progress(f"looking at {split}", batches.steps_per_epoch)
    for done, batch in enumerate(batches.iterate(0, batches.steps_per_epoch), start=1):
      run.poll()
      outputs = jax.device_get(step(tuned.trainable, {}, tuned.frozen, run.place(batch)))
      bar.show(done, "")
      yield {key: value[outputs["index"] >= 0] for key, value in outputs.items()}

  return stream


def make_loaders(run: Run, examples: dict) -> dict:
  """A shuffling loader for train, one in fixed order for every other split.

  Where the task has `training(examples) -> examples`, the steps go over what it makes of the train
  rows, such as pairs of them; everything else sees the rows.
  """
  c = run.config.train
  if c.train_sample:
    sample = loaders.take(examples["train"], c.train_sample, run.config.seed)
    examples = {**examples, "train_sample": sample}
  steps = getattr(run.task, "training", lambda part: part)
  return {
    name: loader(run, steps(part), c.batch, training=True) if name == "train"
    else loader(run, part, c.eval_batch or 2 * c.batch)
    for name, part in examples.items()
  }


def loader(run: Run, examples, size: int, training: bool = False, buckets=None) -> loaders.Loader:
  """A loader of this process's part of batches of `size` rows; in training shuffled and augmented.

  Args:
    buckets: lengths to pad to, in place of those of the run.
  """
  c, augment = run.config, getattr(run.task, "augment", None)  # such as masks drawn anew
  augment = run.preprocess.augment if run.preprocess.augments else augment
  return loaders.Loader(
    examples, size, seed=c.seed,
    pad={} if examples.lengths is None else run.preprocess.pad,
    buckets=getattr(run.preprocess, "buckets", ()) if buckets is None else buckets,
    augment=augment if training else None,
    shuffle=training,
    process_index=jax.process_index(), process_count=jax.process_count(),
    workers=c.data.workers, prefetch=c.data.prefetch,
  )


def extract_features(run: Run, examples: dict, frozen, mutable, tuned) -> dict:
  """What the task's baselines are made of, of the untuned model: split -> arrays (N, …).

  Where that is what the label head reads, of train too: baselines and the head may learn from it;
  and where the loss compares with the untuned model, see `refer`.
  """
  untouched = state.State(None, None, tuned.trainable, mutable, None, None)
  apply = state.make_apply(run.pretrained.module, tuned.reader)
  step = state.make_predict_step(
    run.task.features, apply, tuned.combine, mesh.replicated(run.mesh)
  )
  c, task = run.config.train, run.task
  left_out = () if task.head_features or getattr(task, "refer", None) else ("train",)
  load = {
    name: loader(run, part, c.batch if name == "train" else c.eval_batch or 2 * c.batch)
    for name, part in examples.items() if name not in left_out
  }
  return evaluate.once(
    run.folder / evaluate.FEATURES, step, untouched, frozen, load, run.place, run.poll
  )


def refer(run: Run, examples: dict, features: dict) -> dict:
  """The examples, with what the task's loss and metrics need to know of the untuned model.

  A task takes part by `refer(outputs) -> arrays (N, …)`, whose outputs are those of its `features`.
  The model runs once over each row before training, and a run that goes on finds the outputs in its
  folder: no second model is held beside the one that trains.
  """
  return {name: part.joined(run.task.refer(features[name])) for name, part in examples.items()}


def probe_gradient(run: Run, examples: dict):
  """Mean gradient of the loss of the model as loaded, over up to PROBE batches of train: a tree."""
  apply = state.make_apply(run.pretrained.module)
  loader = make_loaders(run, {"train": examples["train"]})["train"]

  def loss(params, variables, batch):
    call = lambda variables, inputs, rng=None: apply(variables, inputs)[0]  # noqa: E731
    total, weight, _ = run.task.loss(call, {**variables, "params": params}, batch, None)
    return total / weight

  gradient, variables = jax.jit(jax.grad(loss)), run.pretrained.variables
  batches = [run.place(loader.batch(i)) for i in range(min(PROBE, loader.steps_per_epoch))]
  grads = [gradient(variables["params"], variables, batch) for batch in batches]
  return {"params": jax.tree.map(lambda *g: sum(g) / len(g), *grads)}
