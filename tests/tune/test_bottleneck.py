"""Bottleneck adapters: the function is that of the papers, and starts at the pretrained one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tune import small, toys

from ft import errors, tune
from ft.models import layers
from ft.weights import stacking

WIDTH, UNITS = 8, 3


def by_hand(flat, config, depth, ids):
  """The toy encoder with adapters behind or beside `output`, written out."""
  dot = lambda x, name: x @ flat[f"params/{name}/kernel"] + flat[f"params/{name}/bias"]  # noqa: E731
  x = flat["params/embeddings/embedding"][ids]
  for i in range(depth):
    at = f"encoder/layer_{i}"
    h = x + jnp.tanh(dot(x, f"{at}/query")) * dot(x, f"{at}/key")
    wide = jax.nn.gelu(dot(h, f"{at}/inner"))
    y = dot(wide, f"{at}/output")
    down, down_bias, up, up_bias = (
      flat[f"adapters/{at}/output/bottleneck_{part}"]
      for part in ("down", "down_bias", "up", "up_bias"))
    read = y if config["placement"] == "sequential" else wide
    hidden = layers.ACTIVATIONS[config["activation"]](read @ down + down_bias)
    x = h + y + config["scale"] * (hidden @ up + up_bias)
    mean = x.mean(-1, keepdims=True)
    x = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
    x = x * flat[f"params/{at}/norm/scale"] + flat[f"params/{at}/norm/bias"]
  return dot(x.mean(1) - flat["batch_stats/mean"], "classifier")


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("placement,scale,activation",
                         [("sequential", 1.0, "gelu"), ("parallel", 4.0, "relu")])
def test_function_and_gradient_are_those_written_out(scanned, placement, scale, activation):
  module, variables, ids = toys.make(scanned=scanned)
  config = {"placement": placement, "scale": scale, "activation": activation}
  tuned = toys.init("bottleneck", variables, size=UNITS, **config)
  read = WIDTH if placement == "sequential" else 4 * WIDTH
  per_layer = read * UNITS + UNITS + UNITS * WIDTH + WIDTH
  assert small.count(tuned) == 2 * per_layer + WIDTH * 2 + 2
  assert tuned.merge is None

  plain = jax.jit(module.apply)(variables, ids)["logits"]
  start = toys.forward(module, tuned, tuned.combine(tuned.frozen, tuned.trainable), ids)
  np.testing.assert_allclose(start, plain, rtol=1e-6, atol=1e-6)

  def written_out(trainable):
    flat = stacking.unstack(tune.flatten(tuned.combine(tuned.frozen, trainable)))
    return by_hand(flat, config, 2, ids)

  trainable = toys.shaken(tuned.trainable)
  state = tuned.combine(tuned.frozen, trainable)
  logits = toys.forward(module, tuned, state, ids)
  np.testing.assert_allclose(logits, jax.jit(written_out)(trainable), rtol=1e-5, atol=1e-5)
  assert np.abs(logits - plain).max() > 1e-2
  got = jax.jit(jax.grad(lambda t: toys.loss(module, tuned, t, tuned.frozen, ids)))(trainable)
  want = jax.jit(jax.grad(lambda t: jnp.sum((written_out(t) - jnp.arange(2.0)) ** 2)))(trainable)
  for path, leaf in tune.flatten(want).items():
    np.testing.assert_allclose(tune.flatten(got)[path], leaf, rtol=1e-4, atol=2e-4, err_msg=path)


@pytest.mark.parametrize("scanned", [False, True])
def test_default_targets_end_both_parts_of_a_layer(scanned):
  for make, ends in ((small.a_bert, ("attention/output", "output")),
                     (small.a_llama, ("attention/output", "mlp/down")),
                     (small.a_vit, ("attention/output", "mlp/fc2"))):
    model, inputs = make(scanned)
    tuned = small.init("bottleneck", model, size=4)
    places = {row.path.rpartition("/")[0] for row in tuned.table if row.path.startswith("adapters")}
    stems = ["layers"] if scanned else ["layer_0", "layer_1"]
    assert sorted(p.partition("layer")[1] + p.partition("layer")[2] for p in places) == sorted(
      f"{stem}/{end}" for stem in stems for end in ends)
  small.check_training(model, tuned, inputs)


def test_messages():
  _, variables, _ = toys.make()
  with pytest.raises(errors.UserError, match="tune.size=8 is no bottleneck for .*output"):
    toys.init("bottleneck", variables, size=8)
  with pytest.raises(errors.UserError, match="(?s)'mlp/end' matches no layer.*layer_0/inner"):
    toys.init("bottleneck", variables, size=2, targets=("mlp/end",))
