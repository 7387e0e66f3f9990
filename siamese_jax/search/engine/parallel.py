"""Work on all cores: NumPy's large operations run side by side."""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Numbers that a thread looks at together: few enough for its cache, and so many rows that NumPy
# lets other threads run meanwhile, which it does for more than 500 products of rows.
_NUMBERS = 1 << 18
# But those of all threads together have at most 48 MiB, as float32 and as float64.
_MOST = max(1 << 16, min(1 << 19, (1 << 22) // THREADS))
_ROWS = 640

_here = threading.local()


def rows_at_once(d: int) -> int:
    """How many rows of d columns a thread works on."""
    d = max(1, d)
    return max(1, min(_MOST // d, max(_ROWS, _NUMBERS // d)))


def in_threads(work: Callable[[], None], worthwhile: bool = True) -> None:
    """Runs `work` on every core; it takes its pieces from a common iterator until none is left.

    This thread does its share. The others are kept, as starting them costs more than small work
    does. Called by work that is itself run so, it only runs `work`: a thread that waits for others
    to be free could wait for itself. So it does where it isn't worthwhile.
    """
    if not worthwhile or THREADS == 1 or getattr(_here, "at_work", False):
        work()
        return

    def share() -> None:
        _here.at_work = True
        try:
            work()
        finally:
            _here.at_work = False

    others = [_pool().submit(share) for _ in range(THREADS - 1)]
    try:
        share()
    finally:
        for task in others:
            task.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS - 1, "siamese_jax")


if hasattr(os, "register_at_fork"):
    # A forked process has none of the threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)
