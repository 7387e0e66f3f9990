"""Image retrieval in JAX: siamese encoders, metric-learning losses, exact ranking.

The names below are imported on first use, so `import siamese_jax` costs milliseconds and never
brings TensorFlow in. Editors and type checkers read them under TYPE_CHECKING.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siamese_jax import distances, encoder, losses, metrics, weights
    from siamese_jax.data.embedded import Embedded
    from siamese_jax.encoder import embedding as features
    from siamese_jax.encoder.embedding import embed_folder, embed_images
    from siamese_jax.encoder.encoder import Encoder
    from siamese_jax.encoder.folder import whiten
    from siamese_jax.encoder.load import load_encoder
    from siamese_jax.errors import UserError
    from siamese_jax.losses import miners
    from siamese_jax.metrics import bootstrap, clustering, landmarks, verification
    from siamese_jax.metrics import by_class as breakdown
    from siamese_jax.metrics.retrieval import evaluate
    from siamese_jax.metrics.shards import evaluate_shards
    from siamese_jax.search import ranking, rerank
    from siamese_jax.search.gallery import Gallery
    from siamese_jax.search.ranking import Ranking, pairwise_distances, range_search, rank
    from siamese_jax.search.shards import rank_shards

__all__ = [
    "Embedded",
    "Encoder",
    "Gallery",
    "Ranking",
    "UserError",
    "__version__",
    "bootstrap",
    "breakdown",
    "clustering",
    "distances",
    "embed_folder",
    "embed_images",
    "encoder",
    "evaluate",
    "evaluate_shards",
    "features",
    "landmarks",
    "load_encoder",
    "losses",
    "metrics",
    "miners",
    "pairwise_distances",
    "range_search",
    "rank",
    "rank_shards",
    "ranking",
    "rerank",
    "verification",
    "weights",
    "whiten",
]

# Where each public name lives: a module's attribute, or a module as a whole.
_NAMES = {
    "Encoder": "encoder.encoder",
    "Gallery": "search.gallery",
    "Ranking": "search.ranking",
    "UserError": "errors",
    "Embedded": "data.embedded",
    "embed_folder": "encoder.embedding",
    "embed_images": "encoder.embedding",
    "evaluate": "metrics.retrieval",
    "load_encoder": "encoder.load",
    "pairwise_distances": "search.ranking",
    "range_search": "search.ranking",
    "rank_shards": "search.shards",
    "evaluate_shards": "metrics.shards",
    "rank": "search.ranking",
    "whiten": "encoder.folder",
}
_MODULES = {
    "bootstrap": "metrics.bootstrap",
    "breakdown": "metrics.by_class",
    "clustering": "metrics.clustering",
    "distances": "distances",
    "encoder": "encoder",
    "features": "encoder.embedding",
    "landmarks": "metrics.landmarks",
    "losses": "losses",
    "metrics": "metrics",
    "miners": "losses.miners",
    "ranking": "search.ranking",
    "rerank": "search.rerank",
    "verification": "metrics.verification",
    "weights": "weights",
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name == "__version__":
        from importlib import metadata

        return metadata.version("siamese-jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
