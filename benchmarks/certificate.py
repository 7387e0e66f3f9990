"""Training on several devices against one: the same loss, gradient and parameters, for every loss.

    python benchmarks/certificate.py [--devices 2 4 8] [--processes 2 4] [--losses triplet ...]

Each case takes five steps on a small encoder, in float32 (SGD) and in float64 (AdamW), of 14 images
(which neither 4 nor 8 devices divide) in 5 classes, one of them masked. The devices are those that
XLA makes of one CPU (`--xla_force_host_platform_device_count`), the program is the one that trains
on many. Processes have a device each, and find one another on this machine as on several. "chunks"
is one device with `train.accumulate=4` against the whole batch. The table has the largest
difference of loss, gradient norm and parameters after five steps, relative to the largest of each.
"""

import argparse
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

if "--join" not in sys.argv:
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
        "--xla_backend_optimization_level=0"  # compiling is most of the time
    )

import jax
import jax.numpy as jnp
import numpy as np
import optax
import records

from siamese_jax import processes
from siamese_jax.losses import LOSSES, memory
from siamese_jax.losses.miners import MINERS
from siamese_jax.train import mesh as meshes
from siamese_jax.train.step import init_state, make_train_step

jax.config.update("jax_enable_x64", True)
ROWS, WIDE, DIM, CLASSES, STEPS, SLOTS = 14, 24, 8, 5, 5, 10
BOUNDS = {"float32": 1e-6, "float64": 1e-12}
# AdamW divides a gradient by its own size: in float32 it passes on the rounding of those near zero,
# which no two programs share.
OPTIMIZERS = {"float32": optax.sgd(0.05, momentum=0.9), "float64": optax.adamw(1e-2)}
# What the certificate is of: (loss, miner, size of the memory).
CASES = [
    *((name, None, 0) for name in LOSSES),
    *(("triplet", name, 0) for name in MINERS),
    *((name, None, SLOTS) for name in ("triplet", "contrastive", "multi_similarity", "nt_xent")),
]
COLUMNS = ["loss", "miner", "memory", "how", "float32", "float64"]


def encoder(
    params: Any, stats: Any, x: Any, *, train: bool, mask: Any, key: Any, chunked: bool = False
) -> Any:
    """A small one: two layers, with batch normalisation over the rows that count and dropout
    between them where it sees the batch as one.
    """
    head = params["head"]
    x = x @ head["first"]
    if not chunked:
        weight = mask[:, None].astype(x.dtype)
        mean = (x * weight).sum(axis=0) / weight.sum()
        variance = (((x - mean) ** 2) * weight).sum(axis=0) / weight.sum()
        x = (x - mean) / jnp.sqrt(variance + 1e-3)
        x = jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)
    x = jax.nn.relu(x) @ head["second"]
    return x / jnp.linalg.norm(x, axis=1, keepdims=True), stats


def run(
    case: tuple, mesh: Any, shard: str, dtype: str, chunks: int | None = None
) -> dict[str, np.ndarray]:
    """Losses and gradient norms of the steps, and the parameters after them.

    `chunks` is also of an encoder that can be run in several.
    """
    name, miner, slots = case
    rng = np.random.default_rng(0)
    explicit = {"triplet": {"margin": 0.5}}
    loss = LOSSES[name](**explicit.get(name, {}))
    of = functools.partial(jnp.asarray, dtype=dtype)
    head = {"first": of(rng.normal(size=(WIDE, 64))), "second": of(rng.normal(size=(64, DIM)))}
    own = jax.tree.map(of, loss.init(jax.random.key(1), DIM, CLASSES))
    params = {"trunk": {}, "head": head, "loss": own}
    tx = OPTIMIZERS[dtype]
    bank: Any = memory.init(slots, DIM) if slots else ()
    state = init_state(params, {}, tx, jax.random.key(2), bank)
    keep = None
    if mesh:
        state = meshes.place(state, mesh, shard)
        keep = functools.partial(meshes.keep, mesh=mesh, shard=shard)
    step = make_train_step(
        apply_fn=functools.partial(encoder, chunked=chunks is not None),
        loss=meshes.of_all_rows(loss, mesh, shard) if mesh else loss,
        tx=tx, chunks=chunks or 1, keep=keep,
        miner=MINERS[miner]() if miner else None,
    )  # fmt: skip
    found: dict[str, list] = {"loss": [], "gradient": []}
    for _ in range(STEPS):
        labels = np.concatenate([np.arange(CLASSES), rng.integers(0, CLASSES, ROWS - CLASSES)])
        batch = {
            "feature": rng.normal(size=(ROWS, WIDE)).astype(dtype),
            "label": labels.astype(np.int32),
            "mask": np.arange(ROWS) != 3,
        }
        given = meshes.spread(batch, mesh) if mesh else batch
        state, metrics = step(state, given, rows=ROWS)
        found["loss"].append(float(metrics["loss"]))
        found["gradient"].append(float(metrics["grad_norm"]))
    leaves = jax.tree.leaves(jax.device_get(meshes.whole(state.params)))
    return {
        **{k: np.array(v) for k, v in found.items()},
        **{f"leaf {i}": leaf for i, leaf in enumerate(leaves)},
    }


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest, relative to the largest number of each array."""
    return max(
        float(np.abs(one[k] - other[k]).max() / max(np.abs(one[k]).max(), 1e-30)) for k in one
    )


def differences(
    case: tuple,
    devices: Sequence[int],
    dtypes: Sequence[str] = tuple(BOUNDS),
    shards: Sequence[str] = meshes.SHARDS,
    *,
    chunks: bool = True,
) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    """Of each way to share the work, (what is split, on how many devices), that of each dtype."""
    alone = {dtype: run(case, None, "none", dtype) for dtype in dtypes}
    for shard, count in itertools.product(shards, devices):
        mesh = meshes.make_mesh(jax.devices()[:count])
        found = {d: difference(alone[d], run(case, mesh, shard, d)) for d in dtypes}
        yield (shard, str(count)), found
    if not chunks:
        return
    whole, parts = ({d: run(case, None, "none", d, n) for d in dtypes} for n in (1, 4))
    yield ("chunks", "1"), {d: difference(whole[d], parts[d]) for d in dtypes}


def of_processes(count: int, cases: Sequence[tuple]) -> Iterator[tuple[tuple, dict[str, float]]]:
    """(case, what is split), and the differences, of several processes with one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = {"cases": cases, "coordinator": f"127.0.0.1:{port}", "processes": count}
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--join", json.dumps(said | {"process": number})],
            stdout=subprocess.PIPE, text=True, env=os.environ | quick,
        )
        for number in range(count)
    ]  # fmt: skip
    assert started[0].stdout
    for line in started[0].stdout:
        if line.startswith("["):
            *what, found = json.loads(line)
            yield tuple(what), found
    if sum(abs(process.wait()) for process in started):
        raise SystemExit("a process failed: see above")


def join(coordinator: str, process: int, processes_in_all: int, cases: Sequence[Any]) -> None:
    """One of the processes; the first one prints the differences, of each case and split."""
    processes.begin(processes.Place(coordinator, process, processes_in_all))
    for case in map(tuple, cases):
        for (shard, _), found in differences(case, [len(jax.devices())], chunks=False):
            if processes.is_first():
                print(json.dumps([*case, shard, found]), flush=True)
    processes.end(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES))
    parser.add_argument("--join", type=json.loads, help=argparse.SUPPRESS)
    records.add_option(parser)
    args = parser.parse_args()
    meshes.LEAST = 1  # so that the small leaves of these cases are split
    if args.join:
        given = args.join
        join(given["coordinator"], given["process"], given["processes"], given["cases"])
        return
    cases = [case for case in CASES if not args.losses or case[0] in args.losses]
    largest: dict[tuple[str, ...], dict[str, float]] = {}

    def note(case: tuple, how: str, words: Sequence[str], found: dict[str, float]) -> None:
        name, miner, slots = case
        key = (name, miner or "-", str(slots or "-"), how)
        known = largest.get(key, dict.fromkeys(BOUNDS, 0.0))
        largest[key] = {dtype: max(known[dtype], found[dtype]) for dtype in BOUNDS}
        numbers = [f"{found[dtype]:.0e}" for dtype in BOUNDS]
        print("  ".join([*key[:3], *words, *numbers]), flush=True)

    for case in cases:
        for (shard, count), found in differences(case, args.devices) if args.devices else ():
            how = shard if shard == "chunks" else "several devices"
            note(case, how, [shard, count], found)
    for count in args.processes:
        for (*one, shard), found in of_processes(count, cases):
            note(tuple(one), "several processes", [shard, f"{count} processes"], found)
    rows = [[*key, *(f"{one[dtype]:.0e}" for dtype in BOUNDS)] for key, one in largest.items()]
    for dtype, bound in BOUNDS.items():
        above = sum(one[dtype] > bound for one in largest.values())
        print(f"{dtype}: {above} of {len(rows)} are above {bound}")
    if args.record:
        records.save("certificate", COLUMNS, rows, [])


if __name__ == "__main__":
    main()
