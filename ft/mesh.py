"""Devices: the mesh, what is sharded over it, and the start of runs of several processes.

One code path from a laptop to a pod: a mesh of axes `data`, `fsdp`, `tensor`, arrays placed with
NamedSharding, and `jax.jit` that follows the placement. Axis types are Auto: linen's layers, and
its dropout above all, need the compiler to propagate shardings.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ft import errors

KEYS = {
  "data": (-1, "devices that share a batch; -1: all that the other axes leave"),
  "fsdp": (1, "devices that share a batch and each hold a part of every large array", (1, None)),
  "tensor": (1, "devices that split the width of large matrices", (1, None)),
  "coordinator": ("", "address:port of process 0, for runs of several processes"),
  "processes": (1, "how many processes run this command", (1, None)),
  "process": (0, "which of them this one is", (0, None)),
}
SMALLEST_SHARDED = 2**14  # elements; smaller arrays cost more to gather than to keep


def start(config) -> None:
  """Joins the processes of a run; does nothing for one process."""
  if config.processes > 1 and not jax.distributed.is_initialized():
    if not config.coordinator:
      raise errors.UserError("mesh.coordinator: needed with mesh.processes > 1, as host:port")
    jax.distributed.initialize(config.coordinator, config.processes, config.process)


def make(config) -> Mesh:
  """The mesh of all devices.

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  count, rest = jax.device_count(), config.fsdp * config.tensor
  data = count // rest if config.data == -1 else config.data
  if data * rest != count or data < 1:
    raise errors.UserError(
      f"mesh: data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does not make the "
      f"{count} devices there are; leave mesh.data at -1 and choose divisors of {count}"
    )
  axes = (AxisType.Auto,) * 3
  return jax.make_mesh((data, config.fsdp, config.tensor), ("data", "fsdp", "tensor"), axes)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shard(mesh: Mesh, shape: tuple) -> NamedSharding:
  """Where an array of this shape goes: width over `tensor`, the longest other axis over `fsdp`."""
  spec = [None] * len(shape)
  if np.prod(shape, dtype=np.int64) >= SMALLEST_SHARDED:
    if mesh.shape["tensor"] > 1 and shape[-1] % mesh.shape["tensor"] == 0:
      spec[-1] = "tensor"
    free = [a for a in range(len(shape)) if not spec[a] and shape[a] % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] > 1 and free:
      spec[max(free, key=lambda axis: shape[axis])] = "fsdp"
  return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(mesh: Mesh, tree):
  """A NamedSharding for each leaf; see `shard`."""
  return jax.tree.map(lambda leaf: shard(mesh, np.shape(leaf)), tree)


def place(tree, placement):
  """Puts a tree of arrays, equal on every process, where its shardings say."""
  return jax.tree.map(place_leaf, tree, placement)


def place_leaf(leaf, sharding):
  """Puts one array where its sharding says (None: the default device), as a copy of its own."""
  if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
    return leaf
  if jax.process_count() == 1 or sharding is None:
    # Memory shared with numpy could not be donated to a training step.
    return jax.device_put(leaf, sharding, may_alias=None if isinstance(leaf, jax.Array) else False)
  host = np.asarray(leaf)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_batch(batch: dict, sharding: NamedSharding) -> dict:
  """Puts this process's rows of a batch on its devices.

  Args:
    batch: (nested) dict of arrays whose first axis are rows.
    sharding: of the rows.
  """
  return jax.tree.map(
    lambda value: jax.make_array_from_process_local_data(sharding, np.asarray(value)), batch
  )


def check_batch(mesh: Mesh, size: int, accumulate: int, key: str = "train.batch") -> None:
  """Raises UserError in the name of a key unless a batch divides into micro-batches and devices."""
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  if size % accumulate or (size // accumulate) % devices:
    step = accumulate * devices
    raise errors.UserError(
      f"{key}={size} does not divide into train.accumulate={accumulate} micro-batches on "
      f"{devices} devices; {max(step, size // step * step)} would"
    )


def barrier(name: str) -> None:
  """Waits for every process of the run."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
