"""The CPU's convolutions against the library's, values and gradients; batch normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ft.models import convolution

# (height, width, kernel size, stride, padding)
CASES = [
  (8, 8, 3, 1, "SAME"),
  (9, 7, 3, 2, "SAME"),
  (8, 8, 3, 2, "SAME"),
  (13, 10, 5, 2, "SAME"),
  (5, 5, 5, 1, "SAME"),
  (2, 3, 5, 2, "SAME"),
  (1, 1, 3, 1, "SAME"),
  (29, 30, 3, 1, "SAME"),
  (11, 12, 3, 3, "SAME"),
  (9, 9, 2, 3, "SAME"),  # stride above kernel: some inputs are never read
  (9, 9, 3, 2, ((0, 1), (0, 1))),
  (9, 8, 5, 1, ((0, 0), (0, 0))),
  (12, 12, 3, 2, ((0, 0), (0, 0))),
  (6, 6, 3, 1, ((2, 2), (2, 1))),
  (9, 8, 7, 1, ((3, 3), (3, 3))),
  (10, 11, 7, 2, "SAME"),
]


def numbers(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def near(got, want, tolerance=2e-5):
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-6))


@pytest.mark.parametrize("height,width,size,stride,padding", CASES)
def test_depthwise_forms_agree(height, width, size, stride, padding):
  if padding == "SAME":
    padding = convolution.same_padding((height, width), (size, size), stride)
  x, kernel = numbers(3, height, width, 4), numbers(size, size, 4, seed=1)

  def both(x, kernel):
    f = lambda x, k: convolution.convolve_depthwise(x, k, stride, padding)  # noqa: E731
    y, back = jax.vjp(f, x, kernel)
    return (y, *back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)))

  def run(implementation):
    with convolution.using(implementation):
      return jax.jit(lambda *a: both(*a))(x, kernel)

  for got, want in zip(run("shifted"), run("library"), strict=True):
    near(got, want)


@pytest.mark.parametrize("size,stride,dilation", [
  (1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (3, 2, 3), (5, 1, 2)])
def test_convolution_is_the_library_s(size, stride, dilation):
  x, kernel = numbers(2, 9, 8, 3), numbers(size, size, 3, 5, seed=1)
  padding = convolution.same_padding(x.shape[1:3], (size, size), stride, dilation)
  want = lax.conv_general_dilated(x, kernel, (stride, stride), "SAME",
                                  rhs_dilation=(dilation, dilation),
                                  dimension_numbers=("NHWC", "HWIO", "NHWC"))
  near(convolution.convolve(x, kernel, stride, padding, dilation), want)


@pytest.mark.parametrize("height,width,size", [(8, 12, 4), (9, 7, 2), (11, 13, 3), (4, 4, 4)])
def test_patches_are_a_convolution_whose_stride_is_its_size(height, width, size):
  x, kernel = numbers(2, height, width, 3), numbers(size, size, 3, 5, seed=1)

  def both(f):
    y, back = jax.vjp(f, x, kernel)
    return (y, *back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)))

  got = both(lambda x, k: convolution.convolve(x, k, size))
  want = both(lambda x, k: lax.conv_general_dilated(
      x, k, (size, size), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")))
  for a, b in zip(got, want, strict=True):
    near(a, b)


def test_a_large_kernel_is_one_loop_also_for_several_readers():

  def normalised(x, kernel):
    with convolution.using("shifted"):
      y = convolution.convolve_depthwise(x, kernel, 1, ((3, 3), (3, 3)))
    y = y - y.mean(-1, keepdims=True)
    return y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)

  text = jax.jit(normalised).lower(numbers(8, 28, 28, 64), numbers(7, 7, 64)).compile().as_text()
  taps = [part.count(" multiply(") for part in text.split("\n}\n")]
  assert max(taps) == 49 and sum(taps) < 2 * 49


def test_a_kernel_that_is_not_a_number_spoils_its_own_channel_only():
  x, kernel = numbers(1, 8, 8, 3), numbers(7, 7, 3, seed=1).at[0, 0, 0].set(jnp.nan)
  run = jax.jit(lambda x, k: convolution.convolve_depthwise(x, k, 1, ((3, 3), (3, 3))))
  with convolution.using("shifted"):
    got = run(x, kernel)
  with convolution.using("library"):
    want = jax.jit(lambda x, k: convolution.convolve_depthwise(x, k, 1, ((3, 3), (3, 3))))(
        x, kernel)
  near(got[..., 1:], want[..., 1:])
  assert np.isnan(got[..., 0]).any()


@pytest.mark.parametrize("depthwise", [False, True])
def test_a_bias_is_added(depthwise):
  cls = convolution.DepthwiseConv if depthwise else convolution.Conv
  layer, x = cls(3, 3, use_bias=True), numbers(2, 7, 6, 3)
  params = layer.init(jax.random.key(0), x)["params"]
  bias = numbers(3, seed=4)
  plain = layer.clone(use_bias=False).apply({"params": {"kernel": params["kernel"]}}, x)
  near(layer.apply({"params": {**params, "bias": bias}}, x), plain + bias)


@pytest.mark.parametrize("edge", range(1, 12))
@pytest.mark.parametrize("size,stride", [(1, 2), (3, 1), (3, 2), (5, 2), (2, 3)])
def test_same_padding_is_the_library_s(edge, size, stride):
  want = lax.padtype_to_pads((edge, edge + 3), (size, size), (stride, stride), "SAME")
  got = convolution.same_padding((edge, edge + 3), (size, size), stride)
  assert got == tuple(map(tuple, want))


def test_an_input_smaller_than_the_kernel_is_refused():
  with convolution.using("shifted"), pytest.raises(ValueError, match="too small"):
    convolution.convolve_depthwise(numbers(1, 2, 2, 3), numbers(3, 3, 3))


def test_the_implementation_follows_the_backend_and_can_be_forced():
  plain = "shifted" if jax.default_backend() == "cpu" else "library"
  assert convolution.implementation() == plain
  with convolution.using("library"):
    assert convolution.implementation() == "library"
  assert convolution.implementation() == plain
  with pytest.raises(ValueError, match="none of"), convolution.using("fast"):
    pass


def test_frozen_kernels_cost_no_gradient():
  x, kernel = numbers(2, 16, 16, 8), numbers(5, 5, 8, seed=1)

  def flops(argument):
    with convolution.using("shifted"):
      f = jax.grad(lambda *a: jnp.square(convolution.convolve_depthwise(*a)).sum(), argument)
      return jax.jit(f).lower(x, kernel).compile().as_text().count("while(")

  assert flops(0) == 0 and flops(1) == 1


@pytest.mark.parametrize("implementation", convolution.IMPLEMENTATIONS)
def test_channel_sums_and_their_gradients(implementation):
  x, bias = numbers(2, 3, 5, 4), numbers(4, seed=1)
  with convolution.using(implementation):
    near(convolution.channel_sums(x), x.sum((0, 1, 2)))
    got = jax.grad(lambda b: jnp.square(convolution.add_channels(x, b)).sum())(bias)
  near(got, (2 * (x + bias)).sum((0, 1, 2)))


@pytest.mark.parametrize("height,width,size,stride,padding", [
  (9, 8, 3, 2, 1), (8, 8, 3, 2, 0), (7, 9, 2, 2, 0), (6, 6, 3, 1, 1), (7, 7, 2, 3, 0)])
@pytest.mark.parametrize("ties", [False, True])
def test_pooling_is_the_library_s(height, width, size, stride, padding, ties):
  x = numbers(2, height, width, 3)
  x = jnp.round(x) if ties else x

  def both(implementation):
    with convolution.using(implementation):
      y, back = jax.vjp(
          lambda x: convolution.max_pool(x, size, stride, ((padding, padding),) * 2), x)
      return y, back(numbers(*y.shape, seed=2))[0]

  for got, want in zip(both("shifted"), both("library"), strict=True):
    near(got, want)


def test_relu6_has_no_gradient_at_its_corners():
  x = jnp.array([-1.0, 0.0, 1.0, 5.0, 6.0, 7.0])
  near(convolution.relu6(x), [0, 0, 1, 5, 6, 6])
  near(jax.grad(lambda x: convolution.relu6(x).sum())(x), [0, 0, 1, 1, 0, 0])


def reference_norm(x, scale, bias, epsilon=1e-3):
  mean = x.mean((0, 1, 2))
  variance = jnp.square(x - mean).mean((0, 1, 2))
  return (x - mean) * lax.rsqrt(variance + epsilon) * scale + bias, mean, variance


@pytest.mark.parametrize("implementation", convolution.IMPLEMENTATIONS)
def test_batch_norm_in_training(implementation):
  norm = convolution.BatchNorm(momentum=0.9)
  x = 3 * numbers(4, 5, 6, 7) + 2
  params = {"scale": 1 + numbers(7, seed=1), "bias": numbers(7, seed=2)}
  stats = {"mean": numbers(7, seed=3), "var": 1 + jnp.square(numbers(7, seed=4))}
  target = numbers(*x.shape, seed=5)

  def loss(params, x):
    y, updates = norm.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
    return (y * target).sum(), (y, updates["batch_stats"])

  def plain(params, x):
    return (reference_norm(x, params["scale"], params["bias"])[0] * target).sum()

  with convolution.using(implementation):
    (_, (y, new)), got = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
  want_y, mean, variance = reference_norm(x, params["scale"], params["bias"])
  near(y, want_y)
  near(new["mean"], 0.9 * stats["mean"] + 0.1 * mean)
  near(new["var"], 0.9 * stats["var"] + 0.1 * variance * 120 / 119)
  jax.tree.map(near, got, jax.grad(plain, (0, 1))(params, x))


def make_layer(depthwise=False):
  if depthwise:
    conv = convolution.DepthwiseConv(3, 3, 2, parent=None)
  else:
    conv = convolution.Conv(5, 3, 2, parent=None)
  layer = convolution.ConvNorm(conv, convolution.BatchNorm(parent=None))
  x = numbers(2, 7, 6, 3)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  return layer, x, jax.tree.map(lambda a: a + 0.1 * jnp.abs(numbers(*a.shape, seed=9)), variables)


@pytest.mark.parametrize("depthwise", [False, True])
def test_folding_changes_nothing(depthwise):
  layer, x, variables = make_layer(depthwise)
  assert sorted(variables["params"]) == ["conv", "norm"]
  conv, norm = layer.conv, layer.norm

  def plain(variables, x):
    inner = {c: {**v} for c, v in variables.items()}
    y = conv.apply({"params": inner["params"]["conv"]}, x)
    return norm.apply({c: v["norm"] for c, v in inner.items()}, y)

  def both(f):
    y, back = jax.vjp(f, variables, x)
    d_variables, dx = back(jnp.ones_like(y))
    return y, d_variables["params"], dx

  jax.tree.map(near, jax.jit(lambda: both(layer.apply))(), jax.jit(lambda: both(plain))())


def test_the_hook_sees_the_unfolded_output():
  layer, x, variables = make_layer()
  seen = []

  def double(call, args, kwargs, context):
    y = call(*args, **kwargs)
    if isinstance(context.module, convolution.Conv) and context.method_name == "adapt":
      seen.append(args[1])
      return 2 * y
    return y

  with nn.intercept_methods(double):
    got = layer.apply(variables, x)
  plain = layer.conv.apply({"params": variables["params"]["conv"]}, x)
  near(seen[0], plain)
  near(got, layer.norm.apply({c: v["norm"] for c, v in variables.items()}, 2 * plain))


def test_half_precision_keeps_its_dtype():
  layer, x, variables = make_layer(depthwise=True)
  half = convolution.ConvNorm(layer.conv.clone(dtype=jnp.bfloat16, parent=None),
                              layer.norm.clone(parent=None))
  got = half.apply(variables, x)
  assert got.dtype == jnp.bfloat16
  near(got.astype(jnp.float32), layer.apply(variables, x), 0.03)
  got, _ = half.apply(variables, x, mutable=["batch_stats"])
  assert got.dtype == jnp.bfloat16
