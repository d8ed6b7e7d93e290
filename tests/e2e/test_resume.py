"""A run killed at any instant, or told to stop, ends as one never interrupted."""

import pathlib
import random
import signal
import time

import pytest
from e2e.same import assert_same

LONG = ("--config.train.steps=90", "--config.train.eval_every=6", "--config.train.save_every=4",
        "--config.train.batch=8")


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
  """One run without interruption, and how many seconds its loop and end took."""
  folder = tmp_path_factory.mktemp("reference") / "run"
  tiny.train(folder, *LONG)  # fills the compilation cache, so that later runs are alike
  process = tiny.start(folder.with_name("timed"), *LONG)
  wait_for(folder.with_name("timed") / "config.json", process)
  began = time.monotonic()
  assert process.wait(300) == 0
  return folder, time.monotonic() - began


def wait_for(path: pathlib.Path, process) -> None:
  while not path.exists() and process.poll() is None:
    time.sleep(0.01)


def killed_again_and_again(tiny, reference, folder, kills, seed):
  whole, seconds = reference
  rng, happened = random.Random(seed), 0
  for _ in range(4 * kills):
    process = tiny.start(folder, *LONG)
    wait_for(folder / "config.json", process)
    try:
      assert process.wait(rng.uniform(0, seconds)) == 0
      break
    except Exception as error:  # still running: that is what we want
      if process.poll() is not None:
        raise AssertionError(process.stderr.read()[-3000:]) from error
      process.send_signal(signal.SIGKILL)
      process.wait()
      happened += 1
      if happened == kills:
        break
  assert happened
  tiny.train(folder, *LONG)
  assert_same(folder, whole)


def test_three_kills_change_nothing(tiny, reference, tmp_path):
  killed_again_and_again(tiny, reference, tmp_path / "run", kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_kills_change_nothing(tiny, reference, tmp_path, seed):
  killed_again_and_again(tiny, reference, tmp_path / "run", kills=5, seed=seed)


@pytest.mark.parametrize("number", [
  signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(tiny, reference, tmp_path, number):
  whole, _ = reference
  process = tiny.start(tmp_path / "run", *LONG)
  wait_for(tmp_path / "run" / "checkpoints" / "step_000000012", process)
  process.send_signal(number)
  status = process.wait(60)
  message = process.stderr.read()
  assert status == 75, message[-3000:]
  assert "the same command goes on" in message
  tiny.train(tmp_path / "run", *LONG)
  assert_same(tmp_path / "run", whole)


def test_a_signal_before_the_first_step_exits_75(tiny, tmp_path):
  process = tiny.start(tmp_path / "run", *LONG)
  wait_for(tmp_path / "run" / "config.json", process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 75
  tiny.train(tmp_path / "run", "--config.train.steps=2", "--config.train.batch=8", status=2)


def test_bit_rot_in_the_newest_checkpoint_is_healed(tiny, reference, tmp_path):
  whole, _ = reference
  folder = tmp_path / "run"
  process = tiny.start(folder, *LONG)
  wait_for(folder / "checkpoints" / "step_000000036", process)
  process.send_signal(signal.SIGKILL)
  process.wait()
  newest = sorted((folder / "checkpoints").glob("step_?????????"))[-1]
  victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 4
  victim.write_bytes(data)
  done = tiny.train(folder, *LONG)
  assert victim.name in done.stderr and "going back to the step before" in done.stderr
  assert_same(folder, whole)
