"""SentencePiece models as tokenizers, for checkpoints that have no tokenizer.json.

The sentencepiece library's schema reads the file; the tokenizers library computes what it says, so
that truncation, offsets and special tokens are those of every other tokenizer. Two layouts:

  spiece.model, tokenizer.model, …   one model whose pieces are numbered as in the file (T5, Llama)
  source.spm, target.spm, vocab.json two models, of one language each, whose pieces are numbered by
                                     vocab.json (Marian); a single model beside a vocab.json too
                                     (M2M100)

Where vocab.json lacks a piece, text is made of the pieces there are: transformers takes the unknown
token there. Letters that only the other language has are themselves, as in transformers, which
takes several in a row as unknown.

Sources: Kudo and Richardson 2018, arXiv:1808.06226; sentencepiece_model.proto. Tests compare with
the library's own processor.
"""

import json
import pathlib
from typing import NamedTuple

from ft import errors
from ft.weights import gguf_tokenizer

SINGLE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model",
          "sentencepiece.model")
PAIR = ("source.spm", "target.spm")
_UNIGRAM, _BPE = 1, 2  # trainer_spec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # pieces.type
_SPACE = "▁"
# Stands before tokens that no text is made of, such as the other language's; not a character.
_APART = "\ufdd0"
_ENDED = ("t5", "mt5", "umt5", "marian", "m2m_100", "pegasus", "bigbird_pegasus")  # by </s>
_RENUMBERED = ("mbart", "xlm-roberta", "xlm-roberta-xl", "camembert")  # not as in the file


class Read(NamedTuple):
  """The tokenizer of source texts, and that of targets; None where they share one."""

  tokenizer: object
  target: object


def find(folder: pathlib.Path) -> bool:
  """Returns whether a folder holds SentencePiece models."""
  return any((folder / name).is_file() for name in (*SINGLE, *PAIR))


def read(folder: pathlib.Path, settings: dict, family: str) -> Read:
  """Returns the tokenizers of a folder; see the module.

  Args:
    folder: where `find` is true.
    settings: tokenizer_config.json and special_tokens_map.json.
    family: config.json's model_type, which says what is set around a text.

  Raises:
    UserError: the library is missing, a file is, or it cannot be read.
  """
  file = folder / "vocab.json"
  numbers = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
  single = next((folder / name for name in SINGLE if (folder / name).is_file()), None)
  if single and family in _RENUMBERED:
    raise errors.UserError(
      f"{folder}: {family} numbers the pieces of {single.name} anew; write tokenizer.json there "
      "with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)")
  if single:
    return Read(_build(single, numbers, settings, family), None)
  missing = [name for name in (*PAIR, "vocab.json") if not (folder / name).is_file()]
  if missing:
    raise errors.UserError(f"{folder}: {' and '.join(missing)} missing beside its other "
                           "SentencePiece files")
  return Read(*(_build(folder / name, numbers, settings, family) for name in PAIR))


def _build(path: pathlib.Path, numbers: dict | None, settings: dict, family: str):
  """Returns the tokenizers.Tokenizer of one file."""
  from tokenizers import AddedToken, Tokenizer

  proto = _parse(path)
  known = {piece.piece: piece for piece in proto.pieces}
  numbers = numbers or {piece.piece: number for number, piece in enumerate(proto.pieces)}
  special = _special(known, numbers, settings, family)
  tokenizer = Tokenizer(_model(path, proto.trainer_spec, known, numbers, special))
  _set_steps(tokenizer, proto.trainer_spec, proto.normalizer_spec)
  tokenizer.add_special_tokens(
    [AddedToken(token, special=True, normalized=False) for token in special])
  if proto.trainer_spec.model_type == _BPE:  # no merges lead to them
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)
                          for token, piece in known.items()
                          if piece.type == _USER_DEFINED and token in numbers])
  _set_ends(tokenizer, settings, family)
  return tokenizer


def _parse(path: pathlib.Path):
  try:
    from sentencepiece import sentencepiece_model_pb2 as schema
  except ImportError as e:
    raise errors.UserError(f"{path} is a SentencePiece model; reading it needs pip install -e "
                           "'.[sentencepiece]'") from e
  proto = schema.ModelProto()
  try:
    proto.ParseFromString(path.read_bytes())
  except Exception as e:  # of the protobuf library in use
    raise errors.UserError(f"{path}: not a SentencePiece model: {e}") from e
  if not proto.pieces or proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
    raise errors.UserError(f"{path}: not a SentencePiece model of unigrams or byte pairs")
  return proto


def _special(known: dict, numbers: dict, settings: dict, family: str) -> list[str]:
  """Returns the special tokens, in the order of the numbers that new ones get."""
  tokens = [token for token, piece in known.items()
            if piece.type in (_CONTROL, _UNKNOWN) and token in numbers]
  named = [settings.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")]
  # T5's sentinels are numbered from the end.
  sentinels = int(settings.get("extra_ids", 100 if family.endswith("t5") else 0))
  tokens += [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
  named += settings.get("additional_special_tokens") or ()
  tokens += [token["content"] if isinstance(token, dict) else token for token in named if token]
  return list(dict.fromkeys(tokens))


def _model(path, spec, known: dict, numbers: dict, special: list[str]):
  """Returns the tokenizers model; token number i is the one that `numbers` gives i."""
  from tokenizers import models

  order = sorted(numbers, key=numbers.get)
  if [numbers[token] for token in order] != list(range(len(order))):
    raise errors.UserError(f"{path.parent}/vocab.json: its numbers are not 0 to {len(order) - 1}")
  unknown = next((token for token, piece in known.items() if piece.type == _UNKNOWN), None)
  if unknown not in numbers:
    raise errors.UserError(f"{path}: it has no unknown token that vocab.json knows")
  scores = {token: piece.score for token, piece in known.items() if piece.type == _NORMAL}
  if spec.model_type == _BPE:
    scores = {token: score for token, score in scores.items() if token in numbers}
    return models.BPE(vocab=numbers, merges=gguf_tokenizer.merges_of(numbers, scores),
                      unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)
  lowest = min(scores.values())
  # Pieces that the user defined beat every other way to cut their text, as the library has it.
  highest = max(scores.values())
  scores |= {token: len(token.encode()) * highest - 0.1 for token, piece in known.items()
             if piece.type == _USER_DEFINED}
  # A letter that only the other language has is worth as much as an unknown one, and known.
  scores |= {token: lowest - 10 for token in order if len(token) == 1 and token not in known}
  apart = {token for token in order if token not in scores and token not in special and (
    token not in known or known[token].type != _BYTE)}
  return models.Unigram([(_APART + token if token in apart else token, scores.get(token, lowest))
                         for token in order], numbers[unknown], spec.byte_fallback)


def _set_steps(tokenizer, spec, normalizer) -> None:
  """Sets what happens to a text before it is cut up, and to tokens that become one."""
  from tokenizers import Regex, decoders, normalizers, pre_tokenizers

  steps = [normalizers.Replace(_APART, "")]
  if normalizer.precompiled_charsmap:
    steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
  if normalizer.remove_extra_whitespaces:
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
  tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
    _SPACE, "always" if normalizer.add_dummy_prefix else "never", split=spec.split_by_whitespace)
  strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace(_APART, ""), decoders.Replace(_SPACE, " "), decoders.ByteFallback(),
     decoders.Fuse(), *strip])


def _set_ends(tokenizer, settings: dict, family: str) -> None:
  """Sets the tokens around a text: its end for encoder-decoders, else its beginning."""
  from tokenizers import processors

  ended = family in _ENDED
  tokens = {kind: settings.get(f"{kind}_token") or default
            for kind, default in (("bos", "<s>"), ("eos", "</s>"))}
  tokens = {kind: token["content"] if isinstance(token, dict) else token
            for kind, token in tokens.items()}
  begin = tokens["bos"] if settings.get("add_bos_token", not ended) else None
  end = tokens["eos"] if settings.get("add_eos_token", ended) else None
  around = [token for token in (begin, end) if token and tokenizer.token_to_id(token) is not None]
  if not around:
    return
  begin, end = (token if token in around else None for token in (begin, end))
  single = [token for token in (begin, "$A", end) if token]
  pair = [*single, *(token for token in (begin, "$B", end) if token)]
  tokenizer.post_processor = processors.TemplateProcessing(
    single=single, pair=pair, special_tokens=[(t, tokenizer.token_to_id(t)) for t in around])
