"""The order of the answers: by distance, then by the gallery's row."""

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
    count = np.bincount(i, minlength=len(k))
    start = np.cumsum(count) - count
    for at, n in zip(start.tolist(), count.tolist(), strict=True):
        if n > 1:
            key[at : at + n].sort()
    place = np.arange(len(i)) - np.repeat(start, count)
    keep = place < k[i]
    i, place, key = i[keep], place[keep], key[keep]
    return i, place, (key & np.uint64(0xFFFFFFFF)).astype(j.dtype), _unsortable(key)


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
