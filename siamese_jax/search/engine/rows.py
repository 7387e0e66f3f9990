"""Rows of arrays, memory maps, device arrays and lists of them, read as one gallery."""

import functools
import mmap
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.engine import reused_memory
from siamese_jax.search.engine.parallel import THREADS, in_threads, rows_at_once

# Rows of a memory map that a thread reads before its pages are given back. With each, the system
# may map 2 MiB around it: 64 MiB of all threads together.
_READ = -(-32 // THREADS)
_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


class Rows:
    """The rows of one array, or of several one after another, as float32.

    Nothing is copied here: memory maps stay on the disk, device arrays on their device.

    Args:
      shards: arrays [n_s, d] with one d.
      name: how messages call it.

    Raises:
      UserError: a shard is not a matrix of real numbers, or the widths differ.
    """

    def __init__(self, shards: Sequence[Any], name: str):
        self.name = name
        self.shards = [_matrix(shard, name) for shard in shards]
        widths = {shard.shape[1] for shard in self.shards}
        if len(widths) > 1:
            raise UserError(f"the {name} has shards of different widths: {sorted(widths)}")
        self.width: int = widths.pop() if widths else 0
        # The maps whose pages can be given back.
        files = [
            getattr(shard, "_mmap", None)
            for shard in self.shards
            if isinstance(shard, np.memmap) and shard.mode in ("r", "r+") and _DONTNEED
        ]
        self._maps = [file for file in files if file is not None]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def mapped(self) -> bool:
        """Whether some rows are those of a memory map."""
        return any(isinstance(shard, np.memmap) for shard in self.shards)

    def read(self, start: int, out: np.ndarray) -> int:
        """Copies rows from `start` on into out [n, >= d]; returns how many there were."""
        stop = min(start + len(out), len(self))
        for shard, at in zip(self.shards, self.starts[:-1], strict=True):
            low, high = max(start, at), min(stop, at + len(shard))
            if low < high:
                with np.errstate(over="ignore"):
                    out[low - start : high - start, : self.width] = shard[low - at : high - at]
        return stop - start

    def view(self, start: int, size: int) -> np.ndarray | None:
        """Rows start : start + size without a copy, or None where they are not float32 as such."""
        s = int(np.searchsorted(self.starts, start, side="right")) - 1
        low = start - int(self.starts[s])
        shard = self.shards[s]
        plain = shard.dtype == np.float32 and shard.flags.c_contiguous
        whole = plain and low + size <= len(shard)
        return np.asarray(shard[low : low + size]) if whole else None

    @functools.cached_property
    def squares(self) -> np.ndarray:
        """float64 [n], |row|^2."""
        found = np.empty(len(self))
        shape = rows_at_once(self.width), self.width
        starts = iter(range(0, len(self), max(1, shape[0])))

        def work() -> None:
            with (
                reused_memory.borrowed(shape, np.float32) as single,
                reused_memory.borrowed(shape, float) as double,
            ):
                for at in starts:
                    n = self.read(at, single)
                    double[:n] = single[:n]
                    np.vecdot(double[:n], double[:n], out=found[at : at + n])

        in_threads(work)
        self.release()
        return found

    def release(self) -> None:
        """Gives the pages of memory maps that were read back to the system.

        They would count as this process's memory until others need it. Pages of a map opened as
        copy-on-write are left alone: they may hold changes.
        """
        for file in self._maps:
            file.madvise(_DONTNEED)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """float32 [n, d] for int [n]; written into `out` if that is given."""
        if out is None:
            out = np.empty((len(rows), self.width), np.float32)
        step = _READ if self._maps else max(1, len(rows))
        for at in range(0, len(rows), step):
            self._take(rows[at : at + step], out[at : at + step])
            self.release()
        return out

    def _take(self, rows: np.ndarray, out: np.ndarray) -> None:
        if len(self.shards) == 1 and self.shards[0].dtype == np.float32:
            # Any mode but "raise" lets NumPy write into `out` directly.
            np.take(self.shards[0], rows, axis=0, out=out, mode="clip")
            return
        where = np.searchsorted(self.starts, rows, side="right") - 1
        for s in np.unique(where):
            here = where == s
            with np.errstate(over="ignore"):
                out[here] = self.shards[s][rows[here] - self.starts[s]]


def as_rows(x: Any, name: str) -> Rows:
    """One array, or a list or tuple of two-dimensional ones, as `Rows`."""
    if isinstance(x, Rows):
        return x
    shards = isinstance(x, (list, tuple)) and all(getattr(s, "ndim", 0) == 2 for s in x)
    return Rows(list(x) if shards and len(x) else [x], name)


def _matrix(x: Any, name: str) -> np.ndarray:
    # A JAX array on the CPU is seen through NumPy without a copy.
    try:
        x = x if isinstance(x, np.ndarray) else np.asarray(x)
    except ValueError as error:  # rows of several lengths
        raise UserError(f"{name} must be [n, d]: {error}") from None
    if x.ndim != 2:
        raise UserError(f"{name} must be [n, d], not of shape {x.shape}")
    if x.dtype == object or not (
        jax.numpy.issubdtype(x.dtype, np.floating)
        or jax.numpy.issubdtype(x.dtype, np.integer)
        or x.dtype == bool
    ):
        raise UserError(f"{name} must hold real numbers, not {x.dtype}")
    return x
