"""Pretrained weights: named sources and local files, ported into a trunk's variables."""

from siamese_jax.weights.load import (
    SOURCES,
    FallbackWarning,
    TrunkWeights,
    load,
    save,
    with_stages,
)

__all__ = ["SOURCES", "FallbackWarning", "TrunkWeights", "load", "save", "with_stages"]
