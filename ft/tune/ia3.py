"""(IA)^3: layers get one trained factor for each output, or each input, and nothing else.

Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning (2022), as the reference implementation
`peft` has it: keys and values are scaled behind their layer (its bias too), what enters the second
feed-forward layer is scaled before it. Parameters of a layer: ia3_out (out,) or ia3_in (in,); both
start at 1, the pretrained function. Usual rates are those of a head, 1e-3 to 1e-2.
"""

import re

import jax.numpy as jnp
import numpy as np

from ft import errors, tune
from ft.tune import adapters
from ft.weights import stacking

KEYS = {
  "targets": ((
    r"(^|/)(key|value|qkv|[kv](_proj)?|in_proj|block_\d+/conv_\d+/conv)$"
    r"|(?<!attention)/(down|fc2|wo|output(_dense)?|project(/conv)?)$",),
    "expressions of the layers that are scaled: keys, values and second feed-forward layers"),
  "feedforward": ((r"(?<!attention)/(down|fc2|wo|output(_dense)?|project(/conv)?)$",),
                  "those of them that are scaled at their input instead of their output"),
}
PEFT = "IA3"


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the factors and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer, or an expression of `feedforward` no target.
  """
  del context
  method = Method(config)
  chosen = adapters.targets(config.targets, variables, head, method.KINDS)
  _check(method, chosen, rng)
  return adapters.init(method, config, variables, rng, head, chosen=chosen)


def _check(method, chosen, rng) -> None:
  """Raises UserError for an expression without effect, or one that splits a stack.

  A family may have no layer for the default's expression.
  """
  groups = {path: adapters.expand(path, found, None, rng) for path, found in chosen.items()}
  paths = {path for group in groups.values() for layer in group for path in _paths(layer)}
  for expression in method.expressions:
    try:
      found = any(re.search(expression, path) for path in paths)
    except re.error as e:
      raise errors.UserError(
        f"tune.feedforward: {expression!r} is no regular expression: {e}") from e
    if not found and method.expressions != KEYS["feedforward"][0]:
      raise errors.UserError(
        f"tune.feedforward: {expression!r} matches none of the layers that tune.targets names:\n  "
        + "\n  ".join(chosen))
  for path, group in groups.items():
    if len({method.feedforward(layer) for layer in group}) > 1:
      raise errors.UserError(
        f"tune.feedforward names some of the layers of {path}, which model.scan stacks; name all "
        "or none of them, or set model.scan=False")


def _paths(layer) -> tuple[str, str]:
  """Returns a layer's path and, if it is one of a stack, the stack's: both may be searched."""
  return layer.path, stacking.split(layer.path)[0] if layer.stacked else layer.path


class Method(adapters.Adapter):
  """The factors of one layer."""

  KINDS = (*adapters.LINEAR, "conv")

  def __init__(self, config):
    super().__init__(config)
    given = config.feedforward
    self.expressions = (given,) if isinstance(given, str) else tuple(given)

  def feedforward(self, layer) -> bool:
    """Whether a layer's inputs are scaled, not its outputs."""
    return any(re.search(expression, path) for expression in self.expressions
               for path in _paths(layer))

  def create(self, layer):
    name, axis = ("ia3_in", -2) if self.feedforward(layer) else ("ia3_out", -1)
    return {name: np.ones(layer.shape[axis], np.float32)}, {}

  def prepare(self, p, x, module):
    return x * p["ia3_in"].astype(x.dtype) if "ia3_in" in p else x

  def adapt(self, p, x, y, module):
    return y * p["ia3_out"].astype(y.dtype) if "ia3_out" in p else y

  def merge(self, p, kernel, bias, layer):
    if "ia3_in" in p:
      return kernel * p["ia3_in"][:, None], bias
    return kernel * p["ia3_out"], None if bias is None else bias * p["ia3_out"]

  def to_peft(self, p, layer):
    """`feedforward_modules` of the configuration names the layers for which `feedforward` holds."""
    factor = next(np.asarray(p[name], np.float32) for name in ("ia3_in", "ia3_out") if name in p)
    if layer.kind != "linear":
      return {"ia3_l": factor.reshape(1, -1, 1, 1)}
    return {"ia3_l": factor.reshape((1, -1) if "ia3_in" in p else (-1, 1))}

  def from_peft(self, tensors, layer):
    factor = jnp.asarray(tensors["ia3_l"], jnp.float32)
    inputs = self.feedforward(layer) if layer.kind != "linear" else factor.shape[0] == 1
    return {"ia3_in" if inputs else "ia3_out": factor.reshape(-1)}, {}


METHOD = Method


def peft_config(config) -> dict:
  """Of adapter_config.json; `feedforward_modules` needs the layers, see `Method.feedforward`."""
  del config
  return {"init_ia3_weights": True}


def peft_values(adapter_config: dict) -> dict:
  """Of the section `tune`; `feedforward` names modules as the file does."""
  return {"feedforward": adapter_config.get("feedforward_modules") or ()}
