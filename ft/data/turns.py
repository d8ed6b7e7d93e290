"""Conversations: the turns of a row become the text that a chat model was trained to read.

Turns are a list of [speaker, text] or of {"role": …, "content": …}. The checkpoint's own chat
template renders them; a checkpoint without one gets a line `speaker: text` for each turn. Templates
are programs: they run in a process of their own (`ft.data.rendering`), in jinja2's immutable
sandbox, for at most SECONDS, and write at most CHARACTERS.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from ft import errors
from ft.data import rendering

ROLES = ("system", "user", "assistant", "tool")
SECONDS = 10  # of the processor's time that a template may take for one conversation
CHARACTERS = 10_000_000  # that it may write


def messages(turns, speakers: Mapping[str, str] | None = None) -> list[dict[str, str]]:
  """Returns turns as {"role": one of ROLES, "content": str}, in order.

  Args:
    turns: as a row has them.
    speakers: speaker -> role, for speakers that are called otherwise.

  Raises:
    UserError: a speaker who is none of ROLES and not among `speakers`.
    RowError: this row has no turns, or one that is no text.
  """
  if not isinstance(turns, (list, tuple)) or not turns:
    raise errors.RowError("no turns: they should be a list of [speaker, text]")
  found = []
  for turn in turns:
    speaker, content = _parts(turn)
    role = (speakers or {}).get(speaker, speaker.lower())
    if role not in ROLES:
      raise errors.UserError(f"turns: {speaker!r} is no role{errors.suggest(role, ROLES)}; say in "
                             f"data.speakers which of {', '.join(ROLES)} it is")
    found.append({"role": role, "content": content})
  return found


def _parts(turn) -> tuple[str, str]:
  if isinstance(turn, Mapping):
    turn = turn.get("role"), turn.get("content")
  if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(
      isinstance(part, str) for part in turn):
    raise errors.RowError(f"a turn that is no [speaker, text]: {str(turn)[:60]}")
  return turn[0], turn[1]


def renderer(folder: pathlib.Path, settings: Mapping) -> "Renderer | None":
  """Returns the chat template of a checkpoint; None where it has none.

  Args:
    folder: of the checkpoint; chat_template.jinja there goes before tokenizer_config.json.
    settings: tokenizer_config.json, with the special tokens that templates name.
  """
  source = settings.get("chat_template")
  file = pathlib.Path(folder) / "chat_template.jinja"
  if file.is_file():
    source = file.read_text(encoding="utf-8")
  if isinstance(source, list):  # several, by name
    named = {entry.get("name"): entry.get("template") for entry in source}
    source = named.get("default")
  if not source:
    return None
  tokens = {name: token["content"] if isinstance(token, Mapping) else token
            for name, token in settings.items() if name.endswith("_token") and token}
  return Renderer(str(folder), source, tokens)


class Renderer:
  """A chat template at work: messages -> text. May be called from any thread, and pickled.

  Its process starts with the first conversation, and ends with this object.

  Args:
    folder: what to call the checkpoint in messages.
    source: of the template.
    tokens: special tokens by the names that templates know.
  """

  def __init__(self, folder: str, source: str, tokens: Mapping[str, str]):
    self._folder, self._source, self._tokens = folder, source, dict(tokens)
    self._lock, self._process = threading.Lock(), None

  def __call__(self, messages: list[dict], answer_next: bool = False) -> str:
    """Returns the text of messages, with the head of the assistant's reply if `answer_next`.

    Raises:
      RowError: the template refuses these messages.
      UserError: it is not valid, takes too long, or writes too much.
    """
    return self._ask({"messages": messages, "prompt": answer_next})["text"]

  def spans(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of messages, and where in it the assistant speaks, in characters.

    A span holds what a reply consists of, its end-of-turn token included, and not the header before
    it; see `rendering.Template.spans`.

    Raises:
      RowError: the template refuses these messages, or the spans cannot be found.
      UserError: it is not valid, takes too long, or writes too much.
    """
    found = self._ask({"messages": messages, "roles": ["assistant"]})
    return found["text"], [tuple(span) for span in found["spans"]]

  def _ask(self, request: dict) -> dict:
    with self._lock:
      if self._process is None:
        self._start()
      found = self._exchange(request)
    if "raised" in found:
      raise errors.RowError(f"the chat template refuses these turns: {found['raised']}")
    if "large" in found:
      raise errors.UserError(f"{self._folder}: its chat template wrote more than {CHARACTERS:,} "
                             "characters or took too much memory for one conversation")
    if "unclear" in found:
      number = found["unclear"] + 1
      raise errors.RowError(
          f"the chat template has no {{% generation %}} blocks, and what it writes up to turn "
          f"{number} (or its start of a reply there) is not what the whole conversation begins "
          "with, so the assistant's tokens cannot be told; mark them in the template with "
          "{% generation %} … {% endgeneration %}")
    return found

  def _start(self) -> None:
    self._process = subprocess.Popen(
        [sys.executable, "-m", rendering.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    weakref.finalize(self, _end, self._process)
    found = self._exchange({"template": self._source, "tokens": self._tokens, "most": CHARACTERS,
                            "seconds": SECONDS})
    if "invalid" in found:
      self._stop()
      raise errors.UserError(f"{self._folder}: its chat template is not valid: {found['invalid']}")

  def _stop(self) -> None:
    _end(self._process)
    self._process = None

  def _exchange(self, request: dict) -> dict:
    """Sends a line and returns the answer; UserError if the process ends instead."""
    try:
      self._process.stdin.write(json.dumps(request).encode() + b"\n")
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    except OSError:  # it ended
      line = b""
    if line.endswith(b"\n"):
      return json.loads(line)
    status = self._process.wait()
    self._stop()
    raise errors.UserError(
        f"{self._folder}: its chat template "
        + (f"took more than {SECONDS:g} s of the processor's time for one conversation"
           if status == -signal.SIGXCPU else f"made its process end (status {status})"))

  def __getstate__(self):
    return {"arguments": (self._folder, self._source, self._tokens)}

  def __setstate__(self, given):
    self.__init__(*given["arguments"])


def _end(process) -> None:
  process.kill()
  with contextlib.suppress(OSError):  # what was still to be sent
    process.stdin.close()
  process.stdout.close()
  process.wait()


def spoken(text: str, spans, specials: Sequence[str]) -> list[tuple[int, int]]:
  """Returns spans without the white space that a template writes after an end-of-turn token.

  A model stops at that token, so nothing after it is ever asked of it.

  Args:
    text: of the conversation.
    spans: of `Renderer.spans`.
    specials: contents of the special tokens.
  """
  found = []
  for start, end in spans:
    said = text[start:end].rstrip()
    closed = any(said.endswith(special) for special in specials)
    found.append((start, start + len(said)) if closed else (start, end))
  return found


def token_mask(offsets, spans) -> np.ndarray:
  """Returns (T,) int32, 1 for each token that stands for characters of a span.

  Args:
    offsets: (start, end) in characters of each of T tokens, in order.
    spans: (start, end) in characters.
  """
  mask = np.zeros(len(offsets), np.int32)
  for start, end in spans:
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if inside:  # some tokens between them stand for no characters, such as trimmed spaces
      mask[inside[0]:inside[-1] + 1] = 1
  return mask


def plain(messages: list[dict]) -> str:
  """Returns a line `role: text` for each message, for models without a template."""
  return "".join(f"{message['role']}: {message['content']}\n" for message in messages)
