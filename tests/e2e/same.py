"""Whether two runs ended the same, bit for bit."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from ft import checkpoint


def last_state(run: pathlib.Path) -> list[np.ndarray]:
  """All arrays of the last checkpoint: parameters, optimizer, rng, step."""
  made = checkpoint.Checkpoints(run / "checkpoints")
  place = made.path(made.steps()[-1])
  assert not checkpoint.verify(place)
  restored = ocp.StandardCheckpointer().restore(place / "state")
  return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def metrics(run: pathlib.Path) -> list[dict]:
  """Lines of metrics.jsonl without clocks and memory."""
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return [
    {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines
  ]


def assert_same(run: pathlib.Path, other: pathlib.Path) -> None:
  """Parameters, optimizer state, logged metrics and exported weights are bitwise equal."""
  states = zip(last_state(run), last_state(other), strict=True)
  assert all(np.array_equal(a, b, equal_nan=True) for a, b in states)
  assert metrics(run) == metrics(other)
  weights = [(r / "model" / "model.safetensors").read_bytes() for r in (run, other)]
  assert weights[0] == weights[1]
  cards = [json.loads((r / "card.json").read_text()) for r in (run, other)]
  assert cards[0]["results"] == cards[1]["results"]
