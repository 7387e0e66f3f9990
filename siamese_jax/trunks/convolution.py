"""Convolution in the form that the platform runs fastest; the one place where that is decided.

XLA's CPU backend runs a 1x1 convolution several times slower than the same product written as
`dot_general`, and a depthwise convolution tens of times slower than k x k shifted multiply-adds. A
GPU wants plain convolutions. All forms compute the same sum; `tests/test_trunks.py` compares them.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from siamese_jax.trunks import winograd

Pads = tuple[tuple[int, int], tuple[int, int]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")


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
        return _shifted_multiply_adds(x, kernel, stride, padding)
    if kernel.shape[:2] == (1, 1):
        return _product(x, kernel, stride)
    return _convolution(x, kernel, stride, padding, False)


def fewer_products(x: Array, kernel: Array, stride: int, depthwise: bool) -> bool:
    """Whether `winograd.convolve` is the faster form here, where its accuracy is good enough."""
    plain = jax.default_backend() == "cpu" and x.dtype == jnp.float32 and not depthwise
    return plain and winograd.suits(x.shape, kernel.shape, stride)


def _convolution(x: Array, kernel: Array, stride: int, padding: Pads, depthwise: bool) -> Array:
    groups = x.shape[-1] if depthwise else 1
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT, feature_group_count=groups
    )


def _product(x: Array, kernel: Array, stride: int) -> Array:
    x = x[:, ::stride, ::stride, :]
    return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))


def _shifted_multiply_adds(x: Array, kernel: Array, stride: int, padding: Pads) -> Array:
    k, channels = kernel.shape[0], kernel.shape[-1]
    # The barrier has the padded array made once; XLA would work its borders out k x k times.
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))
    n, height, width, _ = x.shape
    rows, columns = ((size - k) // stride + 1 for size in (height, width))

    def shifted(a: int, b: int) -> Array:
        last = (n, a + (rows - 1) * stride + 1, b + (columns - 1) * stride + 1, channels)
        return lax.slice(x, (0, a, b, 0), last, (1, stride, stride, 1))

    terms = (shifted(a, b) * kernel[a, b][None, None] for a in range(k) for b in range(k))
    return functools.reduce(jnp.add, terms)
