"""LoRA: frozen layers y = x W + b get a trained update, y + s (x A) B, of low rank r.

Sources: Hu et al., LoRA (2021); the scale alpha/sqrt(r): Kalajdzievski, rsLoRA (2023); B's own
rate: Hayou et al., LoRA+ (2024); lengths apart from directions: Liu et al., DoRA (2024); starts
from the pretrained weights: `ft.tune.lora_start`. W + A B is never formed in training.

Parameters of a layer, as in the reference implementation `peft`, but transposed:

    linear, 1x1 convolution   lora_a (in, r), lora_b (r, out)
    convolution               lora_a (h, w, in, r), with the layer's own stride, padding and
                              dilation, then lora_b (r, out) at each position
    embedding                 lora_a (V, r), looked up, and lora_b (r, D); of a table that is the
                              output layer too, the update acts on both sides
    dora                      lora_magnitude (out,)
    start pissa, olora        lora_a0, lora_b0, fixed: y - s (x A0) B0 takes the start's share out
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from ft import errors, tune
from ft.models import layers
from ft.tune import adapters, lora_start
from ft.tune.lora_peft import (  # noqa: F401  part of what a method's file offers ft.tune.peft
  PEFT,
  check_tying,
  patterns_from_peft,
  peft_config,
  peft_values,
)
from ft.weights import stacking

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "rank": (16, "rank of each update", (1, None)),
  "alpha": (32.0, "size of the updates; the scale is a function of it and the rank"),
  "scale": ("alpha/r", "how alpha and rank give the scale", ["alpha/r", "alpha/sqrt(r)"]),
  "rank_pattern": ((), "expression=rank of the layers it is found in; the first found counts"),
  "alpha_pattern": ((), "expression=alpha of the layers it is found in; the first found counts"),
  "dropout": (0.0, "share of an update's inputs set to zero in training", (0.0, 0.99)),
  "plus_ratio": (1.0, "LoRA+: B's learning rate over A's", (1e-3, None)),
  "dora": (False, "DoRA: the length of each output's weights trains by itself"),
  "start": ("zero", "update at the start: zero, or A and B from the weights' SVD or QR",
            ["zero", "pissa", "olora"]),
  "bias": ("none", "biases that train in full: of no, of the adapted, or of all layers",
           ["none", "lora_only", "all"]),
}


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns adapters, the head and `config.bias` as trainable, the rest frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted, a rank is larger than the
      smaller side of a layer, a pattern is found nowhere or cannot be read, layers of a stack
      differ in rank or scale, or no adapted layer has a bias to train.
  """
  del context
  adapter = Lora(config)
  chosen = adapters.targets(config.targets, variables, head, adapter.KINDS)
  every = [layer.path for path, found in chosen.items()
           for layer in adapters.expand(path, found, None, rng)]
  adapter.check_patterns(every)
  also = _biases(config.bias, chosen, variables)
  tuned = adapters.init(adapter, config, variables, rng, head, chosen=chosen, also=also)
  if config.plus_ratio == 1:
    return tuned
  # An embedding's rows are their own inputs, so that its B learns no slower than its A.
  faster = [f"{adapters.COLLECTION}/{path}/lora_b" for path, found in chosen.items()
            if found.kind != "embedding"]
  return dataclasses.replace(tuned, rates={path: config.plus_ratio for path in faster})


def _biases(which: str, chosen, variables):
  """Returns path -> whether it is a bias that `tune.bias` lets train."""
  adapted = tuple(f"params/{path}/bias" for path in chosen)
  if which == "lora_only" and not any(path in adapted for path in tune.flatten(variables)):
    raise errors.UserError("tune.bias='lora_only': none of the adapted layers has a bias")
  wanted = {"none": lambda path: False, "lora_only": lambda path: path in adapted,
            "all": lambda path: path.rpartition("/")[2] == "bias"}
  return wanted[which]


class Lora(adapters.Adapter):
  """The update of one layer."""

  KINDS = ("linear", "pointwise", "conv", "embedding")

  def __init__(self, config):
    super().__init__(config)
    self._ranks = patterns(config.rank_pattern, "tune.rank_pattern", int)
    self._alphas = patterns(config.alpha_pattern, "tune.alpha_pattern", float)

  def rank(self, path: str) -> int:
    """Returns the rank of the layer at a module path with its number."""
    return _first(self._ranks, path, self.config.rank)

  def alpha(self, path: str) -> float:
    """Returns the alpha of the layer at a module path with its number."""
    return _first(self._alphas, path, self.config.alpha)

  def scale(self, path: str) -> float:
    """Returns the scale s of the layer at a module path, with its number or a stack's."""
    if stacking.is_stacked(path):  # the layers of a stack are equal; see `create`
      path = stacking.numbered(path, 0)
    rank = self.rank(path)
    return self.alpha(path) / (math.sqrt(rank) if self.config.scale == "alpha/sqrt(r)" else rank)

  def check_patterns(self, paths: list[str]) -> None:
    """Raises UserError where a pattern is found in no path of an adapted layer."""
    for key, pairs in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas)):
      for expression, _ in pairs:
        if not any(re.search(expression, path) for path in paths):
          raise errors.UserError(
            f"tune.{key}: {expression!r} is found in none of the adapted layers"
            f"{errors.suggest(expression, paths)}; they are:\n  " + "\n  ".join(paths))

  def create(self, layer):
    rank = self._checked_rank(layer)
    if layer.kind == "embedding":
      self._check_embedding(layer)
      # As in `peft`: what starts at zero is the table A, and B is normal.
      return {"lora_a": np.zeros((layer.shape[0], rank), np.float32),
              "lora_b": layer.rng.normal(size=(rank, layer.shape[1])).astype(np.float32)}, {}
    trained, fixed = lora_start.create(self.config.start, layer, rank, self.scale(layer.path))
    if self.config.dora:
      columns = lora_start.host(layer).reshape(-1, layer.shape[-1])
      trained["lora_magnitude"] = np.linalg.norm(columns, axis=0)
    return trained, fixed

  def _checked_rank(self, layer) -> int:
    rank = self.rank(layer.path)
    own = rank != self.config.rank
    adapters.check_rank(rank, layer, "tune.rank_pattern" if own else "tune.rank")
    first = stacking.numbered(stacking.split(layer.path)[0], 0)
    # Layers of different ranks are refused where they are stacked, in `adapters.init`.
    same = rank == self.rank(first) and self.alpha(layer.path) != self.alpha(first)
    if layer.stacked and same:
      raise errors.UserError(
        f"tune.alpha_pattern gives {layer.path} alpha {self.alpha(layer.path)} and {first} "
        f"{self.alpha(first)}, but model.scan stacks them; set model.scan=False, or give them the "
        "same alpha")
    return rank

  def _check_embedding(self, layer) -> None:
    if self.config.dora or self.config.start != "zero":
      key = "tune.dora=True" if self.config.dora else f"tune.start={self.config.start!r}"
      raise errors.UserError(
        f"{key} is for matrices and convolutions, but tune.targets finds the embedding "
        f"{layer.path}; leave it out, or switch that off")

  def adapt(self, p, x, y, module):
    dropped = x
    if not isinstance(module, layers.Embedding):  # ids cannot be zeroed, and `peft` does not either
      dropped = adapters.dropout(module, x, self.config.dropout)
    scale = self.scale("/".join(module.path))
    delta = _update(p["lora_a"], p["lora_b"], scale, dropped, y, module)
    if "lora_a0" in p:
      delta = delta - _update(p["lora_a0"], p["lora_b0"], scale, x, y, module)
    if "lora_magnitude" not in p:
      return y + delta
    kernel, bias = module.weights(x.shape[-1])
    factor = (p["lora_magnitude"] / _norms(p, layers.read(kernel), scale)).astype(y.dtype)
    # `peft` in training reads the dropped input in (factor - 1) x W, too; that is a second product
    # with W, and the paper has no dropout: here x W is the layer's own.
    plain = y if bias is None else y - bias.astype(y.dtype)
    return y + (factor - 1) * plain + factor * delta

  def adapt_output(self, p, x, y, module):
    rows = adapters.dropout(module, x.reshape(-1, x.shape[-1]).astype(y.dtype), self.config.dropout)
    low = rows @ p["lora_b"].T.astype(y.dtype) * self.scale("/".join(module.path))
    return y + (low @ p["lora_a"].T.astype(y.dtype)).reshape(y.shape)

  def merge(self, p, kernel, bias, layer):
    scale = self.scale(layer.path)
    a, b = factors(p)
    matrix = a.reshape(-1, a.shape[-1])
    delta = jnp.matmul(matrix, b, precision="highest") * scale
    new = kernel + delta.reshape(kernel.shape)
    if "lora_magnitude" in p:
      new = new * (p["lora_magnitude"] / _norms(p, kernel, scale))
    return new, bias

  def to_peft(self, p, layer):
    """Returns {suffix: float32 array in torch's orientation} of one layer.

    A start other than zero is written in `peft`'s converted form, a plain update of twice the rank,
    so that the base in the file's user's hands stays the pretrained one.
    """
    a, b = (np.asarray(part, np.float32) for part in factors(p))
    if layer.kind == "embedding":
      return {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    if layer.kind == "conv":
      out = {"lora_A.weight": a.transpose(3, 2, 0, 1), "lora_B.weight": b.T[:, :, None, None]}
    else:
      out = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    if "lora_magnitude" in p:
      length = np.asarray(p["lora_magnitude"], np.float32)
      out["lora_magnitude_vector"] = length[None, :, None, None] if a.ndim == 4 else length
    return out

  def tied_to_peft(self, p, layer):
    """Returns {suffix: array} of the output layer that shares an embedding's table.

    `peft` gives it an update of its own, which with ensure_weight_tying=true is the embedding's.
    """
    a, b = (np.asarray(part, np.float32) for part in factors(p))
    return {"lora_A.weight": b, "lora_B.weight": a}

  def from_peft(self, tensors, layer):
    """The inverse of `to_peft`, for starts of zero.

    Raises:
      UserError: a tensor is missing, unknown, or not of the layer's shape.
    """
    rank = self.rank(layer.path)
    shapes = {"lora_a": (*layer.shape[:-1], rank), "lora_b": (rank, layer.shape[-1])}
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    if layer.kind == "embedding":
      names = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
    elif self.config.dora:
      shapes["lora_magnitude"] = layer.shape[-1:]
      names["lora_magnitude"] = "lora_magnitude_vector"
    if set(tensors) != set(names.values()):
      raise errors.UserError(
        f"the adapter file has {', '.join(sorted(tensors)) or 'nothing'} for {layer.path}, a layer "
        f"of kind {layer.kind}; expected {', '.join(sorted(names.values()))}")
    return {name: _from_torch(name, np.asarray(tensors[suffix]), shapes[name], layer.path)
            for name, suffix in names.items()}, {}

  def patterns_to_peft(self, names: dict[str, str]) -> dict[str, dict]:
    """Returns adapter_config.json's rank_pattern and alpha_pattern.

    Args:
      names: path of each adapted layer, with its number -> its module's name in torch.
    """
    grown = peft_config(self.config)
    ranks = {name: self.rank(path) * grown["r"] // self.config.rank
             for path, name in names.items()}
    alphas = {name: self.alpha(path) * grown["lora_alpha"] / self.config.alpha
              for path, name in names.items()}
    return {"rank_pattern": {"^" + re.escape(name): rank for name, rank in ranks.items()
                             if rank != grown["r"]},
            "alpha_pattern": {"^" + re.escape(name): alpha for name, alpha in alphas.items()
                              if alpha != grown["lora_alpha"]}}


METHOD = Lora


def patterns(given, key: str, kind: type) -> list[tuple[str, float]]:
  """Returns [(expression, value)] of a list of texts "expression=value"; `key` names it in errors.

  Raises:
    UserError: an entry is not of that form, or its value no positive number.
  """
  pairs = []
  for entry in [given] if isinstance(given, str) else given:
    expression, equals, text = entry.rpartition("=")
    try:
      re.compile(expression)
      value = kind(text)
    except (re.error, ValueError):
      value = 0
    if not equals or not expression or not value > 0:
      raise errors.UserError(
        f"{key}: {entry!r} cannot be read; expected a regular expression, '=' and a positive "
        f"{kind.__name__}, as 'query$={kind(8)}'")
    pairs.append((expression, value))
  return pairs


def _first(pairs, path: str, default):
  return next((value for expression, value in pairs if re.search(expression, path)), default)


def factors(p):
  """Returns (A, B) of the whole update: those that train, and what takes a start out beside them.

  A (…, r) and B (r, out), with r twice the rank where there is a start; the update is s A B.
  """
  if "lora_a0" not in p:
    return p["lora_a"], p["lora_b"]
  return (jnp.concatenate([p["lora_a"], p["lora_a0"]], axis=-1),
          jnp.concatenate([p["lora_b"], -p["lora_b0"]], axis=0))


def _update(a, b, scale: float, x, y, module):
  """Returns s (x A) B in the shape and dtype of the layer's output y."""
  a, b = a.astype(y.dtype), b.astype(y.dtype)
  if isinstance(module, layers.Embedding):
    low = jnp.take(a, x, axis=0, mode="fill")  # as the layer: not-a-number outside the table
  elif a.ndim == 4:
    low = module.product(x, a)
  else:
    low = x.reshape(-1, x.shape[-1]).astype(y.dtype) @ a
  # Thin products over 2-D operands; the scale goes on the (rows, r) side, the smallest.
  return ((low.reshape(-1, a.shape[-1]) * scale) @ b).reshape(y.shape)


def _norms(p, kernel, scale: float):
  """Returns the lengths (out,) of the columns of W + s A B, which is not formed.

  They are constants to the gradient: section 4.3 of the DoRA paper, and `peft`.
  """
  a, b, kernel = jax.lax.stop_gradient((*factors(p), kernel))
  kernel = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
  a = a.reshape(-1, a.shape[-1])
  product = lambda left, right: jnp.matmul(left, right, precision="highest")  # noqa: E731
  cross = jnp.sum(product(a.T, kernel) * b, axis=0)
  own = jnp.sum(product(product(a.T, a), b) * b, axis=0)
  squares = jnp.sum(jnp.square(kernel), axis=0) + 2 * scale * cross + scale**2 * own
  return jnp.sqrt(jnp.maximum(squares, 1e-30))


def _from_torch(name: str, tensor, shape: tuple, path: str):
  """Returns a tensor of a `peft` file as our array of this shape."""
  tensor = tensor.astype(np.float32)
  if name == "lora_magnitude":
    array = tensor.ravel()
  elif tensor.ndim == 4:
    array = tensor.transpose(2, 3, 1, 0)  # (h, w, in, out), as our kernels
  else:
    array = tensor.T
  if array.ndim == 4 and array.shape[:2] == (1, 1) and len(shape) == 2:
    array = array[0, 0]
  if array.shape != shape:
    raise errors.UserError(
      f"the adapter file's {name} of {path} has shape {tensor.shape}, which is {array.shape} here; "
      f"expected {shape}")
  return array
