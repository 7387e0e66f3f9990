"""A stand-in for ResNet-18, of one narrow convolution a stage: for tests of what is around a trunk.

It has ResNet-18's name, stages and batch normalisation, folds and trains as it does, and compiles,
is saved and is hashed in a tenth of the time. Run as a file it is `main.py` on that trunk, or the
tool that it is given. Where a trunk's own parts matter, there is ResNet-18 of fewer blocks.
"""

import dataclasses
import functools
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest

from siamese_jax.trunks.layers import Conv, Norm, run_stages
from siamese_jax.trunks.resnet import ResNet
from siamese_jax.trunks.table import TRUNKS, Trunk
from siamese_jax.weights import namings

NAME, STAGES, WIDTH = "resnet18", ("stem", "stage1", "stage2", "stage3", "stage4"), 32
# Of this trunk: a kernel of 3 x 3 a stage, and a scale and a shift for each channel.
PARAMETERS = 9 * (3 + 4 * WIDTH) * WIDTH + 5 * 2 * WIDTH


class Small(nn.Module):
    """x [n,h,w,3] -> {"stem": [n,h/2,w/2,32], ..., "stage4": [n,h/32,w/32,32]}."""

    form: str = "torch"
    dtype: Any = jnp.float32
    folded: bool = False
    norm_epsilon = 1e-5

    @nn.compact
    def __call__(self, x, train_stages=(), after=""):
        def layers(name):
            norm = None if self.folded else Norm(self.norm_epsilon, 0.9)
            options = {"bias": self.folded, "norm": norm, "frozen": self.folded}
            return Conv(WIDTH, 3, 2, act=nn.relu, dtype=self.dtype, name=name, **options)

        return run_stages(self, x, layers, STAGES[:1], STAGES[1:], train_stages, after=after)


NARROW = Trunk(Small, dict.fromkeys(STAGES, WIDTH), ("torch",), 32, "")
# ResNet-18's widths, blocks and fast kernels, but one block a stage.
SHORT = dataclasses.replace(
    TRUNKS[NAME],
    build=functools.partial(ResNet, (1, 1, 1, 1), False),
    blocks=dict.fromkeys(STAGES[1:], 1),
)


def forget() -> None:
    """What is known of a trunk by its name: another stands there now."""
    for known in vars(namings).values():
        if hasattr(known, "cache_clear"):
            known.cache_clear()


@contextmanager
def installed(row: Trunk = NARROW) -> Iterator[None]:
    """It stands where ResNet-18 did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, NAME, row)
        forget()
        yield
    forget()


if __name__ == "__main__":
    with installed():
        if sys.argv[1].startswith("--"):
            sys.argv[0] = "main.py"
            runpy.run_path(str(Path(__file__).parents[1] / "main.py"), run_name="__main__")
        runpy.run_module("siamese_jax", run_name="__main__", alter_sys=True)
