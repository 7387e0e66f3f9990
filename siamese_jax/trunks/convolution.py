"""Convolution in the form that the platform runs fastest; the one place where that is decided.

XLA's CPU backend runs a 1x1 convolution several times slower than the same product written as
`dot_general`, a depthwise convolution tens of times slower than k x k shifted multiply-adds, and a
convolution of three colours slower than one product with its gathered patches. A GPU wants plain
convolutions. All forms compute the same sum; `tests/test_trunks.py` compares them.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from siamese_jax.trunks import depthwise as in_depth
from siamese_jax.trunks import winograd
from siamese_jax.trunks.depthwise import Pads, shifted

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Patches of at most so many numbers are gathered: 3x3 of three colours, not 7x7.
_PATCH = 32
# Pixels of input whose maps in a trunk's early stages fit in a CPU core's cache.
_PART = 112**2


def pads(size: Sequence[int], kernel: int, stride: int, same: bool) -> Pads:
    """Explicit zero padding (before, after) for the two spatial axes.

    `same` is TensorFlow's rule, out = ceil(size / stride) with the odd pixel after; otherwise
    PyTorch's usual symmetric k // 2.

    >>> pads((224, 225), 3, 2, same=True), pads((224, 225), 3, 2, same=False)
    (((0, 1), (1, 1)), ((1, 1), (1, 1)))
    """
    if not same:
        return ((kernel // 2, kernel // 2),) * 2
    totals = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in size]
    (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in totals)
    return (top, bottom), (left, right)


def convolve(x: Array, kernel: Array, stride: int, padding: Pads, depthwise: bool = False) -> Array:
    """y[n,i,j,o] = sum over a,b,c of x[n, i*stride+a, j*stride+b, c] * kernel[a,b,c,o].

    x [n,h,w,c] and kernel [k,k,c,o] (depthwise: [k,k,1,c]) of one dtype -> [n,h',w',o].
    """
    if jax.default_backend() != "cpu":
        return _convolution(x, kernel, stride, padding, depthwise)
    if depthwise:
        return in_depth.convolve(x, kernel, stride, padding)
    if kernel.shape[:2] == (1, 1):
        return product(x[:, ::stride, ::stride, :], kernel)
    if math.prod(kernel.shape[:3]) <= _PATCH:
        return product(jnp.concatenate(shifted(x, kernel.shape[0], stride, padding), -1), kernel)
    return _spatial(x, kernel, stride, padding)


def images_at_once(shape: Sequence[int]) -> int:
    """How many of the images [n,h,w,c] a frozen trunk's early stages take at a time; divides n.

    Their maps are large and their kernels small, so on a CPU they want few images, and caches. The
    late stages are the other way round.
    """
    n, height, width = shape[:3]
    if jax.default_backend() != "cpu":
        return n
    most = max(1, round(_PART / (height * width)))
    return max(k for k in range(1, min(n, most) + 1) if n % k == 0)


def fewer_products(x: Array, kernel: Array, stride: int, depthwise: bool) -> bool:
    """Whether `winograd.convolve` is the faster form here, where its accuracy is good enough."""
    plain = jax.default_backend() == "cpu" and x.dtype == jnp.float32 and not depthwise
    return plain and winograd.suits(x.shape, kernel.shape, stride)


def _convolution(x: Array, kernel: Array, stride: int, padding: Pads, depthwise: bool) -> Array:
    groups = x.shape[-1] if depthwise else 1
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT, feature_group_count=groups
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _spatial(x: Array, kernel: Array, stride: int, padding: Pads) -> Array:
    """XLA's convolution, and its own dx; but its dkernel takes up to seven times as long as y."""
    return _convolution(x, kernel, stride, padding, False)


def _spatial_forward(
    x: Array, kernel: Array, stride: int, padding: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return _spatial(x, kernel, stride, padding), (x, kernel)


def _spatial_backward(
    stride: int, padding: Pads, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    dy = lax.optimization_barrier(dy)
    (dx,) = jax.linear_transpose(lambda x: _convolution(x, kernel, stride, padding, False), x)(dy)
    plain = padding == ((1, 1), (1, 1)) and x.dtype == jnp.float32
    if plain and winograd.suits_gradient(x.shape, kernel.shape, stride):
        return dx, winograd.kernel_gradient(x, dy)
    return dx, _kernel_gradient(x, dy, kernel.shape, stride, padding)


_spatial.defvjp(_spatial_forward, _spatial_backward)


def _kernel_gradient(
    x: Array, dy: Array, shape: tuple[int, ...], stride: int, padding: Pads
) -> Array:
    """dkernel[a,b,c,o] = sum over n,i,j of x[n, i*stride+a, j*stride+b, c] * dy[n,i,j,o].

    A product with all pixels as rows for each tap a, b; of few colours for each row of taps.
    """
    taps = shifted(x, shape[0], stride, padding)
    along = shape[1] if shape[1] * shape[2] <= _PATCH else 1
    groups = [taps[start : start + along] for start in range(0, len(taps), along)]
    views = [jnp.concatenate(group, -1) if along > 1 else group[0] for group in groups]
    rows = [_over_rows(lax.optimization_barrier(view), dy) for view in views]
    return jnp.concatenate(rows).reshape(shape)


@jax.custom_vjp
def product(x: Array, kernel: Array) -> Array:
    """x kernel: [..., c] and [c, o], or a 1x1 convolution's [1,1,c,o], of one dtype -> [..., o]."""
    return lax.dot_general(x, _matrix(kernel), (((x.ndim - 1,), (0,)), ((), ())))


def _matrix(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _over_rows(x: Array, dy: Array) -> Array:
    """x' dy, with all pixels as rows: [..., c] and [..., o] -> [c, o]."""
    return lax.dot_general(_matrix(x), _matrix(dy), (((0,), (0,)), ((), ())))


def _product_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """dx = dy kernel' and dkernel = x' dy, with all pixels as rows."""
    x, kernel = kept
    # Without the barrier XLA writes dy a second time, transposed, which takes longer than the sum.
    dy = lax.optimization_barrier(dy) if jax.default_backend() == "cpu" else dy
    dx = lax.dot_general(dy, _matrix(kernel), (((dy.ndim - 1,), (1,)), ((), ())))
    return dx, _over_rows(x, dy).reshape(kernel.shape)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


product.defvjp(_product_forward, _product_backward)
