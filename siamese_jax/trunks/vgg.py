"""VGG16 and VGG19 (Simonyan and Zisserman 2015, arXiv:1409.1556), with and without BatchNorm.

Keras and PyTorch agree on this one; only the order of the colours in their weights differs. A
stage's output is taken after its max pooling.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from siamese_jax.trunks.activations import relu
from siamese_jax.trunks.layers import Conv, Norm, max_pool, run_stages

STAGES = tuple(f"stage{i}" for i in range(1, 6))
WIDTHS = (64, 128, 256, 512, 512)
_NORM = Norm(1e-5, 0.9)


class Stage(nn.Module):
    """`depth` 3x3 convolutions and a 2x2 max pooling."""

    depth: int
    features: int
    conv: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for i in range(self.depth):
            x = Conv(self.features, 3, act=relu, name=f"conv{i + 1}", **self.conv)(x, train)
        return max_pool(x, 2, 2, 0)


class VGG(nn.Module):
    """x [n,h,w,3], normalised -> {"stage1": [n,h/2,w/2,64], ..., "stage5": [n,h/32,w/32,512]}."""

    depths: tuple[int, ...]
    normalised: bool = False
    form: str = "torch"
    dtype: Any = jnp.float32
    folded: bool = False

    @property
    def norm_epsilon(self) -> float:
        """What batch normalisation adds to the variance."""
        return _NORM.epsilon

    @nn.compact
    def __call__(
        self, x: Array, train_stages: tuple[str, ...] = (), after: str = ""
    ) -> dict[str, Array]:
        norm = _NORM if self.normalised and not self.folded else None
        conv = {"bias": True, "norm": norm, "frozen": self.folded, "dtype": self.dtype}

        def layers(name: str) -> nn.Module:
            i = STAGES.index(name)
            return Stage(self.depths[i], WIDTHS[i], conv, name=name)

        return run_stages(self, x, layers, STAGES[:3], STAGES[3:], train_stages, after=after)
