"""Makes tokenizer.json and its companions of the vocabulary in a GGUF file.

Two kinds of vocabulary are served: "gpt2", byte-level BPE with merges, where the file names how
text is split before (`tokenizer.ggml.pre`), and "llama", SentencePiece BPE with scores and byte
fallback.

Sources: llama.cpp's `llama-vocab.cpp` for what the names of splits mean; the tokenizer.json that
the models they are named after publish; transformers' `gguf_tokenizer_mapping.py`, with which the
tests compare. Where that differs from both others, they are followed: SmolLM and StarCoder split
digits one by one, Llama 3 takes a whole word that is in the vocabulary before it merges, and
SentencePiece puts its prefix space before text that starts with a space too.
"""

import json
from typing import Any

from absl import logging

from ft import errors
from ft.weights.lazy import corrupt

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
_SPACE = "▁"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+",
          r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*")
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = f"{_ENDINGS}|{_LETTERS}|\\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = f"{_ENDINGS}|{_LETTERS}|\\p{{N}}|{_REST}"
_TEKKEN = f"{_CASED[0]}|{_CASED[1]}|\\p{{N}}|{_SLASHED}"
_GPT4O = f"{_CASED[0]}{_ENDINGS}?|{_CASED[1]}{_ENDINGS}?|\\p{{N}}{{1,3}}|{_SLASHED}"
# tokenizer.ggml.pre -> the pattern by which text is split; the other two sets split as GPT-2 does,
# the second after every digit.
_PATTERNS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
_AS_GPT2 = ("gpt-2", "default", "phi-2", "mpt", "olmo", "jais", "trillion", "jina-es", "jina-de",
            "jina-v1-en", "jina-v2-es", "jina-v2-de", "gigachat", "roberta-bpe", "exaone4")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def files(path, fields: dict[str, Any], max_length: int | None = None) -> dict[str, bytes]:
  """Returns {file name: bytes} of the tokenizer in a GGUF file.

  Args:
    path: the file, for errors.
    fields: its key-value pairs.
    max_length: tokens that the model reads.

  Returns:
    tokenizer.json and tokenizer_config.json; without tokenizer.json, and with a line in the log,
    where the file's kind of vocabulary or way of splitting is not known: a guess would tokenize
    wrongly without a word.

  Raises:
    UserError: the vocabulary contradicts itself.
  """
  get = _getter(fields)
  if not get("tokens"):
    logging.warning("%s holds no vocabulary; name a tokenizer of its own", path)
    return {}
  config = _config(path, fields, max_length)
  try:
    tokenizer = _build(path, get, fields.get("general.architecture", ""))
  except (errors.UserError, MemoryError):
    raise
  except Exception as e:  # the tokenizers library raises nothing more special
    raise corrupt(path, f"its vocabulary cannot be read: {e}") from None
  made = {"tokenizer_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
  if tokenizer is None:
    return made
  _add_special(tokenizer, get)
  _add_template(tokenizer, config)
  return {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), **made}


def _getter(fields):
  return lambda key, default=None: fields.get(f"tokenizer.ggml.{key}", default)


def _config(path, fields, max_length) -> dict:
  """Returns what tokenizer_config.json says."""
  get = _getter(fields)
  tokens, sentencepiece = get("tokens"), get("model") == "llama"
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            # As llama.cpp has it for files that do not say.
            "add_bos_token": get("add_bos_token", sentencepiece or get("pre") in _WHOLE_WORDS),
            "add_eos_token": get("add_eos_token", False)}
  for name, key in _IDS.items():
    number = get(f"{key}_token_id")
    if number is not None and not 0 <= number < len(tokens):
      raise corrupt(path, f"its {name} is number {number} of {len(tokens)} tokens")
    if number is not None:
      config[name] = tokens[number]
  if max_length:
    config["model_max_length"] = max_length
  if template := fields.get("tokenizer.chat_template"):
    config["chat_template"] = template
  return config


def _build(path, get, architecture: str):
  """Returns the tokenizer without its special tokens; None where the file's kind is not known."""
  kind, split = get("model"), get("pre", "default")
  if kind == "gpt2":
    if split in ("default", ""):
      logging.warning("%s does not say how it splits text: as GPT-2 does, it is assumed", path)
      split = "default"
    elif split not in (*_PATTERNS, *_AS_GPT2, *_DIGITS):
      logging.warning("%s splits text as %r, which is not known; name a tokenizer", path, split)
      return None
    return _byte_level(path, get, split)
  if kind == "llama":
    return _sentencepiece(path, get, architecture.startswith("gemma"))
  logging.warning("%s has a vocabulary of kind %r, which is not read; name a tokenizer", path, kind)
  return None


def _byte_level(path, get, split: str):
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
  if get("merges") is None:
    raise corrupt(path, "its vocabulary is of BPE and has no merges")
  tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(get("tokens")), merges=_pairs(path, get),
                                   fuse_unk=False, ignore_merges=split in _WHOLE_WORDS))
  plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in _PATTERNS)
  if split in _PATTERNS:
    first = pre_tokenizers.Split(Regex(_PATTERNS[split]), "isolated")
  elif split in _DIGITS:
    first = pre_tokenizers.Digits(individual_digits=True)
  else:
    first = None
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, plain]) if first else plain
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(path, get, gemma: bool):
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
  tokens = get("tokens")
  if gemma:  # its runs of spaces stand in the file as they are written, not as they are looked up
    tokens = [_SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
  vocabulary = _vocabulary(tokens)
  if get("merges") is not None:
    merges = _pairs(path, get)
  else:
    scores = range(0, -len(tokens), -1) if gemma else get("scores") or ()
    if len(scores) != len(tokens):
      raise corrupt(path, f"it has {len(tokens)} tokens and {len(scores)} scores")
    merges = merges_of(vocabulary, dict(zip(tokens, scores, strict=True)))
  unknown = get("unknown_token_id")
  tokenizer = Tokenizer(models.BPE(
      vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True,
      unk_token=None if unknown is None else tokens[unknown]))
  prefix = get("add_space_prefix", not gemma)
  replace = normalizers.Replace(" ", _SPACE)
  tokenizer.normalizer = normalizers.Sequence(
      [normalizers.Prepend(_SPACE), replace]) if prefix else replace
  if gemma:
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
  tokenizer.decoder = decoders.Sequence(
      [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
      + ([decoders.Strip(" ", 1, 0)] if prefix else []))
  return tokenizer


def _vocabulary(tokens) -> dict[str, int]:
  """Returns token -> id; of a token that stands twice, the first."""
  vocabulary = {}
  for number, token in enumerate(tokens):
    vocabulary.setdefault(token, number)
  return vocabulary


def _pairs(path, get) -> list[tuple[str, str]]:
  pairs = [tuple(merge.split(" ")) for merge in get("merges")]
  if any(len(pair) != 2 for pair in pairs):
    raise corrupt(path, "a merge of its vocabulary is not of two tokens")
  return pairs


def merges_of(vocabulary, scores) -> list[tuple[str, str]]:
  """Returns the merges that lead to a SentencePiece vocabulary, best score first.

  Every way to make a token of two others is a merge; of one token's, the longest left part first.
  """
  found = []
  for token, score in scores.items():
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    pairs = [(a, b) for a, b in pairs if a in vocabulary and b in vocabulary]
    pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    found.extend((score, len(a), len(b), a, b) for a, b in pairs)
  found.sort(key=lambda merge: merge[:3], reverse=True)
  return [(a, b) for *_, a, b in found]


def _add_special(tokenizer, get) -> None:
  """Adds what the file marks as control (special) or as user-defined (matched whole in text)."""
  from tokenizers import AddedToken
  kinds = get("token_type") or ()
  for special, wanted in ((True, (_CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
    tokenizer.add_tokens([
        AddedToken(token, special=special, normalized=False)
        for token, kind in zip(get("tokens"), kinds, strict=False)
        if kind in wanted and token and tokenizer.token_to_id(token) is not None])


def _add_template(tokenizer, config) -> None:
  """Makes the tokenizer add the words for begin and end that the file wants."""
  from tokenizers import processors
  begin = config.get("bos_token") if config["add_bos_token"] else None
  end = config.get("eos_token") if config["add_eos_token"] else None
  if not begin and not end:
    return
  single = [begin, "$A", end]
  pair = [*single, *(f"{part}:1" if part else None for part in (begin, "$B", end))]
  tokenizer.post_processor = processors.TemplateProcessing(
      single=[p for p in single if p], pair=[p for p in pair if p],
      special_tokens=[(t, tokenizer.token_to_id(t)) for t in {begin, end} if t])
