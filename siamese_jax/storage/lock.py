"""The system's lock on an open file, between processes; it dies with its process, however it ends.

Where there is none (Windows has no `fcntl`, some network folders keep no locks), the work goes on
without, and a line says once what is not guarded.
"""

import functools
import logging
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)


def lock(file: IO[Any], *, wait: bool = True) -> None:
    """Holds an open file for this process, until it is closed.

    Raises:
      BlockingIOError: another process holds it, and we do not `wait` until it is free.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except (ImportError, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        _say(Path(file.name).absolute().parent, why)


@functools.cache
def _say(folder: Path, why: str) -> None:
    log.warning("%s has no locks (%s): see to it that no other process writes there", folder, why)
