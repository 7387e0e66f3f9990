"""`fit` on cached images: a grid scored by folds, one fit beside scikit-learn's, time and memory.

    python benchmarks/fit.py                    (10,000 images x 1,280, 100 cells)
    python benchmarks/fit.py --d 8192 --n 2000 --cells 1

The trunk never runs: what it would have given lies in the cache. Each part runs in a process of its
own, for its peak of memory. The cells are the worst case: all of one width, so that none is cheaper
than another; 20 shrinkages x 5 widths.

scikit-learn's LinearDiscriminantAnalysis (solver "eigen") takes the eigenvectors of the total
covariance and the one within classes, as ours does, and shrinks both where ours shrinks the second
alone. So the subspaces of the first classes - 1 axes are compared without
shrinkage, where both mean the same, and with it after the total covariance was shrunk as well.
On a machine that others use too, processor time is the fairer measure.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import records

from siamese_jax.data.records import Records, make_records
from siamese_jax.encoder import lda
from siamese_jax.encoder.encoder import Encoder
from siamese_jax.encoder.load import load_encoder
from siamese_jax.storage.vectors import VectorStore
from siamese_jax.train import fit, fitting
from siamese_jax.train.fitting import Candidate

SHRINKAGE = 0.4
WIDTHS = (64, 128, 256, 512, 1024)


def data(n: int, d: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows float32 [n, d] whose classes differ in few directions, and the class of each."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    centres = rng.normal(size=(classes, d)) * np.geomspace(1, 0.05, d)
    return (centres[labels] + rng.standard_normal((n, d))).astype(np.float32), labels


def cells(count: int) -> fit.Grid:
    widths = WIDTHS[-1 if count < len(WIDTHS) else 0 :]
    shares = np.linspace(0.05, 1, max(1, count // len(widths))).round(3).tolist()
    return fit.Grid(shrinkages=shares, widths=widths)


def cached(x: np.ndarray, many: Records, grid: fit.Grid) -> Callable[[], Any]:
    """The whole of `fit`, of rows that are the cached features of the trunk's last stage."""
    encoder = load_encoder("efficientnet_lite0", "random", 32, stage="top", signed_sqrt=True)
    assert isinstance(encoder, Encoder)
    if x.shape[1] != encoder.embedding_dim:  # no trunk is as wide: the scoring alone
        tried = [Candidate(("all",), s, w) for s in grid.shrinkages for w in grid.widths]
        return lambda: fitting.score(lambda p: x[p], many, {"all": x.shape[1]}, tried)
    folder, keys = tempfile.mkdtemp(), [i.to_bytes(16, "little") for i in range(len(x))]
    (part,) = encoder.apart().parts
    VectorStore(Path(folder, "embeddings", part.fingerprint), (x.shape[1],)).append(keys, x)
    source = fit.Source("trunk", lambda stages: encoder, [("top",)])
    return lambda: fit.fit([source], many, grid=grid, keys=keys, cache_dir=folder)


def ours(x: np.ndarray, labels: np.ndarray, shrinkage: float, width: int) -> np.ndarray:
    found = lda.scatter(lambda p: x[p], labels)
    return lda.closed_form(found, shrinkage=shrinkage, width=width)[1]


def theirs(x: np.ndarray, labels: np.ndarray, shrinkage: float, width: int) -> np.ndarray:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    made = LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage or None)
    return made.fit(x, labels).scalings_[:, :width].T


def angles(x: np.ndarray, labels: np.ndarray, width: int) -> list[float]:
    """The largest principal angles between both, in radians: without shrinkage, and with it."""

    def angle(one: np.ndarray, other: np.ndarray) -> float:
        a, b = (np.linalg.qr(rows.T)[0] for rows in (one, other))
        return float(np.arccos(np.clip(np.linalg.svd(a.T @ b)[1].min(), -1, 1)))

    plain = angle(ours(x, labels, 0, width), theirs(x, labels, 0, width))
    _, spread, lower = lda.moments(lda.scatter(lambda p: x[p], labels), SHRINKAGE)
    level = np.trace(spread) / len(spread)
    spread = (1 - SHRINKAGE) * spread + SHRINKAGE * level * np.eye(len(spread))
    shrunk = lda.leading(spread, lower, width)
    return [plain, angle(shrunk, theirs(x, labels, SHRINKAGE, width))]


def measure(args: argparse.Namespace) -> Any:
    """One part, in this process: what it takes, with this process's peak beyond its start."""
    x, labels = data(args.n, args.d, args.classes)
    width = min(args.classes - 1, args.d)
    many = make_records([str(i) for i in range(args.n)], [str(c) for c in labels], root="")
    if args.part == "angles":
        return angles(x, labels, width)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(x, labels, SHRINKAGE, width),
        "theirs": lambda: theirs(x, labels, SHRINKAGE, width),
    }
    run = runs.get(args.part) or cached(x, many, cells(args.cells))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, spent = time.perf_counter(), time.process_time()
    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return [time.perf_counter() - began, time.process_time() - spent, peak / 2**10]


def apart(part: str) -> Any:
    """What a part measures, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--part={part}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--d", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--best-of", type=int, default=3, help="of one fit: runs in turns")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    records.add_option(parser)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure(args)))
        return
    turns = [(apart("ours"), apart("theirs")) for _ in range(args.best_of)]
    one, other = (min(part, key=lambda t: t[1]) for part in zip(*turns, strict=True))
    grid = apart("cells")
    columns = ("what", "seconds", "processor seconds", "MiB more at the peak")
    names = f"fit, {args.cells} cells", "one fit", "scikit-learn, one fit"
    rows = [(name, *(f"{t:.1f}" for t in found))
            for name, found in zip(names, (grid, one, other), strict=True)]  # fmt: skip
    for row in (columns, *rows):
        print("  ".join(str(cell).rjust(22) for cell in row))
    plain, shrunk = apart("angles")
    notes = [
        f"{args.n} x {args.d}, {args.classes} classes; one matrix is {args.d**2 / 2**17:.0f} MiB.",
        f"scikit-learn takes {other[0] / one[0]:.1f} times as long as one fit and "
        f"{other[2] / one[2]:.1f} times the memory; the best of {args.best_of} runs in turns.",
        f"Largest angle between the two subspaces: {plain:.0e} not shrunk, {shrunk:.0e} shrunk.",
    ]
    print("\n".join(notes))
    if args.record:
        records.save("fit", columns, rows, notes)


if __name__ == "__main__":
    main()
