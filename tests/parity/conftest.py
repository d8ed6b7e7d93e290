"""Prints the table of parity once the tests of this folder have run."""

import sys


def pytest_terminal_summary(terminalreporter):
  harness = sys.modules.get("parity.harness")
  if harness is None or not harness.ROWS:
    return
  terminalreporter.section("parity, float32: largest relative difference from the reference")
  line = "{:<14}{:<52}{:>10}{:>12}"
  terminalreporter.write_line(line.format("family", "configuration", "outputs", "gradients"))
  for family, case, outputs, gradients in harness.ROWS:
    shown = f"{gradients:.1e}" if gradients else "-"
    terminalreporter.write_line(line.format(family, case, f"{outputs:.1e}", shown))
