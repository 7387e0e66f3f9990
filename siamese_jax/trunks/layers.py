"""The one layer all trunks are made of: convolution, batch normalisation, activation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from siamese_jax.trunks import winograd
from siamese_jax.trunks.activations import Activation
from siamese_jax.trunks.convolution import (
    convolve,
    fewer_products,
    images_at_once,
    pads,
    product,
)
from siamese_jax.trunks.depthwise import Taps, back_to_pixels, shifted


class Norm(NamedTuple):
    """Batch normalisation's constants: y = scale * (x - mean) / sqrt(var + epsilon) + bias.

    A training step moves the statistics: mean <- momentum * mean + (1 - momentum) * batch mean.
    """

    epsilon: float
    momentum: float


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, in float32 whatever the input's dtype."""

    norm: Norm

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            values = lax.stop_gradient(x).astype(jnp.float32)
            m, v = jnp.mean(values, axes), jnp.var(values, axes)
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                keep = self.norm.momentum
                mean.value = keep * mean.value + (1 - keep) * m
                var.value = keep * var.value + (1 - keep) * v
            return _standardise(x, scale, bias, m, lax.rsqrt(v + self.norm.epsilon))
        gain = scale * lax.rsqrt(var.value + self.norm.epsilon)
        return _affine(x, gain, bias - mean.value * gain)


def _affine(x: Array, gain: Array, shift: Array) -> Array:
    """gain x + shift, with a number for each channel, in float32 inside."""
    lift = (1,) * (x.ndim - 1) + gain.shape
    return (x.astype(jnp.float32) * gain.reshape(lift) + shift.reshape(lift)).astype(x.dtype)


@jax.custom_vjp
def _standardise(x: Array, scale: Array, bias: Array, mean: Array, rate: Array) -> Array:
    """y = scale (x - mean) rate + bias, where mean and rate = 1 / std are those of x itself.

    Its derivative counts that x moves them, so it gives them none: with N values to a channel,

        dbias = sum dy    dscale = rate (sum dy x - mean dbias)
        dx = scale rate (dy - dbias / N - (x - mean) rate dscale / N)

    which reads dy and x twice; XLA's own derivatives of mean and variance take more passes.
    """
    gain = scale * rate
    return _affine(x, gain, bias - mean * gain)


def _standardise_forward(*arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    x, scale, _, mean, rate = arguments
    return _standardise(*arguments), (x, scale, mean, rate)


def _standardise_backward(kept: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    x, scale, mean, rate = kept
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    if jax.default_backend() == "cpu":  # whose three passes would each work dy out
        dy = lax.optimization_barrier(dy)
    values, dvalues = x.astype(jnp.float32), dy.astype(jnp.float32)
    dbias = jnp.sum(dvalues, axes)
    dscale = rate * (jnp.sum(dvalues * values, axes) - mean * dbias)
    gain = scale * rate
    slope = -gain * rate * dscale / count
    lift = (1,) * (x.ndim - 1) + gain.shape
    shift = (-gain * dbias / count - slope * mean).reshape(lift)
    dx = gain.reshape(lift) * dvalues + slope.reshape(lift) * values + shift
    return dx.astype(x.dtype), dscale, dbias, jnp.zeros_like(mean), jnp.zeros_like(rate)


_standardise.defvjp(_standardise_forward, _standardise_backward)


class LayerNorm(nn.Module):
    """y = scale (x - mean) / sqrt(var + epsilon) + bias over the last axis, in float32 inside."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        values = x.astype(jnp.float32)
        values = values - jnp.mean(values, -1, keepdims=True)
        gain = lax.rsqrt(jnp.mean(values * values, -1, keepdims=True) + self.epsilon)
        lift = (1,) * (x.ndim - 1) + shape
        return (values * gain * scale.reshape(lift) + bias.reshape(lift)).astype(x.dtype)


class Conv(nn.Module):
    """act(norm(kernel * x + bias)), each of bias, norm and act optional.

    Parameters: kernel [k, k, c, features] (depthwise: [k, k, 1, c]), bias [features], norm/scale,
    norm/bias; statistics: norm/mean, norm/var. x [n,h,w,c] -> [n,h',w',features] in `dtype`.

    `frozen` allows a form that trades 1e-5 of accuracy for speed; its transformed kernels can be
    worked out once, with `mutable=["tiles"]`, and passed in that collection.
    """

    features: int
    size: int = 1
    stride: int = 1
    same: bool = False
    depthwise: bool = False
    bias: bool = False
    norm: Norm | None = None
    act: Activation | None = None
    frozen: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        shape = (self.size, self.size, 1 if self.depthwise else x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        padding = pads(x.shape[1:3], self.size, self.stride, self.same)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.frozen and fewer_products(x, kernel, self.stride, self.depthwise):
            y = winograd.convolve(x, self._tiles(kernel))
        else:
            y = convolve(x, kernel, self.stride, padding, self.depthwise)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)[None, None, None]
        if self.norm is not None:
            y = BatchNorm(self.norm, name="norm")(y, train)
        return self.act(y) if self.act is not None else y

    def _tiles(self, kernel: Array) -> Array:
        known = self.has_variable("tiles", "kernel") or self.is_mutable_collection("tiles")
        if not known or self.is_initializing():
            return winograd.transform(kernel)
        return self.variable("tiles", "kernel", winograd.transform, kernel).value


class Dense(nn.Module):
    """y = x kernel + bias, as `nn.Dense`, with derivatives that are fast on a CPU."""

    features: int
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Patches(nn.Module):
    """One layer on squares side by side: [n,h,w,c] -> [n,h/side,w/side,features].

    Parameters: kernel [side, side, c, features], bias. What is left over at the bottom and on the
    right is not seen, as by a convolution without padding.
    """

    features: int
    side: int
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, c = x.shape
        rows, columns, side = height // self.side, width // self.side, self.side
        shape = (side, side, c, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        x = x[:, : rows * side, : columns * side].reshape(n, rows, side, columns, side, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows, columns, side * side * c)
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + bias.astype(self.dtype)[None, None, None]


def recomputed(block: type[nn.Module], remat: bool) -> Any:
    """The module; with `remat`, one whose backward pass computes its insides again.

    Chen et al. 2016, arXiv:1604.06174: of each block only what goes into it is kept.
    """
    return nn.remat(block, static_argnums=(2,)) if remat else block


def run_stages(
    trunk: nn.Module,
    x: Array,
    layers: Callable[[str], Callable[..., Array]],
    early: Sequence[str],
    late: Sequence[str],
    train_stages: Sequence[str],
    *,
    after: str = "",
    drops: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Every stage's output by its name; `layers(name)` makes the module that is stage `name`.

    A stage that `drops` names takes its factors too (see `siamese_jax.trunks.stochastic_depth`).
    In a folded trunk the `early` stages may take a few of the images at a time. Where `after` names
    a stage, x is what that gave, and only the stages behind it run.
    """

    def run(names: Sequence[str], x: Array) -> dict[str, Array]:
        outputs = {}
        for name in names:
            more = (drops[name],) if drops and name in drops else ()
            outputs[name] = x = layers(name)(x, name in train_stages, *more)
        return outputs

    def run_in_parts(x: Array, images: int) -> dict[str, Array]:
        step = nn.scan(
            lambda trunk, carry, part: (carry, run(early, part)),
            variable_broadcast=("params", "tiles"),
            split_rngs={},
        )
        parts = x.reshape(-1, images, *x.shape[1:])
        outputs = step(trunk, (), parts)[1]
        return jax.tree.map(lambda y: y.reshape(len(x), *y.shape[2:]), outputs)

    if after:
        names = [*early, *late]
        return {after: x} | run(names[names.index(after) + 1 :], x)
    # Variables are only read where a frozen trunk runs; a scan could not write them.
    frozen = trunk.folded and not trunk.is_mutable_collection("tiles")
    images = images_at_once(x.shape) if frozen else len(x)
    outputs = run(early, x) if images == len(x) else run_in_parts(x, images)
    return outputs | run(late, outputs[early[-1]])


def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """The largest value of each size x size window: [n,h,w,c] -> [n,h',w',c].

    Its derivative goes to the first of equal values.
    """
    return (_max_pool if jax.default_backend() == "cpu" else _plain_max_pool)(
        x, size, stride, padding
    )


def _plain_max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    return nn.max_pool(x, (size, size), (stride, stride), ((padding, padding),) * 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """A CPU has no selection and scattering of its own: XLA's carries four maps of indices."""
    return _plain_max_pool(x, size, stride, padding)


def _max_pool_forward(x: Array, *window: int) -> tuple[Array, tuple[Array, Array]]:
    y = _plain_max_pool(x, *window)
    return y, (x, y)


def _max_pool_backward(
    size: int, stride: int, padding: int, kept: tuple[Array, Array], dy: Array
) -> tuple[Array]:
    x, y = kept
    taps = Taps(size, stride, ((padding, padding),) * 2)
    winner = jnp.zeros(y.shape, jnp.int32)
    views = list(enumerate(shifted(x, *taps, empty=-jnp.inf)))
    for t, view in reversed(views):
        winner = jnp.where(view == y, t, winner)

    def term(a: int, b: int, dy: Array, winner: Array) -> Array:
        return jnp.where(winner == a * size + b, dy, jnp.zeros_like(dy))

    return (back_to_pixels(term, (dy, winner), taps, x.shape),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
