"""Probes of stereotypes: tables by hand, the published files, and a tiny model asked by itself."""

import json
import types

import numpy as np
import pytest
from language_models import log_probs
from scipy import stats
from tasks import text_models

from ft import config, errors, guards, language_bias, train
from ft.card.evidence import bias as page
from ft.guards import bias


def row_of(rows, measure, group="all"):
  one, = [row for row in rows if row["measure"] == measure and row["group"] == group]
  return one


# ---- By hand -------------------------------------------------------------------------------------

PAIR = "stereotyping sentence likelier"


def test_pairs_are_counted_by_type_whatever_their_direction():
  records = [{"sent_more": f"more {i}", "sent_less": f"less {i}", "bias_type": kind,
              "stereo_antistereo": way}
             for i, (kind, way) in enumerate([("age", "stereo"), ("age", "antistereo"),
                                              ("religion", "stereo"), ("religion", "stereo")])]
  items = language_bias.crows_pairs(records)
  assert items[1].texts == ("more 1", "less 1")
  base = [[-1, -2], [-3, -2], [-5, -5], [-1, -9]]  # a tie is no stereotype
  tuned = [[-1, -2], [-1, -2], [-4, -5], [-1, -9]]
  rows = language_bias.measures("crows_pairs", items, base, tuned)
  found = row_of(rows, PAIR)
  assert (found["n"], found["before"], found["after"], found["difference"]) == (4, 0.5, 1.0, 0.5)
  want = stats.binomtest(2, 4).proportion_ci(method="wilson")
  assert found["before_interval"] == pytest.approx([want.low, want.high])
  assert found["even"] == 0.5 and found["few"]
  assert row_of(rows, PAIR, "age")["before"] == 0.5
  assert row_of(rows, PAIR, "religion")["difference"] == 0.5


def question(polarity, context, label, stereotyped="old", number=1):
  return {"question_index": str(number), "question_polarity": polarity, "category": "Age",
          "context_condition": context, "context": "c", "question": "q?", "label": label,
          "answer_info": {"ans0": ["grandfather", "old"], "ans1": ["grandson", "nonOld"],
                          "ans2": ["Unknown", "unknown"]},
          "additional_metadata": {"stereotyped_groups": [stereotyped]},
          "ans0": "The grandfather", "ans1": "The grandson", "ans2": "Unknown"}


def picking(answers):
  table = np.full((len(answers), 3), -9.0)
  table[np.arange(len(answers)), answers] = -1.0
  return table


def test_the_bias_scores_are_those_of_the_paper():
  records = [question("neg", "ambig", 2), question("nonneg", "ambig", 2),
             question("neg", "ambig", 2), question("neg", "ambig", 2),
             question("neg", "disambig", 0), question("nonneg", "disambig", 0),
             question("neg", "disambig", 1), question("nonneg", "disambig", 1)]
  items = language_bias.bbq(records)
  assert [item.facts["biased"] for item in items] == [0, 1, 0, 0, 0, 1, 0, 1]
  assert items[0].texts[1] == "Context: c\n\nQuestion: q?\n\nAnswer: The grandson"
  # Ambiguous: in line, in line, against, unknown. Disambiguated: in line three times, unknown.
  base = picking([0, 1, 1, 2, 0, 1, 0, 2])
  tuned = picking([2, 2, 2, 2, 0, 0, 1, 1])  # always right
  rows = language_bias.measures("bbq", items, base, tuned)
  ambiguous = row_of(rows, "bias score, ambiguous context")
  assert ambiguous["before"] == pytest.approx((1 - 1 / 4) * (2 * 2 / 3 - 1))
  assert ambiguous["after"] == 0 and ambiguous["even"] == 0
  clear = row_of(rows, "bias score, disambiguated context")
  assert clear["before"] == 1 and clear["after"] == 2 * 2 / 4 - 1
  assert clear["difference"] == -1
  right = row_of(rows, "accuracy, disambiguated context")
  assert (right["before"], right["after"], right["n"]) == (0.25, 1.0, 4)
  assert row_of(rows, "accuracy, ambiguous context")["before"] == 0.25
  assert json.dumps(rows, allow_nan=False)


def test_rows_that_name_no_stereotyped_answer_are_in_no_bias_score():
  items = language_bias.bbq([question("neg", "disambig", 0, "tall"),
                             question("neg", "disambig", 0)])
  assert items[0].facts["biased"] is None
  rows = language_bias.measures("bbq", items, picking([0, 1]), picking([0, 2]))
  found = row_of(rows, "bias score, disambiguated context")
  assert found["before"] == -1 and found["after"] is None  # nothing that counts was said
  assert row_of(rows, "accuracy, disambiguated context")["before"] == 0.5


def pronouns(occupation, other, answer):
  return [{"sentid": f"{occupation}.{other}.{answer}.{gender}.txt", "sentence": f"{word} works"}
          for gender, word in (("male", "he"), ("female", "she"), ("neutral", "they"))]


def test_only_pronouns_of_the_occupation_count():
  items = language_bias.winogender([*pronouns("nurse", "patient", 0), *pronouns("nurse", "you", 0),
                                    *pronouns("nurse", "patient", 1), *pronouns("cook", "me", 0)])
  assert [item.group for item in items] == ["nurse", "nurse", "cook"]
  assert items[0].texts == ("he works", "she works", "they works")
  base = [[-3, -1, -2], [-4, -3, -1], [-1, -2, -3]]
  tuned = [[-1, -3, -2], [-4, -3, -5], [-1, -2, -3]]
  rows = language_bias.measures("winogender", items, base, tuned)
  found = row_of(rows, "“he” likelier than “she”")
  assert (found["before"], found["after"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
  assert row_of(rows, "“they” likelier than both")["before"] == pytest.approx(1 / 3)
  apart = row_of(rows, "log p(he) − log p(she), nats", "nurse")
  assert (apart["n"], apart["before"], apart["after"]) == (2, -1.5, 0.5)


# ---- The published files -------------------------------------------------------------------------


def test_the_published_files_are_read(shared):
  pairs = language_bias.read("crows_pairs", str(shared / "data/bias-crows-pairs"))
  assert len(pairs) == 1508 and len({item.group for item in pairs}) == 9
  assert sum(item.group == "race-color" for item in pairs) == 516  # as the paper counts
  sentences = language_bias.read("winogender",
                                 str(shared / "data/bias-winogender/all_sentences.tsv"))
  assert len(sentences) == 120 and len({item.group for item in sentences}) == 60


def test_planted_answers_to_all_questions_have_the_scores_that_follow(shared):
  items = language_bias.read("bbq", str(shared / "data/bias-bbq/Age.jsonl"))
  assert len(items) == 3680 and all(item.facts["biased"] is not None for item in items)
  clear = [item for item in items if not item.facts["ambiguous"]]
  facts = {key: np.array([item.facts[key] for item in clear]) for key in ("label", "biased")}
  score = lambda chosen: language_bias.bias_score(  # noqa: E731
    language_bias.biased_answers(clear, chosen), False)
  assert score(facts["biased"]) == 1
  # The right answer is in line with the stereotype in half of the questions.
  assert score(facts["label"]) == 0
  vague = [item for item in items if item.facts["ambiguous"]]
  answers = language_bias.biased_answers(vague, np.array([i.facts["biased"] for i in vague]))
  assert language_bias.bias_score(answers, True) == 1 and not answers["right"].any()


@pytest.mark.parametrize("name, content, reason", [
  ("crows", "a,b\n1,2\n", "there is no probe 'crows'.*crows_pairs"),
  ("crows_pairs", "a,b\n1,2\n", "not written as crows_pairs was published.*sent_more"),
  ("winogender", "sentid,sentence\nnurse,x\n", "not written as winogender"),
  ("crows_pairs", None, "no such")])
def test_what_is_no_probe_is_said(name, content, reason, tmp_path):
  path = tmp_path / "rows.csv"
  if content:
    path.write_text(content)
  with pytest.raises(errors.UserError, match=reason):
    language_bias.read(name, str(path))


def test_a_folder_without_files_is_said(tmp_path):
  with pytest.raises(errors.UserError, match="no CSV, TSV or JSONL"):
    language_bias.read("bbq", str(tmp_path))


# ---- A tiny model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
  """A run of a tiny language model with pairs of which it is asked; one is too long for it."""
  folder = tmp_path_factory.mktemp("probes")
  text_models.export(folder / "model", "llama")
  rng = np.random.default_rng(0)
  words = text_models.WORDS[9:]
  lines = [" ".join(rng.choice(words, rng.integers(4, 9))) for _ in range(60)]
  (folder / "train.txt").write_text("\n".join(lines))
  pairs = [[" ".join(rng.choice(words, 6)) for _ in range(2)] for _ in range(40)]
  pairs.append([" ".join(rng.choice(words, 20)), "the film"])
  (folder / "pairs.csv").write_text("sent_more,sent_less,bias_type\n" + "\n".join(
    f"{more},{less},{'age' if i % 2 else 'religion'}" for i, (more, less) in enumerate(pairs)))
  values = {
    "model": {"source": str(folder / "model")}, "optim": {"rate": 0.02},
    "data": {"train": str(folder / "train.txt"), "max_length": 16, "buckets": (8,)},
    "task": {"name": "lm"}, "train": {"batch": 8, "steps": 10, "eval_every": 10,
                                      "train_sample": 0},
    "guard": {"forget": {"on": False}, "overfit": {"resamples": 100},
              "bias": {"probes": {"crows_pairs": str(folder / "pairs.csv"),
                                  "bbq": str(folder / "pairs.csv")}}}}
  path = folder / "probes.py"
  path.write_text(f"def get_config():\n  return {values!r}\n")
  return folder, pairs[:40], train.train(config.load(str(path)), folder / "run")


def likelihood(folder, sentence):
  ids, known = log_probs(folder, sentence)
  return known[np.arange(len(ids) - 1), ids[1:]].sum()


def test_both_models_are_asked_the_same_pairs(asked):
  folder, pairs, record = asked
  found = record["guards"]["bias"]
  probe, = found["numbers"]["probes"]
  assert (probe["n"], probe["left_out"]) == (40, 1)
  row = row_of(probe["measures"], PAIR)
  for name, key in (("model", "before"), ("run/model", "after")):
    want = np.mean([likelihood(folder / name, more) > likelihood(folder / name, less)
                    for more, less in pairs])
    assert row[key] == pytest.approx(want)
  assert row["interval"][0] <= row["difference"] <= row["interval"][1]
  assert row_of(probe["measures"], PAIR, "age")["n"] == 20
  assert "CrowS-Pairs" in found["words"] and found["verdict"] in ("ok", "warning")
  assert any("not written as bbq" in reason for reason in found["numbers"]["missing"])
  assert "CrowS-Pairs: before and after tuning" in (folder / "run" / "card.html").read_text()


# ---- Verdicts ------------------------------------------------------------------------------------


def judged(difference, lo, hi, before=0.55, n=100):
  row = {"measure": PAIR, "group": "all", "n": n, "few": n < 30, "before": before,
         "before_interval": [0.5, 0.6], "after": before + difference, "after_interval": [0.5, 0.8],
         "difference": difference, "interval": [lo, hi], "even": 0.5}
  gathered = {"probes": [{"probe": "CrowS-Pairs", "source": "x", "n": n, "left_out": 0,
                          "measures": [row]}], "missing": []}
  return bias.measure(guards.defaults("bias"), guards.Evidence(gathered={"bias": gathered}))


@pytest.mark.parametrize("change, verdict", [
  ((0.1, 0.05, 0.15), "warning"), ((0.1, -0.05, 0.25), "ok"), ((0.02, 0.01, 0.03), "ok"),
  ((-0.05, -0.08, -0.02), "ok"), ((-0.2, -0.3, -0.1), "warning"), ((0.1, 0.05, 0.15, 0.55, 20),
                                                                   "ok")])
def test_going_away_from_even_makes_the_verdict(change, verdict):
  found = judged(*change)
  assert found["verdict"] == verdict
  assert "55.0 % before tuning" in found["words"] and "n = " in found["words"]
  assert PAIR in str(page.section(found["numbers"], {}))


def test_a_model_that_is_no_language_model_loses_the_probes_alone():
  run = types.SimpleNamespace(pretrained=types.SimpleNamespace(
    family="bert", config=types.SimpleNamespace(head="labels")))
  made = guards.defaults("bias")
  assert bias.gather(made, None) == {}
  made.probes = {"bbq": "nowhere"}
  found = bias.gather(made, types.SimpleNamespace(run=run))
  assert found["probes"] == [] and "causal language models" in found["missing"][0]
  truth = np.arange(100) % 2
  outputs = {"logits": np.eye(2)[truth], "label": truth, "index": np.arange(100)}
  measured = bias.measure(made, guards.Evidence(
    metric="accuracy", outputs={"test": {guards.TUNED: outputs}}, gathered={"bias": found},
    score=lambda out: np.ones(len(out["label"])), labels=("a", "b")))
  assert measured["verdict"] == "ok" and "causal language models" in measured["words"]
  alone = bias.measure(made, guards.Evidence(gathered={"bias": found}))
  assert alone["verdict"] == "not measured"
  assert "causal language models" in str(page.section(alone["numbers"], {}))
