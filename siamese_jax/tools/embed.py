"""`embed`: the embeddings of images, as a file that NumPy, a spreadsheet or a search engine reads.

    python -m siamese_jax embed --encoder=resnet50 --images=photos/ --out=photos.npz

.npz holds vectors float32 [n, d], paths, labels (class names, empty where unknown) and provenance
(JSON), and is what `rank` and `evaluate` take in place of pictures; .npy the vectors alone, with
the paths beside them in .npy.csv; .csv path, label and d columns.

What others serve from needs the extra `export`: .parquet is a table (row, id, path, label, vector)
for DuckDB, LanceDB, Qdrant or pgvector; .faiss an HNSW index of FAISS, .ivf.faiss an IVF one,
.usearch one of usearch. An index holds row numbers, whose ids, paths and labels are in NAME.csv.
.lance is a LanceDB table, of the extra `lance`, which `siamese_jax.rank` searches in its place:
rank(queries, "lance://NAME.lance", k). NAME.json says how to ask each, and of an index its
recall@10 against the exact answer.

Several processes share the images by content (`siamese-jax --help` says how they are started): each
keeps what it embeds in the cache, and the first one writes the file, the same as one process would.
"""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from siamese_jax import processes
from siamese_jax.errors import UserError
from siamese_jax.storage.writing import written
from siamese_jax.tools import cli, images, search, stored

SERVED = (".parquet", ".faiss", ".usearch", ".lance")  # .ivf.faiss is one of .faiss
SUFFIXES = (".npz", ".npy", ".csv", *SERVED)


def options() -> cli.Parser:
    """The tool's options."""
    parser = cli.Parser("embed", __doc__)
    cli.add_encoder(parser)
    cli.add_combination(parser)
    parser.add_argument("--images", type=os.path.expanduser, required=True, help=cli.PLACES)
    images.add_split(parser)
    cli.add_outputs(parser, SUFFIXES)
    return parser


def main(argv: Sequence[str]) -> None:
    args = options().parse_args(argv)
    if not args.out:
        raise UserError("give a file to write: --out=vectors.npz")
    _check_served(args.out)
    cli.check_outputs(args.out, SUFFIXES)
    cli.check_encoders(args)

    if stored.is_stored(args.images):
        raise UserError(f"{args.images} holds embeddings already: give pictures")
    records = images.read_records(args.images, images.wanted(args), split=args.split)
    own = ("--images", "--out", "--cache-dir")  # may be other places on another machine
    chosen = {n: v for n, v in vars(args).items() if f"--{n.replace('_', '-')}" not in own}
    processes.agree("command", chosen)
    encoder = cli.combine_encoders(args)
    side = images.embed_side(
        encoder, records, args.images, batch_size=args.batch_size, cache_dir=args.cache_dir
    )
    if not processes.is_first():
        return
    facts = images.provenance(
        encoder, side.facts, split=args.split, labels=args.labels, distance=encoder.distance
    )
    for path in args.out:
        more = WRITERS[Path(path).suffix.lower()](path, side, facts)
        n, d = side.vectors.shape
        print(f"wrote {path}: {n} vectors of {d}{more or ''}")


def _check_served(paths: Sequence[str]) -> None:
    """UserError for a library that is not installed, before the work."""
    served = [path for path in paths if Path(path).suffix.lower() in SERVED]
    if served:
        from siamese_jax.search import export

        for path in served:
            export.check_ready(path)


def _labels(side: images.Side) -> list[str]:
    shown = images.shown_labels(side)
    return [label if known else "" for label, known in zip(shown, side.labelled, strict=True)]


def _write_npz(path: str, side: images.Side, facts: dict[str, Any]) -> None:
    columns = {
        "vectors": side.vectors,
        "paths": side.records.path,
        "labels": np.array(_labels(side), dtype=np.str_),
        "keys": np.array([list(key) for key in side.keys], np.uint8),
    }
    if side.records.box is not None:
        columns["box"] = side.records.box
    if side.labels.ndim == 2:
        columns |= {"hot": side.labels, "classes": np.array(side.classes, dtype=np.str_)}
    stored.write(path, columns, facts)


def _write_npy(path: str, side: images.Side, facts: dict[str, Any]) -> None:
    with written(path, "wb") as file:
        np.save(file, side.vectors)
    _write_table(f"{path}.csv", side, ["path", "label"], [[]] * len(side.vectors))
    search.write_provenance(path, facts)


def _write_csv(path: str, side: images.Side, facts: dict[str, Any]) -> None:
    names = ["path", "label", *(f"v{i}" for i in range(side.vectors.shape[1]))]
    # NumPy's repr of a float32 is the shortest decimal that reads back as the same number.
    _write_table(path, side, names, ([str(x) for x in row] for row in side.vectors))
    search.write_provenance(path, facts)


def _write_served(path: str, side: images.Side, facts: dict[str, Any]) -> str:
    """Returns what an index is worth, or nothing."""
    from siamese_jax.search.gallery import Gallery

    columns = {"path": side.records.path, "label": _labels(side)}
    gallery = Gallery(side.vectors, side.ids)
    found = gallery.export(path, distance=facts["distance"], columns=columns).get("recall")
    search.write_provenance(path, facts)
    return f"; recall@{found['k']} {found['value']:.4f} of exact search" if found else ""


def _write_table(path: str, side: images.Side, names: Sequence[str], rows: Any) -> None:
    with written(path, newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for image, label, row in zip(side.records.path, _labels(side), rows, strict=True):
            writer.writerow([image, label, *row])


WRITERS: dict[str, Callable[[str, images.Side, dict[str, Any]], str | None]] = {
    ".npz": _write_npz,
    ".npy": _write_npy,
    ".csv": _write_csv,
    **dict.fromkeys(SERVED, _write_served),
}
