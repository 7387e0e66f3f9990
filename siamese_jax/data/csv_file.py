"""A CSV file as records, with the columns that open-metric-learning uses.

`path` must be there, and `label` where labels are needed. `split` (train, validation, test),
`is_query` and `is_gallery` may be left out, as may the box `x_1,y_1,x_2,y_2` (pixels; empty for the
whole picture), `category`, the super-class, and `side`, who took or drew the picture (positives are
then sought on another side). Other columns are passed over. With a separator, a label may hold
several: "cat;black". Empty, nan and none are missing.
"""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from siamese_jax.data.pictures import locate
from siamese_jax.data.records import Records, class_name, make_records
from siamese_jax.errors import UserError

_BOX = ("x_1", "y_1", "x_2", "y_2")
_SPLIT = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "": "",
}
_MISSING = ("", "nan", "none")
SEPARATOR = ";"  # what most files have between the labels of an image
_FLAG = {
    **dict.fromkeys(("true", "1", "1.0", "yes"), True),
    **dict.fromkeys(("false", "0", "0.0", "no", *_MISSING), False),
}


def from_csv(
    path: str | os.PathLike[str],
    *,
    images: str | None = None,
    separator: str | None = None,
    labels: str = "all",
) -> Records:
    """Reads a CSV file of images.

    Args:
      path: of the file.
      images: the folder that relative paths start from; None for the folder of the file, or the
        current one where all are there and not all in the file's.
      separator: what stands between the labels of an image, such as ";": labels are then bool
        [n, c], and images match that share one. None for one label an image.
      labels: "all" raises for a row without a label; "needed" for a file without the column, and
        "known" for neither: such rows are unlabelled (-1), and noted. "none" reads none.

    Returns:
      Records; without `is_query` (`is_gallery`) every image is asked (searched), and without
      `split` there is none yet. With `split`, a training image's empty flags are no.

    Raises:
      UserError: no such file, a missing column, an unreadable value (with its line), or images
        that are not there.
    """
    columns, lines = _read(path)
    for name in ("label", "path") if labels in ("all", "needed") else ("path",):
        if name not in columns:
            raise UserError(
                f"{path} has no column '{name}' (it has: {', '.join(columns) or 'none'})"
            )
    if not lines:
        raise UserError(f"{path} has no rows under its header")
    if empty := [i for i, name in enumerate(columns["path"]) if not name]:
        raise UserError(f"{path}, line {lines[empty[0]]}: the path is empty")
    base = str(Path(path).parent if images is None else images)
    # Names of files are bytes, whatever the locale takes text for.
    names = [os.fsdecode(p.encode("utf-8", "surrogateescape")) for p in columns["path"]]
    files, notes = locate(names, base, str(path), lines=lines, fixed=images is not None)
    if separator == "":
        raise UserError("the separator of labels must be at least one character")
    cells = _labels(path, columns.get("label"), lines, labels)
    joined = sum(SEPARATOR in cell for cell in cells if cell) if separator is None else 0
    if joined:
        notes.append(
            f"{path}: {joined} labels hold '{SEPARATOR}', and each is taken as one class: where "
            f"they are several, give --label-separator='{SEPARATOR}' (in a config, data.separator)"
        )
    absent = cells.count(None)
    if absent and labels != "none" and "label" in columns:
        notes.append(f"{path}: {absent} of {len(cells)} images have no label")

    def parse(name: str, table: dict) -> list | None:
        if name not in columns:
            return None
        for value, line in zip(columns[name], lines, strict=True):
            if value.lower() not in table:
                known = ", ".join(k for k in table if k)
                raise UserError(f"{path}, line {line}: {name} '{value}' is none of {known}")
        return [table[v.lower()] for v in columns[name]]

    records = make_records(
        files,
        cells,
        root=base,
        split=parse("split", _SPLIT),
        is_query=parse("is_query", _FLAG),
        is_gallery=parse("is_gallery", _FLAG),
        box=_boxes(path, columns, lines),
        super_classes=columns.get("category"),
        side=_sides(path, columns.get("side"), lines),
        notes=tuple(notes),
        given=str(path),
    )
    if separator is None or labels == "none":
        return records
    return _with_several(records, cells, separator)


def _labels(
    path: str | os.PathLike[str], cells: list[str] | None, lines: list[int], labels: str
) -> list[str | None]:
    """The labels, None where one is missing; UserError where all are needed."""
    if cells is None or labels == "none":
        return [None] * len(lines)
    found = [None if cell.lower() in _MISSING else cell for cell in cells]
    if labels == "all" and None in found:
        raise UserError(
            f"{path}, line {lines[found.index(None)]}: the label is empty ({found.count(None)} of "
            f"{len(found)} are): give each row one, or take it out"
        )
    return found


def _sides(
    path: str | os.PathLike[str], cells: list[str] | None, lines: list[int]
) -> np.ndarray | None:
    """int32 [n], numbers of the sorted names."""
    if cells is None:
        return None
    if "" in cells:
        raise UserError(f"{path}, line {lines[cells.index('')]}: the side is empty")
    return np.unique(cells, return_inverse=True)[1].astype(np.int32)


def _with_several(records: Records, cells: list[str | None], separator: str) -> Records:
    """The records with multi-hot labels; names around separators are stripped, empty ones none."""
    held = [
        {class_name(part.strip()) for part in (cell or "").split(separator)} - {""}
        for cell in cells
    ]
    names = sorted(set().union(*held))
    hot = np.array([[name in mine for name in names] for mine in held], bool)
    return replace(records, label=hot.reshape(len(cells), len(names)), class_names=tuple(names))


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, list[str]], list[int]]:
    """The columns by name, stripped, and the line number of each row."""
    if not os.path.isfile(path):
        raise UserError(f"the CSV file {path} does not exist; data.root must name the file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows, lines = [], []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(row)} values under a header of "
                        f"{len(header)} columns"
                    )
                rows.append([value.strip() for value in row])
                lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} is not a CSV file in UTF-8: {e}") from e
    cells = zip(*rows, strict=True) if rows else ((),) * len(header)
    return {name: list(c) for name, c in zip(header, cells, strict=True)}, lines


def _boxes(
    path: str | os.PathLike[str], columns: dict[str, list[str]], lines: list[int]
) -> np.ndarray | None:
    present = [name for name in _BOX if name in columns]
    if not present:
        return None
    if len(present) < len(_BOX):
        raise UserError(f"{path}: a box needs {', '.join(_BOX)}; there is only {present}")
    boxes = np.zeros((len(lines), 4), np.int32)
    for i, values in enumerate(zip(*(columns[name] for name in _BOX), strict=True)):
        if all(v.lower() in ("", "nan", "none") for v in values):
            continue
        try:
            left, upper, right, lower = boxes[i] = [int(float(v)) for v in values]
        except (ValueError, OverflowError):
            raise UserError(f"{path}, line {lines[i]}: the box {values} is not numbers") from None
        if not (0 <= left < right and 0 <= upper < lower):
            raise UserError(
                f"{path}, line {lines[i]}: the box {values} needs 0 <= x_1 < x_2, 0 <= y_1 < y_2"
            )
    return boxes
