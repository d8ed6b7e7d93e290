"""Transcription: losses and texts against transformers, error rates, bad input."""

import json
import types

import jax
import numpy as np
import pytest
from commands import script
from ml_collections import config_dict
from tasks import speech_models

from ft import errors, generation, models, speech, state
from ft.data import audio, loader, transcripts
from ft.tasks import transcribe

pytest.importorskip("soundfile")
pytest.importorskip("jiwer")
RATE, WORDS = speech_models.RATE, speech_models.WORDS
SAID = ("zero", "three and one", "two then two then zero")


def rows():
  """Rows with sounds of unequal length, of which the last has the most to say."""
  rng = np.random.default_rng(0)
  return [{"audio": {"array": speech_models.tone(i, rng, 0.3 + 0.3 * i, RATE).astype(np.float32),
                     "sampling_rate": RATE}, "text": text} for i, text in enumerate(SAID)]


def task(folder, data=None, columns=("audio", "text"), **given):
  config = {key: default for key, (default, *_) in transcribe.KEYS.items()}
  config |= {"max_target": 10} | given
  return transcribe.Task(config_dict.ConfigDict(config),
                         types.SimpleNamespace(columns={c: c for c in columns}),
                         speech_models.preprocess(folder, **(data or {})))


def batch(made, examples, size=4):
  examples = loader.from_examples(examples, made.preprocess)
  return loader.Loader(examples, size, pad=made.preprocess.pad,
                       buckets=made.preprocess.buckets).batch(0)


def ours(made, model):
  """(nats a token of all rows, written ids of each row)."""
  apply = state.make_apply(model.module)
  call = lambda variables, inputs, rng=None: apply(variables, inputs, rng)[0]  # noqa: E731
  whole = batch(made, [made.example(row) for row in rows()])
  total, weight, aux = jax.jit(lambda v, b: made.loss(call, v, b, None))(model.variables, whole)
  assert float(aux["nats_per_token"]) == pytest.approx(float(total), rel=1e-6)
  step = generation.make_step(made, model, lambda frozen, trainable: frozen)
  out = jax.device_get(step({}, {}, model.variables, batch(made, [made.prompt(r) for r in rows()])))
  written = [out["answer"][i][:out["answer_length"][i]] for i in np.argsort(out["index"])[-3:]]
  return float(total) / float(weight), written


def waves():
  return [np.rint(row["audio"]["array"] * 2**15) / np.float32(2**15) for row in rows()]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whisper")
  return folder, speech_models.export_whisper(folder, multilingual=True)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
  folder = tmp_path_factory.mktemp("letters")
  return folder, speech_models.export_letters(folder)


# ---- Against the reference ----


def test_whispers_loss_and_texts_equal_transformers(whisper):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  folder, model = whisper
  made = task(folder, language="en")
  loss, written = ours(made, model)
  net = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
  features = transformers.WhisperFeatureExtractor.from_pretrained(folder)(
    waves(), sampling_rate=RATE, return_tensors="pt")["input_features"]
  start = [WORDS.index(f"<|{name}|>") for name in ("startoftranscript", "en", "transcribe",
                                                   "notimestamps")]
  end = WORDS.index("<|endoftext|>")
  said = [[*map(WORDS.index, text.split()), end] for text in SAID]
  width = max(map(len, said))
  read = [[*start, *row[:-1], *[end] * (width - len(row))] for row in said]
  due = [[-100] * 3 + row + [-100] * (width - len(row)) for row in said]
  with torch.no_grad():
    want = net.eval()(input_features=features, decoder_input_ids=torch.tensor(read),
                      labels=torch.tensor(due)).loss.item()
    texts = transformers.GenerationMixin.generate(
      net, features, decoder_input_ids=torch.tensor([start] * 3), do_sample=False, num_beams=1,
      suppress_tokens=net.generation_config.suppress_tokens, max_new_tokens=10)
  assert loss == pytest.approx(want, abs=1e-4)
  for ids, row in zip(written, texts.tolist(), strict=True):
    assert [i for i in ids if i != end] == [i for i in row[len(start):] if i != end]


@pytest.mark.parametrize("masked", [True, False])
def test_ctc_loss_and_letters_equal_transformers(masked, tmp_path):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  model = speech_models.export_letters(tmp_path, masked)
  made = task(tmp_path, max_target=24)
  loss, written = ours(made, model)
  net = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path, dtype=torch.float32).eval()
  net.config.ctc_loss_reduction = "sum"
  extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
  tokens = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
  total, count, seen = 0.0, 0, False
  for sound, text, ids in zip(waves(), SAID, written, strict=True):
    # Without a mask, what stands behind a sound changes what is heard of it: as the batch has it.
    size = len(sound) if masked else made.preprocess.buckets[0]
    values = extractor(sound, sampling_rate=RATE, return_tensors="pt")["input_values"]
    values = torch.nn.functional.pad(values, (0, size - len(sound)))
    labels = [speech_models.LETTERS.index(x) if x in speech_models.LETTERS
              else speech_models.LETTERS.index("<unk>") for x in text.upper().replace(" ", "|")]
    with torch.no_grad():
      logits = net(values).logits[0]
    logits = logits[:model.config.frames(len(sound))]
    total += torch.nn.functional.ctc_loss(
      logits.log_softmax(-1)[:, None], torch.tensor([labels]), [len(logits)], [len(labels)],
      blank=0, reduction="sum").item()
    count += len(labels)
    said = tokens.decode(logits.argmax(-1).tolist(), skip_special_tokens=True)
    assert made.decode(ids) == " ".join(said.split())
    seen |= bool(said)
  assert loss == pytest.approx(total / count, abs=1e-4) and seen
  if masked:
    beams = ours(task(tmp_path, max_target=24, num_beams=3), model)[1]
    assert len(beams) == len(written)


def test_normalisers_are_those_of_transformers():
  reference = pytest.importorskip("transformers.models.whisper.english_normalizer")
  english, basic = reference.EnglishTextNormalizer({}), reference.BasicTextNormalizer()
  for text in ("Um, I won't [cough] go -- Mr. Brown's CAFÉ (the old) can't; y'all'd been there!",
               "It was the best of times, it was the worst of times.", "naïve Œuvre & Straße, uh…",
               "we've gone to St. James, haven't we?", "She 's got mail. <noise>", "hmm", ""):
    assert speech.normaliser("english")(text) == english(text).strip()
    assert speech.normaliser("basic")(text) == basic(text).strip()
  assert speech.normaliser("english")("It cost $5.20, or 1,000 yen. 20%!") == (
    "it cost $5.20 or 1000 yen 20%")
  assert speech.normaliser("none")("  As It\tis. ") == "As It is."
  assert speech.normaliser("english", True)("7, 7.5 17 and 0.") == (
    "seven 7.5 17 and zero")


def test_error_rates_are_jiwers():
  import jiwer

  said = ["It was the best of times", "it was the worst.", "seven", "Age of wisdom", "[noise]"]
  written = ["it was best of the time", "It was the worst", "7", "", "so it is"]
  measures = speech.Measures("english", spell_digits=True)
  found = measures.values(measures.statistics(said, written))
  told = [[measures.normalise(text) for text in part[:4]] for part in (said, written)]
  out = jiwer.process_words(*told)
  words = sum(len(text.split()) for text in told[0])
  assert found["wer"] == pytest.approx(jiwer.wer(*told) + 3 / words)  # three, where none was said
  assert found["word_deletions"] == pytest.approx(out.deletions / words)
  assert measures.value("cer", measures.statistics(said[:4], written[:4])) == pytest.approx(
    jiwer.cer(*told))
  assert "jiwer" in measures.signatures()["wer"]
  assert np.isnan(measures.value("wer", measures.statistics([""], [""])))


# ---- Texts ----


def test_texts_with_times(whisper):
  folder, _ = whisper
  made = task(folder, language="de", output="translate", timestamps=True)
  name = WORDS.index
  first = name("<|notimestamps|>") + 1
  assert made.words.layout.prompt == tuple(
    name(f"<|{x}|>") for x in ("startoftranscript", "de", "translate"))
  ids = made.words.encode("<|0.10|>two and<|0.42|><|0.50|> three<|0.98|>", 1.0)
  assert ids == [first + 5, name("two"), name("and"), first + 21, first + 25, name("three"),
                 first + 49, name("<|endoftext|>")]
  parts = [{"start": pytest.approx(0.1), "end": pytest.approx(0.42), "text": "two and"},
           {"start": pytest.approx(0.5), "end": pytest.approx(0.98), "text": "three"}]
  answer = made.describe({"answer": np.array(ids), "answer_length": len(ids)}, {})
  assert answer == {"text": "two and three", "segments": parts}
  whole = made.joined([{"start": 0.0}, {"start": 29.5}], [answer, answer])
  assert [part["start"] for part in whole["segments"]] == [0.1, 0.5, 29.6, 30.0]
  assert made.words.encode("two", 0.74) == [first, name("two"), first + 37, name("<|endoftext|>")]
  plain = task(folder, language="en")
  assert plain.words.encode("<|0.10|>two<|0.42|>", 1.0) == [name("two"), name("<|endoftext|>")]


def test_letters_of_texts(letters):
  made = transcripts.Letters({"<pad>": 0, "|": 1, "a": 2, "b": 3, "'": 4}, blank=0)
  assert made.encode("A  bA'b.") == [2, 1, 3, 2, 4, 3]
  assert made.decode([1, 2, 1, 1, 3, 0]) == "a b"
  with pytest.raises(errors.RowError, match="no letter 'c'"):
    made.encode("cab")
  assert transcripts.needed_frames([2, 2, 3, 3, 3]) == 8
  assert task(letters[0], spell_digits=True).example(
    {**rows()[2], "text": "0"})["labels"].tolist()[:5] == [
      speech_models.LETTERS.index(x) for x in "ZERO"] + [-1]


def test_long_sounds_are_read_in_parts(whisper):
  made = task(whisper[0], language="en")
  rng = np.random.default_rng(0)
  sound = np.rint(rng.normal(size=int(2.6 * RATE)) * 3000).astype(np.int16)
  parts = made.parts({"audio": {"array": sound, "sampling_rate": RATE}})
  assert len(parts) >= 3 and parts[0]["start"] == 0
  assert np.array_equal(np.concatenate([part["audio"]["array"] for part in parts]), sound)
  assert all(len(made.prompt(part)["audio"]) <= RATE for part in parts)
  assert made.preprocess.counts["cut"] == 0
  assert made.joined(parts, [{"text": "a"}, {"text": ""}, {"text": "b"}]) == {"text": "a b"}


# ---- Bad input ----


@pytest.mark.parametrize("change, said", [
  ({"text": " "}, "no text"), ({"text": "two " * 20}, "more than task.max_target=10"),
  ({"audio": {"array": np.zeros(2 * RATE, np.int16), "sampling_rate": RATE}},
   "2.0 s, and clips have 1.0 s"),
  ({"audio": {"array": np.zeros(0, np.int16), "sampling_rate": RATE}}, "zero length"),
])
def test_rows_that_cannot_be_used(whisper, change, said):
  with pytest.raises(errors.RowError, match=said):
    task(whisper[0], language="en").example({**rows()[0], **change})


def test_rows_that_letters_cannot_be_made_of(letters):
  made = task(letters[0], max_target=64)
  short = {"array": np.ones(1000, np.int16), "sampling_rate": RATE}
  with pytest.raises(errors.RowError, match="too short for its 9 letters"):
    made.example({"audio": short, "text": "one three"})
  with pytest.raises(errors.RowError, match="too short for the model"):
    made.prompt({"audio": {"array": np.ones(9, np.int16), "sampling_rate": RATE}})


@pytest.mark.parametrize("given, said", [
  ({"columns": ("audio",)}, "needs text"), ({"columns": ("text",)}, "needs audio"),
  ({}, "several languages"), ({"language": "fr"}, "several languages"),
  ({"language": "en", "max_target": 21}, "room for 20"),
  ({"language": "en", "generate_rows": 0}, "writes none"),
])
def test_keys_that_do_not_fit_whisper(whisper, given, said):
  with pytest.raises(errors.UserError, match=said):
    task(whisper[0], **given)


def test_keys_that_do_not_fit_other_models(letters, tmp_path):
  for given, said in (({"language": "en"}, "are Whisper's"),
                      ({"label_smoothing": 0.1}, "CTC loss")):
    with pytest.raises(errors.UserError, match=said):
      task(letters[0], **given)
  speech_models.export_whisper(tmp_path)
  with pytest.raises(errors.UserError, match="writes English"):
    task(tmp_path, language="de")
  assert len(task(tmp_path).words.layout.prompt) == 2
  (tmp_path / "tokenizer.json").unlink()
  with pytest.raises(errors.UserError, match="no tokenizer.json"):
    task(tmp_path)


# ---- A real model ----


@pytest.mark.slow
def test_two_cities_through_predict(shared, tmp_path):
  """A recording of 44 s, in two parts: what transformers hears, which seeks by times instead."""
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  source = shared / "weights/whisper-tiny.en"
  clip = shared / "data/speech-clips/two_cities.wav"
  info = models.inspect(str(source))
  config = {key: default for key, (default, *_) in audio.KEYS.items()}
  made = audio.Preprocess(types.SimpleNamespace(**config), info)
  config = {key: default for key, (default, *_) in transcribe.KEYS.items()}
  config = config_dict.ConfigDict(config | {"max_target": 224})
  columns = types.SimpleNamespace(columns={"audio": "audio", "text": "text"})
  own = transcribe.Task(config, columns, made)
  pretrained = models.load(str(source), head="lm")
  spec = {"modality": "audio", "preprocess": made.spec(), "calibration": {},
          "task": {"name": "transcribe", **own.spec()}}
  pretrained.files["ft.json"] = json.dumps(spec).encode()
  models.export(pretrained, tmp_path / "model")
  script("predict", f"--run={tmp_path}", f"--input={clip}", "--batch=2",
         f"--output={tmp_path / 'out.jsonl'}")
  text = json.loads((tmp_path / "out.jsonl").read_text())["text"]

  net = transformers.WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
  net.generation_config = transformers.GenerationConfig(
    decoder_start_token_id=50257, eos_token_id=50256, pad_token_id=50256, max_length=448,
    is_multilingual=False, no_timestamps_token_id=50362, begin_suppress_tokens=[220, 50256])
  features = transformers.WhisperFeatureExtractor()(
    made.sound({"audio": clip}) / np.float32(2**15), sampling_rate=RATE, return_tensors="pt",
    truncation=False, padding="longest", return_attention_mask=True)
  ids = net.generate(features["input_features"], attention_mask=features["attention_mask"],
                     return_timestamps=True, do_sample=False, num_beams=1)[0].tolist()
  assert text == own.decode([i for i in ids if i < 50256])
  assert text.startswith("It was the best of times, it was the worst of times")
