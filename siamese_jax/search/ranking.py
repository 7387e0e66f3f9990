"""rank(): the exact k nearest gallery items of every query, in bounded memory.

How: `siamese_jax.search`. What is promised: `siamese_jax.search.engine.exact`.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from siamese_jax import stopping
from siamese_jax.data.embedded import Asked, Embedded, unpack
from siamese_jax.data.labels import as_ids
from siamese_jax.distances import check
from siamese_jax.errors import UserError
from siamese_jax.search import lance
from siamese_jax.search.engine import accelerators as split
from siamese_jax.search.engine import approximate as about
from siamese_jax.search.engine import cpu, exact, order
from siamese_jax.search.engine.blocks import check_all
from siamese_jax.search.engine.checked_rows import check_room
from siamese_jax.search.engine.request import Predicate, Search, check_memory, chosen_precision
from siamese_jax.search.engine.rows import as_rows
from siamese_jax.search.gallery import Gallery

log = logging.getLogger(__name__)
MEMORY_LIMIT = 256 * 2**20


class Ranking(NamedTuple):
    """The gallery items found for each query, nearest first.

    Attributes:
      indices: int32 [q, k], rows of the gallery; -1 where fewer than k items remain.
      distances: float32 [q, k], ascending; +inf where the index is -1.
    """

    indices: np.ndarray
    distances: np.ndarray


class Neighbours(NamedTuple):
    """The gallery items within a radius, nearest first, of all queries one after another.

    Those of query i are at limits[i] : limits[i + 1].

    Attributes:
      limits: int64 [q + 1].
      indices: int32 [limits[-1]], rows of the gallery.
      distances: float32 [limits[-1]].
    """

    limits: np.ndarray
    indices: np.ndarray
    distances: np.ndarray


def rank(
    queries: Any,
    gallery: Any,
    k: int | ArrayLike,
    *,
    distance: str | None = None,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    keep: ArrayLike | Predicate | None = None,
    memory_limit: int = MEMORY_LIMIT,
    precision: str = "auto",
    devices: Sequence[jax.Device] | None = None,
    approximate: str | None = None,
) -> Ranking:
    """The k nearest gallery items of every query, exactly.

    Distances are correctly rounded from the float32 vectors (`siamese_jax.search.engine.exact`),
    and equal ones are in ascending order of the gallery's rows. Neither `memory_limit` nor
    `precision` nor how queries are batched changes an answer.

    Args:
      queries: [q, d] real, taken as float32; or `Embedded` of `siamese_jax.embed_folder`, which
        bring their ids and their encoder's distance.
      gallery: [g, d] real: a NumPy array, a memory map, a JAX array, a list of such shards
        (rows are numbered through), a `Gallery`, or `Embedded`; or "lance://NAME.lance", a table
        of LanceDB that `Gallery.export` wrote, larger than memory (`siamese_jax.search.lance`).
      k: how many items to return, at least 1; or int [q], one number for each query, whose row
        then ends in -1 and +inf.
      distance: "euclidean", "sqeuclidean", "cosine" (1 - cos; 1 for a zero vector) or "dot"
        (negated). By default that of the `Embedded`, or that a table was exported for; of arrays,
        "euclidean".
      query_ids: int, str or bytes [q]; a gallery item with the query's own id is left out before
        the k nearest are taken. When ids are equal: `siamese_jax.data.labels`.
      gallery_ids: likewise [g]; needed with `query_ids`, unless `gallery` is a `Gallery`.
      keep: bool [g], or a function from the gallery's ids to that; other items are left out. For
        a table the function is given the ids of some rows at a time.
      memory_limit: bytes of working memory, beyond the arguments and the answer. Up to 96 MiB of
        it are kept for the next search.
      precision: of the matrix product that finds candidates: "float32", "tf32", "bfloat16", or
        "auto": bfloat16 on processors that have it, else float32.
      devices: split the gallery over these. By default all accelerators, if there are any.
        `memory_limit` then holds for the memory of each.
      approximate: None for the exact answer; "usearch" or "faiss" to let a graph index of that
        library propose candidates (`siamese_jax.search.engine.approximate_index`). Distances
        are still exact, but items may be missing. The index is built by the first search of a
        `Gallery`, and kept. Of a table, "lance" lets LanceDB propose them, by its own index.

    Returns:
      A `Ranking` of q rows and max(k) columns.

    Raises:
      UserError: an unknown name, shapes or ids that do not match, a row that is not finite, or
        `Embedded` of two encoders.

    >>> rank([[0.0, 0.0]], [[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]], k=2)
    Ranking(indices=array([[1, 2]], dtype=int32), distances=array([[1., 1.]], dtype=float32))
    """
    if lance.names_home(gallery):
        home = lance.open_home(gallery)
        if gallery_ids is not None:
            raise UserError("a table has its own ids: leave gallery_ids out")
        asked = _asked_of(home, queries, distance, query_ids)
        if approximate is not None:
            return _rank_proposed(home, asked, k, keep, approximate)
        how = {"memory_limit": memory_limit, "precision": precision, "devices": devices}
        return _rank_home(home, asked, k, keep, how)
    asked = unpack(queries, gallery, distance, query_ids, gallery_ids)
    search = _search(asked, keep, memory_limit)
    wanted, columns = _counts(k, len(search.queries))
    check_room(len(wanted), len(search.gallery.rows), k=columns)
    precision, adaptive = chosen_precision(precision, search)
    if devices is None and jax.default_backend() != "cpu":
        devices = jax.devices()
    if approximate is not None:
        parts = about.nearest_proposed(search, approximate, wanted, columns)
    elif devices is None:
        parts = cpu.nearest(search, wanted, columns, precision, adaptive)
    else:
        parts = split.nearest_on_devices(search, devices, wanted, columns, precision)
    return _filled(parts, len(wanted), columns)


def range_search(
    queries: Any,
    gallery: Any,
    radius: float | ArrayLike,
    *,
    distance: str | None = None,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    keep: ArrayLike | Predicate | None = None,
    memory_limit: int = MEMORY_LIMIT,
    precision: str = "auto",
) -> Neighbours:
    """All gallery items at most `radius` away from each query, exactly, nearest first.

    Args:
      radius: in units of the distance; one number, or float [q].
      Others: as for `rank`. The memory limit does not hold for the answer, which can be any size.

    >>> found = range_search([[0.0], [9.0]], [[1.0], [0.0], [2.0]], radius=1.0)
    >>> found.limits.tolist(), found.indices.tolist(), found.distances.tolist()
    ([0, 2, 2], [1, 0], [0.0, 1.0])
    """
    asked = unpack(queries, gallery, distance, query_ids, gallery_ids)
    search = _search(asked, keep, memory_limit)
    q = len(search.queries)
    reach = np.asarray(radius, np.float64)
    if reach.shape not in ((), (q,)) or np.isnan(reach).any():
        raise UserError(f"radius must be a number or [{q}] of them, without NaN")
    reach = np.broadcast_to(reach, (q,))
    count = np.zeros(q + 1, np.int64)
    parts = []
    for i, j, away in cpu.within(search, reach, chosen_precision(precision, search)[0]):
        count[1:] += np.bincount(i, minlength=q)
        parts.append((j, away))
    indices = [j for j, _ in parts] or [np.empty(0, np.int32)]
    distances = [away for _, away in parts] or [np.empty(0, np.float32)]
    return Neighbours(np.cumsum(count), np.concatenate(indices), np.concatenate(distances))


def pairwise_distances(
    queries: ArrayLike, gallery: Any, *, distance: str = "euclidean"
) -> np.ndarray:
    """Every query's distance from every gallery item, float32 [q, g]: the values `rank` returns.

    >>> pairwise_distances([[0.0, 0.0]], [[3.0, 4.0], [0.0, 1.0]])
    array([[5., 1.]], dtype=float32)
    """
    search = _search(Asked(queries, gallery, distance, None, None), None, MEMORY_LIMIT)
    x, rows = search.queries, search.gallery.rows
    for checked in (search.rows, rows):
        check_all(checked)
    found = np.empty((len(x), len(rows)), np.float32)
    every = np.arange(len(rows), dtype=np.int32)
    for i in range(len(x)):
        own = np.zeros(len(rows), np.int32)
        found[i] = exact.pair_distances(x[i : i + 1], rows, own, every, distance)
    return found


def _search(asked: Asked, keep: ArrayLike | Predicate | None, memory_limit: int) -> Search:
    """The search that is asked for, with a `Gallery` to search in."""
    gallery = asked.gallery
    if lance.names_home(gallery):
        raise UserError("a table of LanceDB is searched by rank alone")
    if not isinstance(gallery, Gallery):
        if asked.query_ids is not None and asked.gallery_ids is None:
            raise UserError("query_ids need gallery_ids to compare with")
        gallery = Gallery(gallery, asked.gallery_ids, resident=False)
    elif asked.gallery_ids is not None:
        raise UserError("a Gallery has its own ids: leave gallery_ids out")
    return Search(asked.queries, gallery, asked.distance, asked.query_ids, keep, memory_limit)


def _asked_of(home: lance.LanceTable, queries: Any, distance: str | None, query_ids: Any) -> Asked:
    """What is asked of a table: its queries as an array, its distance."""
    if isinstance(queries, Embedded):
        query_ids = queries.ids if query_ids is None else query_ids
        if distance is None and queries.distance != home.distance:
            raise UserError(
                f"the queries were embedded to be compared by {queries.distance}, and {home.name} "
                f"was exported for {home.distance}: give distance= if you know better"
            )
        queries = queries.vectors
    rows = as_rows(queries, "queries")
    if rows.width != home.width:
        raise UserError(f"queries have {rows.width} columns, {home.name} {home.width}")
    if query_ids is not None:
        query_ids = as_ids(query_ids, len(rows), "query_ids")
        home.check_ids(query_ids)
    return Asked(rows, home, check(distance or home.distance), query_ids, None)


def _rank_home(
    home: lance.LanceTable, asked: Asked, k: int | ArrayLike, keep: Any, how: dict[str, Any]
) -> Ranking:
    """`rank` of a table: block by block, the first of all blocks kept."""
    wanted, columns = _counts(k, len(asked.queries))
    check_room(len(wanted), len(home), k=columns)
    if keep is not None and not callable(keep) and np.shape(keep) != (len(home),):
        raise UserError(f"keep must give bool [{len(home)}], not {list(np.shape(keep))}")
    if kind := home.index(asked.distance):
        log.info("%s: all rows are read; approximate='lance' asks its index %s", home.name, kind)
    memory = check_memory(how["memory_limit"])
    found = _filled([], len(wanted), columns)
    named = asked.query_ids is not None or callable(keep)
    for rows, vectors, ids in home.blocks(int(memory) // 4, ids=named):
        part = rank(
            asked.queries,
            Gallery(vectors, ids, resident=False),
            k,
            distance=asked.distance,
            query_ids=asked.query_ids,
            keep=keep if keep is None or callable(keep) else np.asarray(keep)[rows],
            **how | {"memory_limit": max(1 << 20, memory // 2)},
        )
        numbers = np.where(part.indices < 0, -1, rows[part.indices]).astype(np.int32)
        j = np.concatenate([found.indices, numbers], axis=1)
        away = np.concatenate([found.distances, part.distances], axis=1)
        i, place = np.nonzero(j >= 0)
        first = order.first(i, j[i, place], away[i, place], wanted)
        found = _filled([first], len(wanted), columns)
    return found


def _rank_proposed(
    home: lance.LanceTable, asked: Asked, k: int | ArrayLike, keep: Any, approximate: str
) -> Ranking:
    """`rank` among what LanceDB proposes."""
    if approximate != "lance":
        raise UserError(f"approximate={approximate!r} is not of a table: use 'lance'")
    if keep is not None:
        raise UserError("keep is not for LanceDB to propose by: leave approximate out")
    wanted, columns = _counts(k, len(asked.queries))
    check_room(len(wanted), len(home), k=columns)
    check_all(asked.queries)
    parts = home.nearest_proposed(asked.queries, wanted, asked.distance, asked.query_ids)
    return _filled(parts, len(wanted), columns)


def _filled(parts: Iterable[tuple], q: int, columns: int) -> Ranking:
    """The answers (i, place, j, distance) in their places."""
    found = Ranking(np.full((q, columns), -1, np.int32), np.full((q, columns), np.inf, np.float32))
    for i, place, j, away in parts:
        stopping.check("the search begins again, and embeddings are kept")
        at = i.astype(np.int64) * columns + place
        found.indices.reshape(-1)[at] = j
        found.distances.reshape(-1)[at] = away
    return found


def _counts(k: int | ArrayLike, q: int) -> tuple[np.ndarray, int]:
    """How many items each query is to have, int64 [q], and the most."""
    wanted = np.asarray(k)
    if wanted.dtype.kind not in "iu" or wanted.shape not in ((), (q,)):
        raise UserError(f"k must be an integer or int [{q}], not {k!r:.60}")
    if (wanted < 1).any():
        raise UserError(f"k must be at least 1, not {int(wanted.min())}")
    most = int(wanted.max(initial=0)) if wanted.ndim else int(wanted)
    return np.broadcast_to(wanted, (q,)).astype(np.int64), most
