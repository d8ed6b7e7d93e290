"""CLIP and SigLIP against transformers, float32: embeddings, scores, losses, label heads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import clip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4,
          "image_size": 12, "intermediate_size": 40}
TEXT = {"hidden_size": 18, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 50,
        "intermediate_size": 30, "max_position_embeddings": 16, "eos_token_id": 49}
DUAL = {"image_embeds": "image_embeds", "text_embeds": "text_embeds",
        "logits_per_image": "logits_per_image", "logits_per_text": "logits_per_text"}


def build(kind, cls="Model", vision=(), text=(), **top):
  """Returns a random model; kind is "CLIP" or "Siglip"."""
  wide = {"initializer_range": 0.2} if kind == "CLIP" else {}
  # The embeddings of both of SigLIP's towers have the same size, which text_config states.
  size = {"projection_size": {**VISION, **dict(vision)}["hidden_size"]} if kind == "Siglip" else {}
  config = getattr(transformers, f"{kind}Config")(
      vision_config={**VISION, **wide, **dict(vision)},
      text_config={**TEXT, **wide, **size, **dict(text)}, attn_implementation="eager", **top)
  torch.manual_seed(0)
  model = getattr(transformers, kind + cls)(config)
  if kind == "CLIP":  # upstream starts as if there were thousands of features
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.ndim > 1:
          parameter.mul_(3)
  return harness.randomise(model)


def inputs(model, left=False, eos=49, length=13):
  """Images, and texts of several lengths that end with the token `eos`."""
  vision = model.config.vision_config
  shape = (3, vision.image_size, vision.image_size, vision.num_channels)
  out = {"pixel_values": np.random.default_rng(3).normal(size=shape).astype(np.float32),
         **harness.tokens(45, length=length, left=left)}
  last = length - 1 - np.argmax(out["attention_mask"][:, ::-1], 1)
  out["input_ids"][np.arange(3), last] = eos
  return out


def apply(pretrained, **inputs):
  """Applies a model, compiled: compiling operation by operation would take longer."""
  return jax.jit(lambda v: pretrained.module.apply(v, **inputs))(pretrained.variables)


CASES = {
    "CLIP, padding right": ("CLIP", {"projection_dim": 11}, {}, {}),
    "CLIP, padding left, gelu, odd sizes": (
        "CLIP", {"projection_dim": 16, "logit_scale_init_value": 1.3},
        {"hidden_size": 30, "num_attention_heads": 3, "image_size": 14, "num_channels": 1,
         "hidden_act": "gelu", "num_hidden_layers": 3}, {"hidden_act": "relu",
                                                         "layer_norm_eps": 1e-3}),
    "SigLIP, padding right": ("Siglip", {}, {}, {}),
    "SigLIP, padding left, gelu, odd sizes": (
        "Siglip", {}, {"hidden_size": 15, "num_attention_heads": 5, "image_size": 9,
                       "patch_size": 2, "hidden_act": "relu", "layer_norm_eps": 1e-3},
        {"hidden_act": "gelu", "num_hidden_layers": 3}),
}


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if i in (1, 2) else pytest.mark.slow)
    for i, case in enumerate(CASES)])
def test_dual_encoder(case, tmp_path):
  kind, top, vision, text = CASES[case]
  model = build(kind, vision=vision, text=text, **top)
  batch = inputs(model, left="left" in case)
  pretrained = harness.check("clip", case, model, batch, DUAL, tmp_path)
  if "CLIP" in case:
    harness.check_scan(pretrained, batch, tmp_path, tolerance=1e-5)
  both = apply(pretrained, **batch)
  images = apply(pretrained, pixel_values=batch["pixel_values"])
  assert "text_embeds" not in images and "logits_per_text" not in images
  assert harness.difference(images["image_embeds"], both["image_embeds"]) < 1e-6
  texts = apply(pretrained, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
  assert set(texts) == {"text_embeds"}
  assert harness.difference(texts["text_embeds"], both["text_embeds"]) < 1e-6
  assert np.allclose(np.linalg.norm(both["image_embeds"], axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("eos", [2, 49, 7])
def test_the_token_that_stands_for_a_text(eos, tmp_path):
  model = build("CLIP", text={"eos_token_id": eos, "pad_token_id": eos})
  # With id 2 in config.json the largest id counts; else the first of the id, though padding has it.
  batch = inputs(model, eos=49 if eos == 2 else eos)
  batch["input_ids"] = np.where(batch["attention_mask"], batch["input_ids"], eos)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  with torch.no_grad():
    want = model(**harness.as_torch(batch))
  got = apply(pretrained, **batch)
  for name in DUAL:
    assert harness.difference(got[name], want[name]) <= harness.TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_losses(kind, tmp_path):
  model = build(kind)
  model.save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  batch = inputs(model)
  want = model(**harness.as_torch(batch), return_loss=True).loss
  want.backward()
  loss = clip.contrastive_loss if kind == "CLIP" else clip.sigmoid_loss

  def ours(variables):
    return loss(pretrained.module.apply(variables, **batch)["logits_per_text"])

  assert harness.difference(ours(pretrained.variables), want.detach()) < 1e-5
  harness.compare_gradients(model, pretrained, ours, ("clip", kind, "loss"))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_image_classification(kind, tmp_path):
  model = build(kind, "ForImageClassification", num_labels=5)
  batch = {"pixel_values": inputs(model)["pixel_values"]}
  pretrained = harness.check("clip", f"{kind}ForImageClassification", model, batch,
                             {"logits": "logits"}, tmp_path)
  out = apply(pretrained, **batch)
  assert out["features"].shape == (3, 24) and out["feature_maps"][0].shape == (3, 3, 3, 24)
  assert "image_embeds" not in out
  with pytest.raises(errors.UserError, match="reads no input_ids"):
    pretrained.module.apply(pretrained.variables, input_ids=np.zeros((1, 3), int))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_label_head_on_a_dual_encoder(kind, tmp_path):
  build(kind).save_pretrained(tmp_path / "dual")
  pretrained = models.load(str(tmp_path / "dual"), labels=["a", "b", "c"])
  assert set(pretrained.report.initialised) == {"params/classifier/bias",
                                                "params/classifier/kernel"}
  assert "logit_scale" in pretrained.report.ignored
  models.export(pretrained, tmp_path / "out")
  cls = getattr(transformers, f"{kind}ForImageClassification")
  again, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  batch = {"pixel_values": inputs(again)["pixel_values"]}
  with torch.no_grad():
    want = again.eval()(**harness.as_torch(batch)).logits
  got = apply(pretrained, **batch)
  assert harness.difference(got["logits"], want) <= harness.TOLERANCE


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_labelled_tower_is_read_as_a_classifier(kind, tmp_path):
  config = getattr(transformers, f"{kind}VisionConfig")(**VISION)
  harness.randomise(getattr(transformers, f"{kind}VisionModel")(config)).save_pretrained(
      tmp_path / "tower")
  tower = models.load(str(tmp_path / "tower"), num_labels=3)
  models.export(tower, tmp_path / "out")
  again = models.load(str(tmp_path / "out"))
  assert (tower.family, again.family) == ("vit", "clip") and again.config.num_labels == 3
  image = np.ones((1, 12, 12, 3), np.float32)
  assert harness.difference(apply(tower, pixel_values=image)["logits"],
                            apply(again, pixel_values=image)["logits"]) < 1e-6
  models.export(again, tmp_path / "again")
  harness.same_tensors(tmp_path / "out", tmp_path / "again")


@pytest.mark.slow
def test_surgery(tmp_path):
  model = build("CLIP")
  model.save_pretrained(tmp_path / "old")
  batch = inputs(model)
  wide = models.load(str(tmp_path / "old"), changes={"image_size": (20, 8)})
  images = np.random.default_rng(0).normal(size=(3, 20, 8, 3)).astype(np.float32)
  with torch.no_grad():
    want = model(**harness.as_torch({**batch, "pixel_values": images}),
                 interpolate_pos_encoding=True)
  got = apply(wide, **{**batch, "pixel_values": images})
  assert harness.difference(got["image_embeds"], want.image_embeds) <= harness.TOLERANCE
  plain = models.load(str(tmp_path / "old"))
  flagged = apply(plain, pixel_values=images, interpolate_pos_encoding=True)
  assert harness.difference(flagged["image_embeds"], want.image_embeds) <= harness.TOLERANCE
  with pytest.raises(errors.UserError, match="image of 20 x 8"):
    plain.module.apply(plain.variables, images)

  changed = models.load(str(tmp_path / "old"), changes={"image_size": 20, "channels": 1})
  models.export(changed, tmp_path / "new")
  again = transformers.CLIPModel.from_pretrained(tmp_path / "new").eval()
  batch["pixel_values"] = np.random.default_rng(0).normal(size=(3, 20, 20, 1)).astype(np.float32)
  with torch.no_grad():
    want = again(**harness.as_torch(batch))
  got = apply(changed, **batch)
  assert harness.difference(got["logits_per_text"], want.logits_per_text) <= harness.TOLERANCE


def test_old_files(tmp_path):
  model = build("CLIP")
  model.save_pretrained(tmp_path)
  file = tmp_path / "model.safetensors"
  old = safetensors_torch.load_file(file)
  old["text_model.embeddings.position_ids"] = torch.arange(16)[None]
  old["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
  safetensors_torch.save_file(old, file, {"format": "pt"})
  stated = json.loads((tmp_path / "config.json").read_text())
  # Files from before 2023 state the towers twice; the second one wins.
  stated["text_config_dict"] = stated["text_config"]
  stated["text_config"] = {**stated["text_config"], "num_hidden_layers": 7}
  stated["vision_config_dict"] = None
  (tmp_path / "config.json").write_text(json.dumps(stated))
  pretrained = models.load(str(tmp_path))
  assert pretrained.config.text.num_hidden_layers == 2
  models.export(pretrained, tmp_path / "out")
  harness.same_tensors(tmp_path, tmp_path / "out")
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["text_config"] == stated["text_config"]
  upstream = transformers.CLIPConfig.from_pretrained(tmp_path)
  assert upstream.text_config.num_hidden_layers == 2


@pytest.mark.slow
def test_dropout(tmp_path):
  build("CLIP").save_pretrained(tmp_path / "old")
  pretrained = models.load(str(tmp_path / "old"), dropout=0.4)
  batch = clip.probe_inputs(pretrained.config)
  still = apply(pretrained, **batch)
  moved = apply(pretrained, **batch, rngs={"dropout": jax.random.key(0)})
  for name in DUAL:
    assert not np.allclose(still[name], moved[name], atol=1e-3), name
  models.export(pretrained, tmp_path / "new")
  written = json.loads((tmp_path / "new" / "config.json").read_text())
  assert written["text_config"]["attention_dropout"] == 0.4
  assert written["vision_config"]["attention_dropout"] == 0.4


def test_what_is_not_computed(tmp_path):
  stated = {"model_type": "siglip", "vision_config": {"vision_use_head": False}}
  with pytest.raises(errors.UserError, match="vision_use_head"):
    clip.Config.from_hf(stated)
  with pytest.raises(errors.UserError, match="text_config"):
    clip.Config.from_hf({"model_type": "clip", "text_config": [1]})
  with pytest.raises(errors.UserError, match="hidden_act 'mish'"):
    clip.Config.from_hf({"model_type": "clip", "text_config": {"hidden_act": "mish"}})
  with pytest.raises(errors.UserError, match="eos_token_id"):
    clip.Config.from_hf({"model_type": "clip", "text_config": {"eos_token_id": [1, 2]}})
  build("CLIP").save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path))
  with pytest.raises(errors.UserError, match="neither pixel_values nor input_ids"):
    pretrained.module.apply(pretrained.variables)
  with pytest.raises(errors.UserError, match="a text of 17 tokens; the model has 16 positions"):
    pretrained.module.apply(pretrained.variables, input_ids=jnp.zeros((1, 17), jnp.int32))
  with pytest.raises(errors.UserError, match="it can change image_size, channels"):
    models.load(str(tmp_path), changes={"depth": 3})


def test_defaults_are_upstreams():
  for kind in clip.MODEL_TYPES:
    upstream = transformers.CONFIG_MAPPING[kind]()
    config = clip.Config.from_hf({"model_type": kind})
    for ours, theirs in ((config.text, upstream.text_config),
                         (config.vision, upstream.vision_config), (config, upstream)):
      for name in ours.upstream():
        value = getattr(theirs, "attention_dropout" if name == "attention_probs_dropout_prob"
                        else name, None)
        if value is not None and name != "projection_size":
          assert getattr(ours, name) == value, (kind, name)
