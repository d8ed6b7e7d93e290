"""Every way to tune takes the same step on eight devices as on one, scanned, with remat."""

import os
import pathlib
import subprocess
import sys

import pytest
from tune import eight

from ft import config


def test_no_method_is_left_out():
  assert set(eight.CASES) == set(config.choices("tune.method"))


@pytest.mark.slow
def test_eight_devices_and_micro_batches_take_the_same_step():
  root = pathlib.Path(__file__).resolve().parents[2]
  done = subprocess.run(
    [sys.executable, str(root / "tests" / "tune" / "eight.py")], capture_output=True, text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{root}:{root / 'tests'}",
         "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, timeout=400)
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.split() == list(eight.CASES)
