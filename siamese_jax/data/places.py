"""Where images are, as users say it: a folder, a picture, a list of pictures, or a CSV file.

A list is one path a line: in a file that is no picture, on standard input (`-`), as a glob
(quoted: "shop/*.jpg"), or a Python sequence. Relative paths start from the file's folder, or from
the current one where fewer of them are missing there. An entry that is a folder stands for the
pictures in it, one that is not there is left out and counted, and a line that begins with # is a
comment. The order is kept, that of a glob is by name, and a list has no labels.
"""

import glob
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from siamese_jax.data.csv_file import from_csv
from siamese_jax.data.folders import LABELS, from_folder
from siamese_jax.data.pictures import in_order, is_picture, left_out, locate, scan
from siamese_jax.data.records import Records, as_text, class_name, make_records
from siamese_jax.errors import UserError

Name = str | os.PathLike[str]
PLACES = (
    "a folder, a picture, a list of pictures (a file with one path a line, - for standard input, "
    "or a quoted glob), or a CSV file"
)


def read_place(
    place: Name | Iterable[Name],
    *,
    layout: str | None = None,
    labels: str = "known",
    separator: str | None = None,
) -> Records:
    """The images at a place, without a split by class.

    Args:
      place: as above.
      layout: of a folder; see `siamese_jax.data.folders`.
      labels: "known" where they are sure, else -1; "needed" raises where none are sure; "none"; or
        "stem", each file's name without its suffix.
      separator: of a CSV file's labels.

    Raises:
      UserError: nothing is there, or it is not what the options say.
    """
    if labels not in (*LABELS, "stem"):
        raise UserError(f"labels={labels!r}: use {', '.join((*LABELS, 'stem'))}")
    records = _read(place, layout, "none" if labels == "stem" else labels, separator)
    return relabel(records, labels)


def relabel(records: Records, labels: str) -> Records:
    """The records with the labels that are wanted: "none", "stem", or "needed" and there."""
    if labels == "none":
        return replace(records, label=np.full(len(records), -1, np.int32), class_names=())
    if labels == "stem":
        stems = [class_name(as_text(Path(path).stem)) for path in records.path]
        names, label = np.unique(stems, return_inverse=True)
        return replace(
            records, label=label.astype(np.int32), class_names=tuple(str(name) for name in names)
        )
    known = records.label.any() if records.label.ndim == 2 else (records.label >= 0).any()
    if labels == "needed" and not known:
        raise UserError(
            f"{records.name}: there are no labels; make class folders, a CSV with labels, or give "
            "--labels=stem where file names tell the class"
        )
    return records


def _read(
    place: Name | Iterable[Name], layout: str | None, labels: str, separator: str | None
) -> Records:
    if not isinstance(place, str | bytes | os.PathLike):
        return _listed([os.path.expanduser(os.fsdecode(path)) for path in place], "the list")
    path = os.path.expanduser(os.fsdecode(place))
    if os.path.isdir(path) and path != "-":
        return from_folder(path, layout=layout, labels=labels)
    if layout is not None:
        raise UserError(f"layout={layout} is said of a folder, and {path} is none")
    if path == "-":
        return _listed(*_lines(sys.stdin.buffer.read(), "standard input"))
    if path.lower().endswith(".csv"):
        return from_csv(path, separator=separator, labels=labels)
    if os.path.isfile(path) and is_picture(path):
        return _listed([path], path)
    if os.path.exists(path):  # a pipe too, as a shell's <(find ...) gives one
        with open(path, "rb") as file:
            start = file.read(4096)
            if b"\0" in start:
                raise UserError(f"{path} is neither a picture that Pillow can open nor {PLACES}")
            base = os.path.dirname(path) if os.path.isfile(path) else ""
            return _listed(*_lines(start + file.read(), path), base=base)
    if glob.has_magic(path):
        return _matched(path)
    raise UserError(f"{path} does not exist; give {PLACES}")


def _lines(content: bytes, what: str) -> tuple[list[str], str, list[int]]:
    """The lines that say something, as names of files; what they are of, and their numbers."""
    lines = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
    kept = [i for i, line in enumerate(lines) if line.strip() and not line.startswith(b"#")]
    if not kept:
        raise UserError(f"{what} is empty: a list of pictures has one path a line")
    return [os.fsdecode(lines[i]) for i in kept], what, [i + 1 for i in kept]


def _matched(pattern: str) -> Records:
    """What a glob matches, less the files that are no pictures."""
    found = in_order(glob.glob(pattern, recursive=True))
    kept = [
        path for path in found if os.path.isdir(path) or (os.path.isfile(path) and is_picture(path))
    ]
    if not kept:
        raise UserError(f"{pattern} matches {len(found)} files, none of which is a picture")
    records = _listed(kept, pattern)
    first = np.unique(records.path, return_index=True)[1]  # ** matches a folder, and what is in it
    other = {*found} - {*kept}
    notes = (left_out(pattern, other), *records.notes) if other else records.notes
    return replace(records.select(np.sort(first)), notes=notes)


def _is_entry(path: str) -> bool:
    return os.path.isfile(path) or os.path.isdir(path)


def _listed(
    names: list[str], what: str, lines: list[int] | None = None, *, base: str = ""
) -> Records:
    """Pictures as they are listed, folders being opened up."""
    if not names:
        raise UserError(f"{what} holds no picture")
    entries, notes = locate(names, base, what, lines=lines, there=_is_entry, some=True)
    paths: list[str] = []
    for entry in entries:
        if os.path.isdir(entry):
            tree = scan(entry)
            paths += [os.path.join(entry, path) for path in tree.pictures]
            notes += tree.notes
        else:
            paths.append(entry)
    if not paths:
        raise UserError(f"{what} holds no picture; {'; '.join(notes)}")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return make_records(paths, [None] * len(paths), root=root, notes=tuple(notes), given=what)
