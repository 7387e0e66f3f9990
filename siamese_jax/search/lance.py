"""A gallery whose home is a LanceDB table: more rows than memory holds, on a disk, no server.

`Gallery.export("shop.lance", distance=...)` writes the table a block at a time, and
`rank(queries, "lance://shop.lance", k)` searches it. `lance://` is followed by the path of the
table's own folder, which is NAME.lance inside the folder that LanceDB calls a database.

`rank` promises the exact answer, so by default it asks no index: it reads the table once for all
queries, a block at a time, and searches each block as any gallery. With `approximate="lance"`
LanceDB is asked for candidates, a query at a time: `MORE` times as many as are wanted, and at least
`LEAST`. These are measured exactly and sorted as ever. Where the table has an index for the
distance (make one with LanceDB's `create_index`) items may be missing; where it has none, LanceDB
looks at all rows, and only rounding to float32 can hide one, behind all those candidates.
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from siamese_jax.data.labels import as_ids, kind_of
from siamese_jax.errors import UserError, naming
from siamese_jax.search.engine import exact, order
from siamese_jax.search.engine.approximate_index import library
from siamese_jax.search.engine.rows import Rows
from siamese_jax.storage.writing import SAFE

log = logging.getLogger(__name__)
SCHEME, SUFFIX = "lance://", ".lance"
FACTS = b"siamese_jax"  # what a table's schema says of it is under this key
METRICS = {"euclidean": "l2", "sqeuclidean": "l2", "cosine": "cosine", "dot": "dot"}
MORE, LEAST = 10, 64  # candidates for each neighbour that is wanted, and for a query
# Bytes that are read at once; and those that Lance reads ahead, of which it takes up to 2 GiB.
_READ = 2**22
_AHEAD = {"LANCE_DEFAULT_IO_BUFFER_SIZE": str(2**25)}
Block = tuple[np.ndarray, np.ndarray, np.ndarray | None]
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def names_home(gallery: Any) -> bool:
    """Whether a gallery is a table, or the name of one: `lance://...`."""
    return isinstance(gallery, LanceTable) or (
        isinstance(gallery, str) and gallery.startswith(SCHEME)
    )


class LanceTable:
    """A table that `Gallery.export` wrote, opened to be searched by `rank`.

    Row numbers are those of its column `row`. Rows may be deleted with LanceDB, which leaves the
    numbers of the others as they are; rows that others add have no number, and are refused.

    Args:
      where: the table's folder, with or without `lance://`.

    Attributes:
      width: d.
      distance: what it was exported for; `rank` takes it by default.
      table: LanceDB's own.

    Raises:
      UserError: there is no such table, or it is not one of ours, or lancedb is not installed.
    """

    def __init__(self, where: str | os.PathLike):
        folder = Path(os.fspath(where).removeprefix(SCHEME)).expanduser()
        self.name = folder.name
        if folder.suffix != SUFFIX or not folder.is_dir():
            raise UserError(
                f"{folder} is no LanceDB table: give the folder NAME{SUFFIX} of one, as in "
                f"{SCHEME}shop{SUFFIX}"
            )
        self.table = _connect(folder.absolute().parent).open_table(folder.stem)
        facts = (self.table.schema.metadata or {}).get(FACTS)
        if facts is None:
            raise UserError(
                f"{folder} does not number its rows: write it with Gallery.export, which does"
            )
        facts = json.loads(facts)
        self.width, self.distance, self._count = (facts[n] for n in ("dims", "distance", "count"))

    def __len__(self) -> int:
        """How many rows it was written with."""
        return self._count

    def index(self, distance: str) -> str | None:
        """The kind of an index of the vectors for a distance, or None."""
        for index in self.table.list_indices():
            if index.columns == ["vector"]:
                stats = self.table.index_stats(index.name)
                if stats is not None and stats.distance_type == METRICS[distance]:
                    return str(index.index_type)
        return None

    def column(self, name: str) -> np.ndarray:
        """A column [n] in the order of the row numbers; with None where a row was deleted.

        `table.column("id")[ranking.indices]` are the ids that were found.
        """
        parts = [(b["row"].to_numpy(), b[name].to_pylist()) for b in self._batches([name], 65536)]
        values: dict[int, Any] = {}
        for rows, held in parts:
            values.update(zip(rows.tolist(), held, strict=True))
        whole = [values.get(row) for row in range(len(self))]
        if len(values) == len(self) and name == "id":
            return as_ids(whole, len(self))
        return np.fromiter(whole, object, len(whole)) if None in whole else np.array(whole)

    def blocks(self, memory: int, *, ids: bool = False) -> Iterator[Block]:
        """Row numbers int64 [n], vectors float32 [n, d], ids [n] if they are asked for; the memory
        of a block is used again for the next.

        Args:
          memory: bytes that a block's vectors may have.
          ids: whether to read them.
        """
        row = max(4, 4 * self.width)
        room = max(1, min(len(self), memory // row))
        vectors, rows = np.empty((room, self.width), np.float32), np.empty(room, np.int64)
        own: list[Any] = []
        names, n = (["id", "vector"] if ids else ["vector"]), 0
        for batch in self._batches(names, max(1, min(_READ, memory) // row)):
            at = 0
            while at < batch.num_rows:
                part = batch.slice(at, room - n)
                here = slice(n, n + part.num_rows)
                rows[here], vectors[here] = part["row"].to_numpy(), self._matrix(part["vector"])
                own += part["id"].to_pylist() if ids else []
                at, n = at + part.num_rows, here.stop
                if n == room:
                    yield self._block(rows[:n], vectors[:n], own if ids else None)
                    n, own = 0, []
        if n:
            yield self._block(rows[:n], vectors[:n], own if ids else None)

    def _block(self, rows: np.ndarray, vectors: np.ndarray, own: list[Any] | None) -> Block:
        """The rows in the order of their numbers, which a table may have lost."""
        ids = None if own is None else as_ids(own, len(rows))
        if (np.diff(rows) < 0).any():
            at = np.argsort(rows)
            rows, vectors, ids = rows[at], vectors[at], None if ids is None else ids[at]
        return rows, vectors, ids

    def _batches(self, names: list[str], size: int) -> Iterator[Any]:
        query = self.table.search().select(["row", *names])
        for batch in query.to_batches(size):
            if not batch.num_rows:
                continue
            rows = batch["row"]
            if rows.null_count or not 0 <= rows.to_numpy().max() < len(self):
                raise UserError(
                    f"{self.name} has rows that were added after its export, and have no number: "
                    "export the gallery again"
                )
            yield batch

    def _matrix(self, column: Any) -> np.ndarray:
        """A column of vectors as float32 [n, d], without a copy."""
        if column.null_count:
            raise UserError(f"{self.name} has a row without a vector: export the gallery again")
        return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.width)

    def nearest_proposed(
        self, asked: Rows, wanted: np.ndarray, distance: str, query_ids: np.ndarray | None
    ) -> Iterator[tuple]:
        """The first of what LanceDB proposes to each query: (i, place, j, distance) arrays.

        By cosine LanceDB finds nothing for a zero vector, and never proposes one.
        """
        kind = self.index(distance)
        which = f"its index {kind}" if kind else "a look at all rows, as no index is for this"
        n = min(len(self), max(LEAST, MORE * int(wanted.max(initial=0))))
        log.info("%s: %s gives %d candidates a query, measured exactly", self.name, which, n)
        for i, row in enumerate(asked.take(np.arange(len(asked)))):
            query = self.table.search(row, vector_column_name="vector")
            query = query.distance_type(METRICS[distance]).limit(n)
            if query_ids is not None:
                its_own = _literal(query_ids[i : i + 1].tolist()[0])
                query = query.where(f"id != {its_own}", prefilter=True)
            found = query.select(["row", "vector", "_distance"]).to_arrow().combine_chunks()
            j = found["row"].to_numpy().astype(np.int32)
            if not len(j):
                continue
            near = Rows([self._matrix(found["vector"].chunk(0))], "gallery")
            pair = np.zeros(len(j), np.int32), np.arange(len(j))
            away = exact.pair_distances(asked.take(np.array([i])), near, *pair, distance)
            _, place, j, away = order.first(pair[0], j, away, wanted[i : i + 1])
            yield np.full(len(j), i), place, j, away

    def check_ids(self, query_ids: np.ndarray) -> None:
        """UserError where ids are of another kind than the table's."""
        held = str(self.table.schema.field("id").type)
        own = {"string": "strings", "binary": "bytes"}.get(held, "whole numbers")
        if len(query_ids) and kind_of(query_ids) != own:
            raise UserError(
                f"query_ids are {kind_of(query_ids)} and the ids of {self.name} {own}: they do not "
                "match"
            )


def open_home(gallery: Any) -> LanceTable:
    """The table that `names_home` found."""
    return gallery if isinstance(gallery, LanceTable) else LanceTable(gallery)


def check_place(folder: str | os.PathLike) -> Path:
    """Where a table can be written; UserError where it cannot."""
    target = Path(os.path.realpath(Path(folder).expanduser()))
    if target.suffix != SUFFIX or not _NAME.fullmatch(target.stem):
        raise UserError(
            f"{target.name!r}: name a LanceDB table NAME{SUFFIX}, of letters, digits, _, - and ."
        )
    if target.exists():
        raise UserError(f"{folder} is there already: remove it, or choose another name")
    return target


def write(folder: str | os.PathLike, schema: Any, batches: Iterable[Any]) -> None:
    """Writes record batches as a table, all or nothing, one in memory at a time.

    Args:
      folder: NAME.lance, which must not be there.
      schema: of pyarrow, with the facts under `FACTS`.
      batches: of pyarrow.
    """
    target = check_place(folder)
    part = target.with_name(f".{uuid.uuid4().hex[:12]}.part")
    failed: list[BaseException] = []

    def given() -> Iterator[Any]:
        try:
            yield from batches
        except BaseException as error:  # LanceDB would raise another in its place
            failed.append(error)
            raise

    with naming(folder, SAFE):
        try:
            part.mkdir(parents=True)
            try:
                _connect(part).create_table(target.stem, data=given(), schema=schema)
            except Exception:
                if failed:
                    raise failed[0] from None
                raise
            os.rename(part / target.name, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _connect(folder: Path) -> Any:
    for name, value in _AHEAD.items():
        os.environ.setdefault(name, value)
    return library("lancedb", "lancedb", "a gallery in LanceDB").connect(str(folder))


def _literal(value: Any) -> str:
    """An id as SQL has it."""
    if isinstance(value, bytes):
        return f"X'{value.hex()}'"
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"
