"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382): blocks that some images pass by.

y = x + f(x) becomes x + b f(x) / (1 - p) for each image by itself, b of 1 with the probability
1 - p; in training alone. p grows in a line with the block's place, from 0 to the whole rate at the
last block, as in timm (whose EfficientNets end one block's share short of it).
"""

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

# What a block adds may be of several branches: attention and an MLP.
BRANCHES = 2
Rates = tuple[tuple[str, tuple[float, ...]], ...]


def drop_rates(blocks: Mapping[str, int], rate: float, stages: Collection[str]) -> Rates:
    """(stage, the probability of each of its blocks to be passed by), of some stages.

    Args:
      blocks: how many each stage has, in the order of their depth.
      rate: of the last block, from 0 and below 1.
      stages: the ones that drop any; blocks of the others count all the same.

    >>> drop_rates({"stage1": 2, "stage2": 1}, 0.5, ["stage2"])
    (('stage2', (0.5,)),)
    """
    last = max(1, sum(blocks.values()) - 1)
    rates, first = [], 0
    for stage, count in blocks.items():
        each = tuple(rate * (first + i) / last for i in range(count))
        first += count
        if stage in stages and any(each):
            rates.append((stage, each))
    return tuple(rates)


def draw(key: Array, rates: Rates, images: int) -> dict[str, Array]:
    """{stage: float32 [blocks, branches, images]}: b / (1 - p) of each block, branch and image."""
    keys = jax.random.split(key, len(rates))
    return {stage: _factors(k, each, images) for k, (stage, each) in zip(keys, rates, strict=True)}


def _factors(key: Array, rates: Sequence[float], images: int) -> Array:
    keep = 1 - jnp.asarray(rates, jnp.float32)[:, None, None]
    stays = jax.random.bernoulli(key, keep, (len(rates), BRANCHES, images))
    return stays.astype(jnp.float32) / keep


def dropped(y: Array, factors: Array | None, branch: int = 0) -> Array:
    """What a block adds, [n, ...], times each image's factor of [branches, n]; None: as it is."""
    if factors is None:
        return y
    shape = (len(y),) + (1,) * (y.ndim - 1)
    return y * factors[branch].reshape(shape).astype(y.dtype)


def of_block(factors: Array | None, i: int) -> Array | None:
    """The factors of a stage's block i, [branches, n]; None where it drops none."""
    return None if factors is None else factors[i]
