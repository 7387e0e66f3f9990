"""Better answers from the same embeddings, on top of exact top-k and in bounded memory.

All take embeddings [n, d], compare by cosine, and return vectors of length 1 or a `Ranking`;
`augmented`, `fused` and `whitened` do likewise to whole encoders.
"""

from siamese_jax.encoder.combined import augmented, concatenate, fused, whitened
from siamese_jax.encoder.whitening import Whitening, fit_whitening
from siamese_jax.search.rerank.diffusion import diffuse
from siamese_jax.search.rerank.expansion import augment_gallery, expand_queries
from siamese_jax.search.rerank.fusion import fuse_rankings
from siamese_jax.search.rerank.k_reciprocal import k_reciprocal

__all__ = [
    "Whitening",
    "augment_gallery",
    "augmented",
    "concatenate",
    "diffuse",
    "expand_queries",
    "fit_whitening",
    "fuse_rankings",
    "fused",
    "k_reciprocal",
    "whitened",
]
