r"""The default experiment on few classes: does training ever end below the bare trunk?

    python benchmarks/few_classes.py --data=emoji --data=shop=DIR --share=.05,.1 --seeds=0,1,2

Of each data set a share of the classes is trained on, the others are the test. Nothing is set by
hand: stages, shrinkage and steps are chosen on the training classes. A cell is worse where the
paired 95 % interval of its gain over the bare trunk lies below 0. Only the trunk's pass over the
images is shared between cells. DIR is read as `--config.data.source=folder` does.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import records

from siamese_jax.storage.cache import enable_compilation_cache
from siamese_jax.tools.configs import read_config
from siamese_jax.train.experiment import train

METRICS = ("recall@1", "map@r")
COLUMNS = ["data", "trained on", "metric", "bare trunk", "fitted", "after", "gain", "worse"]


def cell(data: str, share: float, seed: int, size: int | None, workdir: Path) -> dict:
    """The results of one run."""
    config = read_config("resnet_triplet")[0]
    config.trunk.name, config.trunk.offline_fallback = "efficientnet_lite0", None
    config.seed = seed
    name, _, root = data.partition("=")
    if root:
        config.data.update(source="folder", root=root, split="classes")
    config.data.test_fraction = 1 - share
    config.trunk.image_size = size or config.trunk.image_size
    return train(config, workdir / f"{name}-{share:g}-{seed}")


def rows_of(data: str, share: float, found: list[dict]) -> list[list[str]]:
    """A row for each metric: the means over the seeds, and how many cells are worse."""
    rows = []
    for metric in METRICS:
        of = {
            part: np.array([one["test"].get(part, one["test"]["after"])[metric] for one in found])
            for part in ("before", "fitted", "after", "gain, high")
        }
        gain = of["after"] - of["before"]
        worse = int((of["gain, high"] < 0).sum())
        classes = ", ".join(str(one["split"]["train"]["classes"]) for one in found)
        numbers = [*(of[part].mean() for part in ("before", "fitted", "after")), gain.mean()]
        shown = [f"{number:.3f}" for number in numbers]
        rows.append([data.partition("=")[0], f"{share:.0%} ({classes} classes)", metric, *shown,
                     f"{worse} of {len(found)}"])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="emoji, or NAME=DIR")
    parser.add_argument("--share", default=".05,.1,.2,.4", help="of the classes to train on")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--image-size", type=int, help="default: the config's")
    parser.add_argument("--workdir", type=Path, help="keeps the runs; default: a temporary folder")
    records.add_option(parser)
    args = parser.parse_args()
    enable_compilation_cache()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for data in args.data:
            for share in map(float, args.share.split(",")):
                seeds = map(int, args.seeds.split(","))
                place = args.workdir or Path(temporary)
                found = [cell(data, share, seed, args.image_size, place) for seed in seeds]
                rows += rows_of(data, share, found)
                for row in rows[-len(METRICS) :]:
                    print("  ".join(row), flush=True)
    if args.record:
        note = f"Means over the seeds {args.seeds}, which also choose the classes."
        records.save("few_classes", COLUMNS, rows, [note])


if __name__ == "__main__":
    main()
