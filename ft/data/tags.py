"""Tags of words: the schemes in which they mark where an entity begins and ends.

bio (IOB2): B-X begins an entity of type X, I-X goes on with it, O is outside. iob1: B-X only where
one entity follows another of its type. bilou: B-X, I-X, L-X for first, inner and last words, U-X
for an entity of one word (Ratinov and Roth 2009).
"""

from collections.abc import Iterable

from ft import errors

PREFIXES = {"bio": "BI", "iob1": "BI", "bilou": "BILU"}


def words(value) -> list[str]:
  """Returns the words of a row; RowError where they are no list of text without line breaks."""
  if not isinstance(value, (list, tuple)) or not value:
    raise errors.RowError("no words: they should be a list, such as [\"Ada\", \"wrote\"]")
  for number, word in enumerate(value, 1):
    if not isinstance(word, str) or not word.strip():
      raise errors.RowError(f"word {number} is {word!r}, and should be a text")
  return list(value)


def check(given, labels, scheme: str) -> list[str]:
  """Returns a row's tags, iob1 as bio.

  Args:
    given: the row's words.
    labels: its labels, one a word.
    scheme: a key of PREFIXES, or "none".

  Raises:
    RowError: not as many labels as words, a label that is none of the scheme, or one in a place
      that the scheme forbids.
  """
  count = len(words(given))
  if not isinstance(labels, (list, tuple)) or len(labels) != count:
    number = len(labels) if isinstance(labels, (list, tuple)) else "no list of"
    raise errors.RowError(f"{count} words and {number} labels: each word should have one")
  found = [str(label) for label in labels]
  if scheme == "none":
    return found
  before = "O"
  for i, tag in enumerate(found):
    prefix, dash, kind = tag.partition("-")
    if tag != "O" and (prefix not in tuple(PREFIXES[scheme]) or not dash or not kind):
      raise errors.RowError(f"word {i + 1} has the label {tag!r}, which is not of task.scheme="
                            f"{scheme}: O, {', '.join(f'{p}-TYPE' for p in PREFIXES[scheme])}")
    if scheme == "iob1" and prefix == "I" and before.partition("-")[2] != kind:
      found[i] = tag = f"B-{kind}"
    elif not _follows(tag, before, scheme):
      hint = "; task.scheme=iob1 reads such labels" if scheme == "bio" else ""
      raise errors.RowError(f"word {i + 1} has the label {tag} after {before}, which "
                            f"task.scheme={scheme} forbids{hint}")
    before = tag
  if not _follows("O", before, scheme):
    raise errors.RowError(f"the last label is {before}, which task.scheme={scheme} forbids")
  return found


def _follows(tag: str, before: str, scheme: str) -> bool:
  """Whether a tag may stand behind another, or at a sentence's start behind O."""
  goes_on = tag[0] in ("I", "L") and tag != "O"
  if scheme == "bilou":
    inside = before[0] in ("B", "I") and before != "O"
    return goes_on == inside and (not inside or tag[1:] == before[1:])
  return not goes_on or (before != "O" and tag[1:] == before[1:])


def everything(seen: Iterable[str], scheme: str) -> list[str]:
  """Returns all tags there can be, O first: every prefix with every type that was seen."""
  if scheme == "none":
    return sorted(seen)
  kinds = sorted({tag.partition("-")[2] for tag in seen} - {""})
  return ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in PREFIXES[scheme])]
