"""What every test may use: a private cache folder, and the real models and data where they are."""

import os
import pathlib

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared():
  """The folder of real models and data; a test that asks for it is skipped where it is absent."""
  if not SHARED.is_dir():
    pytest.skip("needs the real models and data in ../shared, which is not there")
  return SHARED


def pytest_configure():
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
