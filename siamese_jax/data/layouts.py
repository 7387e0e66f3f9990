"""The layouts that `siamese_jax.data.folders` explains, and which of them a folder has.

A layout is a function (tree, sure) -> Reading. `sure` is true where the user named it: what else it
could be is then no doubt, and pictures that are not its own have no row.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from siamese_jax.data.pictures import Tree, in_order
from siamese_jax.data.records import as_text, class_name

PAIRS = {"query_gallery": ("query", "gallery"), "anchor_positive": ("anchor", "positive")}
_ROLES = frozenset(name for pair in PAIRS.values() for name in pair)
_SPLIT = re.compile(
    r"(?:(train|training)|(val|valid|validation)|(test|testing))"
    r"(?:[ _-]?(?:set|split|data|images|imgs))?(?:[ _-]?\d{4})?"
)
# What stands beside the folders of a data set more often than it is a class.
_NO_CLASSES = frozenset(("annotations", "annotation", "labels", "masks", "mask", "segmentation"))
_WRAPPERS = frozenset(("images", "image", "imgs", "img", "pictures", "photos", "jpegimages"))


class Row(NamedTuple):
    """A picture, relative to the folder: its class, if it has one, its split, its side (0, 1)."""

    path: str
    name: str | None
    split: str = ""
    side: int | None = None


class Reading(NamedTuple):
    """What a layout makes of a folder; pictures without a row are not the layout's.

    `doubt` says why the classes could be others than these, or cannot be told.
    """

    rows: list[Row]
    notes: tuple[str, ...] = ()
    doubt: str = ""


def guess(tree: Tree) -> Reading:
    """The first layout that fits."""
    inner = _unwrapped(tree)
    if inner is not tree:
        reading = _within(guess(inner), os.path.relpath(inner.root, tree.root))
        read = [f"{inner.root} is read as if it were {tree.root} itself"] if inner.inside else []
        return reading._replace(notes=(*read, *reading.notes))
    there = {_fold(f) for f in tree.folders if os.sep not in f}
    for layout, pair in PAIRS.items():
        if there.issuperset(pair):
            return LAYOUTS[layout](tree, False)
    roles = known_names(tree)
    if not roles or _is_class(tree, roles):
        reading = _classes(tree, False)
        note = [f"{tree.root}: the folder {top!r} is read as a class" for top in roles]
        return reading._replace(notes=(*reading.notes, *note))
    if any(map(_split, roles)):
        return _splits(tree, False)
    doubt = _ask(
        tree,
        f"there is a folder {roles[0]!r} without the other that belongs to it",
        {"classes": f"the {len(tree.inside)} folders are the classes"},
    )
    return _classes(tree, True)._replace(doubt=doubt)


def known_names(tree: Tree) -> list[str]:
    """The folders inside that are called as a split or as a side of a pair."""
    return [top for top in _tops(tree) if _split(top) or _fold(top) in _ROLES]


def _is_class(tree: Tree, roles: list[str]) -> bool:
    """Trains and anchors are things too: a folder of pictures among two or more others of them."""
    others = len(tree.inside) - len(roles)
    if any(_fold(top) in _NO_CLASSES for top in tree.inside):
        return False
    direct = all(os.sep not in path for inside in tree.inside.values() for path in inside)
    return len(roles) == 1 and _fold(roles[0]) in ("train", "anchor") and others >= 2 and direct


def _classes(tree: Tree, sure: bool) -> Reading:
    rows = [
        Row(os.path.join(top, path), as_text(top))
        for top in _tops(tree)
        for path in tree.inside[top]
    ]
    inner = {os.path.dirname(row.path) for row in rows}
    rows += [Row(path, None) for path in tree.loose]
    nested = [top for top in _tops(tree) if _deeper(tree.inside[top])]
    doubt = ""
    if not tree.pictures:
        doubt = empty(tree)
    elif not tree.inside:
        doubt = (
            f"{tree.root} has images but no class folders, so there are no labels: make one folder "
            "a class, the images inside"
        )
    elif nested and not sure:
        doubt = _ask(
            tree,
            f"images lie two folders deep, as {tree.inside[nested[0]][0]!r} in {nested[0]!r}",
            {
                "classes": f"the {len(tree.inside)} outer folders are the classes",
                "leaves": f"the {len(inner)} inner ones are",
            },
        )
    elif len(tree.loose) >= len(tree.inside) and not sure:
        doubt = _ask(
            tree,
            f"{len(tree.loose)} images lie beside {_count(tree.inside)}",
            {"classes": "folders are the classes, and the images beside them have none"},
        )
    bare = [f for f in tree.folders if os.sep not in f and f not in tree.inside]
    notes = [
        f"{tree.root}: {len(bare)} class folders hold no image, the first is {name!r}"
        for name in bare[:1]
    ]
    return Reading(rows, (*notes, *_composed(tree, _tops(tree))), doubt)


def _leaves(tree: Tree, sure: bool) -> Reading:
    homes = {path: os.path.dirname(path) for path in tree.pictures}
    rows = [Row(p, as_text(home).replace(os.sep, "/") or None) for p, home in homes.items()]
    doubt = "" if tree.inside else _classes(tree, True).doubt
    return Reading(rows, _composed(tree, in_order({*homes.values()})), doubt)


def _images(tree: Tree, sure: bool) -> Reading:
    return Reading([Row(path, None) for path in tree.pictures])


def _splits(tree: Tree, sure: bool) -> Reading:
    parts = []
    for top in _tops(tree):
        if split := _split(top):
            reading = _within(_guess_split(tree.under(top)), top)
            rows = [row._replace(split=split) for row in reading.rows]
            parts.append(reading._replace(rows=rows))
    doubts = [part.doubt for part in parts if part.doubt]
    if not parts:
        doubts = [f"{tree.root} has no folder of images called train, val or test"]
    elif not sure and (beside := _beside(tree, [t for t in tree.inside if not _split(t)])):
        doubts.insert(0, _ask(tree, beside, {"splits": "only train, val and test count"}))
    rows = [row for part in parts for row in part.rows]
    rows += [] if sure else _others(tree, rows)
    notes = tuple(note for part in parts for note in part.notes)
    return Reading(rows, notes, (doubts or [""])[0])


def _others(tree: Tree, rows: list[Row], side: int | None = None) -> list[Row]:
    """The pictures that have no row yet, without a class."""
    there = {row.path for row in rows}
    return [Row(path, None, "", side) for path in tree.pictures if path not in there]


def _guess_split(tree: Tree) -> Reading:
    """The pair, or the classes, that a split consists of."""
    reading = guess(tree)
    if any(row.split for row in reading.rows):
        return reading._replace(doubt=f"{tree.root}: a split holds folders named as splits")
    return reading


def _pair(layout: str, tree: Tree, sure: bool) -> Reading:
    tops = [f for f in in_order({*tree.folders, *tree.inside}) if os.sep not in f]
    sides = [[top for top in tops if _fold(top) == name] for name in PAIRS[layout]]
    parts = [
        [_within(_side(layout, tree.under(top)), top) for top in side if top in tree.inside]
        for side in sides
    ]
    others = [top for top in tree.inside if not any(top in side for side in sides)]
    beside = [top for top in others if _split(top) not in ("train", "validation")]
    splits = [
        _within(_guess_split(tree.under(top)), top)._replace(notes=())
        for top in others
        if top not in beside and not sure
    ]
    rows = [
        row._replace(side=number, split="test" if splits else "")
        for number, side in enumerate(parts)
        for part in side
        for row in part.rows
    ]
    rows += [
        row._replace(split=_split(row.path.split(os.sep)[0]))
        for part in splits
        for row in part.rows
    ]
    every = [part for side in parts for part in side] + splits
    doubts = [part.doubt for part in every if part.doubt]
    notes = [note for part in every for note in part.notes]
    for name, side in zip(PAIRS[layout], parts, strict=True):
        if not side:
            doubts.append(f"{os.path.join(tree.root, name)} holds no image that Pillow can open")
    if not doubts and not sure and (beside_seen := _beside(tree, beside)):
        doubts.append(
            _ask(tree, beside_seen, {layout: f"only {' and '.join(PAIRS[layout])} count"})
        )
    if not doubts:
        names = [
            {class_name(row.name) for row in rows if row.side == number and row.name is not None}
            for number in (0, 1)
        ]
        doubt, note = _MATCHES[layout](tree, names)
        doubts += [doubt] * bool(doubt)
        notes += [note] * bool(note)
    rows += [] if sure else _others(tree, rows, side=1)  # searched: a gallery is never asked
    return Reading(rows, tuple(notes), (doubts or [""])[0])


def _side(layout: str, tree: Tree) -> Reading:
    """One folder of a pair: classes are file names, or class folders if there are any."""
    if layout == "query_gallery" and _unwrapped(tree).inside:
        return _guess_split(tree)
    stems = [as_text(os.path.splitext(path)[0]) for path in tree.pictures]
    if layout == "query_gallery":
        stems = [Path(stem).name for stem in stems]
        return Reading([Row(p, s) for p, s in zip(tree.pictures, stems, strict=True)])
    name, count = Counter(map(class_name, stems)).most_common(1)[0]
    doubt = f"{tree.root}: two files are named {name!r}" if count > 1 else ""
    return Reading([Row(p, s) for p, s in zip(tree.pictures, stems, strict=True)], (), doubt)


def _shared_classes(tree: Tree, names: Sequence[set[str]]) -> tuple[str, str]:
    query, gallery = names
    shared = query & gallery
    if not shared:
        return (
            f"{tree.root}: query/ and gallery/ share no class (query has {min(query)!r}, gallery "
            f"has {min(gallery)!r}); give equal class folders or equal file names"
        ), ""
    if query == gallery:
        return "", ""
    return "", (
        f"{tree.root}: query/ has {len(query)} classes and gallery/ {len(gallery)}, of which "
        f"{len(shared)} are in both"
    )


def _equal_names(tree: Tree, names: Sequence[set[str]]) -> tuple[str, str]:
    alone = sorted(names[0] ^ names[1])
    if not alone:
        return "", ""
    return (
        f"{tree.root}: {len(alone)} file names are not in both anchor/ and positive/, the first is "
        f"{alone[0]!r}; every anchor needs the positive of its name"
    ), ""


_MATCHES = {"query_gallery": _shared_classes, "anchor_positive": _equal_names}

LAYOUTS: dict[str, Callable[[Tree, bool], Reading]] = {
    "query_gallery": lambda tree, sure: _pair("query_gallery", tree, sure),
    "anchor_positive": lambda tree, sure: _pair("anchor_positive", tree, sure),
    "splits": _splits,
    "classes": _classes,
    "leaves": _leaves,
    "images": _images,
}


# Names and messages --------------------------------------------------------------------------


def _fold(name: str) -> str:
    return class_name(as_text(name)).casefold()


def _split(name: str) -> str:
    """The split that a folder's name stands for, or nothing."""
    found = _SPLIT.fullmatch(_fold(name))
    return ("train", "validation", "test")[found.lastindex - 1] if found and found.lastindex else ""


def _tops(tree: Tree) -> list[str]:
    return in_order(tree.inside)


def _deeper(paths: Iterable[str]) -> bool:
    """Whether two folders inside a folder, at any depth, hold pictures."""
    return len({os.path.dirname(path) for path in paths} - {""}) > 1


def _unwrapped(tree: Tree) -> Tree:
    """The folder inside that holds everything, where its name says that it is no class."""
    if tree.loose or len(tree.inside) != 1 or _fold(next(iter(tree.inside))) not in _WRAPPERS:
        return tree
    return _unwrapped(tree.under(next(iter(tree.inside))))


def _within(reading: Reading, folder: str) -> Reading:
    """The reading of a folder, with paths from the folder above it."""
    return reading._replace(
        rows=[row._replace(path=os.path.join(folder, row.path)) for row in reading.rows]
    )


def _beside(tree: Tree, folders: list[str]) -> str:
    """What stands beside a layout's own folders that is more than a few loose pictures."""
    if folders:
        known = ", ".join(f"{top}/" for top in _tops(tree) if top not in folders)
        return f"beside {known} stand {_count({top: tree.inside[top] for top in folders})}"
    if len(tree.loose) >= len(tree.inside):
        return f"{len(tree.loose)} images lie beside {_count(tree.inside)}"
    return ""


def _count(inside: dict[str, list[str]]) -> str:
    names = in_order(inside)
    shown = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(inside)} folders with {sum(map(len, inside.values()))} images ({shown})"


def _ask(tree: Tree, seen: str, ways: dict[str, str]) -> str:
    listed = [f"layout={name} ({meaning})" for name, meaning in ways.items()]
    return (
        f"{tree.root}: {seen}, so its labels could be wrong; say what is meant: "
        f"{', '.join(listed)}, layout=images (no labels), or give one of the folders inside. It is "
        "--layout for the tools, --config.data.layout for main.py"
    )


def empty(tree: Tree) -> str:
    """Why there is no picture: a line."""
    if not tree.folders and not tree.notes:
        return f"{tree.root} has neither images nor folders"
    return f"{tree.root} holds no image that Pillow can open; {'; '.join(tree.notes)}".rstrip("; ")


def _composed(tree: Tree, folders: Sequence[str]) -> tuple[str, ...]:
    """Says where two folders' names are one in Unicode's composed form."""
    count = Counter(class_name(as_text(folder)) for folder in folders)
    return tuple(
        f"{tree.root}: {n} folders are named {name!r}, in two ways of writing it: one class"
        for name, n in count.items()
        if n > 1
    )
