"""Prefix tuning: every query sees the trained keys and values, in each layer, as in `peft`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tune import small, toys

from ft import errors, models, tune
from ft.models import attention, bart, generate
from ft.tune import prefix
from ft.weights import stacking

LENGTH = 3


@pytest.mark.parametrize("case", ["plain", "padded", "causal", "window", "packed", "cache", "bias"])
def test_attention_with_a_prefix_is_softmax_over_all_keys(case):
  rng = np.random.default_rng(0)
  heads, groups, size, queries, keys = 4, 2, 8, 5, 5
  if case == "cache":
    queries = 2
  q = rng.normal(size=(2, queries, heads, size)).astype(np.float32)
  k, v = (rng.normal(size=(2, keys, groups, size)).astype(np.float32) for _ in range(2))
  own = [rng.normal(size=(LENGTH, groups * size)).astype(np.float32) for _ in range(2)]
  more, seen = {}, np.ones((2, queries, keys), bool)
  distance = np.arange(queries)[:, None] - np.arange(keys)[None]
  segments = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
  padding = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
  mask = {"plain": None, "bias": None, "padded": dict(padding=padding),
          "causal": dict(causal=True), "window": dict(causal=True),
          "cache": dict(causal=True, offset=jnp.int32(2)),
          "packed": dict(segments=jnp.asarray(segments))}[case]
  if case == "padded":
    seen[1, :, 3:] = False
  elif case in ("causal", "window", "cache"):
    seen &= (distance + (2 if case == "cache" else 0)) >= 0
  if case == "window":
    seen, more = seen & (distance < 2), {"window": 2}
  elif case == "packed":
    seen &= segments[:, :, None] == segments[:, None, :]
  bias = rng.normal(size=(1, heads, queries, keys)).astype(np.float32) if case == "bias" else None

  with attention.prefix(*own):
    got = attention.attention(q, k, v, mask and attention.Mask(**mask), bias=bias, **more)
  outside = attention.attention(q, k, v, mask and attention.Mask(**mask), bias=bias, **more)

  k, v = (np.concatenate([np.broadcast_to(part.reshape(LENGTH, groups, size),
                                          (2, LENGTH, groups, size)), a], 1)
          for part, a in zip(own, (k, v), strict=True))
  k, v = (np.repeat(a, heads // groups, axis=2) for a in (k, v))
  scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(size)
  if bias is not None:
    scores[..., LENGTH:] += bias
  seen = np.concatenate([np.ones((2, queries, LENGTH), bool), seen], -1)
  scores = np.where(seen[:, None], scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  want = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert np.abs(np.asarray(outside) - want).max() > 1e-2


def test_a_kernel_that_cannot_serve_it_is_refused():
  q = jnp.zeros((1, 4, 2, 8))
  with attention.prefix(jnp.zeros((LENGTH, 16)), jnp.zeros((LENGTH, 16))):
    with pytest.raises(errors.UserError, match="a prefix needs xla"):
      attention.attention(q, q, q, implementation="cudnn")


def test_shapes_of_the_families():
  cases = {  # width K * D of the keys
    "attention": (*small.a_llama(num_key_value_heads=1), 4),
    "encoder/layer_{}/attention": (*small.a_bert(), 16),
  }
  joined = {"model_type": "phi3", "num_key_value_heads": 2}
  cases["joined"] = (*small.a_llama(**joined), 8)
  for model, _, width in cases.values():
    tuned = small.init("prefix", model, length=LENGTH)
    own = [row for row in tuned.table if row.path.startswith("adapters/")]
    assert [row.shape for row in own] == [(LENGTH, width)] * 4  # keys and values of two layers
  config = bart.Config(vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1,
                       encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                       decoder_ffn_dim=16, max_position_embeddings=16)
  model = small.pretrained(bart, config, {"input_ids": small.ids()})
  assert sorted(prefix.attentions(model.variables)) == [  # not those that look at the encoder
    "decoder/layer_0/self_attn", "encoder/layer_0/self_attn"]


@pytest.mark.parametrize("scanned", [False, True])
def test_an_encoder_trains_it(scanned):
  model, inputs = small.a_bert(scanned)
  tuned = small.init("prefix", model, length=LENGTH)
  assert small.count(tuned) == 2 * 2 * LENGTH * 16 + 16 * 3 + 3
  assert tuned.merge is None
  small.check_training(model, tuned, inputs)


def test_scanned_is_unrolled_and_so_is_the_gradient():
  model, inputs = small.a_llama()
  stacked, _ = small.a_llama(True)
  stacked.variables = tune.unflatten(stacking.stack(tune.flatten(model.variables)))
  one, other = (small.init("prefix", m, length=LENGTH) for m in (model, stacked))
  np.testing.assert_array_equal(  # a layer starts the same
    tune.flatten(one.trainable)["adapters/layer_1/attention/prefix_key"],
    tune.flatten(other.trainable)["adapters/layers/attention/prefix_key"][1])
  trainable = toys.shaken(one.trainable, size=1.0)
  as_stack = tune.unflatten(stacking.stack(tune.flatten(trainable)))

  def both(m, tuned, trainable):
    run = small.apply(m, tuned)
    return jax.jit(jax.value_and_grad(
      lambda t: jnp.sum((run(t, inputs)["logits"] - jnp.arange(30.0)) ** 2)))(trainable)

  (loss, grads), (loss_2, grads_2) = both(model, one, trainable), both(stacked, other, as_stack)
  np.testing.assert_allclose(loss, loss_2, rtol=1e-5)
  apart = stacking.unstack(tune.flatten(grads_2))
  for path, leaf in tune.flatten(grads).items():
    assert np.abs(leaf).max() > 0
    np.testing.assert_allclose(apart[path], leaf, rtol=1e-4, atol=1e-4 * np.abs(leaf).max())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_files_and_function_are_those_of_peft(kind, tmp_path):
  torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
  torch.manual_seed(0)
  if kind == "llama":  # grouped heads
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
      num_key_value_heads=2, intermediate_size=24, max_position_embeddings=24,
      initializer_range=0.3))
  else:
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=24, initializer_range=0.3))
  theirs.eval().save_pretrained(tmp_path)
  wrapped = peft.get_peft_model(theirs, peft.PrefixTuningConfig(
    task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)).eval()
  saved = peft.get_peft_model_state_dict(wrapped)
  tensors = {name: value.detach().numpy() for name, value in saved.items()}
  model = models.load(tmp_path)
  context, given = tune.Context(model), wrapped.peft_config["default"].to_dict()
  tuned = small.init("prefix", model, **prefix.peft_values(given))
  leaves = prefix.peft_leaves(tensors, tuned.settings, context)
  assert {p: a.shape for p, a in leaves.items()} == {r.path: r.shape for r in tuned.table}
  back = prefix.peft_tensors(leaves, tuned.settings, context)
  np.testing.assert_array_equal(back["prompt_embeddings"], tensors["prompt_embeddings"])
  stated = prefix.peft_config(tuned.settings, context)
  for key in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads",
              "num_transformer_submodules", "prefix_projection"):
    assert stated[key] == given[key], key

  _, inputs = small.a_llama()
  trainable = tune.unflatten(leaves)
  logits = small.apply(model, tuned)(trainable, inputs)["logits"]
  with torch.no_grad():
    want = wrapped(**{k: torch.tensor(np.asarray(v)) for k, v in inputs.items()}).logits.numpy()
  real = np.asarray(inputs["attention_mask"]) != 0
  np.testing.assert_allclose(logits[real], want[real], rtol=1e-5, atol=1e-5)

  if kind == "gpt2":  # generation keeps the prefix beside its cache: greedy, as token by token
    ids = inputs["input_ids"][:1]
    made = generate.generate(
      model, {"input_ids": ids}, generate.Settings(max_new_tokens=3, pad_token_id=0),
      variables=tuned.combine(tuned.frozen, trainable), interceptor=tuned.interceptor)
    run = small.apply(model, tuned)
    for _ in range(3):
      ids = jnp.concatenate([ids, run(trainable, {"input_ids": ids})["logits"][:, -1:].argmax(-1)],
                            axis=1)
    np.testing.assert_array_equal(made.tokens, ids[:, -3:])
  with pytest.raises(errors.UserError, match="keys and values of 2 layers"):
    prefix.peft_leaves(tensors, toys.config("prefix", length=7), context)


def test_messages():
  model, inputs = small.a_llama()
  tuned = small.init("prefix", model, length=19)
  with pytest.raises(errors.UserError, match="longer than the context.*24 positions"):
    small.apply(model, tuned)(tuned.trainable, inputs)
  _, variables, _ = toys.make()
  with pytest.raises(errors.UserError, match="(?s)has none.*encoder/layer_0/key"):
    toys.init("prefix", variables)
  encoder, _ = small.a_bert()
  with pytest.raises(errors.UserError, match="drops the prefix of an encoder"):
    prefix.peft_config(toys.config("prefix"), tune.Context(encoder))
