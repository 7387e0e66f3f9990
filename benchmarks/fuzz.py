"""Ten minutes of changed files for each reader of untrusted files; none may be more than refused.

    python benchmarks/fuzz.py                                # every reader
    python benchmarks/fuzz.py --seconds=60 --readers=h5,pth  # some, for a minute each

A file is a sound one, or one of the hostile ones of tests/torture/, with bytes changed, removed,
doubled or exchanged with those of numbers that matter. It counts as a fault if reading it crashes,
raises anything but the error of one line, takes 20 s, or more memory than 14 times the file.
"""

import argparse
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Without this folder, whose torture.py is not the one below.
sys.path[:] = [p for p in sys.path if p != str(Path(__file__).parent)]
sys.path += [str(ROOT), str(ROOT / "tests")]

from torture import hostile_files  # noqa: E402
from torture.reader import Reader, complaint  # noqa: E402

_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1)


def changed(data: bytes, draw: random.Random) -> bytes:
    """A file with one to eight changes."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, length = draw.randrange(len(found) + 1), draw.choice((1, 4, 8, 64))
        kind = draw.randrange(6)
        if kind == 0:
            found[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del found[at : at + length]
        elif kind == 2:
            found[at:at] = found[at : at + length]
        elif kind == 3:
            other = draw.randrange(len(found) + 1)
            found[at : at + length] = found[other : other + length]
        elif kind == 4:
            width = draw.choice(("<B", "<H", "<I", "<Q", ">H", ">I"))
            number = draw.choice(_NUMBERS) & (256 ** struct.calcsize(width) - 1)
            found[at : at + struct.calcsize(width)] = struct.pack(width, number)
        else:
            del found[at:]
    return bytes(found)


def fuzz(
    format: str, seconds: float, folder: Path, reader: Reader, seed: int = 0
) -> tuple[int, list[str]]:
    """How many files were tried, and what was wrong. A file that fails stays in the folder."""
    suffix, hostile, sound = hostile_files.FORMATS[format]
    draw = random.Random(f"{format} {seed}")
    seeds = [make() for make in sound]
    for make in hostile.values():
        data = make()
        seeds += [data] * (0 < len(data) < 10_000)
    faults, tried = [], 0
    reader.ask(folder)  # where it has to start yet
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = changed(draw.choice(seeds[: len(sound)] * 20 + seeds), draw)
        path = folder / f"{format}-{tried}{suffix}"
        path.write_bytes(data)
        wrong = complaint(reader.ask(path), len(data))
        tried += 1
        if wrong:
            faults.append(f"{path}: {wrong}")
        else:
            path.unlink()
    return tried, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="for each reader")
    parser.add_argument("--readers", default=",".join(hostile_files.FORMATS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print("| reader | files | faults |\n|---|---|---|")
    failed, reader = False, Reader()
    for format in args.readers.split(","):
        tried, faults = fuzz(format, args.seconds, folder, reader, args.seed)
        print(f"| {format} | {tried:,} | {len(faults)} |", *faults, sep="\n", flush=True)
        failed |= bool(faults)
    reader.close()
    sys.exit(failed)


if __name__ == "__main__":
    main()
