"""Work on all cores: NumPy's large operations run side by side."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(work: Callable[[], None]) -> None:
    """Runs `work` on every core; it takes its pieces from a common iterator until none is left."""
    if THREADS == 1:
        work()
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for task in [pool.submit(work) for _ in range(THREADS)]:
            task.result()
