"""README says what is there: its key table is the schema, its commands and files exist."""

import pathlib
import re

from ft import config, models

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_key_table_is_the_schema():
  """`python -m ft.config` prints the table anew."""
  assert config.table(markdown=True) in README


def test_every_script_config_and_family_is_named():
  for path in (ROOT / "scripts").glob("*.py"):
    assert f"scripts/{path.name}" in README
  for path in (ROOT / "configs").glob("*.py"):
    assert f"configs/{path.name}" in README
  for family in models.families():
    assert f"`{family}.py`" in README


def test_every_file_that_is_named_exists():
  for name in set(re.findall(r"`((?:ft|configs|scripts|third_party)/[\w/.]+)`", README)):
    assert (ROOT / name).exists(), name


def test_ci_finds_the_test_command():
  pattern = r"^pip install -e '\.\[test\]' && pytest"
  assert len(re.findall(pattern, README, re.M)) == 1


def test_the_story_is_short_and_names_no_modality():
  story = (ROOT / "ft" / "train.py").read_text()
  assert len(story.splitlines()) < 400
  assert not re.search(r"\b(bert|efficientnet|classify|text|image|token\w*|pixel\w*)\b", story)
