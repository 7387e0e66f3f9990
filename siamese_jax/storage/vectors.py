"""An append-only store of vectors on disk, keyed by content: the cache of embeddings.

    <folder>/keys.bin      16 bytes a row
    <folder>/vectors.bin   the row's float32 values

Vectors are written and flushed before their keys, and a row counts only when both are whole: a
process may be killed at any time and loses at most the block in flight.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

KEY_BYTES = 16
KEY = np.dtype(f"V{KEY_BYTES}")


class VectorStore:
    """Rows of one shape, found by key.

    Args:
      folder: created if needed.
      shape: of one row, e.g. (1280,).
    """

    def __init__(self, folder: str | Path, shape: tuple[int, ...]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shape = tuple(shape)
        self.row_bytes = 4 * int(np.prod(shape))
        self._rows: dict[bytes, int] = {}
        with self._locked():
            self._repair()
        self._read_keys()

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, keys: list[bytes]) -> np.ndarray:
        """int64 [n]: the row of each key, -1 where it is missing."""
        return np.array([self._rows.get(key, -1) for key in keys], np.int64)

    def vectors(self) -> np.ndarray:
        """float32 [rows, *shape]: a read-only memory map."""
        if not self._rows:
            return np.zeros((0, *self.shape), np.float32)
        count = max(self._rows.values()) + 1
        return np.memmap(self._path("vectors"), np.float32, "r", shape=(count, *self.shape))

    def append(self, keys: list[bytes], vectors: np.ndarray) -> None:
        """Adds rows; a key that is there already is skipped.

        Args:
          keys: n keys of 16 bytes.
          vectors: float32 [n, *shape].
        """
        with self._locked():
            self._repair()  # Another process may have written, or died, meanwhile.
            self._read_keys()
            fresh = {key: i for i, key in enumerate(keys) if key not in self._rows}
            rows = np.ascontiguousarray(vectors[list(fresh.values())], np.float32)
            self._write("vectors", rows.tobytes())
            self._write("keys", b"".join(fresh))
        self._read_keys()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _write(self, name: str, data: bytes) -> None:
        with open(self._path(name), "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _repair(self) -> None:
        """Cuts both files back to whole rows that both of them have."""
        sizes = {"keys": KEY_BYTES, "vectors": self.row_bytes}
        for name in sizes:
            self._path(name).touch()
        count = min(self._path(name).stat().st_size // size for name, size in sizes.items())
        for name, size in sizes.items():
            if self._path(name).stat().st_size != count * size:
                os.truncate(self._path(name), count * size)

    def _read_keys(self) -> None:
        """Reads the keys added since the last look."""
        with open(self._path("keys"), "rb") as file:
            file.seek(KEY_BYTES * len(self._rows))
            data = file.read()
        start = len(self._rows)
        for i in range(len(data) // KEY_BYTES):
            self._rows[data[KEY_BYTES * i : KEY_BYTES * (i + 1)]] = start + i

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, between processes."""
        with open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
