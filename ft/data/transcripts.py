"""Transcripts to tokens and back: Whisper's, with its marks of language, task and time; letters.

Whisper (Radford et al. 2022, arXiv:2212.04356, section 2.3) writes behind a start: the language and
the task, where it has more than one, and either a token that there will be no times, or times. CTC
models (Graves et al. 2006) write letters, words being parted by |.
"""

import dataclasses
import json
import pathlib
import re
import unicodedata

from ft import errors

STEP = 0.02  # seconds from one of Whisper's marks of time to the next
_MARK = re.compile(r"<\|(\d+\.\d\d)\|>")
_UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")  # languages whose texts have no spaces
_MULTILINGUAL = 51865  # least vocabulary of Whisper's multilingual models


@dataclasses.dataclass(frozen=True)
class Layout:
  """What Whisper's texts consist of beside words.

  Attributes:
    prompt: ids that the decoder is given.
    end: id that ends a text.
    no_times: id of <|notimestamps|>, the marks of time being those that follow it; None: no marks.
    times: whether texts have marks of time.
    spaced: whether a text starts with a space.
  """

  prompt: tuple[int, ...]
  end: int
  no_times: int | None
  times: bool
  spaced: bool = True

  @classmethod
  def of(cls, folder, hf: dict, tokenizer, language: str, task: str, times: bool) -> "Layout":
    """Returns the layout of a checkpoint, by generation_config.json and else by its tokenizer.

    Raises:
      UserError: a language that the model does not have, or none where it has several; a task or
        times that it does not have.
    """
    stated = read_json(pathlib.Path(folder or ".") / "generation_config.json")
    number = tokenizer.token_to_id
    several = stated.get("is_multilingual", hf.get("vocab_size", 0) >= _MULTILINGUAL)
    start = hf.get("decoder_start_token_id", number("<|startoftranscript|>"))
    prompt = [start]
    if several:
      name = f"<|{language}|>"
      known = stated.get("lang_to_id") or {}
      found = known.get(name, None if known else number(name))
      if not language or found is None:
        raise errors.UserError(f"task.language={language!r}: this model knows several languages; "
                               "give the code of the one that is spoken, such as en")
      what = (stated.get("task_to_id") or {}).get(task, number(f"<|{task}|>"))
      if what is None:
        raise errors.UserError(f"task.output={task}: the model has no token for it")
      prompt += [found, what]
    elif language not in ("", "en") or task != "transcribe":
      raise errors.UserError(f"task.language={language!r}, task.output={task}: this model writes "
                             "English as it is spoken; leave them as they are")
    no_times = stated.get("no_timestamps_token_id", number("<|notimestamps|>"))
    if no_times is None and times:
      raise errors.UserError("task.timestamps: the model has no marks of time")
    if no_times is not None and not times:
      prompt.append(no_times)
    end = hf.get("eos_token_id")
    end = number("<|endoftext|>") if end is None else end
    return cls(tuple(prompt), end, no_times, times, language not in _UNSPACED)


class Tokens:
  """Whisper's tokens.

  Args:
    tokenizer: tokenizers.Tokenizer.
    layout: see `Layout`.
  """

  def __init__(self, tokenizer, layout: Layout):
    self._tokenizer, self.layout = tokenizer, layout

  def encode(self, text: str, seconds: float) -> list[int]:
    """Returns the ids of a text and what ends it.

    With times, a text has them as <|1.20|>, or else is given those of the sound's start and end.

    Args:
      text: may not be empty.
      seconds: that the sound has.

    Raises:
      RowError: a mark of time beyond 30 seconds.
    """
    text = " ".join(text.split())
    if not self.layout.times:
      return [*self._words(_MARK.sub(" ", text)), self.layout.end]
    if not _MARK.search(text):
      text = f"<|0.00|>{text}<|{seconds:.2f}|>"
    ids, place = [], 0
    for mark in _MARK.finditer(text):
      ids += self._words(text[place:mark.start()])
      ids.append(self._time(float(mark[1])))
      place = mark.end()
    return [*ids, *self._words(text[place:]), self.layout.end]

  def _words(self, text: str) -> list[int]:
    text = " ".join(text.split())
    if not text:
      return []
    spaced = f" {text}" if self.layout.spaced else text
    return self._tokenizer.encode(spaced, add_special_tokens=False).ids

  def _time(self, seconds: float) -> int:
    if seconds > 30:
      raise errors.RowError(f"a mark of time at {seconds} s; Whisper's reach to 30 s")
    return self.layout.no_times + 1 + round(seconds / STEP)

  def decode(self, ids) -> str:
    """Returns the words of ids (T,), without marks."""
    return self.join([text for *_, text in self.segments(ids)])

  def join(self, texts: list[str]) -> str:
    """Returns texts that follow each other as one."""
    return (" " if self.layout.spaced else "").join(text.strip() for text in texts if text.strip())

  def segments(self, ids) -> list[tuple[float | None, float | None, str]]:
    """Returns (start, end, text) of what stands between marks of time; None where there is none."""
    found, start, words = [], None, []
    mark = self.layout.no_times
    for number in map(int, ids):
      if mark is not None and number > mark:
        time = (number - mark - 1) * STEP
        if words:
          found.append((start, time, self._text(words)))
          start, words = None, []
        else:
          start = time
      else:
        words.append(number)
    if words:
      found.append((start, None, self._text(words)))
    return [part for part in found if part[2]]

  def _text(self, ids) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True)


class Letters:
  """Letters of a CTC model.

  Args:
    vocabulary: letter -> id.
    blank: id of what stands for no letter.
    word: letter between words.
    unknown: letter for those that are not in the vocabulary; None where it is not there either.
  """

  def __init__(self, vocabulary: dict[str, int], blank: int, word: str = "|",
               unknown: str | None = None):
    self.blank, self.word, self.unknown = blank, word, unknown
    self.vocabulary = vocabulary
    self._names = {i: name for name, i in vocabulary.items()}
    letters = [name for name in vocabulary if len(name) == 1 and name.isalpha()]
    self._upper = bool(letters) and all(name == name.upper() for name in letters)
    self._lower = bool(letters) and all(name == name.lower() for name in letters)

  @classmethod
  def of(cls, folder, hf: dict) -> "Letters":
    """Returns the letters of a checkpoint, by vocab.json and tokenizer_config.json.

    Raises:
      UserError: they are not there.
    """
    folder = pathlib.Path(folder or ".")
    vocabulary = read_json(folder / "vocab.json")
    if not vocabulary or not all(isinstance(i, int) for i in vocabulary.values()):
      raise errors.UserError(f"{folder}: no vocab.json with the letters that the model writes")
    stated = read_json(folder / "tokenizer_config.json")
    name = lambda key, other: _content(stated.get(key)) or other  # noqa: E731
    blank = vocabulary.get(name("pad_token", "<pad>"), hf.get("pad_token_id") or 0)
    unknown = name("unk_token", "<unk>")
    return cls(vocabulary, blank, name("word_delimiter_token", "|"),
               unknown if unknown in vocabulary else None)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without punctuation that the model does not have.

    Raises:
      RowError: a letter that it does not have, nor one for those that it does not have.
    """
    text = text.upper() if self._upper else text.lower() if self._lower else text
    ids = []
    for letter in self.word.join(text.split()):
      number = self.vocabulary.get(letter)
      if number is None and unicodedata.category(letter)[0] in "PS":
        continue  # it is not spoken
      if number is None or number == self.blank:
        number = self.vocabulary.get(self.unknown) if self.unknown else None
        if number is None:
          raise errors.RowError(f"the model has no letter {letter!r}, of {text[:60]!r}")
      ids.append(number)
    return ids

  def decode(self, ids) -> str:
    """Returns the text of ids (T,), that of marks such as <s> left out."""
    names = [self._names.get(int(i), "") for i in ids]
    letters = "".join(" " if name == self.word else name for name in names
                      if not (name.startswith("<") and name.endswith(">")))
    return " ".join(letters.split())

  def join(self, texts: list[str]) -> str:
    """Returns texts that follow each other as one."""
    return " ".join(text for text in texts if text)


def needed_frames(ids) -> int:
  """Returns the fewest frames that CTC can write ids (T,) in: one each, and a blank in repeats."""
  return len(ids) + sum(a == b for a, b in zip(ids, ids[1:], strict=False))


def read_tokenizer(folder):
  """Returns the tokenizer of a Whisper checkpoint; UserError where there is none."""
  from tokenizers import Tokenizer

  path = pathlib.Path(folder or ".") / "tokenizer.json"
  if not path.is_file():
    raise errors.UserError(f"{folder}: no tokenizer.json, and task.name=transcribe writes text")
  try:
    return Tokenizer.from_file(str(path))
  except Exception as e:  # the library raises bare Exception
    raise errors.UserError(f"{path}: its tokenizer cannot be read: {e}") from e


def read_json(path: pathlib.Path) -> dict:
  """Reads a JSON file of the checkpoint; {} where there is none."""
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text("utf-8"))
  except ValueError as e:
    raise errors.UserError(f"{path}: not JSON: {e}") from e


def _content(token):
  return token.get("content") if isinstance(token, dict) else token
