"""Tiny random models of speech in Hugging Face folders, and spoken digits made of tones."""

import json
import types

import jax
import numpy as np
import tokenizers

from ft import models
from ft.data import audio
from ft.models import wav2vec2, whisper
from ft.weights import names

RATE, BINS = 16000, 8
DIGITS = ("zero", "one", "two", "three")
MARKS = ("<|endoftext|>", "<|startoftranscript|>", "<|de|>", "<|en|>", "<|transcribe|>",
         "<|translate|>", "<|notimestamps|>")
WORDS = ("<unk>", *DIGITS, "and", "then", *MARKS)
TIMES = 51  # marks of 0.00 to 1.00 s
LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"EFHNORTUVWZ")
NOISY = 8000  # samples a second of the files


def tone(digit: int, rng, seconds: float = 0.4, rate: int = NOISY, pitch: float = 1.0):
  """A digit as a tone of its own, (N,) float64."""
  time = np.arange(round(seconds * rate)) / rate
  return 0.4 * np.sin(2 * np.pi * 300 * (digit + 1) * pitch * time) + 0.01 * rng.normal(
    size=len(time))


def write(folder, speakers=("ann", "bob", "cy", "dee", "eve"), takes: int = 3):
  """Writes DIGIT_SPEAKER_TAKE.wav, and returns the folder."""
  import soundfile

  rng = np.random.default_rng(0)
  folder.mkdir()
  for place, speaker in enumerate(speakers):
    for digit in range(len(DIGITS)):
      for take in range(takes):
        sound = tone(digit, rng, 0.4 + 0.02 * take, pitch=1 + 0.02 * place)
        soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", sound, NOISY)
  return folder


def tokenizer() -> bytes:
  """A tokenizer.json of words and Whisper's marks."""
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
    {w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(list(MARKS))
  return made.to_str().encode()


def export_whisper(folder, multilingual: bool = False, seconds: int = 1):
  """Writes a random Whisper of one-second clips and returns it as loaded from there."""
  number = WORDS.index
  config = whisper.Config(
    vocab_size=len(WORDS) + TIMES, num_mel_bins=BINS, d_model=16, encoder_layers=1,
    decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
    decoder_ffn_dim=24, max_source_positions=50 * seconds, max_target_positions=24, init_std=0.4,
    decoder_start_token_id=number("<|startoftranscript|>"), pad_token_id=number("<|endoftext|>"),
    eos_token_id=number("<|endoftext|>"), bos_token_id=number("<|endoftext|>"),
    classifier_proj_size=8, head="lm", model_type="whisper")
  stated = {"is_multilingual": multilingual, "no_timestamps_token_id": number("<|notimestamps|>"),
            "decoder_start_token_id": config.decoder_start_token_id,
            "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id,
            "suppress_tokens": [number(mark) for mark in MARKS[1:]]}
  if multilingual:
    stated |= {"lang_to_id": {f"<|{x}|>": number(f"<|{x}|>") for x in ("de", "en")},
               "task_to_id": {x: number(f"<|{x}|>") for x in ("transcribe", "translate")}}
  files = {"generation_config.json": stated, "preprocessor_config.json": {
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": BINS,
    "chunk_length": seconds, "sampling_rate": RATE, "hop_length": 160, "n_fft": 400}}
  return _export(folder, "whisper", config, files, {"tokenizer.json": tokenizer()})


def export_letters(folder, masked: bool = True):
  """Writes a random wav2vec2 with a CTC head and returns it as loaded from there."""
  config = wav2vec2.Config(
    vocab_size=len(LETTERS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=24, conv_dim=(8, 8, 8), conv_stride=(10, 8, 4), conv_kernel=(16, 8, 4),
    num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, initializer_range=0.4,
    feat_extract_norm="layer" if masked else "group", do_stable_layer_norm=masked,
    conv_bias=masked, classifier_proj_size=8, final_dropout=0.0, hidden_dropout=0.0,
    activation_dropout=0.0, attention_dropout=0.0, head="ctc", model_type="wav2vec2")
  vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
  files = {"vocab.json": vocabulary, "tokenizer_config.json": {
    "pad_token": "<pad>", "unk_token": "<unk>", "word_delimiter_token": "|"},
           "preprocessor_config.json": {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "do_normalize": True,
    "sampling_rate": RATE, "padding_value": 0.0, "return_attention_mask": masked}}
  return _export(folder, "wav2vec2", config, files, {})


def _export(folder, family, config, stated, files):
  module = models.family_module(family)
  made = module.Model(config)
  variables = made.init(jax.random.PRNGKey(3), **module.probe_inputs(config))
  files = files | {name: json.dumps(values).encode() for name, values in stated.items()}
  models.export(models.Pretrained(family, made, variables, names.Report(), files, config, "audio",
                                  ()), folder)
  return models.load(str(folder), head=config.head)


def preprocess(folder, **given):
  """The preprocessing of a model in a folder."""
  config = {key: default for key, (default, *_) in audio.KEYS.items()} | given
  return audio.Preprocess(types.SimpleNamespace(**config), models.inspect(str(folder)))
