"""Losses as pairs of functions: `LOSSES[name](**options)` is a `Loss(init, apply)`.

>>> import jax, jax.numpy as jnp
>>> loss = LOSSES["triplet"](margin=0.5, mining="explicit")
>>> params = loss.init(jax.random.key(0), embedding_dim=2, num_classes=2)
>>> anchor, positive, negative = [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]
>>> rows = jnp.array([anchor, negative, positive])  # the wrong way round: distance sqrt(2) too far
>>> round(float(mean(loss, params, rows, jnp.array([0, 0, 1]))), 4)
1.9142
"""

from collections.abc import Callable

from siamese_jax.losses.average_precision import fast_ap, roadmap, smooth_ap
from siamese_jax.losses.contrastive import contrastive
from siamese_jax.losses.core import Loss, mean, reduce
from siamese_jax.losses.hyperbolic import hyperbolic
from siamese_jax.losses.info_nce import n_pairs, nt_xent, sup_con
from siamese_jax.losses.margin import margin
from siamese_jax.losses.pair_weighting import circle, lifted_structure, multi_similarity
from siamese_jax.losses.proxies import proxy_anchor, proxy_nca
from siamese_jax.losses.recall import recall_at_k
from siamese_jax.losses.sigmoid import pairwise_sigmoid
from siamese_jax.losses.softmax import (
    arcface,
    cosface,
    normalized_softmax,
    soft_triple,
    softmax,
    sub_center_arcface,
)
from siamese_jax.losses.triplet import triplet

__all__ = [
    "LOSSES",
    "ON_DISTANCE",
    "Loss",
    "arcface",
    "circle",
    "contrastive",
    "cosface",
    "fast_ap",
    "hyperbolic",
    "lifted_structure",
    "margin",
    "mean",
    "multi_similarity",
    "n_pairs",
    "normalized_softmax",
    "nt_xent",
    "pairwise_sigmoid",
    "proxy_anchor",
    "proxy_nca",
    "recall_at_k",
    "reduce",
    "roadmap",
    "smooth_ap",
    "soft_triple",
    "softmax",
    "sub_center_arcface",
    "sup_con",
    "triplet",
]

LOSSES: dict[str, Callable[..., Loss]] = {
    "softmax": softmax,
    "contrastive": contrastive,
    "triplet": triplet,
    "n_pairs": n_pairs,
    "nt_xent": nt_xent,
    "sup_con": sup_con,
    "hyperbolic": hyperbolic,
    "pairwise_sigmoid": pairwise_sigmoid,
    "multi_similarity": multi_similarity,
    "circle": circle,
    "lifted_structure": lifted_structure,
    "margin": margin,
    "fast_ap": fast_ap,
    "smooth_ap": smooth_ap,
    "roadmap": roadmap,
    "recall_at_k": recall_at_k,
    "proxy_nca": proxy_nca,
    "proxy_anchor": proxy_anchor,
    "normalized_softmax": normalized_softmax,
    "arcface": arcface,
    "sub_center_arcface": sub_center_arcface,
    "cosface": cosface,
    "soft_triple": soft_triple,
}
# These are on any of `siamese_jax.distances`: training gives them its own. The others are on a
# similarity, whose scale (temperature, base, alpha) goes with it.
ON_DISTANCE = frozenset({"contrastive", "triplet", "lifted_structure", "margin"})
