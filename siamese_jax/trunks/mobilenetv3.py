"""MobileNetV3 large and small (Howard et al. 2019, arXiv:1905.02244).

torch: symmetric padding, epsilon 1e-5, as timm trains them.
torchvision: the same with epsilon 1e-3.
keras: TensorFlow's SAME padding (the odd pixel after), epsilon 1e-3.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from siamese_jax.trunks.activations import relu
from siamese_jax.trunks.efficientnet import Block, Single, Squeeze, round_width
from siamese_jax.trunks.layers import Conv, Norm, recomputed, run_stages
from siamese_jax.trunks.stochastic_depth import of_block

NORMS = {"torch": Norm(1e-5, 0.9), "torchvision": Norm(1e-3, 0.99), "keras": Norm(1e-3, 0.999)}
_STEM = 16


class StagePlan(NamedTuple):
    """A stage's kernel size, stride, channels out, whether it has squeeze-and-excite and hard-swish
    (or relu), and how many times its input's channels each of its blocks is wide."""

    size: int
    stride: int
    features: int
    squeeze: bool
    hard: bool
    ratios: tuple[float, ...]


# Tables 1 and 2 of the paper; last, the widths of the two layers after the stages.
_LARGE = (
    StagePlan(3, 1, 16, False, False, (1,)),
    StagePlan(3, 2, 24, False, False, (4, 3)),
    StagePlan(5, 2, 40, True, False, (3, 3, 3)),
    StagePlan(3, 2, 80, False, True, (6, 2.5, 2.3, 2.3)),
    StagePlan(3, 1, 112, True, True, (6, 6)),
    StagePlan(5, 2, 160, True, True, (6, 6, 6)),
)
_SMALL = (
    StagePlan(3, 2, 16, True, False, (1,)),
    StagePlan(3, 2, 24, False, False, (4.5, 3.67)),
    StagePlan(5, 2, 40, True, True, (4, 6, 6)),
    StagePlan(5, 1, 48, True, True, (3, 3)),
    StagePlan(5, 2, 96, True, True, (6, 6, 6)),
)
SIZES = {"large": (_LARGE, 960, 1280), "small": (_SMALL, 576, 1024)}


class Stage(nn.Module):
    """The blocks of one stage, of which the first has its stride."""

    plan: StagePlan
    conv: dict[str, Any]
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool, drops: Array | None = None) -> Array:
        act = nn.hard_swish if self.plan.hard else relu
        for i, ratio in enumerate(self.plan.ratios):
            wide = round_width(ratio * x.shape[-1]) if ratio > 1 else x.shape[-1]
            narrow = Squeeze(round_width(wide / 4), relu, nn.hard_sigmoid)
            shape = (self.plan.size, 1 if i else self.plan.stride, wide, self.plan.features)
            squeeze = narrow if self.plan.squeeze else None
            block = recomputed(Block, self.remat)(
                *shape, squeeze, act, self.conv, name=f"block{i + 1}"
            )
            x = block(x, train, of_block(drops, i))
        return x


class Top(nn.Module):
    """hard-swish of a layer on the mean over places: [n,h,w,c] -> [n,1,1,features]."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        mean = jnp.mean(x.astype(jnp.float32), (1, 2), keepdims=True)
        layer = Conv(self.features, bias=True, act=nn.hard_swish, dtype=self.dtype, name="conv")
        return layer(mean)


class MobileNetV3(nn.Module):
    """x [n,h,w,3], normalised -> {"stem": [n,h/2,w/2,c], "stage1": ..., "top": [n,1,1,c]}.

    The last stage with a map is one convolution, [n,h/32,w/32,c]; "top" is what classifiers see.
    """

    size: str
    width: float
    form: str = "torch"
    dtype: Any = jnp.float32
    folded: bool = False
    remat: bool = dataclasses.field(default=False, repr=False)  # the same numbers: no other trunk

    @property
    def norm_epsilon(self) -> float:
        """What batch normalisation adds to the variance; it goes with the form."""
        return NORMS[self.form].epsilon

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
            "norm": None if self.folded else NORMS[self.form],
            "same": self.form == "keras",
            "frozen": self.folded,
            "dtype": self.dtype,
        }
        stages, channels = plan(self.size, self.width), widths(self.size, self.width)
        stem, *names, last, top = channels

        def layers(name: str) -> nn.Module:
            if name == top:
                return Top(channels[top], self.dtype, name=name)
            if name in (stem, last):
                shape = (3, 2) if name == stem else (1, 1)
                return Single(channels[name], *shape, nn.hard_swish, conv, name=name)
            return Stage(stages[names.index(name)], conv, self.remat, name=name)

        early, late = [stem, *names[:3]], [*names[3:], last, top]
        return run_stages(self, x, layers, early, late, train_stages, after=after, drops=drops)


def plan(size: str, width: float) -> tuple[StagePlan, ...]:
    """The stages of "large" or "small" at `width` times the channels."""
    stages = SIZES[size][0]
    return tuple(s._replace(features=round_width(width * s.features)) for s in stages)


def widths(size: str, width: float) -> dict[str, int]:
    """Channels of each stage; neither the stem's nor the top's are scaled."""
    _, last, top = SIZES[size]
    features = [stage.features for stage in plan(size, width)]
    numbers = [*features, round_width(width * last)]
    stages = {f"stage{i + 1}": c for i, c in enumerate(numbers)}
    return {"stem": _STEM, **stages, "top": top}
