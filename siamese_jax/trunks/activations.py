"""Activations that keep one map for their derivative.

relu and relu6 keep their output, which the next convolution keeps anyway; silu and gelu keep their
input, where automatic derivatives would keep two or three maps.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

Activation = Callable[[Array], Array]


@jax.custom_vjp
def relu(x: Array) -> Array:
    """max(x, 0); its derivative at 0 is 0."""
    return nn.relu(x)


@jax.custom_vjp
def relu6(x: Array) -> Array:
    """x cut to 0 .. 6; its derivative at 0 and at 6 is 0, as PyTorch and TensorFlow have it."""
    return jnp.clip(x, 0, 6)


@jax.custom_vjp
def silu(x: Array) -> Array:
    """x s(x) with s(x) = 1 / (1 + exp(-x)) (Elfwing et al., arXiv:1702.03118)."""
    return nn.silu(x)


def _silu_backward(x: Array, dy: Array) -> tuple[Array]:
    """dx = dy s (1 + x (1 - s))."""
    values = x.astype(jnp.float32)
    s = nn.sigmoid(values)
    return ((dy.astype(jnp.float32) * s * (1 + values * (1 - s))).astype(x.dtype),)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x (1 + erf(x / sqrt 2)) / 2, in float32 inside (Hendrycks and Gimpel, arXiv:1606.08415).

    As PyTorch writes it. Flax's own takes erfc, which a CPU is twice as long about.
    """
    values = x.astype(jnp.float32)
    return (0.5 * values * (1 + lax.erf(values * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    """dx = dy ((1 + erf(x / sqrt 2)) / 2 + x exp(-x x / 2) / sqrt(2 pi))."""
    values = x.astype(jnp.float32)
    area = 0.5 * (1 + lax.erf(values * math.sqrt(0.5)))
    slope = area + values * jnp.exp(-0.5 * values * values) / math.sqrt(2 * math.pi)
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


def _keep_output(f: Activation) -> Callable[[Array], tuple[Array, Array]]:
    return lambda x: (f(x),) * 2


def _where(inside: Callable[[Array], Array]) -> Callable[[Array, Array], tuple[Array]]:
    return lambda y, dy: (jnp.where(inside(y), dy, jnp.zeros_like(dy)),)


relu.defvjp(_keep_output(relu), _where(lambda y: y > 0))
relu6.defvjp(_keep_output(relu6), _where(lambda y: (y > 0) & (y < 6)))
silu.defvjp(lambda x: (silu(x), x), _silu_backward)
gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
