"""Folders of images as records: class folders, query + gallery, anchor + positive."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from siamese_jax.data.records import Records, make_records
from siamese_jax.errors import UserError

SUFFIXES = frozenset(
    f".{name}"
    for name in ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
)
_SPLIT_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """All image files under a folder by suffix, sorted; hidden files and folders are left out."""
    found = []
    for base, folders, files in os.walk(_existing(folder)):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [os.path.join(base, f) for f in files if _is_image(f)]
    return sorted(found)


def is_flat(root: str | os.PathLike[str]) -> bool:
    """True for a folder whose images lie in it directly, without subfolders of images."""
    return not any(list_images(entry.path) for entry in _subfolders(root))


def from_images(root: str | os.PathLike[str]) -> Records:
    """One image file, or every image under a folder, without labels (-1)."""
    files = [str(root)] if Path(root).is_file() else _some(list_images(root), root)
    records = make_records(files, ["?"] * len(files), root=str(root))
    records.label[:] = -1
    return records


def from_folder(root: str | os.PathLike[str]) -> Records:
    """Reads a folder in whichever known layout it has.

    `query/` + `gallery/`; `anchor/` + `positive/`; `train/` + `test/` (and perhaps `val/`) of class
    folders; else a folder of class folders.
    """
    names = {entry.name for entry in _subfolders(root)}
    if {"query", "gallery"} <= names:
        return from_query_gallery(root)
    if {"anchor", "positive"} <= names:
        return from_anchor_positive(root)
    if names and names <= _SPLIT_FOLDERS.keys() and {"train", "test"} & names:
        return _from_split_folders(root)
    found = _class_folders(root)
    return make_records(found.paths, found.classes, root=str(root), notes=found.notes)


def from_query_gallery(root: str | os.PathLike[str]) -> Records:
    """`query/` and `gallery/`: classes are their subfolders, or the file names without suffix."""
    query, gallery = (_labelled(Path(root) / side) for side in ("query", "gallery"))
    if not set(query.classes) & set(gallery.classes):
        raise UserError(
            f"{root}: query/ and gallery/ share no class (query has '{query.classes[0]}', gallery "
            f"has '{gallery.classes[0]}'); give equal class folders or equal file names"
        )
    asked = [True] * len(query.paths) + [False] * len(gallery.paths)
    return make_records(
        query.paths + gallery.paths,
        query.classes + gallery.classes,
        root=str(root),
        is_query=asked,
        is_gallery=[not a for a in asked],
        notes=query.notes + gallery.notes,
    )


def from_anchor_positive(root: str | os.PathLike[str]) -> Records:
    """`anchor/` and `positive/` with equal file names: each name is a class of two images."""
    sides = {}
    for side in ("anchor", "positive"):
        folder = Path(root) / side
        files = _some(list_images(folder), folder)
        sides[side] = {os.path.splitext(os.path.relpath(f, folder))[0]: f for f in files}
        if len(sides[side]) < len(files):
            stems = Counter(os.path.splitext(os.path.relpath(f, folder))[0] for f in files)
            raise UserError(f"{folder}: two files are named '{stems.most_common(1)[0][0]}'")
    alone = sorted(sides["anchor"].keys() ^ sides["positive"].keys())
    if alone:
        raise UserError(
            f"{root}: {len(alone)} file names are not in both anchor/ and positive/, the first is "
            f"'{alone[0]}'; every anchor needs the positive of its name"
        )
    names = sorted(sides["anchor"])
    asked = [True] * len(names) + [False] * len(names)
    return make_records(
        [sides["anchor"][n] for n in names] + [sides["positive"][n] for n in names],
        names + names,
        root=str(root),
        is_query=asked,
        is_gallery=[not a for a in asked],
    )


class _Labelled(NamedTuple):
    paths: list[str]
    classes: list[str]
    notes: tuple[str, ...]


def _from_split_folders(root: str | os.PathLike[str]) -> Records:
    parts = [(_SPLIT_FOLDERS[e.name], _class_folders(e.path)) for e in _subfolders(root)]
    return make_records(
        [path for _, part in parts for path in part.paths],
        [name for _, part in parts for name in part.classes],
        root=str(root),
        split=[split for split, part in parts for _ in part.paths],
        notes=tuple(note for _, part in parts for note in part.notes),
    )


def _labelled(folder: Path) -> _Labelled:
    if not is_flat(folder):
        return _class_folders(folder)
    files = _some(list_images(folder), folder)
    return _Labelled(files, [Path(f).stem for f in files], ())


def _class_folders(root: str | os.PathLike[str]) -> _Labelled:
    """The images of a folder of class folders; what is left out is noted."""
    folders = _subfolders(root)
    if not folders:
        what = "images but no class folders" if list_images(root) else "neither images nor folders"
        raise UserError(f"{root} has {what}: make one folder a class, the images inside")
    files = {entry.name: list_images(entry.path) for entry in folders}
    paths = _some([path for inside in files.values() for path in inside], root)
    notes = []
    if empty := [name for name, inside in files.items() if not inside]:
        notes.append(f"{root}: {len(empty)} class folders hold no image, the first is '{empty[0]}'")
    if loose := sorted(f for f in os.listdir(root) if _is_image(f)):
        notes.append(
            f"{root}: {len(loose)} images lie beside the class folders and are left out, the first "
            f"is '{loose[0]}'"
        )
    classes = [name for name, inside in files.items() for _ in inside]
    return _Labelled(paths, classes, tuple(notes))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _subfolders(root: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(_existing(root)) as entries:
        found = [e for e in entries if e.is_dir() and not e.name.startswith(".")]
    return sorted(found, key=lambda e: e.name)


def _existing(folder: str | os.PathLike[str]) -> str:
    if not os.path.isdir(folder):
        what = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise UserError(f"the image folder {folder} {what}; check the path")
    return os.fspath(folder)


def _some(files: list[str], folder: str | os.PathLike[str]) -> list[str]:
    if not files:
        raise UserError(f"{folder} holds no image (looked for {' '.join(sorted(SUFFIXES))})")
    return files
