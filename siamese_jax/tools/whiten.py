"""`whiten`: fits a whitening to an encoder's embeddings, and saves it with the encoder.

    python -m siamese_jax whiten --encoder=runs/emoji          (on the run's own training split)
    python -m siamese_jax whiten --encoder=resnet50 --images=photos/ --out=encoders/photos

From then on `--encoder=runs/emoji` (or encoders/photos), and load_encoder, apply it; embeddings
that were cached before stay of use, and --no-whitening leaves it out. Fit it on images that will
not be tested on.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from siamese_jax import values
from siamese_jax.errors import UserError
from siamese_jax.tools import cli, images, stored


def options() -> cli.Parser:
    """The tool's options."""
    parser = cli.Parser("whiten", __doc__)
    cli.add_encoder(parser)
    parser.add_argument(
        "--images",
        type=os.path.expanduser,
        help=f"{cli.PLACES}. Default, for a run: the split that it was trained on",
    )
    images.add_split(parser)
    parser.add_argument(
        "--method",
        choices=("pca", "learned"),
        help="learned makes images of one class alike, and needs labels; default: by labels",
    )
    parser.add_argument("--dim", type=cli.COUNT, help="dimensions to keep; default: all")
    parser.add_argument(
        "--shrinkage",
        type=cli.Value(values.SHRINKAGE),
        default=1.0,
        help="share of its mean that the inverted matrix gets on its diagonal",
    )
    parser.add_argument("--out", type=Path, help="a folder; default: the run's own")
    return parser


def main(argv: Sequence[str]) -> None:
    args = options().parse_args(argv)
    cli.check_encoders(args)
    if len(args.encoder) > 1:
        raise UserError("a whitening is of one encoder: give --encoder once")
    name = args.encoder[0]
    if args.out is None and not Path(name).is_dir():
        raise UserError(f"{name} has no folder to save a whitening in: give --out=DIR")
    out = args.out or Path(name)
    cli.check_place(out / "whitening.npz")

    from siamese_jax.encoder.folder import whiten

    if args.images is None:
        run, records = images.own_records([name])
        split = args.split or "train"
        where, records = f"{run} ({split})", records.where(split)
    else:
        where = args.images
        if stored.is_stored(where):
            raise UserError(f"{where} holds embeddings: a whitening is fitted to pictures")
        records = images.read_records(
            where, images.wanted(args, needed=args.method == "learned"), split=args.split
        )
    encoder = cli.open_encoder(args, name, whitening=False)
    if args.dim is not None:  # before the work
        values.check("--dim", args.dim, values.whole(1, encoder.embedding_dim))
    made = whiten(
        encoder,
        records,
        out,
        method=args.method,
        dim=args.dim,
        shrinkage=args.shrinkage,
        batch_size=args.batch_size,
        cache_dir=args.cache_dir,
    )
    about = made.provenance["whitening"]
    print(
        f"{about['method']} whitening, {encoder.embedding_dim} -> {about['dim']} dimensions, "
        f"fitted to {about['images']} images of {where}"
    )
    print(f"wrote {out}/whitening.npz: --encoder={out} applies it, --no-whitening leaves it out")
