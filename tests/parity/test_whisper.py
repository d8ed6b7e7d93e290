"""Whisper against transformers, float32: random tiny models, and what whisper-tiny.en hears."""

import functools
import json
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import errors, models
from ft.models import audio, whisper

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 61, "num_mel_bins": 7, "d_model": 24, "encoder_layers": 2,
         "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 3,
         "encoder_ffn_dim": 37, "decoder_ffn_dim": 29, "max_source_positions": 11,
         "max_target_positions": 17, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 3, "init_std": 0.2, "begin_suppress_tokens": [4, 2]}
OTHER = {**SMALL, "num_mel_bins": 10, "d_model": 30, "encoder_layers": 1, "decoder_layers": 3,
         "encoder_attention_heads": 2, "decoder_attention_heads": 5, "activation_function": "relu",
         "max_source_positions": 8, "scale_embedding": True}
LOGITS = {"logits": "logits", "encoder_last_hidden_state": "encoder_last_hidden_state"}


def build(cls, values, **extra):
  torch.manual_seed(0)
  config = transformers.WhisperConfig(**values, **extra)
  return harness.randomise(getattr(transformers, cls)(config))


def batch(values, length=13, left=False):
  """Random spectrograms, and tokens without the padding's id, whose vector torch does not train."""
  rng = np.random.default_rng(3)
  shape = (3, values["num_mel_bins"], 2 * values["max_source_positions"])
  text = harness.tokens(values["vocab_size"], length=length, left=left)
  return {"input_features": rng.normal(size=shape).astype(np.float32),
          "decoder_input_ids": np.where(text["attention_mask"], text["input_ids"], 2),
          "decoder_attention_mask": text["attention_mask"]}


def real(inputs):
  return {"logits": inputs["decoder_attention_mask"],
          "last_hidden_state": inputs["decoder_attention_mask"]}


def test_transcriber(tmp_path):
  inputs = batch(SMALL)
  pretrained = harness.check(
      "whisper", "lm, tied, gelu, padded right", build("WhisperForConditionalGeneration", SMALL),
      inputs, LOGITS, tmp_path, real=real(inputs))
  assert pretrained.config.head == "lm" and pretrained.modality == "audio"
  harness.check_scan(pretrained, inputs, tmp_path)


def test_other_sizes_and_untied(tmp_path):
  inputs = batch(OTHER, length=10, left=True)
  harness.check("whisper", "lm, untied, relu, 10 mel bins, padded left",
                build("WhisperForConditionalGeneration", OTHER, tie_word_embeddings=False), inputs,
                LOGITS, tmp_path, real=real(inputs))


@pytest.mark.slow
def test_body(tmp_path):
  inputs = batch(OTHER)
  outputs = {name: name for name in ("last_hidden_state", "encoder_last_hidden_state")}
  harness.check("whisper", "body", build("WhisperModel", OTHER), inputs, outputs, tmp_path,
                real=real(inputs))


@pytest.mark.parametrize("weighted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_classifier(weighted, tmp_path):
  inputs = {"input_features": batch(SMALL)["input_features"]}
  model = build("WhisperForAudioClassification", SMALL, use_weighted_layer_sum=weighted,
                classifier_proj_size=9, num_labels=4)
  pretrained = harness.check(
      "whisper", f"classify{', weighted sum of layers' if weighted else ''}", model, inputs,
      {"logits": "logits"}, tmp_path)
  assert pretrained.config.num_labels == 4
  if weighted:
    harness.check_scan(pretrained, inputs, tmp_path)
  outputs = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)
  assert outputs["features"].shape == (3, 9)
  again = pretrained.module.apply(pretrained.variables, outputs["features"], method="head")
  assert harness.difference(again, outputs["logits"]) < 1e-6


def test_a_transcriber_becomes_a_classifier(tmp_path):
  build("WhisperForConditionalGeneration", SMALL).save_pretrained(tmp_path / "upstream")
  pretrained = models.load(str(tmp_path / "upstream"), labels=("no", "yes", "stop"))
  assert pretrained.config.head == "classify"
  assert all(path.startswith(("params/projector", "params/classifier"))
             for path in pretrained.report.initialised)
  assert all("decoder" in name for name in pretrained.report.ignored)
  models.export(pretrained, tmp_path / "out")
  inputs = {"input_features": batch(SMALL)["input_features"]}
  model, info = transformers.WhisperForAudioClassification.from_pretrained(
      tmp_path / "out", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  want = model.eval()(**harness.as_torch(inputs)).logits
  got = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)["logits"]
  assert harness.difference(got, want.detach()) <= harness.TOLERANCE


def test_names_of_older_files(tmp_path):
  """Files of old hold the tied output matrix, too; bodies are read from files with a head."""
  from safetensors.numpy import load_file, save_file
  model = build("WhisperForConditionalGeneration", SMALL)
  model.save_pretrained(tmp_path)
  tensors = load_file(tmp_path / "model.safetensors")
  tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"].copy()
  save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
  models.export(models.load(str(tmp_path)), tmp_path / "out")
  harness.same_tensors(tmp_path, tmp_path / "out")
  body = models.load(str(tmp_path), head="none")
  assert body.report.ignored == ["proj_out.weight"] and not body.report.initialised
  models.export(body, tmp_path / "body")
  _, info = transformers.WhisperModel.from_pretrained(tmp_path / "body", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]


def test_vocabulary_and_depth(tmp_path):
  build("WhisperForConditionalGeneration", SMALL).save_pretrained(tmp_path / "upstream")
  inputs = batch(SMALL)
  grown = models.load(str(tmp_path / "upstream"), changes={"vocab_size": 70, "depth": 1})
  assert len(grown.report.changed) == 2 and grown.config.decoder_layers == 1
  models.export(grown, tmp_path / "out")
  model = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
  want = model(**harness.as_torch(inputs)).logits.detach().numpy()
  got = jax.jit(grown.module.apply)(grown.variables, **inputs)["logits"]
  seen = inputs["decoder_attention_mask"][..., None]
  assert harness.difference(got * seen, want * seen) <= harness.TOLERANCE


def empty_cache(pretrained, encoded, slots):
  """Returns the cache's variables, zeros, for rows as in `encoded` and so many tokens."""
  ids = jnp.zeros((encoded.shape[0], slots), jnp.int32)
  make = functools.partial(pretrained.module.apply, pretrained.variables, cache_index=0,
                           encoder_hidden_states=encoded, mutable=["cache"], method="decode")
  shapes = jax.eval_shape(make, ids)[1]
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_with_a_cache_equal_one_pass(scan, tmp_path):
  build("WhisperForConditionalGeneration", SMALL).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), compute=models.layers.Compute(scan=scan))
  inputs = batch(SMALL, length=9, left=True)
  ids, mask = inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
  apply = functools.partial(pretrained.module.apply, method="decode", mutable=["cache"])
  encoded = jnp.asarray(np.random.default_rng(5).normal(size=(3, 11, 24)), jnp.float32)
  positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
  whole = jax.jit(functools.partial(pretrained.module.apply, method="decode"))
  want = whole(pretrained.variables, ids, encoded, position_ids=positions,
               decoder_attention_mask=mask)["logits"]
  slots = np.concatenate([mask, np.ones((3, 3), np.int32)], axis=1)
  cache = empty_cache(pretrained, encoded, slots.shape[1])
  step = jax.jit(lambda cache, tokens, index, position, *source: apply(
      {**pretrained.variables, **cache}, tokens, *source, decoder_attention_mask=slots,
      cache_index=index, position_ids=position))
  out, cache = step(cache, ids[:, :7], 0, positions[:, :7], encoded)
  parts = [out["logits"]]
  for i in (7, 8):
    out, cache = step(cache, ids[:, i:i + 1], i, positions[:, i:i + 1])
    parts.append(out["logits"])
  seen = mask[..., None]
  assert harness.difference(np.concatenate(parts, 1) * seen, want * seen) <= 1e-5


def test_dropout_acts_with_a_key_only(tmp_path):
  build("WhisperForConditionalGeneration", SMALL).save_pretrained(tmp_path)
  pretrained = models.load(str(tmp_path), dropout=0.5)
  run = functools.partial(jax.jit(pretrained.module.apply), pretrained.variables, **batch(SMALL))
  assert np.array_equal(run()["logits"], run()["logits"])
  first, second = (run(rngs={"dropout": jax.random.key(i)})["logits"] for i in (0, 1))
  assert not np.array_equal(first, second)


@pytest.mark.parametrize("wrong", [{"activation_function": "sine"}, {"d_model": 25},
                                   {"is_encoder_decoder": False}])
def test_what_is_not_computed_is_refused(wrong):
  with pytest.raises(errors.UserError):
    whisper.Config.from_hf({"model_type": "whisper", **SMALL, **wrong})


@pytest.mark.parametrize("change", [{"input_features": np.zeros((1, 7, 24), np.float32)},
                                    {"input_features": np.zeros((1, 8, 22), np.float32)},
                                    {"decoder_input_ids": np.zeros((1, 18), np.int32)}])
def test_inputs_that_do_not_fit_are_refused(change):
  config = whisper.Config.from_hf({"model_type": "whisper", **SMALL, "architectures": [
      "WhisperForConditionalGeneration"]})
  model = whisper.Model(config)
  inputs = {"input_features": np.zeros((1, 7, 22), np.float32),
            "decoder_input_ids": np.zeros((1, 4), np.int32)}
  jax.eval_shape(model.init, jax.random.key(0), **inputs)
  with pytest.raises(errors.UserError):
    jax.eval_shape(model.init, jax.random.key(0), **{**inputs, **change})


def clip(shared):
  """Returns the first 30 seconds of a recording of 48 kHz, (1, N) float32 at 16 kHz."""
  with wave.open(str(shared / "data/speech-clips/two_cities.wav")) as file:
    assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 48000)
    data = np.frombuffer(file.readframes(30 * 48000), np.int16)
  data = data.reshape(-1, 3).mean(1).astype(np.float32) / 2**15
  return audio.clips([data], audio.LogMel().samples)[0]


def greedy(pretrained, features, rules, most):
  """Returns the tokens of greedy search, ended by the end token; one jitted step a token."""
  apply = functools.partial(pretrained.module.apply, method="decode", mutable=["cache"])
  prompt = [pretrained.config.decoder_start_token_id, *(i for _, i in rules["forced_decoder_ids"])]
  banned = np.zeros(pretrained.config.vocab_size, bool)
  banned[rules["suppress_tokens"]] = True
  first = banned.copy()
  first[rules["begin_suppress_tokens"]] = True
  encoded = jax.jit(functools.partial(pretrained.module.apply, method="encode"))(
      pretrained.variables, features)["encoder_last_hidden_state"]

  @jax.jit
  def step(variables, cache, tokens, index, banned, *source):
    out, cache = apply({**variables, **cache}, tokens, *source, cache_index=index)
    return jnp.where(banned, -jnp.inf, out["logits"][0, -1]).argmax(), cache

  token, cache = step(pretrained.variables, empty_cache(pretrained, encoded, most),
                      jnp.array([prompt]), 0, first, encoded)
  tokens = prompt + [int(token)]
  while tokens[-1] != rules["eos_token_id"] and len(tokens) < most:
    token, cache = step(pretrained.variables, cache, token[None, None], len(tokens) - 1, banned)
    tokens.append(int(token))
  return tokens


# The parts of the model's generation_config.json that greedy search reads; symbols and notes that
# no speech sounds like are never written.
GENERATION = {
    "decoder_start_token_id": 50257, "eos_token_id": 50256, "pad_token_id": 50256,
    "bos_token_id": 50257, "max_length": 448, "is_multilingual": False,
    "no_timestamps_token_id": 50362, "forced_decoder_ids": [[1, 50362]],
    "begin_suppress_tokens": [220, 50256],
    "suppress_tokens": [1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29, 31, 58, 59, 60, 61, 62, 63, 90,
                        91, 92, 93, 357, 366, 438, 532, 685, 705, 796, 930, 50257, 50357, 50358,
                        50359, 50360, 50361]}


@pytest.fixture(scope="module")
def tiny_en(shared, tmp_path_factory):
  """The folder of whisper-tiny.en with a generation_config.json, and transformers' model."""
  folder = tmp_path_factory.mktemp("whisper-tiny.en")
  for file in (shared / "weights/whisper-tiny.en").iterdir():
    (folder / file.name).symlink_to(file)
  (folder / "generation_config.json").write_text(json.dumps(GENERATION))
  model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
  return folder, model.eval()


def test_tiny_en_transcribes_as_transformers(shared, tiny_en, tmp_path):
  from tokenizers import Tokenizer
  folder, model = tiny_en
  pretrained = models.load(str(folder))
  models.export(pretrained, tmp_path / "out")
  harness.same_tensors(folder, tmp_path / "out")
  features = jax.jit(audio.LogMel())(clip(shared))
  rules = json.loads(pretrained.files["generation_config.json"])
  got = greedy(pretrained, features, rules, 128)
  with torch.no_grad():
    want = model.generate(torch.tensor(np.asarray(features)), do_sample=False, num_beams=1)
  want = want[0].tolist()
  special = range(50256, 51864)
  got, want = ([i for i in tokens if i not in special] for tokens in (got, want))
  assert got == want
  text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(got)
  assert text.strip().startswith("It was the best of times, it was the worst of times")


@pytest.mark.slow
def test_tiny_en_equals_transformers(shared, tiny_en, tmp_path):
  """Outputs, and gradients of the loss that tuning uses: cross-entropy of what is said.

  The gradients are compared with transformers' in float64, its own in float32 being off by 5e-3
  where the model is sure of a word and the loss hardly depends on it. They are compiled as they are
  in use: what XLA leaves unoptimised sums in another order, which costs a digit here.
  """
  jax.config.update("jax_disable_most_optimizations", False)
  from tokenizers import Tokenizer
  folder, model = tiny_en
  said = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(
      " It was the best of times, it was the worst of times", add_special_tokens=False).ids
  inputs = {"input_features": np.asarray(jax.jit(audio.LogMel())(clip(shared))),
            "decoder_input_ids": np.array([[50257, 50362, *said]], np.int32)}
  labels = np.array([*said, 50256])
  pretrained = harness.check("whisper", "whisper-tiny.en", model, inputs, LOGITS, tmp_path,
                             gradients=False, table=False)
  exact = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
  # Fixed by the model's class, which from_pretrained forgets.
  exact.model.encoder.embed_positions.weight.requires_grad_(False)
  given = harness.as_torch(inputs)
  logits = exact(**{**given, "input_features": given["input_features"].double()}).logits
  torch.nn.functional.cross_entropy(logits[0, 1:], torch.tensor(labels)).backward()

  def loss(variables):
    scores = pretrained.module.apply(variables, **inputs)["logits"][0, 1:]
    return -jax.nn.log_softmax(scores)[np.arange(len(labels)), labels].mean()

  worst = harness.compare_gradients(exact, pretrained, loss, ("whisper", "whisper-tiny.en"))
  outputs = jax.jit(pretrained.module.apply)(pretrained.variables, **inputs)
  harness.ROWS.append(("whisper", "whisper-tiny.en (real weights), cross-entropy",
                       harness.difference(outputs["logits"], logits.detach()), worst))
