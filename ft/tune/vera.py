"""VeRA: low-rank updates of fixed random matrices that all layers share; two vectors train.

Source: Kopiczko et al., VeRA (2024). y = x W + b + ((x A d) B) b', with A (in, r), B (r, out) cut
from vera_a (largest in, r) and vera_b (r, largest out). Parameters of a layer: vera_lambda_d (r,),
from `start`, and vera_lambda_b (out,), from 0, so training starts at the pretrained function. Usual
rates are ten times LoRA's. The update W + A B is never formed in training.
"""

import math

import jax.numpy as jnp
import numpy as np

from ft import tune
from ft.tune import adapters

KEYS = {
  "targets": (("all-linear",), "expressions searched in module paths as layer_0/attention/query"),
  "rank": (256, "rank of the updates; it may be larger than a layer", (1, None)),
  "start": (0.1, "initial value of the vector between the two matrices"),
  "dropout": (0.0, "share of an update's inputs set to zero in training", (0.0, 0.99)),
}
PEFT = "VERA"


def init(config, variables, rng, head=(), context=None) -> tune.Tuned:
  """Returns the vectors and the head as trainable, everything else frozen; see `ft.tune.init`.

  Raises:
    UserError: a target matches no layer or one that cannot be adapted.
  """
  del context
  return adapters.init(Method(config), config, variables, rng, head)


class Method(adapters.Adapter):
  """The update of one layer."""

  def shared(self, layers, rng):
    inputs, outputs = (max(layer.shape[axis] for layer in layers) for axis in (0, 1))
    rank, gain = self.config.rank, math.sqrt(6)
    return {}, {"vera_a": gain * adapters.kaiming(rng, (inputs, rank), inputs),
                "vera_b": gain * adapters.kaiming(rng, (rank, outputs), rank)}

  def create(self, layer):
    return {"vera_lambda_d": np.full(self.config.rank, self.config.start, np.float32),
            "vera_lambda_b": np.zeros(layer.shape[1], np.float32)}, {}

  def adapt(self, p, x, y, module):
    rows = adapters.dropout(module, x.reshape(-1, x.shape[-1]), self.config.dropout)
    a, b = (matrix.astype(rows.dtype) for matrix in _matrices(p, x.shape[-1], y.shape[-1]))
    d, scale = p["vera_lambda_d"].astype(rows.dtype), p["vera_lambda_b"].astype(rows.dtype)
    return y + ((rows @ a * d) @ b * scale).reshape(y.shape)

  def merge(self, p, kernel, bias, layer):
    a, b = (matrix.astype(jnp.float32) for matrix in _matrices(p, *kernel.shape))
    update = jnp.matmul(a * p["vera_lambda_d"], b, precision="highest")
    return kernel + update * p["vera_lambda_b"], bias

  def to_peft(self, p, layer):
    return {name: np.asarray(p[name], np.float32) for name in ("vera_lambda_b", "vera_lambda_d")}

  def from_peft(self, tensors, layer):
    return {name: jnp.asarray(tensors[name], jnp.float32)
            for name in ("vera_lambda_b", "vera_lambda_d")}, {}

  def shared_to_peft(self, p):
    return {"vera_A": np.asarray(p["vera_a"], np.float32).T,
            "vera_B": np.asarray(p["vera_b"], np.float32).T}

  def shared_from_peft(self, tensors):
    return {}, {"vera_a": jnp.asarray(tensors["vera_A"], jnp.float32).T,
                "vera_b": jnp.asarray(tensors["vera_B"], jnp.float32).T}


METHOD = Method


def _matrices(p, inputs: int, outputs: int):
  """Returns the parts of the shared matrices that a layer of these sizes uses."""
  return p["vera_a"][:inputs], p["vera_b"][:, :outputs]


def peft_config(config) -> dict:
  return {"r": config.rank, "d_initial": config.start, "vera_dropout": config.dropout,
          "projection_prng_key": 0, "save_projection": True, "init_weights": True}


def peft_values(adapter_config: dict) -> dict:
  """Returns values of the section `tune`; the shared matrices have to be in the file."""
  return {"rank": adapter_config.get("r", 256), "start": adapter_config.get("d_initial", 0.1),
          "dropout": adapter_config.get("vera_dropout", 0.0)}
