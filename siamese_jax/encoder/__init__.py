"""Images in, embeddings out: trunk, pooling and head, and encoders made of encoders."""

from siamese_jax.encoder.encoder import Encoder, make_encoder
from siamese_jax.encoder.load import load_encoder
from siamese_jax.encoder.model import Model, build_model, embed, features
from siamese_jax.trunks.table import TRUNKS

__all__ = [
    "TRUNKS",
    "Encoder",
    "Model",
    "build_model",
    "embed",
    "features",
    "load_encoder",
    "make_encoder",
]
