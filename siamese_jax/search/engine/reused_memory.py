"""Large arrays that are used again: fresh memory can cost more than what is written into it."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

# Bytes that are kept at most while no search needs them.
_KEPT = 96 * 2**20
_ALIGNMENT = 64

_free: dict[Any, list[Any]] = {}
_kept = 0
_lock = threading.Lock()


def take(key: Any, make: Callable[[], Any]) -> Any:
    """What was given back under this key, or a new one. Its contents are anything."""
    with _lock:
        return _pop(key) if key in _free else make()


def give(key: Any, array: Any) -> None:
    """Keeps an array for the next `take`, in place of others where there is not room for all."""
    global _kept
    if array.nbytes > _KEPT:
        return
    with _lock:
        while _kept + array.nbytes > _KEPT:
            _pop(next(iter(_free)))
        # The key goes to the end: what was not given for long is dropped first.
        _free[key] = [*_free.pop(key, []), array]
        _kept += array.nbytes


def clear() -> None:
    """Gives all that is kept back to the system."""
    with _lock:
        while _free:
            _pop(next(iter(_free)))


def _pop(key: Any) -> Any:
    global _kept
    array = _free[key].pop()
    _kept -= array.nbytes
    if not _free[key]:
        del _free[key]
    return array


@contextlib.contextmanager
def borrowed(shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[np.ndarray]:
    """An array for the time of a `with` block, where JAX takes it as it is, without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = take(("bytes", size), lambda: aligned((size,), np.uint8))
    try:
        yield raw.view(dtype).reshape(shape)
    finally:
        give(("bytes", size), raw)


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Memory that JAX takes as it is, without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)
