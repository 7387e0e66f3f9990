"""What a folder means: which of its pictures belong to which class, split and side.

Pictures are found as `siamese_jax.data.pictures` says. Layouts, by the names of the folders, in
any case:

    query_gallery    query/ and gallery/: what is asked, and what is searched. Classes are their
                     class folders, or the file names without suffix. train/ and val/ may stand
                     beside them, and what they hold is then the split "test".
    anchor_positive  anchor/ and positive/ with equal file names: a name is a class of two pictures.
    splits           train/, val/ and test/ (also training, valid, validation, testing, train_set,
                     test2017), each of class folders or of one of the pairs above.
    classes          each folder directly inside is a class, with everything beneath it.
    leaves           each folder that holds pictures is a class, wherever it is.
    images           no labels.

Without a layout given, the first of the first four that fits is taken. Folders that are hidden or
hold no picture do not count, and a folder that holds nothing but `images/` (`_WRAPPERS`) is read as
that. The names above are never classes, but for one folder `train/` or `anchor/` of pictures among
two or more others.

Where that could be wrong, labels are not guessed: where a class folder's pictures lie in several
folders inside, at any depth (a class may be either), other folders stand beside a layout's own, as
many pictures lie loose as there are folders, a split has no class folders, or two sides share no
class. Where labels are needed this is an error that says what was seen and what can be said
instead; where they are not, all pictures are there, without labels, and that is noted. Loose
pictures that are fewer than the folders have no class: left out where labels are needed, else
unlabelled; both are noted.
"""

import os
from collections.abc import Iterable

from siamese_jax.data.layouts import LAYOUTS, PAIRS, Row, empty, guess, known_names
from siamese_jax.data.pictures import Tree, in_order, scan
from siamese_jax.data.records import Records, make_records
from siamese_jax.errors import UserError

LABELS = ("needed", "known", "none")


def from_folder(
    root: str | os.PathLike[str], *, layout: str | None = None, labels: str = "needed"
) -> Records:
    """Reads a folder as this file's beginning says.

    Args:
      root: the folder.
      layout: one of `LAYOUTS`; None takes the one that fits.
      labels: "needed" raises where they could be wrong; "known" keeps every picture, unlabelled
        (-1) where they could; "none" likewise, and leaves all unlabelled.

    Raises:
      UserError: no such folder, no picture in it, a layout that it does not have, or labels that
        are needed and could be wrong.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r}; known: {', '.join(LAYOUTS)}")
    tree = scan(root)
    reading = LAYOUTS[layout](tree, True) if layout else guess(tree)
    notes = [*tree.notes, *reading.notes]
    if reading.doubt and (labels == "needed" or layout in (*PAIRS, "splits")):
        raise UserError(reading.doubt)
    if not tree.pictures:
        raise UserError(empty(tree))
    if reading.doubt and labels == "known" and tree.inside:
        notes.append(f"no labels are read. {reading.doubt}")
    rows = reading.rows
    # The notes on pictures without a class, and without a place in a layout that was asked for.
    beside = [row.path for row in rows if row.name is None] if layout != "images" else []
    if labels == "needed" and beside:
        rows = [row for row in rows if row.name is not None]
        notes.append(_apart(tree, beside, "are left out"))
    elif labels == "known" and beside and not reading.doubt:
        notes.append(_apart(tree, beside, "have no label"))
    if rest := set(tree.pictures) - {row.path for row in reading.rows}:
        notes.append(_apart(tree, rest, "are left out"))
    if reading.doubt or labels == "none":
        rows = [row._replace(name=None) for row in rows]
    if not any(row.side is not None for row in rows):
        place = {path: i for i, path in enumerate(tree.pictures)}
        rows = sorted(rows, key=lambda row: place[row.path])
    rows, repeated = _once(rows, tree)
    if repeated:
        notes.append(f"{root}: {repeated} images are reached by several links and count once")
    sides = [row.side for row in rows]
    return make_records(
        [os.path.join(root, row.path) for row in rows],
        [row.name for row in rows],
        root=str(root),
        split=[row.split for row in rows],
        is_query=[side != 1 for side in sides],
        is_gallery=[side != 0 for side in sides],
        side=None if set(sides) <= {None} else [side or 0 for side in sides],
        notes=tuple(notes),
    )


def _once(rows: list[Row], tree: Tree) -> tuple[list[Row], int]:
    """Unlabelled pictures without those that a link shows once more, and how many these are."""
    first: dict[str, str] = {}
    home = os.path.realpath(tree.root)
    for row in rows:
        real = tree.real[row.path]
        if real not in first or os.path.join(home, row.path) == real:
            first[real] = row.path
    kept = [row for row in rows if row.name is not None or first[tree.real[row.path]] == row.path]
    return kept, len(rows) - len(kept)


def _apart(tree: Tree, paths: Iterable[str], fate: str) -> str:
    """The line on pictures beside the folders that a layout reads."""
    names = in_order(paths)
    beside = "known folders" if known_names(tree) else "class folders"
    return (
        f"{tree.root}: {len(names)} images lie beside the {beside} and {fate}, the first is "
        f"{names[0]!r}"
    )
