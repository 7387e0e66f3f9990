"""The command line: `siamese-jax TOOL`, or `python -m siamese_jax TOOL`; without one it lists them.

A tool is a module with `main(argv)`; only the one that is asked for is imported.
"""

import contextlib
import importlib
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from siamese_jax import processes, stopping
from siamese_jax.errors import UserError, naming, os_error_line, print_anything
from siamese_jax.train import huge_pages

# TensorFlow only reads images here; its start-up messages would bury ours.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# They can share their work among several processes.
SHARED = ("train", "embed")
# They make and drop large arrays, step after step.
TRAINING = ("train", "compare")
TOOLS = {
    "embed": ("siamese_jax.tools.embed", "the embeddings of a folder of images, as a file"),
    "rank": ("siamese_jax.tools.rank", "for every query, its nearest images of a gallery"),
    "evaluate": (
        "siamese_jax.tools.evaluate",
        "retrieval metrics of an encoder on labelled images",
    ),
    "fit": (
        "siamese_jax.tools.fit",
        "an encoder for pictures without training: LDA, chosen by folds",
    ),
    "whiten": ("siamese_jax.tools.whiten", "fit with nothing to choose: LDA behind an encoder"),
    "train": (
        "siamese_jax.tools.train",
        "one experiment: train or resume, evaluate, report",
    ),
    "config": (
        "siamese_jax.tools.config",
        "all fields of a config: meaning, type, range, default",
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
    several = (
        f"{' and '.join(SHARED)} run as several processes, on one machine or many, each started "
        "with\n--coordinator=HOST:PORT --processes=N --process-id=I, or with --distributed=auto"
    )
    return "\n".join(["usage: siamese-jax TOOL [options], or TOOL --help", "", *lines, "", several])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool of a command line (the process's own, if none is given).

    Returns:
      The exit code: 2, after one line, for a mistake of the user's.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(levelname)s: %(message)s")
    _said.clear()
    for handler in logging.root.handlers:
        handler.addFilter(_is_news)
        if type(handler) is logging.StreamHandler:  # that of the line above
            handler.addFilter(_is_new)
    logging.getLogger("siamese_jax").setLevel(logging.INFO)  # of the libraries, only warnings
    print_anything()

    def stopped(number: int, kept: str) -> str:
        return _printable(f"{stopping.line(number, kept)}; go on: {command(argv)}")

    try:
        with stopping.heeding(stopped), naming():
            run(*_joined(argv))
    except UserError as error:
        processes.all_end(error)
        return _end(f"error: {error}", 2)
    except stopping.Stopped as stop:
        return _end(stopped(stop.number, str(stop)), 128 + stop.number)
    except KeyboardInterrupt:  # raised by a library, or where handlers cannot be set
        return _end(f"stopped by SIGINT; go on: {command(argv)}", 128 + signal.SIGINT)
    except BrokenPipeError:  # `... | head` has seen enough.
        return 1
    except OSError as error:
        return _end(f"error: {os_error_line(error)}", 2)
    except Exception as error:
        if line := processes.lost(error):
            return _end(f"error: {line}", 1)
        raise
    return 0 if argv else 2


def _joined(argv: Sequence[str]) -> list[str]:
    """The command line without what it says of processes, once this one has joined the others.

    All but the first say their warnings alone, with their number.
    """
    place, rest = processes.options(argv)
    if place is None:
        return rest
    if rest[:1] not in [[name] for name in SHARED]:
        tool = rest[0] if rest else "the list of tools"
        raise UserError(f"{tool} runs in one process; several can run {' or '.join(SHARED)}")
    processes.begin(place)
    if not processes.is_first():
        logging.getLogger("siamese_jax").setLevel(logging.WARNING)
        said = f"process {processes.index()}: %(levelname)s: %(message)s"
        for handler in logging.root.handlers:
            handler.setFormatter(logging.Formatter(said))
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    return rest


def run(name: str = "--help", *rest: str) -> None:
    """Runs a tool to its end, with all that it prints."""
    if name in ("-h", "--help"):
        print(usage())
        _flush()
        return
    if name not in TOOLS:
        raise UserError(f"there is no tool {name!r}; choose from {', '.join(TOOLS)}")
    if name == "train" and rest and rest[0] in TOOLS:
        asked = shlex.join(["python", "-m", "siamese_jax", *rest])
        raise UserError(f"{rest[0]!r} is a tool of its own: {asked}")
    tool = importlib.import_module(TOOLS[name][0])
    stopping.check("nothing was begun")
    tool.main(rest)
    _flush()


def _flush() -> None:
    with naming("standard output", "what was to be written to files is written"):
        sys.stdout.flush()


def command(argv: Sequence[str]) -> str:
    """The command line that was given, to be given again."""
    program = Path(sys.argv[0]).name
    if program == "main.py":
        return shlex.join(["python", sys.argv[0], *argv[1:]])
    start = ["python", "-m", "siamese_jax"] if program == "__main__.py" else ["siamese-jax"]
    return shlex.join([*start, *argv])


def _end(line: str, code: int) -> int:
    line = _printable(line)
    with contextlib.suppress(OSError):  # a terminal that has hung up
        print(line, file=sys.stderr)
    return code


def _printable(line: str) -> str:
    """One line it is, whatever is in it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


_said: set[str] = set()


def _is_new(record: logging.LogRecord) -> bool:
    """Whether a warning is given for the first time: a broken picture is met in every pass."""
    line = record.getMessage()
    if record.levelno != logging.WARNING or not record.name.startswith("siamese_jax"):
        return True
    known = line in _said
    _said.add(line)
    return not known


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax logs, with its traceback, each error of a thread that it raises as well."""
    return record.name != "absl" or not record.exc_info


def _unraisable(args: "sys.UnraisableHookArgs") -> None:
    """Writers that are told to end after one of them failed need not say so."""
    if "Event loop is closed" not in str(args.exc_value):
        sys.__unraisablehook__(args)


def process(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own, which ends without a traceback whenever it is told to."""
    if (sys.argv[1:] if argv is None else argv)[:1] in [[name] for name in TRAINING]:
        huge_pages.begin_again()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # before `main` heeds it, and after
    sys.unraisablehook = _unraisable
    try:
        code = main(argv)
    except SystemExit as end:  # of a parser that has printed its help
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        if processes.count() > 1:  # Python's own end would wait for the others
            traceback.print_exc()
            processes.end(1)
        raise
    try:
        sys.stdout.flush()
    except OSError as error:
        if code == 0 and not isinstance(error, BrokenPipeError):
            code = _end(f"error: standard output: {os_error_line(error)}", 2)
        # Or Python would say it again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    processes.end(code)
    sys.exit(code)


if __name__ == "__main__":
    process()
