"""What kills and damage do to a small run, as one table; each count but the first should be 0.

    python benchmarks/torture.py --kills=100 --damages=300 --caches=20

    lost         a run, gone on with after kills, that is not the uninterrupted one bit for bit
    silent       other values than before, without a word
    tracebacks   where one line would do

The short form, at fixed points, is `tests/torture/`. A new trial is a function and a row in TRIALS.
"""

import argparse
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import killed
import outcome
import tiny

from siamese_jax.errors import UserError

GOALS = ("lost", "silent", "tracebacks", "over limit")


class Place:
    """A folder with pictures, and the run on them that nothing interrupted."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args
        self.rng = np.random.default_rng(args.seed)
        tiny.make_folder(folder / "shop", noise=160)
        self.finish("first")  # compiles
        began = time.monotonic()
        self.finish("whole")
        self.seconds = time.monotonic() - began
        self.expected = outcome.whole(folder / "whole")

    def start(self, name: str, cache: str | None = None) -> tuple[Path, killed.Process]:
        """A process that trains the run of a name; first, the file with what it says."""
        said, run = self.folder / f"{name}.txt", self.folder / name
        arguments = [
            *tiny.TINY, f"--config.data.root={self.folder / 'shop'}", f"--workdir={run}",
        ]  # fmt: skip
        caches = (self.folder / f"{cache or name}-cache", self.folder / "xla")
        return said, killed.start(arguments, *caches, said)

    def finish(self, name: str, cache: str | None = None) -> str:
        """Trains to the end, and gives what was said."""
        said, process = self.start(name, cache)
        process.join()
        return said.read_text(encoding="utf-8")


def kills(place: Place) -> Counter[str]:
    """SIGKILL at random moments, until the run is through; then another one from its start."""
    counts, name = Counter[str](), ""
    while counts["trials"] < place.args.kills or name:
        name = name or f"killed{counts['runs']}"
        said, process = place.start(name)
        wait = place.rng.uniform(0, place.seconds) if counts["trials"] < place.args.kills else None
        process.join(wait)
        if process.exitcode is None:
            process.kill()
            process.join()
        counts["trials"] += process.exitcode == -signal.SIGKILL
        counts["tracebacks"] += "Traceback" in said.read_text(encoding="utf-8")
        if process.exitcode != -signal.SIGKILL:
            counts["lost"] += outcome.whole(place.folder / name) != place.expected
            counts["runs"], name = counts["runs"] + 1, ""
    return counts


def _damages(place: Place, path: Path, count: int) -> Iterator[None]:
    """The file cut, flipped, zeroed from somewhere on, or removed, in turn; then as it was."""
    data, rng = path.read_bytes(), place.rng
    for _ in range(count):
        i, kind = int(rng.integers(len(data))), int(rng.integers(4))
        flipped = bytes([data[i] ^ (1 << int(rng.integers(8)))])
        forms = (data[:i], data[:i] + flipped + data[i + 1 :], data[:i].ljust(len(data), b"\0"))
        if kind == len(forms):
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(forms[kind])
        yield
    path.write_bytes(data)


def files(place: Place) -> Counter[str]:
    """Every file of a finished run that tools read."""
    counts, run = Counter[str](), place.folder / "whole"
    expected, said = outcome.of_tools(run), _Said()
    logging.getLogger("siamese_jax").addHandler(said)
    chosen = [p for p in sorted(run.rglob("*")) if p.is_file() and p.stat().st_size]
    chosen = [p for p in chosen if p.relative_to(run).parts[0] not in ("events", "report", "lock")]
    for path in chosen:
        for _ in _damages(place, path, -(-place.args.damages // len(chosen))):
            counts["trials"] += 1
            said.count = 0
            try:
                silent = outcome.of_tools(run) != expected and not said.count
                counts["silent"] += silent
                if silent:
                    print(f"{path}: other values, and nothing was said", file=sys.stderr)
            except UserError:
                pass
            except Exception as error:
                counts["tracebacks"] += 1
                print(f"{path}: {error!r}", file=sys.stderr)
    return counts


class _Said(logging.Handler):
    """Counts the lines."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def caches(place: Place) -> Counter[str]:
    """A file of the cache of features, then the whole run anew."""
    counts = Counter[str]()
    chosen = sorted((place.folder / "whole-cache").rglob("*.bin"))
    for i in range(place.args.caches):
        for _ in _damages(place, chosen[i % len(chosen)], 1):
            counts["trials"] += 1
            said = place.finish(f"cached{i}", "whole")
            counts["tracebacks"] += "Traceback" in said
            counts["lost"] += outcome.whole(place.folder / f"cached{i}") != place.expected
            shutil.rmtree(place.folder / f"cached{i}")
    return counts


TRIALS: dict[str, Callable[[Place], Counter[str]]] = {
    "killed at random moments": kills,
    "a file of a finished run damaged": files,
    "a file of the features' cache damaged": caches,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damages", type=int, default=300)
    parser.add_argument("--caches", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), args)
        print("| trial | trials | " + " | ".join(GOALS) + " | s |\n|" + " --- |" * 7)
        for name, trial in TRIALS.items():
            began = time.monotonic()
            counts = trial(place)
            cells = [counts["trials"], *(counts[goal] for goal in GOALS)]
            seconds = time.monotonic() - began
            print("| " + " | ".join(map(str, [name, *cells, round(seconds)])) + " |", flush=True)


if __name__ == "__main__":
    main()
