"""ResNet 18 to 152 (He et al. 2016, arXiv:1512.03385) as Keras and as PyTorch build it.

keras: the stride sits in a bottleneck's first 1x1, every convolution has a bias, epsilon 1.001e-5.
torch: the stride sits in the 3x3 ("v1.5"), no biases, epsilon 1e-5.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from siamese_jax.trunks.activations import relu
from siamese_jax.trunks.layers import Conv, Norm, max_pool, recomputed, run_stages
from siamese_jax.trunks.stochastic_depth import dropped, of_block

STAGES = ("stem", "stage1", "stage2", "stage3", "stage4")
_NORMS = {"keras": Norm(1.001e-5, 0.99), "torch": Norm(1e-5, 0.9)}


class Block(nn.Module):
    """x -> relu(shortcut(x) + convolutions(x)); 1x1, 3x3, 1x1 where `bottleneck`, else two 3x3."""

    features: int
    stride: int
    bottleneck: bool
    project: bool
    form: str
    conv: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, train: bool, drop: Array | None = None) -> Array:
        first, second = (self.stride, 1) if self.form == "keras" else (1, self.stride)
        if self.bottleneck:
            plan = [(1, 1, first), (1, 3, second), (4, 1, 1)]
        else:
            plan = [(1, 3, self.stride), (1, 3, 1)]
        y = x
        for i, (widen, size, stride) in enumerate(plan, 1):
            act = relu if i < len(plan) else None
            layer = Conv(widen * self.features, size, stride, act=act, name=f"conv{i}", **self.conv)
            y = layer(y, train)
        if self.project:
            x = Conv(y.shape[-1], 1, self.stride, name="shortcut", **self.conv)(x, train)
        return relu(x + dropped(y, drop))


class Stem(nn.Module):
    """The first layers: a 7 x 7 convolution and a maximum over 3 x 3, stride 2 each."""

    conv: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = Conv(64, 7, 2, act=relu, name="conv", **self.conv)(x, train)
        return max_pool(x, 3, 2, 1)


class Stage(nn.Module):
    """`depth` blocks; the first changes the size and the width."""

    depth: int
    features: int
    stride: int
    bottleneck: bool
    form: str
    conv: dict[str, Any]
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool, drops: Array | None = None) -> Array:
        width = self.features * (4 if self.bottleneck else 1)
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            project = i == 0 and (stride != 1 or x.shape[-1] != width)
            name = f"block{i + 1}"
            block = recomputed(Block, self.remat)(
                self.features, stride, self.bottleneck, project, self.form, self.conv, name=name
            )
            x = block(x, train, of_block(drops, i))
        return x


class ResNet(nn.Module):
    """x [n,h,w,3], normalised -> {"stem": [n,h/4,w/4,64], ..., "stage4": [n,h/32,w/32,width]}."""

    depths: tuple[int, ...]
    bottleneck: bool
    form: str = "torch"
    dtype: Any = jnp.float32
    folded: bool = False
    remat: bool = dataclasses.field(default=False, repr=False)  # the same numbers: no other trunk

    @property
    def norm_epsilon(self) -> float:
        """What batch normalisation adds to the variance; it goes with the form."""
        return _NORMS[self.form].epsilon

    @nn.compact
    def __call__(
        self,
        x: Array,
        train_stages: tuple[str, ...] = (),
        *,
        after: str = "",
        drops: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        conv = {
            "bias": self.folded or self.form == "keras",
            "norm": None if self.folded else _NORMS[self.form],
            "frozen": self.folded,
            "dtype": self.dtype,
        }

        def layers(name: str) -> nn.Module:
            if name == "stem":
                return Stem(conv, name=name)
            i = STAGES.index(name) - 1
            depth, features, stride = self.depths[i], 64 * 2**i, 1 if i == 0 else 2
            shape = (depth, features, stride, self.bottleneck)
            return Stage(*shape, self.form, conv, self.remat, name=name)

        return run_stages(
            self, x, layers, STAGES[:3], STAGES[3:], train_stages, after=after, drops=drops
        )


def widths(bottleneck: bool) -> dict[str, int]:
    """Channels of each stage."""
    last = [64 * 2**i * (4 if bottleneck else 1) for i in range(4)]
    return dict(zip(STAGES, [64, *last], strict=True))
