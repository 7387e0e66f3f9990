"""A gallery written for what others serve from: FAISS, usearch, Parquet, LanceDB.

    faiss_hnsw   .faiss       a graph; labels are row numbers
    faiss_ivf    .ivf.faiss   lists around centres
    usearch      .usearch     a graph; keys are row numbers
    parquet      .parquet     a table with the vectors as fixed-size lists
    lance        .lance       the same as a LanceDB table, which `rank` searches too

A table has the columns row, id, vector and what else is given. An index holds numbers only, so
row, id and the others lie beside it in NAME.csv. NAME.json, written last, says of each format how
to ask it; and of an index its recall@k against the exact answer, with the parameters that gave it.
"""

import csv
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from siamese_jax.data.labels import kind_of
from siamese_jax.distances import check
from siamese_jax.errors import UserError
from siamese_jax.search import lance
from siamese_jax.search.engine import approximate_index as graphs
from siamese_jax.search.engine import cpu, order
from siamese_jax.search.engine.checked_rows import at_least_one
from siamese_jax.search.engine.request import Search
from siamese_jax.storage.json_files import json_text, write_json
from siamese_jax.storage.writing import written

_MEMORY = 2**28  # for the exact answers that an index is measured by
OWN = ("row", "id", "vector")  # columns that every table has
# How a distance follows from the score that an index gives.
SCORES = {
    "faiss": {
        "euclidean": "the square of the distance",
        "sqeuclidean": "the distance",
        "cosine": "1 - the distance, for queries of length 1",
        "dot": "the distance negated",
    },
    "usearch": {
        "euclidean": "the square of the distance",
        "sqeuclidean": "the distance",
        "cosine": "the distance",
        "dot": "the distance + 1",
    },
}
_L2 = {
    "LanceDB": "l2",
    "DuckDB": "array_distance",
    "pgvector": "<->",
    "Qdrant": "Euclid",
}
# What those who read a table are to be asked to compare by.
METRICS = {
    "euclidean": _L2,
    "sqeuclidean": _L2,
    "cosine": {
        "LanceDB": "cosine",
        "DuckDB": "array_cosine_distance",
        "pgvector": "<=>",
        "Qdrant": "Cosine",
    },
    "dot": {
        "LanceDB": "dot",
        "DuckDB": "array_negative_inner_product",
        "pgvector": "<#>",
        "Qdrant": "Dot",
    },
}


class Source:
    """The rows of a gallery that are there, numbered through, with what belongs to them.

    Attributes:
      which: int64 [n], their rows in the gallery.
      ids: [n].
      columns: of n values each.
      digest: sha256 of the vectors as little-endian float32, once `blocks` has ended.
    """

    def __init__(self, gallery: Any, distance: str, columns: Mapping[str, Any] | None):
        self.gallery, self.distance = gallery, check(distance)
        there = gallery.there
        self.which = np.arange(len(gallery.rows)) if there is None else np.flatnonzero(there)
        if not len(self.which):
            raise UserError("the gallery has no rows to export")
        self.width: int = gallery.rows.width
        self.ids = gallery.ids[self.which]
        self.columns: dict[str, list[Any]] = {}
        for name, values in (columns or {}).items():
            values = values.tolist() if isinstance(values, np.ndarray) else list(values)
            if name in OWN or len(values) != len(gallery.rows):
                raise UserError(
                    f"columns: {name!r} must have another name than {', '.join(OWN)}, and "
                    f"{len(gallery.rows)} values, one for each row; it has {len(values)}"
                )
            self.columns[name] = [values[row] for row in self.which]
        self.digest = ""

    def __len__(self) -> int:
        return len(self.which)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 [n, d]), checked."""
        digest = hashlib.sha256()
        for start, block in graphs.checked_blocks(self.gallery.rows, self.which):
            digest.update(block.astype("<f4", copy=False).tobytes())
            yield start, block
        self.digest = digest.hexdigest()


class Index(NamedTuple):
    """A built index: (queries float32 [q, d], n) -> rows int64 [q, n], -1 for none; and how it is
    written to a file."""

    ask: Callable[[np.ndarray, int], np.ndarray]
    save: Callable[[IO[bytes]], None]


class Format(NamedTuple):
    """One way to write a gallery.

    Attributes:
      suffix: of its files.
      libraries: (module, package) that it needs.
      build: of an index: (source, **parameters) -> Index; else None.
      write: of a table: (path, source); else None.
      parameters: those of `build`, with their defaults; None is worked out from the gallery.
    """

    suffix: str
    libraries: tuple[tuple[str, str], ...]
    build: Callable[..., Index] | None = None
    write: Callable[[str, Source], None] | None = None
    parameters: Mapping[str, int | None] = {}


def export(
    gallery: Any,
    path: str | os.PathLike,
    format: str | None = None,
    *,
    distance: str,
    k: int = 10,
    queries: Any = None,
    sample: int = 1000,
    columns: Mapping[str, Any] | None = None,
    **parameters: int,
) -> dict[str, Any]:
    """`siamese_jax.search.gallery.Gallery.export`, which says all of it."""
    path, name = os.path.expanduser(os.fspath(path)), named(path, format)
    check_ready(path, name)
    kind, source = FORMATS[name], Source(gallery, distance, columns)
    at_least_one(k=k, sample=sample, **parameters)
    facts = {
        "format": name,
        "file": Path(path).name,
        "distance": distance,
        "count": len(source),
        "dims": source.width,
        "ids": kind_of(source.ids),
    }
    if kind.build is None:
        if parameters:
            raise UserError(f"{name} has no parameters, but {', '.join(parameters)} is given")
        assert kind.write is not None
        kind.write(path, source)
        facts["metrics"] = METRICS[distance]
    else:
        chosen = _chosen(name, source, parameters)
        index = kind.build(source, **chosen)
        part = name.partition("_")[0]
        facts |= {
            "metric": graphs.METRICS[part][distance],
            "score": SCORES[part][distance],
            "rows": "of length 1" if (part, distance) == ("faiss", "cosine") else "as they are",
            "labels": f"row numbers, of {Path(path).name}.csv",
            "parameters": chosen,
            "recall": _recall(source, index, k, queries, sample),
        }
        with written(path, "wb") as file:
            index.save(file)
            Path(f"{path}.json").unlink(missing_ok=True)  # it is of the index that now goes
        _write_csv(f"{path}.csv", source)
    facts |= {"vectors_sha256": source.digest, "versions": _versions(kind)}
    write_json(f"{path}.json", facts)
    return facts


def named(path: str | os.PathLike, format: str | None = None) -> str:
    """The format of a file's name, or the one that is given. UserError where there is none."""
    if format is not None:
        if format not in FORMATS:
            raise UserError(f"format={format!r} is unknown: use one of {', '.join(FORMATS)}")
        return format
    fitting = [n for n, f in FORMATS.items() if os.fspath(path).lower().endswith(f.suffix)]
    if not fitting:
        suffixes = ", ".join(f.suffix for f in FORMATS.values())
        raise UserError(f"{path}: the name must end in one of {suffixes}, or give a format")
    return max(fitting, key=lambda name: len(FORMATS[name].suffix))


def check_ready(path: str | os.PathLike, format: str | None = None) -> None:
    """UserError for a library that is not installed or a table that is there: before the work."""
    name = named(path, format)
    for module, package in FORMATS[name].libraries:
        graphs.library(module, package, f"the format {name}")
    if name == "lance":
        lance.check_place(path)


# --- the indexes -----------------------------------------------------------------------------


def _usearch(source: Source, **parameters: int) -> Index:
    graph = graphs.usearch_graph(source.blocks(), source.width, source.distance, **parameters)

    def save(file: IO[bytes]) -> None:
        try:
            graph.save(file.name)  # of the draft that takes the place of the old file
        except RuntimeError as error:  # usearch does not say what the system said
            raise UserError(
                f"usearch could not write its index ({error}): see that the disk has room"
            ) from None

    return Index(functools.partial(graphs.ask_usearch, graph), save)


def _faiss_hnsw(source: Source, **parameters: int) -> Index:
    graph = graphs.faiss_graph(source.blocks(), source.width, source.distance, **parameters)
    return _of_faiss(graph, source.distance)


def _faiss_ivf(source: Source, *, lists: int, probes: int) -> Index:
    faiss = graphs.library("faiss", "faiss-cpu")
    metric = getattr(faiss, graphs.METRICS["faiss"][source.distance])
    index = faiss.IndexIVFFlat(faiss.IndexFlat(source.width, metric), source.width, lists, metric)
    most = min(len(source), index.cp.max_points_per_centroid * lists)
    some = source.which[np.linspace(0, len(source) - 1, most).astype(np.int64)]
    rows = [block for _, block in graphs.checked_blocks(source.gallery.rows, some)]
    index.train(graphs.for_faiss(np.concatenate(rows), source.distance))
    for _, block in source.blocks():
        index.add(graphs.for_faiss(block, source.distance))
    index.nprobe = probes
    return _of_faiss(index, source.distance)


def _of_faiss(index: Any, distance: str) -> Index:
    faiss = graphs.library("faiss", "faiss-cpu")

    def ask(queries: np.ndarray, n: int) -> np.ndarray:
        return index.search(graphs.for_faiss(queries, distance), n)[1]

    return Index(ask, lambda file: faiss.write_index(index, faiss.PyCallbackIOWriter(file.write)))


def _chosen(name: str, source: Source, given: Mapping[str, int]) -> dict[str, int]:
    """An index's parameters: those given, the defaults, and what follows from the gallery."""
    known = FORMATS[name].parameters
    if unknown := [n for n in given if n not in known]:
        raise UserError(f"{name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    chosen: dict[str, Any] = {**known, **given}
    if "lists" in chosen and chosen["lists"] is None:
        # Four roots of n is usual; FAISS wants 39 rows for each centre.
        chosen["lists"] = max(1, min(int(4 * len(source) ** 0.5), len(source) // 39))
    if "lists" in chosen and chosen["lists"] > len(source):
        raise UserError(f"lists={chosen['lists']}: the gallery has {len(source)} rows")
    return chosen


def _recall(
    source: Source, index: Index, k: int, queries: Any, sample: int
) -> dict[str, Any] | None:
    """The share of each query's k nearest that an index finds; None of a single row.

    A row that is as near as the k-th is as good as it: copies are no misses."""
    rows, n = source.gallery.rows, len(source)
    own = None
    if queries is None:
        own = np.unique(np.linspace(0, n - 1, min(sample, n)).astype(np.int64))
        queries = rows.take(source.which[own])
    search = Search(queries, source.gallery, source.distance, None, None, _MEMORY)
    q, more = len(search.queries), int(own is not None)
    k = min(k, n - more)
    if not k:  # one row, which has no other for a neighbour
        return None
    if not q:
        raise UserError("queries: give at least one to measure recall with, or none for a sample")
    wanted = np.full(q, k + more)
    best = np.full((q, k + more), np.inf, np.float32)
    for i, place, j, away in cpu.nearest(search, wanted, k + more, "float32", True):
        if own is not None:
            away = np.where(j == source.which[own[i]], np.inf, away)
        best[i, place] = away
    kth = np.sort(best, axis=1)[:, k - 1]
    found = index.ask(search.queries, k + more)
    i, place = np.nonzero(found >= 0 if own is None else (found >= 0) & (found != own[:, None]))
    i, j = i.astype(np.int32), source.which[found[i, place]]
    i, _, _, away = order.first(i, j.astype(np.int32), search.away(0, i, j), np.full(q, k))
    return {
        "k": k,
        "value": float((away <= kth[i]).sum() / (q * k)),
        "queries": q,
        "of": "given queries"
        if own is None
        else "rows of the gallery, evenly spread, each without itself",
    }


def _write_csv(path: str, source: Source) -> None:
    """Beside an index: what its labels stand for. Ids that are bytes are in hexadecimal."""
    with written(path, newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "id", *source.columns])
        ids = (i.hex() if isinstance(i, bytes) else i for i in source.ids.tolist())
        writer.writerows(zip(range(len(source)), ids, *source.columns.values(), strict=True))


# --- the tables ------------------------------------------------------------------------------


def _batches(source: Source) -> tuple[Any, Iterator[Any]]:
    """(schema, record batches) of pyarrow, a block of rows in memory at a time."""
    pa = graphs.library("pyarrow", "pyarrow", "a table")
    try:
        ids = source.ids
        held = {"id": pa.array(ids if ids.dtype.kind in "iu" else ids.tolist())}
        held |= {name: pa.array(values) for name, values in source.columns.items()}
    except (pa.ArrowException, UnicodeError, OverflowError) as error:
        raise UserError(f"an id or a column is such as no table holds: {error}") from None
    fields = [("row", pa.int64()), *((name, column.type) for name, column in held.items())]
    vectors = pa.list_(pa.float32(), source.width)
    facts = {"distance": source.distance, "count": len(source), "dims": source.width}
    schema = pa.schema(
        [*fields, ("vector", vectors)], metadata={lance.FACTS: json_text(facts).encode()}
    )

    def batches() -> Iterator[Any]:
        for start, block in source.blocks():
            n = len(block)
            columns = [pa.array(np.arange(start, start + n))]
            columns += [column.slice(start, n) for column in held.values()]
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), type=vectors))
            yield pa.record_batch(columns, schema=schema)

    return schema, batches()


def _write_parquet(path: str, source: Source) -> None:
    parquet = graphs.library("pyarrow.parquet", "pyarrow", "a table")
    schema, batches = _batches(source)
    names = [name for name in schema.names if name not in ("row", "vector")]
    with (
        written(path, "wb") as file,
        parquet.ParquetWriter(file, schema, use_dictionary=names) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def _write_lance(path: str, source: Source) -> None:
    lance.write(path, *_batches(source))


def _versions(kind: Format) -> dict[str, str]:
    packages = ["siamese-jax", *(package for _, package in kind.libraries)]
    return {package: metadata.version(package) for package in packages}


_FAISS, _USEARCH = ("faiss", "faiss-cpu"), ("usearch.index", "usearch")
_ARROW, _LANCE = ("pyarrow", "pyarrow"), ("lancedb", "lancedb")
FORMATS = {
    "faiss_hnsw": Format(
        ".faiss",
        (_FAISS,),
        _faiss_hnsw,
        parameters={"neighbours": 32, "construction": 40, "search": 64},
    ),
    "faiss_ivf": Format(
        ".ivf.faiss", (_FAISS,), _faiss_ivf, parameters={"lists": None, "probes": 16}
    ),
    "usearch": Format(
        ".usearch",
        (_USEARCH,),
        _usearch,
        parameters={"connectivity": 16, "expansion_add": 128, "expansion_search": 64},
    ),
    "parquet": Format(".parquet", (_ARROW,), write=_write_parquet),
    "lance": Format(lance.SUFFIX, (_LANCE, _ARROW), write=_write_lance),
}
SUFFIXES = tuple(kind.suffix for kind in FORMATS.values())
