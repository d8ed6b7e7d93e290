"""Vision transformers: ViT, DeiT, DINOv2 (with registers), and the image towers of CLIP and SigLIP.

Papers: ViT, Dosovitskiy et al. 2020, arXiv:2010.11929; DeiT, Touvron et al. 2020, arXiv:2012.12877;
DINOv2, Oquab et al. 2023, arXiv:2304.07193, with registers, Darcet et al. 2023, arXiv:2309.16588;
CLIP, Radford et al. 2021, arXiv:2103.00020; SigLIP, Zhai et al. 2023, arXiv:2303.15343.
Names, defaults and places of dropout follow transformers' `modeling_vit.py`, `modeling_deit.py`,
`modeling_dinov2.py`, `modeling_dinov2_with_registers.py`, `modeling_clip.py` and
`modeling_siglip.py` (Apache-2.0). Which of them a model is, its config's model_type says.

Shapes: B images, H and W pixels, h and w patches, N tokens, D hidden size, C labels.
"""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ft import errors
from ft.models import base, layers, vit_blocks
from ft.models.surgery import Surgery
from ft.weights.names import Rule

MODALITY = "image"
MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model",
               "siglip_vision_model")
HEAD = ("params/classifier", "params/distillation_classifier")
SURGERY = {
    "image_size": Surgery("image_size", ("params/embeddings/position",), patch="patch_size",
                          extra="positions_before"),
    "channels": Surgery("num_channels", ("params/embeddings/patch/kernel",), axis=2),
    "depth": Surgery("num_hidden_layers", ("params/encoder",)),
}

_BASES = {"vit": "vit.", "deit": "deit.", "dinov2": "dinov2.",
          "dinov2_with_registers": "dinov2_with_registers.", "clip_vision_model": "vision_model.",
          "siglip_vision_model": "vision_model."}
_TOWERS = {"clip_vision_model": ("clip", "CLIP"), "siglip_vision_model": ("siglip", "Siglip")}
_STAGES = ("out_indices", "out_features", "stage_names")  # keys that count layers


def encoder_rules(theirs: str, ours: str, only: str = "") -> list[Rule]:
  """Returns the rules of the layers of a CLIP or SigLIP tower, of images or of text."""
  layer, own = theirs + "encoder.layers.{i}.", ours + "encoder/layer_{i}/"
  linears = {"self_attn.q_proj": "attention/query", "self_attn.k_proj": "attention/key",
             "self_attn.v_proj": "attention/value", "self_attn.out_proj": "attention/output",
             "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
  return [*(rule for a, b in linears.items()
            for rule in base.linear_rules(layer + a, own + b, only)),
          *base.norm_rules(layer + "layer_norm1", own + "norm_before", only),
          *base.norm_rules(layer + "layer_norm2", own + "norm_after", only)]


def tower_rules(theirs: str, ours: str, only: str = "") -> list[Rule]:
  """Returns the rules of the image tower of CLIP or SigLIP."""
  patch, pool = theirs + "embeddings.patch_embedding", theirs + "head."
  return [
      Rule(theirs + "embeddings.class_embedding", ours + "embeddings/cls_token", only=only),
      Rule(patch + ".weight", ours + "embeddings/patch/kernel", "conv", only),
      Rule(patch + ".bias", ours + "embeddings/patch/bias", only=only),
      Rule(theirs + "embeddings.position_embedding.weight", ours + "embeddings/position",
           only=only),
      Rule(theirs + "embeddings.position_ids", transform="arange", only=only),
      *base.norm_rules(theirs + "pre_layrnorm", ours + "pre_norm", only),
      *encoder_rules(theirs, ours, only),
      *base.norm_rules(theirs + "post_layernorm", ours + "norm", only),
      Rule(pool + "probe", ours + "pool/probe", only=only),
      Rule(pool + "attention.in_proj_weight", ours + "pool/in_proj/kernel", "transpose", only),
      Rule(pool + "attention.in_proj_bias", ours + "pool/in_proj/bias", only=only),
      *base.linear_rules(pool + "attention.out_proj", ours + "pool/output", only),
      *base.norm_rules(pool + "layernorm", ours + "pool/norm", only),
      *base.linear_rules(pool + "mlp.fc1", ours + "pool/mlp/fc1", only),
      *base.linear_rules(pool + "mlp.fc2", ours + "pool/mlp/fc2", only),
  ]


def _rules() -> list[Rule]:
  """Returns the rules of ViT, DeiT and DINOv2: names in files first, then those in memory."""
  top, ours = "[vit.|deit.|dinov2.|dinov2_with_registers.]", "params/encoder/layer_{i}/"
  vit, dino = "model_type=vit|deit", "model_type=dinov2|dinov2_with_registers"
  old, new = top + "encoder.layer.{i}.", top + "layers.{i}."
  patch = top + "embeddings.patch_embeddings.projection"
  both = f"{vit}|{dino.partition('=')[2]}"
  rules = [
      *(Rule(f"{top}embeddings.{name}", f"params/embeddings/{name}", only=both)
        for name in ("cls_token", "distillation_token", "register_tokens")),
      Rule(top + "embeddings.mask_token", "params/embeddings/mask_token", only=dino),
      Rule(top + "embeddings.mask_token", transform="ignore", only=vit),
      Rule("decoder.{*}", transform="ignore", only=vit),  # of masked image modelling
      Rule(patch + ".weight", "params/embeddings/patch/kernel", "conv", both),
      Rule(patch + ".bias", "params/embeddings/patch/bias", only=both),
      Rule(top + "embeddings.position_embeddings", "params/embeddings/position", only=both),
      *base.norm_rules(top + "layernorm", "params/norm", both),
      *base.linear_rules(top + "pooler.dense", "params/pooler", f"{vit}&head=none"),
  ]
  for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
    target = f"{ours}attention/{name}"
    rules += base.linear_rules(f"{old}attention.attention.{name}", target, both)
    rules += base.linear_rules(f"{new}attention.{part}", target, vit)
    rules += base.linear_rules(f"{old}attention.{part}", target, dino)
  for theirs, target, only in (
      (old + "attention.output.dense", "attention/output", both),
      (new + "attention.o_proj", "attention/output", vit),
      (old + "attention.o_proj", "attention/output", dino),
      (old + "intermediate.dense", "mlp/fc1", vit), (new + "mlp.fc1", "mlp/fc1", vit),
      (old + "output.dense", "mlp/fc2", vit), (new + "mlp.fc2", "mlp/fc2", vit),
      (old + "mlp.fc1", "mlp/fc1", dino), (old + "mlp.fc2", "mlp/fc2", dino),
      (old + "mlp.weights_in", "mlp/gate_up", dino), (old + "mlp.weights_out", "mlp/down", dino),
      (old + "mlp.gate_proj", "mlp/gate", dino), (old + "mlp.up_proj", "mlp/up", dino),
      (old + "mlp.down_proj", "mlp/down", dino)):
    rules += base.linear_rules(theirs, ours + target, only)
  for number, place in (("1", "before"), ("2", "after")):
    for layer in (old, new):
      rules += base.norm_rules(f"{layer}layernorm_{place}", f"{ours}norm_{place}", vit)
    rules += base.norm_rules(f"{old}norm{number}", f"{ours}norm_{place}", dino)
    rules.append(Rule(f"{old}layer_scale{number}.lambda1", f"{ours}scale_{place}", only=dino))
  return rules


_TOWER = "model_type=clip_vision_model|siglip_vision_model"
NAMES = [
    *_rules(),
    *tower_rules("[vision_model.]", "params/", _TOWER),
    Rule("visual_projection.weight", "params/visual_projection/kernel", "transpose",
         "model_type=clip_vision_model&head=none"),
    *base.linear_rules("classifier", "params/classifier", "head=classify"),
    *base.linear_rules("cls_classifier", "params/classifier", "head=distilled"),
    *base.linear_rules("distillation_classifier", "params/distillation_classifier",
                       "head=distilled"),
]


@dataclasses.dataclass(frozen=True)
class Config(base.HFConfig):
  """The keys of the upstream configs that matter here; see the module's docstring.

  Attributes:
    pooler: whether a ViT or DeiT body has the pooler's layer.
    out_indices: after how many layers feature maps of a DINOv2 are taken; None: after the last.
    projection: whether a CLIP tower has the projection to the space of texts.
    gate_apart: whether the file holds the gate of a SwiGLU network apart from its other half.
  """

  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  intermediate_size: int = 3072
  mlp_ratio: float = 4.0
  hidden_act: str = "gelu"
  hidden_dropout_prob: float = 0.0
  attention_probs_dropout_prob: float = 0.0
  drop_path_rate: float = 0.0
  initializer_range: float = 0.02
  layer_norm_eps: float = 1e-12
  image_size: int | tuple = 224
  patch_size: int = 16
  num_channels: int = 3
  qkv_bias: bool = True
  pooler_output_size: int | None = None
  pooler_act: str = "tanh"
  layerscale_value: float = 1.0
  use_swiglu_ffn: bool = False
  use_mask_token: bool = True
  num_register_tokens: int = 0
  out_indices: tuple | None = None
  apply_layernorm: bool = True
  vision_use_head: bool = True
  projection_dim: int = 512
  pooler: bool = False
  projection: bool = False
  gate_apart: bool = False

  PREFIXES = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2",
              "dinov2_with_registers": "Dinov2WithRegisters", "clip_vision_model": "CLIPVision",
              "siglip_vision_model": "SiglipVision"}
  HEADS = {"none": ("{}Model", "{}ModelWithProjection", "{}Backbone"),
           "classify": ("{}ForImageClassification",),
           "distilled": ("{}ForImageClassificationWithTeacher",)}
  LABEL_HEADS = ("classify", "distilled")
  DEFAULTS = {
      "dinov2": {"layer_norm_eps": 1e-6, "patch_size": 14},
      "dinov2_with_registers": {"layer_norm_eps": 1e-6, "num_register_tokens": 4},
      "clip_vision_model": {"layer_norm_eps": 1e-5, "patch_size": 32, "hidden_act": "quick_gelu"},
      "siglip_vision_model": {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
  }
  ALIASES = {"attention_probs_dropout_prob": ("attention_dropout",)}
  OURS = ("pooler", "projection", "gate_apart")

  def __post_init__(self):
    super().__post_init__()
    count = self.num_hidden_layers  # may have been changed since out_indices were chosen
    kept = tuple(i for i in self.out_indices or () if i <= count)
    object.__setattr__(self, "out_indices", kept if kept not in ((), (count,)) else None)

  @classmethod
  def from_hf(cls, hf: dict):
    """Returns the Config of a config.json, also of one that `to_hf` made of a labelled tower."""
    kind = f"{hf.get('model_type')}_vision_model"
    if kind in _TOWERS and "vision_config" in hf:
      labels = {key: hf[key] for key in ("id2label", "label2id") if key in hf}
      hf = {**hf["vision_config"], **labels, "model_type": kind,
            "architectures": [cls.HEADS["classify"][0].format(cls.PREFIXES[kind])]}
    return super().from_hf(hf)

  def check(self, hf: dict) -> None:
    """Raises UserError for what this family does not compute."""
    base.one_of(self, "hidden_act", layers.ACTIVATIONS)
    base.one_of(self, "pooler_act", layers.ACTIVATIONS)
    base.multiple(self, "hidden_size", "num_attention_heads")
    base.only(hf, "head_dim", self.hidden_size // self.num_attention_heads)
    base.only(hf, "reshape_hidden_states", True)
    if len(self.sides()) != 2 or min(self.sides()) < self.patch_size or self.patch_size < 1:
      raise errors.UserError(f"config.json: image_size {self.image_size} should be a side or "
                             f"(height, width) of at least patch_size {self.patch_size}")
    if any(not 0 <= i <= self.num_hidden_layers for i in hf.get("out_indices") or ()):
      raise errors.UserError(f"config.json: out_indices {hf['out_indices']} should be between 0 "
                             f"and num_hidden_layers {self.num_hidden_layers}")

  def to_hf(self) -> dict:
    """Returns what config.json holds; that of a labelled tower is upstream's of its dual model."""
    hf = super().to_hf()
    if json.loads(self.source).get("num_hidden_layers", 12) != self.num_hidden_layers:
      hf = {key: value for key, value in hf.items() if key not in _STAGES}
      hf |= {"out_indices": list(self.out_indices)} if self.out_indices else {}
    if self.head == "none" or not self.tower:
      return hf
    kind, name = _TOWERS[self.model_type]
    shared = {key: hf.pop(key) for key in ("id2label", "label2id", "dtype", "torch_dtype")
              if key in hf}
    hf.pop("architectures", None)
    return {"model_type": kind, "architectures": [f"{name}ForImageClassification"],
            "vision_config": hf, **shared}

  def with_dropout(self, rate: float) -> "Config":
    """Returns the Config with all dropout rates set; that of whole branches stays."""
    return dataclasses.replace(self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)

  def sides(self) -> tuple:
    """Returns (height, width) of the images that the position vectors are for."""
    size = self.image_size
    return size if isinstance(size, tuple) else (size, size)

  def grid(self, sides=None) -> tuple:
    """Returns (h, w), the patches of an image of these sides; a last part of a patch is cut off."""
    return tuple(side // self.patch_size for side in sides or self.sides())

  def stages(self) -> tuple:
    """Returns after how many layers the feature maps are taken."""
    return self.out_indices if self.dino and self.out_indices else (self.num_hidden_layers,)

  def width(self) -> int:
    """Returns the hidden size of the two-layer network."""
    if not self.dino:
      return self.intermediate_size
    size = int(self.hidden_size * self.mlp_ratio)
    return (int(size * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else size

  @property
  def tower(self) -> bool:
    """Whether the model is the image tower of CLIP or SigLIP."""
    return self.model_type in _TOWERS

  @property
  def dino(self) -> bool:
    """Whether the model is a DINOv2."""
    return self.model_type.startswith("dinov2")

  @property
  def clip(self) -> bool:
    """Whether the model is CLIP's image tower."""
    return self.model_type == "clip_vision_model"

  @property
  def siglip(self) -> bool:
    """Whether the model is SigLIP's image tower."""
    return self.model_type == "siglip_vision_model"

  @property
  def positions_before(self) -> int:
    """Position vectors before those of the patches."""
    return {"deit": 2, "siglip_vision_model": 0}.get(self.model_type, 1)

  @property
  def tokens_before(self) -> int:
    """Tokens before those of the patches; registers have no positions."""
    return self.positions_before + self.num_register_tokens


class Model(nn.Module):
  """A vision transformer: images -> a dict, see `__call__`.

  Dropout and stochastic depth act if and only if apply is given an rng stream "dropout".
  """

  config: Config
  compute: layers.Compute = layers.Compute()

  def setup(self):
    c, compute = self.config, self.compute
    self.embeddings = vit_blocks.Embeddings(c, compute)
    if c.clip:
      self.pre_norm = vit_blocks.norm(c, compute)
    self.encoder = vit_blocks.Encoder(c, compute)
    self.norm = vit_blocks.norm(c, compute)
    if c.pooler:
      self.pooler = vit_blocks.linear(c, compute, c.pooler_output_size or c.hidden_size)
    if c.siglip and c.vision_use_head:
      self.pool = vit_blocks.AttentionPool(c, compute)
    if c.projection:
      self.visual_projection = vit_blocks.linear(c, compute, c.projection_dim, use_bias=False)
    if c.num_labels:
      self.classifier = vit_blocks.linear(c, compute, c.num_labels)
    if c.num_labels and c.head == "distilled":
      self.distillation_classifier = vit_blocks.linear(c, compute, c.num_labels)

  def __call__(self, pixel_values, bool_masked_pos=None, interpolate_pos_encoding: bool = False):
    """Applies the model.

    Args:
      pixel_values: (B, H, W, channels), normalised as the checkpoint's processor does.
      bool_masked_pos: (B, h * w), true where a DINOv2 sees its mask token and not the patch.
      interpolate_pos_encoding: interpolate positions if the images are of another size than
        config.image_size; DINOv2 always does.

    Returns:
      last_hidden_state (B, N, D), CLIP's without the last norm; pooler_output (B, D) where
      upstream gives it; image_embeds (B, projection_dim) of a CLIP tower with projection;
      feature_maps, a tuple of (B, h, w, D), after the layers that config.out_indices names or the
      last; features that the label head reads: the class token (B, D), of a distilled DeiT both
      tokens (B, 2 D), of DINOv2 class token and mean of patches (B, 2 D), of CLIP and SigLIP the
      mean of patches (B, D); and logits (B, C) float32 if config.num_labels > 0.

    Raises:
      UserError: images of a size or with channels that the model is not for.
    """
    c = self.config
    x = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding)
    x = self.pre_norm(x) if c.clip else x
    stages = c.stages()
    first = x
    x, kept = self.encoder(x, keep=stages != (c.num_hidden_layers,))
    last = x if c.clip else self.norm(x)
    outputs = {"last_hidden_state": last, **self._pooled(last)}
    kept = [first, *kept] if kept else {c.num_hidden_layers: x}
    maps = [last if i == c.num_hidden_layers and c.apply_layernorm else
            self.norm(kept[i]) if c.dino and c.apply_layernorm else kept[i] for i in stages]
    grid = c.grid(pixel_values.shape[1:3])
    outputs["feature_maps"] = tuple(
        y[:, c.tokens_before:].reshape(y.shape[0], *grid, c.hidden_size) for y in maps)
    outputs["features"] = self._features(last)
    if c.num_labels:
      outputs["logits"] = self.head(outputs["features"])
    return outputs

  def _pooled(self, last) -> dict:
    """Returns pooler_output and image_embeds where the model has them."""
    c = self.config
    if c.pooler:
      return {"pooler_output": layers.ACTIVATIONS[c.pooler_act](self.pooler(last[:, 0]))}
    if c.siglip:
      return {"pooler_output": self.pool(last)} if c.vision_use_head else {}
    if c.dino:
      return {"pooler_output": last[:, 0]}
    if not c.clip:
      return {}
    pooled = self.norm(last[:, 0])
    projected = {"image_embeds": self.visual_projection(pooled)} if c.projection else {}
    return {"pooler_output": pooled, **projected}

  def _features(self, last):
    c = self.config
    mean = last[:, c.tokens_before:].mean(1)
    if c.tower:
      return mean
    if c.dino:
      return jnp.concatenate([last[:, 0], mean], -1)
    return last[:, :2].reshape(last.shape[0], -1) if c.head == "distilled" else last[:, 0]

  def head(self, features):
    """Returns the logits (B, C) of features: the classifier, or the mean of DeiT's two."""
    if self.config.head != "distilled":
      return self.classifier(features).astype(jnp.float32)
    first, second = jnp.split(features, 2, axis=-1)
    return (self.classifier(first) + self.distillation_classifier(second)).astype(jnp.float32) / 2


def probe_inputs(config: Config) -> dict:
  """Returns an image of the model's size, on which an export is compared with its reload."""
  shape = (1, *config.sides(), config.num_channels)
  return {"pixel_values": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def fit(config: Config, shapes: dict) -> Config:
  """Returns the config of a file with these {our path: shape}: with the parts that it holds."""
  if config.head == "distilled" and config.model_type != "deit":
    raise errors.UserError(f"a {config.model_type} has no distillation token for the head "
                           "'distilled'; use classify")
  return dataclasses.replace(
      config, pooler="params/pooler/kernel" in shapes,
      projection="params/visual_projection/kernel" in shapes,
      gate_apart="params/encoder/layer_0/mlp/gate/kernel" in shapes)


def prefixed(config: Config) -> str | bool | None:
  """Returns the prefix that upstream's class has; None, as in the file, for the same class."""
  if config.to_hf().get("architectures") == json.loads(config.source).get("architectures"):
    return None
  return _BASES[config.model_type] if config.head != "none" else False
