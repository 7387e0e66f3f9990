"""Approximate search: candidates from a graph index, distances and order as ever.

What an index proposes is scored exactly, so every distance given is right and in order; items may
be missing. `recall` says how many.
"""

import importlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.engine import operands
from siamese_jax.search.engine.blocks import complaint
from siamese_jax.search.engine.rows import Rows


class Index(Protocol):
    """Proposes about n rows for each query, int64 [q, n], -1 for none."""

    def __call__(self, queries: np.ndarray, n: int) -> np.ndarray: ...


# What a library is asked to compare by. FAISS has no cosine: it is given rows of length 1.
METRICS = {
    "usearch": {"euclidean": "l2sq", "sqeuclidean": "l2sq", "cosine": "cos", "dot": "ip"},
    "faiss": {
        "euclidean": "METRIC_L2",
        "sqeuclidean": "METRIC_L2",
        "cosine": "METRIC_INNER_PRODUCT",
        "dot": "METRIC_INNER_PRODUCT",
    },
}
Blocks = Iterable[tuple[int, np.ndarray]]  # (first row, float32 [n, d])


def usearch_graph(
    blocks: Blocks,
    width: int,
    distance: str,
    *,
    connectivity: int = 16,
    expansion_add: int = 128,
    expansion_search: int = 64,
) -> Any:
    """A usearch HNSW graph (Malkov and Yashunin, arXiv:1603.09320); keys are row numbers."""
    module = library("usearch.index", "usearch")
    graph = module.Index(
        ndim=width,
        metric=METRICS["usearch"][distance],
        dtype="f32",
        connectivity=connectivity,
        expansion_add=expansion_add,
        expansion_search=expansion_search,
    )
    for start, block in blocks:
        graph.add(np.arange(start, start + len(block)), block)
    return graph


def faiss_graph(
    blocks: Blocks,
    width: int,
    distance: str,
    *,
    neighbours: int = 32,
    construction: int = 40,
    search: int = 64,
) -> Any:
    """A FAISS HNSW graph; of rows of length 1 for cosine."""
    module = library("faiss", "faiss-cpu")
    graph = module.IndexHNSWFlat(width, neighbours, getattr(module, METRICS["faiss"][distance]))
    graph.hnsw.efConstruction = construction
    graph.hnsw.efSearch = search
    for _, block in blocks:
        graph.add(for_faiss(block, distance))
    return graph


def ask_usearch(graph: Any, queries: np.ndarray, n: int) -> np.ndarray:
    """Rows int64 [q, n] of a usearch graph, -1 for none."""
    found = graph.search(queries, n)
    keys = np.asarray(found.keys, np.int64).reshape(len(queries), -1)
    counts = np.asarray(getattr(found, "counts", [keys.shape[1]])).reshape(-1, 1)
    return np.where(np.arange(keys.shape[1])[None, :] < counts, keys, -1)


def for_faiss(x: np.ndarray, distance: str) -> np.ndarray:
    """Rows float32 [n, d] as FAISS is given them: for cosine of length 1, a zero row as it is."""
    if distance == "cosine":
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.where(norm > 0, norm, 1)
    return np.ascontiguousarray(x)


def usearch_index(rows: Rows, distance: str) -> Index:
    """A usearch graph that looks at twice as many rows as are asked for."""
    graph = usearch_graph(checked_blocks(rows), rows.width, distance)

    def propose(queries: np.ndarray, n: int) -> np.ndarray:
        graph.expansion_search = max(64, 2 * n)
        return ask_usearch(graph, queries, n)

    return propose


def faiss_index(rows: Rows, distance: str) -> Index:
    """A FAISS graph that looks at twice as many rows as are asked for."""
    graph = faiss_graph(checked_blocks(rows), rows.width, distance)

    def propose(queries: np.ndarray, n: int) -> np.ndarray:
        graph.hnsw.efSearch = max(64, 2 * n)
        return graph.search(for_faiss(queries, distance), n)[1]

    return propose


INDEXES = {"usearch": usearch_index, "faiss": faiss_index}


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact answers that were found, from two [q, k] of rows (-1 for none).

    >>> recall(np.array([[3, 1], [5, -1]]), np.array([[3, 2], [5, -1]]))
    0.6666666666666666
    """
    hit = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, exact, strict=True))
    return hit / max(1, int((exact >= 0).sum()))


def checked_blocks(rows: Rows, which: np.ndarray | None = None) -> Iterator[tuple]:
    """(number of the first, float32 [n, d]), 16 MiB at a time, of all rows or of `which` int [m].

    Raises:
      UserError: a row is not finite, or too long for its squared distances.
    """
    count = len(rows) if which is None else len(which)
    step = max(1, 2**24 // max(4, 4 * rows.width))
    for start in range(0, count, step):
        numbers = np.arange(start, min(start + step, count))
        numbers = numbers if which is None else which[numbers]
        block = rows.take(numbers)
        fine = operands.fits(block)
        if not fine.all():
            raise UserError(complaint(rows, int(numbers[np.argmin(fine)])))
        yield start, block


def library(name: str, package: str, what: str = "approximate search") -> Any:
    """A module of an extra; UserError that names the package where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs the package {package}: pip install {package}") from error
