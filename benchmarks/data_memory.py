"""The input pipeline: memory over 200,000 listed images, and images/s against plain tf.data.

    python benchmarks/data_memory.py [--images 200000] [--part memory|speed|samplers]

The memory part lists a folder of hard links to a few hundred JPEG files and reads every one of
them in an evaluation epoch, then takes as many in augmented training batches. What grows with the
data set is the list of paths alone; reading must add nothing. The speed part reads the same
photographs as `tf.io.decode_jpeg` and `tf.image.resize(antialias=True)` do, alternating, medians.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from siamese_jax.data.pipeline import Reading, eval_batches, train_batches
from siamese_jax.data.records import Records
from siamese_jax.data.samplers import SAMPLERS, classes
from siamese_jax.data.sources import load_records
from siamese_jax.data.tf import tensorflow

AUGMENT = {
    "crop_scale": (0.5, 1.0),
    "flip": True,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
    "hue": 0.05,
    "greyscale": 0.1,
    "erase": 0.2,
}


def megabytes() -> float:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def photographs(folder: Path, number: int, width: int, height: int) -> list[str]:
    """JPEG files with the detail of photographs: noise at several scales."""
    noise = np.random.default_rng(0)
    folder.mkdir(parents=True)
    files = []
    for i in range(number):
        pixels = np.zeros((height, width, 3))
        for scale in (4, 16, 64):
            coarse = noise.integers(0, 256, (height // scale + 1, width // scale + 1, 3))
            image = Image.fromarray(coarse.astype(np.uint8)).resize((width, height))
            pixels += np.asarray(image) / 3
        files.append(str(folder / f"{i}.jpg"))
        Image.fromarray(pixels.astype(np.uint8)).save(files[-1], quality=85)
    return files


def linked(root: Path, files: list[str], number: int) -> Records:
    """A folder of class folders of ten images, all of them hard links."""
    for i in range(number):
        folder = root / f"{i // 10:06d}"
        if i % 10 == 0:
            folder.mkdir(parents=True)
        os.link(files[i % len(files)], folder / f"{i}.jpg")
    return load_records("folder", root, fractions=None)


def memory(root: Path, number: int) -> None:
    files = photographs(root / "files", 400, 96, 64)
    next(
        eval_batches(small(files), Reading(image_size=32, batch_size=64))
    )  # TensorFlow's own memory
    before = megabytes()
    records = linked(root / "set", files, number)
    print(f"| listing {number:,} images | {megabytes() - before:+.0f} MB |")
    marks = [number * share // 100 for share in (5, 25, 50, 75, 100)]
    sample = classes(records.label, 64, seed=0, per_class=4)
    for name, batches in (
        ("evaluation", eval_batches(records, Reading(image_size=32, batch_size=64))),
        (
            "training",
            train_batches(
                records, sample, Reading(image_size=32, augment=AUGMENT, seed=0), steps=number // 64
            ),
        ),
    ):
        seen, start, base, ahead = 0, time.perf_counter(), 0.0, list(marks)
        for batch in batches:
            seen += int(batch["mask"].sum())
            if ahead and seen >= ahead[0]:
                now = megabytes()
                base = base or now
                print(f"| {name}, {seen:,} read | {now:.0f} MB ({now - base:+.0f}) |", flush=True)
                ahead.pop(0)
        rate = seen / (time.perf_counter() - start)
        print(f"| {name}, images/s (96 x 64 JPEG to 32 px) | {rate:,.0f} |")


def small(files: list[str]) -> Records:
    return load_records("images", Path(files[0]).parent)


def plain_tf(files: list[str], size: int) -> tuple[float, float]:
    tf = tensorflow()

    def read(path: Any) -> Any:
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        image = tf.image.resize(image, (size, size), antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(files)
    data = data.map(read, num_parallel_calls=os.cpu_count()).batch(32).prefetch(2)
    return cost(data.as_numpy_iterator(), len(files))


def cost(batches: Iterable, number: int) -> tuple[float, float]:
    """Images/s, and milliseconds of processor time an image, all threads together."""
    start, used = time.perf_counter(), time.process_time()
    for _ in batches:
        pass
    seconds, used = time.perf_counter() - start, time.process_time() - used
    return number / seconds, 1000 * used / number


def speed(root: Path) -> None:
    print("| photographs to 224 px | way | images/s | CPU ms an image | ours / this, images/s |")
    print("|---|---|---|---|---|")
    for width, height, number in ((480, 360, 192), (1600, 1200, 64)):
        records = small(photographs(root / f"{width}", number, width, height))

        def ours(augment: dict | None = None, records: Records = records) -> tuple[float, float]:
            batches = eval_batches(records, Reading(image_size=224, batch_size=32, augment=augment))
            return cost(batches, len(records))

        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "ours": ours,
            "ours, all augmentations": partial(ours, AUGMENT),
            "plain tf.data": partial(plain_tf, list(map(str, records.path)), 224),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(6):
            for name, way in ways.items():
                value = way()
                if turn:  # the first is a warm-up
                    found[name].append(value)
        for name, values in found.items():
            rate, cpu = (statistics.median(column) for column in zip(*values, strict=True))
            ratio = statistics.median(
                a[0] / b[0] for a, b in zip(found["ours"], values, strict=True)
            )
            print(f"| {width} x {height} | {name} | {rate:,.0f} | {cpu:.1f} | {ratio:.2f} |")


def samplers(number: int) -> None:
    """Milliseconds a step of 384 images, from `number` images of classes of very unequal size."""
    noise = np.random.default_rng(0)
    labels = (noise.pareto(1.0, number) * 1000).astype(np.int64) % (number // 10)
    domain = noise.integers(0, 2, number)
    print(f"\n| sampler, {number:,} images | making it, ms | a step, ms |\n|---|---|---|")
    for name, options in (
        ("classes", {}),
        ("classes", {"class_weight": "images"}),
        ("classes", {"domain": domain}),
        ("hierarchical", {"super_labels": labels // 100}),
        ("triplets", {}),
        ("triplets", {"domain": domain}),
        ("pairs", {}),
        ("shuffled", {}),
    ):
        start = time.perf_counter()
        sample = SAMPLERS[name](labels, 384, seed=0, **options)
        made = time.perf_counter() - start
        steps = []
        for step in range(100):
            start = time.perf_counter()
            sample(step)
            steps.append(time.perf_counter() - start)
        what = " ".join([name, *(k if k != "class_weight" else "weighted" for k in options)])
        print(f"| {what} | {made * 1e3:.0f} | {statistics.median(steps) * 1e3:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--part", choices=("all", "memory", "speed", "samplers"), default="all")
    options = parser.parse_args()
    wanted = {"memory", "speed", "samplers"} if options.part == "all" else {options.part}
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in wanted:
            speed(Path(folder))
        if "samplers" in wanted:
            samplers(options.images)
        if "memory" in wanted:
            print("\n| memory | resident |\n|---|---|")
            memory(Path(folder), options.images)


if __name__ == "__main__":
    main()
