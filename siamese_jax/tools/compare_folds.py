"""The protocol of "A Metric Learning Reality Check" (Musgrave, Belongie & Lim 2020, 2003.08505).

    separate        mean over folds of what each fold's embeddings x_f get on the test classes; its
                    95 % interval reaches t_(.975, n-1) s / sqrt(n) to each side, over the n runs
    concatenated    z = [unit(x_1), ..., unit(x_F)], by cosine

Each fold of the training classes is validation in a run of its own, and chooses that run's
checkpoint; the test classes are the same for all. Of several tries of one thing, the one that is
best on validation is taken. Whether a row is better than the bare trunk is told as a run tells it,
by what each test query gets, its mean over the runs.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.tools.compare_grid import FOLD, SEED, Cell, Grid
from siamese_jax.values import nearest

Row = dict[str, Any]
ALL = (0.0, 1.0)  # what a metric can be


def with_folds(grid: Grid, count: int) -> Grid:
    """The grid with an axis more: each fold as validation."""
    if FOLD in grid:
        raise UserError(f"--folds={count}: the grid has an axis 'fold' of its own; leave one out")
    numbers = range(1, count + 1)
    return {**grid, FOLD: {f"{i}of{count}": {"data.fold": f"{i}/{count}"} for i in numbers}}


def check_tries(axis: str, grid: Grid, folds: int | None) -> None:
    """UserError where no best try on that axis can be chosen."""
    axes = [name for name in grid if name not in (SEED, FOLD)]
    if axis not in axes:
        raise UserError(
            f"--best-of={axis}: the grid has no such axis{nearest(axis, axes)}; choose one of "
            f"{', '.join(axes) or 'none'}"
        )
    if not folds:
        raise UserError(f"--best-of={axis} needs --folds: validation chooses the best try")


def of_folds(
    cells: Sequence[Cell], results: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> Row:
    """What a row says beside the means, where its runs are of folds.

    Args:
      cells: the runs.
      results: results.json of each.
      metrics: of the test classes, whose intervals are wanted.
    """
    from siamese_jax.storage.run_folder import BARE
    from siamese_jax.train.loop import validation_metric

    after = [r["test"]["after"] for r in results]
    chosen_by = [validation_metric(cell.config).rpartition("/")[2] for cell in cells]
    validation = [
        r["validation"]["after"][name] for r, name in zip(results, chosen_by, strict=True)
    ]
    steps = [0 if r["saved"] == BARE else r["checkpoint_step"] for r in results]
    ends: Row = {}
    for name in metrics:
        found = interval([values[name] for values in after])
        ends |= {f"{name} low": found[0], f"{name} high": found[1]}
    return {
        "recall@1 sd": float("nan"),  # the interval says it
        "validation": statistics.mean(validation),
        "steps": round(statistics.mean(steps)),
        **ends,
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of n independent values from 0 to 1, by Student's t.

    >>> [round(end, 4) for end in interval([0.5, 0.6, 0.7])]
    [0.3516, 0.8484]
    >>> interval([0.5, 0.6])
    (0.0, 1.0)
    """
    from scipy.stats import t

    mean = statistics.mean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return max(0.0, mean - half), min(1.0, mean + half)


def empty_intervals(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """A sentence where intervals hold all that a metric can be, and one where they hold nothing."""
    ends = [(r.get(f"{m} low"), r.get(f"{m} high"), len(r["runs"])) for r in rows for m in metrics]
    wide = [runs for low, high, runs in ends if (low, high) == ALL]
    flat = [runs for low, high, runs in ends if low is not None and low == high]
    said = []
    if wide:
        said += [
            f"An interval from 0 to 1: {wide[0]} runs tell nothing of what others would get, by "
            "Student's t; take more folds"
        ]
    if flat:
        said += [
            f"An interval of no width: {flat[0]} runs got the same, by which nothing is known of "
            "what others would get; take more folds"
        ]
    return said


def best_tries(rows: Sequence[Row], axis: str, chosen: Sequence[Cell]) -> list[Row]:
    """Of the rows that differ on one axis alone, the one that is best on validation.

    Args:
      rows: of the table, in order.
      axis: the tries.
      chosen: the cells of the grid.
    """
    tries = len({cell.choice[axis] for cell in chosen})
    others = [name for name in chosen[0].choice if name not in (axis, SEED, FOLD)]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in others), []).append(row)
    best = [max(group, key=lambda row: row["validation"]) for group in groups.values()]
    return [row | {"tries": tries} for row in rows if any(row is one for one in best)]


def on_test(cells: Sequence[Cell], workdir: Path, metrics: Sequence[str]) -> Row:
    """What the test classes say of a row: the metrics of all folds' embeddings side by side, of
    seeds the mean; and a sentence, as a run ends with.

    Args:
      cells: finished runs of the same cell, each of another fold or seed.
      workdir: the folder of their folders.
      metrics: those that are wanted.
    """
    from siamese_jax.encoder.combined import concatenate
    from siamese_jax.metrics.evaluation import Evaluated, sides_of
    from siamese_jax.storage.run_folder import BARE
    from siamese_jax.train.choosing import verdict
    from siamese_jax.train.experiment import measured_again
    from siamese_jax.train.loop import validation_metric

    by_seed: dict[str, list[Cell]] = {}
    for cell in cells:
        by_seed.setdefault(cell.choice.get(SEED, ""), []).append(cell)
    found: list[Mapping[str, float]] = []
    runs: list[Mapping[str, Evaluated]] = []
    for folds in by_seed.values():
        own = [measured_again(cell.config, workdir / cell.name, "test") for cell in folds]
        parts = [run["after"] for run in own]
        records = parts[0].records
        if not all(np.array_equal(part.records.id, records.id) for part in parts):
            raise UserError(f"{workdir}: an image could be read for one fold and not for another")
        vectors = concatenate([part.vectors for part in parts])
        found.append(sides_of(vectors, records, "cosine").measure((1,), metrics).means())
        runs += own
    name = validation_metric(cells[0].config).rpartition("/")[2]
    tested = [run["after"].records for run in runs]
    asked = np.concatenate([records.id[records.is_query] for records in tested])
    before, after = (
        mean_of_each(asked, np.concatenate([run[part].values.values[name] for run in runs]))
        for part in ("before", "after")
    )
    return {
        **{f"concatenated {m}": statistics.mean(values[m] for values in found) for m in metrics},
        "verdict": verdict("test", name, {BARE: before}, after),
    }


def mean_of_each(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of the values [n] that have the same id [n], of each id in order.

    >>> mean_of_each(np.array([3, 1, 3]), np.array([0.0, 0.5, 1.0]))
    array([0.5, 0.5])
    """
    place = np.unique(ids, return_inverse=True)[1]
    return np.bincount(place, weights=values) / np.bincount(place)
