"""Preference pairs made of conversations, for want of people's: the true reply against a wrong one.

Of each conversation one reply is taken, drawn by the seed. Where it repeats names or numbers that
were said before, the wrong one is the same reply with one of them exchanged for one of the same
kind from another conversation ("corrupted"); else it is a reply of about the same length that
stands in another conversation ("elsewhere"). Both can be told from the true one by the context
alone. Nobody was asked: what a model learns of them is to stay with the facts of a conversation and
to its subject, and nothing of taste.
"""

import bisect
import json
import pathlib
import random
import re
from collections.abc import Iterator

from ft import errors, workdir
from ft.data import formats
from ft.tasks import chat
from ft.weights import resolve

NEAREST = 20  # replies of like length, of which one is drawn
TRIES = 50  # draws of a value that stands nowhere in the conversation


def write(file, source: str, column: str, speaker: str, rows: int = 0, seed: int = 0) -> int:
  """Writes the pairs of a source of conversations to a JSONL file; returns how many there are.

  Args:
    file: to be made.
    source: file of rows with conversations.
    column: that has the turns.
    speaker, seed: see `pairs`.
    rows: how many of its first rows; 0: all.

  Raises:
    UserError: no such source or column, or see `pairs`.
  """
  table = formats.read(resolve.resolve(source), formats.Options(display=source))
  if column not in table.columns:
    raise errors.UserError(f"{source}: no column {column!r}{errors.suggest(column, table.columns)};"
                           f" its columns are {', '.join(table.columns)}")
  made = list(pairs([record[column] for record in table.records[:rows or None]], speaker, seed))
  file = pathlib.Path(file)
  file.parent.mkdir(parents=True, exist_ok=True)
  workdir.write_atomic(file, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in made))
  return len(made)


def pairs(conversations: list[list], speaker: str, seed: int = 0) -> Iterator[dict]:
  """Yields {"conversation", "prompt", "chosen", "rejected", "kind"}, at most one a conversation.

  prompt, chosen and rejected are lists of turns [speaker, text]; conversation is its number.

  Args:
    conversations: lists of turns, [speaker, text] or {"role", "content"}.
    speaker: whose replies are compared, as the turns call them.
    seed: of what is drawn.

  Raises:
    UserError: the speaker replies nowhere, or in one conversation only.
  """
  rng = random.Random(seed)
  talks = [[_turn(turn) for turn in turns] for turns in conversations]
  replies = [(len(text), number, text) for number, turns in enumerate(talks)
             for k, (who, text) in enumerate(turns) if k and who == speaker and text.strip()]
  if len({number for _, number, _ in replies}) < 2:
    known = sorted({who for turns in talks for who, _ in turns})
    raise errors.UserError(f"--speaker={speaker}: replies in fewer than two conversations"
                           f"{errors.suggest(speaker, known)}; who speaks: {', '.join(known)}")
  replies.sort()
  values = {}
  for value in sorted({value for *_, text in replies for value in _values(text)}):
    values.setdefault(_kind(value), []).append(value)
  for number, turns in enumerate(talks):
    places = [k for k, (who, text) in enumerate(turns) if k and who == speaker and text.strip()]
    if not places:
      continue
    place = rng.choice(places)
    text, before = turns[place][1], " ".join(said for _, said in turns[:place])
    wrong, kind = _corrupted(text, before, values, rng), "corrupted"
    if wrong is None:
      wrong, kind = _elsewhere(text, number, replies, rng), "elsewhere"
    if wrong is not None:
      yield {"conversation": number, "prompt": turns[:place], "chosen": [[speaker, text]],
             "rejected": [[speaker, wrong]], "kind": kind}


def _turn(turn) -> list[str]:
  return [turn["role"], turn["content"]] if isinstance(turn, dict) else list(turn)


def _values(text: str) -> list[str]:
  """Returns the names and numbers of a reply, as task.name=chat counts them."""
  return sorted(chat.values_in(text))


def _kind(value: str) -> str:
  """Returns what values that can stand for each other share: letters, digits, signs in order."""
  return re.sub(r"\d+", "0", re.sub(r"[^\W\d]+", "a", value))


def _corrupted(text: str, before: str, values, rng: random.Random) -> str | None:
  """Returns a reply with a value that was said before exchanged for another of its kind."""
  said = [value for value in _values(text) if _has(before, value)]
  rng.shuffle(said)
  for value in said:
    for other in rng.choices(values[_kind(value)], k=TRIES):
      if not _has(before, other) and not _has(text, other):
        return re.sub(_whole(value), lambda _, new=other: new, text)
  return None


def _whole(value: str) -> str:
  return rf"(?<!\w){re.escape(value)}(?!\w)"


def _has(text: str, value: str) -> bool:
  return re.search(_whole(value), text) is not None


def _elsewhere(text: str, number: int, replies, rng: random.Random) -> str | None:
  """Returns one of the replies of other conversations that are nearest in length."""
  at = bisect.bisect(replies, (len(text),))
  about = replies[max(0, at - 2 * NEAREST):at + 2 * NEAREST]
  others = {other for _, where, other in about if where != number and other != text}
  near = sorted(others, key=lambda other: (abs(len(other) - len(text)), other))[:NEAREST]
  return rng.choice(near) if near else None
