"""Sparse updates: their support, count, gradient and merge, and the same outputs as `peft`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tune import toys

from ft import errors, tune
from ft.tune import adapters, sparse

SHAPES = {"query": (8, 8), "key": (8, 8), "inner": (8, 32), "output": (32, 8)}


def context(variables, seed=5):
  """A made-up probe gradient."""
  return tune.Context(None, lambda: {"params": toys.shaken(
    jax.tree.map(jnp.zeros_like, variables["params"]), seed)})


@functools.cache
def case(scanned):
  """(module, variables, ids, tuned, moved trainable)."""
  module, variables, ids = toys.make(scanned=scanned)
  tuned = toys.init("sparse", variables, rank=1, scale=2.0)
  return module, variables, ids, tuned, toys.shaken(tuned.trainable)


@pytest.mark.parametrize("scanned", [False, True])
def test_count_start_merge_and_gradient(scanned):
  module, variables, ids, tuned, moved = case(scanned)
  count = 2 * sum(sum(shape) for shape in SHAPES.values())  # two layers of rank 1
  assert sum(row.count for row in tuned.table) == count + 8 * 2 + 2

  @jax.jit
  def run(variables):
    return toys.forward(module, tuned, variables, ids)

  plain = jax.jit(lambda variables: module.apply(variables, ids)["logits"])
  np.testing.assert_array_equal(run(tuned.combine(tuned.frozen, tuned.trainable)),
                                plain(variables))
  merged = tuned.merge(tuned.frozen, moved)
  out = run(tuned.combine(tuned.frozen, moved))
  np.testing.assert_allclose(out, plain(merged), rtol=1e-5, atol=1e-5)
  assert np.abs(out - plain(variables)).max() > 1e-2

  # Off the support every bit stays; on it, the kernel moves by scale * value.
  flat, new, values = (tune.flatten(tree) for tree in (variables, merged, moved))
  fixed = tune.flatten(tuned.frozen)
  for path in (path for path in values if path.endswith("shira_weight")):
    kernel = path.replace("adapters/", "params/").replace("shira_weight", "kernel")
    delta = np.asarray(new[kernel]) - np.asarray(flat[kernel])
    update, (rows, columns) = values[path], np.moveaxis(
      np.asarray(fixed[path.replace("weight", "indices")]), -2, 0)
    for i in np.ndindex(update.shape[:-1]):
      want = np.zeros_like(delta[i])
      want[columns[i], rows[i]] = 2 * np.asarray(update)[i]
      assert np.count_nonzero(want) == np.count_nonzero(delta[i]) == update.shape[-1]
      np.testing.assert_allclose(delta[i], want, atol=1e-6)
      np.testing.assert_array_equal(delta[i] != 0, want != 0)

  # The gradient through the adapter is the one through the merged weights.
  def through(trainable):
    return jnp.sum((run(tuned.combine(tuned.frozen, trainable)) - jnp.arange(2.0)) ** 2)

  def through_merged(trainable):
    logits = module.apply(tuned.merge(tuned.frozen, trainable), ids)["logits"]
    return jnp.sum((logits - jnp.arange(2.0)) ** 2)

  for a, b in zip(*(jax.tree.leaves(jax.jit(jax.grad(f))(moved))
                    for f in (through, through_merged)), strict=True):
    assert np.any(np.asarray(a))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("scanned", [False, True])
def test_frozen_leaves_stay_bitwise(scanned):
  module, variables, ids, tuned, _ = case(scanned)
  tx, trainable = optax.adamw(1e-2), tuned.trainable
  opt = tx.init(trainable)

  @jax.jit
  def step(trainable, opt, frozen):
    grads = jax.grad(lambda t: toys.loss(module, tuned, t, frozen, ids))(trainable)
    updates, opt = tx.update(grads, opt, trainable)
    return optax.apply_updates(trainable, updates), opt

  for _ in range(3):
    trainable, opt = step(trainable, opt, tuned.frozen)
  after = tune.flatten(tuned.combine(tuned.frozen, trainable))
  for path, leaf in tune.flatten(tuned.combine(tuned.frozen, tuned.trainable)).items():
    trains = tune.under(path, toys.HEAD) or path.endswith("shira_weight")
    assert np.array_equal(after[path], leaf) != trains, path


def indices(tuned):
  """{module path: set of places (in, out)}."""
  return {path.split("/")[-2]: set(zip(*np.asarray(leaf)[::-1].tolist(), strict=True))
          for path, leaf in tune.flatten(tuned.frozen).items()
          if path.endswith("shira_indices") and "layer_1" in path}


@pytest.mark.parametrize("support", ["magnitude", "small", "gradient"])
def test_support_has_the_largest(support):
  _, variables, _ = toys.make()
  there = context(variables)
  tuned = toys.init("sparse", variables, context=there, rank=1, support=support)
  source = there.gradient() if support == "gradient" else variables
  for name, places in indices(tuned).items():
    kernel = np.abs(np.asarray(source["params"]["encoder"]["layer_1"][name]["kernel"]))
    mask = np.zeros(kernel.shape, bool)
    mask[tuple(zip(*places, strict=True))] = True
    assert mask.sum() == len(places) == sum(kernel.shape)
    if support == "small":
      assert kernel[mask].max() <= kernel[~mask].min()
    else:
      assert kernel[mask].min() >= kernel[~mask].max()


def test_ties_go_to_the_first():
  score = np.array([[1.0, 2, 1], [1, 3, 1]], np.float32)
  assert sorted(sparse.largest(score, 4)) == [0, 1, 2, 4]
  assert sorted(sparse.largest(score, 6)) == list(range(6))


def test_support_follows_from_seed_and_path():
  _, variables, _ = toys.make()
  first, again = (toys.init("sparse", variables, rank=1) for _ in range(2))
  fewer = toys.init("sparse", variables, rank=1, targets=("query",))
  assert indices(first) == indices(again)
  assert indices(fewer) == {"query": indices(first)["query"]}
  assert indices(first)["query"] != indices(first)["key"]  # the same shape, another path
  config = toys.config("sparse", rank=1)
  other = tune.init(config, variables, jax.random.key(4), toys.HEAD)
  assert indices(other) != indices(first)
  everything = toys.init("sparse", variables, rank=4, targets=("query",))
  assert len(indices(everything)["query"]) == 64


@pytest.mark.parametrize("support", ["random", "gradient"])
def test_stacked_layers_have_the_support_of_unstacked_ones(support):
  _, variables, _ = toys.make()
  _, stacked, _ = toys.make(scanned=True)
  flat = tune.flatten(variables)
  same = tune.unflatten({path: jnp.stack([flat[path.replace("layers", f"layer_{i}")]
                                          for i in range(2)]) if "layers/" in path else flat[path]
                         for path in tune.flatten(stacked)})
  given = [tune.Context(None, lambda tree=tree: {"params": tree["params"]})
           for tree in (variables, same)]
  alone, together = (
    tune.flatten(toys.init("sparse", tree, context=c, rank=1, support=support).frozen)
    for tree, c in zip((variables, same), given, strict=True))
  for path, leaf in together.items():
    if path.endswith("shira_indices"):
      for i in range(2):
        np.testing.assert_array_equal(leaf[i], alone[path.replace("layers", f"layer_{i}")])


def test_half_precision_kernels_keep_small_updates():
  kernel = jnp.full((4, 4), 1.0, jnp.bfloat16)
  method = sparse.Sparse(toys.config("sparse", rank=1))
  p = {"shira_weight": jnp.full((3,), 1e-4), "shira_indices": jnp.array([[0, 1, 2], [3, 2, 1]])}
  moved, _ = method.weights(p, kernel, None, None)
  np.testing.assert_allclose(moved[3, 0], 1.0001, rtol=1e-6)


def test_messages():
  _, variables, _ = toys.make()
  with pytest.raises(errors.UserError, match="rank=5 asks for 80 values.*which has 64.*at most 4"):
    toys.init("sparse", variables, rank=5)
  with pytest.raises(errors.UserError, match="probe batch"):
    toys.init("sparse", variables, support="gradient")
  with pytest.raises(errors.UserError, match="matches no layer"):
    toys.init("sparse", variables, targets=("quarry",))
  with pytest.raises(errors.UserError, match="embedding"):
    toys.init("sparse", variables, targets=("embeddings",))
  method = sparse.Sparse(toys.config("sparse", rank=1))
  layer = adapters.Layer("layer", "linear", (3, 2), 0, np.random.default_rng(0), np.ones((3, 2)))
  for places, words in (([[2], [0]], "expected"), ([[0, 0], [1, 1]], "there twice"),
                        ([[0], [3]], "expected"), ([[0, 1]], "expected")):
    places = np.array(places)
    with pytest.raises(errors.UserError, match=words):
      method.from_peft({"shira_weight": np.ones(places.shape[1], np.float32),
                        "shira_indices": places}, layer)


@pytest.mark.parametrize("support", ["random", "magnitude"])
def test_parity_with_peft(support, tmp_path):
  """What `to_peft` gives loads in `peft`, with the same outputs, and comes back."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  from safetensors import torch as files

  rng = np.random.default_rng(0)
  kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((6, 4), (4,)))
  config = toys.config("sparse", rank=2, scale=1.5, support=support)
  method = sparse.Sparse(config)
  layer = adapters.Layer("layer", "linear", (6, 4), 4, np.random.default_rng(1), kernel)
  trains, fixed = method.create(layer)
  p = {**fixed, "shira_weight": rng.normal(size=trains["shira_weight"].shape).astype(np.float32)}

  class Net(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.layer = torch.nn.Linear(6, 4)

    def forward(self, x):
      return self.layer(x)

  net = Net()
  net.layer.weight.data, net.layer.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(bias)
  settings = {**sparse.peft_config(config), "target_modules": ["layer"]}
  peft.ShiraConfig(**settings).save_pretrained(tmp_path)
  files.save_file({f"base_model.model.layer.{name}": torch.tensor(np.array(value))
                   for name, value in method.to_peft(p, layer).items()},
                  tmp_path / "adapter_model.safetensors")
  theirs = peft.PeftModel.from_pretrained(net, str(tmp_path))
  x = rng.normal(size=(5, 6)).astype(np.float32)
  moved, _ = method.weights(p, jnp.asarray(kernel), None, None)
  want = theirs(torch.tensor(x)).detach().numpy()
  np.testing.assert_allclose(x @ np.asarray(moved) + bias, want, rtol=1e-5, atol=1e-5)

  theirs.save_pretrained(str(tmp_path / "again"))
  stored = peft.PeftConfig.from_pretrained(str(tmp_path / "again")).to_dict()
  values = sparse.peft_values(stored)
  assert values == {"rank": 2, "scale": 1.0}
  read = files.load_file(tmp_path / "again" / "adapter_model.safetensors")
  tensors = {name.removeprefix("base_model.model.layer."): tensor.numpy()
             for name, tensor in read.items()}
  back = sparse.Sparse(toys.config("sparse", **values))
  trains, fixed = back.from_peft(tensors, layer)
  again, _ = back.weights({**trains, **fixed}, jnp.asarray(kernel), None, None)
  np.testing.assert_allclose(again, moved, rtol=1e-6, atol=1e-6)
