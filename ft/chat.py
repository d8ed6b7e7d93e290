"""A conversation with a model in the terminal: a run, an exported model, or any model folder."""

import dataclasses
import pathlib
import sys
import types
from collections.abc import Callable

import jax
import numpy as np

from ft import errors, models, predict
from ft.data import text
from ft.models import generate

_STRIDE = 64  # prompts are padded to multiples of it, so that few lengths are compiled
RESET = "/reset"


class Session:
  """One conversation, rendered by the checkpoint's chat template and replied to token by token.

  Args:
    source: folder of a run or of an exported model, or what `models.load` takes.
    max_reply: most tokens of a reply.
    temperature: of drawing tokens; 0: always the likeliest one.
    system: text of a system message the conversation starts with; "": none.
    seed: of drawing tokens.

  Raises:
    UserError: no such model, or it is no chat model: no language head, no chat template.
  """

  def __init__(self, source: str, max_reply: int = 256, temperature: float = 0.0,
               system: str = "", seed: int = 0):
    self._pretrained, self._variables, self._interceptor, self._preprocess = _load(source)
    if self._pretrained.config.head != "lm" or hasattr(self._pretrained.module, "decode"):
      raise errors.UserError(f"{source}: not a model that continues a text; chatting needs one")
    if self._preprocess.chat([{"role": "user", "content": "x"}]) is None:
      raise errors.UserError(f"{source}: this checkpoint has no chat template; put one into "
                             "chat_template.jinja beside its tokenizer")
    self._tokenizer = self._preprocess.tokenizer
    self._tokenizer.no_truncation()
    drawn = dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
    settings = generate.Settings.of(
      self._pretrained, num_beams=1, max_new_tokens=max_reply, **drawn)
    ends = (*settings.eos_token_id, *self._ids(self._preprocess.ending())[-1:])
    self._settings = dataclasses.replace(settings, eos_token_id=tuple(dict.fromkeys(ends)))
    self._system = [{"role": "system", "content": system}] if system else []
    self._rng, self._turns = jax.random.key(seed), 0
    self.reset()

  def reset(self) -> None:
    """Forgets what was said."""
    self.messages = list(self._system)

  def reply(self, said: str, show: Callable[[str], None]) -> str:
    """Returns the reply to a message, and shows its text piece by piece as tokens are decoded.

    A message that cannot be replied to is not part of the conversation.

    Raises:
      UserError: the conversation is longer than the model's context.
      RowError: the template refuses it.
    """
    messages = [*self.messages, {"role": "user", "content": said}]
    ids = self._ids(self._preprocess.chat(messages, answer_next=True))
    most, limit = self._settings.max_new_tokens, self._preprocess.positions
    if len(ids) + most > limit:
      raise errors.UserError(
        f"the conversation has {len(ids)} tokens and a reply up to {most}, the model has positions "
        f"for {limit}; {RESET} starts anew")
    stream = _Stream(self._preprocess.decode, set(self._settings.eos_token_id), show)
    width = -(-len(ids) // _STRIDE) * _STRIDE
    inputs = {"input_ids": np.array([[0] * (width - len(ids)) + ids], np.int32),
              "attention_mask": (np.arange(width) >= width - len(ids)).astype(np.int32)[None]}
    self._turns += 1
    generate.generate(
      self._pretrained, inputs, self._settings, rng=jax.random.fold_in(self._rng, self._turns),
      variables=self._variables, interceptor=self._interceptor, callback=stream)
    self.messages = [*messages, {"role": "assistant", "content": stream.end()}]
    return self.messages[-1]["content"]

  def talk(self, lines, out) -> None:
    """Replies to lines until there are none; RESET forgets what was said.

    Args:
      lines: a text file, such as standard input; a terminal is prompted.
      out: a text file.
    """
    prompt = "> " if lines.isatty() else ""

    def show(piece):
      print(piece, end="", file=out, flush=True)

    show(prompt)
    for line in lines:
      said = line.strip()
      if said == RESET:
        self.reset()
      elif said:
        try:
          self.reply(said, show)
        except (errors.UserError, errors.RowError) as error:
          print(f"error: {error}", file=sys.stderr)
        show("\n")
      show(prompt)
    show("\n" if prompt else "")

  def _ids(self, content: str) -> list[int]:
    return self._tokenizer.encode(content, add_special_tokens=False).ids


class _Stream:
  """Shows the text of tokens as far as it is certain; the last bytes of a character may be due."""

  def __init__(self, decode, ends, show):
    self._decode, self._ends, self._show = decode, ends, show
    self._ids, self._shown, self._done = [], "", False

  def __call__(self, tokens) -> None:
    for token in map(int, tokens[0]):
      self._done = self._done or token in self._ends
      if not self._done:
        self._ids.append(token)
    content = self._decode(self._ids)
    if not content.endswith("\N{REPLACEMENT CHARACTER}"):
      self._more(content)

  def _more(self, content: str) -> None:
    if content.startswith(self._shown):
      self._show(content[len(self._shown):])
      self._shown = content

  def end(self) -> str:
    """Shows what is left, and returns all of the text."""
    content = self._decode(self._ids)
    self._more(content)
    return content


def _load(source: str) -> tuple:
  """Returns (model, variables, interceptor, preprocessing) of a run, a folder or another source."""
  try:
    folder = predict.exported(pathlib.Path(source))
  except errors.UserError:
    folder = None
  if folder:
    preprocess = predict.description(folder)[1]
    if not isinstance(preprocess, text.Preprocess):
      raise errors.UserError(f"{source}: this run does not read text")
    _, pretrained, interceptor, variables = predict.load(folder)
    return pretrained, variables, interceptor, preprocess
  info = models.inspect(source)
  if info.modality != "text":
    raise errors.UserError(f"{source}: reads {info.modality}; chatting needs a language model")
  values = {key: default for key, (default, *_) in text.KEYS.items()}
  limit = (info.hf_config or {}).get("max_position_embeddings") or values["max_length"]
  values["max_length"] = min(values["max_length"], limit)
  preprocess = text.Preprocess(types.SimpleNamespace(**values), info)
  pretrained = models.load(source, head="lm")
  return pretrained, pretrained.variables, None, preprocess
