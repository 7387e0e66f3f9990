"""Approximate search: candidates from a graph index, distances and order as ever.

What an index proposes is scored exactly, so every distance given is right and in order; items may
be missing. `recall` says how many.
"""

import importlib
from typing import Any, Protocol

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.engine.rows import Rows


class Index(Protocol):
    """Proposes about n rows for each query, int64 [q, n], -1 for none."""

    def __call__(self, queries: np.ndarray, n: int) -> np.ndarray: ...


def usearch_index(rows: Rows, distance: str) -> Index:
    """A usearch HNSW graph (Malkov and Yashunin, arXiv:1603.09320)."""
    module = _module("usearch.index", "usearch")
    metric = {"cosine": "cos", "dot": "ip"}.get(distance, "l2sq")
    graph = module.Index(ndim=rows.width, metric=metric, dtype="f32")
    for start, block in _blocks(rows):
        graph.add(np.arange(start, start + len(block)), block)

    def propose(queries: np.ndarray, n: int) -> np.ndarray:
        graph.expansion_search = max(64, 2 * n)
        found = graph.search(queries, n)
        keys = np.asarray(found.keys, np.int64).reshape(len(queries), -1)
        counts = np.asarray(getattr(found, "counts", [keys.shape[1]])).reshape(-1, 1)
        return np.where(np.arange(keys.shape[1])[None, :] < counts, keys, -1)

    return propose


def faiss_index(rows: Rows, distance: str) -> Index:
    """A FAISS HNSW graph, of unit vectors for cosine."""
    module = _module("faiss", "faiss-cpu")
    metric = module.METRIC_INNER_PRODUCT if distance == "dot" else module.METRIC_L2
    graph = module.IndexHNSWFlat(rows.width, 32, metric)
    for _, block in _blocks(rows):
        graph.add(_unit(block) if distance == "cosine" else block)

    def propose(queries: np.ndarray, n: int) -> np.ndarray:
        graph.hnsw.efSearch = max(64, 2 * n)
        queries = np.ascontiguousarray(_unit(queries) if distance == "cosine" else queries)
        return graph.search(queries, n)[1]

    return propose


INDEXES = {"usearch": usearch_index, "faiss": faiss_index}


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact answers that were found, from two [q, k] of rows (-1 for none).

    >>> recall(np.array([[3, 1], [5, -1]]), np.array([[3, 2], [5, -1]]))
    0.6666666666666666
    """
    hit = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, exact, strict=True))
    return hit / max(1, int((exact >= 0).sum()))


def _blocks(rows: Rows) -> Any:
    step = max(1, 2**24 // max(4, 4 * rows.width))
    for start in range(0, len(rows), step):
        block = np.empty((min(step, len(rows) - start), rows.width), np.float32)
        rows.read(start, block)
        if not np.isfinite(block).all():
            bad = start + int(np.argmin(np.isfinite(block).all(axis=1)))
            raise UserError(f"{rows.name} row {bad} is not finite: remove it or mend its source")
        yield start, block


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"approximate search needs the package {package}: pip install {package}"
        ) from error
