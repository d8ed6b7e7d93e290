"""CLIP (Radford et al. 2021, arXiv:2103.00020) and SigLIP (Zhai et al. 2023, arXiv:2303.15343).

An image tower and a text tower whose outputs are compared; or, as a classifier, the image tower
with a label head. Follows transformers' `modeling_clip.py` and `modeling_siglip.py` (Apache-2.0) in
names, defaults and the places of dropout. The image tower is that of ft.models.vit, and the text
tower is built from its layers.

Shapes: B images, A texts, T tokens, D hidden size of the images, E size of the embeddings.
"""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import attention, base, layers, vit, vit_blocks
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "image"
MODEL_TYPES = ("clip", "siglip")
HEAD = ("params/classifier",)
SURGERY = {
    "image_size": Surgery("image_size", ("params/vision_model/embeddings/position",),
                          patch="patch_size", extra="positions_before"),
    "channels": Surgery("num_channels", ("params/vision_model/embeddings/patch/kernel",), axis=2),
}

_TEXT, _OURS, _DUAL = "text_model.", "params/text_model/", "head=none"
NAMES = [
    *vit.tower_rules("vision_model.", "params/vision_model/"),
    Rule(_TEXT + "embeddings.token_embedding.weight", _OURS + "token/embedding", only=_DUAL),
    Rule(_TEXT + "embeddings.position_embedding.weight", _OURS + "position/embedding", only=_DUAL),
    Rule(_TEXT + "embeddings.position_ids", transform="arange", only=_DUAL),
    *vit.encoder_rules(_TEXT, _OURS, _DUAL),
    *base.norm_rules(_TEXT + "final_layer_norm", _OURS + "norm", _DUAL),
    *base.linear_rules(_TEXT + "head", _OURS + "projection", f"{_DUAL}&model_type=siglip"),
    Rule("text_projection.weight", "params/text_projection/kernel", "transpose", _DUAL),
    Rule("visual_projection.weight", "params/visual_projection/kernel", "transpose", _DUAL),
    Rule("logit_scale", "params/logit_scale", only=_DUAL),
    Rule("logit_bias", "params/logit_bias", only=_DUAL),
    *base.linear_rules("classifier", "params/classifier", "head=classify"),
]


@dataclasses.dataclass(frozen=True)
class TextConfig(vit.Config):
  """The keys of `text_config`; those that vit.Config has for images only are not read.

  Attributes:
    eos_token_id: of the token whose vector stands for a text in CLIP. 2 stands for the largest id,
      as in files from before the id was right in them.
    projection_size: E of SigLIP; the hidden size if None.
  """

  vocab_size: int = 49408
  max_position_embeddings: int = 77
  eos_token_id: int | None = 49407
  projection_size: int | None = None

  PREFIXES = {"clip_text_model": "CLIPText", "siglip_text_model": "SiglipText"}
  DEFAULTS = {
      "clip_text_model": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                          "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
      "siglip_text_model": {"vocab_size": 32000, "max_position_embeddings": 64,
                            "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
  }


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of CLIPConfig and SiglipConfig.

  Attributes:
    projection_dim: E of CLIP.
    text, vision: the configs of the towers.
    image_size, num_channels: of the images; what `vision` says of them follows.
  """

  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592
  text: Any = None
  vision: Any = None
  image_size: int | tuple = 224
  num_channels: int = 3

  PREFIXES = {"clip": "CLIP", "siglip": "Siglip"}
  HEADS = {"none": ("{}Model",), "classify": ("{}ForImageClassification",)}
  OURS = ("text", "vision", "image_size", "num_channels")

  def __post_init__(self):
    super().__post_init__()
    if self.vision is not None:
      object.__setattr__(self, "vision", dataclasses.replace(
          self.vision, image_size=self.image_size, num_channels=self.num_channels))

  @classmethod
  def derived(cls, hf: dict, values: dict) -> dict:
    """Returns the towers' configs."""
    towers = {}
    for name, config in (("text", TextConfig), ("vision", vit.Config)):
      key = f"{name}_config"
      # Older CLIP files state the tower twice, and upstream lets the second one win.
      stated = base.typed(key, hf.get(f"{key}_dict") or hf.get(key) or {}, dict)
      kind = f"{values['model_type']}_{name}_model"
      towers[name] = config.from_hf({**stated, "model_type": kind})
    vision = towers["vision"]
    return {**towers, "image_size": vision.image_size, "num_channels": vision.num_channels}

  def check(self, hf: dict) -> None:
    """Raises UserError for towers that cannot be compared."""
    if self.model_type == "siglip" and not self.vision.vision_use_head:
      raise errors.UserError("config.json: vision_config has vision_use_head=false; without that "
                             "pooling the images have no embeddings")

  def to_hf(self) -> dict:
    """Returns what config.json holds; a tower that was not changed is given back as it was read."""
    source = json.loads(self.source)
    hf, was = super().to_hf(), type(self).from_hf(source) if source else None
    for name in ("text", "vision"):
      if was is None or getattr(was, name) != getattr(self, name):
        hf[f"{name}_config"] = getattr(self, name).to_hf()
        hf.pop(f"{name}_config_dict", None)
    return hf

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with the dropout of both towers' attention set; there is no other."""
    towers = {name: dataclasses.replace(getattr(self, name), attention_probs_dropout_prob=rate)
              for name in ("text", "vision")}
    return dataclasses.replace(self, **towers)

  @property
  def patch_size(self) -> int:
    """The patches' side."""
    return self.vision.patch_size

  @property
  def positions_before(self) -> int:
    """Position vectors before those of the patches."""
    return self.vision.positions_before


class TextModel(nn.Module):
  """The text tower: input_ids (A, T) -> one vector a text (A, D), before CLIP's projection."""

  config: TextConfig
  compute: layers.Compute = layers.Compute()

  @nn.compact
  def __call__(self, input_ids, attention_mask=None, position_ids=None):
    c, compute, init = self.config, self.compute, vit_blocks.normal(self.config)
    clip, length = c.model_type == "clip_text_model", input_ids.shape[1]
    limit = c.max_position_embeddings
    if isinstance(length, int) and length > limit:  # it is symbolic while a program is exported
      raise errors.UserError(f"a text of {length} tokens; the model has {limit} positions")
    if position_ids is None:
      position_ids = jnp.arange(length)
    x = layers.Embedding(c.vocab_size, c.hidden_size, compute.dtype, init, name="token")(input_ids)
    x = x + layers.Embedding(limit, c.hidden_size, compute.dtype, init,
                             name="position")(position_ids)
    mask = attention.Mask(padding=attention_mask, causal=clip)
    x, _ = vit_blocks.Encoder(c, compute, name="encoder")(x, mask)
    x = vit_blocks.norm(c, compute, "norm")(x)
    if not clip:  # the last token stands for the text, even where it is padding
      size = c.projection_size or c.hidden_size
      return vit_blocks.linear(c, compute, size, "projection")(x[:, -1])
    marks = input_ids if c.eos_token_id == 2 else input_ids == c.eos_token_id
    end = jnp.argmax(marks, axis=1)  # the first, where padding has the same id
    return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]


class Model(nn.Module):
  """CLIP or SigLIP: images and texts, or one of them -> a dict, see `__call__`.

  Dropout acts if and only if apply is given an rng stream "dropout".
  """

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, compute = self.config, self.compute
    self.vision_model = vit.Model(c.vision, compute)
    if c.num_labels:
      self.classifier = vit_blocks.linear(c.vision, compute, c.num_labels)
    if c.head != "none":
      return
    self.text_model = TextModel(c.text, compute)
    if c.model_type == "clip":
      self.visual_projection = vit_blocks.linear(c.vision, compute, c.projection_dim,
                                                 use_bias=False)
      self.text_projection = vit_blocks.linear(c.text, compute, c.projection_dim, use_bias=False)
      start = nn.initializers.constant(c.logit_scale_init_value)
      self.logit_scale = self.param("logit_scale", start, ())
    else:
      self.logit_scale = self.param("logit_scale", nn.initializers.zeros, (1,))
      self.logit_bias = self.param("logit_bias", nn.initializers.zeros, (1,))

  def __call__(self, pixel_values=None, input_ids=None, attention_mask=None, position_ids=None,
               interpolate_pos_encoding: bool = False):
    """Applies the towers whose inputs are given.

    Args:
      pixel_values: (B, H, W, channels), normalised as the checkpoint's processor does.
      input_ids: (A, T) int, T up to text_config.max_position_embeddings. CLIP reads the vector of
        the end token, SigLIP that of the last position: its texts are padded to full length.
      attention_mask: (A, T), 1 for real tokens and 0 for padding; None: all are real.
      position_ids: (A, T) int; None: 0, 1, 2, ….
      interpolate_pos_encoding: take images of another size than the model's.

    Returns:
      Of images: last_hidden_state (B, N, D), feature_maps, features (B, D), the mean of patches;
      pooler_output (B, D) where upstream has it; image_embeds (B, E); logits (B, C) float32 if
      config.num_labels > 0. Of texts: text_embeds (A, E). Of both: logits_per_image (B, A) and
      logits_per_text (A, B). Embeddings are of length one, and with logits float32. A classifier
      has no texts.

    Raises:
      UserError: no input, texts for a classifier, or inputs that do not fit the model.
    """
    c, outputs = self.config, {}
    if pixel_values is None and input_ids is None:
      raise errors.UserError("neither pixel_values nor input_ids are given")
    if pixel_values is not None:
      outputs = self.vision_model(pixel_values, None, interpolate_pos_encoding)
      if c.num_labels:
        outputs["logits"] = self.head(outputs["features"])
    if c.head != "none":
      if input_ids is not None:
        raise errors.UserError("a classifier of images reads no input_ids")
      return outputs
    if pixel_values is not None:
      outputs["image_embeds"] = self._embed(outputs["pooler_output"], "visual_projection")
    if input_ids is not None:
      text = self.text_model(input_ids, attention_mask, position_ids)
      outputs["text_embeds"] = self._embed(text, "text_projection")
    if pixel_values is not None and input_ids is not None:
      similarity = jnp.matmul(outputs["text_embeds"], outputs["image_embeds"].T,
                              precision="highest") * jnp.exp(self.logit_scale.astype(jnp.float32))
      if c.model_type == "siglip":
        similarity = similarity + self.logit_bias.astype(jnp.float32)
      outputs.update(logits_per_text=similarity, logits_per_image=similarity.T)
    return outputs

  def _embed(self, pooled, projection):
    """Returns vectors of length one, after CLIP's projection."""
    if self.config.model_type == "clip":
      pooled = getattr(self, projection)(pooled)
    pooled = pooled.astype(jnp.float32)
    return pooled / jnp.sqrt(jnp.square(pooled).sum(-1, keepdims=True))

  def head(self, features):
    """Returns the logits (B, C) of features (B, D)."""
    return self.classifier(features).astype(jnp.float32)


def contrastive_loss(logits_per_text):
  """CLIP's loss: which image is a text's, and which text an image's, among those of the batch.

  Args:
    logits_per_text: (B, B), pairs on the diagonal.

  Returns:
    The mean cross-entropy of both directions, a scalar.
  """
  texts, images = (jnp.diagonal(jax.nn.log_softmax(logits_per_text, axis)).mean()
                   for axis in (1, 0))
  return -(texts + images) / 2


def sigmoid_loss(logits_per_text):
  """SigLIP's loss: whether a text and an image are a pair, for each of them by itself.

  Args:
    logits_per_text: (B, B), pairs on the diagonal.

  Returns:
    The binary cross-entropy, summed over images and averaged over texts, a scalar.
  """
  pairs = 2 * jnp.eye(logits_per_text.shape[0]) - 1
  return -jax.nn.log_sigmoid(pairs * logits_per_text).sum(-1).mean()


def probe_inputs(config: Config) -> dict:
  """Returns two images and two texts, on which an export is compared with its reload."""
  rng = np.random.default_rng(0)
  shape = (2, *config.vision.sides(), config.num_channels)
  inputs = {"pixel_values": rng.normal(size=shape).astype(np.float32)}
  if config.head == "none":
    shape = (2, min(8, config.text.max_position_embeddings))
    inputs["input_ids"] = rng.integers(0, config.text.vocab_size, shape, np.int32)
    inputs["attention_mask"] = np.ones(shape, np.int32)
    inputs["attention_mask"][1, -1] = 0
  return inputs
