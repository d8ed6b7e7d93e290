"""Error rates of transcripts, by jiwer, of texts that are made alike first.

Rules of making alike, those of Whisper's normalisers (Radford et al. 2022, appendix C):

    basic     lower case; without [noises] and (remarks); symbols and punctuation become spaces
    english   that, without fillers (um, uh) and diacritics too; contractions and titles are spelt
              out. Numbers stay as they are written, and so do British spellings: the published
              rules change those, too
    none      white space only

Shapes: N texts.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ft import errors

RULES = ("english", "basic", "none")
METRICS = ("wer", "cer")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STATISTICS = ("words", "letters")  # names that `Measures.statistics` gives
_FILLERS = r"\b(hmm|mm|mhm|mmm|uh|um)\b"
_TITLES = {
  "mr": "mister", "mrs": "missus", "st": "saint", "dr": "doctor", "prof": "professor",
  "capt": "captain", "gov": "governor", "ald": "alderman", "gen": "general", "sen": "senator",
  "rep": "representative", "pres": "president", "rev": "reverend", "hon": "honorable",
  "asst": "assistant", "assoc": "associate", "lt": "lieutenant", "col": "colonel", "jr": "junior",
  "sr": "senior", "esq": "esquire",
}
_SPELT_OUT = (
  (r"\bwon't\b", "will not"), (r"\bcan't\b", "can not"), (r"\blet's\b", "let us"),
  (r"\bain't\b", "aint"), (r"\by'all\b", "you all"), (r"\bwanna\b", "want to"),
  (r"\bgotta\b", "got to"), (r"\bgonna\b", "going to"), (r"\bi'ma\b", "i am going to"),
  (r"\bimma\b", "i am going to"), (r"\bwoulda\b", "would have"), (r"\bcoulda\b", "could have"),
  (r"\bshoulda\b", "should have"), (r"\bma'am\b", "madam"),
  *((rf"\b{short}\b", f"{long} ") for short, long in _TITLES.items()),
  (r"'d been\b", " had been"), (r"'s been\b", " has been"), (r"'d gone\b", " had gone"),
  (r"'s gone\b", " has gone"), (r"'d done\b", " had done"), (r"'s got\b", " has got"),
  (r"n't\b", " not"), (r"'re\b", " are"), (r"'s\b", " is"), (r"'d\b", " would"),
  (r"'ll\b", " will"), (r"'t\b", " not"), (r"'ve\b", " have"), (r"'m\b", " am"),
)
_LETTERS = {"œ": "oe", "ø": "o", "æ": "ae", "ß": "ss", "đ": "d", "ð": "d", "þ": "th", "ł": "l"}
_IN_NUMBERS = ".%$¢€£"


def normaliser(rules: str, spell_digits: bool = False) -> Callable[[str], str]:
  """Returns what makes texts alike.

  Args:
    rules: one of RULES.
    spell_digits: whether numbers of one digit become words, so that "7" and "seven" are the same.
  """
  function = {"english": english, "basic": basic, "none": str}[rules]

  def normalise(text: str) -> str:
    text = spelt(text) if spell_digits else text
    return " ".join(function(text).split())

  return normalise


def basic(text: str) -> str:
  """Returns a text of any language in Whisper's basic rules."""
  text = unicodedata.normalize("NFKC", _without_brackets(text.lower()))
  return "".join(" " if unicodedata.category(c)[0] in "MSP" else c for c in text).lower()


def english(text: str) -> str:
  """Returns an English text in Whisper's rules, but for numbers and British spellings."""
  text = re.sub(_FILLERS, "", _without_brackets(text.lower()))
  text = re.sub(r"\s+'", "'", text)
  for pattern, words in _SPELT_OUT:
    text = re.sub(pattern, words, text)
  text = re.sub(r"(\d),(\d)", r"\1\2", text)
  text = re.sub(r"\.([^0-9]|$)", r" \1", text)
  text = "".join(_plain(c) for c in unicodedata.normalize("NFKD", text))
  text = re.sub(r"[.$¢€£]([^0-9])", r" \1", text)
  return re.sub(r"([^0-9])%", r"\1 ", text)


def spelt(text: str) -> str:
  """Returns a text with its numbers of one digit as English words."""
  return re.sub(r"(?<![\w.,])\d(?![\w]|[.,]\d)", lambda match: DIGITS[int(match[0])], text)


class Measures:
  """Word and letter error rates of transcripts.

  Args:
    rules, spell_digits: see `normaliser`.

  Raises:
    UserError: jiwer is not installed.
  """

  def __init__(self, rules: str, spell_digits: bool):
    self._jiwer = errors.require("jiwer", "audio")
    self.normalise = normaliser(rules, spell_digits)
    self._stated = f"{rules} rules{', digits as words' if spell_digits else ''}"

  def statistics(self, targets: Sequence[str], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns {"words", "letters"}: (N, 4), substitutions, deletions, insertions, and the target's.

    Args:
      targets, texts: (N,) what was said, and what was written.
    """
    pairs = [(self.normalise(a), self.normalise(b)) for a, b in zip(targets, texts, strict=True)]
    found = {"words": [self._counts(self._jiwer.process_words, str.split, *p) for p in pairs],
             "letters": [self._counts(self._jiwer.process_characters, list, *p) for p in pairs]}
    return {name: np.array(rows, np.float64).reshape(-1, 4) for name, rows in found.items()}

  def _counts(self, process, cut, target: str, text: str) -> tuple:
    if not target:  # nothing was said that counts, and jiwer takes no empty target
      return 0, 0, len(cut(text)), 0
    out = process(target, text)
    return out.substitutions, out.deletions, out.insertions, len(cut(target))

  def values(self, statistics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns {"wer", "cer"}: errors over what was said, of the texts as one; and shares of words.

    word_substitutions, word_deletions and word_insertions add up to wer.
    """
    words = np.sum(statistics["words"], axis=0)
    kinds = zip(("substitutions", "deletions", "insertions"), words[:3], strict=True)
    return {**{name: self.value(name, statistics) for name in METRICS},
            **{f"word_{kind}": _ratio(count, words[3]) for kind, count in kinds}}

  def value(self, name: str, statistics: Mapping[str, np.ndarray]) -> float:
    """Returns one of METRICS; NaN where nothing was said."""
    total = np.sum(statistics["words" if name == "wer" else "letters"], axis=0)
    return _ratio(total[:3].sum(), total[3])

  def signatures(self) -> dict[str, str]:
    """Returns how the rates were computed."""
    from importlib import metadata

    return {"wer": f"jiwer {metadata.version('jiwer')}, {self._stated}"}


def _without_brackets(text: str) -> str:
  return re.sub(r"\(([^)]+?)\)", "", re.sub(r"[<\[][^>\]]*[>\]]", "", text))


def _plain(letter: str) -> str:
  if letter in _IN_NUMBERS:
    return letter
  if letter in _LETTERS:
    return _LETTERS[letter]
  kind = unicodedata.category(letter)
  return "" if kind == "Mn" else " " if kind[0] in "MSP" else letter


def _ratio(some, whole) -> float:
  return float(some / whole) if whole else float("nan")
