"""The protocol of "A Metric Learning Reality Check" (Musgrave, Belongie & Lim 2020, 2003.08505).

    separate        mean over folds of what each fold's embeddings x_f get on the test classes, with
                    the half of its 95 % interval, t_(.975, n-1) s / sqrt(n), over the n runs
    concatenated    z = [unit(x_1), ..., unit(x_F)], by cosine

Each fold of the training classes is validation in a run of its own, and chooses that run's
checkpoint; the test classes are the same for all. Of several tries of one thing, the one that is
best on validation is taken.
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
    return {
        "recall@1 sd": float("nan"),  # the interval says it
        "validation": statistics.mean(validation),
        "steps": round(statistics.mean(steps)),
        **{f"{m} interval": half_interval([values[m] for values in after]) for m in metrics},
    }


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean of n independent values, by Student's t.

    >>> round(half_interval([0.5, 0.6, 0.7]), 4)
    0.2484
    """
    from scipy.stats import t

    spread = statistics.stdev(values) / len(values) ** 0.5
    return float(t.ppf(0.975, len(values) - 1) * spread)


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


def concatenated(cells: Sequence[Cell], workdir: Path, metrics: Sequence[str]) -> Row:
    """Metrics of the test classes by all folds' embeddings side by side; of seeds, the mean.

    Args:
      cells: finished runs of the same cell, each of another fold or seed.
      workdir: the folder of their folders.
      metrics: those that are wanted.
    """
    from siamese_jax.encoder.combined import concatenate
    from siamese_jax.metrics.evaluation import sides_of
    from siamese_jax.train.experiment import result_on

    by_seed: dict[str, list[Cell]] = {}
    for cell in cells:
        by_seed.setdefault(cell.choice.get(SEED, ""), []).append(cell)
    found: list[Mapping[str, float]] = []
    for folds in by_seed.values():
        parts = [result_on(cell.config, workdir / cell.name, "test") for cell in folds]
        records = parts[0].records
        if not all(np.array_equal(part.records.id, records.id) for part in parts):
            raise UserError(f"{workdir}: an image could be read for one fold and not for another")
        vectors = concatenate([part.vectors for part in parts])
        found.append(sides_of(vectors, records, "cosine").measure((1,), metrics).means())
    return {f"concatenated {m}": statistics.mean(values[m] for values in found) for m in metrics}
