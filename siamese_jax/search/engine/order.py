"""The order of the answers: by distance, then by the gallery's row."""

from collections.abc import Iterator

import numpy as np


def first(
    i: np.ndarray, j: np.ndarray, distance: np.ndarray, k: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The k[i] first pairs of every query in the order (distance, row).

    Args:
      i: int [n], the pair's query.
      j: int [n], the pair's gallery row.
      distance: float32 [n], no NaN.
      k: int [q].

    Returns:
      (i, place, j, distance): the answers, `place` counted from 0 for each query; in the order of
      i, then place.
    """
    key = _sortable(distance) << np.uint64(32) | j.astype(np.uint64)
    if (i[1:] < i[:-1]).any():
        order = by_query(i, len(k))
        i, key = i[order], key[order]
    # The last one fills rows up.
    key = np.append(key, np.uint64(2**64 - 1))
    for pairs in of_equal_length(i):
        some = key[pairs]
        some.sort(axis=1)
        key[pairs] = some
    place = np.arange(len(i)) - _starts(i)
    keep = place < k[i]
    i, place, key = i[keep], place[keep], key[:-1][keep]
    return i, place, (key & np.uint64(0xFFFFFFFF)).astype(j.dtype), _unsortable(key)


def of_equal_length(
    i: np.ndarray, longest: int | None = None, size: int = 1 << 16
) -> Iterator[np.ndarray]:
    """Pairs in the order of their query, as matrices with a query's pairs in a row.

    Queries with about equally many are together, so that little of a matrix is padding.

    Args:
      i: int [n], ascending, the pair's query.
      longest: the most columns; a query of more pairs then has several rows.
      size: pairs in a matrix, unless one query has more in a row.

    Yields:
      pairs int [m, l]; rows of fewer end in n.
    """
    first = np.flatnonzero(np.diff(i, prepend=-1))
    count = np.diff(first, append=len(i))
    if longest is not None and count.max(initial=0) > longest:
        first = np.flatnonzero((np.arange(len(i)) - _starts(i)) % longest == 0)
        count = np.diff(first, append=len(i))
    order = np.argsort(-count, kind="stable")
    at = 0
    while at < len(order):
        columns = count[order[at]]
        rows = order[at : at + max(1, size // columns)]
        column = np.arange(columns)
        yield np.where(column < count[rows, None], first[rows, None] + column, len(i))
        at += len(rows)


def _starts(i: np.ndarray) -> np.ndarray:
    """For each pair the place of its query's first, for ascending i."""
    first = np.flatnonzero(np.diff(i, prepend=-1))
    return np.repeat(first, np.diff(first, append=len(i)))


def by_query(i: np.ndarray, q: int) -> np.ndarray:
    """The order of pairs by their query, stable."""
    # A stable sort of 16-bit integers is a radix sort.
    return np.argsort(i.astype(np.uint16 if q <= 1 << 16 else np.int32), kind="stable")


def _sortable(distance: np.ndarray) -> np.ndarray:
    """float32 -> uint64 in the same order: the bits of a float, with those of negatives turned."""
    bits = distance.view(np.int32)
    return (bits ^ (bits >> 31 | np.int32(-(2**31)))).view(np.uint32).astype(np.uint64)


def _unsortable(key: np.ndarray) -> np.ndarray:
    """The distance in the upper half of a key."""
    bits = (key >> np.uint64(32)).astype(np.uint32).view(np.int32)
    return (bits ^ (~bits >> 31 | np.int32(-(2**31)))).view(np.float32)
