"""Operations against the compiler's own count; energy from counters that restart."""

import jax
import jax.numpy as jnp
import pytest

from ft import compute, tune
from ft.models import llama


@pytest.fixture(scope="module")
def model():
  config = llama.Config(
    vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, head="lm",
    tie_word_embeddings=True)
  module = llama.Model(config)
  variables = jax.eval_shape(
    lambda key: module.init(key, **llama.probe_inputs(config)), jax.random.key(0))
  return module, variables


def counted(function, *args):
  """What XLA counts in a function, before it optimises."""
  return jax.jit(function).lower(*args).cost_analysis()["flops"]


def test_the_formula_is_what_the_compiler_counts(model):
  module, variables = model
  ids = jax.ShapeDtypeStruct((4, 16), jnp.int32)

  def loss(variables, ids):
    return jnp.sum(module.apply(variables, input_ids=ids)["logits"])

  shapes = tune.flatten(variables)
  known = compute.matmul_parameters(shapes, "lm")
  # Kernels of two layers (attention 4 D², three of D x 4 D) and the table, which is the head too.
  assert known == 2 * (4 * 128**2 + 3 * 128 * 512) + 512 * 128
  forward = counted(loss, variables, ids)
  assert forward == pytest.approx(2 * known * 64, rel=0.1)
  whole = counted(jax.grad(loss), variables, ids)
  assert whole == pytest.approx(compute.training_flops(known, known, 64), rel=0.1)
  assert compute.training_flops(known, known, 64) == 6 * known * 64

  def of_some(some, rest, ids):
    return loss(tune.combine(rest, some), ids)

  def trains(path):
    return "layer_0/attention/query" in path  # as adapters do: a little, below everything

  some, rest = tune.split(variables, trains)
  trained = compute.matmul_parameters(tune.flatten(some))
  assert 0 < trained < known / 10
  whole = counted(jax.grad(of_some), some, rest, ids)
  assert whole == pytest.approx(compute.training_flops(known, trained, 64), rel=0.15)


def test_tables_cost_nothing_where_no_head_is_made_of_them(model):
  shapes = tune.flatten(model[1])
  assert compute.matmul_parameters(shapes) == compute.matmul_parameters(shapes, "lm") - 512 * 128


@pytest.mark.parametrize("kind, flops", [
  ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
  ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12),
  ("NVIDIA L40S", 362e12),
  ("Tesla T4", 65e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v4", 275e12),
  ("cpu", None)])
def test_published_peaks(kind, flops):
  assert compute.peak(kind)[0] == flops


def test_counters_that_restart_lose_nothing(tmp_path, monkeypatch):
  package, part = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"
  for folder in (package, part):
    folder.mkdir()
    (folder / "max_energy_range_uj").write_text("1000000000")
    (folder / "energy_uj").write_text("900000000")
  monkeypatch.setattr(compute, "RAPL", tmp_path)
  assert list(compute.packages()) == [package]  # its parts are in it
  meter = compute.Meter()
  (package / "energy_uj").write_text("950000000")
  assert meter.read()["rapl_joules"] == pytest.approx(50)
  (package / "energy_uj").write_text("150000000")
  assert meter.read()["rapl_joules"] == pytest.approx(250)
  found = compute.energy(meter.read(), "cpu", "cpu", 1, 10.0, 0.0)
  assert found["measured"] and found["joules"] == pytest.approx(250) and "RAPL" in found["source"]


def test_what_is_not_measured_is_called_an_estimate(tmp_path, monkeypatch):
  monkeypatch.setattr(compute, "RAPL", tmp_path)
  assert "rapl_joules" not in compute.Meter().read()
  used = {"seconds": 100.0, "cpu_seconds": 50.0}
  found = compute.energy(used, "cpu", "cpu", 1, 10.0, 0.0)
  assert not found["measured"] and found["joules"] == 500 and "estimate" in found["source"]
  found = compute.energy(used, "gpu", "NVIDIA H100 80GB HBM3", 2, 10.0, 0.0)
  assert found["joules"] == 500 + 2 * 700 * 100
  assert compute.energy(used, "tpu", "TPU v4", 1, 10.0, 200.0)["joules"] == 500 + 20_000
  assert "not counted" in compute.energy(used, "tpu", "TPU v4", 1, 10.0, 0.0)["source"]
  both = {**used, "rapl_joules": 7.0, "nvml_joules": 5.0}
  assert compute.energy(both, "gpu", "x", 1, 10.0, 0.0) == {
    "joules": 12.0, "measured": True, "source": "CPU packages by RAPL, the whole machine; "
    "GPUs by NVML, all of the machine"}


def test_a_run_that_goes_on_adds_to_what_was_used_before(tmp_path, monkeypatch):
  package = tmp_path / "intel-rapl:0"
  package.mkdir()
  (package / "max_energy_range_uj").write_text("1000000000")
  (package / "energy_uj").write_text("0")
  monkeypatch.setattr(compute, "RAPL", tmp_path)
  meter = compute.Meter()
  (package / "energy_uj").write_text("50000000")
  meter.before = {"seconds": 100.0, "cpu_seconds": 70.0, "rapl_joules": 7.0, "nvml_joules": 1.0}
  found = meter.read()
  assert found["rapl_joules"] == pytest.approx(57)
  assert found["seconds"] > 100 and found["cpu_seconds"] >= 70
  assert "nvml_joules" not in found  # this process could not read it
  meter.before = {"seconds": 100.0, "cpu_seconds": 70.0}
  assert "rapl_joules" not in meter.read()  # the one before could not
