"""What a GPU makes of this package, beside the card's own matrix rate and PyTorch.

    python benchmarks/gpu.py                            # everything
    python benchmarks/gpu.py --parts rank --record      # a part, kept for docs/results.md
    python benchmarks/gpu.py --quick                    # only that it runs: a minute on two cores

Needs jax, flax, optax and numpy alone: no TensorFlow, no ml_collections; the package need not be
installed. PyTorch is compared with where it is (and timm, for Vision Transformers). What is left
out is said in a line. Without a GPU all runs on the CPU, at sizes for one, and no record is kept.

matrix    Products [n, n] x [n, n]. The best of a kind is the rate that every "share" is of.
encode    A batch through a frozen trunk. "images/s" has the images on the device, as PyTorch's do;
          "from host" is an encoder called with NumPy images. On a GPU float32 rounds products to
          tf32, on both sides.
train     The step of the default, a linear head and batch-hard triplets, with a batch that is on
          the device. "frozen": the head alone, on features; "partly": the last stages as well.
triplets  The loss over all triplets of a batch, with its gradient.
rank      rank(), and what one would write: a product and lax.top_k. "right" is how many of some
          queries have the answer of a stable sort of float64 distances, row for row.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed

import measuring
import records

Case = dict[str, Any]
Rates = dict[str, float]  # FLOP/s of each kind of product

PROGRAM = Path(__file__).with_name("gpu_cases.py")
DTYPES, MOVES = ("bfloat16", "float32"), ("frozen", "partly", "whole")
TRUNKS = ["resnet50", "efficientnet_b0", "vit_small_patch16_224", "vit_base_patch16_224"]
# What: on a GPU, on a CPU, and with --quick.
SIZES: dict[str, tuple[Any, Any, Any]] = {
    "matrix": ([4096, 8192, 16384], [1024, 2048], [256]),
    "trunks": (TRUNKS, TRUNKS, TRUNKS[2:3]),
    "trained": (TRUNKS[:3], TRUNKS[:3], TRUNKS[2:3]),
    "train_dtypes": (DTYPES, DTYPES, DTYPES[1:]),
    "pixels": (224, 112, 32),
    "batch": (256, 16, 2),
    "train_batch": ((256, 128, 128), (512, 32, 32), (16, 4, 4)),  # of MOVES
    "triplets": ([256, 1024], [256, 1024], [32]),
    "rank": ([10_000, 1_000_000, 128, 100], [1_000, 100_000, 128, 100], [64, 2_000, 16, 5]),
    "checked": (16, 16, 4),
    "least": (0.3, 0.0, 0.0),  # seconds of a turn
    "repeats": (7, 5, 1),
}


class Part(NamedTuple):
    """A table: its columns; its cases, of the sizes and rates; the rows of what a case found."""

    columns: list[str]
    cases: Callable[[Case, Rates], Iterator[Case]]
    rows: Callable[[Case, Case, Rates], list[list[str]]]


def encode_cases(size: Case, rates: Rates) -> Iterator[Case]:
    for trunk in size["trunks"]:
        for dtype in DTYPES:
            yield {"trunk": trunk, "dtype": dtype, "pixels": size["pixels"], "batch": size["batch"]}


def encode_rows(case: Case, found: Case, rates: Rates) -> list[list[str]]:
    spent = found["seconds"]
    speeds = {name: case["batch"] / seconds for name, seconds in spent.items()}
    row = [case["trunk"], case["dtype"], f"{case['pixels']}", f"{case['batch']}"]
    row += [f"{speeds['ours']:.1f}", share(found["flops"], spent["ours"], case["dtype"], rates)]
    row += [f"{speeds['host']:.1f}"]
    for peer in ("compile", "eager"):
        there = peer in speeds
        row += (
            [f"{speeds[peer]:.1f}", f"{speeds['ours'] / speeds[peer]:.2f}"] if there else ["-"] * 2
        )
    far = found["difference"]
    return [[*row, "-" if far is None else f"{far:.0e}"]]


def train_cases(size: Case, rates: Rates) -> Iterator[Case]:
    for trunk in size["trained"]:
        for dtype in size["train_dtypes"]:
            for moves, batch in zip(MOVES, size["train_batch"], strict=True):
                case = {"trunk": trunk, "dtype": dtype, "moves": moves, "batch": batch}
                yield case | {"pixels": size["pixels"]}


def train_rows(case: Case, found: Case, rates: Rates) -> list[list[str]]:
    row = [case["trunk"], case["dtype"], case["moves"], f"{case['pixels']}", f"{case['batch']}"]
    row += [f"{1 / found['seconds']:.2f}", f"{case['batch'] / found['seconds']:.1f}"]
    return [[*row, gigabytes(found["peak"])]]


def triplets_cases(size: Case, rates: Rates) -> Iterator[Case]:
    for batch in size["triplets"]:
        yield {"batch": batch, "axes": 512, "per_class": 4}


def triplets_rows(case: Case, found: Case, rates: Rates) -> list[list[str]]:
    row = [f"{case['batch']}", f"{case['axes']}", f"{found['triplets']:,}"]
    speed = found["triplets"] / found["seconds"]
    return [[*row, f"{found['seconds'] * 1e3:.3f}", f"{speed:.2e}", gigabytes(found["peak"])]]


def rank_cases(size: Case, rates: Rates) -> Iterator[Case]:
    yield {"shape": size["rank"], "checked": size["checked"], "kinds": list(rates), "least": 0}


def rank_rows(case: Case, found: Case, rates: Rates) -> list[list[str]]:
    q, g, d, k = case["shape"]
    rows = []
    for name, seconds in found["seconds"].items():
        of = 2 * q * g * d / seconds / rates[name.split()[1]]
        right = f"{found['right'][name]:.0%} of {found['checked']}"
        rows.append([f"{q:,} x {g:,} x {d}, k = {k}", name, f"{seconds:.4f}", f"{of:.1%}", right])
    return rows


def matrix_cases(size: Case, rates: Rates) -> Iterator[Case]:
    yield {"sizes": size["matrix"]}


def matrix_rows(case: Case, found: Case, rates: Rates) -> list[list[str]]:
    rows = []
    for kind, by_size in found["rates"].items():
        rates[kind] = max(by_size.values())
        rows += [[kind, n, f"{rate / 1e12:.3f}"] for n, rate in by_size.items()]
    return rows


PARTS = {
    "matrix": Part(["product", "n", "TFLOP/s"], matrix_cases, matrix_rows),
    "encode": Part(
        [
            *("trunk", "dtype", "px", "batch", "images/s", "share", "from host"),
            *("torch.compile", "ours / it", "torch eager", "ours / it", "difference"),
        ],
        *(encode_cases, encode_rows),
    ),
    "train": Part(
        ["trunk", "dtype", "moves", "px", "batch", "steps/s", "images/s", "peak GB"],
        *(train_cases, train_rows),
    ),
    "triplets": Part(
        ["batch", "axes", "triplets", "ms", "triplets/s", "peak GB"],
        *(triplets_cases, triplets_rows),
    ),
    "rank": Part(["shape", "search", "seconds", "share", "right"], rank_cases, rank_rows),
}


def share(flops: float, seconds: float, dtype: str, rates: Rates) -> str:
    """Of the matrix rate of what the device multiplies for a dtype."""
    kind = "tf32" if dtype == "float32" and "tf32" in rates else dtype
    return f"{flops / seconds / rates[kind]:.1%}"


def gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


class Table:
    """A part's rows, printed as they come, and what was told on the way: each line once."""

    def __init__(self, name: str):
        self.part, self.name = PARTS[name], name
        self.rows: list[list[str]] = []
        self.told: list[str] = []
        self.failed = 0
        print(f"\n{name}")
        self.show(self.part.columns)

    def show(self, row: list[str]) -> None:
        widths = [max(len(column), 10) for column in self.part.columns]
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([f"{row[0]:34}", *cells]), flush=True)

    def tell(self, line: str) -> None:
        if line not in self.told:
            self.told.append(line)
            print(line, flush=True)

    def fill(self, size: Case, rates: Rates) -> None:
        for case in self.part.cases(size, rates):
            found = measured({**size, **case, "part": self.name})
            for line in found.get("told", ()):
                self.tell(line)
            if reason := found.get("missing") or found.get("failed"):
                self.failed += "failed" in found
                self.tell(f"left out: {self.name} {' '.join(map(str, case.values()))}: {reason}")
                continue
            if found.get("peak", 0) is None:
                self.tell("no peak of memory: this device does not say it")
            for row in self.part.rows(case, found, rates):
                self.rows.append(row)
                self.show(row)


def measured(case: Case) -> Case:
    """What a case finds, in a process of its own."""
    return measuring.in_process([sys.executable, str(PROGRAM), json.dumps(case)])


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    others = [name for name in PARTS if name != "matrix"]
    parser.add_argument("--parts", nargs="+", default=others, choices=others)
    parser.add_argument("--quick", action="store_true", help="small sizes: only that it runs")
    records.add_option(parser)
    return parser


def main() -> int:
    parser = options()
    args = parser.parse_args()
    if args.record and args.quick:
        parser.error("--quick is no measurement: leave --record out")
    device = measured({"part": "device"})
    if "failed" in device:
        print(f"error: jax finds no device: {device['failed']}", file=sys.stderr)
        return 1
    gpu = device["platform"] != "cpu"
    if args.record and not gpu:
        parser.error("--record keeps what a GPU gave, and jax finds none here")
    size = {what: sizes[2 if args.quick else 0 if gpu else 1] for what, sizes in SIZES.items()}
    print(f"{device['kind']}, jax {device['jax']}" + ("" if gpu else "; no GPU: sizes for a CPU"))
    if not gpu:
        print("left out: tf32, which a CPU has not")
    rates: Rates = {}
    tables = [Table("matrix")]
    tables[0].fill(size, rates)
    if not rates:
        return 1
    for name in args.parts:
        tables.append(Table(name))
        tables[-1].fill(size, rates)
    for table in tables if args.record else ():
        if table.rows:
            notes = [f"{device['kind']}, jax {device['jax']}.", *table.told]
            records.save(f"gpu_{table.name}", table.part.columns, table.rows, notes)
    return 1 if any(table.failed for table in tables) else 0


if __name__ == "__main__":
    sys.exit(main())
