"""The one exception that is the user's to mend: `main.py` and the tools print it as a line."""

import sys


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
