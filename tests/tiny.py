"""Small generated image folders, and the command lines that train on them in seconds."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import quick
import warm
from PIL import Image

ROOT = Path(__file__).parents[1]
SMALL = "tests/small_trunk.py"
TINY = (
    "--config.data.source=folder",
    "--config.trunk.name=resnet18",
    "--config.trunk.weights=random",
    "--config.trunk.image_size=32",
    "--config.head.layers=(16,)",
    "--config.sampler.batch_size=8",
    "--config.eval.batch_size=8",
    "--config.cache.views=1",
    "--config.train.steps=12",
    "--config.train.log_every=1",
    "--config.train.eval_every=6",
    "--config.train.checkpoint_every=4",
    "--config.train.rehearse=False",
    "--config.train.patience=0",
    "--config.trunk.stage=stage4",
)


def make_folder(
    root: Path, classes: int = 6, images: int = 4, size: int = 32, noise: float = 20
) -> Path:
    """Class folders of noisy images, each class with a colour gradient of its own."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        folder = root / f"class{c}"
        folder.mkdir(parents=True)
        base = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
        pattern = np.asarray(Image.fromarray(base).resize((size, size), Image.Resampling.BILINEAR))
        for i in range(images):
            noisy = pattern + rng.normal(0, noise, pattern.shape)
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def command(*arguments: str, config: str = "resnet_triplet") -> list[str]:
    return [sys.executable, "main.py", f"--config=configs/{config}.py", *arguments]


def environment(cache: Path) -> dict[str, str]:
    """Of a process with this cache."""
    more = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.FLAGS}
    return os.environ | {"SIAMESE_JAX_CACHE": str(cache)} | more


def run(
    cache: Path, *arguments: str, config: str = "resnet_triplet", script: str = "main.py"
) -> subprocess.CompletedProcess[str]:
    """A whole `main.py`, as a user runs it; by SMALL on a small trunk in ResNet-18's place."""
    return subprocess.run(
        [warm.python(), script, *command(*arguments, config=config)[2:]],
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=300,
    )


def append_some(folder: Path, start: int) -> None:
    """What a process does that writes into a store beside another one."""
    from siamese_jax.storage.vectors import VectorStore

    for i in range(start, start + 20):
        key = i.to_bytes(16, "little")
        VectorStore(folder, (1,)).append([key], np.full((1, 1), i, np.float32))


def hold_run(folder: Path, ready: Any, wait: Any) -> None:
    """What a process does that trains in a folder: it is the only one there."""
    from siamese_jax.storage import run_folder

    with run_folder.claimed(folder):
        ready.set()
        wait.wait(60)
