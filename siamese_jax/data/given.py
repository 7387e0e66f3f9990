"""Images that are given one by one, as files or in memory, in place of a data set."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.data.labels import label_codes
from siamese_jax.data.preprocess import read_image, whole_image
from siamese_jax.data.records import Records, class_name, make_records
from siamese_jax.data.sources import load_images
from siamese_jax.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

HERE = "memory:"  # what the path of an image in memory begins with


def given_records(images: Iterable[Any], labels: Any = None) -> tuple[Records, list["Image"]]:
    """A list of images as records, and those that are in memory as Pillow knows them.

    Args:
      images: n paths; or n Pillow images and arrays uint8 [h, w], [h, w, 3] or [h, w, 4].
      labels: n labels as in `siamese_jax.data.labels`; None for none.

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
    pictures: list[Image] = []
    if files[0]:
        records = load_images(images)
    else:
        pictures = [_picture(image, i) for i, image in enumerate(images)]
        records = make_records(_named(pictures), [None] * len(pictures), root=HERE)
    if labels is None:
        return records, pictures
    vocabulary, (codes,) = label_codes(labels)
    if len(codes) != len(records):
        raise UserError(f"{len(records)} images have {len(codes)} labels")
    codes = codes if codes.ndim == 2 else codes.astype(np.int32)
    names = tuple(class_name(str(label)) for label in vocabulary)
    return replace(records, label=codes, class_names=names), pictures


def picture_keys(pictures: Sequence["Image"]) -> list[bytes]:
    """A 16-byte key of each image's size and pixels."""
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
    """The image upright in RGB, its notes on that left behind."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        image = Image.fromarray(_pixels(image, i))
    try:
        return whole_image(image)
    except UserError as e:
        raise UserError(f"image {i} of the list: {e}") from e


def _pixels(image: Any, i: int) -> np.ndarray:
    pixels = np.asarray(image)
    colours = pixels.shape[2:]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or colours not in ((), (3,), (4,)):
        raise UserError(
            f"image {i} is {type(image).__name__} {pixels.dtype} {list(pixels.shape)}: give uint8 "
            "[h, w, 3] (or [h, w], [h, w, 4]), a Pillow image, or only paths"
        )
    if not pixels.size:
        raise UserError(f"image {i} has no pixels: {list(pixels.shape)}")
    return pixels


def _named(pictures: Sequence["Image"]) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for digest in map(_digest, pictures):
        names.append(f"{HERE}{digest}" + (f"#{seen[digest]}" if seen[digest] else ""))
        seen[digest] += 1
    return names


def _digest(picture: "Image") -> str:
    """32 hexadecimal digits of an image's size and pixels."""
    key = hashlib.blake2b(repr(picture.size).encode(), digest_size=16)
    key.update(picture.tobytes())
    return key.hexdigest()
