"""Source and target texts as token ids, for encoder-decoders and for decoder-only models.

An encoder-decoder reads the source and decodes the target. A decoder-only model reads the source as
a user's turn, written by the checkpoint's chat template, and continues with the target and what
ends the turn; without a template the source is a line and the target the next one.

The source is cut as data.truncation says, text first: prefix, template and special tokens survive.
"""

import dataclasses
import json

import numpy as np

from ft import errors

# What multilingual tokenizers set around a text: the language before it, or behind its end.
_LANGUAGE_BEHIND = ("MBartTokenizer", "MBartTokenizerFast")


@dataclasses.dataclass(frozen=True)
class Layout:
  """What makes token ids of texts; JSON types, saved with the model.

  Attributes:
    prefix: text before every source.
    max_target: most tokens of a target, special ones included.
    decoder_only: whether one sequence holds source and target.
    source_language, target_language: special tokens, or "".
    start: what the decoder's input starts with; None for decoder-only models.
    pad: fills arrays up.
    ends: tokens that end a text.
    language_behind: whether a language stands behind the end of a text.
  """

  prefix: str
  max_target: int
  decoder_only: bool
  source_language: str = ""
  target_language: str = ""
  start: int | None = None
  pad: int = 0
  ends: tuple = ()
  language_behind: bool = False

  @classmethod
  def of(cls, config, preprocess, decoder_only: bool) -> "Layout":
    """Returns the layout of a checkpoint and of the section `task` of a config.

    Raises:
      UserError: a language that is no token, or no token that ends or starts a text.
    """
    hf, tokenizer = preprocess.info.hf_config or {}, preprocess.tokenizer
    for key in ("source_language", "target_language"):
      if config[key] and decoder_only:
        raise errors.UserError(f"task.{key} is for multilingual encoder-decoders; name the "
                               "language in task.prefix")
      if config[key] and tokenizer.token_to_id(config[key]) is None:
        raise errors.UserError(f"task.{key}={config[key]!r} is no token of this checkpoint"
                               f"{errors.suggest(config[key], _languages(tokenizer))}")
    file = preprocess.info.folder / "tokenizer_config.json"
    kind = json.loads(file.read_text()).get("tokenizer_class", "") if file.is_file() else ""
    ends = hf.get("eos_token_id")
    ends = tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (ends,)
    layout = cls(config.prefix, int(config.max_target), decoder_only, config.source_language,
                 config.target_language, None, int(preprocess.pad["input_ids"]), ends,
                 kind in _LANGUAGE_BEHIND)
    if not ends:
      raise errors.UserError(f"{preprocess.info.folder}: config.json has no eos_token_id, the "
                             "token that ends a text")
    if decoder_only:
      return layout
    start = hf.get("decoder_start_token_id", hf.get("pad_token_id"))
    if layout.language_behind and config.target_language:
      start = tokenizer.token_to_id(config.target_language)
    if start is None:
      raise errors.UserError(f"{preprocess.info.folder}: config.json has no decoder_start_token_id")
    return dataclasses.replace(layout, start=int(start))

  @property
  def forced(self) -> str:
    """The language token that every target begins with, or ""."""
    return "" if self.language_behind else self.target_language


class Pairs:
  """Makes examples of rows; see `Layout`.

  Args:
    preprocess: text.Preprocess.
    layout: see there.

  Attributes:
    ending: what ends an answer in the chat template, such as "<|im_end|>"; "" without one.
    ends: tokens that end a text, those of `ending` included.

  Raises:
    UserError: max_target or the prefix leaves no room for the source, or the model has too few
      positions.
  """

  def __init__(self, preprocess, layout: Layout):
    from tokenizers import Tokenizer

    self.preprocess, self.layout = preprocess, layout
    self._tokenizer = Tokenizer.from_str(preprocess.tokenizer.to_str())
    self._tokenizer.no_truncation()
    self._target_tokenizer = preprocess.target_tokenizer
    if self._target_tokenizer is preprocess.tokenizer:
      self._target_tokenizer = self._tokenizer
    self.ending, self.ends = preprocess.ending() if layout.decoder_only else "", layout.ends
    if self.ending:
      self.ends = (*layout.ends, *self._ids(self.ending)[-1:])
    # A decoder-only model's one sequence has to hold the target too.
    self.max_source = preprocess.max_length - (layout.max_target if layout.decoder_only else 0)
    bare = len(self._source(""))
    if bare >= self.max_source:
      told = f", task.max_target={layout.max_target}" if layout.decoder_only else ""
      raise errors.UserError(
        f"data.max_length={preprocess.max_length}{told}: prefix and special tokens take {bare} "
        "tokens, which leaves no room for the source")
    limit = (preprocess.info.hf_config or {}).get("max_position_embeddings")
    if limit and layout.max_target > limit:
      raise errors.UserError(f"task.max_target={layout.max_target}: the model has positions for "
                             f"{limit} tokens")

  def example(self, row: dict) -> dict:
    """Returns what the loss reads: int32 arrays.

    Encoder-decoders: input_ids and attention_mask of the source, and `labels` (tokens,) of the
    target. Decoder-only: input_ids and attention_mask of both, and `prompt` (), how many of them
    are the source's.

    Raises:
      RowError: an empty source or target, or one that is too long.
      UserError: it is too long, and data.truncation is error.
    """
    source = self._fitted(self._source, row.get("text"), self.max_source, "source")
    target = self._fitted(self._target, row.get("target"), self.layout.max_target, "target")
    if self.layout.decoder_only:
      return {**_read(source + target), "prompt": np.asarray(len(source), np.int32)}
    return {**_read(source), "labels": np.array(target, np.int32)}

  def prompt(self, row: dict) -> dict:
    """Returns what generation reads: the example of a row without its target."""
    source = self._fitted(self._source, row.get("text"), self.max_source, "source")
    more = {"prompt": np.asarray(len(source), np.int32)} if self.layout.decoder_only else {}
    return {**_read(source), **more}

  def show(self, example: dict) -> str:
    """Returns the texts of an example, special tokens included, with what the loss is of in ⟦ ⟧."""
    ids = example["input_ids"].tolist()
    if self.layout.decoder_only:
      source, target = ids[:int(example["prompt"])], ids[int(example["prompt"]):]
    else:
      source, target = ids, example["labels"].tolist()
    texts = [tokenizer.decode(part, skip_special_tokens=False) for tokenizer, part in
             ((self._tokenizer, source), (self._target_tokenizer, target))]
    return f"{texts[0]} ⟦{texts[1]}⟧ ({len(source)} + {len(target)} tokens)"

  def _ids(self, text: str, special: bool = False, tokenizer=None) -> list[int]:
    try:
      return (tokenizer or self._tokenizer).encode(text, add_special_tokens=special).ids
    except (UnicodeError, TypeError) as e:
      raise errors.RowError(f"text that cannot be tokenized: {e}") from e

  def _source(self, text: str) -> list[int]:
    text, layout = self.layout.prefix + text, self.layout
    if layout.decoder_only:
      said = self.preprocess.chat([{"role": "user", "content": text}], answer_next=True)
      return self._ids(text + "\n", special=True) if said is None else self._ids(said)
    if layout.source_language:
      return self._in_language(text, layout.source_language)
    return self._ids(text, special=True)

  def _target(self, text: str) -> list[int]:
    layout = self.layout
    if layout.decoder_only:
      ids = self._ids(text.strip() + self.ending)
    elif layout.target_language:
      ids = self._in_language(text, layout.target_language)
      ids = ids[:-1] if layout.language_behind else ids  # there it starts the decoder's input
    else:
      ids = self._ids(text, True, self._target_tokenizer)
    return ids if ids and ids[-1] in self.ends else [*ids, layout.ends[0]]

  def _in_language(self, text: str, language: str) -> list[int]:
    end, mark = self.layout.ends[0], self._tokenizer.token_to_id(language)
    ids = self._ids(text)
    return [*ids, end, mark] if self.layout.language_behind else [mark, *ids, end]

  def _fitted(self, build, text, limit: int, what: str) -> list[int]:
    """Returns build(text), of a text that is cut where it has to be, and may be."""
    if not isinstance(text, str) or not text.strip():
      raise errors.RowError(f"the {what} is empty")
    ids = build(text)
    if len(ids) <= limit:
      return ids
    policy = self.preprocess.truncation
    if not policy.startswith("truncate"):
      raise self.preprocess.too_long(
        f"the {what} has {len(ids)} tokens, more than the {limit} that data.max_length and "
        f"task.max_target leave it: {text[:60]!r}…")
    self.preprocess.count("truncated" if what == "source" else "targets_truncated")
    while len(ids) > limit:
      text = self._shorter(text, len(ids) - limit, policy == "truncate-left")
      ids = build(text)
    return ids

  def _shorter(self, text: str, tokens: int, left: bool) -> str:
    """Returns a text without about this many tokens at an end."""
    spans = self._tokenizer.encode(text, add_special_tokens=False).offsets
    if tokens >= len(spans):
      return ""
    cut = text[spans[tokens][0]:] if left else text[:spans[-tokens - 1][1]]
    # Tokens of one character share its span; a character less is then what gets on.
    return cut if len(cut) < len(text) else text[1:] if left else text[:-1]


def _read(ids: list[int]) -> dict:
  ids = np.array(ids, np.int32)
  return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _languages(tokenizer) -> list[str]:
  """Returns the special tokens, among which those of languages are."""
  return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
