"""Every key is declared, checked and explained; a wrong one is named with the right one."""

import subprocess
import sys
import time

import pytest

from ft import config, errors


def write(path, body):
  path.write_text(f"def get_config(size='small'):\n  return {body}\n")
  return str(path)


def test_defaults_are_filled_and_overrides_win(tmp_path):
  name = write(tmp_path / "c.py", "{'tune': {'method': 'freeze'}, 'optim': {'rate': 1e-4}}")
  c = config.load(name, [("optim.rate", "3e-5"), ("tune.method", "lora"), ("tune.rank", "4")])
  assert (c.optim.rate, c.tune.method, c.tune.rank) == (3e-5, "lora", 4)
  assert c.train.batch == config.schema()["train.batch"][0]


def test_words_after_the_colon_are_arguments(tmp_path):
  name = write(tmp_path / "c.py", "{'title': size}")
  assert config.load(name + ":size=large").title == "large"
  with pytest.raises(errors.UserError, match="siez"):
    config.load(name + ":siez=large")


@pytest.mark.parametrize(
  "key,text,says",
  [
    ("optim.ratee", "1", "optim.rate"),
    ("batch", "8", "train.batch"),
    ("tune.rank", "8", "nothing reads it with tune.method=full"),
    ("train.batch", "many", "expected int"),
    ("train.batch", "0", "from 1"),
    ("train.baselines", "perhaps", "expected bool"),
    ("tune.method", "loraa", "lora"),
    ("task.name", "clasify", "classify"),
  ],
)
def test_wrong_keys_and_values_are_named(tmp_path, key, text, says):
  name = write(tmp_path / "c.py", "{}")
  with pytest.raises(errors.UserError) as raised:
    config.load(name, [(key, text)])
  assert key in str(raised.value) and says in str(raised.value)


def test_dictionaries_take_single_entries(tmp_path):
  name = write(tmp_path / "c.py", "{'data': {'columns': {'text': 'review'}}}")
  c = config.load(name, [("data.columns.label", "stars")])
  assert dict(c.data.columns) == {"text": "review", "label": "stars"}


def test_json_round_trip_and_difference(tmp_path):
  c = config.load(write(tmp_path / "c.py", "{'data': {'columns': {'text': 'review'}}}"))
  again = config.from_json(config.to_json(c))
  assert config.to_json(again) == config.to_json(c)
  changed = config.to_json(config.load(str(tmp_path / "c.py"), [("seed", "3")]))
  assert config.difference(config.to_json(c), changed) == ["seed: 0 -> 3"]


def test_missing_file_names_what_there_is(tmp_path):
  write(tmp_path / "spam.py", "{}")
  with pytest.raises(errors.UserError, match="spam.py"):
    config.load(str(tmp_path / "spma.py"))


def test_help_answers_in_a_second_and_lists_every_key():
  began = time.monotonic()
  out = subprocess.run(
    [sys.executable, "scripts/train.py", "--help"], capture_output=True, text=True, check=True
  ).stdout
  seconds = time.monotonic() - began
  assert all(f"--config.{key}=" in out for key in config.schema())
  assert seconds < 3  # under one second on an idle machine; slack for a busy one
