"""Where the arrays of training live: one program over all devices, which sees global arrays.

A batch lies on the devices by rows, the state on each of them, or by parts (`train.shard`). Losses
and miners are written for the whole batch and stay so: XLA adds what devices have to tell one
another. A step's result is that of one device but for the order of sums.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from siamese_jax import processes
from siamese_jax.losses import Loss
from siamese_jax.storage.tree import path_name

Tree = Any
DATA = "data"
SHARDS = ("none", "classes", "state")
LEAST = 2**12  # numbers of a leaf that is worth to be split


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The devices, or all there are, in a row; None where there is one."""
    devices = devices or jax.devices()
    return Mesh(np.array(devices), (DATA,)) if len(devices) > 1 else None


def spread(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Columns [n, ...] by rows over the devices, the last one repeated to fill them."""
    by_rows = NamedSharding(mesh, PartitionSpec(DATA))

    def of(column: np.ndarray) -> jax.Array:
        fill = [(0, -len(column) % mesh.size)] + [(0, 0)] * (column.ndim - 1)
        return _put(np.pad(column, fill, mode="edge"), by_rows)

    return {name: of(column) for name, column in batch.items()}


def mine(rows: int, mesh: Mesh | None) -> np.ndarray:
    """bool [rows], which rows of a batch lie on this process's devices: it reads these alone."""
    here = np.zeros(rows, bool)
    if mesh is None:
        return ~here
    by_rows = NamedSharding(mesh, PartitionSpec(DATA))
    filled = rows + -rows % mesh.size
    for part in by_rows.addressable_devices_indices_map((filled,)).values():
        here[part] = True
    return here


def shardings(tree: Tree, mesh: Mesh, shard: str) -> Tree:
    """Where each leaf lives.

    Args:
      tree: a train state, or its shapes.
      mesh: of `make_mesh`.
      shard: what is split over the devices, and not on each of them: "none"; "classes", the loss's
        own parameters (class weights, proxies), what the optimiser keeps of them, and the
        cross-batch memory; "state", every leaf (FSDP: fully sharded data parallel, Zhao et al.
        2023, arXiv:2304.11277). A leaf is split along its longest axis that they divide; one of
        few numbers, or without such an axis, is on each device.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        chosen = shard == "state" or (shard == "classes" and {"loss", "memory"} & {*parts})
        axes = [i for i, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not (chosen and axes and leaf.size >= LEAST):
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, DATA))

    return jax.tree_util.tree_map_with_path(of, tree)


def place(tree: Tree, mesh: Mesh, shard: str) -> Tree:
    """The leaves, alike in all processes, where they live."""
    return jax.tree.map(_put, tree, shardings(tree, mesh, shard))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole; of several each keeps its part."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])


def whole(tree: Tree) -> Tree:
    """The leaves as this process can read them: of several processes, each has all of them."""
    if processes.count() == 1:
        return tree
    (mesh,) = {leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if _is_shared(leaf)} or {None}
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf: leaf.addressable_data(0) if _is_shared(leaf) else leaf, _everywhere(tree, mesh)
    )


@functools.partial(jax.jit, static_argnums=1)
def _everywhere(tree: Tree, mesh: Mesh) -> Tree:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def of_all_rows(loss: Loss, mesh: Mesh, shard: str) -> Loss:
    """The loss, whose own parameters are split, of the embeddings as every device has them all.

    Rows and classes lie along one axis of the mesh, so XLA would send all classes to where the rows
    are. Sent are the rows [n, d] instead, once there and their gradient back: each device has all
    rows against its classes, as in Partial FC (An et al. 2021, arXiv:2010.05222).
    """
    if shard == "none":
        return loss
    everywhere = NamedSharding(mesh, PartitionSpec())

    def apply(params: Tree, rows: Array, labels: Array, mask: Array, **more: Any) -> Any:
        told = jax.lax.with_sharding_constraint((rows, labels, mask), everywhere)
        return loss.apply(params, *told, **more)

    return Loss(loss.init, apply)


def count_split(tree: Tree) -> int:
    """How many leaves of a placed tree are not whole on each device."""
    return sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))


def keep(tree: Tree, mesh: Mesh, shard: str) -> Tree:
    """The same inside a jitted step, of what it has made."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh, shard))
