"""trunk -> pool -> head -> embedding, as one set of pure functions, and the encoder users call."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.encoder.model import (
    Array,
    Model,
    block_size,
    in_blocks,
    inference_trunk,
    model_fingerprint,
    on_each_device,
    run_embed,
)
from siamese_jax.errors import UserError
from siamese_jax.trunks.folding import transformed_kernels

log = logging.getLogger(__name__)


class Apart(NamedTuple):
    """An encoder as parts whose embeddings are kept side by side.

    Attributes:
      parts: what each of them is the embedding of.
      compute: images -> all of them.
      finish: all of them -> the encoder's embeddings.
    """

    parts: tuple["Encoder", ...]
    compute: Callable[[np.ndarray], np.ndarray]
    finish: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Images in, embeddings out.

    Attributes:
      model: what is computed.
      params, batch_stats: {"trunk": ..., "head": ...}; the trunk's norms are in its kernels,
        where it can be folded.
      image_size: the side, in pixels, that images are brought to by `embed_folder`.
      fit: how they are brought there: "squash", "crop" or "pad".
      distance: what the embeddings are compared by.
      provenance: where trunk and weights came from, as `run.json` holds it.
      mirror: whether every image is seen mirrored.
      arguments: what `load_encoder` was called with, where it made this encoder.
      kernels: the trunk's, transformed for this image size and processor. They follow from the
        parameters, and are no part of what the encoder is.
      fitted_to: keys of the images that it was trained on, where they are known, as
        `siamese_jax.data.records.content_keys` gives them.
    """

    model: Model
    params: Any
    batch_stats: Any
    image_size: int
    fit: str = "squash"
    distance: str = "cosine"
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mirror: bool = False
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kernels: Any = dataclasses.field(default_factory=dict)
    fitted_to: frozenset[bytes] = frozenset()

    def __repr__(self) -> str:
        facts = [f"{self.image_size} px", f"{self.embedding_dim} dimensions", self.distance]
        facts += ["mirrored"] if self.mirror else []
        return f"<Encoder {self.provenance.get('run') or self.model.name}: {', '.join(facts)}>"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embeds images, in blocks of a fixed size so that one compilation serves any number.

        Args:
          images: uint8 [n, h, w, 3], RGB.

        Returns:
          float32 [n, d]

        Raises:
          UserError: another shape or dtype.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise UserError(
                f"an encoder takes uint8 images [n, h, w, 3], not {images.dtype} "
                f"{list(images.shape)}"
            )
        if not len(images):
            return np.zeros((0, self.embedding_dim), np.float32)
        images = images[:, :, ::-1] if self.mirror else images
        return in_blocks(self._embed_block, images, block_size(images.shape))

    def _embed_block(self, images: np.ndarray) -> Array:
        return run_embed(self.model, self.params, self.batch_stats, images, self.kernels)

    @functools.cached_property
    def embedding_dim(self) -> int:
        """Width of the embedding."""
        if self.model.head.layers:
            return self.model.head.layers[-1]
        return sum(self.model.widths)

    def apart(self) -> "Apart":
        """How its embeddings are kept: a bare trunk's stage by stage, before they are joined.

        So any choice of stages finds what another one has computed.
        """
        head = self.model.head
        if head.layers or head.gem or not (head.unit or head.signed_sqrt):
            return Apart((self,), self, np.asarray)
        models = self.model.apart()
        raw = dataclasses.replace(self, model=self.model._replace(head=models[0].head))
        parts = tuple(dataclasses.replace(self, model=model) for model in models)
        return Apart(parts, raw, lambda rows: in_blocks(self._embed_block, rows, 512))

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of all that an embedding depends on beside the image.

        It is of the weights as they were loaded, so it is equal on every processor.
        """
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        seen = ("mirror",) if self.mirror else ()
        return model_fingerprint(self.model, variables, self.image_size, self.fit, *seen)

    def at_size(self, image_size: int) -> "Encoder":
        """The same for images of another size."""
        if image_size == self.image_size:
            return self
        shape = (image_size, image_size, 3)
        kernels = transformed_kernels(self.model.trunk, {"params": self.params["trunk"]}, shape)
        return dataclasses.replace(self, kernels=kernels, image_size=image_size)

    def mirrored(self) -> "Encoder":
        """The same, seeing every image mirrored."""
        return dataclasses.replace(self, mirror=not self.mirror)


def make_encoder(
    model: Model, params: Any, batch_stats: Any, *, image_size: int, **options: Any
) -> Encoder:
    """An encoder for inference."""
    trunk = {"params": params["trunk"], "batch_stats": batch_stats["trunk"]}
    model, trunk = inference_trunk(model, trunk, image_size)
    return Encoder(
        model,
        on_each_device({"trunk": trunk["params"], "head": params["head"]}),
        on_each_device({"trunk": trunk.get("batch_stats", {}), "head": batch_stats["head"]}),
        image_size=image_size,
        kernels=on_each_device(trunk["tiles"]),
        **options,
    )
