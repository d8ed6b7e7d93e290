"""ViT, DeiT, DINOv2 and the image towers of CLIP and SigLIP against transformers, float32."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import vit, vit_blocks
from ft.weights import names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4,
         "initializer_range": 0.2, "attn_implementation": "eager"}
ODD = {"hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 3,
       "initializer_range": 0.2, "attn_implementation": "eager"}
SQUARE, GREY = "square, gelu", "not square, no qkv bias, grey"
PLAIN, SWIGLU = "network of two layers", "SwiGLU, no qkv bias"
VIT = {
    SQUARE: {**SMALL, "image_size": 16, "intermediate_size": 40},
    GREY: {**ODD, "image_size": [11, 16], "intermediate_size": 41, "qkv_bias": False,
           "num_channels": 1, "hidden_act": "relu", "layer_norm_eps": 1e-3,
           "pooler_output_size": 17, "pooler_act": "gelu"},
}
DINO = {
    PLAIN: {**SMALL, "image_size": 16, "mlp_ratio": 2, "layerscale_value": 0.7},
    SWIGLU: {**ODD, "image_size": 13, "mlp_ratio": 3, "use_swiglu_ffn": True, "qkv_bias": False,
             "layerscale_value": 1.3},
}
TOWER = {
    "square": {**SMALL, "image_size": 16, "intermediate_size": 40},
    "odd": {**ODD, "image_size": 14, "intermediate_size": 41, "hidden_act": "gelu",
            "num_channels": 4, "layer_norm_eps": 1e-3},
}
BODY = {"last_hidden_state": "last_hidden_state", "pooler_output": "pooler_output"}


def slow(*values):
  """Returns a case that is left out by default."""
  return pytest.param(*values, marks=pytest.mark.slow)


def build(cls, config, **extra):
  torch.manual_seed(0)
  return harness.randomise(cls(cls.config_class(**{**config, **extra})))


def images(config, sides=None, rows=3):
  size = config["image_size"]
  sides = sides or (size if isinstance(size, list) else [size, size])
  shape = (rows, *sides, config.get("num_channels", 3))
  return {"pixel_values": np.random.default_rng(3).normal(size=shape).astype(np.float32)}


def apply(pretrained, inputs, **more):
  """Applies a model, compiled: compiling operation by operation would take longer."""
  return jax.jit(lambda v: pretrained.module.apply(v, **inputs, **more))(pretrained.variables)


def cases(table, classes, always):
  """Returns all classes with all cases; those that are not among `always` are marked slow."""
  return [pytest.param(cls, case, id=f"{cls}-{case}",
                       marks=() if (cls, case) in always else pytest.mark.slow)
          for cls in classes for case in table]


@pytest.mark.parametrize(("cls", "case"), cases(VIT, [
    "ViTModel", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher"], [
        ("ViTModel", GREY), ("ViTForImageClassification", SQUARE),
        ("DeiTForImageClassificationWithTeacher", GREY)]))
def test_vit_and_deit(cls, case, tmp_path):
  body = cls.endswith("Model")
  model = build(getattr(transformers, cls), VIT[case], num_labels=5)
  inputs = images(VIT[case])
  outputs = BODY if body else {"logits": "logits"}
  pretrained = harness.check("vit", f"{cls}, {case}", model, inputs, outputs, tmp_path)
  assert pretrained.config.num_labels == (0 if body else 5)
  assert pretrained.config.pooler == body
  if case == SQUARE:
    harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.parametrize(("cls", "case"), cases(DINO, [
    "Dinov2Model", "Dinov2ForImageClassification", "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification"], [
        ("Dinov2ForImageClassification", PLAIN), ("Dinov2WithRegistersModel", SWIGLU)]))
def test_dinov2(cls, case, tmp_path):
  body = cls.endswith("Model")
  extra = {"num_register_tokens": 3} if "Registers" in cls else {}
  model = build(getattr(transformers, cls), DINO[case], num_labels=5, **extra)
  # Larger, smaller and not square: positions are interpolated.
  inputs = images(DINO[case], [13, 22] if body else [9, 8])
  outputs = BODY if body else {"logits": "logits"}
  pretrained = harness.check("vit", f"{cls}, {case}", model, inputs, outputs, tmp_path)
  if case == SWIGLU and not body:
    harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.parametrize(("cls", "case"), cases(TOWER, [
    "CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel"], [
        ("CLIPVisionModel", "odd"), ("CLIPVisionModelWithProjection", "square"),
        ("SiglipVisionModel", "odd")]))
def test_towers(cls, case, tmp_path):
  extra = {"projection_dim": 11} if "Projection" in cls else {}
  config = TOWER[case] if "CLIP" in cls else {
      key: value for key, value in TOWER[case].items() if key != "initializer_range"}
  model = build(getattr(transformers, cls), config, **extra)
  outputs = {"last_hidden_state": "last_hidden_state", "image_embeds": "image_embeds"} \
      if extra else BODY
  inputs = images(config)
  pretrained = harness.check("vit", f"{cls}, {case}", model, inputs, outputs, tmp_path)
  if "Projection" not in cls and case == "square":
    harness.check_scan(pretrained, inputs, tmp_path)


@pytest.mark.slow
def test_siglip_without_pooling(tmp_path):
  model = build(transformers.SiglipVisionModel, {
      key: value for key, value in TOWER["square"].items() if key != "initializer_range"},
                vision_use_head=False)
  pretrained = harness.check("vit", "SiglipVisionModel, without pooling", model,
                             images(TOWER["square"]), {"last_hidden_state": "last_hidden_state"},
                             tmp_path)
  assert "pooler_output" not in apply(pretrained, images(TOWER["square"]))


@pytest.mark.parametrize(("cls", "normed"), [
    ("Dinov2Backbone", True), slow("Dinov2Backbone", False),
    ("Dinov2WithRegistersBackbone", False)])
def test_feature_maps_of_a_backbone(cls, normed, tmp_path):
  model = build(getattr(transformers, cls), DINO[PLAIN], apply_layernorm=normed,
                out_features=["stem", "stage1", "stage2"])
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = images(DINO[PLAIN], [12, 20])
  with torch.no_grad():
    want = model(**harness.as_torch(inputs)).feature_maps
  got = apply(pretrained, inputs)["feature_maps"]
  assert [m.shape for m in got] == [(3, 3, 5, 24)] * 3
  for ours, theirs in zip(got, want, strict=True):
    assert harness.difference(ours, theirs.permute(0, 2, 3, 1)) <= harness.TOLERANCE


def test_feature_maps_are_the_patches_of_the_last_layer(tmp_path):
  build(transformers.DeiTForImageClassification, VIT[GREY]).save_pretrained(tmp_path)
  out = apply(models.load(str(tmp_path)), images(VIT[GREY]))
  assert [m.shape for m in out["feature_maps"]] == [(3, 3, 5, 30)]
  assert np.array_equal(out["feature_maps"][0].reshape(3, 15, 30), out["last_hidden_state"][:, 2:])
  assert np.array_equal(out["features"], out["last_hidden_state"][:, 0])


@pytest.mark.parametrize("cls", ["Dinov2Model", slow("Dinov2WithRegistersModel")])
def test_mask_tokens(cls, tmp_path):
  model = build(getattr(transformers, cls), DINO[PLAIN])
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = images(DINO[PLAIN])
  masked = np.random.default_rng(0).random((3, 16)) < 0.4
  with torch.no_grad():
    want = model(**harness.as_torch(inputs), bool_masked_pos=torch.tensor(masked))
  got = apply(pretrained, inputs, bool_masked_pos=masked)
  assert harness.difference(got["pooler_output"], want.pooler_output) <= harness.TOLERANCE
  assert harness.difference(apply(pretrained, inputs)["pooler_output"], want.pooler_output) > 1e-3


@pytest.mark.parametrize("cls", [
    slow("ViTModel"), "DeiTModel", slow("CLIPVisionModel"), "SiglipVisionModel"])
def test_interpolate_pos_encoding(cls, tmp_path):
  config = {key: value for key, value in VIT[SQUARE].items()
            if "Siglip" not in cls or key != "initializer_range"}
  model = build(getattr(transformers, cls), config)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  for sides in ([24, 13], [8, 32]):
    inputs = images(config, sides)
    with torch.no_grad():
      want = model(**harness.as_torch(inputs), interpolate_pos_encoding=True).last_hidden_state
    got = apply(pretrained, inputs, interpolate_pos_encoding=True)["last_hidden_state"]
    assert harness.difference(got, want) <= harness.TOLERANCE
  with pytest.raises(errors.UserError, match="image of 8 x 32.*interpolate_pos_encoding"):
    apply(pretrained, images(config, [8, 32]))


def in_memory(model, folder):
  """Saves a model with the names that its parameters have in memory."""
  model.save_pretrained(folder, save_original_format=False)
  return set(safetensors_torch.load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(("cls", "config"), [
    slow("ViTForImageClassification", VIT[SQUARE]), ("DeiTModel", VIT[SQUARE]),
    ("Dinov2Model", DINO[SWIGLU]),
    slow("Dinov2WithRegistersForImageClassification", DINO[PLAIN])])
def test_both_generations_of_names(cls, config, tmp_path):
  model = build(getattr(transformers, cls), config, num_labels=4)
  model.save_pretrained(tmp_path / "file")
  new = in_memory(model, tmp_path / "memory")
  assert any("attention.q_proj" in name for name in new)
  inputs, results = images(config), []
  for folder in ("file", "memory"):
    pretrained = models.load(str(tmp_path / folder))
    assert not pretrained.report.initialised and not pretrained.report.ignored
    models.export(pretrained, tmp_path / "out" / folder)
    harness.same_tensors(tmp_path / folder, tmp_path / "out" / folder)
    results.append(apply(pretrained, inputs)["last_hidden_state"])
  assert harness.difference(*results) < 1e-6


def test_names_of_old_clip_files(tmp_path):
  model = build(transformers.CLIPVisionModel, TOWER["square"])
  model.save_pretrained(tmp_path)
  file = tmp_path / "model.safetensors"
  old = {f"vision_model.{name}": value
         for name, value in safetensors_torch.load_file(file).items()}
  old["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
  safetensors_torch.save_file(old, file, {"format": "pt"})
  pretrained = models.load(str(tmp_path))
  models.export(pretrained, tmp_path / "out")
  harness.same_tensors(tmp_path, tmp_path / "out")
  inputs = images(TOWER["square"])
  with torch.no_grad():
    want = model(**harness.as_torch(inputs)).pooler_output
  assert harness.difference(apply(pretrained, inputs)["pooler_output"], want) <= harness.TOLERANCE


@pytest.mark.parametrize(("cls", "config", "width", "prefix", "opener"), [
    slow("ViTModel", VIT[SQUARE], 24, "vit.", "ViTForImageClassification"),
    ("DeiTModel", VIT[SQUARE], 24, "deit.", "DeiTForImageClassification"),
    slow("Dinov2Model", DINO[PLAIN], 48, "dinov2.", "Dinov2ForImageClassification"),
    ("CLIPVisionModel", TOWER["square"], 24, "vision_model.", "CLIPForImageClassification"),
    slow("CLIPVisionModelWithProjection", TOWER["square"], 24, "vision_model.",
         "CLIPForImageClassification"),
    slow("SiglipVisionModel", TOWER["square"], 24, "vision_model.",
         "SiglipForImageClassification")])
def test_a_new_label_head(cls, config, width, prefix, opener, tmp_path):
  config = {key: value for key, value in config.items()
            if "Siglip" not in cls or key != "initializer_range"}
  build(getattr(transformers, cls), config).save_pretrained(tmp_path / "body")
  pretrained = models.load(str(tmp_path / "body"), labels=["a", "b", "c"])
  assert set(pretrained.report.initialised) == {"params/classifier/bias",
                                                "params/classifier/kernel"}
  assert pretrained.variables["params"]["classifier"]["kernel"].shape == (width, 3)
  models.export(pretrained, tmp_path / "out")
  written = safetensors_torch.load_file(tmp_path / "out" / "model.safetensors")
  assert all(name.startswith((prefix, "classifier.")) for name in written)
  reader = getattr(transformers, opener)
  again, info = reader.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
  inputs = images(config)
  with torch.no_grad():
    want = again.eval()(**harness.as_torch(inputs)).logits
  got = apply(pretrained, inputs)
  assert harness.difference(got["logits"], want) <= harness.TOLERANCE
  assert np.array_equal(got["logits"], pretrained.module.apply(
      pretrained.variables, got["features"], method="head"))


def test_the_body_of_a_classifier(tmp_path):
  model = build(transformers.DeiTForImageClassificationWithTeacher, VIT[SQUARE],
                num_labels=4)
  model.save_pretrained(tmp_path / "labelled")
  pretrained = models.load(str(tmp_path / "labelled"), num_labels=0)
  assert "logits" not in apply(pretrained, images(VIT[SQUARE]))
  models.export(pretrained, tmp_path / "body")
  stated = json.loads((tmp_path / "body" / "config.json").read_text())
  assert stated["architectures"] == ["DeiTModel"]
  again = models.load(str(tmp_path / "labelled"), labels=["x", "y"])
  assert again.config.head == "distilled"
  assert apply(again, images(VIT[SQUARE]))["logits"].shape == (3, 2)
  plain = models.load(str(tmp_path / "labelled"), head="classify", num_labels=2)
  assert plain.config.head == "classify"
  assert set(plain.report.initialised) == {"params/classifier/bias", "params/classifier/kernel"}


def test_masked_image_modelling_files_give_their_body(tmp_path):
  model = build(transformers.ViTForMaskedImageModeling, VIT[SQUARE], encoder_stride=4)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  assert sorted(pretrained.report.ignored) == ["decoder.0.bias", "decoder.0.weight",
                                               "vit.embeddings.mask_token"]
  inputs = images(VIT[SQUARE])
  with torch.no_grad():
    want = model.vit(**harness.as_torch(inputs)).last_hidden_state
  got = apply(pretrained, inputs)["last_hidden_state"]
  assert harness.difference(got, want) <= harness.TOLERANCE


@pytest.mark.parametrize(("cls", "before"), [
    slow("ViTModel", 1), ("DeiTModel", 2), slow("Dinov2WithRegistersModel", 1),
    slow("CLIPVisionModel", 1), slow("SiglipVisionModel", 0)])
def test_surgery_of_the_image_size(cls, before, tmp_path):
  config = {key: value for key, value in VIT[SQUARE].items()
            if ("Siglip" not in cls or key != "initializer_range")
            and ("Dino" not in cls or key != "intermediate_size")}
  model = build(getattr(transformers, cls), config)
  model.save_pretrained(tmp_path / "old")
  wide = models.load(str(tmp_path / "old"), changes={"image_size": (24, 12)})
  position = wide.variables["params"]["embeddings"]["position"]
  assert position.shape[-2:] == (before + 18, 24) and wide.config.image_size == (24, 12)
  inputs = images(config, [24, 12])
  if "Registers" not in cls:  # whose interpolation at run time smooths
    flag = {} if "Dino" in cls else {"interpolate_pos_encoding": True}
    with torch.no_grad():
      want = model(**harness.as_torch(inputs), **flag).last_hidden_state
    got = apply(wide, inputs)["last_hidden_state"]
    assert harness.difference(got, want) <= harness.TOLERANCE
  models.export(wide, tmp_path / "wide")
  assert models.load(str(tmp_path / "wide")).config.image_size == (24, 12)
  square = models.load(str(tmp_path / "old"), changes={"image_size": 20})
  models.export(square, tmp_path / "square")
  again = type(model).from_pretrained(tmp_path / "square").eval()
  inputs = images(config, [20, 20])
  with torch.no_grad():
    want = again(**harness.as_torch(inputs)).last_hidden_state
  got = apply(square, inputs)["last_hidden_state"]
  assert harness.difference(got, want) <= harness.TOLERANCE


@pytest.mark.parametrize("depth", [1, 4])
def test_surgery_of_channels_and_depth(depth, tmp_path):
  config = DINO[PLAIN]
  model = build(transformers.Dinov2Model, config)
  model.save_pretrained(tmp_path / "old")
  changed = models.load(str(tmp_path / "old"), changes={"channels": 1, "depth": depth})
  models.export(changed, tmp_path / "new")
  again, info = transformers.Dinov2Model.from_pretrained(tmp_path / "new",
                                                         output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  grey = images({**config, "num_channels": 1})
  with torch.no_grad():
    want = again.eval()(**harness.as_torch(grey)).last_hidden_state
  got = apply(changed, grey)
  assert harness.difference(got["last_hidden_state"], want) <= harness.TOLERANCE
  assert len(got["feature_maps"]) == 1


def test_antialiased_interpolation_equals_torch():
  grid = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
  for size in ((3, 4), (11, 2), (7, 5), (16, 13), (1, 9)):
    want = torch.nn.functional.interpolate(
        torch.tensor(grid).permute(2, 0, 1)[None], size=size, mode="bicubic",
        align_corners=False, antialias=True)[0].permute(1, 2, 0)
    assert harness.difference(vit_blocks.resample(jnp.asarray(grid), size), want) < 1e-5


@pytest.mark.slow
def test_dropout_and_stochastic_depth(tmp_path):
  config = {**DINO[PLAIN], "drop_path_rate": 0.5}
  build(transformers.Dinov2Model, config).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = images(config, rows=64)
  key = {"dropout": jax.random.key(0)}
  still = apply(pretrained, inputs)["last_hidden_state"]
  moved = apply(pretrained, inputs, rngs=key)["last_hidden_state"]
  same = np.isclose(still, moved, atol=1e-5).all((1, 2))
  assert not same.any() and not np.isclose(still, moved, atol=1e-5).all()
  layer = vit_blocks.Layer(pretrained.config)
  weights = {"params": pretrained.variables["params"]["encoder"]["layer_0"]}
  x = jnp.asarray(np.random.default_rng(0).normal(size=(400, 3, 24)), jnp.float32)
  kept = layer.apply(weights, x, rngs=key)
  # Both branches are left out for a quarter of the images, as wholes.
  untouched = np.asarray((kept == x).all((1, 2)))
  assert 0.15 < untouched.mean() < 0.35
  assert np.array_equal(untouched, np.asarray((kept == x).any((1, 2))))
  loud = models.load(str(tmp_path), dropout=0.3)
  assert loud.config.hidden_dropout_prob == loud.config.attention_probs_dropout_prob == 0.3
  assert loud.config.drop_path_rate == 0.5


@pytest.mark.parametrize(("kind", "changes", "message"), [
    ("vit", {"hidden_act": "mish"}, "hidden_act 'mish'"),
    ("vit", {"pooler_act": "mish"}, "pooler_act 'mish'"),
    ("deit", {"hidden_size": 25}, "hidden_size 25 is not a multiple"),
    ("vit", {"head_dim": 3}, "head_dim=3"),
    ("vit", {"patch_size": [4, 4]}, "patch_size"),
    ("vit", {"image_size": 3}, "at least patch_size 4"),
    ("vit", {"image_size": [8, 8, 8]}, "image_size"),
    ("dinov2", {"reshape_hidden_states": False}, "reshape_hidden_states"),
    ("dinov2", {"out_indices": [3]}, "out_indices"),
    ("siglip_vision_model", {"vision_use_head": "yes"}, "vision_use_head")])
def test_values_that_are_not_computed(kind, changes, message):
  stated = {"model_type": kind, "hidden_size": 24, "num_hidden_layers": 2, "patch_size": 4,
            "num_attention_heads": 4, "image_size": 16}
  vit.Config.from_hf(stated)
  with pytest.raises(errors.UserError, match=re.escape(message)):
    vit.Config.from_hf({**stated, **changes})


def test_stages_of_another_depth():
  config = vit.Config.from_hf({"model_type": "dinov2", "num_hidden_layers": 3, "hidden_size": 24,
                               "num_attention_heads": 4, "out_indices": [1, 3],
                               "out_features": ["stage1", "stage3"]})
  for depth, stages in ((3, (1, 3)), (2, (1,)), (1, (1,)), (5, (1, 3))):
    changed = dataclasses.replace(config, num_hidden_layers=depth)
    hf = changed.to_hf()
    assert changed.stages() == stages and vit.Config.from_hf(hf) == changed
    assert ("out_features" in hf) == (depth == 3)


def test_inputs_and_heads_that_do_not_fit(tmp_path):
  build(transformers.ViTModel, VIT[SQUARE]).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  with pytest.raises(errors.UserError, match="images of 1 channels; the model reads 3"):
    apply(pretrained, images({**VIT[SQUARE], "num_channels": 1}))
  with pytest.raises(errors.UserError, match="no mask token"):
    apply(pretrained, images(VIT[SQUARE]), bool_masked_pos=np.zeros((3, 16), bool))
  with pytest.raises(errors.UserError, match="no distillation token"):
    models.load(str(tmp_path), head="distilled", num_labels=2)
  with pytest.raises(errors.UserError, match="smaller than a patch"):
    apply(pretrained, images(VIT[SQUARE], [3, 16]), interpolate_pos_encoding=True)


def test_defaults_are_upstreams():
  for kind in vit.MODEL_TYPES:
    upstream = transformers.CONFIG_MAPPING[kind]()
    config = vit.Config.from_hf({"model_type": kind})
    for name in config.upstream():
      theirs = getattr(upstream, name, None)
      theirs = getattr(upstream, "attention_dropout", None) if theirs is None and \
          name == "attention_probs_dropout_prob" else theirs
      if theirs is not None and name not in ("out_indices", "pooler_output_size"):
        assert getattr(config, name) == theirs, (kind, name)


@pytest.mark.slow
def test_real_weights_equal_transformers(shared, tmp_path):
  source = shared / "weights" / "dinov2-small"
  model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
  pretrained = models.load(str(source))
  assert not pretrained.report.initialised and not pretrained.report.ignored
  config = {"image_size": 98}
  for sides in ([98, 98], [70, 112]):
    inputs = images(config, sides, rows=2)
    model.zero_grad()
    want = model(**harness.as_torch(inputs)).last_hidden_state
    got = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["last_hidden_state"]
    assert harness.difference(got, want.detach()) <= harness.TOLERANCE
  weight = np.random.default_rng(7).normal(size=want.shape).astype(np.float32)
  (want * torch.tensor(weight)).sum().backward()

  def loss(variables):
    return (pretrained.module.apply(variables, **inputs)["last_hidden_state"] * weight).sum()

  worst = harness.compare_gradients(model, pretrained, loss, ("vit", "dinov2-small"))
  harness.ROWS.append(("vit", "dinov2-small, real weights",
                       harness.difference(got, want.detach()), worst))
  models.export(pretrained, tmp_path / "out")
  harness.same_tensors(source, tmp_path / "out")
  assert names.flatten(pretrained.variables)["params/norm/scale"].dtype == jnp.float32
