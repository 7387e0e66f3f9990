"""How good a ranking is: the metrics themselves, and what is worked out of embeddings for them."""

from siamese_jax.metrics.retrieval import (
    DEFAULT,
    METRICS,
    PerQuery,
    evaluate,
    expand,
    of_ranking,
    per_query,
)

__all__ = ["DEFAULT", "METRICS", "PerQuery", "evaluate", "expand", "of_ranking", "per_query"]
