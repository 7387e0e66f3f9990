"""Metrics class by class, the worst first: a mean hides the classes that are never found."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.data.labels import MISSING, label_codes
from siamese_jax.errors import UserError
from siamese_jax.metrics.retrieval import PerQuery


class ClassRow(NamedTuple):
    """One class: its label, how many queries count, how many are lone, and the means of metrics.

    `means` is empty where every query of the class is lone.
    """

    label: Any
    queries: int
    lone: int
    means: dict[str, float]


def by_class(
    found: PerQuery, labels: ArrayLike, *, order: str | None = None, names: Sequence[str] = ()
) -> list[ClassRow]:
    """The metrics of each class's queries, worst first.

    Args:
      found: from `siamese_jax.metrics.per_query`.
      labels: the queries' labels [q], or multi-hot bool [q, c]: a query counts for each of its own,
        and one without any for none (`siamese_jax.data.labels`).
      order: the metric to sort by (without it the first in `found`); ties by label.
      names: a name for each label 0..c-1, shown instead of the number.

    Returns:
      One row a class; classes of which every query is lone come last.

    >>> from siamese_jax.metrics import of_ranking
    >>> found = of_ranking([[1], [0], [0]], [5, 5, 6], [5, 6], ks=[1], metrics=["recall@1"])
    >>> [(row.label, row.means) for row in by_class(found, [5, 5, 6])]
    [(6, {'recall@1': 0.0}), (5, {'recall@1': 0.5})]
    """
    vocabulary, (codes,) = label_codes(labels)
    order = order or next(iter(found.values))
    if order not in found.values:
        raise UserError(f"order={order!r} was not measured: use one of {', '.join(found.values)}")
    if len(codes) != len(found.relevant):
        raise UserError(f"{len(codes)} labels for {len(found.relevant)} queries")
    query, number = np.nonzero(codes) if codes.ndim == 2 else (np.arange(len(codes)), codes)
    query, number = query[number != MISSING], number[number != MISSING]
    sizes = np.bincount(number, minlength=len(vocabulary))
    by_number = np.split(query[np.argsort(number, kind="stable")], np.cumsum(sizes)[:-1])
    table = []
    for value, members in zip(vocabulary, by_number, strict=True):
        if not len(members):
            continue
        known = members[found.relevant[members] > 0]
        means = {n: float(v[known].mean()) for n, v in found.values.items() if len(known)}
        shown = names[value] if len(names) else value
        table.append(ClassRow(shown, len(known), len(members) - len(known), means))
    return sorted(table, key=lambda row: row.means.get(order, np.inf))
