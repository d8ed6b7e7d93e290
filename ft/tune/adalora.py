"""AdaLoRA: low-rank updates in SVD form, whose ranks are allotted by importance while training.

Source: Zhang et al., AdaLoRA (2023), as the reference implementation `peft` has it: a layer's
update is s A diag(e) B, s = alpha / rank. Parameters of a layer: adalora_a (in, r), adalora_b
(r, out), normal with deviation 0.02, and adalora_e (r,), from 0, so training starts at the
pretrained function.

- A penalty keeps A and B orthogonal: their mean Frobenius distance |A' A - I|, |B B' - I|.
- The importance of a parameter w is |w dL/dw|, smoothed, times its smoothed uncertainty; that of a
  singular value, its own plus the means of its two vectors'.
- After each step, all singular values but the most important ones of the whole model are set to 0.
  How many stay falls from rank to target_rank a layer, by a cubic, between the shares `tinit` and
  1 - `tfinal` of the run; from then on they are the same. Before that, one may come back.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft import errors, tune
from ft.tune import adapters

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "rank": (12, "rank of each update at the start", (1, None)),
  "target_rank": (8, "rank of the updates at the end, in the mean of the layers", (1, None)),
  "alpha": (32.0, "size of the updates; their scale is alpha / rank"),
  "dropout": (0.0, "share of an update's inputs set to zero in training", (0.0, 0.99)),
  "tinit": (0.1, "share of the run before ranks fall", (0.0, 1.0)),
  "tfinal": (0.3, "share of the run after ranks have fallen", (0.0, 1.0)),
  "interval": (1, "steps from one allotment of ranks to the next", (1, None)),
  "betas": ((0.85, 0.85), "decay of the means of importance and uncertainty", "list"),
  "orthogonal": (0.1, "coefficient of the penalty that keeps singular vectors orthogonal",
                 (0.0, None)),
}
PEFT = "ADALORA"
_PARTS = ("adalora_a", "adalora_b", "adalora_e")


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns adapters and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, the rank is larger than the
      smaller side of a layer or smaller than its target, or the shares leave no time for ranks to
      fall.
  """
  del context
  _check(config)
  tuned = adapters.init(Method(config), config, variables, rng, head)
  penalty = None
  if config.orthogonal:
    penalty = lambda trainable: config.orthogonal * orthogonality(trainable)  # noqa: E731
  return dataclasses.replace(
    tuned, penalty=penalty, after=lambda total_steps: allocator(config, total_steps))


def _check(config) -> None:
  if config.target_rank > config.rank:
    raise errors.UserError(f"tune.target_rank={config.target_rank} is larger than "
                           f"tune.rank={config.rank}; ranks fall from the latter to the former")
  if config.tinit + config.tfinal >= 1:
    raise errors.UserError(f"tune.tinit={config.tinit} and tune.tfinal={config.tfinal} leave no "
                           "part of the run for ranks to fall; their sum has to be below 1")
  if len(config.betas) != 2 or not all(0 < beta < 1 for beta in config.betas):
    raise errors.UserError(f"tune.betas={config.betas}: expected two numbers between 0 and 1")


class Method(adapters.Adapter):
  """The update of one layer."""

  def __init__(self, config):
    super().__init__(config)
    self.scale = config.alpha / (config.rank + 1e-5)  # peft divides by a little more than the rank

  def create(self, layer):
    rank = self.config.rank
    adapters.check_rank(rank, layer)
    inputs, outputs = layer.shape
    return {
      "adalora_a": layer.rng.normal(0, 0.02, (inputs, rank)).astype(np.float32),
      "adalora_b": layer.rng.normal(0, 0.02, (rank, outputs)).astype(np.float32),
      "adalora_e": np.zeros(rank, np.float32),
    }, {}

  def adapt(self, p, x, y, module):
    rows = adapters.dropout(module, x.reshape(-1, x.shape[-1]), self.config.dropout)
    a, b, e = (p[name].astype(rows.dtype) for name in _PARTS)
    return y + ((rows @ a * (e * self.scale)) @ b).reshape(y.shape)

  def merge(self, p, kernel, bias, layer):
    left = p["adalora_a"] * (p["adalora_e"] * self.scale)
    return kernel + jnp.matmul(left, p["adalora_b"], precision="highest"), bias

  def to_peft(self, p, layer):
    a, b, e = (np.asarray(p[name], np.float32) for name in _PARTS)
    return {"lora_A": a.T, "lora_B": b.T, "lora_E": e[:, None]}

  def from_peft(self, tensors, layer):
    """Ranks that the file leaves out as pruned come back as zeros."""
    a, b, e = (np.asarray(tensors[name], np.float32) for name in ("lora_A", "lora_B", "lora_E"))
    missing = self.config.rank - len(e)
    if missing < 0:
      raise errors.UserError(f"{layer.path}: the file has rank {len(e)}, its init_r says "
                             f"{self.config.rank}")
    pad = lambda rows: jnp.asarray(np.pad(rows, ((0, missing), (0, 0))))  # noqa: E731
    return {"adalora_a": pad(a).T, "adalora_b": pad(b.T), "adalora_e": pad(e)[:, 0]}, {}


METHOD = Method


def orthogonality(trainable):
  """Returns the mean over all singular bases of the Frobenius norm of (Gram matrix - I)."""
  total, count = 0.0, 0
  for path, leaf in tune.flatten(trainable).items():
    name = path.rpartition("/")[2]
    if name in _PARTS[:2]:
      left, right = (leaf.mT, leaf) if name == "adalora_a" else (leaf, leaf.mT)
      gram = jnp.matmul(left, right, precision="highest")
      square = jnp.square(gram - jnp.eye(gram.shape[-1])).sum((-2, -1))
      total += jnp.sqrt(square + 1e-12).sum()  # the root has no gradient at 0
      count += square.size
  return total / count


def budgets(config, total_steps: int, layers: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns the schedule of a run.

  Args:
    config: the section `tune`.
    total_steps: of the run.
    layers: how many are adapted.

  Returns:
    budget (total_steps + 1,), how many singular values stay after step 1, 2, …; whether the others
    are chosen again after it, (total_steps + 1,) bool; and the last step at which they are.
  """
  first = round(config.tinit * total_steps)
  last = max(total_steps - round(config.tfinal * total_steps), 1)
  start, end = config.rank * layers, config.target_rank * layers
  steps = np.arange(total_steps + 1)
  share = np.clip(1 - (steps - first) / max(last - first, 1), 0, 1)
  budget = ((start - end) * share**3 + end).astype(np.int32)
  chooses = (steps > first) & (steps < last) & (steps % config.interval == 0) | (steps == last)
  budget[steps >= last] = end
  return budget, chooses, last


def allocator(config, total_steps: int) -> optax.GradientTransformationExtraArgs:
  """The transformation that sets unimportant singular values to zero; last of the chain.

  Its state: steps taken; {path: mask} of the values that stay; smoothed importance and uncertainty
  of A, B and e. The extra argument `gradient` is the tree of gradients.
  """
  def own(tree):
    return {path: leaf for path, leaf in tune.flatten(tree).items()
            if path.rpartition("/")[2] in _PARTS}

  def begin(params):
    flat = own(params)
    masks = {path: jnp.ones(leaf.shape, bool) for path, leaf in flat.items() if _is_value(path)}
    # One buffer each: the state is donated.
    importance, uncertainty = ({path: jnp.zeros(leaf.shape, jnp.float32)
                                for path, leaf in flat.items()} for _ in range(2))
    return jnp.zeros((), jnp.int32), masks, importance, uncertainty

  def update(updates, state, params, *, gradient=None, **_):
    count, masks, importance, uncertainty = state
    step = count + 1
    layers = sum(mask.size for mask in masks.values()) // config.rank
    budget, chooses, last = budgets(config, total_steps, layers)
    at = jnp.minimum(step, total_steps)
    flat, old, gradients = tune.flatten(updates), own(params), own(gradient)
    new = {path: leaf + flat[path] for path, leaf in old.items()}
    moved = _smoothed(new, gradients, importance, uncertainty, config.betas)
    importance, uncertainty = jax.tree.map(
      lambda a, b: jnp.where(step < last, a, b), moved, (importance, uncertainty))
    chosen = keep(importance, uncertainty, jnp.asarray(budget)[at])
    again = jnp.asarray(chooses)[at]
    masks = {path: jnp.where(again, chosen[path], mask) for path, mask in masks.items()}
    prunes = again | (step > last)
    for path, mask in masks.items():
      flat[path] = jnp.where(prunes & ~mask, -old[path].astype(flat[path].dtype), flat[path])
    return tune.unflatten(flat), (step, masks, importance, uncertainty)

  return optax.GradientTransformationExtraArgs(begin, update)


def keep(importance, uncertainty, budget) -> dict:
  """Returns {path of e: mask} of the `budget` most important singular values of all layers.

  Args:
    importance, uncertainty: {path: smoothed} of A (…, in, r), B (…, r, out) and e (…, r).
    budget: () int.
  """
  scores = {}
  for path in filter(_is_value, importance):
    module = path.rpartition("/")[0]
    a, b, e = (importance[f"{module}/{name}"] * uncertainty[f"{module}/{name}"] for name in _PARTS)
    scores[path] = e + a.mean(-2) + b.mean(-1)
  every = jnp.concatenate([score.ravel() for score in scores.values()])
  # By rank, not by threshold: among equals, exactly as many stay as the budget says.
  order = jnp.argsort(jnp.argsort(every, descending=True))
  masks, start = {}, 0
  for path, score in scores.items():
    masks[path] = (order[start:start + score.size] < budget).reshape(score.shape)
    start += score.size
  return masks


def _is_value(path: str) -> bool:
  return path.endswith("/adalora_e")


def _smoothed(params, gradients, importance, uncertainty, betas):
  """Returns the running means (importance, uncertainty) after a step."""
  now = jax.tree.map(lambda p, g: jnp.abs(p * g).astype(jnp.float32), params, gradients)
  mean = jax.tree.map(lambda m, x: betas[0] * m + (1 - betas[0]) * x, importance, now)
  spread = jax.tree.map(lambda m, x, c: betas[1] * m + (1 - betas[1]) * jnp.abs(x - c),
                        uncertainty, now, mean)
  return mean, spread


def peft_config(config) -> dict:
  """Of adapter_config.json. Ranks are allotted, so the schedule that it asks for is over."""
  return {
    "init_r": config.rank, "target_r": config.target_rank, "lora_alpha": config.alpha,
    "lora_dropout": config.dropout, "tinit": 0, "tfinal": 0, "total_step": 1,
    "deltaT": config.interval, "beta1": config.betas[0], "beta2": config.betas[1],
    "orth_reg_weight": config.orthogonal, "init_lora_weights": True, "rank_pattern": None,
  }


def peft_values(adapter_config: dict) -> dict:
  """Returns values of the section `tune`."""
  rank = adapter_config.get("init_r", 12)
  total = adapter_config.get("total_step") or 1
  return {
    "rank": rank, "target_rank": min(adapter_config.get("target_r", 8), rank),
    "alpha": adapter_config.get("lora_alpha", 8) or rank,
    "dropout": adapter_config.get("lora_dropout", 0.0),
    "tinit": adapter_config.get("tinit", 0) / total,
    "tfinal": adapter_config.get("tfinal", 0) / total,
    "interval": adapter_config.get("deltaT", 1),
    "betas": (adapter_config.get("beta1", 0.85), adapter_config.get("beta2", 0.85)),
    "orthogonal": adapter_config.get("orth_reg_weight", 0.5),
  }
