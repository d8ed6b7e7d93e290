"""What stands on a text encoder: pooling, masked words, and the layout of sentence encoders.

The layout of a pooled encoder follows sentence-transformers (Apache-2.0): `modules.json` lists the
encoder (its folder), `1_Pooling` and, for a label head, `2_Dense`, a linear layer without
activation. Shapes: B batch, T tokens, D hidden size.
"""

import json
import pathlib

import flax.linen as nn
import jax.numpy as jnp
from absl import logging

from ft import errors
from ft.models import layers

POOLINGS = ("cls", "mean", "first")
_POOLING = "1_Pooling/config.json"
_FILES = ("modules.json", _POOLING, "2_Dense/config.json")


def pool(x, mask, pooling: str):
  """Returns one vector a text (B, D) of x (B, T, D): the first token, or the mean of real ones."""
  if pooling != "mean":
    return x[:, 0]
  mask = (mask != 0)[..., None].astype(jnp.float32)
  total = (x.astype(jnp.float32) * mask).sum(1)
  return (total / jnp.maximum(mask.sum(1), 1.0)).astype(x.dtype)


class Transform(nn.Module):
  """What stands before a decoder of words: dense layer, activation, norm; (…, D) -> (…, features).

  Attributes:
    features: of the output.
    activation: a key of layers.ACTIVATIONS.
    epsilon: of the norm.
    dense_bias, norm_bias: whether they have one.
    scale: standard deviation of a fresh kernel.
  """

  features: int
  activation: str
  epsilon: float
  compute: layers.Compute = layers.Compute()
  dense_bias: bool = True
  norm_bias: bool = True
  scale: float = 0.02

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(self.scale)
    x = layers.Linear(self.features, self.dense_bias, self.compute.dtype, init, name="dense")(x)
    x = layers.ACTIVATIONS[self.activation](x)
    return layers.LayerNorm(self.epsilon, self.compute.dtype, self.norm_bias, name="norm")(x)


def stated_pooling(folder: pathlib.Path) -> str | None:
  """Returns the pooling that 1_Pooling/config.json states; None without that file.

  A kind that is not known is returned by upstream's name; it is an error later, unless the user
  chooses another.
  """
  file = folder / _POOLING
  if not file.is_file():
    return None
  try:
    stated = json.loads(file.read_text(encoding="utf-8"))
    modes = [key.removeprefix("pooling_mode_") for key, on in stated.items()
             if key.startswith("pooling_mode_") and on is True]
  except (ValueError, AttributeError) as e:
    raise errors.UserError(f"{file} is no readable JSON object: {e}") from None
  known = {"mean_tokens": "mean", "cls_token": "first"}
  return known.get(modes[0], modes[0]) if len(modes) == 1 else " + ".join(modes)


def check_pooling(pooling: str) -> None:
  """Raises UserError for a pooling that is not computed."""
  if pooling not in POOLINGS:
    raise errors.UserError(f"the checkpoint pools by {pooling!r}, which is not supported; "
                           f"set model.pooling to one of {', '.join(POOLINGS)}")


def parts(hf: dict, folder: pathlib.Path) -> tuple:
  """Returns the sub-folders that hold tensors of the model: 2_Dense, if it is a label head."""
  if not (folder / "2_Dense").is_dir():
    return ()
  if "id2label" in hf:
    return ("2_Dense",)
  logging.warning("%s/2_Dense is not read: it is no label head (config.json names no labels)",
                  folder)
  return ()


def without_pooling(files: dict) -> dict:
  """Returns the files of a model that are not about pooling."""
  return {name: content for name, content in files.items() if name not in _FILES}


def with_pooling(files: dict, size: int, pooling: str, labels: int = 0) -> dict:
  """Returns the files of a model with those that say how to pool.

  Args:
    files: name -> bytes of what stands beside weights and config.json.
    size: D.
    pooling: "mean", else the first token.
    labels: outputs of the label head 2_Dense; 0 for none.
  """
  files = dict(files)
  modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
  if labels:
    modules.append(("2_Dense", "Dense"))
    files["2_Dense/config.json"] = _json({
        "in_features": size, "out_features": labels, "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity"})
  if labels or "modules.json" not in files:
    files["modules.json"] = _json([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules)])
  files[_POOLING] = _json({
      "word_embedding_dimension": size,
      "pooling_mode_cls_token": pooling != "mean",
      "pooling_mode_mean_tokens": pooling == "mean",
      "pooling_mode_max_tokens": False,
      "pooling_mode_mean_sqrt_len_tokens": False})
  return files


def _json(value) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode()
