"""Prints the table of parity once the tests of this folder have run, in whichever process."""

import sys

import pytest

_LINE = "{:<14}{:<66}{:>9}{:>11}"


@pytest.fixture(autouse=True)
def rows(record_property):
  """Attaches the table's rows that a test makes to its report."""
  yield
  harness = sys.modules.get("parity.harness")
  while harness is not None and harness.ROWS:
    record_property("parity", harness.ROWS.pop(0))


def pytest_terminal_summary(terminalreporter):
  reports = terminalreporter.getreports("")
  found = sorted({tuple(value) for report in reports
                  for name, value in report.user_properties if name == "parity"})
  if not found:
    return
  terminalreporter.section("parity, float32: largest relative difference from the reference")
  terminalreporter.write_line(_LINE.format("family", "configuration", "outputs", "gradients"))
  for family, case, outputs, gradients in found:
    shown = f"{gradients:.1e}" if gradients else "-"
    terminalreporter.write_line(_LINE.format(family, case, f"{outputs:.1e}", shown))
