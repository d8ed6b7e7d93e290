"""Remedies for groups: weights and q by formula, the last layer against a planted shortcut."""

import json
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import script

from ft import averaging, errors, last_layer, probes, state
from ft.regularise import balance, group_dro

ROOT = pathlib.Path(__file__).resolve().parents[1]
CELL = np.array([0, 0, 0, 0, 0, 0, 1, 1])


def loss(apply, variables, batch, rng, *base):
  """Squared error of a slope."""
  del base
  error = jnp.square(apply(variables, {"x": batch["x"]}) - batch["y"])
  return jnp.sum(error * batch["weight"]), jnp.sum(batch["weight"]), {}


def batch(rows):
  x = jnp.arange(1.0, 9.0)
  return {"x": x[rows], "y": jnp.where(jnp.asarray(CELL) == 1, -x, x)[jnp.asarray(rows)],
          "weight": jnp.ones(len(rows)), "index": jnp.asarray(rows)}


def test_balanced_weights_make_every_cell_count_the_same():
  weights = balance.weights(CELL)
  assert weights.mean() == pytest.approx(1)
  np.testing.assert_allclose(np.bincount(CELL, weights), [4, 4])
  value = balance.wrap(weights)(loss)
  apply = lambda variables, at: variables["w"] * at["x"]  # noqa: E731
  total, weight, _ = value(apply, {"w": 0.5}, batch(np.arange(8)), None, None)
  each = [np.mean([(0.5 * (i + 1) - (1 if CELL[i] == 0 else -1) * (i + 1))**2
                   for i in np.flatnonzero(CELL == g)]) for g in (0, 1)]
  assert total / weight == pytest.approx(np.mean(each))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_q_is_that_of_the_algorithm_and_stays_in_the_state(accumulate):
  """Algorithm 1 of Sagawa et al. by hand, with plain gradient descent."""
  eta, extra, rate = 0.1, np.array([0.2, 0.3]), 0.001
  memory = group_dro.memory(2, eta, extra)
  extras = state.Extras(wrap=group_dro.wrap(CELL, eta, extra), memories=(memory,))
  apply = lambda variables, at, rng=None, mutable=(): (  # noqa: E731
    variables["w"] * at["x"], {})
  tx = optax.sgd(rate)
  step = state.make_train_step(loss, apply, lambda frozen, trainable: trainable, tx, accumulate,
                               extras=extras)
  now = state.create({"w": jnp.float32(0.5)}, {}, tx, 0, memories=extras.memories)
  w, q = 0.5, np.array([0.5, 0.5])
  sign = np.where(CELL == 0, 1, -1)
  for rows in ([0, 6, 1, 7], [2, 6, 3, 6]):
    rows = np.array(rows)
    now, metrics = step(now, {}, batch(rows))
    parts = [rows[i::accumulate] for i in range(accumulate)]
    grad = 0
    for part in parts:
      x = part + 1.0
      each = (w * x - sign[part] * x)**2
      slope = 2 * (w * x - sign[part] * x) * x
      there = [CELL[part] == g for g in (0, 1)]
      losses = np.array([each[t].mean() if t.any() else 0 for t in there])
      grown = q * np.exp([eta * (losses[g] + extra[g]) if there[g].any() else 0 for g in (0, 1)])
      grown /= grown.sum()
      grad += len(part) * sum(grown[g] * slope[there[g]].mean() for g in (0, 1) if there[g].any())
    x = rows + 1.0
    each = (w * x - sign[rows] * x)**2
    losses = np.array([each[CELL[rows] == g].mean() for g in (0, 1)])
    q = q * np.exp(eta * (losses + extra))
    q /= q.sum()
    w -= rate * grad / len(rows)
    np.testing.assert_allclose(now.memory["group_dro"], q, rtol=1e-5)
    np.testing.assert_allclose(now.trainable["w"], w, rtol=1e-5)
    assert state.MEMORY not in metrics


def test_balanced_draws_take_the_shortcut_away():
  """The shortcut is right in 95 of 100 rows and easier to read than the truth."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, 2, 4000)
  short = np.where(rng.random(4000) < 0.95, label, 1 - label)
  features = np.stack([2 * label - 1 + rng.normal(size=4000), 6 * short - 3.0], 1)
  features = features.astype(np.float32)
  cell, names = 2 * label + short, ["00", "01", "10", "11"]
  plain = next(probes.probes(features, label, 2, (1.0,)))
  fair = last_layer.fit(features, label, cell, 2, names)

  def worst(kernel, bias):
    right = (features @ kernel + bias).argmax(1) == label
    return min(right[cell == g].mean() for g in range(4))

  assert worst(plain.kernel, plain.bias) < 0.5 < 0.75 < worst(*fair)


def test_the_half_that_the_head_is_fitted_to_has_half_of_each_group():
  cell = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 41, 8]))
  half = last_layer.halves(cell, 3)
  assert np.bincount(cell[half]).tolist() == [50, 21, 4] and (np.diff(half) > 0).all()
  assert not np.array_equal(half, last_layer.halves(cell, 4))
  final = averaging.Final(None, None, None, None, fitted=(2, 5))
  left = final.unseen({"index": np.array([5, 1, 2, 0]), "label": np.arange(4)})
  assert left["index"].tolist() == [1, 0] and left["label"].tolist() == [1, 3]


def test_messages():
  class Rows(list):
    labels = ["a", "b"]

  run = types.SimpleNamespace(
    task=object(), data=types.SimpleNamespace(splits={"train": Rows(
      [{"attributes": {"sex": "f"}}, {"attributes": {"sex": "f"}}])}))
  assert balance.cells(run, ("label",), "key")[0] == ["a", "b"]
  with pytest.raises(errors.UserError, match="key: train has no 'race'"):
    balance.cells(run, ("race",), "key")
  with pytest.raises(errors.UserError, match="'sex' has one value only in train, 'f'"):
    balance.cells(run, ("sex",), "key")
  with pytest.raises(errors.UserError, match="validation has 2 rows of 'q'"):
    last_layer.fit(np.zeros((8, 2)), np.arange(8) % 2, CELL, 2, ["p", "q"])


@pytest.mark.parametrize("flags", [
  ("--config.regularise.balance.by=label,sex",), ("--config.average.dfr=label,sex",),
  ("--config.regularise.group_dro.by=label,sex", "--config.train.accumulate=2"),
])
def test_runs(tmp_path, flags):
  rng = np.random.default_rng(0)
  sex = rng.choice(["f", "m"], 900)
  x = rng.normal(size=900)
  label = np.where(x + (sex == "m") > 0.5, "yes", "no")
  lines = [f"{a:.4f},{b},{c}" for a, b, c in zip(x, sex, label, strict=True)]
  (tmp_path / "t.csv").write_text("x,sex,label\n" + "\n".join(lines) + "\n")
  (tmp_path / "c.py").write_text(f"""
def get_config():
  return dict(model=dict(source="scratch:tabular"), optim=dict(rate=1e-2),
              data=dict(modality="table", train={str(tmp_path / "t.csv")!r}, attributes=("sex",)),
              train=dict(batch=32, epochs=3.0))
""")
  script("train", f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'c.py'}", *flags)
  card = json.loads((tmp_path / "run" / "card.json").read_text())
  assert card["results"]["test"]["fine-tuned"]["metrics"]["accuracy"] > 0.85
  assert card["guards"]["bias"]["numbers"]["by"][0]["by"] == "sex"
  if "average.dfr" in flags[0]:
    rows = card["data"]["splits"]["validation"]["rows"]
    fitted = card["calibration"]["fitted_on"]
    assert rows - fitted in range(rows // 2, rows // 2 + 3)  # half of each of four groups
    assert card["calibration"]["conformal"][0]["n"] == card["calibration"]["n"]
    assert f"fitted anew to {rows - fitted} of {rows} validation rows" in card["notes"][0]
