"""Names of leaves: a tree of arrays as a flat dict by path, and digests of it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax.errors import UserError


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as freezing patterns see it, e.g. "trunk/stage4/block1/conv1/kernel"."""
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def fingerprint(**parts: Any) -> str:
    """32 hexadecimal digits of anything that JSON can hold.

    >>> fingerprint(size=128, weights="ab") == fingerprint(weights="ab", size=128)
    True
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


Leaves = dict[str, Any]  # by path; NumPy or JAX arrays


def flatten(tree: Any) -> Leaves:
    """Every leaf by its path, e.g. "params/head/dense1/kernel"; a typed key by its raw data."""
    return {
        path_name(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(leaves: dict[str, Any], like: Any) -> Any:
    """The tree of these leaves, in the structure of `like`.

    Raises:
      UserError: a leaf is missing or has another shape: the leaves are of another model.
    """

    def find(path: tuple[Any, ...], old: Any) -> jax.Array:
        name = path_name(path)
        if name not in leaves:
            raise UserError(f"the checkpoint has no {name}: it is of another model or optimiser")
        if _is_key(old):
            return jax.random.wrap_key_data(jnp.asarray(leaves[name]))
        if np.shape(leaves[name]) != np.shape(old):
            raise UserError(
                f"{name} is {np.shape(leaves[name])} in the checkpoint and {np.shape(old)} in "
                "this model; start again in another --workdir"
            )
        return jnp.asarray(leaves[name])

    return jax.tree_util.tree_map_with_path(find, like)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def nest(leaves: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The nested dict of the leaves below a prefix.

    >>> nest({"a/b/c": 1, "a/d": 2, "e": 3}, "a/")
    {'b': {'c': 1}, 'd': 2}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if name.startswith(prefix):
            *parents, last = name.removeprefix(prefix).split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = leaf
    return tree


def digest(leaves: dict[str, Any]) -> str:
    """BLAKE2b over names, shapes, types and bytes, in the order of the names."""
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(leaves):
        leaf = np.asarray(leaves[name])
        h.update(f"{name} {leaf.shape} {leaf.dtype}\n".encode())
        h.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return h.hexdigest()
