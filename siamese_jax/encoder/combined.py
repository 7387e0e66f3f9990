"""Encoders made of encoders: whitened, seen in several views, or several fused into one.

    whitened(encoder, whitening)   unit( P (z - m) )                        see whitening.py
    augmented(encoder, ...)        unit( sum over views v of unit(z_v) )    mirrored, resized
    fused([a, b, ...])             one embedding whose cosine is the weighted mean of theirs

Every part keeps cached embeddings of its own: a whitening costs no pass through the trunk, and a
mirrored view or another encoder costs one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from siamese_jax import values
from siamese_jax.encoder.whitening import Whitening
from siamese_jax.errors import UserError
from siamese_jax.search.engine.checked_rows import unit_rows

if TYPE_CHECKING:
    from siamese_jax.encoder.encoder import Encoder

Part = Union["Encoder", "Combined"]


@dataclasses.dataclass(frozen=True, eq=False)
class Combined:
    """Images in, embeddings out: those of its parts, joined. Used like an `Encoder`.

    Attributes:
      parts: the encoders.
      join: their embeddings, float32 [n, d_i] each -> float32 [n, d], rows of length 1.
      how: what `join` does, as JSON can hold it.
      image_size: the side, in pixels, that `__call__` takes its images to have.
      provenance: of the parts, and what was done with them.
      distance: what the embeddings are compared by.
      arguments: what `load_encoder` was called with, where it made this encoder.
      joined_to: keys of the images that `join` was fitted to (see `fitted_to`).
    """

    parts: tuple[Part, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    how: Mapping[str, Any]
    image_size: int
    provenance: Mapping[str, Any]
    distance: str = "cosine"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    joined_to: frozenset[bytes] = frozenset()

    def __repr__(self) -> str:
        how = ", ".join(f"{name}={value}" for name, value in self.how.items())
        return f"<Combined {how}: {self.embedding_dim} dimensions of {list(self.parts)}>"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embeds uint8 [n, h, w, 3], which each part sees in its own size: float32 [n, d].

        `embed_folder` reads the images in that size instead, which keeps more of large ones.
        """
        images = np.asarray(images)
        seen = (part(_resized(images, part.image_size / self.image_size)) for part in self.parts)
        return self.join(list(seen))

    @property
    def fitted_to(self) -> frozenset[bytes]:
        """`siamese_jax.data.records.content_keys` of all images that any part was fitted to."""
        return self.joined_to.union(*(part.fitted_to for part in self.parts))

    @functools.cached_property
    def embedding_dim(self) -> int:
        """Width of the embedding."""
        empty = [np.zeros((1, part.embedding_dim), np.float32) for part in self.parts]
        return self.join(empty).shape[1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of all that an embedding depends on beside the image."""
        from siamese_jax.storage.tree import fingerprint

        return fingerprint(parts=[part.fingerprint for part in self.parts], how=dict(self.how))

    def at_size(self, image_size: int) -> "Combined":
        """The same for images of another size."""
        ratio = image_size / self.image_size
        parts = tuple(part.at_size(max(1, round(ratio * part.image_size))) for part in self.parts)
        return dataclasses.replace(self, parts=parts, image_size=image_size)

    def mirrored(self) -> "Combined":
        """The same, seeing every image mirrored."""
        return dataclasses.replace(self, parts=tuple(part.mirrored() for part in self.parts))


def whitened(encoder: Part, whitening: Whitening) -> Combined:
    """The encoder followed by a whitening that was fitted to its embeddings."""
    if len(whitening.mean) != encoder.embedding_dim:
        raise UserError(
            f"the whitening was fitted to embeddings of {len(whitening.mean)} dimensions, but the "
            f"encoder gives {encoder.embedding_dim}: fit it again"
        )
    return Combined(
        (encoder,),
        lambda vectors: whitening(vectors[0]),
        {"whitening": whitening.digest},
        encoder.image_size,
        {**encoder.provenance, "whitening": {**whitening.about, "digest": whitening.digest}},
        joined_to=whitening.fitted_to,
    )


def augmented(encoder: Part, *, mirror: bool = True, scales: Sequence[float] = (1.0,)) -> Combined:
    """Test-time augmentation: the mean over views of each image.

    Args:
      encoder: one that takes images of any size.
      mirror: also the mirror image, at every scale.
      scales: sizes relative to the encoder's own, such as (1, 1.4142).

    Raises:
      UserError: no scale, or one that is not above 0.
    """
    values.check("scales", [*scales], values.several(values.SCALE, 1))
    sized = [encoder.at_size(max(1, round(encoder.image_size * scale))) for scale in scales]
    views = sized + [view.mirrored() for view in sized] if mirror else sized
    how = {"mirror": mirror, "scales": [float(scale) for scale in scales]}
    return Combined(
        tuple(views),
        lambda vectors: unit_rows(np.sum([unit_rows(rows) for rows in vectors], axis=0)),
        how,
        encoder.image_size,
        {**encoder.provenance, "views": how},
    )


def fused(encoders: Sequence[Part], weights: Sequence[float] | None = None) -> Combined:
    """Score fusion: cosines are the weighted mean of the encoders' (see `fusion.concatenate`).

    Args:
      encoders: one or more; the first one's image size is that of `__call__`.
      weights: one for each, at least 0; equal if not given.

    Raises:
      UserError: weights that are no weights, or not as many as encoders.
    """
    concatenate([np.zeros((1, 1))] * len(encoders), weights)
    shares = [1.0] * len(encoders) if weights is None else [float(w) for w in weights]
    parts = {str(i): dict(encoder.provenance) for i, encoder in enumerate(encoders, start=1)}
    fallbacks = [p["fallback_for"] for p in parts.values() if p.get("fallback_for")]
    return Combined(
        tuple(encoders),
        lambda vectors: concatenate(vectors, weights),
        {"weights": shares},
        encoders[0].image_size,
        {"fused": parts, "weights": shares, "fallback_for": "; ".join(fallbacks) or None},
    )


def _resized(images: np.ndarray, scale: float) -> np.ndarray:
    n, h, w, c = images.shape
    size = max(1, round(h * scale)), max(1, round(w * scale))
    if size == (h, w):
        return images
    scaled = jax.image.resize(jnp.asarray(images, jnp.float32), (n, *size, c), "bilinear")
    return np.asarray(jnp.clip(jnp.round(scaled), 0, 255)).astype(np.uint8)


def concatenate(
    embeddings: Sequence[ArrayLike], weights: Sequence[float] | None = None
) -> np.ndarray:
    """Score fusion: one embedding whose cosine is the weighted mean of several encoders' cosines.

        z = concat_i( sqrt(w_i / sum w) unit(x_i) )   so that   <z, z'> = sum_i w_i cos_i / sum w

    Args:
      embeddings: real [n, d_i] of each encoder, rows of the same n images.
      weights: one for each encoder, at least 0; equal if not given.

    Returns:
      float32 [n, sum d_i], rows of length 1 (but for zero rows).

    >>> concatenate([[[2.0, 0.0]], [[0.0, 5.0]]], weights=[3, 1]).round(3).tolist()
    [[0.8659999966621399, 0.0, 0.0, 0.5]]
    """
    parts = [unit_rows(part) for part in embeddings]
    weights = [1.0] * len(parts) if weights is None else [*weights]
    values.check("weights", weights, values.several(values.FUSE_WEIGHT, len(parts), len(parts)))
    weight = np.asarray(weights, np.float64)
    if not parts or len({len(part) for part in parts}) > 1:
        raise UserError(f"fused encoders must embed the same images: {[len(p) for p in parts]}")
    if not weight.sum() > 0:
        raise UserError(f"weights {weight.tolist()} are all 0")
    root = np.sqrt(weight / weight.sum()).astype(np.float32)
    return np.concatenate([w * part for w, part in zip(root, parts, strict=True)], axis=1)
