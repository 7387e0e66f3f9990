"""From a feature map to one vector: average, maximum, GeM, R-MAC and a grid of averages."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from siamese_jax.errors import UserError

Array = jax.Array


def average(x: Array) -> Array:
    """Mean over positions. x: float [n, h, w, c] -> float32 [n, c]."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def maximum(x: Array) -> Array:
    """Largest value over positions (MAC). x: float [n, h, w, c] -> float32 [n, c]."""
    return jnp.max(x.astype(jnp.float32), axis=(1, 2))


def rmac(x: Array, levels: int = 3, overlap: float = 0.4) -> Array:
    """Regional maxima, each of length one, summed (Tolias et al., 2016, arXiv:1511.05879).

    At level l the regions are squares of side 2 min(h, w) / (l + 1), spread evenly with about 40 %
    overlap between neighbours. The paper's PCA whitening of the regions is not part of this.

    Args:
      x: float [n, h, w, c].
      levels: the number of scales, from one square upwards.
      overlap: the overlap between neighbours that the number of regions aims for.

    Returns:
      float32 [n, c]
    """
    x = x.astype(jnp.float32)
    total = jnp.zeros((x.shape[0], x.shape[-1]), jnp.float32)
    for top, left, side in rmac_regions(x.shape[1], x.shape[2], levels, overlap):
        region = jnp.max(x[:, top : top + side, left : left + side], axis=(1, 2))
        total = total + l2_normalize(region)
    return total


def rmac_regions(h: int, w: int, levels: int, overlap: float) -> list[tuple[int, int, int]]:
    """The squares (top, left, side) of R-MAC on an h x w map.

    >>> rmac_regions(4, 4, 2, 0.4)
    [(0, 0, 4), (0, 0, 2), (0, 2, 2), (2, 0, 2), (2, 2, 2)]
    """
    short, long = min(h, w), max(h, w)
    # The extra squares on the long side: the number whose overlap comes nearest to the wanted one.
    extra = 0
    if long > short:
        extra = min(
            range(1, 7),
            key=lambda m: abs((short**2 - short * (long - short) / m) / short**2 - overlap),
        )
    regions = []
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        rows = level + (extra if h > w else 0)
        columns = level + (extra if w > h else 0)
        for i in range(rows):
            for j in range(columns):
                top = (h - side) * i // max(1, rows - 1)
                left = (w - side) * j // max(1, columns - 1)
                regions.append((top, left, side))
    return regions


def generalised_mean(x: Array, p: Array | float = 3.0, eps: float = 1e-6) -> Array:
    """(1/(hw) sum_i max(x_ic, eps)^p)^(1/p): p = 1 is the average, p -> infinity the maximum."""
    x = jnp.maximum(x.astype(jnp.float32), eps)
    return jnp.mean(x**p, axis=(1, 2)) ** (1.0 / p)


class GeM(nn.Module):
    """`generalised_mean` with a learnable power (Radenovic et al., 2018, arXiv:1711.02512)."""

    initial_p: float = 3.0
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: float [n, h, w, c] -> float32 [n, c]."""
        p = self.param("p", nn.initializers.constant(self.initial_p), ())
        return generalised_mean(x, p, self.eps)


def grid(x: Array, side: int) -> Array:
    """Means over side x side cells, one behind the other: a level of a spatial pyramid.

    Where things are in the picture is kept, roughly (Lazebnik et al., 2006; He et al., 2014,
    arXiv:1406.4729). Of n rows, cell i has those from floor(i n / side) to ceil((i + 1) n / side):
    neighbours share a row where side does not divide n, and rows repeat where it is above n.

    Args:
      x: float [n, h, w, c].
      side: cells along each edge.

    Returns:
      float32 [n, side * side * c], the cells row by row.
    """

    def cells(size: int) -> list[slice]:
        return [slice(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]

    rows, columns = cells(x.shape[1]), cells(x.shape[2])
    return jnp.concatenate([average(x[:, a, b]) for a in rows for b in columns], axis=-1)


def l2_normalize(x: Array) -> Array:
    """x / sqrt(sum x^2 + 1e-12) over the last axis: zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


# Pooling without parameters: done right after the trunk, so a cache of features holds vectors.
FIXED_POOLS: dict[str, Callable[[Array], Array]] = {
    "average": average,
    "max": maximum,
    "rmac": rmac,
    "gem3": generalised_mean,
    "grid2": functools.partial(grid, side=2),
    "grid3": functools.partial(grid, side=3),
}
CELLS = {"grid2": 4, "grid3": 9}  # vectors that a pooling puts side by side; all others make one
CLASS_TOKEN = "cls"  # of a transformer's block, which is beside its map
POOLS = (*FIXED_POOLS, "gem", CLASS_TOKEN)


def pooled(outputs: Mapping[str, Array], stage: str, pool: str) -> Array:
    """One part of the features, float32 [n, c], out of a trunk's outputs."""
    if pool == CLASS_TOKEN:
        return average(outputs[f"{stage}:{pool}"])
    return FIXED_POOLS[pool](outputs[stage])


def pooled_width(channels: int, pool: str) -> int:
    """The width of one part of the features."""
    return channels * CELLS.get(pool, 1)


def stripped(names: str) -> str:
    """Names with commas between them, without the spaces around.

    >>> stripped("stage6, top")
    'stage6,top'
    """
    return ",".join(name.strip() for name in names.split(","))


def split_stages(stage: str) -> list[tuple[str, str, str]]:
    """Each stage that is named, the colon behind it, and its own pooling; the last two may be "".

    >>> split_stages("stage6, stage6:max")
    [('stage6', '', ''), ('stage6', ':', 'max')]
    """
    return [name.partition(":") for name in stripped(stage).split(",")]


def pooled_parts(stage: str, pool: str) -> tuple[tuple[str, str], ...]:
    """The parts of an encoder's features: a stage and how it is pooled, of each.

    >>> pooled_parts("stage4,top", "average")
    (('stage4', 'average'), ('top', 'average'))
    >>> pooled_parts("stage4,stage4:max,top", "average")
    (('stage4', 'average'), ('stage4', 'max'), ('top', 'average'))
    >>> pooled_parts("block11,block12", "cls")
    (('block11', 'cls'), ('block12', 'cls'))

    Args:
      stage: one or several, with commas between them; each with a pooling of its own after a colon,
        or else that of `pool`.
      pool: one for all, or one for each: "average,max".

    Raises:
      UserError: no pooling is called so, there are not as many as stages, or a part twice.
    """
    names, pools = split_stages(stage), pool.split(",")
    if len(pools) not in (1, len(names)):
        raise UserError(f"trunk.pool={pool!r} is {len(pools)} poolings for {len(names)} stages")
    parts = []
    every = pools * (len(names) // len(pools))
    for (output, colon, own), common in zip(names, every, strict=True):
        if not output or (colon and not own):
            raise UserError(f"trunk.stage={stage!r}: name stages as in stage4,stage6:max,top")
        parts.append((output, own or common))
    for _, name in parts:
        if name not in POOLS:
            raise UserError(f"{name!r} is not a pooling; choose one of {', '.join(POOLS)}")
    if len(parts) > 1 and any(name == "gem" for _, name in parts):
        raise UserError("gem learns its power for one stage; for several choose gem3, whose is 3")
    if len(set(parts)) < len(parts):
        raise UserError(f"trunk.stage={stage!r} names a stage twice, pooled the same way")
    return tuple(parts)
