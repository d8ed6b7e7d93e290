"""The train state and the jitted steps: the only place where gradients are taken.

The gradient, the optimizer and the checkpoints see the trainable tree alone. Frozen weights enter
the step as an argument that is neither donated nor returned, so they cost no gradient, no
optimizer state and no copy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from ft import tune

MEMORY = "memory"  # collection in which the losses of training find what is remembered


@flax.struct.dataclass
class State:
  """What changes from step to step, and all that a checkpoint holds."""

  step: jax.Array  # () int32, batches taken
  rng: jax.Array  # (2,) uint32; the step folds its number into it
  trainable: Any
  mutable: Any  # collections that the forward pass updates: batch_stats, or {}
  opt: Any
  bad: jax.Array  # () int32, steps skipped in a row because something was not finite
  average: Any = None  # running mean of trainable (float32), or None
  memory: Any = None  # key -> what a remedy remembers from step to step; None: nothing


@dataclasses.dataclass(frozen=True)
class Term:
  """A further loss on rows of its own, which stand in the batch under `key`.

  Attributes:
    loss: (apply, variables, batch, rng, base) -> (total, weight, aux), as `Extras.wrap` makes.
    key: of the batch of these rows.
    coefficient: factor of the mean loss.
  """

  loss: Callable
  key: str
  coefficient: float = 1.0


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a loss remembers from step to step, such as the weights of groups.

  The loss finds it in variables[MEMORY][key], and gives sums for it in aux[MEMORY][key].

  Attributes:
    key: its name.
    start: a tree, before the first step.
    move: (tree, the step's sums) -> tree after it.
  """

  key: str
  start: Any
  move: Callable


@dataclasses.dataclass(frozen=True)
class Extras:
  """What is minimised beside the task's loss, and how; the defaults change nothing.

  `fixed` is what the caller gives the step beside the frozen variables: a dict of trees that
  neither train nor change, such as {"start": the trainable tree before training}. The optimizer
  gets them as extra arguments.

  Attributes:
    wrap: task loss -> loss'(apply, variables, batch, rng, base) -> (total, weight, aux), where
      base() gives the variables before training: fixed["start"] in place of what trains, and
      fixed["mutable"] in place of what the forward pass updates, where it updates something.
    terms: further losses.
    penalty: (trainable, fixed) -> scalar, added to the mean loss once a step.
    point: (trainable, fixed, rng) -> trainable, at which training's forward pass is evaluated.
    rho: sharpness-aware minimisation's radius; 0: off.
    average: decay of the running mean of the trainable tree; 0: off.
    memories: what is remembered from step to step.
  """

  wrap: Callable | None = None
  terms: tuple[Term, ...] = ()
  penalty: Callable | None = None
  point: Callable | None = None
  rho: float = 0.0
  average: float = 0.0
  memories: tuple[Memory, ...] = ()


def create(
  trainable, mutable, tx: optax.GradientTransformation, seed: int, average: float = 0.0,
  memories: tuple[Memory, ...] = (),
) -> State:
  """The state before the first step; `average`: whether a running mean is kept."""
  zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731  one buffer each: both are donated
  mean = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable) if average else None
  rng = jax.random.PRNGKey(seed)
  memory = {memory.key: jax.tree.map(jnp.array, memory.start) for memory in memories} or None
  return State(zero(), rng, trainable, mutable, tx.init(trainable), zero(), mean, memory)


def averaged(state: State) -> State:
  """The state with the running mean, where there is one, in place of what trains."""
  if state.average is None:
    return state
  mean = jax.tree.map(lambda m, x: m.astype(x.dtype), state.average, state.trainable)
  return state.replace(trainable=mean)


def make_apply(
  module: nn.Module, interceptor: Callable | None = None, around: Callable | None = None
) -> Callable:
  """apply(variables, inputs, rng=None, mutable=()) -> (outputs, updates).

  A dropout stream exists only where an rng is given, and layers take its presence as training.
  Inputs that are `features` go to the label head alone, those that are `hidden` to the language
  model's head: {"hidden": (…, D)} gives {"logits": (…, V)}.

  Args:
    module: the model.
    interceptor: for `nn.intercept_methods`, or None.
    around: apply -> apply, put around it: it may change the model's inputs and outputs.
  """

  def apply(variables, inputs, rng=None, mutable=()):
    rngs = {} if rng is None else {"dropout": rng}
    arguments = {"variables": variables, "rngs": rngs, "mutable": list(mutable)}
    with nn.intercept_methods(interceptor or (lambda call, args, kwargs, _: call(*args, **kwargs))):
      if "features" in inputs:
        logits, updates = module.apply(**arguments, method="head", features=inputs["features"])
        return {"features": inputs["features"], "logits": logits}, updates
      if "hidden" in inputs:
        logits, updates = module.apply(**arguments, method="lm_logits", hidden=inputs["hidden"])
        return {"logits": logits}, updates
      return module.apply(**arguments, **inputs)

  return around(apply) if around else apply


def make_train_step(
  loss: Callable,
  apply: Callable,
  combine: Callable,
  tx: optax.GradientTransformation,
  accumulate: int = 1,
  schedule: Callable = lambda step: 0.0,
  stages: tune.Stages | None = None,
  extras: Extras = Extras(),  # noqa: B008  frozen
) -> Callable:
  """Returns jitted step(state, frozen, batch, fixed=None, stage=0) -> (state, metrics).

  The state is donated; `stage` is static, and a new one is compiled when it is first met.

  Args:
    loss: (apply, variables, batch, rng) -> (total, weight, aux), sums over the batch's rows.
    apply: what `make_apply` returns.
    combine: (frozen, trainable) -> variables.
    tx: the optimizer of the trainable tree.
    accumulate: micro-batches a batch is cut into. Gradients and weights are summed and divided
      once, so that the result does not depend on the cut.
    schedule: step -> rate, for the log.
    stages: when leaves start to train; before that they cost no gradient.
    extras: what is minimised beside the loss.

  A step whose loss or gradient is not finite leaves parameters, statistics and optimizer as they
  were; `metrics["bad"]` counts such steps in a row.
  """
  tx = optax.with_extra_args_support(tx)
  main = extras.wrap(loss) if extras.wrap else lambda *args: loss(*args[:4])

  def total_loss(trainable, mutable, frozen, fixed, batch, rng, stage, loss):
    fixed = dict(fixed)
    memory = fixed.pop(MEMORY, None)
    updates = dict(mutable)

    def call(variables, inputs, rng=None):
      outputs, new = apply(variables, inputs, rng, tuple(mutable) if rng is not None else ())
      updates.update(new)
      return outputs

    point = _held(trainable, stages, stage)
    if extras.point:
      point = extras.point(point, fixed, rng)
    variables = {**combine(frozen, point), **mutable}
    if memory is not None:
      variables[MEMORY] = memory
    base = lambda: {**combine(frozen, fixed["start"]), **fixed.get("mutable", {})}  # noqa: E731
    total, weight, aux = loss(call, variables, batch, rng, base)
    return total, (weight, aux, updates)

  def summed(trainable, mutable, frozen, fixed, batch, rng, stage, loss):
    """Σ over micro-batches of (total, weight, aux) and gradients; the last batch statistics."""
    def gradient(*args):
      return jax.value_and_grad(total_loss, has_aux=True)(*args, stage, loss)

    if accumulate == 1:
      (total, (weight, aux, mutable)), grads = gradient(
        trainable, mutable, frozen, fixed, batch, rng
      )
      return (total, weight, aux), grads, mutable
    # Interleaved micro-batches keep every row on the device that holds it.
    micro = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
    )

    def body(carry, part):
      sums, mutable = carry
      index, rows = part
      (total, (weight, aux, mutable)), grads = gradient(
        trainable, mutable, frozen, fixed, rows, jax.random.fold_in(rng, index)
      )
      return (jax.tree.map(jnp.add, sums, ((total, weight, aux), grads)), mutable), None

    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(gradient, trainable, mutable, frozen, fixed, first, rng)
    (total, (weight, aux, _)), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = (((total, weight, aux), grads), mutable)
    ((sums, grads), mutable), _ = jax.lax.scan(body, start, (jnp.arange(accumulate), micro))
    return sums, grads, mutable

  def objective(trainable, mutable, frozen, fixed, batch, rng, stage):
    """(loss, weight, aux), gradients, mutable, sums for the memories, of all that is minimised."""
    rows = {key: value for key, value in batch.items() if key not in _keys(extras)}
    sums, grads, mutable = summed(trainable, mutable, frozen, fixed, rows, rng, stage, main)
    total, weight, aux = sums
    aux, learnt = dict(aux), aux.get(MEMORY, {})
    aux.pop(MEMORY, None)
    mean, aux = total / weight, {key: value / weight for key, value in aux.items()}
    if extras.terms or extras.penalty:
      aux["own_loss"] = mean
    grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)
    for number, term in enumerate(extras.terms, 1):
      more, further, _ = summed(trainable, mutable, frozen, fixed, batch[term.key],
                                jax.random.fold_in(rng, number), stage, term.loss)
      share = term.coefficient / more[1]
      grads = jax.tree.map(lambda g, h, c=share: g + (c * h).astype(g.dtype), grads, further)
      mean, aux[f"{term.key}_loss"] = mean + share * more[0], more[0] / more[1]
    if extras.penalty:
      def penalised(trainable):
        return extras.penalty(_held(trainable, stages, stage), fixed)

      aux["penalty"], further = jax.value_and_grad(penalised)(trainable)
      grads = jax.tree.map(lambda g, h: g + h.astype(g.dtype), grads, further)
      mean = mean + aux["penalty"]
    return (mean, weight, aux), grads, mutable, learnt

  def step(state: State, frozen, batch, fixed=None, stage: int = 0):
    fixed = fixed or {}
    rng = jax.random.fold_in(state.rng, state.step)
    known = fixed if state.memory is None else {**fixed, MEMORY: state.memory}
    args = (state.mutable, frozen, known, batch, rng, stage)
    (mean, weight, aux), grads, mutable, learnt = objective(state.trainable, *args)
    norm = optax.tree.norm(grads)
    if extras.rho:  # the gradient where the loss near by is highest: Foret et al. (2021)
      radius = extras.rho / jnp.maximum(norm, 1e-12)
      higher = jax.tree.map(lambda p, g: p + (radius * g).astype(p.dtype), state.trainable, grads)
      _, grads, *_ = objective(higher, *args)
      norm = optax.tree.norm(grads)
    updates, opt = tx.update(grads, state.opt, state.trainable, gradient=grads, **fixed)
    trainable = optax.apply_updates(state.trainable, updates)
    finite = jnp.isfinite(mean) & jnp.isfinite(norm)
    average = _moved(state, trainable, extras.average)
    memory = {m.key: m.move(state.memory[m.key], learnt[m.key]) for m in extras.memories} or None
    new = State(state.step + 1, state.rng, trainable, mutable, opt, jnp.zeros_like(state.bad),
                average, memory)
    old = state.replace(step=state.step + 1, bad=state.bad + 1)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    metrics = {"loss": mean, "grad_norm": norm, "bad": new.bad, "weight": weight}
    metrics["rate"] = jnp.asarray(schedule(state.step), jnp.float32)
    metrics |= aux
    if "stop" in batch:
      metrics["stop"] = jnp.max(batch["stop"])
    return new, metrics

  return jax.jit(step, donate_argnums=0, static_argnums=4)


def _keys(extras: Extras) -> set[str]:
  return {term.key for term in extras.terms}


def _held(trainable, stages, stage: int):
  """The trainable tree in which what does not train yet passes no gradient."""
  if stages is None:
    return trainable
  flat = tune.flatten(trainable)
  for path, leaf in flat.items():
    live = stages.live(path, stage)
    if live is not True:
      still = jax.lax.stop_gradient(leaf)
      flat[path] = still if live is False else jnp.where(live, leaf, still)
  return tune.unflatten(flat)


def _moved(state: State, trainable, decay: float):
  """The running mean after a step, its decay smaller at first as in Adam's correction."""
  if state.average is None:
    return None
  steps = state.step.astype(jnp.float32)
  keep = jnp.minimum(decay, (1 + steps) / (10 + steps))
  return jax.tree.map(lambda m, x: keep * m + (1 - keep) * x.astype(m.dtype),
                      state.average, trainable)


def make_predict_step(predict: Callable, apply: Callable, combine: Callable, out_sharding=None):
  """Returns jitted step(trainable, mutable, frozen, batch) -> dict of per-example arrays (B, …)."""

  def call(variables, inputs, rng=None):
    return apply(variables, inputs, rng)[0]

  def step(trainable, mutable, frozen, batch):
    outputs = predict(call, {**combine(frozen, trainable), **mutable}, batch)
    return {**outputs, "index": batch["index"]}

  return jax.jit(step, out_shardings=out_sharding)
