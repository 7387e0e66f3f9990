"""A step with the output of the frozen stages kept, and one that runs them: images/s and losses.

    python benchmarks/boundary_cache.py --record

The same trunk, head, pictures, batches, loss and optimiser; only `cache.enabled` differs. Both read
from disk: one pictures (JPEG, 480 x 360, not augmented, so that the losses can be compared), the
other maps. The two take turns, a few steps each, and the median counts. `step` is the compiled step
alone, on a batch that is in memory. `waiting` is the share of the loop in which a step has ended
and the next batch is not there yet. Memory comes in huge pages, as in training.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import records
from PIL import Image

from configs import common
from siamese_jax import weights
from siamese_jax.data.records import content_keys
from siamese_jax.data.sources import load_records
from siamese_jax.encoder.model import model_of_config
from siamese_jax.train import huge_pages
from siamese_jax.train.from_config import make_inputs, make_sampler
from siamese_jax.train.frozen import at_boundary
from siamese_jax.train.loop import Run
from siamese_jax.train.start import fresh_head, start

COLUMNS = (
    *("cache", "images/s, whole loop", "images/s, step", "waiting, %", "first loss", "last loss"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunk", default="efficientnet_lite0")
    parser.add_argument("--freeze", default="stem,stage[1-5]/")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    records.add_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder) / "pictures", args.images)
        began = time.perf_counter()
        runs = {kept: Loop(args, Path(folder), kept) for kept in (True, False)}
        prepared = time.perf_counter() - began
        print(f"one pass over the images, and compilation: {prepared:.1f} s")
        for _ in range(args.turns):
            for loop in runs.values():
                loop.turn(args.steps)
    rows = [loop.row(kept) for kept, loop in runs.items()]
    for row in (COLUMNS, *rows):
        print("".join(f"{value!s:>22}" for value in row))
    print(f"ratio: whole loop {rows[0][1] / rows[1][1]:.2f}, step {rows[0][2] / rows[1][2]:.2f}")
    if args.record:
        records.save(
            "boundary_cache", COLUMNS, rows, [f"one pass and compilation: {prepared:.1f} s"]
        )


def make_pictures(folder: Path, count: int) -> None:
    """Class folders of four pictures each: a class's coarse colours, and noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        if i % 4 == 0:
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            colours = np.asarray(coarse.resize((480, 360), Image.Resampling.BICUBIC))
        noisy = np.clip(colours + rng.normal(0, 30, colours.shape), 0, 255).astype(np.uint8)
        path = folder / f"class{i // 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


class Loop:
    """A run's steps, taken a few at a time."""

    def __init__(self, args: argparse.Namespace, folder: Path, kept: bool):
        config = common.base()
        config.data.update(source="folder", root=str(folder / "pictures"), test_fraction=0.0)
        config.data.cache_dir = str(folder / "cache")
        config.trunk.update(name=args.trunk, weights="random", image_size=args.size)
        config.trunk.freeze = tuple(args.freeze.split(","))
        config.head.layers = (512,)
        config.augment.update(dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0))
        config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), greyscale=0.0)
        config.sampler.update(batch_size=args.batch, per_class=4)
        config.loss = {"name": "nt_xent", "temperature": 0.1}
        config.optim.learning_rate = 1e-5
        config.cache.enabled = kept
        images = load_records("folder", config.data.root, fractions=(1.0, 0.0, 0.0))
        trunk = weights.load(args.trunk, "random")
        model = model_of_config(config.to_dict(), trunk)
        model = at_boundary(config, model, trunk, images)
        inputs = make_inputs(config, model, trunk, images, content_keys(images))
        run = Run(config, folder, inputs, {"choices": {}})
        self.state, step, _ = start(run, model, trunk, fresh_head(run, model, trunk), None, None)
        self.step: Any = step
        self.batches: Iterator[Any] = inputs.batches(make_sampler(config, inputs.records), 0)
        self.losses: list[float] = []
        self.loop_rates: list[float] = []
        self.step_rates: list[float] = []
        self.waits: list[float] = []
        self.waited = 0.0
        self.take(self.batches)  # compiles

    def take(self, batches: Iterator[Any], count: int = 1) -> Any:
        """So many steps; the last batch."""
        for _ in range(count):
            jax.block_until_ready(self.state)
            began = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - began
            given = {name: value for name, value in batch.items() if name != "id"}
            self.state, metrics = self.step(self.state, given)
            self.losses.append(metrics["loss"])
        jax.block_until_ready(self.state)
        return batch

    def turn(self, steps: int) -> None:
        """Steps with their reading, then as many on one batch that is there; these move nothing."""
        began, self.waited = time.perf_counter(), 0.0
        batch = self.take(self.batches, steps)
        took = time.perf_counter() - began
        self.loop_rates.append(steps * len(batch["mask"]) / took)
        self.waits.append(100 * self.waited / took)
        state, losses = jax.tree.map(lambda x: x.copy(), self.state), list(self.losses)
        began = time.perf_counter()
        self.take(itertools.repeat(batch), steps)
        self.step_rates.append(steps * len(batch["mask"]) / (time.perf_counter() - began))
        self.state, self.losses = state, losses

    def row(self, kept: bool) -> list[Any]:
        """What COLUMNS says."""
        told = (self.loop_rates, self.step_rates, self.waits)
        rates = [round(statistics.median(r), 1) for r in told]
        return [kept, *rates, *(round(float(self.losses[i]), 7) for i in (0, -1))]


if __name__ == "__main__":
    huge_pages.begin_again()
    main()
