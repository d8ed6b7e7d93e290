"""Visual prompts: tokens among those of an image, which only layers see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tune import small, toys

from ft import errors, tune
from ft.models import clip, vit, vit_blocks
from ft.weights import stacking

LENGTH = 3
DINO = dict(model_type="dinov2_with_registers", num_register_tokens=2, mlp_ratio=2.0,
            out_indices=(1, 2))
FAMILIES = {"vit": {}, "deit": dict(model_type="deit"), "dino": DINO,
            "siglip": dict(model_type="siglip_vision_model")}
BEFORE = {"vit": 1, "deit": 2, "dino": 3, "siglip": 0}


def by_hand(model, flat, inputs, deep, before):
  """The encoder's output with prompts, layer by layer: what stands there without the prompts."""
  c = model.config
  sub = lambda at: tune.unflatten({  # noqa: E731
    "params/" + p.removeprefix(f"params/{at}/"): a for p, a in flat.items()
    if p.startswith(f"params/{at}/")})
  x = vit_blocks.Embeddings(c).apply(sub("embeddings"), inputs["pixel_values"], None, False)
  after = []
  for i in range(c.num_hidden_layers):
    own = flat.get(f"adapters/encoder/layer_{i}/visual_prompt_tokens" if deep else
                   "adapters/encoder/visual_prompt_tokens")
    if deep or not i:
      tokens = jnp.broadcast_to(own, (x.shape[0], *own.shape))
      x = jnp.concatenate([x[:, :before], tokens, x[:, before + (LENGTH if i else 0):]], 1)
    x = vit_blocks.Layer(c).apply(sub(f"encoder/layer_{i}"), x)
    after.append(jnp.concatenate([x[:, :before], x[:, before + LENGTH:]], 1))
  normed = [vit_blocks.norm(c, vit_blocks.layers.Compute()).apply(sub("norm"), y) for y in after]
  mean, first = normed[-1][:, before:].mean(1), normed[-1][:, 0]
  features = {"dino": lambda: jnp.concatenate([first, mean], -1), "siglip": lambda: mean}
  kind = "dino" if c.dino else "siglip" if c.siglip else "vit"
  features = features.get(kind, lambda: first)()
  logits = features @ flat["params/classifier/kernel"] + flat["params/classifier/bias"]
  return normed, features, logits


@pytest.mark.parametrize("name,deep,scanned", [
  ("vit", True, False), ("vit", True, True), ("vit", False, True), ("deit", False, False),
  ("dino", True, True), ("siglip", False, False)])
def test_function_and_gradient_are_those_written_out(name, deep, scanned):
  model, inputs = small.a_vit(scanned, **FAMILIES[name])
  before = BEFORE[name]
  assert model.config.tokens_before == before
  tuned = small.init("visual_prompt", model, length=LENGTH, deep=deep)
  features = 32 if name == "dino" else 16
  assert small.count(tuned) == LENGTH * 16 * (2 if deep else 1) + features * 3 + 3
  trainable = toys.shaken(tuned.trainable)

  def written_out(trainable):
    flat = stacking.unstack(tune.flatten(tuned.combine(tuned.frozen, trainable)))
    return by_hand(model, flat, inputs, deep, before)

  run = small.apply(model, tuned)
  outputs = run(trainable, inputs)
  normed, features, logits = jax.jit(written_out)(trainable)
  np.testing.assert_allclose(outputs["last_hidden_state"], normed[-1], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(outputs["features"], features, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-5, atol=2e-5)
  for y, made in zip(normed[-len(outputs["feature_maps"]):], outputs["feature_maps"], strict=True):
    assert made.shape == (2, 2, 2, 16)
    np.testing.assert_allclose(made.reshape(2, 4, 16), y[:, before:], rtol=1e-5, atol=1e-5)
  bare = model.module.apply(model.variables, **inputs)["features"]
  assert np.abs(bare - outputs["features"]).max() > 1e-3

  def loss(logits):
    return jnp.sum((logits - jnp.arange(3.0)) ** 2)

  got = jax.jit(jax.grad(lambda t: loss(run(t, inputs)["logits"])))(trainable)
  want = jax.jit(jax.grad(lambda t: loss(written_out(t)[2])))(trainable)
  for path, leaf in tune.flatten(want).items():
    assert np.abs(leaf).max() > 0, path
    np.testing.assert_allclose(tune.flatten(got)[path], leaf, rtol=1e-4,
                               atol=1e-4 * np.abs(leaf).max(), err_msg=path)


def test_training_moves_the_tokens_and_the_head_only():
  model, inputs = small.a_vit(True)
  small.check_training(model, small.init("visual_prompt", model, length=LENGTH), inputs)


def test_the_image_tower_of_a_dual_model():
  tower = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
               layer_norm_eps=1e-5)
  config = clip.Config(
    model_type="clip", projection_dim=8, image_size=8,
    text=clip.TextConfig(model_type="clip_text_model", vocab_size=30, max_position_embeddings=8,
                         eos_token_id=29, **tower),
    vision=vit.Config(model_type="clip_vision_model", patch_size=4, **tower))
  inputs = {"pixel_values": jax.random.normal(jax.random.key(1), (2, 8, 8, 3)),
            "input_ids": small.ids()}
  model = small.pretrained(clip, config, inputs)
  tuned = small.init("visual_prompt", model, length=LENGTH)
  assert [row.path for row in tuned.table] == [
    "adapters/vision_model/encoder/layer_0/visual_prompt_tokens"]
  outputs = small.apply(model, tuned)(tuned.trainable, inputs)
  bare = model.module.apply(model.variables, **inputs)
  np.testing.assert_allclose(outputs["text_embeds"], bare["text_embeds"], rtol=1e-5, atol=1e-6)
  assert np.abs(outputs["image_embeds"] - bare["image_embeds"]).max() > 1e-3


def test_start_is_uniform_and_a_layers_own():
  one, _ = small.a_vit()
  stacked, _ = small.a_vit(True)
  tokens = [np.asarray(tune.flatten(small.init("visual_prompt", m, length=100).trainable)[path])
            for m, path in ((one, "adapters/encoder/layer_1/visual_prompt_tokens"),
                            (stacked, "adapters/encoder/layers/visual_prompt_tokens"))]
  np.testing.assert_array_equal(tokens[0], tokens[1][1])
  bound = np.sqrt(6 / (3 * 4 * 4 + 16))
  assert np.abs(tokens[0]).max() <= bound
  np.testing.assert_allclose(tokens[0].std(), bound / np.sqrt(3), rtol=0.05)


def test_other_models_are_refused():
  model, _ = small.a_bert()
  with pytest.raises(errors.UserError, match="needs a vision transformer.*lora"):
    small.init("visual_prompt", model)
