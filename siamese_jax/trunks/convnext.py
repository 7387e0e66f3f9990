"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545) and ConvNeXt V2 (Woo et al. 2023, arXiv:2301.00808).

V2 has global response normalisation in its blocks in place of V1's gain of each channel.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from siamese_jax.trunks.activations import gelu
from siamese_jax.trunks.layers import Conv, LayerNorm, Patches, run_stages
from siamese_jax.trunks.stochastic_depth import dropped, of_block

STAGES = ("stem", "stage1", "stage2", "stage3", "stage4", "top")
_norm = partial(LayerNorm, 1e-6)


class ResponseNorm(nn.Module):
    """y = x + scale * x * g / mean(g) + bias, g_c = sqrt(sum over places of x_c^2). x [n,h,w,c]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        values = x.astype(jnp.float32)
        size = jnp.sqrt(jnp.sum(values * values, (1, 2), keepdims=True) + 1e-30)
        share = size / (jnp.mean(size, -1, keepdims=True) + 1e-6)
        y = values + scale[None, None, None] * (values * share) + bias[None, None, None]
        return y.astype(x.dtype)


class Block(nn.Module):
    """x + gain * narrow(gelu(widen(norm(7 x 7 depthwise of x)))). x [n,h,w,c]."""

    v2: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, drop: Array | None = None) -> Array:
        width, conv = x.shape[-1], partial(Conv, bias=True, dtype=self.dtype)
        y = conv(width, 7, depthwise=True, name="depthwise")(x)
        y = conv(4 * width, name="fc1")(_norm(name="norm1")(y))
        y = gelu(y)
        if self.v2:
            return x + dropped(conv(width, name="fc2")(ResponseNorm(name="response")(y)), drop)
        y = conv(width, name="fc2")(y)
        gain = self.param("gain", nn.initializers.ones, (width,), jnp.float32)
        return x + dropped(y * gain.astype(self.dtype)[None, None, None], drop)


class Stage(nn.Module):
    """A norm and a layer on squares of 2 x 2, but for the first; then the blocks."""

    depth: int
    features: int
    first: bool
    v2: bool
    dtype: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, drops: Array | None = None) -> Array:
        if not self.first:
            x = _norm(name="norm1")(x)
            x = Patches(self.features, 2, dtype=self.dtype, name="patches")(x)
        kind = nn.remat(Block) if self.remat else Block
        block = nn.jit(kind)  # the first one's trace serves them all
        for i in range(self.depth):
            x = block(self.v2, self.dtype, name=f"block{i + 1}")(x, of_block(drops, i))
        return x


class Stem(nn.Module):
    """A layer on squares of 4 x 4 pixels, and a norm."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _norm(name="norm1")(Patches(self.features, 4, dtype=self.dtype, name="patches")(x))


class Top(nn.Module):
    """The norm of the mean over places: [n,h,w,c] -> [n,1,1,c]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        mean = jnp.mean(x.astype(jnp.float32), (1, 2), keepdims=True)
        return _norm(name="norm1")(mean).astype(x.dtype)


class ConvNeXt(nn.Module):
    """x [n,h,w,3], normalised -> {"stem": [n,h/4,w/4,c], ..., "stage4": [n,h/32,w/32,c], "top"}.

    "top" is what classifiers see: one place, the norm of the mean. Nothing here depends on the
    batch, so `train_stages` change nothing.
    """

    depths: tuple[int, ...]
    features: tuple[int, ...]
    v2: bool = False
    form: str = "torch"
    dtype: Any = jnp.float32
    # Nothing is folded into another layer here: the name says that the trunk is frozen.
    folded: bool = dataclasses.field(default=False, repr=False)
    remat: bool = dataclasses.field(default=False, repr=False)  # the same numbers: no other trunk

    @nn.compact
    def __call__(
        self,
        x: Array,
        train_stages: tuple[str, ...] = (),
        *,
        after: str = "",
        drops: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        def layers(name: str) -> Callable[..., Array]:
            layer = _stage(self, name)
            return lambda x, train, *drops: layer(x, *drops)

        return run_stages(
            self, x, layers, STAGES[:3], STAGES[3:], train_stages, after=after, drops=drops
        )


# No method: within a scan over images, Flax would take it to be of the trunk outside.
def _stage(trunk: ConvNeXt, name: str) -> nn.Module:
    if name == "stem":
        return Stem(trunk.features[0], trunk.dtype, name=name)
    if name == "top":
        return Top(name=name)
    i = STAGES.index(name) - 1
    shape = (trunk.depths[i], trunk.features[i], i == 0, trunk.v2)
    return Stage(*shape, trunk.dtype, trunk.remat, name=name)


def widths(features: tuple[int, ...]) -> dict[str, int]:
    """Channels of each stage."""
    return dict(zip(STAGES, [features[0], *features, features[-1]], strict=True))
