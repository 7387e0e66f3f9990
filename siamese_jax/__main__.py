"""The command line: `siamese-jax TOOL`, or `python -m siamese_jax TOOL`; without one it lists them.

A tool is a module with `main(argv)`; only the one that is asked for is imported.
"""

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from siamese_jax.errors import UserError, print_anything

# TensorFlow only reads images here; its start-up messages would bury ours.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

TOOLS = {
    "embed": ("siamese_jax.tools.embed", "the embeddings of a folder of images, as a file"),
    "rank": ("siamese_jax.tools.rank", "for every query, its nearest images of a gallery"),
    "evaluate": (
        "siamese_jax.tools.evaluate",
        "retrieval metrics of an encoder on labelled images",
    ),
    "whiten": ("siamese_jax.tools.whiten", "fit a whitening, and save it with the encoder"),
    "train": (
        "siamese_jax.tools.train",
        "one experiment: train or resume, evaluate, report",
    ),
    "compare": (
        "siamese_jax.tools.compare",
        "trunks x heads x losses, trained and put in one table",
    ),
    "diff": ("siamese_jax.tools.diff", "the difference of two runs, with its interval"),
    "weights": ("siamese_jax.tools.weights", "list, fetch, convert or verify trunk weights"),
}


def usage() -> str:
    """The help of the command line: every tool and what it does, a line each."""
    lines = [f"  {name:<10}{what}" for name, (_, what) in TOOLS.items()]
    return "\n".join(["usage: siamese-jax TOOL [options], or TOOL --help", "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool of a command line (the process's own, if none is given).

    Returns:
      The exit code: 2, after one line, for a mistake of the user's.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    logging.basicConfig(format="%(levelname)s: %(message)s")
    print_anything()
    name, *rest = argv
    try:
        if name not in TOOLS:
            raise UserError(f"there is no tool {name!r}; choose from {', '.join(TOOLS)}")
        importlib.import_module(TOOLS[name][0]).main(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head` has seen enough.
        sys.stderr.close()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
