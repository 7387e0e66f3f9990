"""benchmarks/train.py compares the same step: the first loss of Keras is ours."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks import train

IMAGES = 1_000_000  # of an epoch: enough for seconds of several digits
SMALLEST = ["--trunks=resnet50", "--size=64", "--batch=8", "--repeats=1", f"--images={IMAGES}"]


def run(*options):
    """What it prints, in lines."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, train.__file__, *SMALLEST, *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check(row, moves):
    """A row against Keras: whose it is, that its numbers belong together, that losses agree."""
    cells = dict(zip(train.COLUMNS, re.split(r"\s{2,}", row), strict=True))
    assert [cells.pop(name) for name in ("trunk", "moves", "peer")] == ["resnet50", moves, "keras"]
    number = {name: float(cell) for name, cell in cells.items()}
    assert all(value > 0 for name, value in number.items() if name != "first losses differ")
    for side in ("ours", "peer"):
        speed, epoch = number[f"{side} images/s"], number[f"{side} s/epoch"]
        assert epoch == pytest.approx(IMAGES / speed, rel=0.1, abs=0.6)
    ratio = number["ours images/s"] / number["peer images/s"]
    assert number["/ peer"] == pytest.approx(ratio, rel=0.2, abs=0.006)
    assert number["first losses differ"] < 1e-5


@pytest.mark.long
def test_the_first_loss_is_that_of_keras_and_a_peer_that_is_not_there_is_left_out():
    peers = ["keras"] + ["torch"] * (find_spec("torch") is None)
    heads, *lines = run("--kinds", "whole", "--peers", *peers)
    assert heads.split("  ") == train.COLUMNS
    left = [line for line in lines if "is left out" in line]
    rows = [line for line in lines if line not in left]  # no line that the losses differ
    (row,) = rows
    check(row, "whole")
    assert left == ["resnet50 whole: torch is left out: No module named 'torch'"] * (len(peers) - 1)
