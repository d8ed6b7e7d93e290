"""The cost guard's sums and words."""

import pytest

from ft import guards
from ft.guards import cost


def measured(**recorded):
  return cost.measure(guards.defaults("cost"), guards.Evidence(cost=recorded))


def test_sums_and_words():
  found = measured(phases={"data": 3.5, "train": 114.0, "evaluate": 20.0}, examples=7000,
                   examples_per_second=61.4, compile_seconds=9.25, parameters=22_713_601,
                   trainable=227_136, checkpoint_bytes=91 * 2**20, data_wait_share=0.01)
  numbers = found["numbers"]
  assert numbers["wall_seconds"] == 137.5
  assert numbers["trainable_share"] == pytest.approx(0.01, rel=1e-4)
  assert numbers["peak_host_bytes"] > 10 * 2**20
  assert found["verdict"] == "ok"
  for words in ("2 min 18 s in all", "9.2 s of it compiling", "61.4 examples/s",
                "1 % of 22,713,601 parameters", "checkpoint of 91.0 MiB"):
    assert words in found["words"]


def test_waiting_for_data_is_a_warning():
  found = measured(phases={"train": 10.0}, data_wait_share=0.4)
  assert found["verdict"] == "warning" and "waited for data 40 %" in found["words"]


def test_part_of_the_record_is_enough_and_none_is_not_measured():
  assert "host memory" in measured(steps=3)["words"]
  assert measured()["verdict"] == "not measured"


@pytest.mark.parametrize("seconds, words", [
    (0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"),
    (7500, "2 h 05 min")])
def test_duration(seconds, words):
  assert cost.duration(seconds) == words


@pytest.mark.parametrize("count, words", [
    (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**40, "5120.0 GiB")])
def test_size(count, words):
  assert cost.size(count) == words
