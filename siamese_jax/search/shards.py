"""`rank` where the gallery lies in parts, one with each of several processes."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax import processes
from siamese_jax.errors import UserError
from siamese_jax.search.ranking import Ranking, rank


def rank_shards(
    queries: ArrayLike,
    rows: ArrayLike,
    k: int,
    *,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    **options: Any,
) -> Ranking:
    """The k nearest items of a gallery of which each process holds some rows: exactly, as of one.

    Each process takes its k nearest, and k of each travel: q k 8 bytes a process. As distances are
    correctly rounded, merging by (distance, row) is the order that `rank` gives. A collective: all
    processes of the program call it, with the same queries and options. A program of your own joins
    the others by `jax.distributed.initialize`, before its first computation.

    Args:
      queries: float32 [q, d], the same in every process.
      rows: float32 [g, d], this process's; those of the processes follow one another. None at all
        (g = 0) is fine.
      k: how many items to return, at least 1.
      query_ids: [q], the same in every process; an item with the query's own id is left out.
      gallery_ids: [g], of this process's rows.
      **options: of `siamese_jax.rank`, which hold for a process: distance, memory_limit, precision.

    Returns:
      A `Ranking` of rows of the whole gallery, the same in every process.

    Raises:
      UserError: as `rank`; rows that are no array; the processes were given other queries or
        options; or they hold 2^31 rows and more.
    """
    try:
        asked, own = np.asarray(queries, np.float32), np.asarray(rows, np.float32)
    except (TypeError, ValueError):
        raise UserError(
            "rank_shards takes arrays: queries [q, d], and this process's rows"
        ) from None
    of_queries = hashlib.blake2b(asked.tobytes() + repr(query_ids).encode(), digest_size=8)
    processes.agree("search", {"queries": of_queries.hexdigest(), "k": k, **options})
    counts = processes.told_by_all(len(own))
    if sum(counts) >= 2**31:
        raise UserError(
            f"the processes hold {sum(counts)} rows; a ranking numbers 2^31 - 1 at most"
        )
    found = Ranking(np.zeros((len(asked), 0), np.int32), np.zeros((len(asked), 0), np.float32))
    if len(own):
        ids: dict[str, Any] = {"query_ids": query_ids, "gallery_ids": gallery_ids}
        found = rank(asked, own, min(k, len(own)), **ids, **options)
    start = np.int32(sum(counts[: processes.index()]))
    there = found.indices >= 0
    return merged(
        processes.told_by_all((np.where(there, found.indices + start, -1), found.distances)), k
    )


def merged(parts: list[tuple[np.ndarray, np.ndarray]], k: int) -> Ranking:
    """The k nearest of (rows int32 [q, m], -1 for none; distances float32 [q, m]) of each part."""
    rows = np.concatenate([some for some, _ in parts], axis=1)
    away = np.concatenate([some for _, some in parts], axis=1)
    order = np.lexsort((rows, away, rows < 0))[:, :k]
    rows, away = (np.take_along_axis(of, order, axis=1) for of in (rows, away))
    fill = ((0, 0), (0, k - rows.shape[1]))
    return Ranking(
        np.pad(rows, fill, constant_values=-1), np.pad(away, fill, constant_values=np.inf)
    )
