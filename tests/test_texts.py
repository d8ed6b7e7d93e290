"""Scores of texts: sacrebleu's and rouge-score's own, also of resamples; glossaries; leads."""

import numpy as np
import pytest

from ft import errors, stats, texts

sacrebleu = pytest.importorskip("sacrebleu")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

SOURCES = ["Ein Hund läuft.", "Zwei Männer sitzen dort. Sie reden!\nEin Kind schläft", "Der Wagen"]
TARGETS = ["A dog is running.", "Two men are sitting there and talking.", "The red car."]
TEXTS = ["A dog runs.", "Two men are sitting there talking, the men.", ""]


@pytest.fixture(scope="module")
def measures():
  return texts.Measures(texts.SCORES)


def test_values_are_the_libraries_own(measures):
  statistics = measures.statistics(SOURCES, TARGETS, TEXTS)
  found = measures.values(statistics)
  assert found["bleu"] == pytest.approx(sacrebleu.BLEU().corpus_score(TEXTS, [TARGETS]).score)
  assert found["chrf"] == pytest.approx(sacrebleu.CHRF().corpus_score(TEXTS, [TARGETS]).score)
  scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
  for ours, theirs in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rouge_l", "rougeL")):
    want = np.mean([scorer.score(a, b)[theirs].fmeasure
                    for a, b in zip(TARGETS, TEXTS, strict=True)])
    assert found[ours] == pytest.approx(want)
  assert found["length_ratio"] == pytest.approx((3 + 8 + 0) / (4 + 7 + 3))
  assert found["novel_bigrams"] == 1.0  # no two words of German come up
  assert "terms_kept" not in found


def test_a_resample_has_the_value_of_its_texts(measures):
  statistics = measures.statistics(SOURCES, TARGETS, TEXTS)
  rows = [1, 1, 0]
  chosen = {key: value[rows] for key, value in statistics.items()}
  pick = lambda values: [values[i] for i in rows]  # noqa: E731
  assert measures.value("bleu", chosen) == pytest.approx(
    sacrebleu.BLEU().corpus_score(pick(TEXTS), [pick(TARGETS)]).score)
  assert measures.value("chrf", chosen) == pytest.approx(
    sacrebleu.CHRF().corpus_score(pick(TEXTS), [pick(TARGETS)]).score)
  other = measures.statistics(SOURCES, TARGETS, TARGETS)
  value = lambda part: measures.value("chrf", part)  # noqa: E731
  difference, low, high = stats.paired_bootstrap_metric(value, other, statistics, n=100)
  assert difference == pytest.approx(100 - measures.value("chrf", statistics))
  assert 0 < low <= high <= 100


def test_signatures_are_the_libraries_own(measures):
  found = measures.signatures()
  bleu = sacrebleu.BLEU()
  bleu.corpus_score(TEXTS, [TARGETS])
  assert found["bleu"] == str(bleu.get_signature())
  assert "rouge-score" in found["rouge"] and "stemming on" in found["rouge"]


def test_another_tokenizer_is_another_score():
  plain, characters = (texts.Measures(("bleu",), tokenizer=name) for name in ("13a", "char"))
  values = [m.value("bleu", m.statistics(SOURCES, TARGETS, TEXTS)) for m in (plain, characters)]
  assert values[1] == pytest.approx(
    sacrebleu.BLEU(tokenize="char").corpus_score(TEXTS, [TARGETS]).score)
  assert values[0] != pytest.approx(values[1])
  assert plain.names == ["bleu"]


def test_terms_of_a_glossary(tmp_path):
  file = tmp_path / "terms.tsv"
  file.write_text("hund\tdog\nMänner\tgentlemen\nWagen\tcar\n\nKatze\tcat\n")
  made = texts.Measures((), glossary=texts.glossary(str(file)))
  found = made.values(made.statistics(SOURCES, TARGETS, ["A dog.", "The gentlemen", "A carpet"]))
  assert found["terms_kept"] == pytest.approx(2 / 3)  # a carpet is no car
  for content, message in (("hund dog\n", "line 1: expected a source term"), ("", "no terms")):
    file.write_text(content)
    with pytest.raises(errors.UserError, match=message):
      texts.glossary(str(file))
  with pytest.raises(errors.UserError, match="cannot be read"):
    texts.glossary(str(tmp_path / "absent.tsv"))


def test_leads_are_the_first_sentences():
  assert texts.Lead(2)(SOURCES[1]) == "Zwei Männer sitzen dort. Sie reden!"
  assert texts.Lead(9)(SOURCES[1]) == "Zwei Männer sitzen dort. Sie reden! Ein Kind schläft"
  assert texts.Lead(0)(SOURCES[1]) == SOURCES[1]
  assert (texts.Lead(3).name, texts.Lead(0).name) == ("lead-3", "copy-source")


def test_novelty_counts_pairs_of_words(measures):
  statistics = measures.statistics(["the old man sat"], ["x"], ["The old dog sat down"])
  assert statistics["ngrams"].tolist() == [[3, 4]]
  assert measures.values(statistics)["novel_bigrams"] == pytest.approx(3 / 4)


def test_statistics_of_some_rows_are_spread_over_all():
  full = texts.spread([2, 5, 7], [2, 7], {"words": np.array([[1, 2], [3, 4]])})
  assert full["generated"].tolist() == [1, 0, 1]
  assert full["words"].tolist() == [[1, 2], [0, 0], [3, 4]]


def test_unknown_scores_are_named():
  with pytest.raises(errors.UserError, match="no 'rogue'.*did you mean 'rouge'"):
    texts.Measures(("rogue",))
