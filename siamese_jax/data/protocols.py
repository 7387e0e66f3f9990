"""The field's standard data sets and splits; another number of images or classes is refused.

    name    train images / classes   test images / classes     introduced for retrieval by
    cub      5,864 /    100           5,924 /    100           Oh Song et al., CVPR 2016 (and cars)
    cars     8,054 /     98           8,131 /     98
    sop     59,551 / 11,318          60,502 / 11,316           Oh Song et al., CVPR 2016
    inshop  25,882 /  3,997          14,218 query + 12,612 gallery / 3,985    Liu et al., CVPR 2016

A root is the folder of the original download; without one, TFDS provides all but In-Shop.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.data.records import Records, make_records
from siamese_jax.data.tfds_source import from_tfds
from siamese_jax.errors import UserError


class Counts(NamedTuple):
    """What a protocol must consist of; queries and gallery are the test images by role."""

    train: int
    train_classes: int
    queries: int
    gallery: int
    test_classes: int


PROTOCOLS: dict[str, Counts] = {
    "cub": Counts(5_864, 100, 5_924, 5_924, 100),
    "cars": Counts(8_054, 98, 8_131, 8_131, 98),
    "sop": Counts(59_551, 11_318, 60_502, 60_502, 11_316),
    "inshop": Counts(25_882, 3_997, 14_218, 12_612, 3_985),
}


def load_protocol(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    counts: Counts | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Records:
    """Reads a standard data set with its class-disjoint split.

    Args:
      name: cub, cars, sop or inshop.
      root: the folder of the original download, as it is unpacked; None for TFDS.
      counts: what must be found; None for the protocol's own.
      cache_dir: of the files that come from TFDS.

    Raises:
      UserError: an unknown name, missing files, or other counts than the protocol's.
    """
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol '{name}'; known: {', '.join(PROTOCOLS)}")
    counts = counts or PROTOCOLS[name]
    if root is not None:
        records = _ORIGINAL[name](Path(root), counts)
    elif name == "inshop":
        raise UserError("inshop is not in TFDS: data.root must be the folder of its download")
    elif name == "sop":
        records = from_tfds(
            "stanford_online_products",
            cache_dir=cache_dir,
            label_key="class_id",
            super_key="super_class_id",
        )
    else:
        tfds_name = {"cub": "caltech_birds2011", "cars": "cars196"}[name]
        records = from_tfds(tfds_name, cache_dir=cache_dir)
        records = replace(records, split=_first_half(records.label, counts))
    _refuse_other(name, records, counts)
    return records


def _first_half(label: np.ndarray, counts: Counts) -> np.ndarray:
    """CUB and Cars: the first classes by their official number train, the others test."""
    return np.where(label < counts.train_classes, "train", "test").astype("U10")


def _cub(root: Path, counts: Counts) -> Records:
    names = dict(_rows(root / "images.txt", 2))
    numbers = dict(_rows(root / "image_class_labels.txt", 2))
    if names.keys() != numbers.keys():
        raise UserError(f"{root}: images.txt and image_class_labels.txt list different images")
    paths = [str(root / "images" / names[i]) for i in names]
    return _numbered(paths, [numbers[i] for i in names], root, counts)


def _cars(root: Path, counts: Counts) -> Records:
    from scipy.io import loadmat

    file = _existing(root / "cars_annos.mat")
    rows = loadmat(file, squeeze_me=True)["annotations"]
    paths = [str(root / str(p)) for p in np.atleast_1d(rows["relative_im_path"])]
    return _numbered(paths, [str(int(c)) for c in np.atleast_1d(rows["class"])], root, counts)


def _numbered(paths: list[str], numbers: list[str], root: Path, counts: Counts) -> Records:
    records = make_records(_all_exist(paths), numbers, root=str(root))
    return replace(records, split=_first_half(records.label, counts))


def _sop(root: Path, counts: Counts) -> Records:
    parts = {s: list(_rows(root / f"Ebay_{s}.txt", 4))[1:] for s in ("train", "test")}
    rows = [(*row, split) for split, part in parts.items() for row in part]
    return make_records(
        _all_exist([str(root / path) for _, _, _, path, _ in rows]),
        [number for _, number, _, _, _ in rows],
        root=str(root),
        split=[split for *_, split in rows],
        super_classes=[kind for _, _, kind, _, _ in rows],
    )


def _inshop(root: Path, counts: Counts) -> Records:
    lists = [root / "Eval" / "list_eval_partition.txt", root / "list_eval_partition.txt"]
    file = next((f for f in lists if f.is_file()), lists[0])
    rows = list(_rows(file, 3, skip=1))[1:]
    roles = [role for _, _, role in rows]
    if unknown := set(roles) - {"train", "query", "gallery"}:
        raise UserError(f"{file}: unknown evaluation status '{unknown.pop()}'")
    kinds: dict[str, str] = {}  # of an item: img/WOMEN/Dresses/id_00000001/02_1_front.jpg
    for path, item, _ in rows:
        kinds.setdefault(item, "/".join(path.split("/")[1:-2]))
    return make_records(
        _all_exist([str(_inshop_image(root, path)) for path, _, _ in rows]),
        [item for _, item, _ in rows],
        root=str(root),
        split=["train" if role == "train" else "test" for role in roles],
        is_query=[role != "gallery" for role in roles],
        is_gallery=[role != "query" for role in roles],
        super_classes=[kinds[item] for _, item, _ in rows],
    )


def _inshop_image(root: Path, path: str) -> Path:
    """The list says img/...; the archive unpacks to img/ or, on some mirrors, Img/img/."""
    return root / "Img" / path if (root / "Img").is_dir() else root / path


def _rows(file: Path, columns: int, skip: int = 0) -> Iterator[Any]:
    """The lines of a list as tuples of that many words."""
    with open(_existing(file), encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            values = line.split()
            if number <= skip or not values:
                continue
            if len(values) != columns:
                raise UserError(f"{file}, line {number}: {len(values)} values, not {columns}")
            yield tuple(values)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file} does not exist: data.root must be the folder of the download")
    return file


def _all_exist(paths: list[str]) -> list[str]:
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        raise UserError(f"{len(missing)} listed images do not exist, the first is {missing[0]}")
    return paths


def _refuse_other(name: str, records: Records, counts: Counts) -> None:
    train, test = records.split == "train", records.split == "test"
    found = Counts(
        train=int(train.sum()),
        train_classes=len(np.unique(records.label[train])),
        queries=int((test & records.is_query).sum()),
        gallery=int((test & records.is_gallery).sum()),
        test_classes=len(np.unique(records.label[test])),
    )
    wrong = [
        f"{field.replace('_', ' ')} {have:,} instead of {want:,}"
        for field, have, want in zip(Counts._fields, found, counts, strict=True)
        if have != want
    ]
    if wrong:
        raise UserError(f"{name} at {records.name} is not the protocol's: {', '.join(wrong)}")
    if np.intersect1d(records.label[train], records.label[test]).size:
        raise UserError(f"{name} at {records.name}: a class is in both train and test")


_ORIGINAL: dict[str, Callable[[Path, Counts], Records]] = {
    "cub": _cub,
    "cars": _cars,
    "sop": _sop,
    "inshop": _inshop,
}
