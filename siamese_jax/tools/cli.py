"""What the tools' command lines share: one-line errors, the encoder's options, the distance."""

import argparse
import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from siamese_jax import values
from siamese_jax.data import places
from siamese_jax.errors import UserError
from siamese_jax.values import Kind

if TYPE_CHECKING:
    from siamese_jax.encoder.combined import Part

PLACES = f"{places.PLACES}, or a data set's name (emoji, tfds:NAME)"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that says what each value must be."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        kind = action.type.kind.says if isinstance(action.type, Value) else ""
        default = default_of(action)
        said = "; ".join(filter(None, [kind, f"default: {default}" if default else ""]))
        return f"{action.help} ({said})" if said else action.help


def default_of(action: argparse.Action) -> str:
    """An option's default as it would be given; nothing where there is none."""
    default = action.default
    if default is None or default is False or default in ([], "", argparse.SUPPRESS):
        return ""
    return ",".join(map(str, default)) if type(default) is tuple else str(default)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def __init__(self, tool: str, description: str) -> None:
        super().__init__(
            prog=f"siamese-jax {tool}",
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if not arg_string and not isinstance(action.type, Value):  # --gallery=$UNSET
            raise argparse.ArgumentError(action, "is empty: give a value, or leave it out")
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` with the message, where argparse would end the process."""
        raise UserError(f"{message}; see `{self.prog} --help`")


@dataclass(frozen=True)
class Value:
    """A kind of value, as an argument's type."""

    kind: Kind

    def __call__(self, given: str) -> Any:
        """The value that a text stands for; what it must be, where it stands for none."""
        try:
            return values.parse("", given, self.kind)
        except UserError:
            raise argparse.ArgumentTypeError(
                f"{values.shown(given)} must be {self.kind.says}"
            ) from None


def pattern() -> Value:
    """A regular expression, as an argument's type."""

    def holds(given: Any) -> bool:
        with contextlib.suppress(re.error):
            return bool(re.compile(given))
        return False

    return Value(Kind("a regular expression", holds, str))


COUNT = Value(values.COUNT)
SHARE = Value(values.SHARE)
TEXT = Value(values.text("text that is not empty"))
DISTANCE = Value(values.choice("euclidean", "sqeuclidean", "cosine", "dot"))
POOL = Value(values.listed("average", "max", "rmac", "gem3", "grid2", "grid3", "gem", "cls"))


def add_encoder(
    parser: argparse.ArgumentParser, *, required: bool = True, sizes: bool = False
) -> None:
    """Adds the options that say which encoders to load, at one image size or at several."""
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--encoder",
        action="append",
        required=required,
        default=[],
        help="a run's folder, a folder that `fit` wrote, or a trunk's name; given several "
        "times, the encoders are fused: cosines are the weighted mean of theirs",
    )
    group.add_argument(
        "--weights",
        default="imagenet",
        help="of a trunk: imagenet (its default), random, a source that `weights list` names, "
        "timm:NAME for any of timm's on the Hub, or a file",
    )
    add_reading(group)
    size = values.several(values.PIXELS, 1) if sizes else values.PIXELS
    group.add_argument("--image-size", type=Value(size), help="pixels a side; default: as trained")
    group.add_argument(
        "--stage",
        type=TEXT,
        help="of a trunk: the output to pool, or several of one pass, such as stage4,stage6,top, "
        "joined with unit length each; stage6:max pools one in another way, and block11:cls takes "
        "a class token; default: the last",
    )
    group.add_argument(
        "--pool",
        type=POOL,
        default="average",
        help="of a trunk: how its output becomes a vector; or one for each stage: average,max",
    )
    group.add_argument(
        "--signed-sqrt", action="store_true", help="of a trunk: the signed roots of its features"
    )
    group.add_argument(
        "--offline-fallback", help="a trunk to take where the weights cannot be downloaded"
    )
    group.add_argument(
        "--batch-size", type=Value(values.BATCH), default=64, help="images in memory at a time"
    )
    group.add_argument(
        "--max-pixels", type=COUNT, help="a picture of more counts as broken; default: 178,956,970"
    )
    group.add_argument("--cache-dir", help="of embeddings; default: $SIAMESE_JAX_CACHE")


def add_reading(group: "argparse._ActionsContainer") -> None:
    """How a file of weights is read, where it does not tell."""
    group.add_argument(
        "--form",
        choices=("keras", "torch", "torchvision", "dino"),
        help="how the network of a weights file that does not tell computes: keras has "
        "TensorFlow's padding and epsilons, torch those of timm, torchvision its own epsilon of "
        "MobileNetV3; dino resizes a Vision Transformer's positions as Meta's code does",
    )
    group.add_argument(
        "--preprocessing",
        type=TEXT,
        help="of a trunk's pixels: imagenet, inception, lite, caffe, clip, satellite, unit, or "
        "MEAN/STD for pixels from 0 to 1; default: as the weights say",
    )
    group.add_argument(
        "--ignore",
        type=pattern(),
        metavar="REGEX",
        help="the leaves of a weights file that are not the trunk's",
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
        "--scales",
        type=Value(values.several(values.SCALE, 1)),
        help="sizes to average over, relative to the usual: 1,1.4142",
    )
    group.add_argument(
        "--fuse-weights",
        type=Value(values.several(values.FUSE_WEIGHT, 1)),
        help="of several encoders: 2,1; default: equal",
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
    names = ("stage", "pool", "signed_sqrt")
    of_trunk = {key: getattr(args, key) for key in names} | reading(args)
    if Path(name).is_dir() and not all(Path(other).is_dir() for other in args.encoder):
        of_trunk = {}  # for the others
    return load_encoder(
        name,
        args.weights,
        args.image_size,
        offline_fallback=args.offline_fallback,
        whitening=whitening,
        **of_trunk,
    )


def check_encoders(args: argparse.Namespace) -> None:
    """UserError for what is no encoder, and weights that are not theirs: found before the work."""
    from siamese_jax.encoder.load import check_name
    from siamese_jax.trunks.table import find

    for name in args.encoder:
        check_name(name)
    if args.offline_fallback is not None:
        find(args.offline_fallback)
    weights = getattr(args, "fuse_weights", None)
    if weights is not None and (len(weights) != len(args.encoder) or not sum(weights) > 0):
        raise UserError(
            f"--fuse-weights has {len(weights)} numbers for {len(args.encoder)} encoders; give "
            "one for each, not all 0"
        )


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


def check_outputs(paths: Sequence[str], suffixes: Sequence[str], option: str = "--out") -> None:
    """UserError for a file whose kind we do not write: found before the work, not after."""
    from pathlib import Path

    for path in paths:
        if Path(path).suffix.lower() not in suffixes:
            raise UserError(f"{option}={path}: the name must end in one of {', '.join(suffixes)}")
        if Path(path).is_dir() or path.endswith("/"):
            raise UserError(f"{option}={path} is a folder; name a file")
        check_place(path, option)


def check_place(path: str | os.PathLike[str], option: str = "--out") -> None:
    """UserError for a place that nothing can be written to: found before the work, not after."""
    from pathlib import Path

    there = next(place for place in Path(path).absolute().parents if place.exists())
    if not there.is_dir():
        raise UserError(f"{option}={path}: {there} is a file; choose another place")
    if not os.access(there, os.W_OK):
        raise UserError(f"{option}={path}: {there} cannot be written to; choose another place")
