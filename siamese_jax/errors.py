"""What is the user's to mend, as one line: mistakes, and what the system refuses on a path."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator


def print_anything() -> None:
    """From here on, names that the terminal's encoding lacks are printed escaped, not refused."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class UserError(ValueError):
    """A mistake in a path, a config field, an image or a weights file.

    The message is one line: what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2.
    """


_SPACE = "free some space, and the same command goes on from what is saved"
_RIGHTS = "change its permissions, or choose another place"
# How to go on, by the system's error; what is wrong it says itself.
REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "choose a file system that holds larger files",
    errno.EROFS: "choose another place",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOENT: "it is not there, or not any more: check the path",
    errno.ENOTDIR: "a file is where a folder is needed: choose another place",
    errno.EISDIR: "name a file",
    errno.EEXIST: "choose another name",
    errno.ENOTEMPTY: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead to themselves: name the file itself",
    errno.EIO: "its disk or its connection failed; the same command goes on from what is saved",
    errno.ESTALE: "its disk or its connection failed; the same command goes on from what is saved",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENODEV: "choose another place",
    errno.ENXIO: "choose another place",
    errno.EINVAL: "check the path",
}

# What no error but the system's says.
_UNMISTAKABLE = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT]
_UNMISTAKABLE += [errno.ENOTDIR, errno.ENAMETOOLONG]


@contextlib.contextmanager
def naming(path: str | os.PathLike[str] | None = None, safe: str = "") -> Iterator[None]:
    """Lets an OSError that passes name a path, and say what is safe.

    The system names no path where a write fails, and libraries in C++ report its errors as others,
    with its words in the text: such a one goes on as the OSError that it was.

    Args:
      path: what is at work here; an error that names a path itself keeps it.
      safe: what is not lost, for `os_error_line`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = error if isinstance(error, OSError) else _told_by_library(error)
        if found is None:
            raise
        if found.filename is None and path is not None:
            found.filename = os.fspath(path)
        if safe:
            found.add_note(safe)
        if found is error:
            raise
        raise found from error


def _told_by_library(error: Exception) -> OSError | None:
    """The system's error in another one's text."""
    text = str(error)
    told = [number for number in _UNMISTAKABLE if os.strerror(number) in text]
    return OSError(told[0], os.strerror(told[0])) if told else None


def os_error_line(error: OSError) -> str:
    """One line: which path, what is wrong, what is safe, how to go on.

    >>> os_error_line(OSError(errno.ENOSPC, "No space left on device", "a.csv"))
    'a.csv: No space left on device; free some space, and the same command goes on from what is \
saved'
    """
    where = error.filename.decode() if isinstance(error.filename, bytes) else error.filename
    what = error.strerror or str(error) or type(error).__name__
    remedy = [REMEDIES[error.errno]] if error.errno in REMEDIES else []
    told = "; ".join([what, *getattr(error, "__notes__", ()), *remedy])
    return " ".join((f"{where}: {told}" if where is not None else told).split())
