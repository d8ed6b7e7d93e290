"""One optax chain over the trainable tree: clip, update rule, decay, rates by leaf, schedule.

Every rule takes the same step, p <- p - rate(t) * factor(p) * (update + weight_decay * p), so that
weight decay is decoupled (Loshchilov & Hutter 2019) and means the same under each of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft import errors, tune
from ft.tune import parts
from ft.weights import stacking

KEYS = {
  "name": ("adamw", "update rule", ["adamw", "sgd", "adafactor", "lion"]),
  "rate": (0.0, "peak learning rate; has to be set", (0.0, None)),
  "head_rate_factor": (1.0, "the head's rate over the rest's", (0.0, None)),
  "weight_decay": (0.01, "decoupled decay of matrices; norms, biases and vectors have none",
                   (0.0, None)),
  "decay_to": ("zero", "what decay pulls towards: zero, or the point training starts from",
               ["zero", "start"]),
  "betas": (None, "decay of both moments; adamw (0.9, 0.999), lion (0.9, 0.99) if not set", "list"),
  "eps": (1e-8, "adamw: added to the root of the second moment", (0.0, None)),
  "momentum": (0.9, "sgd: decay of the velocity", (0.0, 1.0)),
  "warmup": (0.1, "steps of linear warm-up, or below 1 their share of the run", (0.0, None)),
  "schedule": ("cosine", "rate after warm-up", ["cosine", "linear", "constant"]),
  "final_rate_fraction": (0.0, "cosine, linear: rate at the last step over the peak", (0.0, 1.0)),
  "layer_decay": (1.0, "each layer's rate over that of the layer above it", (0.0, 1.0)),
  "clip": (1.0, "largest global norm of the gradient; 0 clips nothing", (0.0, None)),
}

# The keys a rule does not read have to keep their default: a value without effect is a mistake.
READS = {"adamw": ("betas", "eps"), "lion": ("betas",), "sgd": ("momentum",), "adafactor": ()}
BETAS = {"adamw": (0.9, 0.999), "lion": (0.9, 0.99)}


def make(config, trainable, total_steps: int, head: tuple[str, ...] = (), tuned=None):
  """Makes the optimizer of a run.

  Args:
    config: the section `optim`.
    trainable: tree of arrays (or shapes) the optimizer will see; nothing else enters it. Where it
      is empty, nothing of the section is read.
    total_steps: optimizer steps of the whole run.
    head: path prefixes of the head, such as ("params/classifier",).
    tuned: the tuning method's split, whose `rates`, `stages` and `after` are used; or None.

  Returns:
    (tx, schedule): an optax transformation whose state is float32 whatever the parameters' dtype,
    and step -> rate, float32, before the factors of head and layers. With decay_to="start" its
    update needs the extra argument `start`, the trainable tree before training.

  Raises:
    UserError: rate missing, warm-up as long as the run, a key that the rule never reads, or
      `layer_decay` for a tree without numbered layers.
  """
  if not jax.tree.leaves(trainable):
    return optax.identity(), lambda step: 0.0
  _check(config)
  stages = getattr(tuned, "stages", None)
  schedule = make_schedule(config, total_steps)
  if stages and stages.rates:
    schedule = _staged_rate(schedule, stages, total_steps)
  factors = rate_factors(trainable, config.layer_decay, config.head_rate_factor, head)
  own = getattr(tuned, "rates", {})
  factors = _map(lambda path, factor: factor * own.get(path, 1.0), factors)
  firsts = _firsts(stages, trainable, total_steps) if stages else None
  chain = [optax.clip_by_global_norm(config.clip)] if config.clip else []
  chain += _rule(config, firsts)
  if config.weight_decay:
    chain.append(_decay(config.weight_decay, decay_mask(trainable), config.decay_to == "start"))
  if any(np.any(factor != 1) for factor in jax.tree.leaves(factors)):
    chain.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)))
  if stages:
    chain.append(_still(firsts))
  chain.append(optax.scale_by_learning_rate(schedule))
  if getattr(tuned, "after", None):
    chain.append(tuned.after(total_steps))
  return _in_float32(optax.chain(*chain)), schedule


def _staged_rate(schedule, stages, total_steps: int):
  """The schedule times the factor of the stage that a step belongs to."""
  starts = jnp.asarray(stages.steps(total_steps))
  factors = jnp.asarray(stages.rates, jnp.float32)
  return lambda step: schedule(step) * factors[jnp.sum(step >= starts) - 1]


def _decay(rate: float, mask, to_start: bool) -> optax.GradientTransformationExtraArgs:
  """Adds rate * parameter, or rate * (parameter - start), to the updates of the mask's leaves."""
  def update(updates, state, params, *, start=None, **_):
    if to_start:
      params = jax.tree.map(lambda p, origin: p - origin.astype(p.dtype), params, start)
    one = lambda decays, u, p: u + rate * p if decays else u  # noqa: E731
    return jax.tree.map(one, mask, updates, params), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _firsts(stages, trainable, total_steps: int):
  """The step each leaf starts at, of a stacked leaf each layer: a tree of int32."""
  def first(path, _):
    return np.round(np.asarray(stages.starts.get(path, 0.0)) * total_steps).astype(np.int32)
  return _map(first, trainable)


def _still(firsts) -> optax.GradientTransformation:
  """Holds leaves still before their first step, so that nothing, decay included, moves them."""
  def update(updates, count, params=None):
    del params
    held = jax.tree.map(lambda u, first: jnp.where(count >= first, u, 0.0), updates, firsts)
    return held, optax.safe_increment(count)

  return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def _late_adam(b1: float, b2: float, eps: float, firsts) -> optax.GradientTransformation:
  """Adam in which each leaf's moments are corrected for the steps since its own first one.

  A leaf that waited has no gradient and moments of zero, so it then moves as under an Adam that
  starts with it; the run's count of steps would give it smaller steps.
  """
  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
    square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)

    def one(m, v, first):
      own = jnp.maximum(count - first, 1).astype(jnp.float32)
      return m / (1 - b1**own) / (jnp.sqrt(v / (1 - b2**own)) + eps)

    updates = jax.tree.map(one, mean, square, firsts)
    return updates, optax.ScaleByAdamState(count, mean, square)

  return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def _check(config) -> None:
  if not config.rate > 0:
    raise errors.UserError(
      "optim.rate has to be set above 0; usual values with adamw: 1e-5 to 1e-4 for full "
      "fine-tuning, 1e-4 to 1e-3 for LoRA, 1e-3 for a head"
    )
  for key in {key for keys in READS.values() for key in keys} - set(READS[config.name]):
    if config[key] != KEYS[key][0]:
      readers = ", ".join(name for name, keys in READS.items() if key in keys)
      raise errors.UserError(
        f"optim.{key}={config[key]} has no effect with optim.name={config.name!r}; "
        f"it belongs to {readers}"
      )
  if config.betas is not None and not (
    len(config.betas) == 2 and all(0 <= beta < 1 for beta in config.betas)
  ):
    raise errors.UserError(f"optim.betas={config.betas}: expected two numbers from 0 to below 1")
  if not config.layer_decay > 0:
    raise errors.UserError("optim.layer_decay=0 would freeze all layers; use tune.method='head'")


def _rule(config, firsts=None) -> list[optax.GradientTransformation]:
  """The update rule without decay and rate; `firsts`: of leaves that start late, or None."""
  if config.name == "adamw":
    b1, b2 = config.betas or BETAS["adamw"]
    if firsts is not None:
      return [_late_adam(b1, b2, config.eps, firsts)]
    return [optax.scale_by_adam(b1, b2, config.eps)]
  if config.name == "lion":
    return [optax.scale_by_lion(*(config.betas or BETAS["lion"]))]
  if config.name == "sgd":
    return [optax.trace(config.momentum)] if config.momentum else []
  # Shazeer & Stern (2018) with an absolute rate, the usual setting for fine-tuning: a rate relative
  # to the parameter would hold back leaves that start at zero.
  return [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]


def make_schedule(config, total_steps: int):
  """Returns step -> rate: up to the peak at step `warmup`, then down to its end at `total_steps`.

  The first step has rate peak/(warmup + 1), not 0, so that no step is without effect.
  """
  warmup = int(config.warmup if config.warmup >= 1 else round(config.warmup * total_steps))
  if warmup and warmup >= total_steps:
    raise errors.UserError(
      f"optim.warmup={config.warmup} is {warmup} steps, but the run has {total_steps}; "
      "it has to be shorter than the run"
    )
  rest = max(total_steps - warmup, 1)
  if config.schedule == "cosine":
    after = optax.cosine_decay_schedule(config.rate, rest, config.final_rate_fraction)
  elif config.schedule == "linear":
    after = optax.linear_schedule(config.rate, config.rate * config.final_rate_fraction, rest)
  else:
    after = optax.constant_schedule(config.rate)
  if not warmup:
    return after
  before = optax.linear_schedule(config.rate / (warmup + 1), config.rate, warmup)
  return optax.join_schedules([before, after], [warmup])


def decay_mask(trainable):
  """Returns a tree of bool: True for leaves that decay, that is neither norm, bias nor 1-D."""
  def decays(path, leaf):
    name = path.rpartition("/")[2]
    axes = len(leaf.shape) - stacking.is_stacked(path)
    return axes > 1 and name not in ("bias", "scale") and not parts.is_norm(path)
  return _map(decays, trainable)


def rate_factors(trainable, layer_decay: float = 1.0, head_factor: float = 1.0, head=()):
  """Returns a tree of float, each leaf's rate over the schedule's.

  With L numbered layers (`layer_{i}`, `blocks_{i}`, …) embeddings and stem have depth 0, layer i
  has i + 1, and the head and whatever else stands above the layers L + 1; the factor is
  layer_decay^(L + 1 - depth), as in BEiT (Bao et al. 2022). L is the largest number that trains.

  Raises:
    UserError: `layer_decay` is not 1 and no layer has a number.
  """
  numbers = {path: parts.numbers(path, leaf) for path, leaf in tune.flatten(trainable).items()}
  count = 1 + max((int(np.max(n)) for n in numbers.values() if n is not None), default=-1)
  if layer_decay != 1 and not count:
    raise errors.UserError(
      f"optim.layer_decay={layer_decay}: no trainable parameter belongs to a numbered layer "
      "(layer_0, blocks_0, …), so there is nothing to grade; leave it at 1"
    )

  def factor(path, _):
    if tune.under(path, head):
      return float(head_factor)
    if numbers[path] is not None:
      depth = numbers[path] + 1
    else:
      depth = 0 if parts.is_bottom(path) else count + 1
    return layer_decay ** np.float32(count + 1 - depth)
  return _map(factor, trainable)


def _map(function, tree):
  """Maps function(path, leaf) over a nested dict."""
  return tune.unflatten({path: function(path, leaf) for path, leaf in tune.flatten(tree).items()})


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Moments and norms of half-precision leaves are kept in float32: in bfloat16 the second moment
  would stop moving, as 1 - 0.999 is below half a unit in its last place."""
  def raised(tree):
    def cast(x):
      small = jnp.issubdtype(x.dtype, jnp.floating) and jnp.dtype(x.dtype).itemsize < 4
      return x.astype(jnp.float32) if small else x
    return jax.tree.map(cast, tree)

  def update(grads, state, params=None, **extra):
    return tx.update(raised(grads), state, params if params is None else raised(params), **extra)

  return optax.GradientTransformationExtraArgs(lambda params: tx.init(raised(params)), update)
