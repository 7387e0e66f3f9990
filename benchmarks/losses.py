"""Time and memory of the losses, loss and gradient, beside pytorch-metric-learning's.

    python benchmarks/losses.py                      # 512 embeddings of 512 numbers, 4 a class
    python benchmarks/losses.py --losses triplet --per-class 16 --rounds 5

Needs torch and pytorch-metric-learning. Each loss of each side runs in a process of its own, the
two sides in turn: the time is the median of its steps (after two to warm up, which for us compile),
the memory is the process's largest resident size, imports included, and the table shows the median
over the rounds. Both sides use all cores. The ratio is their time over ours: above 1 we are faster.
"same value" says whether the two computed the same number; losses with weights of their own start
from different ones; their margin loss counts a pair once for each of its triplets, and their
Smooth-AP counts the query among its own positives.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import records

# name: (our loss, our options, their class, their options)
PAIRS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "triplet, all": ("triplet", {}, "TripletMarginLoss", {"margin": 0.2}),
    "triplet, soft": (
        "triplet",
        {"soft": True},
        "TripletMarginLoss",
        {"margin": 0.2, "smooth_loss": True},
    ),
    "triplet, swap": (
        "triplet",
        {"swap": True},
        "TripletMarginLoss",
        {"margin": 0.2, "swap": True},
    ),
    "triplet, hard": (
        "triplet",
        {"mining": "hard"},
        "TripletMarginLoss",
        {"margin": 0.2, "miner": True},
    ),
    "contrastive": ("contrastive", {}, "ContrastiveLoss", {}),
    "nt_xent": ("nt_xent", {}, "NTXentLoss", {}),
    "sup_con": ("sup_con", {}, "SupConLoss", {}),
    "multi_similarity": ("multi_similarity", {}, "MultiSimilarityLoss", {}),
    "circle": ("circle", {}, "CircleLoss", {}),
    "margin": ("margin", {}, "MarginLoss", {}),
    "fast_ap": ("fast_ap", {}, "FastAPLoss", {}),
    "smooth_ap": ("smooth_ap", {}, "SmoothAPLoss", {}),
    "proxy_nca": ("proxy_nca", {}, "ProxyNCALoss", {"classes": True}),
    "proxy_anchor": ("proxy_anchor", {}, "ProxyAnchorLoss", {"classes": True}),
    "normalized_softmax": ("normalized_softmax", {}, "NormalizedSoftmaxLoss", {"classes": True}),
    "arcface": ("arcface", {}, "ArcFaceLoss", {"classes": True}),
    "soft_triple": ("soft_triple", {}, "SoftTripleLoss", {"classes": True}),
}


def data(n: int, dim: int, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit-variance embeddings with a common part a class, so that triplets of all kinds occur."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) // per_class
    centres = rng.normal(size=(labels[-1] + 1, dim))
    x = 0.5 * centres[labels] + rng.normal(size=(n, dim))
    return x.astype(np.float32), labels.astype(np.int32)


def gradient(name: str, x: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """Our loss and its gradient of rows on the device; the call does not wait for them."""
    import jax
    import jax.numpy as jnp

    from siamese_jax import losses

    loss = losses.LOSSES[PAIRS[name][0]](**PAIRS[name][1])
    params = loss.init(jax.random.key(0), x.shape[1], int(labels[-1]) + 1)

    @jax.jit
    def step(params, x, labels):
        def value(params, x):
            return losses.mean(loss, params, x, labels)

        return jax.value_and_grad(value, argnums=(0, 1))(params, x)

    device = jnp.asarray(x), jnp.asarray(labels)

    return lambda: step(params, *device)


def ours(name: str, x: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    import jax

    step = gradient(name, x, labels)
    return lambda: float(jax.block_until_ready(step())[0])


def theirs(name: str, x: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    import torch
    from pytorch_metric_learning import losses, miners

    options = dict(PAIRS[name][3])
    miner = miners.BatchHardMiner() if options.pop("miner", False) else None
    if options.pop("classes", False):
        options |= {"num_classes": int(labels[-1]) + 1, "embedding_size": x.shape[1]}
    loss = getattr(losses, PAIRS[name][2])(**options)
    points, marks = torch.tensor(x), torch.tensor(labels.astype(np.int64))

    def run() -> float:
        leaf = points.clone().requires_grad_(True)
        value = loss(leaf, marks, miner(leaf, marks) if miner else None)
        value.backward()
        return value.item()

    return run


def measure(side: str, name: str, shape: tuple[int, int, int], seconds: float) -> dict[str, float]:
    """Runs in a process of its own: milliseconds a step, MB at most."""
    run = (ours if side == "ours" else theirs)(name, *data(*shape))
    value = [run(), run()][-1]
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"ms": statistics.median(times) * 1e3, "MB": peak, "value": value}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--losses", nargs="*", default=list(PAIRS), metavar="NAME")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--per-class", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of steps a process")
    records.add_option(parser)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = (args.n, args.dim, args.per_class)
    if args.measure:
        side, name = args.measure
        print(json.dumps(measure(side, name, shape, args.seconds)))
        return

    names = [n for n in PAIRS if any(n.startswith(wanted) for wanted in args.losses)]
    sizes = ["--n", args.n, "--dim", args.dim, "--per-class", args.per_class]
    command = [sys.executable, __file__, *map(str, [*sizes, "--seconds", args.seconds])]
    print(f"{args.n} embeddings of {args.dim}, {args.per_class} a class, {args.rounds} rounds")
    heads = ("ours ms", "theirs ms", "ratio", "ours MB", "theirs MB", "same value")
    print(f"{'loss':20}" + "".join(f"{head:>11}" for head in heads))
    table = []
    for name in names:
        found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for _ in range(args.rounds):
            for side, results in found.items():
                done = subprocess.run(
                    [*command, "--measure", side, name], capture_output=True, text=True, check=True
                )
                results.append(json.loads(done.stdout.splitlines()[-1]))
        us, them = (
            {key: statistics.median(r[key] for r in results) for key in ("ms", "MB", "value")}
            for results in found.values()
        )
        same = abs(us["value"] - them["value"]) < 1e-3 * abs(them["value"])
        says = "weights" if "classes" in PAIRS[name][3] else "yes" if same else "no"
        print(
            f"{name:20}{us['ms']:11.2f}{them['ms']:11.2f}{them['ms'] / us['ms']:11.1f}"
            f"{us['MB']:11.0f}{them['MB']:11.0f}{says:>11}",
            flush=True,
        )
        numbers = [us["ms"], them["ms"], them["ms"] / us["ms"], us["MB"], them["MB"]]
        table.append([name, *(f"{number:,.1f}" for number in numbers), says])
    if args.record:
        note = f"{args.n} embeddings of {args.dim}, {args.per_class} a class, loss and gradient."
        records.save("losses", ["loss", *heads], table, [note])


if __name__ == "__main__":
    main()
