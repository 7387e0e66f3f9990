"""The command line in this process, and faults that come at a point rather than at a time."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest
import tiny
from absl import flags

from siamese_jax.__main__ import main

ENCODER = ("--encoder=resnet18", "--weights=random", "--image-size=32", "--batch-size=8")


def call(*argv: object) -> int:
    """`siamese-jax ARGV`; its exit code."""
    for name in [n for n in flags.FLAGS if n.startswith("config.")]:
        delattr(flags.FLAGS, name)  # of the call before
    words = [str(word) for word in argv]
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),  # as a process of its own has them
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setattr(sys, "argv", ["siamese-jax", *words])  # where a config's flags are read from
        return main(words)


def train(root: object, workdir: object, *more: str) -> int:
    config = f"--config={tiny.ROOT}/configs/resnet_triplet.py"
    data = f"--config.data.root={root}"
    return call("train", config, *tiny.TINY, data, f"--workdir={workdir}", *more)


@contextmanager
def at_call(owner: Any, name: str, number: int, fault: Callable[[], Any]) -> Iterator[list[int]]:
    """`fault` in the call of that number, from 1 on, before what the function does itself."""
    real, calls = getattr(owner, name), list[int]()

    def faulty(*args: Any, **options: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] == number:
            fault()
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, faulty)
        yield calls


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def last_line(text: str) -> str:
    """What was said last; a traceback is never said."""
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]
