"""Text to token ids, with the tokenizer that came with the checkpoint."""

import csv
import hashlib
import json
import pathlib
import shlex
import sys
import threading
import types
from collections.abc import Iterator

import numpy as np

from ft import errors
from ft.data import spm, turns
from ft.weights import resolve

KEYS = {
    "max_length": (128, "most tokens of an example, special ones included", (3, None)),
    "truncation": ("truncate-right", "longer texts: cut at an end, drop the row, or stop",
                   ["truncate-right", "truncate-left", "drop", "error"]),
    "buckets": ((32, 64, 128), "lengths batches are padded to; max_length is always one", "list"),
    "speakers": (None, "who speaks in turns -> system, user, assistant or tool", "dict"),
}
_COUNT_LOCK = threading.Lock()  # of the module, so that a Preprocess can be sent to a process
_PROBE = "The quick brown fox: naïve café, 1234 Zürich!"
_NO_LIMIT = 10**9  # tokenizers without a limit state 1e30


class Preprocess:
  """Turns {"text": str, "text_b": str, optional} into the token ids of one example.

  A row with "turns" and no text is a conversation: the checkpoint's chat template makes its text
  (see `ft.data.turns`), special tokens included, so the tokenizer adds none of its own.

  A call returns int32 arrays of shape (tokens,): `input_ids`, `attention_mask`, and for models that
  tell segments apart `token_type_ids`. Special tokens are set by the tokenizer's own template and
  survive truncation; of a pair the longer text is cut first.

  Args:
    config: the `data` section (max_length, truncation, buckets, speakers).
    info: what models.inspect says: `folder` holds tokenizer.json, vocab.txt or a SentencePiece
      model, `hf_config` the model's limits.

  Attributes:
    pad: key -> value that fills a batch up.
    buckets: lengths to pad to, the last one is max_length.
    info: what models.inspect said; of a finished run folder and hf_config only.
    speakers: who speaks in turns -> role, see `turns.messages`.
    attributes: columns of data.attributes, which rows for prediction have where the file does.
    tokenizer: a tokenizers.Tokenizer, which cuts at max_length where truncation says so.
    target_tokenizer: of texts that the model writes: that one, or a Marian model's second one.
    counts: {"truncated": examples that were cut, "too_long": examples refused for their length}.
    augments: False.

  Raises:
    UserError: there is no tokenizer, it is not this model's, or max_length does not fit the model.
  """

  augments = False

  def __init__(self, config, info):
    self.max_length, self.truncation = int(config.max_length), config.truncation
    self.columns = {r: c for r, c in (getattr(config, "columns", None) or {}).items()
                    if r in ("text", "text_b", "turns")}
    self.attributes = tuple(getattr(config, "attributes", ()))
    self.counts = {"truncated": 0, "too_long": 0}
    self._stops = config.truncation == "error"
    self.info = info
    read, settings = _load_tokenizer(info.folder, (info.hf_config or {}).get("model_type", ""))
    self._tokenizer, self.target_tokenizer = read.tokenizer, read.target or read.tokenizer
    self._special = {i: token.content for i, token in
                     self._tokenizer.get_added_tokens_decoder().items() if token.special}
    self.speakers = dict((getattr(config, "speakers", None) or {}).items())
    self._render = turns.renderer(info.folder or ".", settings)
    self._check(info.hf_config or {}, settings, info.folder)
    self._segments = _has_segments(info.hf_config or {}, settings)
    self.buckets = _buckets(config.buckets, self.max_length)
    self.pad = dict.fromkeys(self._keys(), 0)
    self.pad["input_ids"] = _pad_id(self._tokenizer, info.hf_config or {}, settings)
    if self.truncation.startswith("truncate"):
      self._tokenizer.enable_truncation(
          self.max_length, direction=self.truncation.removeprefix("truncate-"))

  def __call__(self, row: dict) -> dict[str, np.ndarray]:
    """Returns the example of a row; RowError for one without text or too long to be used."""
    return self.arrays(self.encode(row)[1])

  def encode(self, row: dict) -> tuple:
    """Returns (text, tokenizers.Encoding) of a row; see `__call__`."""
    text, encoding = self._encode(row)
    return text, self._fitting(text, encoding)

  def encode_turns(self, row: dict) -> tuple:
    """Returns (text, Encoding, mask (T,)) of a row with turns; see `__call__`.

    The mask is 1 for the tokens that a reply of the assistant consists of: its text and what ends
    it, not the header before it.

    Raises:
      UserError: the checkpoint has no chat template, or its template fails; see `turns.Renderer`.
    """
    text, spans = self.spoken(self.messages(row))
    encoding = self._fitting(text, self._tokens(text, None, special=False))
    return text, encoding, turns.token_mask(encoding.offsets, spans)

  def spoken(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of messages, and from where to where each reply stands, its end included.

    Raises:
      UserError: the checkpoint has no chat template, or its template fails; see `turns.Renderer`.
    """
    if self._render is None:
      raise errors.UserError(
          f"{self.info.folder}: this checkpoint has no chat template; put the one it was trained "
          "with into chat_template.jinja beside its tokenizer")
    text, spans = self._render.spans(messages)
    return text, turns.spoken(text, spans, tuple(self._special.values()))

  def _fitting(self, text: str, encoding):
    """Returns the encoding of a text; counts one that was cut, refuses one that is too long."""
    too_long = len(encoding.ids) > self.max_length
    if too_long:
      raise self.too_long(f"{len(encoding.ids)} tokens, more than data.max_length="
                          f"{self.max_length}: {text[:60]!r}…")
    if encoding.overflowing:
      self.count("truncated")
    return encoding

  def messages(self, row: dict) -> list[dict[str, str]]:
    """Returns the turns of a row as messages; see `turns.messages`."""
    return turns.messages(row.get("turns"), self.speakers)

  def count(self, what: str) -> None:
    """Counts an example under a name that the log and the card show."""
    with _COUNT_LOCK:
      self.counts[what] = self.counts.get(what, 0) + 1

  def too_long(self, message: str) -> Exception:
    """Counts an example that is refused for its length, and returns the error to raise."""
    self.count("too_long")
    return errors.UserError(message) if self._stops else errors.RowError(message)

  @property
  def positions(self) -> int:
    """How many tokens the model has positions for."""
    return _positions(self.info.hf_config or {})

  @property
  def tokenizer(self):
    """The tokenizer, as the attributes say."""
    return self._tokenizer

  def chat(self, messages: list[dict], answer_next: bool = False) -> str | None:
    """Returns messages as the checkpoint's chat template writes them; None where it has none.

    Args:
      messages: see `turns.messages`.
      answer_next: whether the head of the assistant's next turn follows.
    """
    return self._render and self._render(messages, answer_next)

  def ending(self) -> str:
    """Returns what the chat template writes behind an answer, less white space; "" without one."""
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    opened, whole = self.chat([question], answer_next=True), self.chat([question, answer])
    if opened is None or not whole.startswith(opened + "y"):
      return ""
    return whole[len(opened) + 1:].rstrip()

  def arrays(self, encoding) -> dict[str, np.ndarray]:
    """Returns the example of what `encode` returned."""
    values = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask,
              "token_type_ids": encoding.type_ids}
    return {key: np.array(values[key], np.int32) for key in self._keys()}

  def text_bytes(self, text: str, encoding, first: int = 0) -> int:
    """Returns how many UTF-8 bytes of a row's text its tokens from `first` on stand for.

    Special tokens stand for none, be they added or written in the text; the unknown token stands
    for what it replaces. Spaces between tokens count with the token after them, whether or not the
    tokenizer says so.
    """
    marks = [self._special.get(i) for i in encoding.ids]
    marks = [mark is not None and (start == end or mark in text[start:end])
             for mark, (start, end) in zip(marks, encoding.offsets, strict=True)]
    places = list(zip(marks, encoding.offsets, strict=True))
    own = [span for mark, span in places[first:] if not mark]
    if not own:
      return 0
    start = max((span[1] for mark, span in places[:first] if not mark), default=own[0][0])
    end = max(span[1] for span in own)
    cut = [span for mark, span in places if mark and start <= span[0] and span[1] <= end]
    return sum(sign * len(text[left:right].encode("utf-8", "surrogatepass"))
               for sign, spans in ((1, [(start, end)]), (-1, cut)) for left, right in spans)

  def finish(self, batch: dict) -> dict:
    """Returns the batch as it is: token ids need nothing on the device."""
    return batch

  def length(self, example: dict) -> int:
    """Returns the number of tokens, of the longest of the arrays that are filled up."""
    return max(len(example[key]) for key in self.pad if key in example)

  def show(self, example: dict) -> str:
    """Returns what the model reads, special tokens included, for log and card."""
    ids = np.asarray(example["input_ids"])[np.asarray(example["attention_mask"]) > 0]
    text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    return f"{text} ({len(ids)} tokens)"

  def decode(self, ids) -> str:
    """Returns the text of token ids (T,), without special tokens."""
    return self.target_tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

  def read_rows(self, source: str) -> Iterator[dict | errors.RowError]:
    """Yields rows for prediction, with the columns the run was trained with; see `read_rows`."""
    return read_rows(source, self.columns, self.attributes)

  def try_it(self, folder) -> str:
    """Returns the command that predicts on text of the user's own with the run in a folder."""
    run = shlex.quote(str(folder))
    if "turns" in self.columns:
      return f"python scripts/predict.py --run={run} --chat"
    return f"echo 'Your sentence here.' | python scripts/predict.py --run={run} --input=-"

  def spec(self) -> dict:
    """Returns what `from_spec` needs, as JSON; the tokenizer itself is saved with the model."""
    return {"modality": "text", "max_length": self.max_length, "truncation": self.truncation,
            "buckets": list(self.buckets), "columns": self.columns,
            "attributes": list(self.attributes),
            "speakers": self.speakers, "tokenizer": _fingerprint(self._tokenizer)}

  @classmethod
  def from_spec(cls, spec: dict, folder) -> "Preprocess":
    """Rebuilds the preprocessing of a run for prediction; a row too long is always a RowError.

    Raises:
      UserError: the tokenizer in the folder is not the one the model was trained with.
    """
    folder = pathlib.Path(folder)
    values = {key: spec.get(key, default) for key, (default, *_) in KEYS.items()}
    config = types.SimpleNamespace(**values, columns=spec.get("columns"),
                                   attributes=spec.get("attributes", ()))
    info = types.SimpleNamespace(folder=folder, hf_config=_json(folder / "config.json"))
    self = cls(config, info)
    self._stops = False
    if _fingerprint(self._tokenizer) != spec.get("tokenizer"):
      raise errors.UserError(f"{folder}: its tokenizer is not the one the model was trained with.")
    return self

  def _keys(self) -> tuple[str, ...]:
    return ("input_ids", "attention_mask", *(("token_type_ids",) if self._segments else ()))

  def _encode(self, row: dict) -> tuple:
    text, other, marked = row.get("text"), row.get("text_b"), False
    if "text" not in row and "turns" in row:
      messages = self.messages(row)
      marked = self._render is not None
      text = self._render(messages) if marked else turns.plain(messages)
    if not isinstance(text, str) or not text.strip():
      raise errors.RowError("no text")
    return text, self._tokens(text, other or None, special=not marked)

  def _tokens(self, text: str, other: str | None, special: bool):
    try:
      return self._tokenizer.encode(text, other, add_special_tokens=special)
    except (UnicodeError, TypeError) as e:
      raise errors.RowError(f"text that cannot be tokenized: {e}") from e

  def _check(self, hf_config: dict, settings: dict, folder) -> None:
    limit = min(self.positions, int(settings.get("model_max_length") or _NO_LIMIT))
    if self.max_length > limit:
      raise errors.UserError(f"data.max_length={self.max_length}: the model has positions for "
                             f"{limit} tokens; set it to {limit} or less.")
    special = self._tokenizer.num_special_tokens_to_add(is_pair=True)
    if self.max_length <= special:
      raise errors.UserError(
          f"data.max_length={self.max_length}: the tokenizer adds up to {special} special tokens "
          "to an example, which leaves no room for text.")
    size = hf_config.get("vocab_size")
    if size and self._tokenizer.get_vocab_size() > size:
      raise errors.UserError(
          f"{folder}: its tokenizer has {self._tokenizer.get_vocab_size()} tokens, the model's "
          f"vocabulary {size}; they do not belong together.")


from_spec = Preprocess.from_spec


def read_rows(source: str, columns: dict | None = None,
              attributes: tuple[str, ...] = ()) -> Iterator[dict | errors.RowError]:
  """Yields {"text": …} for prediction, one at a time; a RowError for a row that is unreadable.

  An object of a JSONL file, or of standard input, may have "turns" instead.

  Args:
    source: a CSV, TSV or JSONL file by its suffix; any other file, or "-" for standard input, has
      one text a line. A line of standard input that is a JSON object with the text is one.
    columns: role (text, text_b, turns) -> its column, such as `Preprocess.columns`; by default
      each is called as its role.
    attributes: columns of which a row's "attributes" hold those that it has.

  Raises:
    UserError: there is no such file, it is empty, or it has no column for the text.
  """
  columns = {"text": "text", "text_b": "text_b", "turns": "turns", **(columns or {})}
  if source == "-":
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    yield from _line_rows(sys.stdin, "standard input", columns, attributes)
    return
  path = pathlib.Path(source)
  if not path.exists():
    raise resolve.missing(path)
  if not path.is_file() or not path.stat().st_size:
    raise errors.UserError(f"{source}: {'is empty' if path.is_file() else 'not a file'}.")
  read = {".csv": _table_rows, ".tsv": _table_rows, ".jsonl": _object_rows,
          ".ndjson": _object_rows}.get(path.suffix.lower(), _line_rows)
  # undecodable bytes spoil the row they are in, not the file
  with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
    yield from read(file, str(path), columns, attributes)


def _line_rows(file, name: str, columns: dict, attributes: tuple):
  for number, line in enumerate(file, 1):
    line = line.rstrip("\r\n")
    row = None
    if name == "standard input" and line.startswith("{"):
      row = _object(line, columns, attributes)
    yield _checked(row or {"text": line}, f"{name}: line {number}")


def _object_rows(file, name: str, columns: dict, attributes: tuple):
  for number, line in enumerate(file, 1):
    if line.strip():
      row = _object(line, columns, attributes)
      where = f"{name}: line {number}"
      yield _checked(row, where) if row else errors.RowError(
          f"{where}: not a JSON object with {columns['text']!r} or {columns['turns']!r}")


def _table_rows(file, name: str, columns: dict, attributes: tuple):
  csv.field_size_limit(2**31 - 1)
  tabs = name.lower().endswith(".tsv")
  reader = csv.reader(file, delimiter="\t" if tabs else ",",
                      quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
  header = [c.strip() for c in next(reader, [])]
  if columns["text"] not in header:
    raise errors.UserError(f"{name}: no column {columns['text']!r} for the text; its columns are "
                           f"{', '.join(header)}.")
  start = reader.line_num + 1
  for fields in reader:
    where = f"{name}: line {start}"
    start = reader.line_num + 1
    if fields and len(fields) != len(header):
      yield errors.RowError(f"{where}: {len(fields)} fields, the header has {len(header)}")
    elif fields:
      record = dict(zip(header, fields, strict=True))
      row = {r: record[c] for r, c in columns.items() if c in record}
      yield _checked({**row, **_attributes(record, attributes)}, where)


def _object(line: str, columns: dict, attributes: tuple) -> dict | None:
  """Returns the roles of a JSON object; None for a line that is none or has no text or turns."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(record, dict):
    return None
  kinds = {role: list if role == "turns" else str for role in columns}
  row = {role: record[c] for role, c in columns.items() if isinstance(record.get(c), kinds[role])}
  return {**row, **_attributes(record, attributes)} if {"text", "turns"} & set(row) else None


def _attributes(record: dict, names: tuple) -> dict:
  """Returns {"attributes": those that a record has}; {} where it has none."""
  there = {name: str(record[name]) for name in names if record.get(name) is not None}
  return {"attributes": there} if there else {}


def _checked(row: dict, where: str) -> dict | errors.RowError:
  texts = [text for text in row.values() if isinstance(text, str)]
  if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
    return errors.RowError(f"{where}: not UTF-8 text")
  return row if "turns" in row or row["text"].strip() else errors.RowError(f"{where}: no text")


def _load_tokenizer(folder, family: str):
  """Returns the folder's tokenizers (spm.Read), bare of padding and truncation, and settings."""
  from tokenizers import Tokenizer, implementations  # slow to import
  folder = pathlib.Path(folder or ".")
  settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
  try:
    if (folder / "tokenizer.json").is_file():
      read = spm.Read(Tokenizer.from_file(str(folder / "tokenizer.json")), None)
    elif (folder / "vocab.txt").is_file():
      built = implementations.BertWordPieceTokenizer(
          str(folder / "vocab.txt"), lowercase=settings.get("do_lower_case", True),
          strip_accents=settings.get("strip_accents"),
          handle_chinese_chars=settings.get("tokenize_chinese_chars", True))
      read = spm.Read(Tokenizer.from_str(built.to_str()), None)
    elif spm.find(folder):
      read = spm.read(folder, settings, family)
    else:
      raise errors.UserError(f"{folder}: no tokenizer there (tokenizer.json, vocab.txt or a "
                             "SentencePiece model), and the model reads text.")
  except errors.UserError:
    raise
  except Exception as e:  # the library raises bare Exception
    raise errors.UserError(f"{folder}: its tokenizer cannot be read: {e}") from e
  read.tokenizer.no_padding()
  read.tokenizer.no_truncation()
  return read, settings


def _positions(hf_config: dict) -> int:
  """Returns how many tokens the model has positions for."""
  count = hf_config.get("max_position_embeddings") or hf_config.get("n_positions") or _NO_LIMIT
  if "roberta" in hf_config.get("model_type", ""):  # its positions start after the padding's
    count -= hf_config.get("pad_token_id", 1) + 1
  return count


def _has_segments(hf_config: dict, settings: dict) -> bool:
  names = settings.get("model_input_names")
  return hf_config.get("type_vocab_size", 0) > 1 and (not names or "token_type_ids" in names)


def _pad_id(tokenizer, hf_config: dict, settings: dict) -> int:
  token = settings.get("pad_token")
  token = token.get("content") if isinstance(token, dict) else token
  number = tokenizer.token_to_id(token) if token else None
  return int(number if number is not None else hf_config.get("pad_token_id") or 0)


def _buckets(given, max_length: int) -> tuple[int, ...]:
  try:
    lengths = {int(n) for n in given}
  except (TypeError, ValueError):
    lengths = {0}
  if any(n < 1 for n in lengths):
    raise errors.UserError(f"data.buckets={list(given)}: give positive lengths, such as 32,64,128.")
  return (*sorted(n for n in lengths if n < max_length), max_length)


def _fingerprint(tokenizer) -> str:
  """Returns a hash of the vocabulary and of how a probe is cut up, whatever the library version."""
  tokens = tokenizer.encode(_PROBE, add_special_tokens=False).tokens
  content = json.dumps([sorted(tokenizer.get_vocab().items()), tokens])
  return hashlib.sha256(content.encode()).hexdigest()


def tokenizers_differ(tokenizer, info) -> str:
  """Returns how a checkpoint's tokenizer differs from another, for a message; "" if it does not."""
  from tokenizers import Tokenizer

  ours = Tokenizer.from_str(tokenizer.to_str())
  ours.no_truncation()
  theirs = _load_tokenizer(info.folder, (info.hf_config or {}).get("model_type", ""))[0].tokenizer
  if _fingerprint(ours) == _fingerprint(theirs):
    return ""
  known, other = ours.get_vocab(), theirs.get_vocab()
  apart = sorted(token for token in known.keys() | other.keys()
                 if known.get(token) != other.get(token))
  if not apart:
    return "they have the same tokens, and cut texts differently"
  numbers = " and ".join("none" if part.get(apart[0]) is None else str(part[apart[0]])
                         for part in (known, other))
  return (f"they have {len(known)} and {len(other)} tokens, and {apart[0]!r} is number {numbers}")


def _json(path: pathlib.Path) -> dict:
  """Reads a JSON file of the checkpoint; {} where there is none."""
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as e:
    raise errors.UserError(f"{path} is not JSON: {e}") from e
