"""recall@1/10/100/1000 and map@r of a set searching itself: us and pytorch-metric-learning.

    python benchmarks/metrics.py --n 60502 --d 512        (the size of SOP's test set)

Both take turns in one process; medians, ratios, the values and the peak of resident memory above
the data are printed. On a machine that others use too, processor time is the fairer measure.
pytorch-metric-learning's AccuracyCalculator knows precision@1 and map@r; its documented way to
add a metric, a subclass, gives it the other recalls from the 1000 neighbours that they need.
"map@r alone" is its own default search, as deep as the largest class.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import records

from siamese_jax.metrics.retrieval import evaluate

KS = (1, 10, 100, 1000)


def data(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows in classes of 2 to 11, some of them hard to tell apart."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n), rng.integers(2, 12, n))[:n]
    labels[-1] = labels[-2]  # nobody is cut off from his class, whom tools would count differently
    centres = rng.normal(size=(int(labels.max()) + 1, d)).astype(np.float32)
    rows = centres[labels] + rng.uniform(1, 4.5, (n, 1)) * rng.normal(size=(n, d))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), labels


def ours(rows: np.ndarray, labels: np.ndarray, whole: bool) -> dict[str, float]:
    names = ["map@r", "recall@k"] if whole else ["map@r", "recall@1"]
    return evaluate(rows, labels, ks=KS, metrics=names)


def theirs(rows: np.ndarray, labels: np.ndarray, whole: bool) -> dict[str, float]:
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    def recall(k: int) -> Callable[..., float]:
        def value(self, knn_labels, query_labels, **_):
            return float((knn_labels[:, :k] == query_labels[:, None]).any(1).float().mean())

        return value

    class Extended(AccuracyCalculator):
        calculate_recall_at_10 = recall(10)
        calculate_recall_at_100 = recall(100)
        calculate_recall_at_1000 = recall(1000)

        def requires_knn(self):
            more = [f"recall_at_{k}" for k in KS[1:]]
            return [*super().requires_knn(), *more]

    include = ["precision_at_1", "mean_average_precision_at_r"]
    if whole:
        include += [f"recall_at_{k}" for k in KS[1:]]
    depth = max(KS) if whole else "max_bin_count"
    tool = Extended(include=tuple(include), k=depth, device=torch.device("cpu"))
    found = tool.get_accuracy(rows, labels)
    names = {"precision_at_1": "recall@1", "mean_average_precision_at_r": "map@r"}
    return {names.get(name, name.replace("_at_", "@")): value for name, value in found.items()}


class Peak:
    """The most resident memory above that at the start, in MiB."""

    def __enter__(self) -> "Peak":
        self.start, self.most, self.done = resident(), 0.0, False
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done:
            self.most = max(self.most, resident() - self.start)
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.thread.join()


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20000)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    records.add_option(parser)
    args = parser.parse_args()
    rows, labels = data(args.n, args.d)
    ours(*data(2000, args.d), True)
    theirs(*data(2000, args.d), True)
    table = []
    for whole in (True, False):
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        processor: dict[str, list[float]] = {"ours": [], "theirs": []}
        peak: dict[str, float] = {}
        values: dict[str, dict[str, float]] = {}
        for _ in range(args.repeat):
            for name, tool in (("ours", ours), ("theirs", theirs)):
                with Peak() as watch:
                    start, used = time.perf_counter(), time.process_time()
                    values[name] = tool(rows, labels, whole)
                    seconds[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - used)
                peak.setdefault(name, watch.most)
        wall = {name: statistics.median(times) for name, times in seconds.items()}
        cpu = {name: statistics.median(times) for name, times in processor.items()}
        what = "recall@1/10/100/1000, map@r" if whole else "recall@1, map@r"
        print(f"\n{what}: n={args.n}")
        print(f"  {'':8}{'wall s':>10}{'processor s':>14}{'MiB':>8}")
        for name in seconds:
            print(f"  {name:8}{wall[name]:10.2f}{cpu[name]:14.2f}{peak[name]:8.0f}")
        ratios = (times["theirs"] / times["ours"] for times in (wall, cpu))
        print("  ratio   {:10.2f}{:14.2f}".format(*ratios))
        for name, value in values["theirs"].items():
            print(f"  {name:12} {values['ours'][name]:.8f} {value:.8f}")
        memory = [f"{peak[name]:,.0f} MiB" for name in seconds]
        table.append([what, f"{wall['theirs'] / wall['ours']:.2f}", *memory])
    if args.record:
        columns = ["metrics", "ours is faster by", "peak memory, ours", "theirs"]
        note = f"{args.n:,} x {args.d} embeddings; medians of {args.repeat} turns."
        records.save("metrics", columns, table, [note])


if __name__ == "__main__":
    main()
