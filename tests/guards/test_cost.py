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


def test_operations_and_utilisation():
  work = {"tokens_per_example": 20.0, "matmul_parameters": 1000, "matmul_trained": 1000,
          "through_body": True}
  recorded = {"examples": 500, "examples_per_second": 50.0, "devices": 2,
              "device_kind": "NVIDIA A100-SXM4-80GB", "platform": "gpu",
              "used": {"seconds": 10.0, "cpu_seconds": 4.0, "nvml_joules": 7200.0}}
  evidence = guards.Evidence(cost=recorded, gathered={"cost": work})
  numbers = cost.measure(guards.defaults("cost"), evidence)["numbers"]
  assert numbers["tokens"] == 10_000 and numbers["tokens_per_second"] == 1000
  assert numbers["flops"] == 6 * 1000 * 10_000
  assert numbers["utilisation"] == pytest.approx(6 * 1000 * 1000 / (2 * 312e12))
  assert numbers["energy"]["joules"] == 7200 + 40 and not numbers["energy"]["measured"]
  evidence.gathered = {"cost": {"forward_flops": 10.0, "factor": 3}}
  numbers = cost.measure(guards.defaults("cost"), evidence)["numbers"]
  assert numbers["flops"] == 3 * 500 * 10 and "tokens" not in numbers
  evidence.gathered = {}
  assert "flops" not in cost.measure(guards.defaults("cost"), evidence)["numbers"]


def test_a_run_says_what_it_took_beside_what_needs_no_training(tiny, tmp_path):
  from ft import config, train

  flags = [("train.steps", "2"), ("train.eval_every", "2"), ("train.export", "False"),
           ("guard.overfit.resamples", "100")]
  record = train.train(config.load(str(tiny.config), flags), tmp_path / "run")
  numbers = record["cost"]
  kernels = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32 + 2 * 32  # layers, pooler, label head
  assert numbers["flops"] == pytest.approx(6 * kernels * numbers["tokens"], rel=2e-3)
  assert numbers["tokens"] == pytest.approx(32 * 13, rel=0.1)  # 3 to 19 words, [CLS] and [SEP]
  assert not numbers["energy"]["measured"] or "RAPL" in numbers["energy"]["source"]
  beside = {row["name"]: row for row in numbers["beside"]}
  assert set(beside) == {"majority", "probe", "fine-tuned"}
  for name, row in beside.items():
    assert row["value"] == record["results"]["test"][name]["metrics"]["accuracy"]
    assert (row["seconds"] > 0) == (name != "majority")
    assert row["n"] == record["results"]["test"][name]["n"]
  page = (tmp_path / "run" / "card.html").read_text()
  for said in ("What each reached on test", "operations of training", "frozen probe"):
    assert said in page
