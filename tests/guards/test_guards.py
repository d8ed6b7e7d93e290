"""How guards are run: each finds what it gathered, and the fault of one ends nothing."""

import types

import numpy as np
import pytest

from ft import contrastive, errors, guards
from ft.data import loader, packing
from ft.guards import amount, forget
from ft.guards import cost as cost_guard


def section(name, **given):
  return types.SimpleNamespace(**{**vars(guards.defaults(name)), **given})


def config(**given):
  return types.SimpleNamespace(**{name: section(name) for name in guards.names()} | given)


@pytest.fixture
def cost(monkeypatch):
  """The module of a guard to which a test adds a `gather`."""
  from ft.guards import cost

  monkeypatch.setattr(guards, "names", lambda: ["cost"])
  return lambda gather: monkeypatch.setattr(cost, "gather", gather, raising=False)


def test_what_is_gathered_reaches_the_evidence_by_name(cost):
  cost(lambda section, context: (section.wait, context))
  assert guards.gather(config(), "the run") == {"cost": (0.2, "the run")}


def test_what_is_missing_is_not_measured_with_the_reason(cost):
  def gather(section, context):
    raise guards.Missing("there is no text to ask about")

  cost(gather)
  evidence = guards.Evidence(cost={"examples": 1}, gathered=guards.gather(config(), None))
  assert guards.measure(None, evidence)["cost"] == {
      "verdict": "not measured", "words": "Not measured: there is no text to ask about.",
      "numbers": {}}


def test_a_fault_in_gather_ends_no_run(cost):
  cost(lambda section, context: 1 / 0)
  gathered = guards.gather(config(), None)
  found = guards.measure(None, guards.Evidence(cost={"examples": 1}, gathered=gathered))
  assert found["cost"]["verdict"] == "not measured"
  assert "ZeroDivisionError" in found["cost"]["words"]


def test_a_signal_while_the_model_is_asked_stops_the_run(cost):
  def gather(section, context):
    raise errors.Preempted("SIGTERM")

  cost(gather)
  with pytest.raises(errors.Preempted):
    guards.gather(config(), None)


def test_a_guard_that_is_off_is_not_asked(cost):
  cost(lambda section, context: 1 / 0)
  assert guards.gather(config(cost=section("cost", on=False)), None) == {}


def test_only_the_guards_asked_for_are_measured():
  assert guards.measure(None, guards.Evidence(), ["overfit"]).keys() == {"overfit"}


# ---- What steps went over ------------------------------------------------------------------------

LENGTHS = [3, 5, 2, 7, 4, 6]
PAD = {"input_ids": 0, "attention_mask": 0}


def context(training, examples):
  """A finished run of four steps of two examples of what `training` makes of the rows."""
  train = types.SimpleNamespace(batch=2, steps=4, epochs=1.0)
  run = types.SimpleNamespace(
      task=types.SimpleNamespace(training=training), preprocess=types.SimpleNamespace(tokenizer=1),
      pretrained=types.SimpleNamespace(config=None), config=types.SimpleNamespace(train=train))
  return guards.Context(run, {"train": examples}, types.SimpleNamespace(
      trainable={}, frozen={}, plain=dict, only_head=False), None, {})


def texts(lengths):
  made = [{"input_ids": np.ones(n, np.int32), "attention_mask": np.ones(n, np.int32)}
          for n in lengths]
  return loader.from_examples(made, types.SimpleNamespace(
      pad=PAD, length=lambda example: len(example["input_ids"])))


def paired(examples):
  return contrastive.Pairs(examples, np.array([0, 1, 2]), np.array([3, 3, 5]), PAD)


@pytest.mark.parametrize("training, count, rows, tokens", [
    (lambda part: part, 6, 1, 27 / 6),
    (lambda part: packing.pack(part, PAD, 9), 3, 2, 9),  # 27 tokens fill three rows of nine
    (paired, 3, 2, (3 + 7 + 5 + 7 + 2 + 6) / 3)])
def test_rows_and_tokens_are_those_that_steps_went_over(training, count, rows, tokens):
  made = context(training, texts(LENGTHS))
  assert len(made.training) == count
  assert made.rows_each == rows and made.tokens_each == pytest.approx(tokens)
  assert cost_guard.gather(None, made)["tokens_per_example"] == pytest.approx(tokens)
  assert amount.gather(None, made) == {"batch": 2 * rows, "rows": 6}
  most = types.SimpleNamespace(rows=10**9, share=100.0)
  assert forget._limit(most, made) == 100 * 1.5 * 4 * 2 * rows
  assert forget._limit(most, made, tokens=3) == pytest.approx(100 * 1.5 * 4 * 2 * tokens / 3, abs=1)


def test_texts_side_by_side_are_counted_without_what_fills_them_up():
  sides = [contrastive.side_by_side([texts([a])[0], texts([b])[0]], PAD)
           for a, b in ((3, 9), (4, 4))]
  rows = loader.from_examples(sides, types.SimpleNamespace(
      pad=PAD, length=lambda example: len(example["input_ids"])))
  made = context(lambda part: part, rows)
  assert made.rows_each == 1 and made.tokens_each == (3 + 9 + 4 + 4) / 2


def test_arrays_without_lengths_have_no_tokens():
  rows = loader.from_arrays({"features": np.zeros((5, 4), np.float32)})
  assert context(lambda part: part, rows).tokens_each is None
