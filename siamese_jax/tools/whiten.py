"""`whiten`: `fit` with nothing to choose: LDA behind an encoder, saved with it.

    python -m siamese_jax whiten --encoder=runs/emoji          (on the run's own training split)
    python -m siamese_jax whiten --encoder=resnet50 --images=photos/ --out=encoders/photos

From then on `--encoder=runs/emoji` (or encoders/photos), and load_encoder, apply it; embeddings
that were cached before stay of use, and --no-whitening leaves it out. Fit it on images that will
not be tested on. --shrinkage=auto chooses by folds over classes, as `fit` does.
"""

from collections.abc import Sequence

from siamese_jax.tools import cli, fit


def options() -> cli.Parser:
    """The options of `fit`, with other defaults."""
    parser = fit.options()
    parser.prog, parser.description = "siamese-jax whiten", __doc__
    parser.set_defaults(shrinkage=(0.5,), width=("all",))
    return parser


def main(argv: Sequence[str]) -> None:
    fit.run(options(), argv)
