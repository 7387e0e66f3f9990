"""`diff`: how two results differ on the same queries, with the paired-bootstrap interval.

    python -m siamese_jax diff runs/triplet runs/infonce
    python -m siamese_jax diff runs/triplet whitened.json

Each is a finished run's folder or a file that `evaluate --out` wrote, whose FILE.per_query.npz must
lie beside it. Other images, other labels or another split are refused: such numbers cannot be
compared. An interval that holds 0 means that these queries do not tell the two apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.storage import run_folder
from siamese_jax.storage.arrays import read_arrays
from siamese_jax.storage.json_files import read_json, write_json
from siamese_jax.storage.run_folder import RunFolder
from siamese_jax.tools import cli
from siamese_jax.tools.evaluate import fitted_warning

SUFFIXES = (".json",)


class Measured(NamedTuple):
    """One of the two results.

    Attributes:
      split: of the data, if known.
      provenance: what the numbers came from.
      columns: arrays that `siamese_jax.metrics.evaluation.save_per_query` wrote.
      run: the folder, of a run.
    """

    split: str | None
    provenance: dict[str, Any]
    columns: dict[str, np.ndarray]
    run: RunFolder | None = None


def options() -> cli.Parser:
    """The tool's options."""
    parser = cli.Parser("diff", __doc__)
    what = "a finished run's folder, or a file that `evaluate --out` wrote"
    parser.add_argument("a", type=Path, metavar="A", help=what)
    parser.add_argument("b", type=Path, metavar="B", help="what to compare with it, likewise")
    parser.add_argument("--confidence", type=cli.SHARE, default=0.95, help="of the interval")
    parser.add_argument(
        "--split",
        choices=("test", "validation", "train"),
        help="whose queries of a run; default: B's or A's, or test",
    )
    cli.add_outputs(parser, SUFFIXES)
    return parser


def main(argv: Sequence[str]) -> None:
    args = options().parse_args(argv)
    cli.check_outputs(args.out, SUFFIXES)

    from siamese_jax.report.tables import aligned

    a, b = read_both(args.a, args.b, args.split)
    fields = explanations(a, b)
    rows = differences(a.columns, b.columns, args.confidence)
    print(f"A = {args.a}\nB = {args.b}")
    for name, one in (("A", a), ("B", b)):
        if warning := fitted_warning(one.provenance):
            print(f"{name}: {warning}")
    for name, (old, new) in fields.items():
        print(f"  {name}: {old} -> {new}")
    known = {name for name, one in (("A", a), ("B", b)) if fitted_warning(one.provenance)}
    ends = f"{args.confidence:.0%} interval of B - A"
    table: list[tuple[Any, ...]] = [("metric", "A", "B", "B - A", ends, "")]
    for name, row in rows.items():
        told = "" if row["low"] <= 0 <= row["high"] else "B" if row["difference"] > 0 else "A"
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        verdict = f"{told} is better" if told else "not told apart"
        verdict += ", on pictures that it was fitted to" if told in known else ""
        table.append((name, row["a"], row["b"], f"{row['difference']:+.4f}", interval, verdict))
    print(aligned(table))
    split = a.split or b.split
    named = f"{split} queries" if split else "queries"
    print(f"over {next(iter(rows.values()))['queries']} {named}, resampled in pairs")
    for path in args.out:
        content = {"a": str(args.a), "b": str(args.b), "config": fields, "split": split}
        write_json(path, {**content, "confidence": args.confidence, "metrics": rows})
        print(f"wrote {path}")


def read_both(a: Path, b: Path, split: str | None) -> tuple[Measured, Measured]:
    """Both results, of the same data and split; a run gives the split that the other one is of."""
    files = {path: _read_evaluation(path) for path in (a, b) if not path.is_dir()}
    given = [split, *(found.split for found in files.values())]
    known = {name for name in given if name is not None}
    if len(known) > 1:
        raise UserError(
            f"{a} and {b} cannot be compared: different splits, {' and '.join(sorted(known))}"
        )
    own = next(iter(known), "test")
    one, other = (files[path] if path in files else _read_run(path, own) for path in (a, b))
    if one.run and other.run:
        run_folder.check_comparable(one.run, other.run)
    return one, other


def _read_run(folder: Path, split: str) -> Measured:
    """A finished run, as it did on one of its splits."""
    run = run_folder.read(folder, finished=True)
    assert run.results is not None
    encoder = {"run": str(folder), "step": run.step, **run.facts["trunk"]}
    encoder |= {
        "image_size": run.config["trunk"]["image_size"],
        "width": run.results["embedding_dim"],
    }
    provenance = {
        "encoder": encoder,
        "distance": run.config["distance"],
        "versions": run.facts["versions"],
    }
    return Measured(split, provenance, _columns(run_folder.per_query_path(folder, split)), run)


def _read_evaluation(path: Path) -> Measured:
    """What `evaluate --out` wrote: a .json, or a .csv whose provenance is beside it."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give the folder of a run, or a file of `evaluate --out`"
        )
    facts, per_query = Path(f"{path}.run.json"), Path(f"{path}.per_query.npz")
    facts = path if path.suffix.lower() == ".json" else facts
    for needed in (per_query, facts):
        if not needed.exists():
            raise UserError(
                f"{path} cannot be compared: {needed.name} is not beside it; `evaluate --out` "
                "writes both"
            )
    content = read_json(facts)
    provenance = content.get("provenance") if facts == path else content
    if not isinstance(provenance, dict) or "split" not in provenance:
        raise UserError(f"{facts} does not say what it was measured on: evaluate again")
    told = ("data", "split", "labels", "device")
    kept = {name: value for name, value in provenance.items() if name not in told}
    return Measured(provenance["split"], kept, _columns(per_query))


def _columns(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise UserError(f"{path} is missing: it is no split of the run, or the run is not finished")
    columns = read_arrays(path, "file of per-query values")
    if lost := {"query", "gallery", "relevant"} - columns.keys():
        raise UserError(f"{path} does not say its {min(lost)}: run or evaluate again")
    return columns


def explanations(a: Measured, b: Measured) -> dict[str, tuple[Any, Any]]:
    """What may explain a difference: config fields of two runs, and the trunk and versions used."""
    found = changed_fields(a.provenance, b.provenance)
    if a.run is None or b.run is None:
        return found
    said = ("encoder.run", "encoder.step", "encoder.image_size", "encoder.width", "distance")
    used = {name: values for name, values in found.items() if name not in said}
    return changed_fields(a.run.config, b.run.config) | used


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
    """Metric -> both means, B - A and its paired interval, over queries that both have.

    Raises:
      UserError: they asked different queries, searched different images, or share no metric.
    """
    from siamese_jax.metrics.bootstrap import difference, interval

    a, b = _paired(a), _paired(b)
    for side, what in (("query", "asked different queries"), ("gallery", "searched other images")):
        if not np.array_equal(a[side], b[side]):
            only = max(1, len(np.setxor1d(a[side], b[side])))
            raise UserError(
                f"the two {what} ({only} are in one alone): other data, another split, or an image "
                "that could not be read in one of them; they cannot be compared"
            )
    if not np.array_equal(a["relevant"], b["relevant"]):
        raise UserError("the two count different answers as right; they cannot be compared")
    floats = [name for name in a if name in b and a[name].dtype.kind == "f"]
    shared = [name for name in floats if not np.isnan(a[name]).all()]
    if not shared:
        raise UserError("the two have no metric in common; give both the same ks and metrics")
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


def _paired(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The queries that have an answer, in the order of their marks, which all files share."""
    values = [value for value in columns.values() if value.dtype.kind == "f"]
    answered = ~np.all(np.isnan(values), axis=0) if values else np.ones(len(columns["query"]), bool)
    order = np.flatnonzero(answered)
    order = order[np.argsort(columns["query"][order], kind="stable")]
    return {name: v if name == "gallery" else v[order] for name, v in columns.items()}
