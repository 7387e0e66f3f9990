"""A search from the command line: both sides opened and embedded."""

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax import values
from siamese_jax.errors import UserError
from siamese_jax.storage.json_files import write_json
from siamese_jax.tools import classes, cli, images, stored
from siamese_jax.tools.images import Side

if TYPE_CHECKING:
    from siamese_jax.data.records import Records
    from siamese_jax.metrics.evaluation import Sides


@dataclass(frozen=True)
class Pair:
    """Both sides of a search, and what they are compared by.

    Attributes:
      query, gallery: embedded.
      query_ids, gallery_ids: int64 [q], [g].
      distance: one of `siamese_jax.distances.DISTANCES`.
      provenance: of everything that the results depend on.
      widths: of each encoder's part of the vectors, where several are fused.
    """

    query: Side
    gallery: Side
    query_ids: np.ndarray
    gallery_ids: np.ndarray
    distance: str
    provenance: dict[str, Any]
    widths: tuple[int, ...] = ()

    @property
    def sides(self) -> "Sides":
        """The arrays alone, as they are searched and measured."""
        from siamese_jax.metrics.evaluation import Sides

        query, gallery = self.query, self.gallery
        return Sides(
            (query.vectors, gallery.vectors),
            (query.labels, gallery.labels),
            (self.query_ids, self.gallery_ids),
            self.distance,
        )

    @property
    def labelled(self) -> bool:
        """Whether any query has a label: without one there is nothing to measure."""
        return bool(self.query.labelled.any() and self.gallery.labelled.any())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what to search with, for what and where."""
    cli.add_encoder(parser, required=False)
    cli.add_combination(parser)
    group = parser.add_argument_group("images")
    group.add_argument(
        "--query",
        type=os.path.expanduser,
        help=f"{cli.PLACES}, or an .npz file that `embed` wrote, with the same encoder; where both "
        "sides are, no --encoder is needed. Default, for a run: the test split that it was trained "
        "beside",
    )
    group.add_argument(
        "--gallery",
        type=os.path.expanduser,
        help="likewise. Default: the gallery of --query, or itself",
    )
    images.add_split(parser)
    parser.add_argument("--distance", type=cli.DISTANCE, help="default: the encoder's own")
    parser.add_argument(
        "--ks",
        type=cli.Value(values.several(values.COUNT, 1)),
        default=(1, 5, 10),
        help="depths of the metrics",
    )


def open_pair(args: argparse.Namespace, *, needed: bool = False) -> Pair:
    """Everything that the options name, embedded; `needed` are labels that both sides share.

    Raises:
      UserError: an unknown distance, a place without images, an encoder that cannot be had.
    """
    cli.check_encoders(args)
    places = [args.query, args.gallery or args.query]
    if not args.encoder:
        if not all(place and stored.is_stored(place) for place in places):
            raise UserError(images.NO_ENCODER)
        for name in ("image_size", "stage", "mirror", "scales", "fuse_weights"):
            if getattr(args, name):
                raise UserError(f"--{name.replace('_', '-')} is of an encoder: give --encoder too")
    asked, searched, where, split = _records(args, images.wanted(args, needed=needed))
    return embed_pair(args, asked, searched, where, split, needed=needed)


def embed_pair(
    args: argparse.Namespace,
    asked: "Records",
    searched: "Records",
    where: tuple[str, str],
    split: str | None = None,
    *,
    needed: bool = False,
) -> Pair:
    """Both sides' records embedded as the options say; where they are from, and their split."""
    from siamese_jax.encoder.combined import Combined

    encoder = cli.combine_encoders(args) if args.encoder else None
    files = [place for place in where if stored.is_stored(place)]
    stored.check_encoder(files, encoder.fingerprint if encoder else None)
    made = stored.read_facts(files[0]) if encoder is None else {}
    options: dict[str, Any] = {"batch_size": args.batch_size, "cache_dir": args.cache_dir}
    query = images.embed_side(encoder, asked, where[0], **options)
    gallery = images.embed_side(encoder, searched, where[1], **options)
    query, gallery = classes.match_classes(query, gallery, needed=needed)
    distance = args.distance or (encoder.distance if encoder else made.get("distance"))
    if distance is None:
        raise UserError(f"{files[0]} does not say what to compare by: give --distance=cosine")
    facts = images.provenance(
        encoder,
        {"query": query.facts, "gallery": gallery.facts},
        own=made.get("encoder"),
        distance=distance,
        split=split,
        labels=args.labels,
    )
    seen = {
        name: side.facts["fitted_to"] for name, side in (("query", query), ("gallery", gallery))
    }
    if any(seen.values()):
        facts["fitted_to"] = seen
    parts = encoder.parts if isinstance(encoder, Combined) and len(args.encoder) > 1 else ()
    widths = tuple(part.embedding_dim for part in parts)
    return Pair(query, gallery, *images.integer_ids(query, gallery), distance, facts, widths)


def _records(
    args: argparse.Namespace, how: images.Wanted
) -> tuple["Records", "Records", tuple[str, str], str | None]:
    """What is asked, what is searched, where they are from, and the split that they are."""
    if args.query is not None:
        asked, searched = images.read_sides(args.query, args.gallery, how, split=args.split)
        return asked, searched, (args.query, args.gallery or args.query), args.split
    split = args.split or "test"
    run, records = images.own_records(args.encoder)
    own = records.where(split)
    where = f"{run} ({split})"
    searched = own if args.gallery is None else images.read_records(args.gallery, how)
    return (
        own.select(own.is_query),
        searched.select(searched.is_gallery),
        (where, args.gallery or where),
        split,
    )


def write_provenance(path: str, facts: dict[str, Any]) -> None:
    """`results.csv` has no room for where it came from, so `results.csv.run.json` tells."""
    write_json(f"{path}.run.json", facts)
