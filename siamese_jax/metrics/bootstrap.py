"""How far a mean over queries would move had other queries been drawn: bootstrap intervals.

Queries are drawn again with replacement, many times, and the mean is taken each time; the interval
holds the middle share of those means (the percentile method, Efron & Tibshirani 1993, chapter 13).
Of n draws that interval is too narrow where n is small; a larger share is taken, by which it is as
wide as Student's t makes it (Hesterberg 2015, "What Teachers Should Know About the Bootstrap":
alpha / 2 becomes Phi(-sqrt(n / (n - 1)) t[alpha / 2, n - 1])).
Two systems measured on the same queries are compared by the differences query by query (*paired*),
which is far narrower than the difference of two intervals.

Queries of one class resemble one another. With `groups`, whole classes are drawn instead of
queries, and the interval says what to expect of other classes.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.data.labels import label_codes, missing
from siamese_jax.errors import UserError


class Interval(NamedTuple):
    """A mean, its interval, and how many queries it was taken over."""

    mean: float
    low: float
    high: float
    queries: int


def interval(
    values: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Interval:
    """The mean of a metric over queries, with its bootstrap interval; NaN where one was drawn.

    Args:
      values: float [q], a metric of each query; NaN (lone queries) are left out.
      confidence: the share of resampled means inside the interval, between 0 and 1.
      resamples: how many times to draw, at least 1.
      seed: equal seeds give equal intervals.
      groups: [q], such as class labels; whole groups are drawn instead of queries, and a query
        without a label is a group of its own.

    Raises:
      UserError: no value is left, or an argument is out of range.

    >>> interval([0.0, 1.0, 1.0, 1.0], seed=1)
    Interval(mean=0.75, low=0.0, high=1.0, queries=4)
    """
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    if values.ndim != 1 or not known.any():
        raise UserError("a bootstrap needs values [q], at least one of them not NaN")
    if not 0 < confidence < 1 or resamples < 1:
        raise UserError(f"confidence {confidence} must lie in (0, 1), resamples {resamples} >= 1")
    kept = values[known]
    if groups is None:
        sums, sizes = kept, np.ones(len(kept))
    else:
        _, (group,) = label_codes(groups, what=["groups"])
        if group.shape != known.shape:
            raise UserError(f"{len(values)} values need groups [{len(values)}], not {group.shape}")
        alone = missing(group)
        group[alone] = len(group) + np.arange(alone.sum())
        group = np.unique(group[known], return_inverse=True)[1]
        sums, sizes = np.bincount(group, weights=kept), np.bincount(group).astype(np.float64)
    if len(sums) == 1:  # nothing says how far it would move
        return Interval(float(kept.mean()), math.nan, math.nan, len(kept))
    rng, means = np.random.default_rng(seed), np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    tail = _tail(confidence, len(sums))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(kept.mean()), float(low), float(high), len(kept))


def _tail(confidence: float, n: int) -> float:
    """The share of resampled means on each side of the interval, of n that were drawn.

    >>> round(_tail(0.95, 10_000), 4), round(_tail(0.95, 8), 4)
    (0.025, 0.0057)
    """
    from scipy.special import ndtr, stdtrit

    return float(ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - confidence) / 2)))


def compared(told: Interval) -> str:
    """What the interval of a difference says of the second, in words that go before the first.

    >>> compared(difference([0.0, 0.5, 1.0], [0.25, 0.75, 1.25]))
    'better than'
    >>> compared(Interval(-0.1, -0.2, 0.1, 9)), compared(Interval(0.1, math.nan, math.nan, 9))
    ('not told apart from', 'not told apart from')
    """
    return (
        "better than" if told.low > 0 else "worse than" if told.high < 0 else "not told apart from"
    )


def difference(
    before: ArrayLike,
    after: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Interval:
    """Mean of `after - before`, query by query, with its paired bootstrap interval.

    Both are float [q] over the same queries in the same order. An interval that holds 0 means the
    queries do not tell the two apart. Other arguments and errors as `interval`.

    >>> difference([0.0, 0.5, 1.0], [0.25, 0.75, 1.25])
    Interval(mean=0.25, low=0.25, high=0.25, queries=3)
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape or (np.isnan(before) != np.isnan(after)).any():
        raise UserError(
            f"paired values must be of the same queries: {before.shape} and {after.shape}, "
            f"{int(np.isnan(before).sum())} and {int(np.isnan(after).sum())} of them lone"
        )
    return interval(
        after - before, confidence=confidence, resamples=resamples, seed=seed, groups=groups
    )
