"""Trainable tokens: some rows of the word embedding train, input and tied output alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tune import small, toys

from ft import errors, tune
from ft.tune import adapters, tokens

IDS = (28, 3, 29)


@pytest.mark.parametrize("scanned,tied", [(False, True), (True, True), (False, False)])
def test_adapted_is_merged_and_so_is_the_gradient(scanned, tied):
  model, inputs = small.a_llama(scanned, tie_word_embeddings=tied)
  inputs["input_ids"] = inputs["input_ids"].at[0, :3].set(jnp.array(IDS)).at[2].set(5)
  tuned = small.init("tokens", model, tokens=IDS)
  assert [(row.path, row.shape) for row in tuned.table] == [
    ("adapters/embed_tokens/tokens_delta", (3, 16))]
  run = small.apply(model, tuned)
  plain = jax.jit(lambda v: model.module.apply(v, **inputs)["logits"])
  before = plain(model.variables)
  np.testing.assert_allclose(run(tuned.trainable, inputs)["logits"], before, rtol=1e-6, atol=1e-6)

  trainable = toys.shaken(tuned.trainable)
  merged = tuned.merge(tuned.frozen, trainable)
  logits = run(trainable, inputs)["logits"]
  np.testing.assert_allclose(logits, plain(merged), rtol=1e-5, atol=1e-5)
  # The other words have not changed, and only a tied output layer has.
  table, old = (tune.flatten(v)["params/embed_tokens/embedding"]
                for v in (merged, model.variables))
  rest = np.setdiff1d(np.arange(30), IDS)
  np.testing.assert_array_equal(table[rest], old[rest])
  delta = np.asarray(tune.flatten(trainable)["adapters/embed_tokens/tokens_delta"])
  np.testing.assert_allclose(table[np.asarray(IDS)], old[np.asarray(IDS)] + delta, rtol=1e-6)
  unread = np.asarray(before)[2], np.asarray(logits)[2]
  np.testing.assert_allclose(unread[0][:, rest], unread[1][:, rest], rtol=1e-5, atol=1e-5)
  assert (np.abs(unread[0] - unread[1])[:, np.asarray(IDS)].max() > 1e-3) == tied

  def loss(logits):
    return jnp.sum((logits - jnp.arange(30.0)) ** 2)

  got = jax.jit(jax.grad(lambda t: loss(run(t, inputs)["logits"])))(trainable)
  want = jax.jit(jax.grad(lambda t: loss(plain(tuned.merge(tuned.frozen, t)))))(trainable)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_training_leaves_the_rest_alone():
  model, inputs = small.a_bert()
  tuned = small.init("tokens", model, tokens=tuple(np.unique(inputs["input_ids"])[:4].tolist()))
  assert small.count(tuned) == 4 * 16 + 16 * 3 + 3
  small.check_training(model, tuned, inputs)


def test_without_ids_the_added_rows_train():
  model, _ = small.a_llama()
  grown = dataclasses.replace(model.config, source='{"vocab_size": 27}')
  tuned = small.init("tokens", dataclasses.replace(model, config=grown))
  np.testing.assert_array_equal(
    tune.flatten(tuned.frozen)["adapters/embed_tokens/tokens_index"], [27, 28, 29])
  assert tuned.settings.tokens == (27, 28, 29)


def test_files_hold_new_rows_as_those_of_peft():
  torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
  theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=24, tie_word_embeddings=True)).eval()
  start = theirs.model.embed_tokens.weight.detach().numpy().copy()
  wrapped = peft.get_peft_model(theirs, peft.TrainableTokensConfig(token_indices=list(IDS)))
  name, parameter = next((n, p) for n, p in wrapped.named_parameters() if "tokens_delta" in n)
  np.testing.assert_array_equal(parameter.detach().numpy(), start[np.asarray(IDS)])
  with torch.no_grad():
    parameter.add_(torch.randn(parameter.shape))
  method = tokens.METHOD(toys.config("tokens", tokens=IDS))
  found = adapters.Found(start, "embedding")
  layer = adapters.expand("embed_tokens", found, None, jax.random.PRNGKey(0))[0]
  rows = parameter.detach().numpy()
  trainable, fixed = method.from_peft({"trainable_tokens_delta": rows}, layer)
  merged, _ = method.merge({**trainable, **fixed}, jnp.asarray(start), None, layer)
  theirs_merged = wrapped.merge_and_unload().model.embed_tokens.weight.detach().numpy()
  np.testing.assert_allclose(merged, theirs_merged, rtol=1e-6, atol=1e-6)
  back = method.to_peft({**trainable, **fixed}, layer)["trainable_tokens_delta"]
  np.testing.assert_allclose(back, rows, rtol=1e-6, atol=1e-6)
  assert tokens.peft_config(method.config)["token_indices"] == list(IDS)


def test_messages():
  model, _ = small.a_llama()
  for ids, says in (((30,), "30 is outside the word embedding's 30 rows"),
                    ((4, 4), "named twice"), ((), "model.vocab_size added no rows")):
    with pytest.raises(errors.UserError, match=says):
      small.init("tokens", model, tokens=ids)
  image, _ = small.a_vit()
  with pytest.raises(errors.UserError, match="act on a word embedding.*has none"):
    small.init("tokens", image, tokens=(1,))
