"""`diff`: how two runs differ on the same queries, with the paired-bootstrap interval.

    python -m siamese_jax diff runs/triplet runs/infonce

Runs on different images or different splits are refused: their numbers cannot be compared. An
interval that holds 0 means that these queries do not tell the two runs apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.tools import cli, search

SUFFIXES = (".json",)


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser("diff", __doc__)
    parser.add_argument("run_a", type=Path, help="a finished run's folder")
    parser.add_argument("run_b", type=Path, help="the one to compare with it")
    parser.add_argument(
        "--confidence", type=cli.share, default=0.95, help="of the interval (%(default)s)"
    )
    parser.add_argument(
        "--split", default="test", help="whose queries: test or validation (%(default)s)"
    )
    cli.add_outputs(parser, SUFFIXES)
    args = parser.parse_args(argv)
    cli.check_outputs(args.out, SUFFIXES)

    from siamese_jax.report.summary import aligned

    runs = [_read(folder, args.split) for folder in (args.run_a, args.run_b)]
    check_comparable(args.run_a, runs[0]["run"], args.run_b, runs[1]["run"])
    fields = changed_fields(runs[0]["config"], runs[1]["config"])
    rows = differences(runs[0]["queries"], runs[1]["queries"], args.confidence)
    print(f"A = {args.run_a}\nB = {args.run_b}")
    for name, (a, b) in fields.items():
        print(f"  {name}: {a} -> {b}")
    ends = f"{args.confidence:.0%} interval of B - A"
    table: list[tuple[Any, ...]] = [("metric", "A", "B", "B - A", ends, "")]
    for name, row in rows.items():
        told = "" if row["low"] <= 0 <= row["high"] else "B" if row["difference"] > 0 else "A"
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        verdict = f"{told} is better" if told else "not told apart"
        table.append((name, row["a"], row["b"], f"{row['difference']:+.4f}", interval, verdict))
    print(aligned(table))
    print(f"over {next(iter(rows.values()))['queries']} {args.split} queries, resampled in pairs")
    for path in args.out:
        content = {
            "a": str(args.run_a),
            "b": str(args.run_b),
            "config": fields,
            "split": args.split,
        }
        search.write_json(path, {**content, "confidence": args.confidence, "metrics": rows})
        print(f"wrote {path}")


def _read(folder: Path, split: str) -> dict[str, Any]:
    """The parts of a finished run that tell it from another one."""
    from siamese_jax.run_folder import read_json

    paths = {name: folder / f"{name}.json" for name in ("config", "run", "results")}
    per_query = folder / "report" / f"per_query_{split}.npz"
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; give the folder of a run")
    for path in (*paths.values(), per_query):
        if not path.exists():
            raise UserError(
                f"{folder} is not a finished run: {path.relative_to(folder)} is missing"
            )
    with np.load(per_query) as arrays:
        queries = dict(arrays)
    return {**{name: read_json(path) for name, path in paths.items()}, "queries": queries}


def check_comparable(a: Path, run_a: Mapping[str, Any], b: Path, run_b: Mapping[str, Any]) -> None:
    """UserError unless both runs were evaluated on the same images, split the same way.

    The data fingerprint covers each image's bytes, name, class, split and role.
    """
    if run_a["data"]["fingerprint"] == run_b["data"]["fingerprint"]:
        return
    splits = [
        ", ".join(f"{name} {part['images']} images" for name, part in run["split"].items())
        for run in (run_a, run_b)
    ]
    raise UserError(
        f"{a} and {b} cannot be compared: they were evaluated on different data or splits "
        f"({run_a['data']['source']}: {splits[0]}; {run_b['data']['source']}: {splits[1]}; "
        "fingerprints differ). Train both with the same data and data.split_seed"
    )


def changed_fields(
    config_a: Mapping[str, Any], config_b: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Dotted config fields whose values differ; None where a run has no such field."""
    from siamese_jax.report.page import flatten

    a, b = dict(flatten(config_a)), dict(flatten(config_b))
    names = dict.fromkeys([*a, *b])
    return {n: (a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n)}


def differences(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], confidence: float
) -> dict[str, dict[str, float]]:
    """Metric -> both means, B - A and its paired interval, over queries that both runs have.

    Raises:
      UserError: the runs asked different queries, or share no metric.
    """
    from siamese_jax.bootstrap import difference, interval

    if len(a["id"]) != len(b["id"]) or (a["id"] != b["id"]).any():
        only = len(np.setxor1d(a["id"], b["id"]))
        raise UserError(
            f"the runs asked different queries ({only} are in one alone), perhaps because an image "
            "could not be read in one of them; they cannot be compared"
        )
    shared = [name for name in a if name in b and name not in ("id", "relevant")]
    if not shared:
        raise UserError("the runs have no metric in common; give both the same eval.ks")
    rows = {}
    for name in shared:
        told = difference(a[name], b[name], confidence=confidence)
        means = [interval(x[name], resamples=1).mean for x in (a, b)]
        rows[name] = {
            "a": means[0],
            "b": means[1],
            "difference": told.mean,
            "low": told.low,
            "high": told.high,
            "queries": told.queries,
        }
    return rows
