"""Images that are given one by one, as files or in memory, in place of a data set."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.data.preprocess import read_image, whole_image
from siamese_jax.data.records import Records, make_records
from siamese_jax.errors import UserError
from siamese_jax.names import label_codes

if TYPE_CHECKING:
    from PIL.Image import Image

HERE = "memory:"  # what the path of an image in memory begins with


def given_records(images: Iterable[Any], labels: Any = None) -> tuple[Records, list["Image"]]:
    """A list of images as records, and those that are in memory as Pillow knows them.

    Args:
      images: n paths; or n Pillow images and arrays uint8 [h, w], [h, w, 3] or [h, w, 4].
      labels: n labels as in `siamese_jax.names`; None for none.

    Returns:
      The records and, unless the images are files, the n images. An image in memory is named by
      its content, and by how often the list had it before: no two of a list have one name.

    Raises:
      UserError: no list, nothing in it, something else than an image in it, or not n labels.
    """
    # The rows of one picture are no list of pictures.
    one = isinstance(images, str | os.PathLike) or getattr(images, "ndim", 4) != 4
    if one or not isinstance(images, Iterable):
        raise UserError("give a list of images: paths, Pillow images or uint8 arrays [h, w, 3]")
    images = list(images)
    files = [isinstance(image, str | os.PathLike) for image in images]
    if not files:
        raise UserError("the list of images is empty")
    if any(files) and not all(files):
        raise UserError("the list has files and images in memory: give them one after the other")
    pictures = [] if files[0] else [_picture(image, i) for i, image in enumerate(images)]
    paths = [os.fspath(path) for path in images] if files[0] else _named(pictures)
    records = make_records(paths, ["?"] * len(paths), root="" if files[0] else HERE)
    if labels is None:
        return replace(records, label=np.full(len(paths), -1, np.int32), class_names=()), pictures
    vocabulary, (codes,) = label_codes(labels)
    if len(codes) != len(paths):
        raise UserError(f"{len(paths)} images have {len(codes)} labels")
    codes = codes if codes.ndim == 2 else codes.astype(np.int32)
    return replace(records, label=codes, class_names=tuple(map(str, vocabulary))), pictures


def picture_keys(pictures: Sequence["Image"]) -> list[bytes]:
    """A 16-byte key of each image's pixels, size and mode."""
    return [bytes.fromhex(_digest(picture)) for picture in pictures]


def picture_batches(
    pictures: Sequence["Image"], rows: np.ndarray, *, image_size: int, fit: str, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Some of the images in batches, read as files are: {"image", "id", "mask"}."""
    for start in range(0, len(rows), batch_size):
        ids = rows[start : start + batch_size]
        images = np.stack([read_image(pictures[i], image_size, fit=fit) for i in ids])
        yield {"image": images, "id": ids, "mask": np.ones(len(ids), bool)}


def _picture(image: Any, i: int) -> "Image":
    from PIL import Image

    if isinstance(image, Image.Image):
        try:
            return whole_image(image)
        except UserError as e:
            raise UserError(f"image {i} of the list: {e}") from e
    pixels = np.asarray(image)
    colours = pixels.shape[2:]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or colours not in ((), (3,), (4,)):
        raise UserError(
            f"image {i} is {type(image).__name__} {pixels.dtype} {list(pixels.shape)}: give uint8 "
            "[h, w, 3] (or [h, w], [h, w, 4]), a Pillow image, or only paths"
        )
    if not pixels.size:
        raise UserError(f"image {i} has no pixels: {list(pixels.shape)}")
    return Image.fromarray(pixels)


def _named(pictures: Sequence["Image"]) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for digest in map(_digest, pictures):
        names.append(f"{HERE}{digest}" + (f"#{seen[digest]}" if seen[digest] else ""))
        seen[digest] += 1
    return names


def _digest(picture: "Image") -> str:
    """32 hexadecimal digits of all that decides how an image is seen."""
    notes = (picture.info.get("exif"), picture.info.get("transparency"))
    facts = (picture.mode, picture.size, picture.getpalette("RGBA"), *notes)
    key = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    key.update(picture.tobytes())
    return key.hexdigest()
