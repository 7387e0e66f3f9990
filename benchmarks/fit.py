"""The closed form on rows that are there: a grid scored by folds, one fit, and scikit-learn's.

    python benchmarks/fit.py --n 10000 --d 1280        (100 cells: 20 shrinkages x 5 widths)

scikit-learn's LinearDiscriminantAnalysis (solver "eigen") shrinks the total covariance as well, so
the subspace is compared at a shrinkage of 0, where both mean the same; the largest principal angle
is printed. On a machine that others use too, processor time is the fairer measure.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import records
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from siamese_jax.data.records import make_records
from siamese_jax.encoder import lda
from siamese_jax.train import fitting
from siamese_jax.train.fitting import Candidate


def data(n: int, d: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows float32 [n, d] whose classes differ in few directions, and the class of each."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    centres = rng.normal(size=(classes, d)) * np.geomspace(1, 0.05, d)
    return (centres[labels] + rng.normal(size=(n, d))).astype(np.float32), labels


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, its seconds, and the processor's."""
    began, spent = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - began, time.process_time() - spent


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """The largest principal angle of two row spaces, in radians."""
    a, b = (np.linalg.qr(rows.T)[0] for rows in (one, other))
    return float(np.arccos(np.clip(np.linalg.svd(a.T @ b)[1].min(), -1, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--d", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=500)
    records.add_option(parser)
    args = parser.parse_args()
    x, labels = data(args.n, args.d, args.classes)
    many = make_records([str(i) for i in range(args.n)], [str(c) for c in labels], root="")
    widths = [w for w in (64, 128, 256, 512, 1024) if w <= args.d]
    shares = np.linspace(0.05, 1, 20).round(2).tolist()
    grid = [Candidate(("all",), share, width) for share in shares for width in widths]
    _, *scored = timed(lambda: fitting.score(lambda p: x[p], many, {"all": args.d}, grid))
    width = min(args.classes - 1, args.d)

    def own(shrinkage: float) -> np.ndarray:
        every = lda.scatter(lambda p: x[p], labels)
        return lda.closed_form(every, shrinkage=shrinkage, width=width)[1]

    def theirs(shrinkage: float) -> np.ndarray:
        made = LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage or None)
        return made.fit(x, labels).scalings_[:, :width].T

    _, *ours = timed(lambda: own(0.5))
    _, *sklearn = timed(lambda: theirs(0.5))
    columns = ("what", "seconds", "processor seconds")
    names = f"{len(grid)} cells by folds", "one fit", "scikit-learn, one fit"
    rows = [(name, *(f"{t:.2f}" for t in times))
            for name, times in zip(names, (scored, ours, sklearn), strict=True)]  # fmt: skip
    for row in (columns, *rows):
        print("  ".join(str(cell).rjust(24) for cell in row))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    notes = [
        f"{args.n} x {args.d}, {args.classes} classes; peak of memory {peak:.1f} GiB.",
        f"Largest angle between the two subspaces, not shrunk: {angle(own(0), theirs(0)):.1e}.",
    ]
    print("\n".join(notes))
    if args.record:
        records.save("fit", columns, rows, notes)


if __name__ == "__main__":
    main()
