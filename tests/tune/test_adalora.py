"""AdaLoRA's budget, importance and penalty: those of `peft`, over all layers, stacked or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict
from tune import toys

from ft import errors, optim, tune
from ft.tune import adalora

VALUES = {"rank": 3, "target_rank": 2}
make = functools.cache(toys.make)


def values_of(tree) -> dict:
  return {path: np.asarray(leaf) for path, leaf in tune.flatten(tree).items()
          if path.endswith("adalora_e")}


@pytest.mark.parametrize("scanned", [False, True])
def test_a_run_ends_with_the_target_rank(scanned):
  module, variables, ids = make(scanned=scanned)
  tuned = toys.init("adalora", variables, **VALUES, tinit=0.2, tfinal=0.3)
  steps = 20
  config = config_dict.ConfigDict(
    {**{key: entry[0] for key, entry in optim.KEYS.items()}, "rate": 1e-2})
  tx, _ = optim.make(config, tuned.trainable, steps, toys.HEAD, tuned)

  def loss(trainable, frozen):
    return toys.loss(module, tuned, trainable, frozen, ids) + tuned.penalty(trainable)

  @jax.jit
  def train(trainable, frozen):
    def step(carry, _):
      trainable, opt = carry
      grads = jax.grad(loss)(trainable, frozen)
      updates, opt = tx.update(grads, opt, trainable, gradient=grads)
      trainable = optax.apply_updates(trainable, updates)
      left = [(leaf != 0).sum() for path, leaf in tune.flatten(trainable).items()
              if path.endswith("adalora_e")]
      return (trainable, opt), sum(left)
    (trainable, _), left = jax.lax.scan(step, (trainable, tx.init(trainable)), length=steps)
    return trainable, left, tuned.merge(frozen, trainable)

  trainable, left, merged = train(tuned.trainable, tuned.frozen)
  # 8 layers: 24 values, from step 5 on fewer by a cubic, from step 14 to the end 16.
  cubic = [int(8 * (1 - (step - 4) / 10)**3 + 16) for step in range(5, 15)]
  assert left.tolist() == [24] * 4 + cubic + [16] * 6
  assert sum((e != 0).sum() for e in values_of(trainable).values()) == 2 * 8
  np.testing.assert_allclose(
    toys.forward(module, tuned, tuned.combine(tuned.frozen, trainable), ids),
    jax.jit(module.apply)(merged, ids)["logits"], rtol=1e-5, atol=1e-5)


def test_budgets():
  config = toys.config("adalora", rank=12, target_rank=8, tinit=0.1, tfinal=0.3, interval=10)
  budget, chooses, last = adalora.budgets(config, 1000, 72)
  assert last == 700 and budget[:101].tolist() == [864] * 101
  assert budget[400] == int(288 * 0.5**3 + 576) and set(budget[700:].tolist()) == {576}
  assert np.flatnonzero(chooses).tolist() == list(range(110, 701, 10))
  for total in (1, 2, 3):  # runs too short for a schedule still end with the target
    budget, chooses, last = adalora.budgets(config, total, 2)
    assert budget[-1] == 16 and chooses[last] and last <= total


def test_decisions_are_those_of_peft():
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  total, rng = 12, np.random.default_rng(0)
  torch.manual_seed(0)
  model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 7), torch.nn.Linear(6, 5))
  theirs = peft.get_peft_model(model, peft.AdaLoraConfig(
    target_modules=["0", "1", "2"], init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2,
    total_step=total, beta1=0.8, beta2=0.9)).base_model
  names = {"lora_A": "adalora_a", "lora_B": "adalora_b", "lora_E": "adalora_e"}
  torch_params = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
  assert len(torch_params) == 9

  def ours(arrays, stacked):
    """Layers 0 and 2, which are equal, may be a stack."""
    flat = {}
    for name, array in arrays.items():
      number, kind = name.split(".")[-3], name.split(".")[-2]
      flat[number, names[kind]] = array.reshape(-1) if kind == "lora_E" else array.T
    if not stacked:
      return tune.unflatten({f"adapters/layer_{n}/{k}": a.copy() for (n, k), a in flat.items()})
    out = {f"adapters/one/{k}": flat["1", k].copy() for k in names.values()}
    out |= {f"adapters/layers/{k}": np.stack([flat["0", k], flat["2", k]]) for k in names.values()}
    return tune.unflatten(out)

  def kept(params, stacked):
    e = {path.split("/")[1]: leaf != 0 for path, leaf in values_of(params).items()}
    return ([e["layers"][0], e["one"], e["layers"][1]] if stacked
            else [e[f"layer_{n}"] for n in range(3)])

  config = toys.config("adalora", rank=4, target_rank=2, tinit=2 / total, tfinal=3 / total,
                       interval=2, betas=(0.8, 0.9))
  tx = adalora.allocator(config, total)
  update = jax.jit(tx.update)
  values = {name: p.detach().numpy().copy() for name, p in torch_params.items()}
  params = {stacked: ours(values, stacked) for stacked in (False, True)}
  states = {stacked: tx.init(tree) for stacked, tree in params.items()}
  counts = []
  for step in range(1, total + 1):
    grads = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in torch_params.items()}
    moves = {name: 0.1 * rng.normal(size=p.shape).astype(np.float32)
             for name, p in torch_params.items()}
    with torch.no_grad():
      for name, p in torch_params.items():
        p += torch.tensor(moves[name])
        p.grad = torch.tensor(grads[name])
    theirs.update_and_allocate(step)
    expected = [theirs.model[n].lora_E["default"].detach().numpy().ravel() != 0 for n in range(3)]
    for stacked in params:
      updates, states[stacked] = update(ours(moves, stacked), states[stacked], params[stacked],
                                        gradient=ours(grads, stacked))
      params[stacked] = optax.apply_updates(params[stacked], updates)
      for mask, wanted in zip(kept(params[stacked], stacked), expected, strict=True):
        np.testing.assert_array_equal(mask, wanted, err_msg=f"step {step}")
    counts.append(int(sum(mask.sum() for mask in expected)))
  assert counts[:3] == [12] * 3 and counts[-4:] == [6] * 4 and 8 in counts


@pytest.mark.parametrize("stacked", [False, True])
def test_penalty_is_that_of_peft(stacked):
  torch = pytest.importorskip("torch")
  rng, shape = np.random.default_rng(0), (2,) if stacked else ()
  a = rng.normal(size=(*shape, 6, 3)).astype(np.float32)
  b = rng.normal(size=(*shape, 3, 5)).astype(np.float32)
  place = "layers" if stacked else "layer_0"
  tree = tune.unflatten({f"adapters/{place}/adalora_a": a, f"adapters/{place}/adalora_b": b,
                         f"adapters/{place}/adalora_e": np.ones((*shape, 3), np.float32),
                         "params/classifier/kernel": np.ones((4, 4), np.float32)})
  norms = []
  for one, other in zip(a.reshape(-1, 6, 3), b.reshape(-1, 3, 5), strict=True):
    lora_a, lora_b = torch.tensor(one.T), torch.tensor(other.T)
    norms += [torch.norm(p @ p.T - torch.eye(3), p="fro") for p in (lora_a, lora_b.T)]
  np.testing.assert_allclose(adalora.orthogonality(tree), np.mean(norms), rtol=1e-6)
  exact = jax.tree.map(jnp.zeros_like, tree)
  exact["adapters"][place]["adalora_a"] = jnp.broadcast_to(jnp.eye(6, 3), a.shape)
  grads = jax.grad(adalora.orthogonality)(exact)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_among_equals_exactly_the_budget_stays():
  shapes = {"a": (2, 4, 5), "b": (2, 5, 3), "e": (2, 5)}
  leaves = {f"adapters/x/adalora_{name}": jnp.ones(shape) for name, shape in shapes.items()}
  for budget in (0, 3, 10):
    masks = adalora.keep(leaves, leaves, budget)
    assert int(masks["adapters/x/adalora_e"].sum()) == budget


def test_penalty_is_off_with_its_coefficient():
  _, variables, _ = make(depth=1)
  assert toys.init("adalora", variables, **VALUES, orthogonal=0.0).penalty is None
  tuned = toys.init("adalora", variables, **VALUES, orthogonal=0.5)
  np.testing.assert_allclose(tuned.penalty(tuned.trainable),
                             0.5 * adalora.orthogonality(tuned.trainable))


def test_messages():
  _, variables, _ = make(depth=1)
  for match, values in (
    ("target_rank=8 is larger than tune.rank=2", {"rank": 2}),
    ("tinit=0.5 and tune.tfinal=0.5 leave no part", {**VALUES, "tinit": 0.5, "tfinal": 0.5}),
    ("betas=.*two numbers between 0 and 1", {**VALUES, "betas": (0.9,)}),
    ("betas=.*two numbers between 0 and 1", {**VALUES, "betas": (0.9, 1.0)}),
  ):
    with pytest.raises(errors.UserError, match=match):
      toys.init("adalora", variables, **values)
