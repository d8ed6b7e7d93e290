"""Conversations: the turns of a row become the text that a chat model was trained to read.

Turns are a list of [speaker, text] or of {"role": …, "content": …}. The checkpoint's own chat
template renders them; a checkpoint without one gets a line `speaker: text` for each turn. Templates
are programs: they run in jinja2's immutable sandbox, see no clock and no file.
"""

import pathlib
from collections.abc import Callable, Mapping

from ft import errors

ROLES = ("system", "user", "assistant", "tool")


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


def renderer(folder: pathlib.Path, settings: Mapping) -> Callable | None:
  """Returns (messages, answer_next=False) -> text, by a checkpoint's chat template, if it has one.

  With answer_next, what opens the assistant's next turn follows the last message.

  Args:
    folder: of the checkpoint; chat_template.jinja there goes before tokenizer_config.json.
    settings: tokenizer_config.json, with the special tokens that templates name.

  Raises:
    UserError: the template is no valid one.
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
  from jinja2 import TemplateError, sandbox  # slow to import

  def stop(message):
    raise TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
  environment.globals["raise_exception"] = stop
  try:
    template = environment.from_string(source)
  except TemplateError as e:
    raise errors.UserError(f"{folder}: its chat template is not valid: {e}") from e
  tokens = {name: token["content"] if isinstance(token, Mapping) else token
            for name, token in settings.items() if name.endswith("_token") and token}

  def render(messages: list[dict], answer_next: bool = False) -> str:
    try:
      return template.render(messages=messages, add_generation_prompt=answer_next, **tokens)
    except Exception as e:  # whatever a program that came with a checkpoint may raise
      raise errors.RowError(f"the chat template refuses these turns: {e}") from e

  return render


def plain(messages: list[dict]) -> str:
  """Returns a line `role: text` for each message, for models without a template."""
  return "".join(f"{message['role']}: {message['content']}\n" for message in messages)
