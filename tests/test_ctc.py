"""Reading texts off frames, against every text there is and its probability by optax."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft import ctc

BLANK, LETTERS, FRAMES = 0, 4, 5


def chances(logits, texts):
  """(n,) log-probability of each text under logits (T, V), by optax's CTC loss."""
  size = max(map(len, texts))
  labels = np.zeros((len(texts), size), np.int32)
  empty = np.ones((len(texts), size), np.float32)
  for i, text in enumerate(texts):
    labels[i, :len(text)], empty[i, :len(text)] = text, 0
  many = jnp.broadcast_to(logits, (len(texts), *logits.shape))
  return -optax.ctc_loss(many, jnp.zeros(many.shape[:2]), labels, empty, blank_id=BLANK)


@pytest.fixture(scope="module")
def every():
  return [text for n in range(FRAMES + 1) for text in itertools.product((1, 2, 3), repeat=n)]


def test_wide_beams_find_the_likeliest_of_all_texts(every):
  logits = jax.random.normal(jax.random.PRNGKey(0), (6, FRAMES, LETTERS)) * 1.5
  search = jax.jit(lambda x: ctc.beams(x, jnp.ones(x.shape[:2]), BLANK, FRAMES, 400))
  ids, lengths = search(logits)
  likeliest = jax.jit(lambda one: chances(one, every))
  for one, row, n in zip(logits, ids, lengths, strict=True):
    scores = np.asarray(likeliest(one))
    assert tuple(row[:n].tolist()) == every[int(scores.argmax())]


def test_a_beam_sees_what_the_likeliest_frames_do_not():
  # Each frame's likeliest is the blank; the letter, in any of the frames, is likelier as a text.
  logits = jnp.log(jnp.array([[[0.6, 0.4], [0.6, 0.4]]]))
  real = jnp.ones((1, 2))
  assert ctc.greedy(logits, real, BLANK, 2)[1].tolist() == [0]
  ids, lengths = ctc.beams(logits, real, BLANK, 2, 4)
  assert lengths.tolist() == [1] and ids[0, 0] == 1


def test_padding_changes_nothing():
  logits = jax.random.normal(jax.random.PRNGKey(1), (3, FRAMES, LETTERS))
  noise = jax.random.normal(jax.random.PRNGKey(2), (3, 2, LETTERS)) * 9
  real = jnp.concatenate([jnp.ones((3, FRAMES)), jnp.zeros((3, 2))], 1)
  longer = jnp.concatenate([logits, noise], 1)
  for read in (ctc.greedy, lambda *args: ctc.beams(*args, 8)):
    a, n = read(logits, jnp.ones((3, FRAMES)), BLANK, 7)
    b, m = read(longer, real, BLANK, 7)
    assert n.tolist() == m.tolist()
    for i, size in enumerate(n.tolist()):
      assert a[i, :size].tolist() == b[i, :size].tolist()


def test_a_doubled_letter_needs_a_blank_between():
  frames = np.array([[1, 1, 0, 1, 2, 2]])
  logits = jax.nn.one_hot(frames, LETTERS) * 20
  for read in (ctc.greedy, lambda *args: ctc.beams(*args, 4)):
    ids, n = read(logits, jnp.ones(frames.shape), BLANK, 6)
    assert ids[0, :n[0]].tolist() == [1, 1, 2]
