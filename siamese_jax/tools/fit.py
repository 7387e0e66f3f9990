"""`fit`: an encoder for someone's pictures, in seconds after one pass of the trunk; no gradient.

    python -m siamese_jax fit --images=shop/ --trunk=efficientnet_lite0 --out=encoders/shop
    python -m siamese_jax fit --images=shop/ --trunk=resnet50,efficientnet_lite0 \\
        --stages=auto --image-size=160,224 --out=encoders/shop
    python -m siamese_jax fit --images=shop/ --trunk=resnet50 --stages=stage4 \\
        --stages=stage2,stage3,stage4 --out=encoders/shop
    python -m siamese_jax fit --encoder=runs/emoji          (on the run's own training split)

Linear discriminant analysis (LDA) makes pictures of one class alike. Trunks, stages, image sizes,
shrinkage and width are chosen by folds over whole classes: each candidate is asked for classes that
it was not fitted to. Several stages are taken where the folds tell them from the last one; of
shrinkages, and then of widths, that they do not tell from the best, the one nearest to .5 and the
narrowest. The winner is fitted to all pictures and saved; where its mean over the folds is not
above the bare trunk's, that is saved instead (or several stages as they are, or signed roots, where
folds tell them from it). From then on `--encoder=encoders/shop`, and load_encoder, take it, and
--no-whitening leaves LDA out. With --encoder, LDA lies behind that encoder; `whiten` is this with
nothing to choose.

The table has, beside LDA, the bare trunk (its features as they are) and their signed roots, which
are what LDA is fitted to. Pictures without labels have no classes: --method=pca whitens by their
covariance alone.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siamese_jax import values
from siamese_jax.errors import UserError
from siamese_jax.storage.json_files import write_json
from siamese_jax.tools import cli, images, stored

if TYPE_CHECKING:
    from siamese_jax.data.records import Records
    from siamese_jax.train.fit import Grid, Source


ONE = "give one set of --stages, one --shrinkage and one --width"


def main(argv: Sequence[str]) -> None:
    run(options(), argv)


def run(parser: cli.Parser, argv: Sequence[str]) -> None:
    """The whole tool, by the options of a parser that `options` has made."""
    args = parse(parser, argv)
    out = args.out or Path(args.encoder[0])
    cli.check_place(out / "whitening.npz")

    where, records = _images(args)
    kept: dict[str, Any] = {"batch_size": args.batch_size, "cache_dir": args.cache_dir}
    if args.method == "pca" or (args.method is None and not _labelled(records)):
        _whiten(args, records, where, out, kept)
        return

    from siamese_jax.encoder.combined import Combined
    from siamese_jax.report.tables import aligned
    from siamese_jax.tools import fit_table
    from siamese_jax.train.fit import fit
    from siamese_jax.train.fitting import TooFew

    sources = _sources(args)
    if args.encoder and _numbers(args.width):  # before the work
        most = sources[0].load(("",)).embedding_dim
        for width in _numbers(args.width):
            values.check("--dim", width, values.whole(1, most))
    try:
        made = fit(sources, records, out, grid=_grid(args), **kept)
    except TooFew as error:
        bare = f"; {args.trunk[0]} as it is needs no fit" if args.trunk else ""
        raise UserError(f"{error}{bare}; to fit all the same, {ONE}") from None
    table = fit_table.rows_of(made)
    write_json(out / "fit.json", table)
    if made.rows:
        print(aligned(fit_table.shown(made, table)))
        alike = sum(row["not told apart from the best"] for row in table) - 1
        said = f"{alike} of the other {len(table) - 1} are not told apart from the best"
        print(f"{said}: {out}/fit.json has them all")
        print("pictures of a fold are asked among themselves: among all of them less is found")
        print(fit_table.verdict(made))
    else:
        than = made.chosen.source.name
        print(
            f"of one candidate no folds are asked: whether it is better than {than} as it is, "
            "evaluate tells, on pictures that it was not fitted to"
        )
    if not made.chosen.fits:
        saved = f"wrote {out}: it is" if args.trunk or args.out else "nothing is written: keep"
        print(f"{saved} {fit_table.named(made.chosen)}, without a fit")
        print(f"to fit all the same, {ONE}")
        return
    assert isinstance(made.encoder, Combined)
    about, width = made.encoder.provenance["whitening"], made.encoder.parts[0].embedding_dim
    _told("LDA", width, about, where, out)


def options() -> cli.Parser:
    """The tool's options."""
    parser = cli.Parser("fit", __doc__)
    parser.add_argument("--images", type=os.path.expanduser, help=f"{cli.PLACES}. Default, for a "
                        "run: the split that it was trained on")  # fmt: skip
    images.add_split(parser)
    group = parser.add_argument_group("what is fitted")
    group.add_argument(
        "--trunk",
        type=cli.Value(values.several(values.text(), 1)),
        help="trunks to try: resnet50,efficientnet_lite0",
    )
    cli.add_encoder(parser, required=False, sizes=True)
    group.add_argument(
        "--stages",
        type=cli.TEXT,
        action="append",
        default=[],
        metavar="SET",
        help="of a trunk: stages that are taken together, written as for --stage of the other "
        "tools: stage4,stage6:max,top; given several times, each is a set to try. auto: the last "
        "ones, some together, also with maxima or a grid2; last: the last. Default: auto",
    )
    group = parser.add_argument_group("LDA")
    group.add_argument(
        "--method",
        type=lambda name: {"learned": "lda"}.get(name, name),  # as it was called before
        choices=("lda", "pca"),
        help="LDA, or the PCA whitening, which needs no labels; default: by labels",
    )
    auto = values.choice("auto")
    group.add_argument(
        "--shrinkage",
        type=cli.Value(values.either(auto, values.several(values.number(0, 1), 1))),
        default="auto",
        help="the share that all directions have alike, or several to try",
    )
    group.add_argument(
        "--width",
        "--dim",
        type=cli.Value(
            values.either(
                auto, values.several(values.either(values.choice("all"), values.COUNT), 1)
            )
        ),
        default="auto",
        help="axes to keep, or all; or several to try: 128,512,all",
    )
    group.add_argument(
        "--folds", type=cli.Value(values.whole(2, 1000)), default=4, help="over whole classes"
    )
    group.add_argument(
        "--seed", type=cli.Value(values.whole(0, 2**32 - 1)), default=0, help="of the folds"
    )
    group.add_argument("--out", type=Path, help="a folder; default: the run's own")
    return parser


def parse(parser: cli.Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The command line's options, checked."""
    args = parser.parse_args(argv)
    if (args.trunk is None) == (not args.encoder):
        parser.error("give --trunk=NAME, or --encoder of a run")
    if args.stage:
        raise UserError("--stage is of an encoder that is used as it is; fit takes --stages")
    if len(args.encoder) > 1:
        raise UserError("a whitening is of one encoder: give --encoder once")
    if args.trunk:
        _check_trunks(args)
    cli.check_encoders(args)
    if args.out is None and not (args.encoder and Path(args.encoder[0]).is_dir()):
        name = (args.encoder or args.trunk)[0]
        raise UserError(f"{name} has no folder to save a whitening in: give --out=DIR")
    return args


def _check_trunks(args: argparse.Namespace) -> None:
    """UserError for what makes no sense with --trunk; and a line for what --stages is taken as."""
    from siamese_jax.trunks.table import find

    for name in args.trunk:
        find(name)
    if args.method == "pca":
        raise UserError(
            "--method=pca knows no classes to choose a trunk by: give --encoder="
            f"{args.trunk[0]} in place of --trunk"
        )
    if args.signed_sqrt:
        raise UserError("--signed-sqrt is of an encoder as it is; fit takes the roots at any rate")
    if "," in args.pool:
        raise UserError(
            f"--pool={args.pool}: sets of stages differ in number; give one pooling, and a stage "
            "its own as in --stages=stage6:max,top"
        )
    for given in args.stages:
        if "+" in given or ";" in given:
            one = given.replace(";", "+").split("+")
            raise UserError(
                f"--stages={given}: stages of one set stand with commas between them, as in "
                f"--stages={','.join(one)}, and each set has a --stages of its own, as in "
                f"{' '.join(f'--stages={part}' for part in one)}"
            )
    if len(args.stages) > 1 or any("," in given for given in args.stages):
        sets = [given.replace(" ", "").replace(",", " and ") for given in args.stages]
        print(f"to try, of the trunk's stages: {'; or '.join(sets)}")


def _grid(args: argparse.Namespace) -> "Grid":
    from siamese_jax.train.fit import Grid

    auto = args.width == "auto"
    widths = None if auto else tuple(None if w == "all" else w for w in args.width)
    shrinkages = None if args.shrinkage == "auto" else args.shrinkage
    given: dict[str, Any] = {"shrinkages": shrinkages, "widths": widths}
    chosen = {name: value for name, value in given.items() if value}
    return Grid(**chosen, folds=args.folds, seed=args.seed)


def _numbers(width: str | Sequence[str | int]) -> list[int]:
    """The axes that --width gives a number of."""
    return [] if width == "auto" else [one for one in width if isinstance(one, int)]


def _images(args: argparse.Namespace) -> tuple[str, "Records"]:
    if args.images is None:
        if not args.encoder:
            raise UserError("give --images=DIR: a trunk has none of its own")
        run, records = images.own_records(args.encoder)
        split = args.split or "train"
        return f"{run} ({split})", records.where(split)
    if stored.is_stored(args.images):
        raise UserError(f"{args.images} holds embeddings: a whitening is fitted to pictures")
    how = images.wanted(args, needed=args.method == "lda" or args.trunk is not None)
    return args.images, images.read_records(args.images, how, split=args.split)


def _labelled(records: "Records") -> bool:
    from siamese_jax.data.labels import missing

    return not bool(missing(records.label).all())


def _sources(args: argparse.Namespace) -> list["Source"]:
    """Every trunk at every size, bare and with roots to fit to; or the encoder that is there."""
    from siamese_jax.train.fit import BARE, ROOTS, Source

    made = []
    named = dict.fromkeys(args.trunk or args.encoder), dict.fromkeys(args.image_size or (None,))
    for name, size in itertools.product(*named):
        called = f"{name} {size}" if size else name
        if not args.trunk:
            made.append(Source(called, _loader(args, name, size), [("",)]))
            continue
        sets = _stage_sets(args, name)
        # Where they are chosen, it is the trunk that other tools have by its name.
        plain = sets[:1] if "auto" in (args.stages or ["auto"]) else sets
        made += [
            Source(called, _loader(args, name, size, True), sets, ROOTS),  # all stages in one pass
            Source(called, _loader(args, name, size, False), plain, BARE, fits=False),
        ]
    return made


def _loader(
    args: argparse.Namespace, name: str, size: int | None, roots: bool | None = None
) -> Callable[[tuple[str, ...]], Any]:
    """Stages -> an encoder; of a trunk's features, their signed roots or not."""

    def load(stages: tuple[str, ...]) -> Any:
        own = {**vars(args), "encoder": [name], "image_size": size}
        if roots is not None:
            own |= {"stage": ",".join(stages), "signed_sqrt": roots}
        return cli.open_encoder(argparse.Namespace(**own), name, whitening=False)

    return functools.lru_cache(maxsize=2)(load)


def _stage_sets(args: argparse.Namespace, name: str) -> list[tuple[str, ...]]:
    """The sets of stages to try of a trunk; those of auto begin with its last one."""
    from siamese_jax.train.fitting import stage_sets
    from siamese_jax.trunks.table import find

    there = find(name)
    known = {
        "auto": lambda: stage_sets(there.widths, args.pool),
        "last": lambda: [there.stages[-1:]],
    }
    given = (
        known[one]() if one in known else [tuple(stage.strip() for stage in one.split(","))]
        for one in sorted(args.stages or ["auto"], key=lambda one: one != "auto")
    )
    return list(dict.fromkeys(itertools.chain.from_iterable(given)))


def _whiten(
    args: argparse.Namespace, records: "Records", where: str, out: Path, options: dict[str, Any]
) -> None:
    """Without labels there is nothing to choose by."""
    from siamese_jax.encoder.folder import whiten

    if args.trunk:
        raise UserError(
            f"{where} has no labels to choose a trunk by: give --encoder={args.trunk[0]} in place "
            "of --trunk, to whiten by the pictures' covariance alone"
        )
    encoder = _sources(args)[0].load(("",))
    part = 0.5 if args.shrinkage == "auto" else min(args.shrinkage[0], 0.999)
    dim = next(iter(_numbers(args.width)), None)
    if dim is not None:  # before the work
        values.check("--dim", dim, values.whole(1, encoder.embedding_dim))
    made = whiten(
        encoder, records, out, method="pca", dim=dim, shrinkage=part / (1 - part), **options
    )
    _told("PCA whitening", encoder.embedding_dim, made.provenance["whitening"], where, out)


def _told(method: str, width: int, about: dict[str, Any], where: str, out: Path) -> None:
    print(
        f"{method}, {width} -> {about['dim']} dimensions, shrinkage "
        f"{about['shrinkage']:g}, fitted to {about['images']} images of {where}"
    )
    print(f"wrote {out}/whitening.npz: --encoder={out} applies it, --no-whitening leaves it out")
