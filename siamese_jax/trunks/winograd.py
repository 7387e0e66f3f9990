"""3x3 convolutions of stride 1 with 4 times fewer multiplications, on a CPU.

Winograd's F(4x4, 3x3) (Lavin and Gray 2016, arXiv:1509.09308): an output tile Y of 4x4 comes from
an input tile d of 6x6 and the kernel g as

    Y = A' [ (G g G') . (B' d B) ] A

where . is element by element, so that over channels it is 36 matrix products. In float32 the result
differs from the direct sum by about 1e-5 of its largest value. A frozen trunk takes Y by it; one
that is trained takes the kernel's gradient alone,

    dg = G' [ sum over tiles of (B' d B) . (A dY A') ] G
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_TILE, _STEP = 6, 4
_B = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_G = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_A = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])

# An image with more bytes than this is not worth the memory: its tiles are 2.25 times as many.
_IMAGE = 16_000_000


def suits(shape: Sequence[int], kernel: Sequence[int], stride: int) -> bool:
    """Whether this is the faster form for x [n,h,w,c]; measured from 7 to 224 pixels."""
    _, h, w, c = shape
    enough = min(c, kernel[-1]) >= 32 and min(h, w) >= 4
    return tuple(kernel[:2]) == (3, 3) and stride == 1 and enough and 4 * h * w * c <= _IMAGE


def suits_gradient(shape: Sequence[int], kernel: Sequence[int], stride: int) -> bool:
    """Likewise of `kernel_gradient`, which wants tiles enough to pay for transforming a kernel."""
    n, h, w, c = shape
    tiles = n * -(-h // _STEP) * -(-w // _STEP)
    return suits(shape, kernel, stride) and 2 * tiles >= min(c, kernel[-1])


def transform(kernel: Array) -> Array:
    """G g G' for every pair of channels: [3,3,c,o] -> [36,c,o]. Worth doing once."""
    g = jnp.asarray(_G, kernel.dtype)
    tiles = jnp.einsum("ia,jb,abco->jico", g, g, kernel, precision=lax.Precision.HIGHEST)
    return tiles.reshape(_TILE**2, *kernel.shape[2:])


def convolve(x: Array, tiles: Array) -> Array:
    """x [n,h,w,c], tiles of `transform` [36,c,o] -> [n,h,w,o], one pixel of zeros all around."""
    n, h, w, _ = x.shape
    o = tiles.shape[-1]
    rows, columns = -(-h // _STEP), -(-w // _STEP)
    x = _of_input(x)
    y = lax.dot_general(x, tiles, (((2,), (1,)), ((0,), (0,))))
    y = y.reshape(_TILE, _TILE, n, rows, columns, o)
    y = lax.optimization_barrier(jnp.stack(_combine(_A, list(y)), -2))
    y = jnp.stack(_combine(_A, list(y)), 2)
    return y.reshape(n, _STEP * rows, _STEP * columns, o)[:, :h, :w]


def kernel_gradient(x: Array, dy: Array) -> Array:
    """Of `convolve` by the kernel that its tiles are of: x [n,h,w,c], dy [n,h,w,o] -> [3,3,c,o]."""
    n, h, w, o = dy.shape
    rows, columns = -(-h // _STEP), -(-w // _STEP)
    dy = jnp.pad(dy, ((0, 0), (0, _STEP * rows - h), (0, _STEP * columns - w), (0, 0)))
    dy = dy.reshape(n, rows, _STEP, columns, _STEP, o)
    dy = lax.optimization_barrier(jnp.stack(_combine(_A.T, [dy[:, :, i] for i in range(_STEP)])))
    dy = lax.optimization_barrier(jnp.stack(_combine(_A.T, [dy[..., j, :] for j in range(_STEP)])))
    dy = dy.reshape(_TILE**2, -1, o)
    tiles = lax.dot_general(_of_input(x), dy, (((1,), (1,)), ((0,), (0,))))
    g = jnp.asarray(_G, tiles.dtype)
    tiles = tiles.reshape(_TILE, _TILE, *tiles.shape[1:])
    return jnp.einsum("ia,jb,jico->abco", g, g, tiles, precision=lax.Precision.HIGHEST)


def _of_input(x: Array) -> Array:
    """B' d B of every tile d: [n,h,w,c], and one pixel of zeros all around -> [36,tiles,c]."""
    n, h, w, c = x.shape
    rows, columns = -(-h // _STEP), -(-w // _STEP)
    x = jnp.pad(x, ((0, 0), (1, 1 + _STEP * rows - h), (1, 1 + _STEP * columns - w), (0, 0)))
    # The barriers keep XLA from working each half of a transform out again for every output.
    x = lax.optimization_barrier(jnp.stack(_combine(_B, _every(x, 1, rows))))
    x = lax.optimization_barrier(jnp.stack(_combine(_B, _every(x, 3, columns))))
    return x.reshape(_TILE**2, n * rows * columns, c)


def _every(x: Array, axis: int, count: int) -> list[Array]:
    """The six slices that start at 0 to 5 and take every fourth of an axis."""
    last = _STEP * (count - 1) + 1
    return [lax.slice_in_dim(x, i, i + last, _STEP, axis) for i in range(_TILE)]


def _combine(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """matrix @ parts, written as the few additions that it is."""

    def scaled(factor: float, part: Array) -> Array:
        return part if factor == 1 else -part if factor == -1 else part * float(factor)

    sums = []
    for row in matrix:
        terms = [scaled(f, part) for f, part in zip(row.tolist(), parts, strict=True) if f]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        sums.append(total)
    return sums
