"""How guards are run: each finds what it gathered, and the fault of one ends nothing."""

import types

import pytest

from ft import errors, guards


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
