"""Chronos-Bolt, a quantile forecaster (Ansari et al. 2024, arXiv:2403.07815, and its successor).

A series is scaled by its mean and deviation, cut into patches, encoded by a T5 encoder, and one
decoder token is mapped to all quantiles of all steps ahead. Follows the chronos-forecasting
package's `chronos_bolt.py` (Apache-2.0) in names, defaults and the places of dropout.
Shapes: B series, T steps of context, P patches of L steps, D width, Q quantiles, H steps ahead.
"""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import base, layers, series, t5
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "series"
# Its files have T5's model_type; the class that they name tells them apart.
MODEL_TYPES = ("ChronosBoltModelForForecasting",)
HEAD = ("params/output_patch_embedding",)
SURGERY = {"depth": Surgery("num_layers", ("params/encoder",))}

_REG = 1  # row of the token behind the patches
_KEYS = ("context_length", "prediction_length", "input_patch_size", "input_patch_stride",
         "quantiles", "use_reg_token")

NAMES = [
    Rule("shared.weight", "params/shared/embedding"),
    *t5.stack_rules("encoder", ("self_attention", "ff"), ""),
    *t5.stack_rules("decoder", ("self_attention", "cross_attention", "ff"), ""),
    *(rule for block in ("input_patch_embedding", "output_patch_embedding")
      for part in ("hidden", "output", "residual")
      for rule in base.linear_rules(f"{block}.{part}_layer", f"params/{block}/{part}")),
    Rule("lm_head.weight", transform="keep"),  # of the T5 that training started from
]


@dataclasses.dataclass(frozen=True)
class Config(t5.Config):
  """T5's keys, and those under config.json's chronos_config.

  Attributes:
    context_length: most steps that are read; earlier ones are dropped.
    prediction_length: H.
    input_patch_size, input_patch_stride: steps of a patch, and from one patch to the next.
    quantiles: the Q levels.
    use_reg_token: whether a learned token stands behind the patches.
  """

  decoder_start_token_id: int | None = 0
  head: str = "forecast"
  context_length: int = 2048
  prediction_length: int = 64
  input_patch_size: int = 16
  input_patch_stride: int = 16
  quantiles: tuple = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
  use_reg_token: bool = False

  PREFIXES = {"t5": "T5"}
  HEADS = {"forecast": ("ChronosBoltModelForForecasting",)}
  DEFAULTS = {}
  OURS = (*t5.Config.OURS, *_KEYS)

  @classmethod
  def stated_head(cls, hf: dict, kind: str) -> str:
    """Returns "forecast", the only head."""
    return "forecast"

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    stated = hf.get("chronos_config")
    if hf and not isinstance(stated, dict):
      raise errors.UserError("config.json: chronos_config should hold the keys of Chronos-Bolt, "
                             f"it is {stated!r}")
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    ours = {key: base.typed(f"chronos_config.{key}", stated[key], kinds[key])
            for key in _KEYS if key in (stated or {})}
    return {**super().derived(hf, values), **ours}

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    super().check(hf)
    for key in _KEYS[:4]:
      if getattr(self, key) < 1:
        raise errors.UserError(f"config.json: chronos_config.{key} should be at least 1")
    if not self.quantiles or not all(
        isinstance(q, float) and 0 < q < 1 for q in self.quantiles):
      raise errors.UserError("config.json: chronos_config.quantiles should be levels between 0 "
                             f"and 1, not {list(self.quantiles)}")

  def to_hf(self) -> dict:
    """Returns what config.json holds; the chronos-forecasting package opens it."""
    hf, source = super().to_hf(), json.loads(self.source)
    was = type(self).from_hf(source) if source else None
    changed = {key: base.plain(getattr(self, key)) for key in _KEYS
               if was is None or getattr(was, key) != getattr(self, key)}
    hf["chronos_config"] = {**source.get("chronos_config", {}), **changed}
    if was is None:
      hf["architectures"] = [self.HEADS["forecast"][0]]
    return hf


class ResidualBlock(nn.Module):
  """A two-layer network beside a linear layer: (…, in) -> (…, features)."""

  config: Config
  features: int
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, x):
    c, std = self.config, (2 * self.config.input_patch_size)**-0.5

    def linear(features, std, name):
      return t5.linear(c, features, std, self.compute, name, use_bias=True)

    y = layers.ACTIVATIONS[c.activation[1]](linear(c.d_ff, std, "hidden")(x))
    y = layers.Dropout(c.dropout_rate)(linear(self.features, c.d_ff**-0.5, "output")(y))
    return y + linear(self.features, std, "residual")(x)


class Model(nn.Module):
  """Chronos-Bolt: series -> a dict, see `__call__`. Dropout acts iff given a "dropout" rng."""

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, compute = self.config, self.compute
    init = nn.initializers.normal(c.initializer_factor)
    rows = 2 if c.use_reg_token else 1
    self.shared = layers.Embedding(rows, c.d_model, compute.dtype, init)
    self.input_patch_embedding = ResidualBlock(c, c.d_model, compute)
    self.encoder = t5.Stack(c, compute)
    self.decoder = t5.Stack(c, compute, decoder=True)
    outputs = len(c.quantiles) * c.prediction_length
    self.output_patch_embedding = ResidualBlock(c, outputs, compute)

  def __call__(self, context, mask=None):
    """Applies the model.

    Args:
      context: (B, T) floats, NaN where a value is missing; shorter series stand at the right end.
      mask: (B, T), 0 where a value is to be left out; None: none is but those missing. As upstream,
        a series is scaled by all of its values that are no NaN.

    Returns:
      quantile_preds (B, Q, H) float32 in the units of the context, features (B, D), the decoder's
      state, last_hidden_state (B, P + 1 with the extra token, D) of the encoder, and loc and
      scale (B, 1): predictions are loc + scale * head(features).
    """
    c = self.config
    if isinstance(context.shape[1], int) and context.shape[1] > c.context_length:
      context = context[:, -c.context_length:]
      mask = mask if mask is None else mask[:, -c.context_length:]
    context = context.astype(jnp.float32)
    seen = ~jnp.isnan(context)
    scaled, loc, scale = series.standardised(context, seen)
    seen = seen if mask is None else seen & (mask != 0)
    values = series.windows(jnp.where(seen, scaled, 0.0), c.input_patch_size, c.input_patch_stride)
    seen = series.windows(seen.astype(jnp.float32), c.input_patch_size, c.input_patch_stride)
    x = self.input_patch_embedding(jnp.concatenate([values, seen], -1).astype(self.compute.dtype))
    real = seen.any(-1)
    rows = context.shape[0]
    if c.use_reg_token:
      x = jnp.concatenate([x, self.shared(jnp.full((rows, 1), _REG))], axis=1)
      real = jnp.concatenate([real, jnp.ones((rows, 1), bool)], axis=1)
    x = self.encoder(x, real)
    features = self.decoder(self.shared(jnp.full((rows, 1), c.start_token)), None, x, real)[:, 0]
    predictions = self.head(features) * scale[..., None] + loc[..., None]
    return {"quantile_preds": predictions, "features": features, "last_hidden_state": x,
            "loc": loc, "scale": scale}

  def head(self, features):
    """Returns the scaled quantiles (B, Q, H) float32 of features (B, D)."""
    c = self.config
    y = self.output_patch_embedding(features).astype(jnp.float32)
    return y.reshape(-1, len(c.quantiles), c.prediction_length)


def probe_inputs(config: Config) -> dict:
  """Returns a small fixed batch, with missing values, on which an export is compared."""
  length = min(3 * config.input_patch_size + 1, config.context_length)
  context = np.random.default_rng(0).normal(3.0, 2.0, (2, length)).astype(np.float32)
  context[1, :length // 2] = np.nan
  return {"context": context}
