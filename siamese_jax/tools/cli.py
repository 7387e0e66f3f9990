"""What the tools' command lines share: one-line errors, the encoder's options, the distance."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from siamese_jax.data import places
from siamese_jax.errors import UserError

if TYPE_CHECKING:
    from siamese_jax.encoder.combined import Part

PLACES = f"{places.PLACES}, or a data set's name (emoji, tfds:NAME)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def __init__(self, tool: str, description: str) -> None:
        super().__init__(
            prog=f"siamese-jax {tool}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` with the message, where argparse would end the process."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def counts(text: str) -> tuple[int, ...]:
    """A comma-separated list of whole numbers from 1 on, as an argument's type.

    >>> counts("1,5,10")
    (1, 5, 10)
    """
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("numbers must be at least 1")
    return numbers


def count(text: str) -> int:
    """A whole number from 1 on, as an argument's type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def numbers(text: str) -> tuple[float, ...]:
    """A comma-separated list of numbers from 0 on, as an argument's type.

    >>> numbers("1,0.7071")
    (1.0, 0.7071)
    """
    found = tuple(float(part) for part in text.split(","))
    if not all(0 <= number < float("inf") for number in found):
        raise argparse.ArgumentTypeError("numbers must be at least 0")
    return found


def share(text: str) -> float:
    """A number between 0 and 1, as an argument's type."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return number


def add_encoder(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the options that say which encoders to load."""
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--encoder",
        action="append",
        required=required,
        default=[],
        help="a run's folder, a folder that `whiten` wrote, or a trunk's name; given several "
        "times, the encoders are fused: cosines are the weighted mean of theirs",
    )
    group.add_argument(
        "--weights", default="imagenet", help="of a trunk: imagenet, random, a named source, a file"
    )
    add_reading(group)
    group.add_argument("--image-size", type=count, help="pixels a side; default: as trained")
    group.add_argument("--stage", help="of a trunk: the output to pool; default: the last")
    group.add_argument(
        "--pool", default="average", help="of a trunk: average, max, gem or rmac (%(default)s)"
    )
    group.add_argument(
        "--offline-fallback", help="a trunk to take where the weights cannot be downloaded"
    )
    group.add_argument("--batch-size", type=count, default=64, help="images in memory at a time")
    group.add_argument(
        "--max-pixels", type=count, help="a picture of more counts as broken; default: 178,956,970"
    )
    group.add_argument("--cache-dir", help="of embeddings; default: $SIAMESE_JAX_CACHE")


def add_reading(group: "argparse._ActionsContainer") -> None:
    """How a file of weights is read, where it does not tell."""
    group.add_argument(
        "--form", choices=("keras", "torch"), help="of a weights file that does not tell its own"
    )
    group.add_argument(
        "--preprocessing",
        help="of a trunk's pixels: imagenet, inception, lite, caffe, unit, or MEAN/STD for pixels "
        "from 0 to 1; default: as the weights say",
    )
    group.add_argument(
        "--ignore", metavar="REGEX", help="the leaves of a weights file that are not the trunk's"
    )


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_reading` was given, as `load_encoder` and `weights.load` take it."""
    return {key: getattr(args, key) for key in ("form", "preprocessing", "ignore")}


def add_combination(parser: argparse.ArgumentParser) -> None:
    """Adds the options of views and fusion of several encoders."""
    group = parser.add_argument_group("views and fusion (compared by cosine)")
    group.add_argument(
        "--mirror", action="store_true", help="embed each image as the mean with its mirror image"
    )
    group.add_argument(
        "--scales", type=numbers, help="sizes to average over, relative to the usual: 1,1.4142"
    )
    group.add_argument(
        "--fuse-weights", type=numbers, help="of several encoders: 2,1; default: equal"
    )
    group.add_argument(
        "--no-whitening", action="store_true", help="leave out the whitening of an encoder's folder"
    )


def open_encoder(args: argparse.Namespace, name: str, *, whitening: bool = True) -> "Part":
    """One encoder as the options say; compiled programs are kept from here on."""
    from pathlib import Path

    from siamese_jax.data.preprocess import limit_pixels
    from siamese_jax.encoder.load import load_encoder
    from siamese_jax.storage.cache import enable_compilation_cache

    enable_compilation_cache()
    limit_pixels(args.max_pixels)
    of_file = reading(args)
    if Path(name).is_dir() and not all(Path(other).is_dir() for other in args.encoder):
        of_file = {}  # for the others
    return load_encoder(
        name,
        args.weights,
        args.image_size,
        stage=args.stage,
        pool=args.pool,
        offline_fallback=args.offline_fallback,
        whitening=whitening,
        **of_file,
    )


def check_combination(args: argparse.Namespace) -> None:
    """UserError for weights that are not those of the encoders: found before the work."""
    weights = args.fuse_weights
    if weights is not None and (len(weights) != len(args.encoder) or not sum(weights) > 0):
        raise UserError(
            f"--fuse-weights has {len(weights)} numbers for {len(args.encoder)} encoders; give "
            "one for each, not all 0"
        )
    if args.scales is not None and min(args.scales) == 0:
        raise UserError("--scales must be above 0")


def combine_encoders(args: argparse.Namespace) -> "Part":
    """All encoders that the options name, each in its views, fused where there are several."""
    from siamese_jax.encoder import combined

    encoders = [open_encoder(args, name, whitening=not args.no_whitening) for name in args.encoder]
    if args.mirror or args.scales:
        options = {"mirror": args.mirror, "scales": args.scales or (1.0,)}
        encoders = [combined.augmented(encoder, **options) for encoder in encoders]
    return encoders[0] if len(encoders) == 1 else combined.fused(encoders, args.fuse_weights)


def add_outputs(parser: argparse.ArgumentParser, suffixes: Sequence[str]) -> None:
    """Adds --out, for files that end in one of the suffixes."""
    parser.add_argument(
        "--out",
        action="append",
        default=[],
        help=f"a file to write, ending in {', '.join(suffixes)}; may be given more than once",
    )


def check_outputs(paths: Sequence[str], suffixes: Sequence[str]) -> None:
    """UserError for a file whose kind we do not write: found before the work, not after."""
    from pathlib import Path

    for path in paths:
        if Path(path).suffix.lower() not in suffixes:
            raise UserError(f"--out={path}: the name must end in one of {', '.join(suffixes)}")
        if Path(path).is_dir():
            raise UserError(f"--out={path} is a folder; name a file")
