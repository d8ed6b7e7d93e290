"""A context and the answers to it: what rows with preferences hold, in the usual layouts.

    {prompt, chosen, rejected}      texts, or lists of messages; the prompt may be a text anyway
    {chosen, rejected}              whole conversations, or whole texts, that begin alike
    {prompt, completion, label}     an answer that is good or bad by itself

Messages are as in `ft.data.turns`. A text prompt is what a user says, and texts are then what the
assistant answers, where the checkpoint has a chat template; without one an answer continues the
prompt as it is. Whole texts are continued as they are, too.
"""

import os
from collections.abc import Mapping

import numpy as np

from ft import contrastive, errors
from ft.data import turns


class Answers:
  """Makes examples of rows: the answers side by side, each behind the context.

  Args:
    preprocess: text.Preprocess, whose `pad` has the keys of an example.
    roles: of the answers, ("chosen", "rejected") or ("completion",).
  """

  def __init__(self, preprocess, roles: tuple[str, ...]):
    from tokenizers import Tokenizer  # slow to import

    self._preprocess, self._roles = preprocess, roles
    self._template = preprocess.chat([{"role": "user", "content": "x"}]) is not None
    self._tokenizer = Tokenizer.from_str(preprocess.tokenizer.to_str())
    self._tokenizer.no_truncation()
    ends = (preprocess.info.hf_config or {}).get("eos_token_id")
    self._ends = ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]

  def read(self, row: dict) -> tuple:
    """Returns (context, answers) of a row; see `read`."""
    return read(row, self._roles, self._preprocess.speakers, self._template)

  def example(self, context, answers: list) -> dict:
    """Returns int32 arrays (tokens, S) of S answers; loss_mask is 1 for an answer's tokens.

    Raises:
      RowError: an answer is too long, or the first two are equal as far as they are read.
      UserError: too long with data.truncation=error, or the chat template fails.
    """
    parts = self._fitted([self._tokens(context, answer) for answer in answers])
    if len(self._roles) > 1 and parts[0] == parts[1]:
      raise errors.RowError(f"{' and '.join(self._roles)} are equal within data.max_length="
                            f"{self._preprocess.max_length}")
    return contrastive.side_by_side([self._arrays(*part) for part in parts], self._preprocess.pad)

  def _tokens(self, context, answer) -> tuple[list[int], list[int]]:
    """Returns (ids, mask), 1 for the answer's tokens, of a context and an answer."""
    if isinstance(answer, list):
      text, spans = self._preprocess.spoken([*context, *answer])
      spans = spans[sum(message["role"] == "assistant" for message in context):]
      encoding = self._encode(text, special=False)  # the template wrote them
      return encoding.ids, turns.token_mask(encoding.offsets, spans).tolist()
    text = context + answer
    encoding = self._encode(text, special=True)
    ids, mask = encoding.ids, turns.token_mask(encoding.offsets, [(len(context), len(text))])
    if self._ends and ids[-1] not in self._ends:
      return [*ids, self._ends[0]], [*mask.tolist(), 1]
    mask[-1] |= ids[-1] in self._ends
    return ids, mask.tolist()

  def _encode(self, text: str, special: bool):
    try:
      return self._tokenizer.encode(text, add_special_tokens=special)
    except (UnicodeError, TypeError) as e:
      raise errors.RowError(f"text that cannot be tokenized: {e}") from e

  def _fitted(self, parts: list[tuple]) -> list[tuple]:
    """Returns (ids, mask) of each side, all cut alike where one is longer than the model reads."""
    most, policy = self._preprocess.max_length, self._preprocess.truncation
    over = max(len(ids) for ids, _ in parts) - most
    if over > 0:
      if not policy.startswith("truncate"):
        raise self._preprocess.too_long(f"context and answer have {most + over} tokens, more than "
                                        f"data.max_length={most}")
      left = policy == "truncate-left"
      shared = min(mask.index(1) if 1 in mask else 0 for _, mask in parts)
      if left and over >= shared:
        raise self._preprocess.too_long(
          f"an answer has {most + over - shared} tokens, which leaves no room for its context "
          f"within data.max_length={most}")
      cut = slice(over, None) if left else slice(most)
      parts = [(ids[cut], mask[cut]) for ids, mask in parts]
      self._preprocess.count("truncated")
    parts = [(ids, [0, *mask[1:]]) for ids, mask in parts]  # nothing stands before the first token
    if not all(1 in mask for _, mask in parts):
      self._preprocess.count("nothing_learnt")
      raise errors.RowError(f"no token of an answer is left within data.max_length={most}; "
                            "data.truncation=truncate-left shortens the context instead")
    return parts

  def _arrays(self, ids: list[int], mask: list[int]) -> dict:
    known = {"input_ids": ids, "attention_mask": [1] * len(ids), "loss_mask": mask}
    return {key: np.array(known.get(key, [0] * len(ids)), np.int32)
            for key in self._preprocess.pad}


def read(row: dict, roles: tuple[str, ...], speakers: Mapping[str, str] | None = None,
         template: bool = True) -> tuple:
  """Returns (context, [answer of each role]): all of them texts, or all of them lists of messages.

  Args:
    row: values by role.
    roles: of the answers.
    speakers: see `turns.messages`.
    template: whether the checkpoint has a chat template.

  Raises:
    RowError: an answer or the prompt is empty, the answers are equal, are of different kinds, or do
      not follow one context.
    UserError: an unknown role.
  """
  answers = [_value(row, role, speakers) for role in roles]
  if len({type(answer) for answer in answers}) > 1:
    raise errors.RowError(f"{' and '.join(roles)}: one is a text and the other is not")
  prompt = _value(row, "prompt", speakers) if "prompt" in row else None
  if isinstance(answers[0], str) and (isinstance(prompt, list) or prompt and template):
    answers = [[{"role": "assistant", "content": answer}] for answer in answers]
  if isinstance(answers[0], str):
    context, answers = (prompt, answers) if prompt else _begin(answers, roles)
  else:
    known = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    context, answers = _apart([_whole(known, answer) for answer in answers], roles)
  if len(answers) > 1 and answers[0] == answers[1]:
    raise errors.RowError(f"{' and '.join(roles)} are equal")
  return context, answers


def _value(row: dict, role: str, speakers):
  """Returns the text or the messages of a role, none of them empty."""
  value = row.get(role)
  if isinstance(value, (list, tuple)) and value:
    return turns.messages(value, speakers)
  if not isinstance(value, str) or not value.strip():
    raise errors.RowError(f"{role} is empty")
  return value


def _whole(known: list[dict], answer: list[dict]) -> list[dict]:
  """Returns the whole conversation of an answer, which may have the context in it."""
  return answer if answer[0]["role"] in ("system", "user") else [*known, *answer]


def _apart(whole: list[list[dict]], roles) -> tuple[list[dict], list]:
  """Returns what conversations begin with, and what each of them has behind it."""
  if len(whole) == 1:
    places = [k for k, message in enumerate(whole[0]) if message["role"] != "assistant"]
    count = places[-1] + 1 if places else 0
  else:
    same = [a == b for a, b in zip(*whole, strict=False)]
    count = same.index(False) if False in same else len(same)
    if whole[0] == whole[1]:
      raise errors.RowError(f"{' and '.join(roles)} are equal")
  if not count:
    raise errors.RowError(f"{' and '.join(roles)}: no common prompt; conversations have to begin "
                          "alike, or data.columns.prompt to name what they answer")
  answers = [messages[count:] for messages in whole]
  for role, answer in zip(roles, answers, strict=True):
    if not any(m["role"] == "assistant" and m["content"].strip() for m in answer):
      raise errors.RowError(f"{role} is empty: no turn of the assistant's behind the prompt")
  return whole[0][:count], answers


def _begin(answers: list[str], roles) -> tuple[str, list[str]]:
  """Returns what two texts begin with, up to a whole word, and what each has behind it."""
  if len(answers) == 1:
    raise errors.RowError("no prompt; name its column in data.columns.prompt")
  if answers[0].strip() == answers[1].strip():
    raise errors.RowError(f"{' and '.join(roles)} are equal")
  same = os.path.commonprefix(answers)
  cut = len(same[:max(map(same.rfind, " \n\t")) + 1].rstrip())
  if not cut:
    raise errors.RowError(f"{' and '.join(roles)}: no common prompt; texts have to begin alike, or "
                          "data.columns.prompt to name what they answer")
  for role, answer in zip(roles, answers, strict=True):
    if not answer[cut:].strip():
      raise errors.RowError(f"{role} is empty: nothing behind the prompt")
  return same[:cut], [answer[cut:] for answer in answers]
