"""Image retrieval in JAX: siamese encoders, metric-learning losses, exact ranking.

The names below are imported on first use, so `import siamese_jax` costs milliseconds and never
brings TensorFlow in.
"""

import importlib
from typing import Any

_HOMES = {
    "rank": "ranking",
    "load_encoder": "encoder",
    "whiten": "encoder_folder",
    "embed_folder": "features",
    "embed_images": "features",
    "Embedded": "embedded",
    "Encoder": "encoder",
    "Ranking": "ranking",
    "range_search": "ranking",
    "pairwise_distances": "ranking",
    "Gallery": "gallery",
    "evaluate": "metrics",
    "UserError": "errors",
}
_MODULES = (
    "bootstrap",
    "breakdown",
    "clustering",
    "distances",
    "encoder",
    "features",
    "landmarks",
    "losses",
    "metrics",
    "miners",
    "ranking",
    "rerank",
    "verification",
    "weights",
)

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
