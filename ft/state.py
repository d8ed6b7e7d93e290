"""The train state and the jitted steps: the only place where gradients are taken.

The gradient, the optimizer and the checkpoints see the trainable tree alone. Frozen weights enter
the step as an argument that is neither donated nor returned, so they cost no gradient, no
optimizer state and no copy.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class State:
  """What changes from step to step, and all that a checkpoint holds."""

  step: jax.Array  # () int32, batches taken
  rng: jax.Array  # (2,) uint32; the step folds its number into it
  trainable: Any
  mutable: Any  # collections that the forward pass updates: batch_stats, or {}
  opt: Any
  bad: jax.Array  # () int32, steps skipped in a row because something was not finite


def create(trainable, mutable, tx: optax.GradientTransformation, seed: int) -> State:
  """The state before the first step."""
  zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731  one buffer each: both are donated
  return State(zero(), jax.random.PRNGKey(seed), trainable, mutable, tx.init(trainable), zero())


def make_apply(module: nn.Module, interceptor: Callable | None = None) -> Callable:
  """apply(variables, inputs, rng=None, mutable=()) -> (outputs, updates).

  A dropout stream exists only where an rng is given, and layers take its presence as training.
  Inputs that are `features` go to the label head alone.
  """

  def apply(variables, inputs, rng=None, mutable=()):
    rngs = {} if rng is None else {"dropout": rng}
    arguments = {"variables": variables, "rngs": rngs, "mutable": list(mutable)}
    with nn.intercept_methods(interceptor or (lambda call, args, kwargs, _: call(*args, **kwargs))):
      if "features" in inputs:
        logits, updates = module.apply(**arguments, method="head", features=inputs["features"])
        return {"features": inputs["features"], "logits": logits}, updates
      return module.apply(**arguments, **inputs)

  return apply


def make_train_step(
  loss: Callable,
  apply: Callable,
  combine: Callable,
  tx: optax.GradientTransformation,
  accumulate: int = 1,
  schedule: Callable = lambda step: 0.0,
) -> Callable:
  """Returns jitted step(state, frozen, batch) -> (state, metrics); the state is donated.

  Args:
    loss: (apply, variables, batch, rng) -> (total, weight, aux), sums over the batch's rows.
    apply: what `make_apply` returns.
    combine: (frozen, trainable) -> variables.
    tx: the optimizer of the trainable tree.
    accumulate: micro-batches a batch is cut into. Gradients and weights are summed and divided
      once, so that the result does not depend on the cut.
    schedule: step -> rate, for the log.

  A step whose loss or gradient is not finite leaves parameters, statistics and optimizer as they
  were; `metrics["bad"]` counts such steps in a row.
  """

  def total_loss(trainable, mutable, frozen, batch, rng):
    updates = dict(mutable)

    def call(variables, inputs, rng=None):
      outputs, new = apply(variables, inputs, rng, tuple(mutable) if rng is not None else ())
      updates.update(new)
      return outputs

    variables = {**combine(frozen, trainable), **mutable}
    total, weight, aux = loss(call, variables, batch, rng)
    return total, (weight, aux, updates)

  gradient = jax.value_and_grad(total_loss, has_aux=True)

  def summed(state, frozen, batch, rng):
    """Σ over micro-batches of (total, weight, aux) and gradients; the last batch statistics."""
    if accumulate == 1:
      (total, (weight, aux, mutable)), grads = gradient(
        state.trainable, state.mutable, frozen, batch, rng
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
        state.trainable, mutable, frozen, rows, jax.random.fold_in(rng, index)
      )
      return (jax.tree.map(jnp.add, sums, ((total, weight, aux), grads)), mutable), None

    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(gradient, state.trainable, state.mutable, frozen, first, rng)
    (total, (weight, aux, _)), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = (((total, weight, aux), grads), state.mutable)
    ((sums, grads), mutable), _ = jax.lax.scan(body, start, (jnp.arange(accumulate), micro))
    return sums, grads, mutable

  def step(state: State, frozen, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    (total, weight, aux), grads, mutable = summed(state, frozen, batch, rng)
    grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)
    norm, mean = optax.tree.norm(grads), total / weight
    updates, opt = tx.update(grads, state.opt, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    finite = jnp.isfinite(mean) & jnp.isfinite(norm)
    new = State(state.step + 1, state.rng, trainable, mutable, opt, jnp.zeros_like(state.bad))
    old = state.replace(step=state.step + 1, bad=state.bad + 1)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    metrics = {"loss": mean, "grad_norm": norm, "bad": new.bad, "weight": weight}
    metrics["rate"] = jnp.asarray(schedule(state.step), jnp.float32)
    metrics |= {key: value / weight for key, value in aux.items()}
    if "stop" in batch:
      metrics["stop"] = jnp.max(batch["stop"])
    return new, metrics

  return jax.jit(step, donate_argnums=0)


def make_predict_step(predict: Callable, apply: Callable, combine: Callable, out_sharding=None):
  """Returns jitted step(trainable, mutable, frozen, batch) -> dict of per-example arrays (B, …)."""

  def call(variables, inputs, rng=None):
    return apply(variables, inputs, rng)[0]

  def step(trainable, mutable, frozen, batch):
    outputs = predict(call, {**combine(frozen, trainable), **mutable}, batch)
    return {**outputs, "index": batch["index"]}

  return jax.jit(step, out_shardings=out_sharding)
