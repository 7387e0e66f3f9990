"""`rank`: for every query, its nearest images of a gallery, as CSV, HTML, JSON or JSON lines.

    python -m siamese_jax rank --encoder=runs/emoji --query=photos/ --gallery=shop/ -k 10 \\
        --out=found.csv --out=found.html

Where labels are known on both sides, the metrics are printed too and stand in the HTML and JSON.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.data.labels import label_codes, share
from siamese_jax.errors import UserError
from siamese_jax.storage.json_files import json_text, write_json
from siamese_jax.storage.writing import written
from siamese_jax.tools import cli, images, reranking, search

if TYPE_CHECKING:
    from siamese_jax.report.run_page import Tile
    from siamese_jax.search.ranking import Ranking

SUFFIXES = (".csv", ".html", ".json", ".jsonl")
COLUMNS = ("query", "rank", "gallery", "distance", "query_label", "gallery_label", "correct")
METRICS = ("recall@k", "precision@k", "map@r", "r_precision", "mrr")
SHOWN = 5  # queries printed on the terminal where no file is asked for


class Found:
    """A ranking with the names of everything in it."""

    def __init__(self, pair: search.Pair, ranking: "Ranking") -> None:
        self.pair, self.indices = pair, np.asarray(ranking.indices)
        self.distances = np.asarray(ranking.distances)
        self.query_labels = images.shown_labels(pair.query)
        self.gallery_labels = images.shown_labels(pair.gallery)
        _, (self.query_codes, self.gallery_codes) = label_codes(
            pair.query.labels, pair.gallery.labels, what=["query labels", "gallery labels"]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def correct(self, row: int) -> list[bool | None]:
        """Whether each neighbour of a query shares its label; None where that is not known."""
        query, gallery = self.pair.query, self.pair.gallery
        items = self.indices[row]
        known = query.labelled[row] & gallery.labelled[items] & (items >= 0)
        shared = share(self.query_codes[row][None], self.gallery_codes[items])
        return [bool(s) if k else None for s, k in zip(shared, known, strict=True)]

    def neighbours(self, row: int) -> Iterator[tuple[int, int, float, bool | None]]:
        """(rank from 1, gallery row, distance, correct) of a query, as many as there are."""
        correct = self.correct(row)
        for c, j in enumerate(self.indices[row]):
            if j >= 0:
                yield c + 1, int(j), float(self.distances[row, c]), correct[c]

    def as_dict(self, row: int) -> dict[str, Any]:
        """One query with its label and neighbours, as JSON holds it."""
        return {
            "query": str(self.pair.query.records.path[row]),
            "label": self.query_labels[row] if self.pair.query.labelled[row] else None,
            "neighbours": [
                {
                    "rank": place,
                    "path": str(self.pair.gallery.records.path[j]),
                    "label": self.gallery_labels[j] if self.pair.gallery.labelled[j] else None,
                    "distance": distance,
                    "correct": correct,
                }
                for place, j, distance, correct in self.neighbours(row)
            ],
        }


def options() -> cli.Parser:
    """The tool's options."""
    parser = cli.Parser("rank", __doc__)
    search.add_arguments(parser)
    reranking.add_arguments(parser)
    parser.add_argument("-k", type=cli.COUNT, default=10, help="neighbours a query")
    parser.add_argument("--show", type=cli.COUNT, default=100, help="queries in the HTML")
    cli.add_outputs(parser, SUFFIXES)
    return parser


def main(argv: Sequence[str]) -> None:
    args = options().parse_args(argv)
    cli.check_outputs(args.out, SUFFIXES)
    reranking.check(args)

    pair = reranking.expand(search.open_pair(args), args)
    if args.k > len(pair.gallery.vectors):
        n = len(pair.gallery.vectors)
        print(f"-k {args.k} is more than the gallery's {n} images: every query lists all there are")
    way = reranking.order(pair, args)
    found = Found(pair, reranking.rank(pair, way, min(args.k, len(pair.gallery.vectors))))
    metrics: dict[str, Any] = {}
    if pair.labelled:
        from siamese_jax.metrics.evaluation import summary

        names = None if way else METRICS  # A re-ranking gives what its depth determines.
        try:
            values = reranking.measure(pair, way, args.ks, names)
            metrics = summary(values, len(pair.gallery.vectors))
        except UserError as error:  # The ranking stands: what is missing is an answer to look for.
            print(f"nothing is measured: {error}")
    for path in args.out:
        WRITERS[Path(path).suffix.lower()](path, found, metrics, args)
        print(f"wrote {path}")
    if not args.out:
        print_some(found)
    if metrics:
        from siamese_jax.report.tables import text_table

        print(text_table({"retrieval": metrics}))


def print_some(found: Found) -> None:
    """Prints the neighbours of the first queries, and how many queries are not shown."""
    for row in range(min(SHOWN, len(found))):
        print(found.pair.query.records.path[row])
        for place, j, distance, correct in found.neighbours(row):
            sign = {True: "right", False: "wrong", None: ""}[correct]
            print(f"  {place:>3}  {distance:.4f}  {found.pair.gallery.records.path[j]}  {sign}")
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN} queries more: --out=found.csv holds them all")


def _write_csv(path: str, found: Found, metrics: dict[str, Any], args: Any) -> None:
    with written(path, newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in range(len(found)):
            one = found.as_dict(row)
            for n in one["neighbours"]:
                # An unknown label or verdict is an empty cell.
                cells = [one["query"], n["rank"], n["path"], n["distance"], one["label"]]
                verdict = None if n["correct"] is None else int(n["correct"])
                writer.writerow([*cells, n["label"], verdict])
    search.write_provenance(path, {**found.pair.provenance, "metrics": metrics})


def _write_json(path: str, found: Found, metrics: dict[str, Any], args: Any) -> None:
    rows = [found.as_dict(row) for row in range(len(found))]
    content = {"metrics": metrics, "queries": rows, "provenance": found.pair.provenance}
    write_json(path, content)


def _write_lines(path: str, found: Found, metrics: dict[str, Any], args: Any) -> None:
    with written(path) as file:
        for row in range(len(found)):
            file.write(json_text(found.as_dict(row)) + "\n")
    search.write_provenance(path, {**found.pair.provenance, "metrics": metrics})


def _write_html(path: str, found: Found, metrics: dict[str, Any], args: Any) -> None:
    from siamese_jax.report.run_page import Example, Tile, choose_examples, write_report
    from siamese_jax.report.tiles import SELECTION

    pair = found.pair

    def tile(side: images.Side, labels: list[str], row: int, *facts: Any) -> "Tile":
        return Tile(str(side.records.path[row]), labels[row], *facts)

    verdicts = np.array([[c is True for c in found.correct(row)] for row in range(len(found))])
    rows = choose_examples(found.indices, verdicts, n=args.show)
    examples = [
        Example(
            tile(pair.query, found.query_labels, row),
            [
                tile(pair.gallery, found.gallery_labels, j, distance, correct)
                for _, j, distance, correct in found.neighbours(row)
            ],
        )
        for row in rows
    ]
    fallback = pair.provenance["encoder"].get("fallback_for")
    write_report(
        path,
        title=f"{' + '.join(Path(name).name for name in args.encoder) or 'embeddings'}: "
        f"{len(found)} queries",
        results={"these queries": metrics} if metrics else {},
        run=pair.provenance,
        curves={},
        examples=examples,
        warnings=[f"The trunk is another one than asked for: {fallback}"] if fallback else [],
        note=SELECTION if len(rows) < len(found) else "All queries are shown.",
    )


WRITERS: dict[str, Callable[[str, Found, dict[str, Any], Any], None]] = {
    ".csv": _write_csv,
    ".html": _write_html,
    ".json": _write_json,
    ".jsonl": _write_lines,
}
