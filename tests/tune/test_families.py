"""The methods on the model families there are: every adapter acts, and merging loses nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tune import toys

from ft import optim, state, tune
from ft.models import bert, efficientnet


def bert_case():
  config = bert.Config(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=32, max_position_embeddings=16, num_labels=3,
                       pooling="mean", pooler=False)
  ids = jax.random.randint(jax.random.key(0), (2, 6), 0, 30)
  return bert.Model(config), {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}


def efficientnet_case():
  config = efficientnet.Config(stages=((1, 3, 1, 1, 16), (2, 3, 2, 6, 24)), head_features=32,
                               num_labels=3, image_size=32)
  return efficientnet.Model(config), {
    "pixel_values": jax.random.normal(jax.random.key(0), (2, 32, 32, 3))}


@pytest.mark.parametrize("case", [bert_case, efficientnet_case])
def test_lora_on_all_linear_layers(case, caplog):
  module, inputs = case()
  variables = jax.jit(lambda: module.init(jax.random.key(1), **inputs))()
  tuned = toys.init("lora", variables, rank=2)
  trainable = toys.shaken(tuned.trainable)
  apply = jax.jit(state.make_apply(module, tuned.interceptor))
  with caplog.at_level("WARNING", logger="absl"):
    start, _ = apply(tuned.combine(tuned.frozen, tuned.trainable), inputs)
    moved, _ = apply(tuned.combine(tuned.frozen, trainable), inputs)
  assert "act on nothing" not in caplog.text
  bare = jax.jit(lambda variables: module.apply(variables, **inputs)["logits"])
  plain, merged = bare(variables), bare(tuned.merge(tuned.frozen, trainable))
  np.testing.assert_allclose(start["logits"], plain, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(moved["logits"], merged, rtol=1e-4, atol=1e-5)
  assert np.abs(merged - plain).max() > 1e-2


@pytest.mark.parametrize("case", [bert_case, efficientnet_case])
def test_layer_decay_grades_every_layer(case):
  module, inputs = case()
  variables = jax.eval_shape(lambda: module.init(jax.random.key(1), **inputs))
  trainable = {"params": variables["params"]}
  factors = tune.flatten(optim.rate_factors(trainable, 0.5, 1.0, toys.HEAD))
  layers = 2 if case is bert_case else 3
  bottom = {f for p, f in factors.items() if p.startswith(("params/embeddings", "params/stem"))}
  assert bottom == {0.5 ** (layers + 1)}
  name = "layer" if case is bert_case else "blocks"
  for i in range(layers):
    assert {f for p, f in factors.items() if f"{name}_{i}/" in p} == {0.5 ** (layers - i)}
  assert factors["params/classifier/kernel"] == 1.0
