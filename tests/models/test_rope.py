"""Rotary positions: every kind against transformers' own functions, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft import errors
from ft.models import rope

SIZE = 24
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 300.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
             "original_max_position_embeddings": 128},
    "yarn, every setting": {
        "rope_type": "yarn", "rope_theta": 1e5, "factor": 16.0, "beta_fast": 8.0, "beta_slow": 2.0,
        "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False,
        "original_max_position_embeddings": 64},
    "yarn, its own attention factor": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.3,
        "original_max_position_embeddings": 128},
    "yarn, factor from the lengths": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": None,
        "original_max_position_embeddings": 128},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4,
                 "short_factor": [1.0 + 0.05 * i for i in range(SIZE // 2)],
                 "long_factor": [1.2 + 0.5 * i for i in range(SIZE // 2)],
                 "original_max_position_embeddings": 100},
}


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("name", KINDS)
def test_equal_to_transformers(name, length):
  torch = pytest.importorskip("torch")
  llama = pytest.importorskip("transformers.models.llama.modeling_llama")
  settings = dict(KINDS[name])
  config = llama.LlamaConfig(hidden_size=4 * SIZE, num_attention_heads=4,
                             max_position_embeddings=512, rope_parameters=dict(settings))
  positions = np.arange(length)[None]
  cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
  ours = rope.Rope.from_hf({"rope_parameters": settings, "max_position_embeddings": 512}, SIZE)
  got = rope.angles(ours, jnp.asarray(positions))
  for mine, theirs in zip(got, (cos, sin), strict=True):
    want = theirs.numpy()[:, :, None, :SIZE // 2]
    np.testing.assert_allclose(mine, want, atol=1e-4)  # the last bit of a frequency, 300 times
  assert rope.Rope.from_hf({"rope_parameters": ours.to_hf(SIZE)}, SIZE) == ours


def test_both_ways_of_stating_it_are_one():
  new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0,
                             "partial_rotary_factor": 0.5}}
  old = {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0},
         "partial_rotary_factor": 0.5}
  assert rope.Rope.from_hf(new, SIZE) == rope.Rope.from_hf(old, SIZE)
  assert rope.Rope.from_hf(new, SIZE).size == SIZE // 2
  assert rope.Rope.from_hf({}, SIZE, theta=7.0) == rope.Rope(SIZE, 7.0)


def test_a_partial_rope_is_written_so_that_it_reads_back():
  for size in range(1, 50):
    ours = rope.Rope(size, 100.0)
    assert rope.Rope.from_hf({"rope_parameters": ours.to_hf(49)}, 49) == ours


def test_longrope_chooses_by_length_or_as_it_is_told():
  ours = rope.Rope.from_hf({"rope_parameters": KINDS["longrope"], "max_position_embeddings": 512},
                           SIZE)
  near, far = jnp.arange(100)[None], jnp.arange(101)[None]
  short, long = (rope.angles(ours, near, length=n)[0] for n in (100, 101))
  assert not np.allclose(short, long)
  np.testing.assert_array_equal(jax.jit(lambda p: rope.angles(ours, p)[0])(near), short)
  np.testing.assert_array_equal(rope.angles(ours, far)[0][:, :100], long)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 3, SIZE)), jnp.float32) for _ in range(2))
  turn = lambda x, p: rope.rotate(x, *rope.angles(rope.Rope(16), jnp.full((1, 1), p)))  # noqa: E731
  np.testing.assert_allclose(jnp.linalg.norm(turn(q, 9), axis=-1), jnp.linalg.norm(q, axis=-1),
                             rtol=1e-5)
  np.testing.assert_array_equal(turn(q, 9)[..., 16:], q[..., 16:])
  np.testing.assert_allclose((turn(q, 9) * turn(k, 4)).sum(-1), (turn(q, 25) * turn(k, 20)).sum(-1),
                             rtol=1e-4)


@pytest.mark.parametrize(("settings", "says"), [
    ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported; supported are default"),
    ({"type": "mrope", "mrope_section": [1, 2]}, "'mrope' is not supported"),
    ({"rope_type": "linear"}, "'linear' needs factor"),
    ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor, original_"),
    ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0,
      "original_max_position_embeddings": 9}, "needs 12 numbers in short_factor, not 1"),
    ({"full_attention": {"rope_theta": 5.0}}, "settings of its own for full_attention"),
])
def test_what_is_not_computed_is_refused(settings, says):
  with pytest.raises(errors.UserError, match=says):
    rope.Rope.from_hf({"rope_scaling": settings}, SIZE)
