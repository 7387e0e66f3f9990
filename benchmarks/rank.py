"""rank() beside the exact searches people use: FAISS, usearch, torch, scikit-learn, NumPy.

    python benchmarks/rank.py                        # all shapes, or the large one on a GPU
    python benchmarks/rank.py --shapes 2048,64000,128,10 --repeats 9 --only rank,FAISS

Contenders take turns within every repeat, so that a busy machine disturbs all alike; times are
medians. Peers that are not installed are left out. Building an index is not timed for any of them;
"rank, arrays" prepares the gallery inside the time, "rank, Gallery" has it prepared, as FAISS has.
"of rate" is 2 q g d / time over the rate of a plain matrix product of the same dtype, measured in
the same run. "CPU s" is processor time, which other programs on the machine disturb less. "same"
is the share of queries with exactly our answer, row for row. Of those that differ (32 at most),
"us" have the answer of a stable sort of float64 distances, rounded to float32, and so many "it".
"right" and "recall" are how often and how nearly 64 queries spread over all have that answer.
With --approximate, the graph indexes of `rank` are timed too, and their recall is given.
"""

import argparse
import importlib
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import measuring
import numpy as np
import records

from siamese_jax.search.engine import reused_memory
from siamese_jax.search.engine.approximate_index import recall
from siamese_jax.search.gallery import Gallery
from siamese_jax.search.ranking import rank

CPU_SHAPES = [
    (2048, 64000, 128, 10),
    (2048, 64000, 512, 100),
    (1000, 20000, 2048, 10),
    (1, 1_000_000, 128, 10),
    # Small ones.
    (1, 10_000, 512, 10),
    (965, 965, 512, 10),
    (5924, 5924, 512, 8),
    # Many answers for the size of the gallery.
    (2000, 5000, 128, 100),
    (2000, 5000, 512, 100),
    (2000, 20000, 512, 200),
    (6000, 6000, 512, 1000),
]
GPU_SHAPES = [(10_000, 1_000_000, 128, 100)]

Search = Callable[[], np.ndarray]


def ours(x: np.ndarray, y: np.ndarray, k: int, approximate: bool) -> dict[str, Search]:
    gallery = Gallery(y, resident=True)
    found: dict[str, Search] = {
        "rank, Gallery": lambda: rank(x, gallery, k).indices,
        "rank, arrays": lambda: rank(x, y, k).indices,
        "rank, float32": lambda: rank(x, gallery, k, precision="float32").indices,
    }
    for library in ("usearch", "faiss") if approximate else ():
        found[f"rank, ~{library}"] = lambda name=library: (  # type: ignore[misc]
            rank(x, gallery, k, approximate=name).indices
        )
    if jax.default_backend() != "cpu":
        limit = 8 * 2**30
        found = {
            f"rank, {precision}": lambda p=precision: (
                rank(  # type: ignore[misc]
                    x, gallery, k, precision=p, memory_limit=limit
                ).indices
            )
            for precision in ("float32", "tf32", "bfloat16")
        }
    return found


def faiss_flat(x: np.ndarray, y: np.ndarray, k: int) -> Search:
    index = importlib.import_module("faiss").IndexFlatL2(y.shape[1])
    index.add(y)
    return lambda: index.search(x, k)[1]


def usearch_exact(x: np.ndarray, y: np.ndarray, k: int) -> Search:
    module = importlib.import_module("usearch.index")
    return lambda: module.search(y, x, k, module.MetricKind.L2sq, exact=True).keys.reshape(-1, k)


def sklearn_brute(x: np.ndarray, y: np.ndarray, k: int) -> Search:
    module = importlib.import_module("sklearn.neighbors")
    model = module.NearestNeighbors(n_neighbors=k, algorithm="brute").fit(y)
    return lambda: model.kneighbors(x, return_distance=False)


def torch_topk(x: np.ndarray, y: np.ndarray, k: int) -> Search:
    torch = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.from_numpy(v).to(device) for v in (x, y))
    square = (b * b).sum(1)
    step = max(1, 2**29 // len(y))

    def search() -> np.ndarray:
        parts = [
            torch.addmm(square, a[i : i + step], b.T, alpha=-2).topk(k, largest=False)[1]
            for i in range(0, len(a), step)
        ]
        return torch.cat(parts).cpu().numpy()

    return search


def numpy_partition(x: np.ndarray, y: np.ndarray, k: int) -> Search:
    square = np.einsum("nd,nd->n", y, y)
    step = max(1, 2**25 // len(y))

    def search() -> np.ndarray:
        parts = []
        for i in range(0, len(x), step):
            s = square - 2 * x[i : i + step] @ y.T
            near = np.argpartition(s, k - 1, axis=1)[:, :k]
            order = np.argsort(np.take_along_axis(s, near, axis=1), axis=1, kind="stable")
            parts.append(np.take_along_axis(near, order, axis=1))
        return np.concatenate(parts)

    return search


PEERS = {
    "FAISS flat": faiss_flat,
    "usearch exact": usearch_exact,
    "torch": torch_topk,
    "scikit-learn": sklearn_brute,
    "NumPy": numpy_partition,
}


def peak(search: Search) -> float:
    """MiB by which the resident memory rises at its highest, NaN where it cannot be known."""
    reused_memory.clear()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(name: str) -> int:
        line = next(v for v in status.read_text().splitlines() if v.startswith(name))
        return int(line.split()[1])

    try:
        reset.write_text("5")
        before = read("VmRSS")
        search()
        return (read("VmHWM") - before) / 1024
    except (OSError, StopIteration):
        return float("nan")


def compare(
    q: int, g: int, d: int, k: int, repeats: int, only: list[str], approximate: bool
) -> dict[str, str]:
    """Prints the table of a shape; the row of a record: FAISS's time over ours, of every turn."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((q, d), dtype=np.float32)
    y = rng.standard_normal((g, d), dtype=np.float32)
    searches = ours(x, y, k, approximate)
    for name, build in PEERS.items():
        try:
            searches[name] = build(x, y, k)
        except ImportError:
            print(f"({name} is not installed)")
    if only:
        searches = {n: s for n, s in searches.items() if any(n.startswith(v) for v in only)}
    rates = {kind: measuring.matrix_rate(kind) for kind in ("float32", "bfloat16")}
    print(f"\n{q} queries, {g} items, d = {d}, k = {k}; matrix product, Gflop/s: ", end="")
    print(", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in rates.items()))
    answers = {name: search() for name, search in searches.items()}
    memory = {name: peak(search) for name, search in searches.items()}
    first = next(iter(searches))
    differ = {
        name: np.flatnonzero(np.any(found != answers[first], axis=1))
        for name, found in answers.items()
    }
    spread = np.unique(np.linspace(0, q - 1, min(q, 64)).astype(int))
    some = np.unique(np.concatenate([spread, *(rows[:32] for rows in differ.values())]))
    truth = dict(zip(some.tolist(), measuring.float64_sort(x[some], y, k), strict=True))

    def right(name: str, rows: np.ndarray) -> list[bool]:
        return [bool((answers[name][row] == truth[row]).all()) for row in rows.tolist()]

    spent = measuring.turns(searches, repeats)
    unknown = [measuring.Spent(float("nan"), float("nan"))]
    faiss, faiss_cpu = measuring.median(spent.get("FAISS flat", unknown))
    print(
        f"{'':15}{'ms':>8}{'best ms':>9}{'FAISS / it':>11}{'CPU s':>8}{'FAISS / it':>11}"
        f"{'of rate':>9}{'peak MiB':>10}{'same':>9}{'us, it':>12}{'right':>8}{'recall':>8}"
    )
    for name in searches:
        (median, cpu), best = measuring.median(spent[name]), min(spent[name]).wall
        half = name.startswith("rank") and ("bf" in name or (q >= 64 and "32" not in name))
        rate = rates["bfloat16" if half else "float32"]
        same = np.mean(np.all(answers[name] == answers[first], axis=1))
        other = differ[name][:32]
        sides = f"{sum(right(first, other))}, {sum(right(name, other))} of {len(other)}"
        found = recall(answers[name][spread], np.stack([truth[row] for row in spread.tolist()]))
        print(
            f"{name:15}{median * 1e3:8.0f}{best * 1e3:9.0f}{faiss / median:11.2f}"
            f"{cpu:8.2f}{faiss_cpu / cpu:11.2f}{2 * q * g * d / median / rate:9.0%}"
            f"{memory[name]:10.0f}{same:9.2%}{sides:>12}"
            f"{np.mean(right(name, spread)):8.1%}{found:8.4f}",
            flush=True,
        )
    row = {"shape": f"{q:,} x {g:,} x {d:,}, k = {k:,}"}
    for name in (n for n in searches if n.startswith("rank") and "FAISS flat" in spent):
        pairs = zip(spent["FAISS flat"], spent[name], strict=True)
        turns = [theirs.wall / ours.wall for theirs, ours in pairs]
        row[name] = f"{statistics.median(turns):.2f} ({min(turns):.2f} to {max(turns):.2f})"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="*", help="q,g,d,k")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="names to take, by how they begin, with commas")
    parser.add_argument("--approximate", action="store_true")
    records.add_option(parser)
    args = parser.parse_args()
    shapes = CPU_SHAPES if jax.default_backend() == "cpu" else GPU_SHAPES
    if args.shapes:
        shapes = [
            (int(q), int(g), int(d), int(k)) for q, g, d, k in (s.split(",") for s in args.shapes)
        ]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    only = [v for v in args.only.split(",") if v]
    faiss = any("FAISS flat".startswith(v) for v in only or ("",)) and find_spec("faiss")
    if args.record and not faiss:
        parser.error("--record compares with FAISS: install faiss-cpu, and name FAISS in --only")
    rows = [
        compare(*shape, repeats=args.repeats, only=only, approximate=args.approximate)
        for shape in shapes
    ]
    if args.record:
        note = f"FAISS's wall time over ours: median and range of {args.repeats} turns."
        records.save("rank", list(rows[0]), [list(row.values()) for row in rows], [note])


if __name__ == "__main__":
    main()
