"""Attention: equal to the plain formula, whatever computes it; masks hide all they hide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft import errors
from ft.models import attention
from ft.models.attention import Mask


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def qkv(batch=2, queries=9, keys=9, heads=4, groups=2, size=8):
  return (random(batch, queries, heads, size), random(batch, keys, groups, size, seed=1),
          random(batch, keys, groups, size, seed=2))


def plain(q, k, v, seen, bias=0.0, scale=None, softcap=0.0):
  """The formula, with each key head repeated for its query heads."""
  repeats = q.shape[2] // k.shape[2]
  k, v = (np.repeat(np.asarray(a, np.float64), repeats, axis=2) for a in (k, v))
  scores = np.einsum("bthd,bshd->bhts", np.asarray(q, np.float64), k)
  scores = scores * (q.shape[-1]**-0.5 if scale is None else scale)
  if softcap:
    scores = softcap * np.tanh(scores / softcap)
  scores = np.where(seen, scores + bias, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def band(queries, keys, before, after, first=0):
  distance = (first + np.arange(queries))[:, None] - np.arange(keys)[None]
  return ((distance < before) & (distance >= -after))[None, None]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [attention.NO_WINDOW, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_is_the_formula(causal, window, groups):
  q, k, v = qkv(groups=groups)
  real = np.ones((2, 9))
  real[1, :2] = 0  # padding on the left: the first queries of row 1 see nothing
  if causal:
    seen = band(9, 9, window, 0)
  else:
    seen = band(9, 9, window + 1, window)
  seen = seen & (real[:, None, None] != 0)
  got = attention.attention(q, k, v, Mask(padding=jnp.asarray(real), causal=causal), window=window)
  fine = seen.any(-1)[:, 0]
  want = np.nan_to_num(plain(q, k, v, seen | ~seen.any(-1, keepdims=True)))
  np.testing.assert_allclose(np.asarray(got)[fine], want[fine], atol=1e-5)
  assert np.isfinite(got).all()


def test_bias_scale_and_cap():
  q, k, v = qkv()
  bias = random(1, 4, 9, 9, seed=5)
  got = attention.attention(q, k, v, bias=bias, scale=0.7, softcap=1.5)
  want = plain(q, k, v, True, np.asarray(bias), 0.7, 1.5)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_window_may_be_traced():
  q, k, v = qkv()
  run = jax.jit(lambda w: attention.attention(q, k, v, Mask(causal=True), window=w))
  for window in (1, 4, attention.NO_WINDOW):
    want = attention.attention(q, k, v, Mask(causal=True), window=window)
    np.testing.assert_allclose(run(window), want, atol=1e-6)


def test_cached_slots():
  """Queries from slot 5 on see what they would see in the whole row."""
  q, k, v = qkv()
  whole = attention.attention(q, k, v, Mask(causal=True), window=4)
  part = attention.attention(q[:, 5:7], k, v, Mask(causal=True, offset=5), window=4)
  np.testing.assert_allclose(part, whole[:, 5:7], atol=1e-6)


def test_documents_of_a_packed_row_do_not_meet():
  q, k, v = qkv()
  segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2]] * 2)
  run = jax.jit(lambda q, k, v: attention.attention(q, k, v, Mask(segments=segments, causal=True)))
  first = run(q, k, v)
  other = run(q.at[:, :4].add(3.0), k.at[:, :4].multiply(-5.0), v.at[:, :4].set(1e4))
  assert np.array_equal(first[:, 4:], other[:, 4:])
  assert not np.array_equal(first[:, :4], other[:, :4])
  alone = attention.attention(q[:, 4:], k[:, 4:], v[:, 4:], Mask(causal=True))
  np.testing.assert_allclose(first[:, 4:], alone, atol=1e-6)


SPLASH = {
    "causal": dict(mask=dict(causal=True)),
    "window": dict(mask=dict(causal=True), window=40),
    "local": dict(mask=dict(), window=30),
    "packed": dict(mask=dict(causal=True, segments=True)),
    "padded": dict(mask=dict(padding=True)),
}


@pytest.mark.parametrize("case", SPLASH)
def test_splash_is_xla(case):
  """The TPU's kernel, interpreted: the same values, and documents that do not meet, bit by bit."""
  given = dict(SPLASH[case]["mask"])
  segments = jnp.asarray(np.repeat([[1, 2]], 64, axis=1))
  if given.pop("segments", False):
    given["segments"] = segments
  if given.pop("padding", False):
    given["padding"] = (segments == 1).astype(jnp.int32)
  mask, window = Mask(**given), SPLASH[case].get("window", attention.NO_WINDOW)
  q, k, v = qkv(1, 128, 128, 4, 2, 128)
  run = jax.jit(lambda q, k, v: attention._splash(q, k, v, mask, window, 128**-0.5, interpret=True))
  got, want = run(q, k, v), attention.attention(q, k, v, mask, window=window)
  shown = slice(0, 64) if case == "padded" else slice(None)
  np.testing.assert_allclose(got[:, shown], want[:, shown], atol=1e-4)
  if case == "packed":
    other = run(q.at[:, :64].add(3.0), k.at[:, :64].multiply(-5.0), v.at[:, :64].set(1e4))
    assert np.array_equal(got[:, 64:], other[:, 64:])


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_kernel_that_cannot_serve_is_an_error(name):
  q, k, v = qkv()
  with pytest.raises(errors.UserError, match=f"attention={name} cannot serve.*needs a"):
    attention.attention(q, k, v, implementation=name)
  with pytest.raises(errors.UserError, match="a bias needs xla"):
    attention.attention(q, k, v, bias=random(1, 4, 9, 9), implementation=name)


def test_auto_chooses_by_platform_and_length(monkeypatch):
  q, k, _ = (a.astype(jnp.bfloat16) for a in qkv(1, 512, 512, 2, 2, 64))
  none = {"a bias": False}
  causal = Mask(causal=True)
  assert attention.choose(q, k, causal, attention.NO_WINDOW, none) == "xla"
  for platform, kernel in (("gpu", "cudnn"), ("tpu", "splash")):
    monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
    assert attention.choose(q, k, causal, attention.NO_WINDOW, none) == kernel
    assert attention.choose(q[:, :64], k[:, :64], Mask(), attention.NO_WINDOW, none) == "xla"
    assert attention.choose(q, k, Mask(), attention.NO_WINDOW, {"a bias": True}) == "xla"
