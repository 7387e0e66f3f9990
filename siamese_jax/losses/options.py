"""The options of losses and miners: what each may be, and what it means.

The table is what a call is checked by (`checked`), what a config is checked by, and what
`siamese-jax config` prints.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from siamese_jax import distances, values
from siamese_jax.values import COUNT, Option, choice, either, flag, number, several, whole

F = TypeVar("F", bound=Callable[..., Any])

_POSITIVE = number(above=0)
_DISTANCE = Option(choice(*distances.DISTANCES), "what embeddings are compared by")
_SIMILARITY = Option(choice("cosine", "dot"), "the similarity: of unit vectors, or the product")
_NORMALIZE = Option(flag(), "put the embeddings on the unit sphere first")
_TEMPERATURE = Option(_POSITIVE, "what similarities are divided by")
_SCALE = Option(_POSITIVE, "what cosines are multiplied by")
_MARGIN = Option(number(), "by how much a negative must be farther than a positive")
_OWN_MARGIN = Option(number(), "taken off the cosine of the own class")
_DEGREES = Option(number(0, 180), "degrees added to the angle of the own class")
_STEP = Option(_POSITIVE, "width of the smooth step")
_SELF = Option(flag(), "count each anchor among its own positives")
_CENTERS = Option(whole(1, 1000), "weights a class")
_RULE = choice("easy", "semi_hard", "hard", "all")

LOSS_OPTIONS: dict[str, dict[str, Option]] = {
    "softmax": {},
    "contrastive": {
        "positive_margin": Option(number(), "positives nearer than this cost nothing"),
        "negative_margin": Option(number(), "negatives farther than this cost nothing"),
        "pairs": Option(choice("batch", "explicit"), "all pairs, or rows x0, y0, x1, y1, ..."),
        "squared": Option(flag(), "square what lies beyond a margin"),
        "distance": _DISTANCE,
        "normalize": _NORMALIZE,
    },
    "triplet": {
        "margin": _MARGIN,
        "mining": Option(choice("explicit", "all", "hard", "semi_hard"), "which triplets count"),
        "distance": _DISTANCE,
        "normalize": _NORMALIZE,
        "soft": Option(flag(), "a soft hinge: log(1 + exp(.))"),
        "swap": Option(flag(), "let the positive be the anchor where it is nearer the negative"),
        "average": Option(choice("active", "all"), "over triplets with a loss above 0, or all"),
    },
    "n_pairs": {
        "l2": Option(number(0), "weight of the embeddings' squared norm"),
        "distance": _SIMILARITY,
    },
    "nt_xent": {"temperature": _TEMPERATURE, "distance": _SIMILARITY},
    "sup_con": {"temperature": _TEMPERATURE, "distance": _SIMILARITY},
    "hyperbolic": {
        "temperature": Option(_POSITIVE, "what distances are divided by"),
        "curvature": Option(_POSITIVE, "the ball's curvature, with its sign left out"),
        "clip_radius": Option(_POSITIVE, "the length that longer embeddings are cut to"),
    },
    "pairwise_sigmoid": {
        "scale": Option(_POSITIVE, "where the learned scale of cosines starts"),
        "bias": Option(number(), "where the learned bias starts"),
    },
    "multi_similarity": {
        "alpha": Option(_POSITIVE, "scale of positive pairs"),
        "beta": Option(_POSITIVE, "scale of negative pairs"),
        "base": Option(number(), "the similarity that pairs are pushed from"),
        "distance": _SIMILARITY,
    },
    "circle": {"margin": Option(number(), "the circle's radius, as a cosine"), "scale": _SCALE},
    "lifted_structure": {"margin": _MARGIN, "distance": _DISTANCE, "normalize": _NORMALIZE},
    "margin": {
        "margin": Option(number(), "half the width of the boundary between near and far"),
        "beta": Option(number(), "where the learned boundary starts, as a distance"),
        "beta_by": Option(choice("global", "class"), "one boundary, or one a class"),
        "nu": Option(number(0), "weight that pulls the boundary down"),
        "distance": _DISTANCE,
        "normalize": _NORMALIZE,
    },
    "fast_ap": {"bins": Option(whole(1, 10_000), "bins of the histogram of distances")},
    "smooth_ap": {"temperature": _STEP, "self_included": _SELF},
    "roadmap": {
        "temperature": _STEP,
        "rho": Option(_POSITIVE, "slope of the step where a negative is far ahead"),
        "delta": Option(_POSITIVE, "by how much cosine a negative is far ahead"),
        "calibration": Option(number(0, 1), "share of the thresholds; 0 is SupAP alone"),
        "positive_threshold": Option(number(-1, 1), "positives of a greater cosine cost nothing"),
        "negative_threshold": Option(number(-1, 1), "negatives of a smaller cosine cost nothing"),
        "self_included": _SELF,
    },
    "recall_at_k": {
        "ks": Option(several(COUNT, 1), "the ranks whose recall is averaged"),
        "temperature": _STEP,
        "k_temperature": Option(
            either(_POSITIVE, several(_POSITIVE, 1)), "width of the smooth step at rank k"
        ),
        "mixup": Option(whole(0, 100), "mixed embeddings that each one makes with its class"),
    },
    "proxy_nca": {
        "scale": Option(_POSITIVE, "what squared distances are multiplied by"),
        "own_in_denominator": Option(flag(), "count the own proxy among all of them"),
    },
    "proxy_anchor": {
        "margin": Option(number(), "by how much cosines must pass 0, to either side"),
        "alpha": _SCALE,
    },
    "normalized_softmax": {"temperature": _TEMPERATURE},
    "arcface": {"margin_degrees": _DEGREES, "scale": _SCALE},
    "sub_center_arcface": {"margin_degrees": _DEGREES, "scale": _SCALE, "centers": _CENTERS},
    "cosface": {"margin": _OWN_MARGIN, "scale": _SCALE},
    "soft_triple": {
        "scale": _SCALE,
        "gamma": Option(_POSITIVE, "temperature of the soft maximum over a class's centres"),
        "margin": _OWN_MARGIN,
        "centers": _CENTERS,
        "tau": Option(number(0), "weight that draws a class's centres together"),
    },
}

MINER_OPTIONS: dict[str, dict[str, Option]] = {
    "every": {},
    "hard": {"distance": _DISTANCE, "normalize": _NORMALIZE},
    "semi_hard": {"margin": _MARGIN, "distance": _DISTANCE, "normalize": _NORMALIZE},
    "easy_hard": {
        "positive": Option(_RULE, "which positive of an anchor"),
        "negative": Option(_RULE, "which negative of an anchor"),
        "distance": _DISTANCE,
        "normalize": _NORMALIZE,
    },
    "distance_weighted": {
        "cutoff": Option(_POSITIVE, "nearer negatives are drawn as if they were this far"),
        "nonzero_loss_cutoff": Option(_POSITIVE, "negatives farther than this are not drawn"),
    },
    "multi_similarity": {"epsilon": Option(number(), "slack around the hardest other pair")},
    "pair_margin": {
        "positive_margin": Option(number(), "positives farther than this are taken"),
        "negative_margin": Option(number(), "negatives nearer than this are taken"),
        "distance": _DISTANCE,
        "normalize": _NORMALIZE,
    },
    "angular": {"angle": Option(number(0, below=90), "degrees, the least angle at the negative")},
}


def checked(what: str, table: Mapping[str, Mapping[str, Option]]) -> Callable[[F], F]:
    """A decorator: the function's arguments are checked by its row of the table."""

    def decorate(function: F) -> F:
        options = table[function.__name__]
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                values.check(f"{what} {function.__name__}: {name}", value, options[name].kind)
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate


checked_loss = checked("loss", LOSS_OPTIONS)
checked_miner = checked("miner", MINER_OPTIONS)
