"""Remedies that change the passes of a step: mixout, KL to the base, R-Drop, NEFTune, replay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anchor.conftest import Setting, batch, flat, moved, settings

from ft import anchor, errors, state
from ft.anchor import kl, mixout, replay
from ft.regularise import neftune, rdrop, sam


@pytest.fixture(scope="module")
def known():
  """A toy whose label head is pretrained, without dropout."""
  return Setting(fresh=False)


@pytest.fixture(scope="module")
def dropping():
  return Setting(rate=0.5, fresh=False)


# ---- Mixout ----


def test_mixout_keeps_the_mean_and_the_fresh_head(toy):
  part = mixout.make(settings(mixout, p=0.4), toy.context)
  start, now = toy.tuned.trainable, moved(toy.tuned.trainable, 0.5)
  point = jax.jit(lambda key: part.point(now, {"start": start}, key))
  drawn = flat(jax.vmap(point)(jax.random.split(jax.random.key(0), 2000)))
  path = "params/encoder/layer_0/query/kernel"
  origin, leaf = flat(start)[path], flat(now)[path]
  back = np.isclose(drawn[path], origin, atol=1e-7)
  assert back.mean() == pytest.approx(0.4, abs=0.01)
  far = np.broadcast_to(origin + (leaf - origin) / 0.6, back.shape)
  np.testing.assert_allclose(drawn[path][~back], far[~back], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(drawn[path].mean(0), leaf, atol=5 * 0.5 * 3 * (0.4 / 0.6 / 2000)**0.5)
  head = drawn["params/classifier/kernel"]
  assert np.array_equal(head, np.broadcast_to(flat(now)["params/classifier/kernel"], head.shape))


def test_mixout_acts_in_the_step_through_the_start(toy):
  part = mixout.make(settings(mixout, p=0.5), toy.context)
  step, now = toy.step(state.Extras(point=part.point))
  after, metrics = step(now, batch(), {"start": jax.tree.map(jnp.array, toy.tuned.trainable)})
  variables = toy.tuned.combine(toy.tuned.frozen, toy.tuned.trainable)
  total, weight, _ = toy.task.loss(toy.call, variables, batch(), None)
  assert metrics["loss"] == pytest.approx(float(total / weight), rel=1e-5)  # θ is still θ0
  path = "params/encoder/layer_0/query/kernel"
  still = np.array(flat(after.trainable)[path] == flat(toy.tuned.trainable)[path])
  assert 0.3 < still.mean() < 0.7  # elements that were back had no gradient


# ---- KL to the base ----


def numpy_kl(base, ours):
  soft = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)  # noqa: E731
  return (soft(base) * (np.log(soft(base)) - np.log(soft(ours)))).sum(-1)


def logits(setting, trainable, rows):
  variables = setting.tuned.combine(setting.tuned.frozen, trainable)
  return np.float64(setting.call(variables, {"input_ids": rows["input_ids"]})["logits"])


def test_kl_is_that_of_the_base_at_a_temperature(known):
  part = kl.make(settings(kl, weight=0.5, temperature=2.0), known.context)
  start, rows = moved(known.tuned.trainable, 0.3), batch(padding=3)
  step, now = known.step(state.Extras(wrap=anchor._wrapped([part.wrap])))
  _, metrics = step(now, rows, {"start": start})
  base, ours = (logits(known, t, rows) / 2 for t in (start, known.tuned.trainable))
  want = 4 * numpy_kl(base, ours)[:-3].mean()
  assert metrics["kl"] == pytest.approx(want, rel=1e-4) and want > 1e-3
  total, weight, _ = known.task.loss(
    known.call, known.tuned.combine(known.tuned.frozen, known.tuned.trainable), rows, None)
  assert metrics["loss"] == pytest.approx(float(total / weight) + 0.5 * want, rel=1e-4)
  step, now = known.step(state.Extras(wrap=anchor._wrapped([part.wrap])), accumulate=2)
  assert step(now, rows, {"start": start})[1]["kl"] == pytest.approx(want, rel=1e-4)


def test_kl_at_the_start_is_zero_and_pulls_nowhere(known):
  part = kl.make(settings(kl, weight=0.5), known.context)
  rows, start = batch(), jax.tree.map(jnp.array, known.tuned.trainable)
  step, now = known.step(state.Extras(wrap=anchor._wrapped([part.wrap])))
  after, metrics = step(now, rows, {"start": start})
  plain, now = known.step(state.Extras())
  want, _ = plain(now, rows)
  assert abs(metrics["kl"]) < 1e-6
  for a, b in zip(*map(jax.tree.leaves, (after.trainable, want.trainable)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_new_label_head_has_features_held(toy):
  measure = anchor.divergence(toy.context, 2.0, "anchor.kl.weight")
  rows, far = batch(padding=2), moved(toy.tuned.trainable, 0.3)
  ours, theirs = (toy.tuned.combine(toy.tuned.frozen, t) for t in (toy.tuned.trainable, far))
  total, weight = measure(anchor.Once(toy.call), (ours, None), (theirs, None), rows)
  a, b = (np.float64(toy.call(v, {"input_ids": rows["input_ids"]})["features"])
          for v in (ours, theirs))
  want = (((a - b)**2).sum(-1) / (b**2).sum(-1))[:-2].sum()
  assert total == pytest.approx(want, rel=1e-4) and weight == 6
  head = Setting(method="head")
  with pytest.raises(errors.UserError, match="only a new head trains"):
    anchor.divergence(head.context, 2.0, "anchor.kl.weight")


def test_equal_passes_are_made_once():
  calls = []

  def apply(variables, inputs, rng=None):
    calls.append(rng)
    return {"logits": inputs["x"]}

  once, x, variables = anchor.Once(apply), jnp.ones(2), {}
  key = jax.random.key(0)
  once(variables, {"x": x}, key)
  once((variables, key), {"x": x}, None)
  assert calls == [key]
  once(variables, {"x": x})
  once({}, {"x": x}, key)
  once(variables, {"x": x + 1}, key)
  assert len(calls) == 4


# ---- R-Drop ----


def test_rdrop_is_zero_without_dropout(known):
  part = rdrop.make(settings(rdrop, weight=3.0), known.context)
  step, now = known.step(state.Extras(wrap=anchor._wrapped([part.wrap])))
  after, metrics = step(now, batch())
  assert abs(metrics["rdrop"]) < 1e-7
  plain, now = known.step(state.Extras())
  want, _ = plain(now, batch())
  for a, b in zip(*map(jax.tree.leaves, (after.trainable, want.trainable)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_rdrop_is_the_symmetric_divergence_of_two_passes(dropping):
  rows, rng = batch(padding=2), jax.random.key(5)
  variables = dropping.tuned.combine(dropping.tuned.frozen, dropping.tuned.trainable)
  loss = anchor._wrapped([rdrop.wrap(3.0, dropping.task.divergence)])(dropping.task.loss)
  total, weight, aux = loss(dropping.call, variables, rows, rng, lambda: None)
  keys = rng, jax.random.fold_in(rng, rdrop._STREAM)
  inputs = {"input_ids": rows["input_ids"]}
  one, two = (np.float64(dropping.call(variables, inputs, key)["logits"]) for key in keys)
  own = [float(dropping.task.loss(dropping.call, variables, rows, key)[0]) for key in keys]
  apart = ((numpy_kl(one, two) + numpy_kl(two, one)) / 2)[:-2].sum()
  assert apart > 1e-3 and aux["rdrop"] == pytest.approx(apart, rel=1e-4)
  assert total == pytest.approx(sum(own) / 2 + 3 * apart, rel=1e-4) and weight == 6


def test_rdrop_gradient_reaches_both_passes(dropping):
  rows, rng = batch(), jax.random.key(5)
  frozen, start = dropping.tuned.frozen, dropping.tuned.trainable
  other = jax.random.fold_in(rng, rdrop._STREAM)

  def direct(trainable):
    variables = dropping.tuned.combine(frozen, trainable)
    one, two = (jax.nn.log_softmax(dropping.call(
      variables, {"input_ids": rows["input_ids"]}, key)["logits"]) for key in (rng, other))
    return jnp.sum((jnp.exp(one) - jnp.exp(two)) * (one - two)) / 2

  def ours(trainable):
    variables = dropping.tuned.combine(frozen, trainable)
    wrap = anchor._wrapped([rdrop.wrap(1.0, dropping.task.divergence)])
    return wrap(dropping.task.loss)(dropping.call, variables, rows, rng, None)[2]["rdrop"]

  for a, b in zip(*map(jax.tree.leaves, (jax.grad(ours)(start), jax.grad(direct)(start))),
                  strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# ---- NEFTune ----


def test_neftune_noise_is_bounded_by_length_and_width_and_absent_in_evaluation(known):
  part = neftune.make(settings(neftune, alpha=5.0), known.context)
  rows = batch()
  rows["attention_mask"][0, 2:] = 0
  seen = {}

  def loss(apply, variables, batch, rng):
    for name, key in (("train", rng), ("again", jax.random.key(9)), ("base", None)):
      seen[name] = embedded(apply, variables, batch, key)
    return 0.0, 1.0, {}

  def embedded(apply, variables, batch, key):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    return np.array(apply(variables, inputs, key)["embedded"])

  def call(variables, inputs, rng=None):
    rngs = {} if rng is None else {"dropout": rng}
    return {"embedded": known.module.apply(
      variables, inputs["input_ids"], rngs=rngs, method=lambda m, ids: m.embeddings(ids))}

  variables = known.tuned.combine(known.tuned.frozen, known.tuned.trainable)
  anchor._wrapped([part.wrap])(loss)(call, variables, rows, jax.random.key(0), None)
  plain = np.array(variables["params"]["embeddings"]["embedding"])[rows["input_ids"]]
  np.testing.assert_array_equal(seen["base"], plain)
  noise, other = seen["train"] - plain, seen["again"] - plain
  assert not np.allclose(noise, other)
  for row, tokens in ((0, 2), (1, 5)):
    limit = 5.0 / np.sqrt(tokens * 16)
    assert 0.9 * limit < np.abs(noise[row]).max() <= limit * 1.0001


def test_neftune_needs_words(toy):
  head = Setting(method="head")
  with pytest.raises(errors.UserError, match="word embeddings"):
    neftune.make(settings(neftune, alpha=5.0), head.context)


# ---- Replay and all of them together ----


def test_replay_does_not_depend_on_the_cut(toy):
  lifted = lambda apply, variables, batch, rng, base: toy.task.loss(  # noqa: E731
    apply, variables, batch, rng)
  extras = state.Extras(terms=(state.Term(lifted, "replay", 2.0),))
  rows = {**batch(), "replay": batch(1, 4, padding=1)}
  results = []
  for accumulate in (1, 2):
    step, now = toy.step(extras, accumulate)
    results.append(step(now, rows))
  (one, metrics), (two, other) = results
  assert metrics["replay_loss"] == pytest.approx(float(other["replay_loss"]), rel=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (one.trainable, two.trainable)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_held_replay_is_the_divergence_on_those_rows(known):
  rows, start = batch(1, 4), moved(known.tuned.trainable, 0.3)
  loss = replay.held(anchor.divergence(known.context, 1.0, "anchor.replay.loss=kl"))
  step, now = known.step(state.Extras(terms=(state.Term(loss, "replay", 1.0),)))
  unlabelled = {key: value for key, value in rows.items() if key != "label"}
  _, metrics = step(now, {**batch(), "replay": unlabelled}, {"start": start})
  want = numpy_kl(logits(known, start, rows), logits(known, known.tuned.trainable, rows)).mean()
  assert metrics["replay_loss"] == pytest.approx(want, rel=1e-4)


def test_sam_gives_its_radius(toy):
  assert sam.make(settings(sam), toy.context) is None
  assert sam.make(settings(sam, rho=0.05), toy.context).rho == 0.05
