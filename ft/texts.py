"""Metrics of generated texts: statistics of each, so that any resample of them has its value.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's, ROUGE (Lin 2004) is
rouge-score's. BLEU and chrF are no means over texts: their statistics are counts that are summed
first, as sacrebleu's own significance tests do. ROUGE is the mean of the F-measures of texts.
Shapes: N texts.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ft import errors

SCORES = ("bleu", "chrf", "rouge")
_ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rouge_l": "rougeL"}
STATISTICS = (*SCORES, "words", "ngrams", "terms")  # names that `Measures.statistics` gives
METRICS = ("bleu", "chrf", *_ROUGE)  # that a run can be judged by; more is better
_NGRAM = 2  # words of what counts as new


class Measures:
  """The metrics that a run computes of its texts.

  Args:
    scores: some of SCORES.
    tokenizer: sacrebleu's, of BLEU.
    stemming: whether ROUGE compares the stems of English words.
    glossary: source term -> target term.

  Raises:
    UserError: a library is not installed, or a score is unknown.
  """

  def __init__(self, scores: Sequence[str], tokenizer: str = "13a", stemming: bool = True,
               glossary: Mapping[str, str] | None = None):
    for name in scores:
      if name not in SCORES:
        raise errors.UserError(f"task.scores: there is no {name!r}{errors.suggest(name, SCORES)}; "
                               f"there are {', '.join(SCORES)}")
    self.scores = tuple(scores)
    self._terms = [(_term(a), _term(b)) for a, b in (glossary or {}).items()]
    self._corpus = {}
    if {"bleu", "chrf"} & {*scores}:
      library = errors.require("sacrebleu.metrics", "texts")
      if "bleu" in scores:
        self._corpus["bleu"] = library.BLEU(tokenize=tokenizer)
      if "chrf" in scores:
        self._corpus["chrf"] = library.CHRF()
    if "rouge" in scores:
      library = errors.require("rouge_score.rouge_scorer", "texts")
      self._rouge = library.RougeScorer([*_ROUGE.values()], use_stemmer=stemming)
      self._stemming = stemming

  def statistics(self, sources: Sequence[str], targets: Sequence[str],
                 texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns what the metrics are made of: name -> (N, …) float64.

    Args:
      sources, targets: (N,) what was read, and what should have been written.
      texts: (N,) what was written.
    """
    found = {name: np.array(metric._extract_corpus_statistics(texts, [targets]), np.float64)
             for name, metric in self._corpus.items()}
    if "rouge" in self.scores:
      found["rouge"] = np.array([self._rouge_of(*pair)
                                 for pair in zip(targets, texts, strict=True)])
    found["words"] = np.array([(len(text.split()), len(target.split()))
                               for text, target in zip(texts, targets, strict=True)], np.float64)
    found["ngrams"] = np.array([_new(*pair) for pair in zip(sources, texts, strict=True)],
                               np.float64)
    if self._terms:
      found["terms"] = np.array([self._kept(*pair) for pair in zip(sources, texts, strict=True)],
                                np.float64)
    return found

  def values(self, statistics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the metrics of texts with these statistics (N, …); NaN where there is nothing.

    bleu and chrf from 0 to 100; rouge1, rouge2 and rouge_l (F) from 0 to 1; length_ratio, words of
    the texts over those of the targets; novel_bigrams, the share of the texts' pairs of words that
    the source has not; terms_kept, of the glossary's terms in the sources the share whose
    translation is in the text.
    """
    found = {name: self.value(name, statistics) for name in self.names
             if _column(name)[0] in statistics}
    for name, column in (("length_ratio", "words"), ("novel_bigrams", "ngrams"),
                         ("terms_kept", "terms")):
      if column in statistics:
        some, all_of_it = np.sum(statistics[column], axis=0) if len(statistics[column]) else (0, 0)
        found[name] = float(some / all_of_it) if all_of_it else float("nan")
    return found

  @property
  def names(self) -> list[str]:
    """Those of METRICS that are computed."""
    return [name for name in METRICS if _column(name)[0] in self.scores]

  def value(self, name: str, statistics: Mapping[str, np.ndarray]) -> float:
    """Returns one of METRICS."""
    column, place = _column(name)
    rows = np.asarray(statistics[column])
    if not len(rows):
      return float("nan")
    if column == "rouge":
      return float(rows[:, place].mean())
    return float(self._corpus[column]._compute_score_from_stats(rows.sum(axis=0).tolist()).score)

  def signatures(self) -> dict[str, str]:
    """Returns how each score was computed, in its library's words."""
    found = {}
    for name, metric in self._corpus.items():
      metric.num_refs = 1  # what sacrebleu sets when it has read references
      found[name] = str(metric.get_signature())
    if "rouge" in self.scores:
      from importlib import metadata

      found["rouge"] = (f"rouge-score {metadata.version('rouge-score')}, F-measure, "
                        f"stemming {'on' if self._stemming else 'off'}")
    return found

  def _rouge_of(self, target: str, text: str) -> list[float]:
    found = self._rouge.score(target, text)
    return [found[name].fmeasure for name in _ROUGE.values()]

  def _kept(self, source: str, text: str) -> tuple[int, int]:
    due = [target for term, target in self._terms if term.search(source)]
    return sum(bool(target.search(text)) for target in due), len(due)


@dataclasses.dataclass(frozen=True)
class Lead:
  """The baseline of a source's first sentences, or of all of it.

  Attributes:
    sentences: how many; 0: all.
  """

  sentences: int

  @property
  def name(self) -> str:
    """What the baseline is called."""
    return f"lead-{self.sentences}" if self.sentences else "copy-source"

  def __call__(self, source: str) -> str:
    """Returns the text; a sentence ends with its line, or with . ! ? and white space."""
    if not self.sentences:
      return source
    parts = [part for part in re.split(r"(?<=[.!?])\s+|\n+", source) if part.strip()]
    return " ".join(part.strip() for part in parts[:self.sentences])


def glossary(path: str) -> dict[str, str]:
  """Reads a file of lines `source term<TAB>target term`; {} for no path.

  Raises:
    UserError: no such file, a line of another form, or no line.
  """
  if not path:
    return {}
  try:
    with open(path, encoding="utf-8-sig") as file:
      lines = [line.rstrip("\r\n") for line in file]
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f"task.glossary={path}: cannot be read: {error}") from None
  found = {}
  for number, line in enumerate(lines, 1):
    if line.strip():
      parts = [part.strip() for part in line.split("\t")]
      if len(parts) != 2 or not all(parts):
        raise errors.UserError(f"task.glossary={path}: line {number}: expected a source term, a "
                               f"tab and a target term, got {line[:60]!r}")
      found[parts[0]] = parts[1]
  if not found:
    raise errors.UserError(f"task.glossary={path}: holds no terms")
  return found


def spread(rows, index, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns arrays (N, …) of all rows from those of some, with "index" and "generated" (N,).

  Args:
    rows: (N,) sorted numbers of all rows.
    index: (n,) numbers of the rows that there is something of.
    arrays: name -> (n, …); the other rows get zeros.
  """
  rows, places = np.asarray(rows), np.searchsorted(rows, index)
  full = {"index": rows, "generated": np.zeros(len(rows), np.float32)}
  full["generated"][places] = 1
  for name, values in arrays.items():
    values = np.asarray(values)
    full[name] = np.zeros((len(rows), *values.shape[1:]), values.dtype)
    full[name][places] = values
  return full


def _column(name: str) -> tuple[str, int]:
  """Returns which statistics a metric is made of, and the place within."""
  return ("rouge", [*_ROUGE].index(name)) if name in _ROUGE else (name, 0)


def _new(source: str, text: str) -> tuple[int, int]:
  """Returns how many of a text's pairs of words its source has not, and how many there are."""
  known, made = ({*_pairs(source)}, _pairs(text))
  return sum(pair not in known for pair in made), len(made)


def _pairs(text: str) -> list[tuple]:
  words = re.findall(r"\w+", text.casefold())
  return [*zip(*(words[i:] for i in range(_NGRAM)), strict=False)]


def _term(text: str) -> re.Pattern:
  """Returns what finds a term as whole words, whatever their case."""
  words = r"\s+".join(map(re.escape, text.split()))
  return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
