"""An append-only store of vectors on disk, keyed by content: the cache of embeddings.

    <folder>/keys.bin      16 bytes a row
    <folder>/vectors.bin   the row's values, float32 or bfloat16
    <folder>/sums.bin      8 bytes a row, a checksum of both

Vectors are written and flushed before their sums, and these before their keys; a row counts only
when all three are whole: a process may be killed at any time and loses at most the block in flight.

    sum = c + w . (key, vector)  mod 2^64, over the 32-bit words of both   (Lemire and Kaser 2014)

with odd random weights w. It misses no single bit, and one other change in 2^32; the key is in it,
so rows and keys that were exchanged are noticed as well. A row whose sum is wrong is as good as
missing: it is said, and computed again.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from siamese_jax.storage.lock import lock

log = logging.getLogger(__name__)
KEY_BYTES, SUM_BYTES = 16, 8
_BLOCK = 2**22  # bytes of vectors that are checked at a time


class VectorStore:
    """Rows of one shape, found by key.

    Args:
      folder: created if needed.
      shape: of one row, e.g. (1280,).
      dtype: "float32", or "bfloat16" for rows of an even number of values.
    """

    def __init__(self, folder: str | Path, shape: tuple[int, ...], dtype: str = "float32"):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shape = tuple(shape)
        self.dtype = jnp.dtype(dtype)
        self.row_bytes = self.dtype.itemsize * math.prod(shape)
        words = (KEY_BYTES + self.row_bytes) // 4
        self._weights = np.random.PCG64(0).random_raw(words + 1) | np.uint64(1)
        self._rows: dict[bytes, int] = {}
        self._count, self._sound = 0, np.zeros(0, bool)  # of rows; which were checked
        with self._locked():
            self._repair()
        self._read_keys()

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, keys: list[bytes]) -> np.ndarray:
        """int64 [n]: the row of each key, -1 where it is missing or damaged.

        Each row is checked the first time that it is asked for.
        """
        found = np.array([self._rows.get(key, -1) for key in keys], np.int64)
        rows, first = np.unique(found[found >= 0], return_index=True)
        new = ~self._sound[rows]
        asked = [keys[i] for i in np.flatnonzero(found >= 0)[first[new]]]
        damaged = self._check(asked, rows[new])
        if not damaged:
            return found
        said = "%s: %d of %d rows are damaged; they are computed again"
        log.warning(said, self.folder, len(damaged), len(rows))
        self._rows = {key: row for key, row in self._rows.items() if row not in damaged}
        return np.where(np.isin(found, list(damaged)), -1, found)

    def vectors(self) -> np.ndarray:
        """[rows, *shape] of the store's type: a read-only memory map."""
        if not self._count:
            return np.zeros((0, *self.shape), self.dtype)
        return np.memmap(self._path("vectors"), self.dtype, "r", shape=(self._count, *self.shape))

    def append(self, keys: list[bytes], vectors: np.ndarray) -> None:
        """Adds rows; a key that is there already is skipped.

        Args:
          keys: n keys of 16 bytes.
          vectors: float [n, *shape], rounded to the store's type.
        """
        with self._locked():
            self._repair()  # Another process may have written, or died, meanwhile.
            self._read_keys()
            fresh = {key: i for i, key in enumerate(keys) if key not in self._rows}
            rows = np.ascontiguousarray(vectors[list(fresh.values())], self.dtype)
            self._write("vectors", rows.tobytes())
            self._write("sums", self._sums([*fresh], rows).tobytes())
            self._write("keys", b"".join(fresh))
        self._read_keys()

    def _sums(self, keys: list[bytes], vectors: np.ndarray) -> np.ndarray:
        """uint64 [n], the checksums of n keys and their vectors [n, *shape]."""
        key = np.frombuffer(b"".join(keys), "<u4").reshape(len(keys), KEY_BYTES // 4)
        row = np.ascontiguousarray(vectors).reshape(len(keys), math.prod(self.shape)).view("<u4")
        c, of_key, of_row = np.split(self._weights, [1, 1 + key.shape[1]])
        return c + np.einsum("nd,d->n", key, of_key) + np.einsum("nd,d->n", row, of_row)

    def _check(self, keys: list[bytes], rows: np.ndarray) -> set[int]:
        """The damaged ones of n rows with these keys; the others are known as sound from now on."""
        if not len(rows):
            return set()
        vectors, damaged = self.vectors(), set[int]()
        sums = np.memmap(self._path("sums"), "<u8", "r", shape=(self._count,))
        step = max(1, _BLOCK // self.row_bytes)
        for at in range(0, len(rows), step):
            part = rows[at : at + step]
            good = self._sums(keys[at : at + step], vectors[part]) == sums[part]
            self._sound[part[good]] = True
            damaged.update(part[~good].tolist())
        return damaged

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _write(self, name: str, data: bytes) -> None:
        with open(self._path(name), "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _repair(self) -> None:
        """Cuts the files back to whole rows that all of them have."""
        sizes = {"keys": KEY_BYTES, "vectors": self.row_bytes, "sums": SUM_BYTES}
        for name in ("keys", "vectors"):
            self._path(name).touch()
        if not self._path("sums").exists():
            self._add_sums()
        count = min(self._path(name).stat().st_size // size for name, size in sizes.items())
        for name, size in sizes.items():
            if self._path(name).stat().st_size != count * size:
                os.truncate(self._path(name), count * size)

    def _add_sums(self) -> None:
        """Gives their sums to rows of version 0.1.0, which are taken as they are."""
        keys = self._path("keys").read_bytes()
        count = min(len(keys) // KEY_BYTES, self._path("vectors").stat().st_size // self.row_bytes)
        if count:
            log.warning("%s: %d rows have no checksums, and get them now", self.folder, count)
        draft = self._path("sums.part")
        draft.unlink(missing_ok=True)
        draft.touch()
        step = max(1, _BLOCK // self.row_bytes)
        for at in range(0, count, step):
            own = [keys[KEY_BYTES * i :][:KEY_BYTES] for i in range(at, min(at + step, count))]
            vectors = np.fromfile(
                self._path("vectors"), np.float32, len(own) * self.row_bytes // 4,
                offset=at * self.row_bytes,
            )  # fmt: skip
            self._write("sums.part", self._sums(own, vectors).tobytes())
        os.replace(draft, self._path("sums"))

    def _read_keys(self) -> None:
        """Reads the keys added since the last look; of two rows with one key the later counts."""
        if self._path("keys").stat().st_size < KEY_BYTES * self._count:
            # Cut back since then, by whatever damaged it.
            self._rows, self._count, self._sound = {}, 0, np.zeros(0, bool)
        with open(self._path("keys"), "rb") as file:
            file.seek(KEY_BYTES * self._count)
            data = file.read()
        fresh = len(data) // KEY_BYTES
        for i in range(fresh):
            self._rows[data[KEY_BYTES * i : KEY_BYTES * (i + 1)]] = self._count + i
        self._count += fresh
        self._sound = np.concatenate([self._sound, np.zeros(fresh, bool)])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, between processes."""
        with open(self.folder / "lock", "w") as file:
            lock(file)
            yield
