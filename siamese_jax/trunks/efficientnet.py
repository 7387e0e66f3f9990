"""EfficientNet B0 to B4 (Tan and Le 2019, arXiv:1905.11946) and the Lite variants.

keras: TensorFlow's SAME padding (the odd pixel after), epsilon 1e-3.
torch: symmetric padding, epsilon 1e-5, as torchvision and timm train them.
Lite leaves out squeeze-and-excite, uses relu6, and never scales the stem, the head, or the depth of
the first and last stage.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from siamese_jax.trunks.activations import Activation, relu6, silu
from siamese_jax.trunks.layers import Conv, Norm, recomputed, run_stages
from siamese_jax.trunks.stochastic_depth import dropped, of_block

STAGES = ("stem", *(f"stage{i}" for i in range(1, 8)), "top")
_NORMS = {"keras": Norm(1e-3, 0.99), "torch": Norm(1e-5, 0.9)}


class StagePlan(NamedTuple):
    """A stage's kernel size, stride, widening, channels out and number of blocks."""

    size: int
    stride: int
    expand: int
    features: int
    depth: int


# Table 1 of the paper.
_B0 = (
    StagePlan(3, 1, 1, 16, 1),
    StagePlan(3, 2, 6, 24, 2),
    StagePlan(5, 2, 6, 40, 2),
    StagePlan(3, 2, 6, 80, 3),
    StagePlan(5, 1, 6, 112, 3),
    StagePlan(5, 2, 6, 192, 4),
    StagePlan(3, 1, 6, 320, 1),
)


def round_width(width: float) -> int:
    """The nearest multiple of 8, but never more than 10% below `width`."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest


def plan(width: float, depth: float, lite: bool) -> tuple[StagePlan, ...]:
    """The stages of B0 scaled to `width` times the channels and `depth` times the blocks."""

    def blocks(i: int, stage: StagePlan) -> int:
        fixed = lite and i in (0, len(_B0) - 1)
        return stage.depth if fixed else math.ceil(depth * stage.depth)

    return tuple(
        stage._replace(features=round_width(width * stage.features), depth=blocks(i, stage))
        for i, stage in enumerate(_B0)
    )


class Squeeze(NamedTuple):
    """Squeeze-and-excite: gate(a 1x1 layer on act(a 1x1 layer on the mean over places))."""

    features: int
    act: Activation
    gate: Activation


class Block(nn.Module):
    """The inverted residual: 1x1 widens, depthwise k x k, squeeze-and-excite, 1x1 narrows.

    An input that is as `wide` already is not widened.
    """

    size: int
    stride: int
    wide: int
    features: int
    squeeze: Squeeze | None
    act: Activation
    conv: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, train: bool, drop: Array | None = None) -> Array:
        wide, y = self.wide, x
        if wide != x.shape[-1]:
            y = Conv(wide, act=self.act, name="expand", **self.conv)(y, train)
        each = {"depthwise": True, "act": self.act, **self.conv}
        y = Conv(wide, self.size, self.stride, name="depthwise", **each)(y, train)
        if self.squeeze:
            y = y * self._excitement(y, self.squeeze)
        y = Conv(self.features, name="project", **self.conv)(y, train)
        whole = self.stride == 1 and x.shape[-1] == self.features
        return x + dropped(y, drop) if whole else y

    def _excitement(self, y: Array, squeeze: Squeeze) -> Array:
        dense = {"bias": True, "dtype": self.conv["dtype"]}
        s = jnp.mean(y, (1, 2), keepdims=True)
        s = Conv(squeeze.features, act=squeeze.act, name="se_reduce", **dense)(s)
        return Conv(y.shape[-1], act=squeeze.gate, name="se_expand", **dense)(s)


class Stage(nn.Module):
    """The blocks of one stage, of which the first has its stride."""

    stage: StagePlan
    squeeze: bool
    act: Activation
    conv: dict[str, Any]
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool, drops: Array | None = None) -> Array:
        size, stride, expand, features, depth = self.stage
        for i in range(depth):
            narrow = x.shape[-1]
            squeeze = Squeeze(max(1, narrow // 4), self.act, nn.sigmoid) if self.squeeze else None
            shape = (size, 1 if i else stride, narrow * expand, features)
            block = recomputed(Block, self.remat)(
                *shape, squeeze, self.act, self.conv, name=f"block{i + 1}"
            )
            x = block(x, train, of_block(drops, i))
        return x


class Single(nn.Module):
    """A stage of one convolution: the stem and the top."""

    features: int
    size: int
    stride: int
    act: Activation
    conv: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layer = Conv(self.features, self.size, self.stride, act=self.act, name="conv", **self.conv)
        return layer(x, train)


class EfficientNet(nn.Module):
    """x [n,h,w,3], normalised -> {"stem": [n,h/2,w/2,c], "stage1": ..., "top": [n,h/32,w/32,c]}."""

    width: float
    depth: float
    lite: bool = False
    form: str = "keras"
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
            "bias": self.folded,
            "norm": None if self.folded else _NORMS[self.form],
            "same": self.form == "keras",
            "frozen": self.folded,
            "dtype": self.dtype,
        }
        act: Activation = relu6 if self.lite else silu
        stem, top = stem_and_top(self.width, self.lite)
        stages = plan(self.width, self.depth, self.lite)

        def layers(name: str) -> nn.Module:
            if name == "stem":
                return Single(stem, 3, 2, act, conv, name=name)
            if name == "top":
                return Single(top, 1, 1, act, conv, name=name)
            stage = stages[STAGES.index(name) - 1]
            return Stage(stage, not self.lite, act, conv, self.remat, name=name)

        return run_stages(
            self, x, layers, STAGES[:4], STAGES[4:], train_stages, after=after, drops=drops
        )


def stem_and_top(width: float, lite: bool) -> tuple[int, int]:
    """Channels of the first and the last convolution."""
    return (32, 1280) if lite else (round_width(32 * width), round_width(1280 * width))


def widths(width: float, depth: float, lite: bool) -> dict[str, int]:
    """Channels of each stage."""
    stem, top = stem_and_top(width, lite)
    stages = [stage.features for stage in plan(width, depth, lite)]
    return dict(zip(STAGES, [stem, *stages, top], strict=True))
