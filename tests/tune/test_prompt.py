"""Prompt tuning: the vectors stand before the text, and nothing else about the model changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tune import small, toys

from ft import errors, models, tune
from ft.models import generate, t5
from ft.tune import prompt

LENGTH = 4
WORDS = (7, 3, 3, 11)


def with_words(inputs, rows=3):
  """The inputs with words before the text, which a prompt that starts at them should equal."""
  before = jnp.broadcast_to(jnp.asarray(WORDS), (rows, LENGTH))
  longer = {"input_ids": jnp.concatenate([before, inputs["input_ids"]], 1)}
  for key, value in (("attention_mask", 1), ("token_type_ids", 0)):
    if key in inputs:
      longer[key] = jnp.concatenate([jnp.full((rows, LENGTH), value), inputs[key]], 1)
  return longer


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("make,path", [(small.a_llama, "embed_tokens"),
                                       (small.a_bert, "embeddings/word")])
def test_a_prompt_of_words_is_those_words(make, path, scanned):
  model, inputs = make(scanned)
  tuned = small.init("prompt", model, length=LENGTH, words=WORDS)
  leaf = f"adapters/{path}/prompt_vectors"
  head = 16 * 3 + 3 if make is small.a_bert else 0
  assert small.count(tuned) == LENGTH * 16 + head
  assert tuned.merge is None
  outputs = small.apply(model, tuned)(tuned.trainable, inputs)
  bare = jax.jit(lambda v, inputs: model.module.apply(v, **inputs))
  want = bare(model.variables, with_words(inputs))
  assert outputs["last_hidden_state"].shape == (3, 6, 16)
  for name, value in want.items():
    value = value[:, LENGTH:] if value.ndim == 3 else value
    np.testing.assert_allclose(outputs[name], value, rtol=1e-5, atol=1e-5, err_msg=name)

  # Moved vectors, and their gradient, are those of a table whose rows are moved.
  trainable = toys.shaken(tuned.trainable)
  table = f"params/{path}/embedding"

  def loss(logits):
    return jnp.sum((logits - jnp.arange(float(logits.shape[-1]))) ** 2)

  def written_out(vectors):
    flat = tune.flatten(model.variables)
    if head:
      flat |= {p: a for p, a in tune.flatten(trainable).items() if p.startswith("params/")}
    flat[table] = jnp.concatenate([flat[table], vectors])
    if not head:  # which scores the words that the model has
      flat["params/lm_head/kernel"] = jnp.pad(flat["params/lm_head/kernel"], ((0, 0), (0, LENGTH)))
    longer = with_words(inputs)
    longer["input_ids"] = longer["input_ids"].at[:, :LENGTH].set(30 + jnp.arange(LENGTH))
    wider = type(model.module)(dataclasses.replace(model.config, vocab_size=30 + LENGTH),
                               model.module.compute)
    logits = wider.apply(tune.unflatten(flat), **longer)["logits"]
    return loss(logits if head else logits[:, LENGTH:, :30])

  run = small.apply(model, tuned)
  got = jax.jit(jax.value_and_grad(lambda t: loss(run(t, inputs)["logits"])))(trainable)
  want = jax.jit(jax.value_and_grad(written_out))(tune.flatten(trainable)[leaf])
  np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
  scale = np.abs(want[1]).max()
  np.testing.assert_allclose(tune.flatten(got[1])[leaf], want[1], rtol=1e-4, atol=1e-4 * scale)


def test_training_moves_the_prompt_and_the_head_only():
  model, inputs = small.a_bert(True)
  small.check_training(model, small.init("prompt", model, length=LENGTH), inputs)


def test_positions_that_are_given_are_moved():
  model, inputs = small.a_llama()
  tuned = small.init("prompt", model, length=LENGTH)
  run = small.apply(model, tuned)
  given = inputs | {"position_ids": jnp.broadcast_to(jnp.arange(6), (3, 6))}
  np.testing.assert_array_equal(run(tuned.trainable, inputs)["logits"],
                                run(tuned.trainable, given)["logits"])


def test_encoder_decoder_has_it_before_the_encoders_text():
  config = t5.Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                     head="lm")
  # As many tokens for the decoder as the encoder reads with its prompt: their logits all stay.
  inputs = {"input_ids": small.ids(), "decoder_input_ids": small.ids(length=6 + LENGTH)}
  model = small.pretrained(t5, config, inputs)
  tuned = small.init("prompt", model, length=LENGTH, words=WORDS)
  outputs = small.apply(model, tuned)(tuned.trainable, inputs)
  want = jax.jit(lambda v, inputs: model.module.apply(v, **inputs))(
    model.variables, with_words(inputs) | {"decoder_input_ids": inputs["decoder_input_ids"]})
  assert outputs["logits"].shape == (3, 6 + LENGTH, 30)
  np.testing.assert_allclose(outputs["logits"], want["logits"], rtol=1e-5, atol=1e-5)
  assert outputs["encoder_last_hidden_state"].shape == (3, 6, 16)


def test_starts():
  model, _ = small.a_llama()
  table = np.asarray(model.variables["params"]["embed_tokens"]["embedding"])
  leaf = "adapters/embed_tokens/prompt_vectors"
  start = lambda **values: np.asarray(  # noqa: E731
    tune.flatten(small.init("prompt", model, **values).trainable)[leaf])
  drawn = start(length=5)
  assert all((row == table).all(1).any() for row in drawn)
  np.testing.assert_array_equal(start(length=5, words=(4, 9)), table[[4, 9, 4, 9, 4]])
  noise = start(length=20, start="noise")
  np.testing.assert_allclose(noise.std(), 0.02, rtol=0.2)


def test_files_are_those_of_peft(tmp_path):
  torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
  torch.manual_seed(0)
  theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24, max_position_embeddings=24,
    initializer_range=0.3)).eval()
  theirs.save_pretrained(tmp_path)
  wrapped = peft.get_peft_model(theirs, peft.PromptTuningConfig(
    task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)).eval()
  saved = peft.get_peft_model_state_dict(wrapped)
  tensors = {name: value.detach().numpy() for name, value in saved.items()}
  model = models.load(tmp_path)
  context = tune.Context(model)
  values = prompt.peft_values(wrapped.peft_config["default"].to_dict())
  assert values == {"length": LENGTH}
  tuned = small.init("prompt", model, **values)
  leaves = prompt.peft_leaves(tensors, tuned.settings, context)
  assert leaves.keys() == tune.flatten(tuned.trainable).keys()
  back = prompt.peft_tensors(leaves, tuned.settings, context)
  np.testing.assert_array_equal(back["prompt_embeddings"], tensors["prompt_embeddings"])
  stated = prompt.peft_config(tuned.settings, context)
  assert stated["token_dim"] == 16 and stated["num_virtual_tokens"] == LENGTH

  _, inputs = small.a_llama()
  logits = small.apply(model, tuned)(tune.unflatten(leaves), inputs)["logits"]
  with torch.no_grad():
    want = wrapped(**{k: torch.tensor(np.asarray(v)) for k, v in inputs.items()}).logits
  real = np.asarray(inputs["attention_mask"]) != 0
  np.testing.assert_allclose(logits[real], want[:, LENGTH:].numpy()[real], rtol=1e-5, atol=1e-5)

  with pytest.raises(errors.UserError, match=r"shape \(4, 16\).*need \(7, 16\)"):
    prompt.peft_leaves(tensors, toys.config("prompt", length=7), context)


def test_messages():
  model, inputs = small.a_llama()
  for length in (24, 19):
    with pytest.raises(errors.UserError, match="prompt longer than the context.*24 positions"):
      tuned = small.init("prompt", model, length=length)
      small.apply(model, tuned)(tuned.trainable, inputs)
  with pytest.raises(errors.UserError, match="30 is no id"):
    small.init("prompt", model, words=(30,))
  tuned = small.init("prompt", model, length=LENGTH)
  run = small.apply(model, tuned)
  with pytest.raises(errors.UserError, match="rows that hold several"):
    run(tuned.trainable, inputs | {"segment_ids": jnp.zeros((3, 6), int)})
  with pytest.raises(errors.UserError, match="these inputs are pixel_values"):
    run(tuned.trainable, {"pixel_values": jnp.zeros((1, 8, 8, 3))})
  with pytest.raises(errors.UserError, match="generation knows of no prompts"):
    generate.generate(model, inputs, generate.Settings(max_new_tokens=2),
                      variables=tuned.combine(tuned.frozen, tuned.trainable),
                      interceptor=tuned.interceptor)
  image, _ = small.a_vit()
  with pytest.raises(errors.UserError, match="act on a word embedding"):
    small.init("prompt", image)
