"""What a frozen trunk costs: in FLOPs of the compiled step, and in seconds an epoch with the cache.

    python benchmarks/frozen_trunk.py --trunk=efficientnet_lite0 --size=128 --images=256

The peer is this package's own step that runs the trunk every time, as a trainer without a cache
does, and the step of a trunk that is trained whole. Random weights: speed does not depend on them.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import measuring
import numpy as np

from siamese_jax import weights
from siamese_jax.encoder import model as encoder_model
from siamese_jax.losses import LOSSES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunk", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    trunk = weights.load(args.trunk, "random")
    model = encoder_model.build_model(trunk, head={"layers": (512,)})
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.images, args.size, args.size, 3), dtype=np.uint8)
    labels = (np.arange(args.images) // 4).astype(np.int32)

    run_trunk = features_of(model, trunk)
    began = time.perf_counter()
    cached = encoder_model.in_blocks(run_trunk, images, args.batch)
    first = time.perf_counter() - began
    began = time.perf_counter()
    encoder_model.in_blocks(run_trunk, images, args.batch)
    one_pass = time.perf_counter() - began

    variants = {
        "cached features": ("feature", cached, ()),
        "frozen, no cache": ("image", images, ()),
        "trained whole": ("image", images, None),
    }
    runs = {name: prepare(trunk, args, *how, labels) for name, how in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.epochs):
        for name, run in runs.items():
            seconds[name].append(run["epoch"]())
    forward = flops(run_trunk.lower(images[: args.batch]))
    print(f"{args.trunk} at {args.size} px, {args.images} images, {jax.devices()[0].device_kind}")
    print(f"one pass of the trunk: {one_pass:.2f} s ({first:.2f} s with its compilation)")
    print(f"{'':20}{'s an epoch':>12}{'ratio':>8}{'FLOPs / forward':>18}")
    base = statistics.median(seconds["cached features"])
    for name, run in runs.items():
        median = statistics.median(seconds[name])
        print(f"{name:20}{median:12.3f}{median / base:8.1f}{run['flops'] / forward:18.3f}")


def features_of(model: encoder_model.Model, trunk: Any) -> Any:
    params, stats = trunk.variables["params"], trunk.variables["batch_stats"]
    return jax.jit(lambda images: encoder_model.features(model, params, stats, images)[0])


def prepare(
    trunk: Any,
    args: argparse.Namespace,
    kind: str,
    inputs: np.ndarray,
    moving: tuple[str, ...] | None,
    labels: np.ndarray,
) -> dict[str, Any]:
    """The compiled step's FLOPs, and a function that runs an epoch and says how long it took."""
    _, state, step = measuring.training(
        *(trunk, moving),
        head={"layers": (512,)},
        loss=LOSSES["triplet"](margin=0.2, mining="hard"),
        learning_rate=1e-4,
    )
    held = [state]

    def batch(start: int) -> dict[str, np.ndarray]:
        rows = slice(start, start + args.batch)
        return {
            kind: inputs[rows],
            "label": labels[rows],
            "mask": np.ones(len(labels[rows]), bool),
        }

    def epoch() -> float:
        began = time.perf_counter()
        for start in range(0, args.images - args.batch + 1, args.batch):
            held[0], metrics = step(held[0], batch(start))
        jax.block_until_ready(metrics)
        return time.perf_counter() - began

    cost = flops(step.lower(held[0], batch(0)))
    epoch()  # compiles
    return {"flops": cost, "epoch": epoch}


def flops(lowered: Any) -> float:
    analysis = lowered.compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


if __name__ == "__main__":
    main()
