"""LoRA: the update is the right one, its gradient too, and bad input is named."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tune import toys

from ft import errors, optim, tune
from ft.models import convolution, layers
from ft.tune import adapters, lora, lora_start

BODY = ("query", "key", "inner", "output")
HEAD = 8 * 2 + 2
BIASES = 2 * (8 + 8 + 32 + 8)
COUNT = 2 * (2 * (8 + 8) + 2 * (8 + 32))  # of both layers together, for a rank of 1

# settings -> trainable parameters of the toy (2 layers of width 8, 11 words, head of 2)
VARIANTS = {
  "plain": ({"rank": 2, "alpha": 3.0}, 2 * COUNT + HEAD),
  "patterns": ({"rank": 2, "scale": "alpha/sqrt(r)", "alpha": 3.0, "alpha_pattern": ("key=5.5",),
                "rank_pattern": ("inner$=3", "in.er=1")},
               2 * COUNT + 2 * (8 + 32) + HEAD),
  "dora": ({"rank": 2, "dora": True}, 2 * COUNT + BIASES + HEAD),
  "pissa": ({"rank": 2, "alpha": 3.0, "start": "pissa"}, 2 * COUNT + HEAD),
  "olora": ({"rank": 2, "alpha": 3.0, "start": "olora", "dora": True},
            2 * COUNT + BIASES + HEAD),
  "bias": ({"rank": 2, "bias": "all", "dora": True}, 2 * COUNT + 2 * BIASES + 2 * 8 + HEAD),
  "embedding": ({"rank": 2, "targets": ("embeddings", "query"), "bias": "lora_only"},
                2 * (11 + 8) + 2 * 2 * (8 + 8) + 2 * 8 + HEAD),
}


@functools.cache
def toy(scanned: bool):
  return toys.make(scanned=scanned)


@pytest.mark.parametrize("scanned", toys.SCANNED)
@pytest.mark.parametrize("name", VARIANTS)
def test_promises(name, scanned):
  """Count, start, merging, gradient, and frozen leaves that stay: of each kind of LoRA.

  Merging holds the lengths of a DoRA as constants, too: it calls what training calls. That these
  are the right ones and constants is compared with `peft` in test_lora_peft.py.
  """
  module, variables, ids = toy(scanned)
  values, count = VARIANTS[name]
  tuned = toys.init("lora", variables, **values)
  assert sum(row.count for row in tuned.table) == count
  tx = optax.sgd(1e-2)

  def plain(trainable):
    logits = module.apply(tuned.merge(tuned.frozen, trainable), ids)["logits"]
    return jnp.sum((logits - jnp.arange(2.0)) ** 2), logits

  def adapted(trainable, frozen):
    with nn.intercept_methods(tuned.interceptor):
      logits = module.apply(tuned.combine(frozen, trainable), ids)["logits"]
    return jnp.sum((logits - jnp.arange(2.0)) ** 2), logits

  @jax.jit
  def run(trainable, frozen):
    (_, merged), theirs = jax.value_and_grad(plain, has_aux=True)(trainable)
    (_, logits), ours = jax.value_and_grad(adapted, has_aux=True)(trainable, frozen)
    updates, _ = tx.update(ours, tx.init(trainable), trainable)
    return logits, merged, ours, theirs, optax.apply_updates(trainable, updates)

  pretrained = jax.jit(module.apply)(variables, ids)["logits"]
  before = jax.tree.map(np.array, tuned.frozen)
  trainable = tuned.trainable
  logits, *_ = run(trainable, tuned.frozen)
  np.testing.assert_allclose(logits, pretrained, rtol=1e-5, atol=1e-5)
  trainable = toys.shaken(trainable)
  for _ in range(3):
    logits, merged, ours, theirs, new = run(trainable, tuned.frozen)
    np.testing.assert_allclose(logits, merged, rtol=1e-5, atol=1e-5)
    for path, leaf in tune.flatten(theirs).items():
      assert np.abs(leaf).max() > 0, path
      np.testing.assert_allclose(tune.flatten(ours)[path], leaf, rtol=1e-4, atol=5e-4, err_msg=path)
    trainable = new
  for path, leaf in tune.flatten(before).items():
    np.testing.assert_array_equal(tune.flatten(tuned.frozen)[path], leaf)


def test_stacked_shapes():
  _, variables, _ = toy(True)
  shapes = {row.path: row.shape for row in toys.init("lora", variables, rank=2, dora=True).table}
  assert shapes["adapters/encoder/layers/inner/lora_a"] == (2, 8, 2)
  assert shapes["adapters/encoder/layers/inner/lora_b"] == (2, 2, 32)
  assert shapes["adapters/encoder/layers/inner/lora_magnitude"] == (2, 32)


def test_starts_at_the_pretrained_function():
  module, variables, ids = toys.make()
  tuned = toys.init("lora", variables, rank=2)
  adapted = toys.forward(module, tuned, tuned.combine(tuned.frozen, tuned.trainable), ids)
  plain = jax.jit(module.apply)(variables, ids)["logits"]
  np.testing.assert_array_equal(adapted, plain)


def test_initial_values():
  _, variables, _ = toys.make(width=64)
  tuned = toys.init("lora", variables, rank=8)
  flat = tune.flatten(tuned.trainable)
  a = np.asarray(flat["adapters/encoder/layer_0/output/lora_a"])
  assert a.shape == (256, 8) and np.abs(a).max() <= 1 / 16
  np.testing.assert_allclose(a.std(), 1 / 16 / np.sqrt(3), rtol=0.05)  # uniform
  assert not np.asarray(flat["adapters/encoder/layer_0/output/lora_b"]).any()
  assert np.any(a != np.asarray(flat["adapters/encoder/layer_1/output/lora_a"]))
  # A layer's start does not depend on which others are adapted.
  alone = toys.init("lora", variables, rank=8, targets=("layer_0/output",))
  np.testing.assert_array_equal(
    tune.flatten(alone.trainable)["adapters/encoder/layer_0/output/lora_a"], a)


def test_merge_by_formula_and_purity():
  _, variables, _ = toys.make()
  tuned = toys.init("lora", variables, rank=4, alpha=6.0, scale="alpha/sqrt(r)",
                    targets=("layer_1/key",))
  trainable = toys.shaken(tuned.trainable)
  flat, path = tune.flatten(trainable), "encoder/layer_1/key"
  a, b = (np.asarray(flat[f"adapters/{path}/lora_{x}"], np.float64) for x in "ab")
  before = tune.flatten(variables)
  merged = tune.flatten(tuned.merge(tuned.frozen, trainable))
  np.testing.assert_allclose(
    merged[f"params/{path}/kernel"], before[f"params/{path}/kernel"] + 3.0 * a @ b, rtol=1e-6)
  for name, leaf in merged.items():
    if path not in name and "classifier" not in name:
      assert leaf is before[name]


def test_dropout_only_with_its_stream():
  module, variables, ids = toys.make(depth=1)
  tuned = toys.init("lora", variables, rank=2, dropout=0.5)
  state = tuned.combine(tuned.frozen, toys.shaken(tuned.trainable))
  still = toys.init("lora", variables, rank=2)
  plain = toys.forward(module, still, state, ids)
  np.testing.assert_array_equal(toys.forward(module, tuned, state, ids), plain)
  dropped = [toys.forward(module, tuned, state, ids, dropout=jax.random.key(i)) for i in (0, 0, 1)]
  np.testing.assert_array_equal(dropped[0], dropped[1])
  assert np.any(dropped[0] != dropped[2]) and np.any(dropped[0] != plain)


def test_dropout_is_unbiased_and_on_the_adapter_alone():
  class Stream:
    path = ()

    def has_rng(self, name):
      return name == "dropout"

    def make_rng(self, name):
      return jax.random.key(0)

  rows = adapters.dropout(Stream(), jnp.ones((200, 200)), 0.25)
  assert set(np.unique(rows).tolist()) == {0.0, np.float32(1 / 0.75)}
  np.testing.assert_allclose(rows.mean(), 1.0, atol=0.02)


def test_half_precision_keeps_its_dtype():
  module, variables, ids = toys.make()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  tuned = toys.init("lora", half, rank=2)
  trainable = toys.shaken(tuned.trainable)
  assert tune.flatten(trainable)["adapters/encoder/layer_0/key/lora_a"].dtype == jnp.float32
  merged = tuned.merge(tuned.frozen, trainable)
  assert tune.flatten(merged)["params/encoder/layer_0/key/kernel"].dtype == jnp.bfloat16
  state = tuned.combine(tuned.frozen, trainable)
  assert jnp.isfinite(toys.forward(module, tuned, state, ids)).all()


def test_targets():
  _, variables, _ = toys.make()
  tuned = toys.init("lora", variables, rank=2, targets=("query$", "layer_0/inner"))
  modules = {row.path.rpartition("/")[0] for row in tuned.table if "lora_a" in row.path}
  assert modules == {f"adapters/encoder/{m}"
                     for m in ("layer_0/query", "layer_1/query", "layer_0/inner")}


def test_messages():
  _, variables, _ = toys.make()
  with pytest.raises(errors.UserError, match="(?s)'q_proj' matches no layer.*layer_0/query"):
    toys.init("lora", variables, targets=("q_proj",))
  with pytest.raises(errors.UserError, match="rank=9 is larger.*8 x 32"):
    toys.init("lora", variables, rank=9)
  with pytest.raises(errors.UserError, match="matches no layer"):  # the head trains in full
    toys.init("lora", variables, rank=2, targets=("classifier",))
  with pytest.raises(errors.UserError, match="is empty"):
    toys.init("lora", variables, rank=2, targets=())
  with pytest.raises(errors.UserError, match="no regular expression"):
    toys.init("lora", variables, rank=2, targets=("(",))


class Picture(nn.Module):
  """images (B, 7, 7, 3) -> (B, 2): a strided, a dilated and a strided 1x1 convolution."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(convolution.Conv(5, 3, 2, "SAME", use_bias=True, name="strided")(x))
    x = nn.tanh(convolution.Conv(4, 3, 1, ((2, 2), (2, 2)), dilation=2, name="dilated")(x))
    x = convolution.ConvNorm(convolution.Conv(6, 1, 2, name="point"), convolution.BatchNorm())(x)
    x = convolution.DepthwiseConv(6, 3, name="depthwise")(x)
    return layers.Linear(2, name="classifier")(x.mean((1, 2)))


@pytest.mark.parametrize("values", [{}, {"dora": True, "start": "pissa"}])
def test_convolutions(values):
  module = Picture()
  images = jax.random.normal(jax.random.key(0), (2, 7, 7, 3))
  variables = jax.jit(module.init)(jax.random.key(1), images)
  targets = ("strided", "dilated", "point")
  tuned = toys.init("lora", variables, rank=2, targets=targets, **values)
  shapes = {row.path: row.shape for row in tuned.table}
  assert shapes["adapters/strided/lora_a"] == (3, 3, 3, 2)
  assert shapes["adapters/strided/lora_b"] == (2, 5)
  assert shapes["adapters/point/lora_a"] == (4, 2)
  count = 2 * (9 * 3 + 5) + 2 * (9 * 5 + 4) + 2 * (4 + 6) + 6 * 2 + 2
  assert sum(row.count for row in tuned.table) == count + (15 if "dora" in values else 0)

  def adapted(trainable):
    with nn.intercept_methods(tuned.interceptor):
      return module.apply(tuned.combine(tuned.frozen, trainable), images)

  @jax.jit
  def run(trainable):
    def both(function):
      def squares(trainable):
        out = function(trainable)
        return jnp.sum(out**2), out
      return jax.value_and_grad(squares, has_aux=True)(trainable)
    merged = lambda t: module.apply(tuned.merge(tuned.frozen, t), images)  # noqa: E731
    return both(adapted), both(merged)

  ((_, start), _), _ = run(tuned.trainable)
  np.testing.assert_allclose(start, jax.jit(module.apply)(variables, images), rtol=1e-5, atol=1e-5)
  ((_, ours), gradient), ((_, merged), expected) = run(toys.shaken(tuned.trainable))
  assert np.abs(ours - start).max() > 1e-2
  np.testing.assert_allclose(ours, merged, rtol=1e-5, atol=1e-5)
  for path, leaf in tune.flatten(expected).items():
    assert np.abs(leaf).max() > 0, path
    np.testing.assert_allclose(tune.flatten(gradient)[path], leaf, rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
  """ids (B, T) -> logits over the vocabulary, by the same table; as scores of language models."""

  @nn.compact
  def __call__(self, ids):
    table = layers.Embedding(11, 8, name="words")
    return table.attend(nn.tanh(table(ids)))


def test_tied_embedding_is_updated_on_both_sides():
  module, ids = Tied(), jnp.arange(11)[None]
  variables = jax.jit(module.init)(jax.random.key(0), ids)
  tuned = toys.init("lora", variables, rank=2, alpha=3.0, targets=("words",), head=())
  assert [row.shape for row in tuned.table] == [(11, 2), (2, 8)]
  assert not np.asarray(tuned.trainable["adapters"]["words"]["lora_a"]).any()

  @jax.jit
  def run(trainable):
    def adapted(t):
      with nn.intercept_methods(tuned.interceptor):
        logits = module.apply(tuned.combine(tuned.frozen, t), ids)
      return jnp.sum(jnp.sin(logits)), logits

    def merged(t):
      logits = module.apply(tuned.merge(tuned.frozen, t), ids)
      return jnp.sum(jnp.sin(logits)), logits

    return (jax.value_and_grad(adapted, has_aux=True)(trainable),
            jax.value_and_grad(merged, has_aux=True)(trainable))

  start = run(tuned.trainable)[0][0][1]
  np.testing.assert_array_equal(start, jax.jit(module.apply)(variables, ids))
  ((_, ours), gradient), ((_, merged), expected) = run(toys.shaken(tuned.trainable))
  assert np.abs(ours - start).max() > 1e-2
  np.testing.assert_allclose(ours, merged, rtol=1e-5, atol=1e-6)
  for path, leaf in tune.flatten(expected).items():
    np.testing.assert_allclose(tune.flatten(gradient)[path], leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 3, 2, 7)])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_are_shares_of_the_weights(start, shape):
  path = "conv" if len(shape) == 4 else "layer"
  kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  variables = {"params": {path: {"kernel": jnp.asarray(kernel)}}}
  tuned = toys.init("lora", variables, rank=3, alpha=6.0, start=start, targets=(path,), head=())
  trained, fixed = tuned.trainable["adapters"][path], tuned.frozen["adapters"][path]
  for name in "ab":
    np.testing.assert_array_equal(trained[f"lora_{name}"], fixed[f"lora_{name}0"])
  assert tuned.frozen["params"][path]["kernel"] is variables["params"][path]["kernel"]
  matrix = kernel.reshape(-1, shape[-1]).astype(np.float64)
  share = np.asarray(trained["lora_a"], np.float64).reshape(-1, 3) @ np.asarray(trained["lora_b"])
  if start == "pissa":  # s A B is the best approximation of rank 3, shared out evenly
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(2 * share, (u[:, :3] * s[:3]) @ v[:3], rtol=1e-5, atol=1e-5)
    lengths = np.linalg.norm(np.asarray(trained["lora_a"]).reshape(-1, 3), axis=0)
    np.testing.assert_allclose(lengths, np.sqrt(s[:3] / 2), rtol=1e-5)
  else:  # of the outputs' side
    q, _ = np.linalg.qr(matrix.T)
    np.testing.assert_allclose(share, matrix @ q[:, :3] @ q[:, :3].T, rtol=1e-5, atol=1e-5)
    b = np.asarray(trained["lora_b"])
    np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-6)
  again = toys.init("lora", variables, rank=3, alpha=6.0, start=start, targets=(path,), head=())
  np.testing.assert_array_equal(again.trainable["adapters"][path]["lora_a"], trained["lora_a"])


def test_start_of_weights_without_full_rank():
  layer = adapters.Layer("layer", "linear", (4, 5), 0, np.random.default_rng(0),
                         jnp.zeros((4, 5)).at[0, 0].set(2.0))
  trained, _ = lora_start.create("pissa", layer, 3, 1.0)
  np.testing.assert_allclose(trained["lora_a"] @ trained["lora_b"], layer.kernel(), atol=1e-6)


def test_scan_needs_equal_ranks_and_scales():
  _, variables, _ = toy(True)
  with pytest.raises(errors.UserError, match="different shapes, but model.scan"):
    toys.init("lora", variables, rank=2, rank_pattern=("layer_1/inner=3",))
  with pytest.raises(errors.UserError, match="alpha_pattern gives encoder/layer_1/inner.*scan"):
    toys.init("lora", variables, rank=2, alpha_pattern=("layer_1/inner=3",))
  tuned = toys.init("lora", toy(False)[1], rank=2, rank_pattern=("layer_1/inner=3",),
                    alpha_pattern=("layer_1/inner=3",))
  assert tuned.trainable["adapters"]["encoder"]["layer_1"]["inner"]["lora_a"].shape == (8, 3)
  adapter = lora.Lora(toys.config("lora", rank=2, alpha=4.0, rank_pattern=("layer_1/inner=3",),
                                  alpha_pattern=("layer_1/inner=6",)))
  assert adapter.scale("encoder/layer_1/inner") == 2.0
  assert adapter.scale("encoder/layer_0/inner") == 2.0
  assert adapter.scale("encoder/layers/query") == 2.0


def test_plus_ratio_is_the_rate_of_b():
  _, variables, _ = toy(False)
  values = {"rank": 2, "plus_ratio": 16.0, "targets": ("query", "embeddings")}
  tuned = toys.init("lora", variables, **values)
  assert tuned.rates == {f"adapters/encoder/layer_{i}/query/lora_b": 16.0 for i in (0, 1)}
  assert toys.init("lora", variables, rank=2).rates == {}
  config = {name: entry[0] for name, entry in optim.KEYS.items()}
  config = toys.config_dict.ConfigDict({
    **config, "name": "sgd", "rate": 0.5, "momentum": 0.0, "clip": 0.0, "weight_decay": 0.0,
    "warmup": 0.0, "schedule": "constant"})
  tx, _ = optim.make(config, tuned.trainable, 10, toys.HEAD, tuned)
  ones = jax.tree.map(jnp.ones_like, tuned.trainable)
  updates = tune.flatten(tx.update(ones, tx.init(tuned.trainable), tuned.trainable)[0])
  for path, update in updates.items():
    np.testing.assert_allclose(update, -8.0 if path in tuned.rates else -0.5)


def test_biases():
  _, variables, _ = toy(False)
  def trained(**values):
    paths = [row.path for row in toys.init("lora", variables, rank=2, **values).table]
    return [path for path in paths if path.endswith("/bias") and "classifier" not in path]
  assert trained() == []
  assert trained(bias="lora_only", targets=("layer_0/key",)) == ["params/encoder/layer_0/key/bias"]
  assert trained(bias="all", targets=("layer_0/key",)) == [
    f"params/encoder/layer_{i}/{m}/bias" for i in (0, 1)
    for m in ("inner", "key", "norm", "output", "query")]
  with pytest.raises(errors.UserError, match="none of the adapted layers has a bias"):
    toys.init("lora", variables, rank=2, bias="lora_only", targets=("embeddings",))


def test_messages_on_patterns_and_kinds():
  _, variables, _ = toy(False)
  with pytest.raises(errors.UserError, match="(?s)'q_proj' is found in none.*layer_0/query"):
    toys.init("lora", variables, rank=2, rank_pattern=("q_proj=4",))
  for wrong in ("query", "query=", "=4", "query=0", "query=x", "(=4", "query=1.5"):
    with pytest.raises(errors.UserError, match="tune.rank_pattern: .* cannot be read"):
      toys.init("lora", variables, rank=2, rank_pattern=(wrong,))
  with pytest.raises(errors.UserError, match="tune.rank_pattern=9 is larger.*8 x 32"):
    toys.init("lora", variables, rank=2, rank_pattern=("inner=9",))
  with pytest.raises(errors.UserError, match="tune.dora=True is for matrices.*embeddings"):
    toys.init("lora", variables, rank=2, dora=True, targets=("embeddings",))
  with pytest.raises(errors.UserError, match="tune.start='pissa' is for matrices.*embeddings"):
    toys.init("lora", variables, rank=2, start="pissa", targets=("embeddings",))
  depthwise = {"params": {"depthwise": {"kernel": jnp.ones((3, 3, 8))}}}
  with pytest.raises(errors.UserError, match="kind depthwise.*3x3x8"):
    toys.init("lora", depthwise, rank=2, targets=("depthwise",), head=())


def test_an_adapter_that_acts_on_nothing_is_told(caplog):
  module, variables, ids = toys.make()
  tuned = toys.init("lora", variables, rank=2)
  stray = {"adapters": {"elsewhere": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 8))}}}
  state = tuned.combine(tuned.combine(tuned.frozen, tuned.trainable), stray)
  with caplog.at_level("WARNING", logger="absl"):
    toys.forward(module, tuned, state, ids)
  assert "1 adapters act on nothing" in caplog.text and "elsewhere" in caplog.text
