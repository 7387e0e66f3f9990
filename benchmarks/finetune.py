r"""Fine-tuning on photographs of yours: the bare trunk, the fitted head, and what the steps add.

    python benchmarks/finetune.py --data=shop=DIR --seeds=0,1,2
    python benchmarks/finetune.py --data=shop=DIR --set=optim.learning_rate=1e-4

`configs/finetune.py` as it is, but for its trunk, whose weights come from a package, and for what
`--set` changes. A seed also chooses the classes that are trained on, those that choose the step,
and those of the test. DIR is read as `--config.data.source=folder` does.
"""

import argparse
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import records

from siamese_jax.storage.cache import enable_compilation_cache
from siamese_jax.tools.configs import override, read_config
from siamese_jax.train.experiment import train

METRICS = ("recall@1", "recall@10", "map@r")
COLUMNS = [
    "data",
    "what differs",
    "metric",
    "before",
    "fitted",
    "after",
    "after - fitted",
    "result",
]

NOTE = "Means and standard deviations over the seeds {}, which also choose the classes of the test."


def cell(name: str, data: str, settings: str, seed: int, workdir: Path) -> dict[str, Any]:
    """The results of one run of a config, with "a=1 b=2" set in it."""
    config = read_config(name)[0]
    config.trunk.name, config.trunk.offline_fallback = "efficientnet_lite0", None
    config.seed = seed
    called, _, root = data.partition("=")
    if root:
        config.data.update(source="folder", root=root, split="classes")
    override(config, [f"--config.{one}" for one in shlex.split(settings)])
    plain = "".join(c if c.isalnum() else "-" for c in settings)
    return train(config, workdir / f"{name}-{called}-{plain}-{seed}")


def spread(values: np.ndarray) -> str:
    """The mean, and behind it the standard deviation where there are several.

    >>> spread(np.array([0.5])), spread(np.array([0.5, 0.7]))
    ('.500', '.600 ± .100')
    """
    shown = [f"{values.mean():.3f}", f"{values.std():.3f}"][: 1 + (len(values) > 1)]
    return " ± ".join(one.replace("0.", ".", 1) for one in shown)


def rows_of(data: str, differs: str, found: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each metric: means and deviations over the seeds, and what was saved in each."""
    rows, saved = [], ", ".join(one["saved"] for one in found)
    for metric in METRICS:
        before, fitted, after = (
            np.array([one["test"][part][metric] for one in found])
            for part in ("before", "fitted", "after")
        )
        numbers = [spread(values) for values in (before, fitted, after, after - fitted)]
        rows.append([data.partition("=")[0], differs or "-", metric, *numbers, saved])
    return rows


def parsed(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="emoji, or NAME=DIR")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", help="'FIELD=VALUE ...', each by itself")
    parser.add_argument("--workdir", type=Path, help="keeps the runs; default: a temporary folder")
    records.add_option(parser)
    return parser.parse_args()


def measured(args: argparse.Namespace, config: str, settings: list[str]) -> list[list[str]]:
    """The rows of a config with each of the settings, told as they come."""
    enable_compilation_cache()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = args.workdir or Path(temporary)
        for data in args.data:
            for chosen in settings:
                seeds = map(int, args.seeds.split(","))
                found = [cell(config, data, chosen, seed, place) for seed in seeds]
                rows += rows_of(data, chosen, found)
                for row in rows[-len(METRICS) :]:
                    print("  ".join(row), flush=True)
    return rows


def main() -> None:
    args = parsed(__doc__)
    rows = measured(args, "finetune", args.set or [""])
    if args.record:
        records.save("finetune", COLUMNS, rows, [NOTE.format(args.seeds)])


if __name__ == "__main__":
    main()
