"""Between pretrained and tuned weights: end points, the fresh head, the choice; and a whole run."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from e2e.same import assert_same

from ft import averaging, config, errors, models, preempt, train, tune
from ft.weights import names


def weights(seed):
  rng = np.random.default_rng(seed)
  return {
    "params/a/kernel": jnp.asarray(rng.standard_normal((5, 3)), jnp.float32),
    "params/b/kernel": jnp.asarray(rng.standard_normal(4), jnp.bfloat16),
    "params/head/bias": jnp.asarray(rng.standard_normal(2), jnp.float32),
    "batch_stats/count": jnp.asarray([seed], jnp.int32),
  }


def test_the_ends_are_bitwise_the_models_themselves():
  base, tuned = weights(0), weights(1)
  fresh = {"params/head/bias"}
  for alpha, end in ((0, base), (1, tuned)):
    found = averaging.interpolate(base, tuned, alpha, fresh)
    for path, leaf in found.items():
      want = tuned[path] if path in fresh or path.startswith("batch") else end[path]
      assert leaf.dtype == want.dtype and np.array_equal(np.asarray(leaf), np.asarray(want))
  half = averaging.interpolate(base, tuned, 0.25, fresh)
  np.testing.assert_allclose(
    half["params/a/kernel"], 0.75 * base["params/a/kernel"] + 0.25 * tuned["params/a/kernel"],
    rtol=1e-6)
  assert half["params/b/kernel"].dtype == jnp.bfloat16
  assert np.array_equal(half["params/head/bias"], tuned["params/head/bias"])


def test_what_cannot_be_mixed_is_told_before_training():
  def check(wise, merge=tune.combine):
    settings = types.SimpleNamespace(average=types.SimpleNamespace(wise=wise),
                                     tune=types.SimpleNamespace(method="prompt"))
    averaging.check(settings, tune.Tuned({}, {}, tune.combine, merge))

  check((0, 0.5, 1))
  with pytest.raises(errors.UserError, match="expected numbers from 0"):
    check((0, 1.5))
  with pytest.raises(errors.UserError, match="tune.method=prompt has none"):
    check((0.5,), merge=None)
  check((), merge=None)


FLAGS = [("anchor.l2sp.alpha", "0.01"), ("anchor.l2sp.beta", "0.01"), ("average.ema", "0.9"),
         ("average.wise", "0,0.5,1"), ("optim.decay_to", "start"), ("train.steps", "12"),
         ("train.eval_every", "6"), ("anchor.replay.source", "{csv}[:60]"),
         ("anchor.replay.share", "0.5"), ("guard.overfit.resamples", "100"),
         ("data.train", "{csv}[60:]"), ("data.extra.elsewhere", "{csv}[:60]")]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
  """A run with L2-SP, replay, decay to the start, a running mean and WiSE-FT, and its copy."""
  folder, copy = (tmp_path_factory.mktemp("wise") / name for name in ("run", "copy"))
  words = [(key, text.format(csv=tiny.csv)) for key, text in FLAGS]
  made = config.load(str(tiny.config), words)
  return folder, train.train(made, folder), made, copy


def test_the_curve_is_on_the_card_and_its_best_is_exported(tiny, run):
  folder, record, made, _ = run
  curve = record["tradeoff"]
  assert [entry["alpha"] for entry in curve] == [0, 0.5, 1]
  assert all(set(entry["values"]) == {"train", "validation", "elsewhere"} for entry in curve)
  chosen, = (entry for entry in curve if entry["chosen"])
  best = max(entry["values"]["validation"] for entry in curve)
  assert chosen["values"]["validation"] == best
  assert chosen["values"]["validation"] == pytest.approx(
    record["results"]["validation"]["fine-tuned"]["metrics"]["accuracy"])
  page = (folder / "card.html").read_text()
  assert "Between the pretrained and the tuned weights" in page
  assert f"chosen: {chosen['alpha']:g}" in page and "share of the tuned weights" in page
  card = json.loads((folder / "card.json").read_text())
  assert card["tradeoff"] == json.loads(json.dumps(curve))
  base = names.flatten(models.load(str(tiny.model)).variables)
  tuned = names.flatten(models.load(str(folder / "model")).variables)
  path = "params/encoder/layer_0/intermediate/kernel"
  path = path if path in base else next(p for p in base if p.endswith("intermediate/kernel"))
  assert np.array_equal(base[path], tuned[path]) == (chosen["alpha"] == 0)


def test_terms_and_penalty_are_logged_and_the_optimizer_starts_at_the_start(run):
  folder, *_ = run
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  logged = [line for line in lines if "train/penalty" in line]
  assert logged
  for line in logged:
    want = line["train/own_loss"] + line["train/replay_loss"] + line["train/penalty"]
    assert line["train/loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_the_same(run, monkeypatch):
  folder, _, made, copy = run
  calls = []

  def stop(self):
    calls.append(None)
    if len(calls) == 40:
      raise errors.Preempted("told to stop")

  with monkeypatch.context() as patch:
    patch.setattr(preempt.Preemption, "poll", stop)
    with pytest.raises(errors.Preempted):
      train.train(made, copy)
  assert not (copy / "card.json").exists() and list((copy / "checkpoints").glob("step_*"))
  train.train(made, copy)
  assert_same(copy, folder)

