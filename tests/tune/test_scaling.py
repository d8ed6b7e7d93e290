"""Scales, rotations, random and multiplied updates: formulas, gradients, merging, PEFT's own."""

import dataclasses
import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tune import toys

from ft import errors, models, tune
from ft.models import convolution, layers
from ft.tune import adapters, ia3, lokr, oft

# Trainable parameters of one block of the toy, whose layers are 8 x 8 twice, 8 x 32 and 32 x 8.
SIDES = 8 + 8 + 8 + 8 + 8 + 32 + 32 + 8
CASES = {
  "ia3": ("ia3", {}, 8 + 32),  # outputs of key, inputs of output
  "ssf": ("ssf", {}, 2 * (8 + 8 + 32 + 8)),
  "oft": ("oft", {"block_size": 4}, (2 + 2 + 2 + 8) * 6),
  "oft_exact": ("oft", {"blocks": 2, "neumann": 0}, 3 * 2 * 6 + 2 * 120),
  "vera": ("vera", {"rank": 4}, 4 * 4 + 8 + 8 + 32 + 8),
  "loha_thin": ("loha", {"rank": 1}, 2 * SIDES),
  "loha": ("loha", {"rank": 3}, 2 * 3 * SIDES),
  # 8 = 2 x 4 and 32 = 4 x 8: w1 and w2, or the latter's factors of rank 1.
  "lokr": ("lokr", {"rank": 4}, 2 * (4 + 16) + 2 * (8 + 32)),
  "lokr_low": ("lokr", {"rank": 1, "decompose_both": True},
               2 * (4 + 8) + 2 * (6 + 12)),
  "hira": ("hira", {"rank": 2}, 2 * SIDES),
  "adalora": ("adalora", {"rank": 3, "target_rank": 2}, 3 * (SIDES + 4)),
}
HEAD = 8 * 2 + 2
make = functools.cache(toys.make)
# Every program here runs once.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("scanned", toys.SCANNED)
@pytest.mark.parametrize("case", CASES)
def test_count_start_gradient_and_merging(case, scanned):
  method, values, count = CASES[case]
  depth = 1 + scanned
  module, variables, ids = make(depth=depth, scanned=scanned)
  tuned = toys.init(method, variables, **values)
  assert sum(row.count for row in tuned.table) == depth * count + HEAD
  trainable = toys.shaken(tuned.trainable)

  def plain(variables):
    return module.apply(variables, ids)["logits"]

  def through_merged(trainable, frozen):
    return jnp.sum((plain(tuned.merge(frozen, trainable)) - jnp.arange(2.0)) ** 2)

  def adapted(trainable, frozen):
    return toys.forward(module, tuned, tuned.combine(frozen, trainable), ids)

  @jit
  def run(variables, start, trainable, frozen):
    grads = jax.grad(lambda t: toys.loss(module, tuned, t, frozen, ids))(trainable)
    merged = tuned.merge(frozen, trainable)
    assert jax.eval_shape(lambda: merged) == jax.eval_shape(lambda: variables)
    return ((plain(variables), adapted(start, frozen)), (plain(merged), adapted(trainable, frozen)),
            (grads, jax.grad(through_merged)(trainable, frozen)))

  start, moved, (grads, expected) = run(variables, tuned.trainable, trainable, tuned.frozen)
  np.testing.assert_allclose(start[1], start[0], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(moved[1], moved[0], rtol=1e-5, atol=1e-5)
  assert np.abs(moved[0] - start[0]).max() > 1e-3
  for path, leaf in tune.flatten(expected).items():
    assert np.abs(leaf).max() > 0, path
    np.testing.assert_allclose(tune.flatten(grads)[path], leaf, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_training_moves_every_trainable_and_no_frozen_leaf(case):
  method, values, _ = CASES[case]
  module, variables, ids = make(depth=1)
  tuned = toys.init(method, variables, **values)
  before = tune.flatten(jax.tree.map(np.asarray, tuned.combine(tuned.frozen, tuned.trainable)))
  tx = optax.adam(1e-2)

  @jit
  def train(trainable, frozen):
    def step(carry, _):
      trainable, opt = carry
      grads = jax.grad(lambda t: toys.loss(module, tuned, t, frozen, ids))(trainable)
      updates, opt = tx.update(grads, opt, trainable)
      return (optax.apply_updates(trainable, updates), opt), None
    return jax.lax.scan(step, (trainable, tx.init(trainable)), length=3)[0][0]

  after = tune.flatten(tuned.combine(tuned.frozen, train(tuned.trainable, tuned.frozen)))
  moved = {path for path, leaf in after.items() if np.any(np.asarray(leaf) != before[path])}
  assert moved == {row.path for row in tuned.table}


@pytest.mark.parametrize("case", CASES)
def test_half_precision(case):
  method, values, _ = CASES[case]
  module, variables, ids = make(depth=1)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  tuned = toys.init(method, half, **values)
  trainable = toys.shaken(tuned.trainable)
  assert {x.dtype for x in jax.tree.leaves(trainable["adapters"])} == {jnp.dtype(jnp.float32)}
  merged = jax.eval_shape(tuned.merge, tuned.frozen, trainable)
  assert merged == jax.eval_shape(lambda: half)
  plain = jax.eval_shape(lambda: module.apply(half, ids)["logits"])
  logits = jax.eval_shape(lambda state: toys.forward(module, tuned, state, ids),
                          tuned.combine(tuned.frozen, trainable))
  assert logits.dtype == plain.dtype and logits.shape == plain.shape


class Convolutions(convolution.nn.Module):
  """x (B, H, W, 4) through a 3x3 and a strided 1x1 convolution, one with a bias."""

  def setup(self):
    self.wide = convolution.Conv(6, 3, use_bias=True)
    self.point = convolution.Conv(8, 1, 2)

  def __call__(self, x):
    return {"logits": self.point(jnp.tanh(self.wide(x)))}


CONVOLUTIONS = {"ia3": {"targets": ("wide", "point"), "feedforward": ("point",)},
                "ssf": {"targets": ("wide", "point")}, "loha": {"targets": ("wide", "point")},
                "lokr": {"targets": ("wide", "point")}, "oft": {}, "vera": {}, "hira": {},
                "adalora": {}}


@pytest.mark.parametrize("method", CONVOLUTIONS)
def test_convolutions(method):
  module, x = Convolutions(), jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
  variables = jit(module.init)(jax.random.key(1), x)
  ranks = {"rank": 2} if "rank" in importlib.import_module(f"ft.tune.{method}").KEYS else {}
  ranks |= {"target_rank": 1} if method == "adalora" else {}
  tuned = toys.init(method, variables, head=(), **CONVOLUTIONS[method], **ranks)
  adapted = {path.split("/")[1] for path in tune.flatten(tuned.trainable)}
  assert adapted == ({"point", "wide"} if CONVOLUTIONS[method] else {"point"})
  trainable = toys.shaken(tuned.trainable)

  @jit
  def run(variables, trainable, frozen):
    return (module.apply(variables, x)["logits"],
            module.apply(tuned.merge(frozen, trainable), x)["logits"],
            toys.forward(module, tuned, tuned.combine(frozen, trainable), x))

  plain, merged, moved = run(variables, trainable, tuned.frozen)
  np.testing.assert_allclose(moved, merged, rtol=1e-5, atol=1e-5)
  assert np.abs(merged - plain).max() > 1e-3
  if not CONVOLUTIONS[method]:
    with pytest.raises(errors.UserError, match="a layer of kind conv"):
      toys.init(method, variables, head=(), targets=("wide",))


# ---- the same as `peft` -------------------------------------------------------------------------

PARITY = {
  "ia3": ("IA3Config", {"feedforward_modules": ["fc2", "point"]}, "conv"),
  "oft": ("OFTConfig", {"oft_block_size": 5}, "point"),
  "oft_exact": ("OFTConfig", {"r": 3, "oft_block_size": 0, "use_cayley_neumann": False}, "point"),
  "oft_terms": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}, "point"),
  "vera": ("VeraConfig", {"r": 5}, ""),
  "loha": ("LoHaConfig", {"r": 3, "alpha": 5}, "conv"),
  "lokr": ("LoKrConfig", {"r": 8, "alpha": 3}, "conv"),
  "lokr_low": ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 4}, "conv"),
  "hira": ("HiraConfig", {"r": 3}, "point"),
  "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9},
              "point"),
}
SHAPES = {"fc1": ("linear", (8, 12)), "fc2": ("linear", (12, 8)), "point": ("pointwise", (4, 6)),
          "wide": ("conv", (3, 3, 4, 8))}


def torch_model():
  import torch

  class Model(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.fc1, self.fc2 = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8, bias=False)
      self.point, self.wide = torch.nn.Conv2d(4, 6, 1), torch.nn.Conv2d(4, 8, 3, bias=False)

    def forward(self, rows, images):
      rows = self.fc2(torch.tanh(self.fc1(rows)))
      return torch.cat([y.flatten() for y in (rows, self.point(images), self.wide(images))])

  torch.manual_seed(0)
  return Model(), (torch.randn(3, 8), torch.randn(2, 4, 5, 5))


def ours(model, kinds):
  """{name: (Layer, kernel, bias)} of the torch model's layers."""
  found = {}
  for name in kinds:
    kind, shape = SHAPES[name]
    weight = getattr(model, name).weight.detach().numpy()
    kernel = jnp.asarray(weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0))
    bias = getattr(model, name).bias
    bias = None if bias is None else jnp.asarray(bias.detach().numpy())
    layer = adapters.Layer(name, kind, shape, 0 if bias is None else len(bias),
                           np.random.default_rng(0), kernel)
    found[name] = layer, kernel.reshape(shape), bias
  return found


@pytest.mark.parametrize("case", PARITY)
def test_files_of_peft(case, tmp_path):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  from safetensors.numpy import load_file, save_file

  name, values, reach = PARITY[case]
  kinds = [n for n in SHAPES
           if n[:2] == "fc" or reach and n == "point" or reach == "conv"]
  model, inputs = torch_model()
  found = ours(model, kinds)
  theirs = peft.get_peft_model(model, getattr(peft, name)(target_modules=kinds, **values))
  prefixes = ("lora_", "ia3_", "oft_", "vera_lambda", "hada_", "lokr_", "hira_")
  with torch.no_grad():
    for path, leaf in theirs.named_parameters():
      if any(p in path for p in prefixes):
        leaf += 0.1 * torch.randn(leaf.shape)
    expected = theirs(*inputs).numpy()
  theirs.save_pretrained(tmp_path)
  given = json.loads((tmp_path / "adapter_config.json").read_text())
  tensors = load_file(tmp_path / "adapter_model.safetensors")

  # What peft wrote, read by us, computes the same.
  method = importlib.import_module(f"ft.tune.{case.split('_')[0]}")
  assert given["peft_type"] == method.PEFT
  config = toys.config(method.__name__.split(".")[-1], **method.peft_values(given))
  adapter = method.METHOD(config)
  common = {}
  if case == "vera":
    common = adapter.shared_from_peft({n: tensors[f"base_model.{n}"]
                                       for n in ("vera_A", "vera_B")})[1]
  parts, merged, written = {}, {}, {}
  for path, (layer, kernel, bias) in found.items():
    prefix = f"base_model.model.{path}."
    own = {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}
    parts[path], fixed = adapter.from_peft(own, layer)
    made = adapter.create(layer)
    shapes = [{n: np.shape(a) for n, a in part.items()} for part in (*made, parts[path], fixed)]
    assert shapes[:2] == shapes[2:]
    merged[path] = adapter.merge({**common, **parts[path]}, kernel, bias, layer)
    back = adapter.to_peft(parts[path], layer)
    assert back.keys() == own.keys()
    for n, a in back.items():
      assert a.dtype == np.float32
      np.testing.assert_array_equal(a, own[n])
      written[prefix + n] = np.ascontiguousarray(a)
  with torch.no_grad():
    plain, _ = torch_model()
    for path, (kernel, bias) in merged.items():
      kind, kernel = SHAPES[path][0], np.asarray(kernel)
      kernel = kernel[None, None] if kind == "pointwise" else kernel
      weight = kernel.T if kind == "linear" else kernel.transpose(3, 2, 0, 1)
      getattr(plain, path).weight.copy_(torch.tensor(np.ascontiguousarray(weight)))
      if bias is not None:
        getattr(plain, path).bias.copy_(torch.tensor(np.asarray(bias)))
    np.testing.assert_allclose(plain(*inputs).numpy(), expected, rtol=1e-5, atol=1e-5)

    # What we write, read by peft, computes the same.
    folder = tmp_path / "ours"
    folder.mkdir()
    if common:
      written |= {f"base_model.{n}": np.ascontiguousarray(a)
                  for n, a in adapter.shared_to_peft(common).items()}
    save_file(written, folder / "adapter_model.safetensors")
    spec = {"peft_type": method.PEFT, "target_modules": kinds, **method.peft_config(config)}
    if case == "ia3":
      spec["feedforward_modules"] = [n for n, (layer, *_) in found.items()
                                     if adapter.feedforward(layer)]
    (folder / "adapter_config.json").write_text(json.dumps(spec))
    fresh, _ = torch_model()
    read = peft.PeftModel.from_pretrained(fresh, folder)
    np.testing.assert_allclose(read(*inputs).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_pruned_ranks_of_adalora_files_come_back_as_zeros():
  method = importlib.import_module("ft.tune.adalora")
  adapter = method.METHOD(toys.config("adalora", rank=4, target_rank=2))
  layer = adapters.Layer("fc", "linear", (8, 12), 0, np.random.default_rng(0), None)
  p, _ = adapter.create(layer)
  p["adalora_e"] = np.array([1.0, 0, 2, 0], np.float32)
  tensors = adapter.to_peft(p, layer)
  kept = {"lora_A": tensors["lora_A"][::2], "lora_B": tensors["lora_B"][:, ::2],
          "lora_E": tensors["lora_E"][::2]}
  back, _ = adapter.from_peft(kept, layer)
  assert {n: a.shape for n, a in back.items()} == {n: a.shape for n, a in p.items()}
  kernel = jnp.zeros((8, 12))
  np.testing.assert_allclose(adapter.merge(back, kernel, None, layer)[0],
                             adapter.merge(p, kernel, None, layer)[0], rtol=1e-6)
  with pytest.raises(errors.UserError, match="has rank 5.*init_r says 4"):
    adapter.from_peft({n: np.zeros((5, 5)) for n in tensors}, layer)


def test_divisors_are_those_of_peft():
  pytest.importorskip("peft")
  from peft.tuners.lokr.layer import factorization
  from peft.tuners.oft.layer import OFTLayer

  for number in (1, 2, 7, 12, 36, 96, 127, 128, 312, 384, 768, 1000):
    for wanted in (1, 2, 3, 4, 5, 8, 10, 32, 50):
      assert oft.nearest_divisor(number, wanted) == OFTLayer.adjust_oft_parameters(
        None, number, wanted)
      assert lokr.factorise(number, wanted) == factorization(number, wanted)
    assert lokr.factorise(number, -1) == factorization(number, -1)


# ---- single methods -----------------------------------------------------------------------------


@pytest.mark.parametrize("neumann,tolerance", [(0, 1e-5), (5, 2e-4), (12, 1e-5)])
def test_rotations_are_orthogonal(neumann, tolerance):
  triangles = 0.02 * jax.random.normal(jax.random.key(0), (3, 28))
  matrices = oft.rotations(triangles, neumann)
  assert matrices.shape == (3, 8, 8)
  np.testing.assert_allclose(matrices @ matrices.mT, np.broadcast_to(np.eye(8), (3, 8, 8)),
                             atol=tolerance)


def test_vera_shares_its_matrices_and_stores_none_of_them_as_trainable():
  _, variables, _ = make()
  tuned = toys.init("vera", variables, rank=4)
  fixed = {path: leaf.shape for path, leaf in tune.flatten(tuned.frozen).items() if "vera" in path}
  assert fixed == {"adapters/vera_a": (32, 4), "adapters/vera_b": (4, 32)}
  assert {row.path.rpartition("/")[2] for row in tuned.table if "vera" in row.path} == {
    "vera_lambda_b", "vera_lambda_d"}
  a = np.asarray(tuned.frozen["adapters"]["vera_a"])
  assert 0.9 * (6 / 32)**0.5 < np.abs(a).max() <= (6 / 32)**0.5


def test_ia3_scales_outputs_and_inputs_of_the_right_layers():
  _, variables, _ = make()
  rows = {row.path.removeprefix("adapters/encoder/"): row.shape
          for row in toys.init("ia3", variables).table if "ia3" in row.path}
  assert rows == {f"layer_{i}/{name}": shape for i in (0, 1)
                  for name, shape in (("key/ia3_out", (8,)), ("output/ia3_in", (32,)))}
  alone = toys.init("ia3", variables, targets=("layer_0",), feedforward=())
  assert {row.path.rpartition("/")[2] for row in alone.table if "ia3" in row.path} == {"ia3_out"}


def _families():
  folder = pathlib.Path(models.__file__).parent
  return sorted(path.stem for path in folder.glob("*.py")
                if path.stem != "__init__" and "\nMODEL_TYPES" in path.read_text())


@pytest.mark.parametrize("family", [f for f in _families() if f not in ("clip", "sasrec",
                                                                         "tabular")])
def test_default_targets_of_ia3_exist_in_every_family(family):
  """On shapes alone; clip is made of the towers of others, sasrec's names are toys' and gpt2's, and
  tabular has no such layers."""
  file = importlib.import_module(f"ft.models.{family}")
  config = file.Config()
  once = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "n_layer")
  once = {field.name: 1 for field in dataclasses.fields(config) if field.name in once}
  config = dataclasses.replace(config, **once)
  inputs = file.probe_inputs(config)
  variables = jax.eval_shape(lambda: file.Model(config).init(jax.random.key(0), **inputs))
  found = adapters.targets(ia3.KEYS["targets"][0], variables, file.HEAD, ia3.Method.KINDS)
  adapter = ia3.Method(toys.config("ia3"))
  inside = [path for path in found
            if adapter.feedforward(adapters.Layer(path, "linear", (), 0, None, None))]
  assert not any("attention" in path or "attn" in path for path in inside)
  assert len(inside) < len(found) or family in ("convnext", "efficientnet", "ttm")
  assert inside or family == "resnet"


def test_messages():
  _, variables, _ = make()
  for match, method, values in (
    ("(?s)'inner' matches none of the layers that tune.targets names.*layer_0/key",
     "ia3", {"feedforward": ("inner",), "targets": ("key",)}),
    ("(?s)matches none of the layers", "ia3", {"feedforward": ("value",)}),
    ("tune.feedforward: '\\(' is no regular", "ia3", {"feedforward": ("(",)}),
    ("neumann=1 is the identity", "oft", {"neumann": 1}),
    ("tune.factor=0 divides nothing", "lokr", {"factor": 0}),
    ("rank=9 is larger than the smaller side", "hira", {"rank": 9}),
    ("rank=9 is larger than the smaller side", "loha", {"rank": 9}),
    ("rank=12 is larger than the smaller side", "adalora", {}),
    ("'q_proj' matches no layer", "ssf", {"targets": ("q_proj",)}),
    ("'q_proj' matches no layer", "vera", {"targets": ("q_proj",)}),
  ):
    with pytest.raises(errors.UserError, match=match):
      toys.init(method, variables, **values)
  _, stacked, _ = make(scanned=True)
  with pytest.raises(errors.UserError, match="some of the layers of encoder/layers/output"):
    toys.init("ia3", stacked, feedforward=("layer_0/output",))
  odd = {"params": {"prime": {"kernel": jnp.ones((11, 4))}}}
  with pytest.raises(errors.UserError, match="prime has 11 inputs.*tune.block_size=11"):
    toys.init("oft", odd, head=(), block_size=4)
  for module, key in ((oft, "coft"), (oft, "block_share"), (lokr, "alpha_pattern")):
    with pytest.raises(errors.UserError, match=f"{key}=.*is not supported"):
      module.peft_values({key: {"fc1": 2}})
  layer = adapters.Layer("wide", "conv", (3, 3, 4, 8), 0, np.random.default_rng(0), None)
  for name, tensor in (("loha", "hada_t1"), ("lokr", "lokr_t2")):
    adapter = importlib.import_module(f"ft.tune.{name}").METHOD(toys.config(name))
    with pytest.raises(errors.UserError, match="wide: Lo.. files with use_effective_conv2d"):
      adapter.from_peft({tensor: np.zeros(1)}, layer)


def test_fused_products_stay_fused_where_only_outputs_are_scaled():
  """`layers.fused` takes a module whose input changes out of the common product."""
  class Pair(layers.nn.Module):
    def setup(self):
      self.key, self.value = layers.Linear(8), layers.Linear(8)

    def __call__(self, x):
      return {"logits": sum(layers.fused([self.key, self.value], x))}

  module, x = Pair(), jnp.ones((20, 8))
  variables = module.init(jax.random.key(0), x)
  products = {}
  for feedforward in ((), ("key",)):
    tuned = toys.init("ia3", variables, head=(), feedforward=feedforward)
    text = str(jax.make_jaxpr(lambda v, t=tuned: toys.forward(module, t, v, x))(
      tuned.combine(tuned.frozen, tuned.trainable)))
    products[feedforward] = text.count("dot_general[")
  assert products == {(): 1, ("key",): 2}
