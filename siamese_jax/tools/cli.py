"""What the tools' command lines share: one-line errors, the encoder's options, the distance."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from siamese_jax.errors import UserError

if TYPE_CHECKING:
    from siamese_jax.encoder import Encoder

PLACES = "a folder, an image, a CSV file, or a data set's name (emoji, tfds:NAME)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def __init__(self, tool: str, description: str) -> None:
        super().__init__(
            prog=f"python -m siamese_jax {tool}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
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


def share(text: str) -> float:
    """A number between 0 and 1, as an argument's type."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return number


def add_encoder(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("encoder")
    group.add_argument("--encoder", required=True, help="a run's folder, or a trunk's name")
    group.add_argument(
        "--weights", default="imagenet", help="of a trunk: imagenet, random, a named source, a file"
    )
    group.add_argument("--image-size", type=count, help="pixels a side; default: as trained")
    group.add_argument("--stage", help="of a trunk: the output to pool; default: the last")
    group.add_argument(
        "--pool", default="average", help="of a trunk: average, max, gem or rmac (%(default)s)"
    )
    group.add_argument(
        "--offline-fallback", help="a trunk to take where the weights cannot be downloaded"
    )
    group.add_argument("--batch-size", type=count, default=64, help="images in memory at a time")
    group.add_argument("--cache-dir", help="of embeddings; default: $SIAMESE_JAX_CACHE")


def open_encoder(args: argparse.Namespace) -> "Encoder":
    """The encoder that the options name; compiled programs are kept from here on."""
    from siamese_jax.compilation_cache import enable_compilation_cache
    from siamese_jax.encoder import load_encoder

    enable_compilation_cache()
    return load_encoder(
        args.encoder,
        args.weights,
        args.image_size,
        stage=args.stage,
        pool=args.pool,
        offline_fallback=args.offline_fallback,
    )


def add_outputs(parser: argparse.ArgumentParser, suffixes: Sequence[str]) -> None:
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
