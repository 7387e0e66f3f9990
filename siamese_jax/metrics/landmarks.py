"""The Oxford and Paris landmark protocol: graded answers, and junk that counts for nothing.

Each query has gallery items that show its landmark clearly ("easy"), barely ("hard"), or too little
to say ("junk"). Three settings read them differently (Radenovic et al. 2018, section 3.3):

    setting   positive       ignored
    easy      easy           hard, junk
    medium    easy, hard     junk
    hard      hard           easy, junk

Ignored items are taken out of the ranking. With positives at p_1 < ... < p_R (1 is the nearest) in
what remains, average precision is the area by trapezoids that the data sets' own tool computes,

    AP = 1/R sum_j ( (j - 1) / (p_j - 1)  +  j / p_j ) / 2,      the first term 1 where p_j = 1,

which is not the AP of `siamese_jax.metrics` (1/R sum_j j / p_j). Precision at k is taken at
k' = min(k, p_R): a query with few positives, all found early, is not held to k. Queries without
positives in a setting are left out of its means and counted.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.errors import UserError
from siamese_jax.metrics.retrieval import PerQuery
from siamese_jax.search.ranking import Ranking

SETTINGS = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}


def landmarks(
    ranking: Ranking | ArrayLike,
    grades: Sequence[Mapping[str, Sequence[int]]],
    *,
    setting: str = "medium",
    ks: Sequence[int] = (1, 5, 10),
) -> PerQuery:
    """Average precision and precision at k of each query, under one setting.

    Args:
      ranking: a `Ranking` of the whole gallery, or its indices int [q, g], -1 where it has ended.
        A positive that it doesn't list counts as never found.
      grades: for each query, the gallery rows graded "easy", "hard" and "junk".
      setting: "easy", "medium" or "hard".
      ks: where to take the precision.

    Returns:
      `PerQuery` with "map" and "precision@k"; `relevant` counts the positives.

    Raises:
      UserError: an unknown setting, or a number of gradings other than that of queries.

    >>> landmarks([[3, 0, 1, 2]], [{"easy": [0], "hard": [2], "junk": [3]}]).means()["map"]
    0.7916666666666666
    """
    indices = np.asarray(ranking.indices if isinstance(ranking, Ranking) else ranking)
    if setting not in SETTINGS:
        raise UserError(f"setting={setting!r} is unknown: use one of {', '.join(SETTINGS)}")
    if indices.ndim != 2 or len(indices) != len(grades):
        raise UserError(f"a ranking {indices.shape} needs as many rows as the {len(grades)} grades")
    positive, ignored = SETTINGS[setting]
    names = ["map", *(f"precision@{k}" for k in ks)]
    values = {name: np.full(len(indices), np.nan) for name in names}
    relevant = np.zeros(len(indices), np.int64)
    for i, (row, grade) in enumerate(zip(indices, grades, strict=True)):
        wanted = _rows(grade, positive)
        relevant[i] = len(wanted)
        if not len(wanted):
            continue
        kept = row[(row >= 0) & ~np.isin(row, _rows(grade, ignored))]
        position = np.flatnonzero(np.isin(kept, wanted)) + 1
        found = np.arange(1, len(position) + 1)
        left = np.where(position > 1, (found - 1) / np.maximum(position - 1, 1), 1)
        values["map"][i] = (left + found / position).sum() / 2 / len(wanted)
        for k in ks:
            depth = min(k, position[-1]) if len(position) == len(wanted) else k
            values[f"precision@{k}"][i] = (position <= depth).sum() / depth
    return PerQuery(values, relevant)


def _rows(grade: Mapping[str, Sequence[int]], names: Sequence[str]) -> np.ndarray:
    parts = [np.asarray(grade.get(name, ()), np.int64).reshape(-1) for name in names]
    return np.unique(np.concatenate(parts))
