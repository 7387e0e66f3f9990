"""Records: the columns that describe a data set, one row an image; splitting and fingerprinting."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from siamese_jax.data.labels import missing
from siamese_jax.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Records:
    """A data set as columns of equal length n.

    Attributes:
      path: str [n], the image files.
      label: int32 [n], an index into `class_names`, or bool [n, c] where an image may have several
        labels. -1 means unknown.
      id: int32 [n], unique in the data set and kept by `select`.
      split: str [n], "train", "validation", "test", or "" where no split has been made.
      is_query: bool [n], asked in an evaluation.
      is_gallery: bool [n], searched in an evaluation.
      class_names: the classes in the order of their labels, in Unicode's composed form (NFC).
      root: the folder that paths are relative to in a fingerprint.
      box: int32 [n, 4] as left, upper, right, lower, the part of each picture that counts; rows of
        zeros and None mean the whole picture.
      super_label: int32 [n], the super-class of each image, -1 for unknown; or None for all.
      side: int32 [n], who took or drew each image, where the source says so: positives are then
        sought on another side. 0 for query/ or anchor/, 1 for gallery/ or positive/; a CSV's column
        `side`. None where there is one side only; who happens to be asked says nothing about it.
      notes: what the user should hear about this data set, a line each.
      given: the file or folder that it was read from, where that is not the root.
    """

    path: np.ndarray
    label: np.ndarray
    id: np.ndarray
    split: np.ndarray
    is_query: np.ndarray
    is_gallery: np.ndarray
    class_names: tuple[str, ...]
    root: str = ""
    box: np.ndarray | None = None
    super_label: np.ndarray | None = None
    side: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    given: str = ""

    @property
    def name(self) -> str:
        """What messages call it: the file or folder that was given."""
        return self.given or self.root

    def __len__(self) -> int:
        return len(self.path)

    def select(self, rows: np.ndarray) -> "Records":
        """The records of a bool mask [n] or of indices [m], with their ids and class names."""
        columns: dict[str, Any] = {
            f.name: getattr(self, f.name)[rows]
            for f in fields(self)
            if isinstance(getattr(self, f.name), np.ndarray)
        }
        return replace(self, **columns)

    def where(self, split: str) -> "Records":
        """The records of one split; UserError if there are none."""
        rows = self.split == split
        if not rows.any():
            there = ", ".join(sorted({str(s) for s in self.split} - {""})) or "none"
            raise UserError(f"{self.name}: no images in the split '{split}' (splits: {there})")
        return self.select(rows)


def make_records(
    paths: Sequence[str],
    classes: Sequence[str | None],
    *,
    root: str,
    split: Sequence[str] | None = None,
    is_query: Sequence[bool] | None = None,
    is_gallery: Sequence[bool] | None = None,
    box: np.ndarray | None = None,
    super_classes: Sequence[str] | None = None,
    side: Sequence[int] | np.ndarray | None = None,
    notes: tuple[str, ...] = (),
    given: str = "",
) -> Records:
    """Records of images with one class name each, or None; labels follow the sorted names.

    Names that are all integers are sorted as numbers. Columns left out mean: no split yet, asked
    and searched, one side.
    """
    n = len(paths)
    composed = {c: class_name(c) for c in dict.fromkeys(classes) if c is not None}
    names = sorted(set(composed.values()), key=_natural(composed.values()))
    number = {name: i for i, name in enumerate(names)}
    label_of = {c: number[name] for c, name in composed.items()}
    return Records(
        path=np.array(paths, dtype=np.str_),
        label=np.array([-1 if c is None else label_of[c] for c in classes], dtype=np.int32),
        id=np.arange(n, dtype=np.int32),
        split=np.array([""] * n if split is None else split, dtype="U10"),
        is_query=np.ones(n, bool) if is_query is None else np.array(is_query, dtype=bool),
        is_gallery=np.ones(n, bool) if is_gallery is None else np.array(is_gallery, dtype=bool),
        class_names=tuple(names),
        root=str(root),
        box=box,
        notes=notes,
        given=given,
        super_label=None if super_classes is None else _numbers(super_classes),
        side=None if side is None else np.array(side, dtype=np.int32),
    )


def class_name(name: str) -> str:
    """A name as classes are compared: Unicode in composed form (NFC).

    >>> class_name("cafe\\u0301") == class_name("caf\\u00e9")
    True
    """
    return unicodedata.normalize("NFC", name)


def as_text(path: str) -> str:
    """A path's name as UTF-8 text, whatever the locale; bytes that are none are escaped."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def _numbers(names: Sequence[str]) -> np.ndarray:
    """int32 [n]: each name's place among the sorted ones, -1 where it is empty."""
    return (np.unique(["", *names], return_inverse=True)[1][1:] - 1).astype(np.int32)


def _natural(names: Iterable[str]) -> Any:
    """A sort key: all-digit names by their numbers, and "1", "01", "001" still in one order."""
    if all(name.isascii() and name.isdigit() for name in names):
        return lambda name: (int(name), name)
    return str


def split_by_class(records: Records, *, seed: int, fractions: Sequence[float]) -> Records:
    """Divides the classes, not the images, among train, validation and test.

    The field's convention: no class is in two splits, so what is measured is retrieval of things
    never seen. The test classes depend on the seed and the test fraction alone; a validation
    fraction is taken from what would be training classes.

    Args:
      records: with int labels [n]; their present splits are ignored.
      seed: of the shuffle of the classes.
      fractions: train, validation, test, of the classes; they sum to 1.

    Returns:
      The same records with `split` filled.

    Raises:
      UserError: fractions that are no partition, or a wanted split left without a class.
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.shape != (3,) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise UserError(
            f"split fractions {tuple(fractions)}: give three for train, validation and test, "
            "each 0 or more, with the sum 1"
        )
    if records.label.ndim != 1:
        raise UserError(
            f"{records.name}: images with several labels cannot be split by class, because classes "
            "share images: give the CSV a column 'split' (train, validation, test)"
        )
    present = np.unique(records.label)
    order = np.random.default_rng(seed).permutation(present)
    n_test, n_validation = (round(float(s) * len(order)) for s in (shares[2], shares[1]))
    parts = {
        "test": order[:n_test],
        "validation": order[n_test : n_test + n_validation],
        "train": order[n_test + n_validation :],
    }
    for name, share in zip(SPLITS, shares, strict=True):
        if share > 0 and len(parts[name]) == 0:
            raise UserError(
                f"{records.name}: {len(order)} classes are too few for {share:.0%} {name}; "
                "add classes or change the fractions"
            )
    split = np.full(len(records), "", dtype="U10")
    for name, part in parts.items():
        split[np.isin(records.label, part)] = name
    return replace(records, split=split)


def content_keys(records: Records) -> list[bytes]:
    """A 16-byte key of each image's content: BLAKE2b of the file's bytes and of its box.

    Every byte is read, so an edited image is noticed even when its size and time stamp are not. A
    file that cannot be read has a key of its own, that of its path below the root: it is like no
    content and like no other such file.
    """
    boxes = [None] * len(records) if records.box is None else list(records.box)

    def key_of(path: str, box: np.ndarray | None) -> bytes:
        try:
            with open(path, "rb") as file:
                return _with_box(hashlib.file_digest(file, _blake2b), box)
        except OSError:
            name = as_text(os.path.relpath(path, records.root or None))
            return hashlib.blake2b(_bytes(name), digest_size=16, person=b"unreadable").digest()

    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(key_of, records.path, boxes, chunksize=64))


def told_copies(records: Records, keys: Sequence[bytes]) -> list[str]:
    """Lines on pictures that are in two splits, in two classes, or twice in one: what is fitted to
    the one has seen the other, or finds it at once, and figures are too good.

    Args:
      records: n of them.
      keys: their `content_keys`.
    """
    first: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        if records.split[i] in ("train", "") and key not in first:
            first[key] = i
    said = []
    for split in ("validation", "test"):
        seen = [i for i in np.flatnonzero(records.split == split).tolist() if keys[i] in first]
        if seen:
            one, other = records.path[first[keys[seen[0]]]], records.path[seen[0]]
            said.append(
                f"{records.name}: {len(seen)} pictures of {split} are in train as well, and make "
                f"its figures too good (the first is {other}, which is {one})"
            )
    if records.label.ndim == 1:
        classes: dict[bytes, dict[int, int]] = {}
        for i in np.flatnonzero(records.label >= 0).tolist():
            classes.setdefault(keys[i], {}).setdefault(int(records.label[i]), i)
        several = [list(found.values()) for found in classes.values() if len(found) > 1]
        if several:
            one, other = (records.path[i] for i in several[0][:2])
            said.append(
                f"{records.name}: {len(several)} pictures are in several classes, and folds over "
                f"classes take each for unseen (the first is {one}, which is {other})"
            )
    if twice := _twice(records, keys):
        one, other = (records.path[i] for i in twice[0])
        said.append(
            f"{records.name}: {len(twice)} pictures are copies of another of their class and "
            "split, which each finds at once: figures are too good (the first is "
            f"{other}, which is {one})"
        )
    return said


def _twice(records: Records, keys: Sequence[bytes]) -> list[tuple[int, int]]:
    """The first place of a picture with its labels in a split, and each other place of it."""
    places: dict[tuple[bytes, str, bytes], list[int]] = {}
    known = np.flatnonzero(~missing(records.label))
    for i in known.tolist():
        place = (keys[i], str(records.split[i]), records.label[i].tobytes())
        places.setdefault(place, []).append(i)
    return [(first, other) for first, *others in places.values() for other in others]


def content_key(data: bytes, box: np.ndarray | None = None) -> bytes:
    """The key of a file's bytes, as `content_keys` gives it, 16 bytes."""
    return _with_box(_blake2b(data), box)


def _blake2b(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)


def _with_box(key: Any, box: np.ndarray | None) -> bytes:
    if box is not None and box.any():
        key.update(np.asarray(box, "<i4").tobytes())
    return key.digest()


def fingerprint(records: Records, keys: Sequence[bytes] | None = None) -> str:
    """32 hexadecimal digits that change with any image's bytes, name, class, split or role.

    Args:
      records: of one data set; the order of the rows and the place of the root do not matter.
      keys: the result of `content_keys(records)` where it is known already.
    """
    keys = content_keys(records) if keys is None else keys
    rows = []
    for i, key in enumerate(keys):
        names = _classes(records, i)
        name = as_text(os.path.relpath(records.path[i], records.root or None)).replace(os.sep, "/")
        roles = f"{records.is_query[i]:d}{records.is_gallery[i]:d}"
        rows.append("\0".join((name, names, str(records.split[i]), roles, key.hex())))
    return hashlib.blake2b(_bytes("\n".join(sorted(rows))), digest_size=16).hexdigest()


def marks(records: Records, keys: Sequence[bytes]) -> np.ndarray:
    """uint64 [n]: a number for each image's bytes, box and classes, wherever the image lies.

    Two evaluations with equal marks asked, or searched, the same.

    Args:
      records: n of them, in any order.
      keys: the result of `content_keys(records)`.
    """
    texts = (f"{key.hex()}\0{_classes(records, i)}" for i, key in enumerate(keys))
    digests = [hashlib.blake2b(_bytes(text), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), "<u8")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8


def _classes(records: Records, row: int) -> str:
    """The names of an image's classes, with commas between them."""
    label = records.label[row]
    held = np.flatnonzero(label) if records.label.ndim == 2 else np.atleast_1d(label)
    return ",".join(records.class_names[j] for j in held if j >= 0)
