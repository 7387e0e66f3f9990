"""`evaluate`: retrieval metrics of an encoder on labelled images, with where they came from.

python -m siamese_jax evaluate --encoder=resnet50 --query=photos/ --out=metrics.json
python -m siamese_jax evaluate --encoder=runs/emoji        (the run's own test split)
python -m siamese_jax evaluate --encoder=resnet50 --landmarks=gnd_roxford5k.pkl --gallery=jpg/
"""

import argparse
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax import values
from siamese_jax.errors import UserError
from siamese_jax.storage.json_files import write_json
from siamese_jax.storage.writing import written
from siamese_jax.tools import cli, evaluate_landmarks, evaluate_structure, reranking, search

if TYPE_CHECKING:
    from siamese_jax.metrics.by_class import ClassRow
    from siamese_jax.metrics.retrieval import PerQuery

SUFFIXES = (".json", ".csv")


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if args.landmarks:
        report(args, *evaluate_landmarks.evaluate(args))
        return

    from siamese_jax.metrics.evaluation import summary
    from siamese_jax.metrics.retrieval import DEFAULT, expand
    from siamese_jax.report.tables import aligned

    expand(args.metrics or DEFAULT, args.ks)  # A wrong name is said before the work.
    pair = search.open_pair(args, needed=True)
    if not pair.labelled:
        raise UserError(
            f"{args.query or args.encoder[0]}: no labels to evaluate by; make class folders, a CSV "
            "with labels, or give --labels=stem where file names tell the class"
        )
    pair = reranking.expand(pair, args)
    values = reranking.measure(pair, reranking.order(pair, args), args.ks, args.metrics)
    metrics = summary(values, len(pair.gallery.vectors))
    if args.interval is not None:
        metrics = with_intervals(metrics, values, args, pair.query.labels)
    classes = class_rows(pair, values)
    blocks = {"retrieval": metrics, **evaluate_structure.measure(pair, args)}
    report(args, blocks, pair, values, classes)
    worst = worst_classes(classes, next(iter(values.values)), args.worst)
    if worst:
        print("\n" + aligned(worst))
    if args.per_query:
        write_per_query(args.per_query, pair, values)
        print(f"wrote {args.per_query}")
    if args.per_class:
        write_per_class(args.per_class, classes, list(values.values))
        print(f"wrote {args.per_class}")


def options() -> cli.Parser:
    """The tool's options."""
    parser = cli.Parser("evaluate", __doc__)
    search.add_arguments(parser)
    reranking.add_arguments(parser)
    evaluate_structure.add_arguments(parser)
    evaluate_landmarks.add_arguments(parser)
    group = parser.add_argument_group("metrics and tables")
    group.add_argument(
        "--metrics",
        type=cli.Value(values.several(values.text("a metric's name"), 1)),
        help="names such as recall@k,map@r,ndcg@10; default: all that rank by labels",
    )
    group.add_argument("--per-query", help="a CSV file to write, one row a query")
    group.add_argument("--per-class", help="a CSV file to write, one row a class, the worst first")
    group.add_argument("--worst", type=cli.COUNT, default=5, help="classes found worst, to list")
    group.add_argument(
        "--interval",
        type=cli.SHARE,
        metavar="SHARE",
        help="bootstrap intervals that hold this share of resampled means, such as 0.95",
    )
    group.add_argument(
        "--resample",
        choices=("queries", "classes"),
        default="queries",
        help="what the intervals draw again; whole classes, to expect of other classes",
    )
    cli.add_outputs(parser, SUFFIXES)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line's options, checked; raises `UserError` for those that do not go together."""
    args = options().parse_args(argv)
    cli.check_outputs(args.out, SUFFIXES)
    for option in ("per_query", "per_class"):
        if path := getattr(args, option):
            cli.check_outputs([path], (".csv",), f"--{option.replace('_', '-')}")
    reranking.check(args)
    if args.landmarks:
        evaluate_landmarks.check(args)
    return args


def report(
    args: argparse.Namespace,
    blocks: Mapping[str, Mapping[str, Any]],
    pair: search.Pair,
    values: "PerQuery",
    classes: Sequence["ClassRow"] = (),
) -> None:
    """Prints the blocks of metrics, and writes them to the files that were asked for.

    Beside each file, FILE.per_query.npz holds the metrics of every query, for `diff`.
    """
    from siamese_jax.metrics.evaluation import save_per_query
    from siamese_jax.report.tables import text_table

    print(text_table(blocks))
    if warning := fitted_warning(pair.provenance):
        print(warning)
    for path in args.out:
        if Path(path).suffix.lower() == ".json":
            table = [row._asdict() | {"label": str(row.label)} for row in classes]
            first, *others = blocks
            content = {"metrics": blocks[first], **{name: blocks[name] for name in others}}
            write_json(path, content | {"classes": table, "provenance": pair.provenance})
        else:
            write_metrics_csv(path, blocks)
            search.write_provenance(path, pair.provenance)
        save_per_query(Path(f"{path}.per_query.npz"), values, pair.query.marks, pair.gallery.marks)
        print(f"wrote {path}")


def fitted_warning(provenance: Mapping[str, Any]) -> str | None:
    """One line where an encoder was measured on pictures that it was fitted to; None otherwise."""
    seen = provenance.get("fitted_to")
    if not seen:
        return None
    return (
        f"WARNING: the encoder was fitted to {seen['query']} of the queries and {seen['gallery']} "
        "of the gallery's pictures: on others it will do less well"
    )


def class_rows(pair: search.Pair, values: "PerQuery") -> list["ClassRow"]:
    """The metrics class by class, worst first; images without a label have no part in it."""
    from siamese_jax.metrics.by_class import by_class
    from siamese_jax.metrics.retrieval import PerQuery

    known, labels = pair.query.labelled, pair.query.labels
    part = PerQuery({n: v[known] for n, v in values.values.items()}, values.relevant[known])
    return by_class(part, labels[known], names=pair.query.classes if labels.ndim == 2 else ())


def worst_classes(classes: Sequence["ClassRow"], first: str, n: int) -> list[tuple[Any, ...]]:
    """(class, its first metric, its queries), worst first; nothing where a class is one query."""
    counted = [row for row in classes if row.queries]
    if len(counted) < 2 or max(row.queries for row in counted) == 1:
        return []
    rows = [(str(row.label), row.means[first], row.queries) for row in counted[:n]]
    return [("worst classes", first, "queries"), *rows]


def with_intervals(
    metrics: dict[str, Any], values: "PerQuery", args: argparse.Namespace, labels: np.ndarray
) -> dict[str, dict[str, Any]]:
    """The metrics with the two ends of their bootstrap intervals."""
    from siamese_jax.metrics.bootstrap import interval

    if args.resample == "classes" and labels.ndim == 2:
        raise UserError("--resample=classes needs one label for each image; resample queries")
    groups = labels if args.resample == "classes" else None
    found = {
        name: interval(values.values[name], confidence=args.interval, groups=groups)
        for name in metrics
        if name in values.values
    }
    return {
        "value": metrics,
        "low": {name: ends.low for name, ends in found.items()},
        "high": {name: ends.high for name, ends in found.items()},
    }


def write_per_query(path: str, pair: search.Pair, values: "PerQuery") -> None:
    """A row a query: path, label, its relevant items, its metrics; empty cells for lone queries."""
    rows = []
    for i, query in enumerate(pair.query.records.path):
        row = [float(value[i]) for value in values.values.values()]
        cells = ["" if np.isnan(value) else value for value in row]
        rows.append([query, int(values.relevant[i]), *cells])
    write_csv(path, ["query", "relevant", *values.values], rows)


def write_per_class(path: str, classes: Sequence["ClassRow"], names: Sequence[str]) -> None:
    """A row a class: its queries that count, its lone ones, the means of its metrics."""
    rows = [
        [row.label, row.queries, row.lone, *(row.means.get(name, "") for name in names)]
        for row in classes
    ]
    write_csv(path, ["class", "queries", "lone", *names], rows)


def write_metrics_csv(path: str, blocks: Mapping[str, Mapping[str, Any]]) -> None:
    """A row a metric: its value, or its columns where it has several, such as an interval."""
    rows: list[list[Any]] = []
    names: dict[str, None] = {}
    for block in blocks.values():
        columns = block if any(isinstance(v, Mapping) for v in block.values()) else {"value": block}
        names |= dict.fromkeys(columns)
        measures = dict.fromkeys(name for column in columns.values() for name in column)
        rows += [[name, columns] for name in measures]
    table = [[n, *(columns.get(c, {}).get(n) for c in names)] for n, columns in rows]
    write_csv(path, ["metric", *names], table)


def write_csv(path: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table as CSV, and makes its folder if need be."""
    with written(path, newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
