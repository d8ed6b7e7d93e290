"""One code path for one device, eight, and two processes: same batches, masks and losses."""

import json
import socket

import numpy as np
import pytest

FLAGS = ("--config.train.steps=12", "--config.train.eval_every=6", "--config.train.log_every=1")


def losses(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return (
    np.array([line["train/loss"] for line in lines if "train/loss" in line]),
    [line["validation/accuracy"] for line in lines if "validation/accuracy" in line],
    json.loads((folder / "card.json").read_text())["results"]["test"]["fine-tuned"]["n"],
  )


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("alone") / "run"
  tiny.train(folder, *FLAGS)
  return losses(folder)


def assert_same(found, alone):
  np.testing.assert_allclose(found[0], alone[0], rtol=1e-6)
  assert found[1:] == alone[1:]


@pytest.mark.parametrize("mesh", [
  *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((8, 1, 1), (2, 4, 1))), (2, 2, 2)])
def test_eight_devices(tiny, alone, tmp_path, mesh):
  names = ("data", "fsdp", "tensor")
  axes = [f"--config.mesh.{name}={n}" for name, n in zip(names, mesh, strict=True)]
  tiny.train(tmp_path / "run", *FLAGS, *axes,
             XLA_FLAGS="--xla_force_host_platform_device_count=8")
  assert_same(losses(tmp_path / "run"), alone)


def test_two_processes(tiny, alone, tmp_path):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  common = (*FLAGS, f"--config.mesh.coordinator=127.0.0.1:{port}", "--config.mesh.processes=2")
  both = [tiny.start(tmp_path / "run", *common, f"--config.mesh.process={i}") for i in range(2)]
  for process in both:
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
  assert_same(losses(tmp_path / "run"), alone)
