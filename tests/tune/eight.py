"""One step of every way to tune, on eight devices and on one; `test_every_method.py` runs it."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict
from tune import small

from ft import mesh, state, tune

GRID = {"data": 2, "fsdp": 2, "tensor": 2}
ROWS = 8

# Method -> (model, settings); prompts and prefixes want models of their own kind.
CASES = {
  "full": (small.a_bert, {}),
  "head": (small.a_bert, {}),
  "none": (small.a_bert, {}),
  "freeze": (small.a_bert, {"select": "bias"}),
  "staged": (small.a_bert, {"order": "unfreeze"}),
  "sparse": (small.a_bert, {"rank": 2, "support": "magnitude"}),
  "lora": (small.a_bert, {"rank": 2, "dora": True}),
  "adalora": (small.a_bert, {"rank": 3, "target_rank": 2}),
  "loha": (small.a_bert, {"rank": 2}),
  "lokr": (small.a_bert, {"rank": 2}),
  "hira": (small.a_bert, {"rank": 2}),
  "vera": (small.a_bert, {"rank": 4}),
  "ia3": (small.a_llama, {}),
  "ssf": (small.a_bert, {}),
  "oft": (small.a_bert, {"block_size": 4}),
  "bottleneck": (small.a_bert, {"size": 4}),
  "prompt": (small.a_llama, {"length": 3}),
  "prefix": (small.a_llama, {"length": 3}),
  "visual_prompt": (small.a_vit, {"length": 2}),
  "tokens": (small.a_llama, {"tokens": (3, 5)}),
}


def loss(apply, variables, batch, rng):
  """A sum over rows and their number; no row is like another."""
  inputs = {name: x for name, x in batch.items() if name != "weight"}
  logits = apply(variables, inputs)["logits"]  # micro-batches would draw other dropout
  squares = jnp.square(logits - jnp.arange(float(logits.shape[-1]))).reshape(len(logits), -1)
  return jnp.sum(squares.mean(1) * batch["weight"]), jnp.sum(batch["weight"]), {}


def one_step(model, tuned, batch, accumulate, place):
  """Returns the trainable tree after a step, the leaves placed by `place`."""
  tx = optax.sgd(0.1)
  apply = state.make_apply(model.module, tuned.interceptor, tuned.around)
  step = state.make_train_step(loss, apply, tuned.combine, tx, accumulate, stages=tuned.stages)
  trainable = jax.tree.map(jnp.array, tuned.trainable)
  last = len(tuned.stages.shares()) - 1 if tuned.stages else 0
  now = place(state.create(trainable, {}, tx, 0))
  return step(now, place(tuned.frozen), batch, None, last)[0].trainable


def check(method):
  """Raises AssertionError where the eight devices' step differs from that of one."""
  make, values = CASES[method]
  model, inputs = make(scanned=True)
  rows = {name: np.resize(np.asarray(x), (ROWS, *x.shape[1:])) for name, x in inputs.items()}
  rows["weight"] = np.arange(1, ROWS + 1, dtype=np.float32) / ROWS
  grid = mesh.make(config_dict.ConfigDict(GRID))
  tuned = small.init(method, model, **values)
  alone = one_step(model, tuned, rows, 1, lambda tree: tree)
  spread = one_step(model, tuned, mesh.place_batch(rows, mesh.batch_sharding(grid)), 2,
                    lambda tree: mesh.place(tree, mesh.shardings(grid, tree)))
  before = tune.flatten(tuned.trainable)
  for path, leaf in tune.flatten(alone).items():
    assert leaf.size == 0 or np.any(np.asarray(leaf) != before[path]) or "adapters" in path, path
    np.testing.assert_allclose(np.asarray(tune.flatten(spread)[path]), leaf, rtol=1e-4, atol=1e-5,
                               err_msg=f"{method}: {path}")


if __name__ == "__main__":
  assert jax.device_count() == 8
  for name in sys.argv[1:] or CASES:
    check(name)
    print(name)
