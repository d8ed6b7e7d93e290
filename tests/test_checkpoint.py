"""Checkpoints: sealed, verified, pruned, never trusted half-written, never lost to a full disk."""

import errno
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft import checkpoint, errors


def tree(seed):
  rng = np.random.default_rng(seed)
  return {
    "w": jnp.asarray(rng.standard_normal((64, 64), dtype=np.float32)),
    "opt": (jnp.asarray(seed, jnp.int32), {"m": jnp.ones((8,)) * seed}),
  }


def same(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in leaves)


def saved(folder, steps=(1, 2, 3), keep=3, best=1):
  made = checkpoint.Checkpoints(folder, keep)
  for step in steps:
    made.save(step, tree(step), {"best_step": best, "note": step})
  made.finish()
  return made


def test_restores_the_newest_bitwise(tmp_path):
  made = saved(tmp_path)
  state, host = made.restore_newest(tree(0))
  assert same(state, tree(3)) and host["note"] == 3


def test_keeps_the_newest_and_the_best(tmp_path):
  made = saved(tmp_path, steps=(1, 2, 3, 4, 5), keep=2, best=2)
  assert made.steps() == [2, 4, 5]
  assert same(made.restore_best(2, tree(0))[0], tree(2))


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
  """The buffers are donated to the next step while the save still runs."""
  bump = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
  made, now = checkpoint.Checkpoints(tmp_path, 2), {"w": jnp.zeros((1024, 1024))}
  for step in range(5):
    made.save(step, now, {"best_step": 0})
    for _ in range(3):
      now = bump(now)
    made.finish()
    kept, _ = made.restore_newest({"w": jnp.zeros((1024, 1024))})
    assert float(kept["w"].min()) == float(kept["w"].max()) == 3 * step


def test_every_damaged_file_is_found_and_the_step_before_used(tmp_path):
  origin = tmp_path / "origin"
  saved(origin, steps=(2, 3))
  last = origin / "step_000000003"
  harms = {
    "flip": lambda p: p.write_bytes(_flip(p.read_bytes())),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "delete": pathlib.Path.unlink,
  }
  files = [p.relative_to(last) for p in checkpoint._files(last) if p.stat().st_size]
  assert len(files) > 5
  for i, name in enumerate(files):
    for kind, harm in harms.items():
      folder = tmp_path / f"{kind}{i}"
      shutil.copytree(origin, folder)
      harm(folder / last.name / name)
      assert str(name) in checkpoint.verify(folder / last.name), (kind, name)
      state, host = checkpoint.Checkpoints(folder).restore_newest(tree(0))
      assert same(state, tree(2)) and host["note"] == 2
      assert (folder / "step_000000003.damaged").is_dir()


def _flip(data: bytes) -> bytes:
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_all_damaged_is_one_clear_error(tmp_path):
  made = saved(tmp_path, steps=(1,))
  (tmp_path / "step_000000001" / "manifest.json").unlink()
  with pytest.raises(errors.UserError, match="none of the checkpoints is intact"):
    made.restore_newest(tree(0))


def test_a_save_in_progress_is_not_trusted(tmp_path):
  saved(tmp_path, steps=(1,))
  (tmp_path / "step_000000002.saving" / "state").mkdir(parents=True)
  made = checkpoint.Checkpoints(tmp_path)
  assert made.steps() == [1] and not list(tmp_path.glob("*.saving"))


def test_a_full_disk_is_told_and_good_steps_stay(tmp_path, monkeypatch):
  made = saved(tmp_path, steps=(1,))

  def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(made._saver, "save", full)
  with pytest.raises(errors.UserError, match="disk is full"):
    made.save(2, tree(2), {"best_step": 1})
  assert made.steps() == [1] and not list(tmp_path.glob("*.saving"))
  assert same(made.restore_newest(tree(0))[0], tree(1))
