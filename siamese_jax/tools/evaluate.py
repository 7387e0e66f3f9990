"""`evaluate`: retrieval metrics of an encoder on labelled images, with where they came from.

python -m siamese_jax evaluate --encoder=resnet50 --query=photos/ --out=metrics.json
python -m siamese_jax evaluate --encoder=runs/emoji        (the run's own test split)
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.tools import cli, reranking, search

if TYPE_CHECKING:
    from siamese_jax.metrics import PerQuery

SUFFIXES = (".json", ".csv")


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser("evaluate", __doc__)
    search.add_arguments(parser)
    reranking.add_arguments(parser)
    parser.add_argument(
        "--metrics",
        type=lambda text: tuple(text.split(",")),
        help="names such as recall@k,map@r,ndcg@10; default: all that rank by labels",
    )
    parser.add_argument("--per-query", help="a CSV file to write, one row a query")
    parser.add_argument(
        "--worst", type=cli.count, default=5, help="classes found worst, to list (%(default)s)"
    )
    parser.add_argument(
        "--interval",
        type=cli.share,
        metavar="SHARE",
        help="bootstrap intervals over the queries that hold this share, such as 0.95",
    )
    cli.add_outputs(parser, SUFFIXES)
    args = parser.parse_args(argv)
    cli.check_outputs(args.out, SUFFIXES)
    cli.check_outputs([args.per_query] if args.per_query else [], (".csv",))

    from siamese_jax.metrics import DEFAULT, expand
    from siamese_jax.report.summary import aligned, text_table

    expand(args.metrics or DEFAULT, args.ks)  # A wrong name is said before the work.
    pair = reranking.expand(search.open_pair(args), args)
    if not pair.labelled:
        raise UserError(
            f"{args.query or args.encoder}: no labels to evaluate by; make class folders, a CSV "
            "with labels, or give --labels=stem where file names tell the class"
        )
    values = reranking.measure(pair, args.rerank, args.ks, args.metrics)
    metrics = search.summary(pair, values)
    shown = metrics if args.interval is None else with_intervals(metrics, values, args.interval)
    print(text_table({"retrieval": shown}))
    worst = worst_classes(pair, values, args.worst)
    if worst:
        print("\n" + aligned(worst))
    if args.per_query:
        write_per_query(args.per_query, pair, values)
        print(f"wrote {args.per_query}")
    for path in args.out:
        if Path(path).suffix.lower() == ".json":
            search.write_json(path, {"metrics": shown, "provenance": pair.provenance})
        else:
            write_metrics_csv(path, shown)
            search.write_provenance(path, pair.provenance)
        print(f"wrote {path}")


def worst_classes(pair: search.Pair, values: "PerQuery", count: int) -> list[tuple[Any, ...]]:
    """(class, its first metric, its queries), worst first; nothing where a class is one query."""
    from siamese_jax.breakdown import by_class

    names = pair.query.records.class_names if pair.query.labels.ndim == 2 else ()
    classes = by_class(values, pair.query.labels, names=names)
    counted = [row for row in classes if row.queries]
    if max(row.queries for row in counted) == 1 or len(counted) == 1:
        return []
    first = next(iter(values.values))
    rows = [(str(row.label), row.means[first], row.queries) for row in counted[:count]]
    return [("worst classes", first, "queries"), *rows]


def with_intervals(
    metrics: dict[str, Any], values: "PerQuery", confidence: float
) -> dict[str, dict[str, Any]]:
    """The metrics with the two ends of their bootstrap intervals over the queries."""
    from siamese_jax.bootstrap import interval

    found = {
        name: interval(values.values[name], confidence=confidence)
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "relevant", *values.values])
        for i, query in enumerate(pair.query.records.path):
            row = [float(value[i]) for value in values.values.values()]
            cells = ["" if np.isnan(value) else value for value in row]
            writer.writerow([query, int(values.relevant[i]), *cells])


def write_metrics_csv(path: str, shown: Mapping[str, Any]) -> None:
    """A row a metric: its value, and its interval where that was asked for."""
    columns = shown if "value" in shown else {"value": shown}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", *columns])
        for name in columns["value"]:
            writer.writerow([name, *(column.get(name) for column in columns.values())])
