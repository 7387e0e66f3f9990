"""Depthwise convolution on a CPU: k x k shifted multiply-adds, forwards and backwards.

Automatic derivatives would keep the k x k shifted maps of every layer for the kernel's gradient and
read each in a reduction of its own. Here the input alone is kept, and all gradients are sums of
products of contiguous rows of channels, as the forward pass is.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Pads = tuple[tuple[int, int], tuple[int, int]]
# So many products are written into one loop; more make programs long to compile.
_TERMS = 25


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: Array, kernel: Array, stride: int, padding: Pads) -> Array:
    """y[n,i,j,c] = sum over a,b of x[n, i*stride+a, j*stride+b, c] * kernel[a,b,0,c].

    x [n,h,w,c], with zeros around it, and kernel [k,k,1,c] of one dtype -> [n,h',w',c].
    """
    k, channels = kernel.shape[0], kernel.shape[-1]
    taps = kernel.reshape(k * k, 1, 1, 1, channels)
    return _sum(map(jnp.multiply, shifted(x, k, stride, padding), taps))


def shifted(x: Array, k: int, stride: int, padding: Pads, empty: float = 0) -> list[Array]:
    """The k x k views of x [n,h,w,c] whose pixel i, j is x[:, i*stride+a, j*stride+b].

    Around x is what `empty` says.
    """
    # The barrier has the padded array made once; XLA would work its borders out k x k times.
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=empty)
    x = lax.optimization_barrier(x)
    rows, columns = ((size - k) // stride + 1 for size in x.shape[1:3])
    return [_view(x, a, b, rows, columns, stride) for a in range(k) for b in range(k)]


def _forward(x: Array, kernel: Array, stride: int, padding: Pads) -> tuple[Array, tuple]:
    return convolve(x, kernel, stride, padding), (x, kernel)


def _backward(stride: int, padding: Pads, kept: tuple, dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    dy = lax.optimization_barrier(dy)
    return (
        _input_gradient(dy, kernel, stride, padding, x.shape),
        _kernel_gradient(dy, x, kernel.shape, stride, padding),
    )


convolve.defvjp(_forward, _backward)


def _input_gradient(
    dy: Array, kernel: Array, stride: int, padding: Pads, shape: tuple[int, ...]
) -> Array:
    """dx = for each pixel the sum over a,b of dy * kernel[a,b], where the tap a, b reads it."""

    def term(a: int, b: int, dy: Array) -> Array:
        return dy * kernel[None, None, a, b]

    return back_to_pixels(term, (dy,), Taps(kernel.shape[0], stride, padding), shape)


class Taps(NamedTuple):
    """Windows of k x k pixels, every `stride` pixels, on a map with zeros around it."""

    k: int
    stride: int
    padding: Pads


def back_to_pixels(
    term: Callable[..., Array], maps: tuple[Array, ...], taps: Taps, shape: tuple[int, ...]
) -> Array:
    """dx[u*stride+r, v*stride+q] = sum over a,b of term(a*stride+r, b*stride+q, maps[u-a, v-b]).

    The transpose of `shifted`: maps [n,h',w',c], zero beyond their border, to dx [n,h,w,c] of that
    shape. One sum for each of the stride x stride phases (r, q), in coordinates of the padded x.
    """
    k, stride, ((top, _), (left, _)) = taps
    most = -(-k // stride)
    n, height, width, channels = shape
    rows, columns = -(-(height + top) // stride), -(-(width + left) // stride)
    size = maps[0].shape[1:3]
    grow = [(most - 1, max(0, m - had)) for m, had in zip((rows, columns), size, strict=True)]
    maps = lax.optimization_barrier([jnp.pad(m, ((0, 0), *grow, (0, 0))) for m in maps])
    last, out = most - 1, (rows, columns)

    def phase(r: int, q: int) -> Array:
        terms = [
            term(a, b, *(_view(m, last - a // stride, last - b // stride, *out) for m in maps))
            for a in range(r, k, stride)
            for b in range(q, k, stride)
        ]
        # There are none where the stride is longer than the kernel.
        return _sum(terms) if terms else jnp.zeros((n, *out, channels), maps[0].dtype)

    phases = [jnp.stack([phase(r, q) for q in range(stride)], 3) for r in range(stride)]
    dx = jnp.stack(phases, 2).reshape(n, rows * stride, columns * stride, channels)
    return dx[:, top : top + height, left : left + width]


def _kernel_gradient(
    dy: Array, x: Array, shape: tuple[int, ...], stride: int, padding: Pads
) -> Array:
    """dk[a,b,c] = sum over n,i,j of x[n, i*stride+a, j*stride+b, c] * dy[n,i,j,c].

    Every image is convolved with its own dy, so that one product has all k x k taps; then the sum
    over the images. A tile of dy's pixels goes into one loop.
    """
    n, _, _, channels = dy.shape
    k = shape[0]
    columns = _even(dy.shape[2], _TERMS)
    rows = _even(dy.shape[1], max(1, _TERMS // columns))
    down, across = -(-dy.shape[1] // rows), -(-dy.shape[2] // columns)
    spans = ((down * rows - 1) * stride + k, (across * columns - 1) * stride + k)
    around = [
        (before, max(after, span - size - before))
        for (before, after), span, size in zip(padding, spans, x.shape[1:3], strict=True)
    ]
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), *around, (0, 0))))
    below, right = down * rows - dy.shape[1], across * columns - dy.shape[2]
    dy = jnp.pad(dy, ((0, 0), (0, below), (0, right), (0, 0)))

    def add_tile(t: Array, total: Array) -> Array:
        i, j = t // across * rows, t % across * columns
        seen = (n, (rows - 1) * stride + k, (columns - 1) * stride + k, channels)
        xs = lax.dynamic_slice(x, (0, i * stride, j * stride, 0), seen)
        dys = lax.dynamic_slice(dy, (0, i, j, 0), (n, rows, columns, channels))
        return total + _sum(
            _view(xs, i * stride, j * stride, k, k) * _view(dys, i, j, 1, 1)
            for i in range(rows)
            for j in range(columns)
        )

    total = lax.fori_loop(0, down * across, add_tile, jnp.zeros((n, k, k, channels), dy.dtype))
    return jnp.sum(total, 0).reshape(shape).astype(dy.dtype)


def _view(x: Array, i: int, j: int, rows: int, columns: int, stride: int = 1) -> Array:
    """rows x columns pixels of x [n,h,w,c], every stride-th from i, j on."""
    n, _, _, channels = x.shape
    last = (n, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, channels)
    return lax.slice(x, (0, i, j, 0), last, (1, stride, stride, 1))


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


def _even(size: int, most: int) -> int:
    """The length of `size` in as few parts of at most `most` as do, all as long but the last.

    >>> _even(40, 25), _even(7, 25)
    (20, 7)
    """
    return math.ceil(size / math.ceil(size / most))
