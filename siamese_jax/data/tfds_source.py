"""A TFDS data set as an ordinary folder of files, written once into the cache.

The images are copied as they are encoded, so nothing is lost or recompressed, and everything else
(fingerprints, the pipeline, reports) sees the same kind of records as everywhere.
"""

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from siamese_jax import stopping
from siamese_jax.data.csv_file import from_csv
from siamese_jax.data.records import Records
from siamese_jax.data.tf import tensorflow
from siamese_jax.errors import UserError
from siamese_jax.storage.cache import build_once, cache_root

_MAGIC = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def from_tfds(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    super_key: str | None = None,
) -> Records:
    """Reads a TFDS data set, preparing it first where that has not been done.

    Args:
      name: as TFDS writes it, with `/config` and `:version` where wanted.
      root: TFDS's data folder; None for its default.
      cache_dir: where the files are written; None for `cache_root()`.
      image_key, label_key: the features to use; None finds the only image, and "label" or the only
        class label.
      super_key: the feature of the super-class, if any.

    Returns:
      Records whose labels are in the order of TFDS's class numbers, with TFDS's own splits (they
      mostly share classes between train and test).

    Raises:
      UserError: an unknown name, features that do not fit, or data that cannot be prepared.
    """
    builder = _builder(name, root)
    features = builder.info.features
    image_key = image_key or _only(name, features, "Image")
    label_key = label_key or (
        "label" if "label" in features else _only(name, features, "ClassLabel")
    )
    for key in (image_key, label_key, super_key):
        if key is not None and key not in features:
            raise UserError(f"tfds:{name} has no feature '{key}' (it has: {', '.join(features)})")
    base = Path(cache_dir) if cache_dir is not None else cache_root()
    keys = "-".join(k.replace("/", "_") for k in (image_key, label_key, super_key) if k)
    folder = base / "tfds" / f"{builder.info.full_name.replace('/', '-')}-{keys}"
    if not folder.is_dir():
        _prepare(name, builder)
    build_once(folder, lambda draft: _write(name, builder, draft, image_key, label_key, super_key))
    records = from_csv(folder / "records.csv")
    names = getattr(features[label_key], "names", None)
    if names:
        called = tuple(names[int(number)] for number in records.class_names)
        records = replace(records, class_names=called)
    return records


def _builder(name: str, root: str | os.PathLike[str] | None) -> Any:
    tensorflow()
    import tensorflow_datasets as tfds

    try:
        with stopping.cut_off("nothing was begun"):
            return tfds.builder(name, data_dir=root)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as e:  # no name at all
        raise UserError(f"TFDS knows no data set '{name}'; see tensorflow.org/datasets") from e


def _only(name: str, features: Any, kind: str) -> str:
    found = [key for key, feature in features.items() if type(feature).__name__ == kind]
    # A segmentation mask is an image of one channel, beside the picture itself.
    found = [k for k in found if kind != "Image" or features[k].shape[-1] != 1] or found
    if len(found) != 1:
        raise UserError(
            f"tfds:{name} has {len(found)} features of the kind {kind} ({', '.join(features)}): "
            f"name the one to use, as data.{'image' if kind == 'Image' else 'label'}_key"
        )
    return found[0]


def _prepare(name: str, builder: Any) -> None:
    """Downloads and writes what TFDS does not have yet."""
    try:
        with stopping.cut_off(f"tfds:{name} is not prepared; downloads that ended are kept"):
            builder.download_and_prepare()
    except ImportError as e:
        raise UserError(f"tfds:{name} needs a package that is not installed: {e}") from e
    except Exception as e:  # TFDS and its downloaders raise all sorts
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise UserError(
            f"tfds:{name} cannot be prepared ({reason[0]}); prepare it where there is a network, "
            "and set TFDS_DATA_DIR or data.root to its folder"
        ) from e


def _write(
    name: str, builder: Any, draft: Path, image_key: str, label_key: str, super_key: str | None
) -> None:
    import tensorflow_datasets as tfds

    wanted = {key for key in (image_key, label_key, super_key) if key}
    decoders = tfds.decode.PartialDecoding(
        dict.fromkeys(wanted, True), decoders={image_key: tfds.decode.SkipDecoding()}
    )
    with open(draft / "records.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split", *(["category"] if super_key else [])])
        for split in list(builder.info.splits) or ["all"]:
            (draft / split).mkdir()
            data = builder.as_dataset(split=split, decoders=decoders, shuffle_files=False)
            for i, example in enumerate(data.as_numpy_iterator()):
                stopping.check(f"tfds:{name} is prepared, and is read again")
                image = bytes(example[image_key])
                suffix = next((s for magic, s in _MAGIC.items() if image.startswith(magic)), ".img")
                path = f"{split}/{i:08d}{suffix}"
                (draft / path).write_bytes(image)
                known = split if split in ("train", "validation", "test") else ""
                super_class = [int(example[super_key])] if super_key else []
                rows.writerow([path, int(example[label_key]), known, *super_class])
