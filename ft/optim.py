"""One optax chain over the trainable tree: clip, update rule, decay, rates by leaf, schedule.

Every rule takes the same step, p <- p - rate(t) * factor(p) * (update + weight_decay * p), so that
weight decay is decoupled (Loshchilov & Hutter 2019) and means the same under each of them.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft import errors, tune
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

_NUMBERED = re.compile(r"(?:^|/)[a-z]*(?:layer|block|stage)s?_(\d+)(?=/)|(?:^|/)h_(\d+)(?=/)")
_BOTTOM = re.compile(r"embed|(?:^|/)(?:conv_)?stem|(?:^|/)w[tp]e/|cls_token", re.IGNORECASE)
_NORM = re.compile(r"norm|(?:^|[/_])(?:ln|bn)[_\d/]", re.IGNORECASE)


def make(config, trainable, total_steps: int, head: tuple[str, ...] = (), tuned=None):
  """Makes the optimizer of a run.

  Args:
    config: the section `optim`.
    trainable: tree of arrays (or shapes) the optimizer will see; nothing else enters it.
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
  _check(config)
  stages = getattr(tuned, "stages", None)
  schedule = make_schedule(config, total_steps)
  if stages and stages.rates:
    schedule = _staged_rate(schedule, stages, total_steps)
  factors = rate_factors(trainable, config.layer_decay, config.head_rate_factor, head)
  own = getattr(tuned, "rates", {})
  factors = _map(lambda path, factor: factor * own.get(path, 1.0), factors)
  parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
  parts += _rule(config)
  if config.weight_decay:
    parts.append(_decay(config.weight_decay, decay_mask(trainable), config.decay_to == "start"))
  if any(np.any(factor != 1) for factor in jax.tree.leaves(factors)):
    parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)))
  if stages:
    parts.append(_late(stages, trainable, total_steps, config))
  parts.append(optax.scale_by_learning_rate(schedule))
  if getattr(tuned, "after", None):
    parts.append(tuned.after(total_steps))
  return _in_float32(optax.chain(*parts)), schedule


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


def _late(stages, trainable, total_steps: int, config) -> optax.GradientTransformation:
  """Holds leaves still until their stage, and corrects Adam's moments for the steps they missed.

  The moments of a leaf that waited are those of an optimizer that starts with it, except for the
  correction of their start at zero, which counts the run's steps: the factor makes up for it.
  """
  def first(path, _):
    return np.round(np.asarray(stages.starts.get(path, 0.0)) * total_steps).astype(np.float32)

  firsts = _map(first, trainable)
  betas = config.betas or BETAS["adamw"]

  def factor(start, step):
    if config.name != "adamw":
      return jnp.where(step >= start, 1.0, 0.0)
    own, b1, b2 = jnp.maximum(step - start, 0.0) + 1, *betas
    mean = (1 - b1**(step + 1)) / (1 - b1**own)
    square = (1 - b2**own) / (1 - b2**(step + 1))
    return jnp.where(step >= start, mean * jnp.sqrt(square), 0.0)

  def update(updates, count, params=None):
    del params
    step = count.astype(jnp.float32)
    return jax.tree.map(lambda u, s: u * factor(s, step), updates, firsts), count + 1

  return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


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


def _rule(config) -> list[optax.GradientTransformation]:
  """The update rule without decay and rate."""
  if config.name == "adamw":
    b1, b2 = config.betas or BETAS["adamw"]
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
    return axes > 1 and name not in ("bias", "scale") and not _NORM.search(path)
  return _map(decays, trainable)


def rate_factors(trainable, layer_decay: float = 1.0, head_factor: float = 1.0, head=()):
  """Returns a tree of float, each leaf's rate over the schedule's.

  With L numbered layers (`layer_{i}`, `blocks_{i}`, …) embeddings and stem have depth 0, layer i
  has i + 1, and the head and whatever else stands above the layers L + 1; the factor is
  layer_decay^(L + 1 - depth), as in BEiT (Bao et al. 2022). L is the largest number that trains.

  Raises:
    UserError: `layer_decay` is not 1 and no layer has a number.
  """
  numbers = {path: _number(path, leaf) for path, leaf in tune.flatten(trainable).items()}
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
      depth = 0 if _BOTTOM.search(path) else count + 1
    return layer_decay ** np.float32(count + 1 - depth)
  return _map(factor, trainable)


def _number(path: str, leaf):
  """The layer number in a path: the first one, as inner modules may be numbered too.

  Of stacked layers all numbers, of a shape that broadcasts over the leaf.
  """
  if stacking.is_stacked(path):
    return np.arange(leaf.shape[0]).reshape(-1, *(1,) * (len(leaf.shape) - 1))
  found = _NUMBERED.search(path)
  return int(found[1] or found[2]) if found else None


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
