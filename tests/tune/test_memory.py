"""What a LoRA step costs, told by the compiled program: memory, products, arithmetic."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from tune import toys

from ft import state, tune
from ft.models import bert

pytestmark = pytest.mark.optimised
ROWS = (6, 24)  # 144 rows, a size that no weight has
WIDTH = 256
# Products as large as a kernel: of query, key, value and output, of the three at once, of both
# sides of the feed-forward block.
KERNELS = {frozenset((WIDTH, WIDTH)), frozenset((WIDTH, 3 * WIDTH)), frozenset((WIDTH, 4 * WIDTH))}


@functools.cache
def step(method, depth, **values):
  """(tuned, lowered train step) of a BERT without dropout."""
  config = bert.Config(
    vocab_size=100, hidden_size=WIDTH, num_hidden_layers=depth, num_attention_heads=4,
    intermediate_size=4 * WIDTH, max_position_embeddings=32, num_labels=3, pooling="mean",
    pooler=False).with_dropout(0.0)
  module = bert.Model(config)
  inputs = {"input_ids": jnp.zeros(ROWS, jnp.int32), "attention_mask": jnp.ones(ROWS, jnp.int32)}
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs))
  variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  tuned = toys.init(method, variables, **values)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

  def loss(apply, variables, batch, rng):
    return jnp.sum(apply(variables, batch, rng)["logits"] ** 2), jnp.float32(ROWS[0]), {}

  train = state.make_train_step(loss, state.make_apply(module, tuned.interceptor), tuned.combine,
                                tx)
  start = state.create(tuned.trainable, {}, tx, 0)
  return tuned, train.lower(start, tuned.frozen, inputs)


@functools.cache
def compiled(method, depth, **values):
  return step(method, depth, **values)[1].compile()


def peak(program) -> int:
  """Bytes at the peak: what goes in, what is made, what comes out and is not in place."""
  memory = program.memory_analysis()
  return (memory.argument_size_in_bytes + memory.temp_size_in_bytes
          + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def size(tree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def products(program) -> set[frozenset[int]]:
  """The sides of all two-dimensional products of a program."""
  found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", program.as_text())
  assert found
  return {frozenset(map(int, sides)) for sides in found}


def test_peak_is_weights_activations_and_trainables():
  """Four times the rank adds what trains, twelve bytes of state and four of gradient each.

  The saved activations are those of the same program at rank 4, all it needs beyond weights and
  trainables: what a CPU's compiler keeps for its own reasons (the kernels of query, key and value
  side by side; the plain output and its update until they are added) counts among them.
  """
  small, large = (step("lora", 4, rank=rank)[0] for rank in (4, 16))
  frozen = size(large.frozen)

  def trainables(tuned):
    return 16 * sum(row.count for row in tuned.table)

  activations = peak(compiled("lora", 4, rank=4)) - frozen - trainables(small)
  assert activations > 0
  expected = frozen + activations + trainables(large)
  assert peak(compiled("lora", 4, rank=16)) <= 1.03 * expected


@pytest.mark.parametrize("values", [{}, {"dora": True}, {"start": "olora"}])
def test_no_product_is_as_large_as_a_frozen_kernel(values):
  """That is no gradient of frozen weights, and no W + A B; full fine-tuning shows how it looks."""
  assert not products(compiled("lora", 1, rank=4, **values)) & KERNELS


def test_products_of_full_fine_tuning_are_seen():
  assert products(compiled("full", 1)) >= KERNELS


def test_temporaries_hold_no_gradient_of_the_weights():
  tuned = step("full", 1)[0]
  blocks = size(tuned.trainable["params"]["encoder"])
  less = (compiled("full", 1).memory_analysis().temp_size_in_bytes
          - compiled("lora", 1, rank=4).memory_analysis().temp_size_in_bytes)
  assert less > 0.5 * blocks


def test_arithmetic_of_twelve_layers():
  flops = {method: step(method, 12, **values)[1].cost_analysis()["flops"]
           for method, values in (("full", {}), ("lora", {"rank": 8}))}
  assert flops["lora"] <= 0.72 * flops["full"]


def test_optimizer_state_and_outputs_are_those_of_what_trains():
  tuned = step("lora", 4, rank=16)[0]
  count = sum(row.count for row in tuned.table)
  memory = compiled("lora", 4, rank=16).memory_analysis()
  assert memory.output_size_in_bytes <= 12 * count + 64 * len(tune.flatten(tuned.trainable)) + 4096
