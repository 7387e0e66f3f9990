"""A process that reads hostile files for a test, and one that can be asked: `Reader`.

Each line of its input names a file; each line of its output says what came of it. It has `_ROOM`
bytes more than it takes by itself. A crash, a hang and all memory taken are answers too.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_ROOM = 1 << 30
SECONDS = 60  # of the process that a file may keep busy at most


class Answer(NamedTuple):
    """`said`: a refusal, "" where the file was read; `fault`: what must never be; `grew`: bytes."""

    said: str = ""
    fault: str = ""
    seconds: float = 0.0
    grew: int = 0


def complaint(answer: Answer, size: int) -> str:
    """What is wrong with an answer on a file of `size` bytes; empty if nothing."""
    if answer.fault:
        return answer.fault
    if "\n" in answer.said or len(answer.said) > 900:
        return f"not one line: {answer.said[:200]!r}"
    if answer.seconds > 20:
        return f"it took {answer.seconds:.0f} s"
    if answer.grew > (96 << 20) + 14 * size:
        return f"it took {answer.grew >> 20} MB for a file of {size >> 10} kB"
    return ""


class Reader:
    """Starts the process, and again after each crash."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, path: Path) -> Answer:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            )
            self.process.stdout.readline()
        self.process.stdin.write(f"{path}\n".encode())
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        line = self.process.stdout.readline() if ready else b""
        if line:
            return Answer(*json.loads(line))
        self.close()
        return Answer(fault="it crashed" if ready else f"no answer in {SECONDS} s")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])


def _answer(path: Path) -> Answer:
    from siamese_jax.data.preprocess import read_image
    from siamese_jax.errors import UserError
    from siamese_jax.weights import formats

    before, start = _peak_from_here(), time.monotonic()
    said = fault = ""
    try:
        if path.suffix in (".h5", ".keras", ".pth", ".safetensors", ".npz"):
            formats.read(path)
        else:
            read_image(path, 64)
    except UserError as e:
        said = str(e)
    except BaseException as e:
        fault = f"{type(e).__name__}: {str(e)[:300]}"
    seconds = time.monotonic() - start
    return Answer(said, fault, seconds, _status("VmHWM") - before if before else 0)


def _peak_from_here() -> int:
    """The memory that the process has, with its peak set back to it; 0 where that cannot be."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM")
    return 0


def main() -> None:
    import resource

    import siamese_jax.weights.formats  # noqa: F401
    from siamese_jax.data.preprocess import limit_pixels

    limit_pixels(2_000_000)
    if sys.platform == "linux":
        most = _status("VmSize") + _ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(Path(line[:-1]))), flush=True)


if __name__ == "__main__":
    main()
