"""The Oxford and Paris landmark protocol: graded answers, and junk that counts for nothing.

Each query has gallery items that show its landmark clearly ("easy"), barely ("hard"), or too little
to say ("junk"). Three settings read them differently (Radenovic et al. 2018, section 3.3):

    setting   positive       ignored
    easy      easy           hard, junk
    medium    easy, hard     junk
    hard      hard           easy, junk

Ignored items are taken out of the ranking. With positives at p_1 < ... < p_R (1 is the nearest) in
what remains, average precision is the area by trapezoids that the data sets' own tool computes,

    AP = 1/R sum_j ( (j - 1) / (p_j - 1)  +  j / p_j ) / 2,      the first term 1 where p_j = 1,

which is not the AP of `siamese_jax.metrics` (1/R sum_j j / p_j). Precision at k is taken at
k' = min(k, p_R): a query with few positives, all found early, is not held to k. Queries without
positives in a setting are left out of its means and counted.
"""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.errors import UserError
from siamese_jax.metrics import PerQuery
from siamese_jax.ranking import Ranking

SETTINGS = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}


def landmarks(
    ranking: Ranking | ArrayLike,
    grades: Sequence[Mapping[str, Sequence[int]]],
    *,
    setting: str = "medium",
    ks: Sequence[int] = (1, 5, 10),
) -> PerQuery:
    """Average precision and precision at k of each query, under one setting.

    Args:
      ranking: a `Ranking` of the whole gallery, or its indices int [q, g], -1 where it has ended.
        A positive that it doesn't list counts as never found.
      grades: for each query, the gallery rows graded "easy", "hard" and "junk".
      setting: "easy", "medium" or "hard".
      ks: where to take the precision.

    Returns:
      `PerQuery` with "map" and "precision@k"; `relevant` counts the positives.

    Raises:
      UserError: an unknown setting, or a number of gradings other than that of queries.

    >>> landmarks([[3, 0, 1, 2]], [{"easy": [0], "hard": [2], "junk": [3]}]).means()["map"]
    0.7916666666666666
    """
    indices = np.asarray(ranking.indices if isinstance(ranking, Ranking) else ranking)
    if setting not in SETTINGS:
        raise UserError(f"setting={setting!r} is unknown: use one of {', '.join(SETTINGS)}")
    if indices.ndim != 2 or len(indices) != len(grades):
        raise UserError(f"a ranking {indices.shape} needs as many rows as the {len(grades)} grades")
    positive, ignored = SETTINGS[setting]
    names = ["map", *(f"precision@{k}" for k in ks)]
    values = {name: np.full(len(indices), np.nan) for name in names}
    relevant = np.zeros(len(indices), np.int64)
    for i, (row, grade) in enumerate(zip(indices, grades, strict=True)):
        wanted = _rows(grade, positive)
        relevant[i] = len(wanted)
        if not len(wanted):
            continue
        kept = row[(row >= 0) & ~np.isin(row, _rows(grade, ignored))]
        position = np.flatnonzero(np.isin(kept, wanted)) + 1
        found = np.arange(1, len(position) + 1)
        left = np.where(position > 1, (found - 1) / np.maximum(position - 1, 1), 1)
        values["map"][i] = (left + found / position).sum() / 2 / len(wanted)
        for k in ks:
            depth = min(k, position[-1]) if len(position) == len(wanted) else k
            values[f"precision@{k}"][i] = (position <= depth).sum() / depth
    return PerQuery(values, relevant)


def _rows(grade: Mapping[str, Sequence[int]], names: Sequence[str]) -> np.ndarray:
    parts = [np.asarray(grade.get(name, ()), np.int64).reshape(-1) for name in names]
    return np.unique(np.concatenate(parts))


class GroundTruth(NamedTuple):
    """What a data set's file says.

    Attributes:
      gallery, queries: names of images, without suffix.
      boxes: int32 [q, 4] as left, upper, right, lower: the part of each query that counts.
      grades: for each query, gallery rows by grade.
    """

    gallery: list[str]
    queries: list[str]
    boxes: np.ndarray
    grades: list[dict[str, list[int]]]


def read_ground_truth(path: str | Path) -> GroundTruth:
    """Reads a ground-truth file as revisited Oxford and Paris have it, a pickle, or as JSON.

    Either holds {"imlist": names, "qimlist": names, "gnd": [{"bbx": [left, upper, right, lower],
    "easy": rows, "hard": rows, "junk": rows}, ...]}; "bbx" may be left out. Nothing but plain
    values and arrays of numbers is taken from a pickle: it cannot run code.

    Raises:
      UserError: no such file, another content, or rows outside the list of images.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_json = path.suffix.lower() == ".json"
            content = json.load(file) if is_json else _Plain(file, encoding="latin1").load()
        gallery, queries = ([str(name) for name in content[key]] for key in ("imlist", "qimlist"))
        grades = [
            {name: [int(row) for row in entry[name]] for name in ("easy", "hard", "junk")}
            for entry in content["gnd"]
        ]
        corners = [list(entry.get("bbx", ())) or [0, 0, 0, 0] for entry in content["gnd"]]
        boxes = np.round(np.array(corners, np.float64).reshape(len(grades), 4)).astype(np.int32)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except Exception as error:  # A damaged pickle fails in whatever way its damage makes it.
        raise UserError(
            f"{path} is no ground truth of landmarks (imlist, qimlist, and gnd with easy, hard and "
            f"junk): {type(error).__name__} {error}"
        ) from None
    if len(queries) != len(grades):
        raise UserError(f"{path} has {len(queries)} queries but grades of {len(grades)}")
    rows = [row for grade in grades for listed in grade.values() for row in listed]
    if rows and not (min(rows) >= 0 and max(rows) < len(gallery)):
        raise UserError(f"{path} grades rows outside its list of {len(gallery)} images")
    return GroundTruth(gallery, queries, np.maximum(boxes, 0), grades)


class _Plain(pickle.Unpickler):
    """Unpickles lists, mappings, numbers, text, and NumPy's arrays of numbers; nothing else.

    Names in the file stand for the few classes below: nothing that it names is imported.
    """

    def find_class(self, module: str, name: str) -> Any:
        place = module.replace("numpy._core", "numpy.core"), name
        if place not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _NAMES[place]


class _Type:
    """What a pickle says of a dtype: its code, and in its state the order of bytes."""

    def __init__(self, code: str, *_: Any) -> None:
        self.numpy = np.dtype(str(code))
        if self.numpy.kind not in "biuf":
            raise pickle.UnpicklingError(f"it holds values of {self.numpy}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1]) if state[1] in "<>" else self.numpy

    def read(self, data: Any) -> np.ndarray:
        return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, self.numpy)


class _Array:
    """What a pickle says of an array: in its state, or at once from protocol 5 on."""

    def __init__(self, *_: Any) -> None:
        self.values = np.zeros(0)

    @classmethod
    def of(cls, data: Any, kind: _Type, shape: tuple[int, ...], order: str) -> "_Array":
        made = cls()
        made.values = kind.read(data).reshape(shape, order="F" if order == "F" else "C")
        return made

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, columns_first, data = state
        self.values = kind.read(data).reshape(shape, order="F" if columns_first else "C")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Array.of,
    ("numpy.core.multiarray", "scalar"): lambda kind, data: kind.read(data)[0],
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("__builtin__", "bytes"): lambda: b"",  # an empty array's, in protocol 2
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
}
