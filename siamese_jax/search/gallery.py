"""A gallery that is searched more than once: prepared, grown, thinned out, saved."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from siamese_jax.data.embedded import Embedded
from siamese_jax.data.labels import Codebook, as_ids, joined, kind_of
from siamese_jax.errors import UserError
from siamese_jax.search import export
from siamese_jax.search.engine import device_program, operands
from siamese_jax.search.engine.approximate_index import INDEXES, Index
from siamese_jax.search.engine.blocks import Blocks, padded
from siamese_jax.search.engine.operands import Frame
from siamese_jax.search.engine.rows import Rows, as_rows
from siamese_jax.storage.json_files import json_text

log = logging.getLogger(__name__)
_FORMAT = 1
_FILES = {"vectors.npy", "ids.npy", "manifest.json"}
# Prepared copies larger than this are made anew for every search instead of being kept.
_RESIDENT = 2 * 2**30


class Gallery:
    """Vectors with ids, prepared once for all the searches to come.

    `rank` and `range_search` take it where they take an array. Row numbers never change while
    the object lives: `add` appends rows, `remove` leaves them out of all answers but keeps their
    number, so `gallery.ids[ranking.indices]` is always right. `save` drops removed rows.

    Rows of equal ids are views of one item: a query with that id finds none of them, `remove`
    takes all of them, and `add` adds one more.

    Args:
      vectors: [g, d] real: a NumPy array, a memory map, a JAX array, or a list of such shards;
        or `Embedded`, with its ids. They are not copied, and must not be changed afterwards.
      ids: [g] integers, strings or bytes (`siamese_jax.data.labels`), row numbers by default.
      resident: whether the prepared copy (centred, as the matrix product takes it) stays in
        memory; by default where it has at most 2 GiB.

    Raises:
      UserError: shapes do not match, or an id is no integer, string or bytes.

    >>> gallery = Gallery([[0.0, 1.0], [2.0, 0.0]], ids=[70, 71])
    >>> gallery.add([[0.0, 3.0]], ids=[72])
    >>> gallery.remove([71])
    1
    >>> from siamese_jax import rank
    >>> gallery.ids[rank([[2.0, 0.0]], gallery, k=1).indices].tolist()
    [[70]]
    """

    def __init__(self, vectors: Any, ids: ArrayLike | None = None, *, resident: bool | None = None):
        if isinstance(vectors, Embedded):
            vectors, ids = vectors.vectors, vectors.ids if ids is None else ids
        self.rows = as_rows(vectors, "gallery")
        n = len(self.rows)
        self.ids = np.arange(n) if ids is None else as_ids(ids, n, "gallery_ids")
        self.there: np.ndarray | None = None
        self.resident = resident
        self._forget()

    def _forget(self) -> None:
        self._blocks: dict[tuple, Blocks] = {}
        self._slabs: dict[tuple, device_program.Slab] = {}
        self._indexes: dict[tuple[str, str], Index] = {}
        self._origins: dict[str, np.ndarray] = {}
        self._book: Codebook | None = None

    def __len__(self) -> int:
        """How many rows there are to be found."""
        return len(self.rows) if self.there is None else int(self.there.sum())

    def add(self, vectors: Any, ids: ArrayLike | None = None) -> None:
        """Appends rows [n, d]; their ids are the row numbers by default.

        Raises:
          UserError: another width, ids of another kind, or row numbers that are ids already.
        """
        if isinstance(vectors, Embedded):
            vectors, ids = vectors.vectors, vectors.ids if ids is None else ids
        new = as_rows(vectors, "gallery")
        if new.width != self.rows.width:
            raise UserError(f"rows of width {new.width} do not fit a gallery of {self.rows.width}")
        start, n = len(self.rows), len(new)
        added = np.arange(start, start + n) if ids is None else as_ids(ids, n, "gallery_ids")
        if self.book.kind not in ("", kind_of(added)) and n:
            raise UserError(
                f"ids that are {kind_of(added)} do not fit a gallery with ids that are "
                f"{self.book.kind}"
            )
        known = self.book.of(added) >= 0
        if ids is None and known.any():
            raise UserError(
                f"the row number {added[known][0]} is the id of another row: give the new rows ids"
            )
        self.ids = joined(self.ids, added)
        if self.there is not None:
            self.there = np.concatenate([self.there, np.ones(n, bool)])
        self.rows = Rows([*self.rows.shards, *new.shards], "gallery")
        self._forget()

    def remove(self, ids: ArrayLike) -> int:
        """Leaves out all rows with one of these ids, and returns how many there were.

        Raises:
          UserError: an id is not in the gallery.
        """
        which: Any = [ids] if np.ndim(ids) == 0 else ids
        unwanted = as_ids(which, len(which), "the ids to remove")
        there = np.ones(len(self.rows), bool) if self.there is None else self.there
        number = self.book.of(unwanted, "the ids to remove")
        lost = ~np.isin(number, self.book.own[there])
        if lost.any():
            raise UserError(f"id {unwanted[lost].tolist()[0]!r} is not in the gallery")
        gone = np.isin(self.book.own, number) & there
        self.there = there & ~gone
        self._forget()
        return int(gone.sum())

    @property
    def book(self) -> Codebook:
        """The numbers of the rows' ids."""
        if self._book is None:
            self._book = Codebook(self.ids)
        return self._book

    def codes(self, query_ids: ArrayLike | None, q: int) -> tuple[np.ndarray, np.ndarray] | None:
        """int32 codes of queries [q] and rows [g], equal where the ids are."""
        if query_ids is None:
            return None
        return self.book.of(as_ids(query_ids, q, "query_ids")), self.book.own

    def frame(self, distance: str, precision: str) -> Frame:
        """What scores have in common, with the origin at the mean of some rows."""
        if distance not in self._origins:
            self._origins[distance] = _origin(self.rows, distance)
        return Frame(distance, precision, self.rows.width, self._origins[distance])

    def blocks(self, frame: Frame, there: np.ndarray | None, size: int, exclude: bool) -> Blocks:
        """The gallery's side of the product, prepared before where that is kept."""
        code = self.book.own if exclude else None
        if not self.keeps(frame) or there is not self.there:
            return Blocks(self.rows, there, code, frame, size)
        key = (frame.distance, frame.precision, size, exclude)
        if key not in self._blocks:
            self._blocks[key] = Blocks(self.rows, there, code, frame, size)
        return self._blocks[key].keep()

    def slab(
        self, mesh: Mesh, start: int, size: int, there: np.ndarray | None
    ) -> device_program.Slab:
        """Rows start : start + size on the mesh's devices."""
        code = None if self._book is None else self._book.own
        key = ("slab", mesh, start, size, code is not None)
        if there is self.there and key in self._slabs:
            return self._slabs[key]
        d = self.rows.width
        block = np.zeros((size, operands.padded_width(d)), np.float32)
        with np.errstate(over="ignore"):
            count = self.rows.read(start, block)
        here, codes = padded(start, size, count, there, code, -1)
        slab = device_program.Slab(*(device_program.place(mesh, v) for v in (block, here, codes)))
        if there is self.there and self.keeps(Frame("", "float32", d, block[0])):
            self._slabs[key] = slab
        return slab

    def index(self, library: str, distance: str) -> Index:
        """The graph index of an approximate search, built when first asked for."""
        if (library, distance) not in self._indexes:
            self._indexes[library, distance] = INDEXES[library](self.rows, distance)
        return self._indexes[library, distance]

    @property
    def at_hand(self) -> bool:
        """Whether a pass over the rows as they are costs little more than one over a prepared copy:
        they are in memory, or there is no such copy."""
        return self.resident is False or not self.rows.mapped

    def keeps(self, frame: Frame) -> bool:
        """Whether the prepared copy stays in memory."""
        if self.resident is None:
            return len(self.rows) * operands.row_bytes(frame.width, frame.precision) <= _RESIDENT
        return self.resident

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `vectors.npy`, `ids.npy` and `manifest.json` into a folder, all or nothing.

        Removed rows are left out; the vectors are written as float32, a block at a time.

        Raises:
          UserError: the folder exists and holds something else than a gallery, or ids are such as
            no NumPy file holds.
        """
        folder = Path(os.path.realpath(folder))
        if self.ids.dtype.kind == "O":
            raise UserError(
                "some ids end in a NUL character or have more than 64 bits, which NumPy's files do "
                "not hold: give the gallery others to save it"
            )
        if folder.exists() and not {p.name for p in folder.iterdir()} <= _FILES:
            raise UserError(
                f"{folder} holds no gallery, or something else as well: give another folder"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        alive = np.arange(len(self.rows)) if self.there is None else np.flatnonzero(self.there)
        vectors = np.lib.format.open_memmap(
            part / "vectors.npy", mode="w+", dtype=np.float32, shape=(len(alive), self.rows.width)
        )
        step = max(1, 2**24 // max(4, 4 * self.rows.width))
        for at in range(0, len(alive), step):
            vectors[at : at + step] = self.rows.take(alive[at : at + step])
        vectors.flush()
        del vectors
        np.save(part / "ids.npy", self.ids[alive])
        manifest = {
            "format": _FORMAT,
            "rows": len(alive),
            "width": self.rows.width,
            "dtype": "float32",
            "sha256": {name: _sha256(part / name) for name in ("vectors.npy", "ids.npy")},
        }
        (part / "manifest.json").write_text(json_text(manifest, indent=2) + "\n")
        former = _former(folder)
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
        part.rename(folder)
        shutil.rmtree(former, ignore_errors=True)

    def export(
        self,
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
        """Writes the rows for what others serve from; formats: `siamese_jax.search.export`.

        Removed rows are left out, and the others numbered through. A file that is there is
        replaced, a LanceDB table never. The extra `export` installs what all formats but "lance"
        need, the extra `lance` what that one needs.

        Args:
          path: the file, or for "lance" the folder; PATH.json beside it says how to ask it.
          format: one of `siamese_jax.search.export.FORMATS`; by default as the name ends.
          distance: what it will be asked by; an index is made for one distance.
          k: of recall@k, which an index is measured by.
          queries: [q, d] to measure it with; by default `sample` of the rows, evenly spread, each
            of which is not among its own neighbours.
          sample: how many.
          columns: name -> one value for each row of the gallery, removed ones included.
          **parameters: of an index, as FORMATS lists them: `neighbours=64`, `probes=32`.

        Returns:
          What PATH.json holds: {"recall": {"k": 10, "value": 0.99, ...}, "parameters": ..., ...}.

        Raises:
          UserError: a library is not installed (the line says which), an unknown format, distance
            or parameter, a row that is not finite, or a folder that is there already.
        """
        return export.export(
            self,
            path,
            format,
            distance=distance,
            k=k,
            queries=queries,
            sample=sample,
            columns=columns,
            **parameters,
        )

    @classmethod
    def load(
        cls, folder: str | os.PathLike, *, resident: bool | None = None, verify: bool = False
    ) -> "Gallery":
        """Opens what `save` wrote, as a memory map.

        Args:
          folder: the folder.
          resident: as for `Gallery`.
          verify: whether to compare the sha256 of the vectors with the manifest, which reads them
            whole; that of the ids is always compared.

        Raises:
          UserError: a file is missing, or is not what the manifest says.
        """
        folder = Path(folder)
        if not folder.exists() and _former(folder).exists():  # a `save` was killed at its renaming
            log.warning("%s was not saved whole; the gallery that was there is taken", folder)
            folder = _former(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            shape, sums = (manifest["rows"], manifest["width"]), dict(manifest["sha256"])
            vectors = np.load(folder / "vectors.npy", mmap_mode="r")
            ids = np.load(folder / "ids.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no readable gallery: {error}") from error
        if manifest.get("format") != _FORMAT:
            raise UserError(f"{folder} has gallery format {manifest.get('format')}, not {_FORMAT}")
        if vectors.shape != shape or ids.shape != shape[:1]:
            raise UserError(
                f"{folder} holds vectors {vectors.shape} and ids {ids.shape}, but its manifest "
                f"says {shape}: save it again"
            )
        for name, value in sums.items():
            if (verify or name != "vectors.npy") and _sha256(folder / name) != value:
                raise UserError(
                    f"{folder / name} is not the file its manifest names: save it again"
                )
        return cls(vectors, ids, resident=resident)


def _origin(rows: Rows, distance: str) -> np.ndarray:
    """The mean of up to 256 rows, spread evenly over the gallery, or 0 where it is as good:
    float32 [padded d]."""
    d = rows.width
    origin = np.zeros(operands.padded_width(d), np.float32)
    if len(rows):
        sample = np.unique(np.linspace(0, len(rows) - 1, min(256, len(rows))).astype(np.int64))
        with np.errstate(over="ignore", invalid="ignore"):
            x = rows.take(sample).astype(np.float64)
            if distance == "cosine":
                norm = np.sqrt(np.einsum("nd,nd->n", x, x))[:, None]
                x = x / np.where(norm > 0, norm, 1)
            mean = x.mean(axis=0)
            # Near 0 it makes no number smaller to speak of.
            if np.dot(mean, mean) < 0.01 * np.vecdot(x, x).mean():
                mean = np.zeros(d)
        # A row that is not finite is reported by its number when its block is read.
        if np.dot(mean, mean) <= operands.LONGEST**2:
            origin[:d] = mean
    rows.release()
    return origin


def _former(folder: Path) -> Path:
    """Where `save` keeps what was there before, until the new one is in its place."""
    return folder.with_name(f".{folder.name}.former")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
