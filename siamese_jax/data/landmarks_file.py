"""The ground-truth files of revisited Oxford and Paris, read without running what they hold.

A pickle may name any function for Python to call. Here its names stand for a few classes of this
file, and nothing that it names is imported.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.errors import UserError


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
