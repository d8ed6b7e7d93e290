"""Training in stages: when leaves start, that they do not move before, and what that saves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict
from tune import toys

from ft import errors, optim, state, tune
from ft.models import t5
from ft.weights import stacking

STEPS = 4


def settings(**values):
  defaults = {name: entry[0] for name, entry in optim.KEYS.items()}
  return config_dict.ConfigDict({
    **defaults, "rate": 1e-2, "weight_decay": 0.1, "schedule": "constant", "warmup": 0, **values})


def loss(apply, variables, batch, rng):
  logits = apply(variables, {"ids": batch["ids"]}, rng)["logits"]
  rows = jnp.sum((logits - jnp.arange(2.0)) ** 2, -1)
  return rows.sum(), jnp.float32(len(rows)), {}


def run(order, steps=STEPS, width=8, depth=2, scanned=False, optimizer=None, **values):
  """(tuned, state, step, batch) of a run of the toy encoder."""
  module, variables, ids = toys.make(depth=depth, width=width, scanned=scanned)
  tuned = toys.init("staged", variables, order=order, **values)
  tx, schedule = optim.make(optimizer or settings(), tuned.trainable, steps, toys.HEAD, tuned)
  step = state.make_train_step(loss, state.make_apply(module), tuned.combine, tx,
                               schedule=schedule, stages=tuned.stages)
  return tuned, state.create(tuned.trainable, {}, tx, 0), step, {"ids": ids}


def moved(before, after):
  """path -> whether anything of a leaf changed; of stacked ones, of each layer."""
  before, after = tune.flatten(before), tune.flatten(after)
  out = {}
  for path, leaf in before.items():
    changed = np.asarray(after[path]) != np.asarray(leaf)
    out[path] = changed.reshape(len(leaf), -1).any(1) if "layers/" in path else changed.any()
  return out


def test_lp_ft_stages():
  _, variables, _ = toys.make()
  tuned = toys.init("staged", variables)
  assert not tuned.only_head and sum(row.count for row in tuned.table) == sum(
    leaf.size for leaf in jax.tree.leaves(variables["params"]))
  stages = tuned.stages
  assert stages.shares() == [0.0, 0.3] and stages.rates == (1.0, 0.1)
  assert stages.steps(10) == [0, 3] and [stages.of(i, 10) for i in (0, 2, 3, 9)] == [0, 0, 1, 1]
  live = {row.path for row in tuned.table if stages.live(row.path, 0)}
  assert live == {"params/classifier/kernel", "params/classifier/bias"}
  assert all(stages.live(row.path, 1) for row in tuned.table)


def test_lp_ft_rate_falls_to_a_tenth():
  _, variables, _ = toys.make()
  tuned = toys.init("staged", variables, head_share=0.5)
  _, schedule = optim.make(settings(), tuned.trainable, 10, toys.HEAD, tuned)
  np.testing.assert_allclose([schedule(i) for i in (0, 4, 5, 9)], [1e-2, 1e-2, 1e-3, 1e-3])


@pytest.mark.parametrize("scanned", [False, True])
def test_unfreeze_goes_from_the_top(scanned):
  _, variables, _ = toys.make(depth=4, scanned=scanned)
  stages = toys.init("staged", variables, order="unfreeze").stages
  np.testing.assert_allclose(stages.shares(), np.arange(6) / 6)
  for stage in range(6):
    for i in range(4):
      path = f"params/encoder/{'layers' if scanned else f'layer_{i}'}/output/kernel"
      live = np.broadcast_to(np.ravel(stages.live(path, stage)), 4)[i]
      assert live == (i >= 4 - stage), (stage, i)
    assert stages.live("params/embeddings/embedding", stage) == (stage == 5)
    assert stages.live("params/classifier/bias", stage)


def test_unfreeze_in_groups_and_of_two_stacks():
  _, variables, _ = toys.make(depth=5)
  tuned = toys.init("staged", variables, order="unfreeze", group=2)
  starts = {f"{path.split('/')[2]}": round(float(start) * 5)
            for path, start in tuned.stages.starts.items() if "encoder" in path}
  assert starts == {"layer_4": 1, "layer_3": 1, "layer_2": 2, "layer_1": 2, "layer_0": 3}
  c = t5.Config(vocab_size=20, d_model=8, d_kv=4, num_heads=2, d_ff=16, num_layers=3,
                num_decoder_layers=2, head="lm", tied=False)
  params = jax.eval_shape(lambda: t5.Model(c).init(jax.random.key(0), **t5.probe_inputs(c)))
  tuned = toys.init("staged", {"params": params["params"]}, order="unfreeze",
                    head=("params/lm_head",))
  starts = {"/".join(path.split("/")[1:3]): round(float(start) * 5)
            for path, start in tuned.stages.starts.items()}
  assert starts["encoder/layer_2"] == starts["decoder/layer_1"] == 1
  assert starts["encoder/layer_1"] == starts["decoder/layer_0"] == 2
  assert starts["encoder/layer_0"] == 3 and starts["shared/embedding"] == 4
  assert starts["encoder/norm"] == starts["decoder/norm"] == 1


def go(tuned, now, step, batch):
  """Runs to the end; what has not started must not change by a bit, all that has must change."""
  for number in range(STEPS):
    stage = tuned.stages.of(number, STEPS)
    before = jax.tree.map(np.array, now.trainable)
    now, _ = step(now, tuned.frozen, batch, {}, stage)
    for path, changed in moved(before, now.trainable).items():
      live = np.ravel(tuned.stages.live(path, stage))
      want = np.broadcast_to(live, np.ravel(changed).shape)
      np.testing.assert_array_equal(np.ravel(changed), want, err_msg=f"{path} in stage {stage}")
  return now


def test_nothing_moves_before_its_stage():
  go(*run("lp-ft", head_share=0.5))


@pytest.mark.slow
def test_stacked_layers_start_as_unstacked_ones():
  """No layer moves before its stage, scanned or not, and every layer goes the same way."""
  tuned, now, step, batch = run("unfreeze")
  start = tune.flatten(jax.tree.map(np.array, now.trainable))
  end = jax.tree.map(np.array, go(tuned, now, step, batch).trainable)
  alone = stacking.stack(tune.flatten(end))
  tuned, now, step, batch = run("unfreeze", scanned=True)
  stacked = jax.tree.map(jnp.asarray, tune.unflatten(stacking.stack(start)))
  end = tune.flatten(go(tuned, now.replace(trainable=stacked), step, batch).trainable)
  for path, leaf in end.items():
    np.testing.assert_allclose(leaf, alone[path], rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_a_late_leaf_moves_as_under_a_fresh_optimizer(name):
  """Whatever the rule: the same gradients from its first step on give the same steps."""
  rng = np.random.default_rng(0)
  leaf = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
  p = {"params": {"late": {"kernel": leaf}, "classifier": {"kernel": leaf}}}
  tuned = tune.build(p, {}, toys.HEAD, stages=tune.Stages({"params/late/kernel": 0.5}))
  grads = [jnp.asarray(1e-4 * rng.normal(size=(3, 4)), jnp.float32) for _ in range(40)]

  def walk(p, tuned, grads):
    """The updates of every step, and where they lead."""
    tx, _ = optim.make(settings(name=name, clip=0.0), p, len(grads), toys.HEAD, tuned)
    update, opt, updates = jax.jit(tx.update), tx.init(p), []
    for g in grads:
      u, opt = update(g, opt, p)
      p = optax.apply_updates(p, u)
      updates.append({path: np.asarray(x) for path, x in tune.flatten(u).items()})
    return updates, p

  def tree(late, head):
    return {"params": {"late": {"kernel": late}, "classifier": {"kernel": head}}}

  zero = jnp.zeros_like(leaf)
  staged, end = walk(p, tuned, [tree(zero if i < 20 else g, g) for i, g in enumerate(grads)])
  fresh, _ = walk(p, None, [tree(g, g) for g in grads[20:]])
  _, whole = walk(p, None, [tree(g, g) for g in grads])
  late = [u["params/late/kernel"] for u in staged]
  assert not np.any(late[:20])
  if name == "adafactor":  # its memory depends on the run's steps, but its clip bounds the step
    assert 0 < np.sqrt(np.mean(np.square(late[20]))) <= 1.2e-2
  else:
    for mine, theirs in zip(late[20:], fresh, strict=True):
      np.testing.assert_allclose(mine, theirs["params/late/kernel"], rtol=2e-5, atol=1e-9)
  if name == "adamw":  # the first step is the gradient's sign, plus decay
    np.testing.assert_allclose(late[20], -1e-2 * (np.sign(grads[20]) + 0.1 * leaf), rtol=1e-3)
  np.testing.assert_allclose(  # a leaf that trains from the start notices nothing
    tune.flatten(end)["params/classifier/kernel"],
    tune.flatten(whole)["params/classifier/kernel"], rtol=1e-6)


def lowered(order, stage, depth=4, scanned=False):
  tuned, now, step, batch = run(order, width=32, depth=depth, scanned=scanned)
  return step.lower(now, tuned.frozen, batch, {}, stage)


def test_what_waits_costs_no_gradient():
  head, two, full = (lowered(order, stage).cost_analysis()["flops"]
                     for order, stage in (("lp-ft", 0), ("unfreeze", 2), ("lp-ft", 1)))
  assert head < 0.55 * full and head < 0.8 * two < 0.8 * 0.8 * full
  # A scanned body that waits is run forwards only: one loop, not two.
  loops = [lowered("lp-ft", stage, 2, True).as_text().count("stablehlo.while") for stage in (0, 1)]
  assert loops == [1, 2]


def test_messages():
  _, variables, _ = toys.make()
  with pytest.raises(errors.UserError, match="this model has none"):
    toys.init("staged", variables, head=())
  with pytest.raises(errors.UserError, match="head_share=0.0 leaves one stage.*'full'"):
    toys.init("staged", variables, head_share=0.0)
  with pytest.raises(errors.UserError, match="head_share=1.0 leaves one stage.*'head'"):
    toys.init("staged", variables, head_share=1.0)
  with pytest.raises(errors.UserError, match="rate_factor=0"):
    toys.init("staged", variables, rate_factor=0.0)
  with pytest.raises(errors.UserError, match="tune.group: nothing reads it.*order=lp-ft"):
    toys.init("staged", variables, group=2)
  with pytest.raises(errors.UserError, match="tune.head_share: nothing reads it.*order=unfreeze"):
    toys.init("staged", variables, order="unfreeze", head_share=0.5)
  bare = {"params": {key: variables["params"][key] for key in ("classifier", "embeddings")}}
  with pytest.raises(errors.UserError, match="no numbered layers"):
    toys.init("staged", bare, order="unfreeze")


@pytest.mark.slow
def test_lp_ft_runs_to_the_end(tiny, tmp_path):
  tiny.train(tmp_path / "run", "--config.tune.method=staged", "--config.tune.head_share=0.5",
             "--config.train.steps=12", "--config.train.log_every=1")
  card = json.loads((tmp_path / "run" / "card.json").read_text())
  assert card["model"]["trainable"] == card["model"]["parameters"]
  lines = [json.loads(line) for line in
           (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  rates = {line["step"]: line["train/rate"] for line in lines if "train/rate" in line}
  assert rates[7] < 0.2 * rates[6]
