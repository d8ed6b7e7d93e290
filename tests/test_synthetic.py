"""Synthetic pairs: which reply is taken, and how the wrong one is made."""

import json

import pytest

from ft import errors, synthetic

TALKS = [
  [["USER", "A table at Sino for 2."], ["SYSTEM", "Booked at Sino for 2."]],
  [["USER", "A table at Bazille for 6."], ["SYSTEM", "Booked at Bazille for 6."]],
  [["USER", "thanks"], ["SYSTEM", "bye then"]],
]


def test_what_was_said_before_is_exchanged_for_its_like():
  first, second, third = synthetic.pairs(TALKS, "SYSTEM")
  assert first["prompt"] == TALKS[0][:1]
  assert first["chosen"] == [["SYSTEM", "Booked at Sino for 2."]]
  assert first["kind"] == second["kind"] == "corrupted"
  assert first["rejected"][0][1] in ("Booked at Bazille for 2.", "Booked at Sino for 6.")
  assert second["rejected"][0][1] in ("Booked at Sino for 6.", "Booked at Bazille for 2.")
  assert third["kind"] == "elsewhere" and third["rejected"][0][1].startswith("Booked at")
  assert list(synthetic.pairs(TALKS, "SYSTEM")) == [first, second, third]


def test_files_and_what_is_wrong_with_them(tmp_path):
  source = tmp_path / "talks.jsonl"
  source.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in TALKS))
  assert synthetic.write(tmp_path / "new" / "pairs.jsonl", str(source), "turns", "SYSTEM", 2) == 2
  lines = (tmp_path / "new" / "pairs.jsonl").read_text().splitlines()
  assert [json.loads(line)["conversation"] for line in lines] == [0, 1]
  with pytest.raises(errors.UserError, match="no column 'turn' .did you mean 'turns'"):
    synthetic.write(tmp_path / "x", str(source), "turn", "SYSTEM")
  with pytest.raises(errors.UserError, match="fewer than two conversations.*SYSTEM, USER"):
    list(synthetic.pairs(TALKS, "assistant"))
