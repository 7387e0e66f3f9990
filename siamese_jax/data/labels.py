"""Labels and ids, and when two of them are equal: decided here, and nowhere else.

A *label* says what an item shows. Labels are whole numbers or strings [n]; an item with several has
a tuple (or set) of them, or a row of a multi-hot bool matrix [n, c]. Two items match when they
share a label. A label may be *missing*, and matches nothing then, not even another missing one:

    None, NaN, NaT, pandas' NA, a masked element, "", an empty tuple, a row of zeros, and -1,
    which is how records number what they don't know. Any other negative number is a label.

A column of floats is one of whole numbers only where some are missing, for which NumPy and pandas
have no other column: [1.0, nan].

An *id* says which item it is. Ids are whole numbers, strings or bytes [n], none of them missing.

Both are compared as Python compares them: 2**53 and 2**53 + 1 are two, whatever the dtypes; "a" is
not b"a", nor is 1 "1", and to compare one kind with the other is refused.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from siamese_jax.errors import UserError

ArrayLike = Any
MISSING = -1  # the code of a missing label
UNKNOWN = -2  # the number of an id that a `Codebook` lacks; what it has is numbered from 0
_LOW, _HIGH = np.iinfo(np.int64).min, np.iinfo(np.int64).max
_SEVERAL = (tuple, list, set, frozenset)
_KINDS = {int: "whole numbers", str: "strings", bytes: "bytes"}

ONE_CLASS = "the gallery has one class: every answer is right, and nothing is told by it"


# --- labels ----------------------------------------------------------------------------------


def label_codes(
    *sides: ArrayLike, what: Sequence[str] = ("labels",)
) -> tuple[list[Any], list[np.ndarray]]:
    """The different labels in ascending order, and each side's as numbers of them.

    Args:
      sides: labels, as above.
      what: how messages call each side.

    Returns:
      The vocabulary of c labels (of multi-hot matrices: their columns 0..c-1), and for each side
      int64 [n], `MISSING` where there is none; bool [n, c] where any item has several labels.

    Raises:
      UserError: another kind or shape of labels, or sides of which no two labels could be equal.

    >>> label_codes(["cat", "", "dog"], ["dog", None])
    (['cat', 'dog'], [array([ 0, -1,  1]), array([ 1, -1])])
    >>> label_codes([("red", "round"), ("red",)])[1][0].tolist()
    [[True, True], [True, False]]
    """
    what = [*what] * (len(sides) if len(what) == 1 else 1)
    columns = [_labels(side, name) for side, name in zip(sides, what, strict=True)]
    if any(isinstance(column, np.ndarray) and column.ndim == 2 for column in columns):
        shapes = [np.shape(column) for column in columns]
        if len({shape[1:] for shape in shapes}) > 1:
            described = " and ".join(
                f"{w} have shape {s}" for w, s in zip(what, shapes, strict=True)
            )
            raise UserError(
                f"{described}: both must be [n], or both multi-hot with the same number of labels"
            )
        return list(range(shapes[0][1])), columns  # type: ignore[return-value]
    if all(isinstance(column, np.ndarray) for column in columns):
        every = np.concatenate(columns)
        vocabulary = np.unique(every[every != MISSING])
        return vocabulary.tolist(), [
            np.where(column == MISSING, MISSING, np.searchsorted(vocabulary, column))
            for column in columns
        ]
    return _named_codes([_listed(column) for column in columns], what)


def share(first: Any, second: Any) -> Any:
    """Whether items share a label, pair by pair: THE rule, for NumPy and for JAX.

    Codes int [...] or multi-hot bool [..., c] that broadcast -> bool [...].
    """
    if first.dtype == bool:
        return (first & second).any(-1)
    return (first == second) & (first != MISSING)


def share_all(first: Any, second: Any) -> Any:
    """The same of each item with each other one: [n] and [m], or multi-hot -> bool [n, m]."""
    if first.ndim == 2:  # `share`, summed: up to 2**24 ones are counted exactly in float32
        return first.astype(np.float32) @ second.astype(np.float32).T > 0
    return share(first[:, None], second[None, :])


def missing(codes: np.ndarray) -> np.ndarray:
    """Which items have no label: codes [n] or multi-hot bool [n, c] -> bool [n]."""
    return np.asarray(~codes.any(axis=1) if codes.ndim == 2 else codes == MISSING)


def _labels(labels: ArrayLike, what: str) -> np.ndarray | list[Any]:
    """int64 [n] with -1 where missing, bool [n, c], or a list of int, str, None and tuples."""
    column = _column(labels)
    kind = column.dtype.kind
    if column.ndim == 2:
        if kind != "b":
            raise UserError(
                f"{what} are a matrix of {column.dtype}: a multi-hot matrix must be bool [n, c]"
            )
        return column
    if column.ndim != 1:
        raise UserError(f"{what} have shape {column.shape}: give [n], or bool [n, c]")
    if kind in "bi" or (kind == "u" and int(column.max(initial=0)) <= _HIGH):
        return column.astype(np.int64)
    if kind == "U":
        return [value or None for value in column.tolist()]
    values = column.tolist() if kind in "fuO" else list(column)
    values = [None if is_missing(value) else value for value in values]
    whole_floats = None in values  # see above: only then may whole numbers come as floats
    return [_label(value, whole_floats, what) for value in values]


def _label(value: Any, whole_floats: bool, what: str) -> Any:
    if value is None or type(value) in (int, str):
        return None if value is None or value == MISSING else value
    if isinstance(value, _SEVERAL):
        return tuple(_label(part, False, what) for part in value if not is_missing(part))
    if isinstance(value, str):
        return str(value)
    floats = whole_floats and isinstance(value, float | np.floating)
    exact = floats and float(value).is_integer() and abs(float(value)) <= 2**53
    if isinstance(value, int | np.integer | np.bool_) or exact:
        return None if value == MISSING else int(value)
    raise UserError(
        f"{what} hold {value!r:.60} ({type(value).__name__}): labels must be whole "
        "numbers or strings"
    )


def _listed(column: np.ndarray | list[Any]) -> list[Any]:
    if isinstance(column, list):
        return column
    return [None if code == MISSING else code for code in column.tolist()]


def _named_codes(
    columns: list[list[Any]], what: Sequence[str]
) -> tuple[list[Any], list[np.ndarray]]:
    """`label_codes` of lists of int, str, None and tuples of them."""
    several = any(isinstance(label, tuple) for column in columns for label in column)
    held = [
        [
            label if isinstance(label, tuple) else () if label is None else (label,)
            for label in column
        ]
        for column in columns
    ]
    kinds = [{type(label) for labels in column for label in labels} for column in held]
    for name, found in zip(what, kinds, strict=True):
        if len(found) > 1:
            raise UserError(f"{name} mix whole numbers and strings: give one kind")
    if len(set().union(*kinds)) > 1:
        sides = [f"{n} are {_KINDS[k]}" for n, kind in zip(what, kinds, strict=True) for k in kind]
        raise UserError(f"{' and '.join(sides)}: they never match")
    vocabulary = sorted({label for column in held for labels in column for label in labels})
    number = {label: code for code, label in enumerate(vocabulary)}
    if not several:
        return vocabulary, [
            np.array([number[labels[0]] if labels else MISSING for labels in column], np.int64)
            for column in held
        ]
    hot = [np.zeros((len(column), len(vocabulary)), bool) for column in held]
    for matrix, column in zip(hot, held, strict=True):
        for row, labels in zip(matrix, column, strict=True):
            row[[number[label] for label in labels]] = True
    return vocabulary, hot


def is_missing(value: Any) -> bool:
    """Whether one label is None, NaN, NaT, pandas' NA, masked or "".

    >>> [is_missing(value) for value in (None, float("nan"), "", 0, "nan")]
    [True, True, True, False, False]
    """
    if value is None or value is np.ma.masked:
        return True
    if isinstance(value, str):
        return value == ""
    try:
        return not isinstance(value, _SEVERAL) and bool(value != value)
    except (TypeError, ValueError):
        return not isinstance(value, np.ndarray)  # pandas' NA is neither true nor false


# --- ids -------------------------------------------------------------------------------------


def as_ids(ids: ArrayLike, n: int, what: str = "ids") -> np.ndarray:
    """Ids as an array [n] of integers, str or bytes that holds each of them exactly.

    Its dtype is object only where no other can: whole numbers of more than 64 bits, or strings that
    end in a NUL.

    Raises:
      UserError: another shape, or an id that is missing, a float, a bool, or of another kind.
    """
    column = _column(ids)
    if column.shape != (n,):
        raise UserError(f"{what} must be [{n}], not of shape {column.shape}")
    if column.dtype.kind in "iuUS":
        return column
    if not n:
        return np.zeros(0, np.int64)
    values = column.tolist() if column.dtype.kind == "O" else list(column)
    types = set(map(type, values))
    for kind in types:
        if issubclass(kind, bool) or not issubclass(kind, int | np.integer | str | bytes):
            bad = next(value for value in values if type(value) is kind)
            raise UserError(
                f"{what} hold {bad!r:.60} ({kind.__name__}), which do not match anything for "
                "certain: ids must be integers or strings"
            )
    if len(kinds := {_KINDS[_kind(kind)] for kind in types}) > 1:
        raise UserError(f"{what} mix {' and '.join(sorted(kinds))}: give one kind")
    whole = any(issubclass(kind, np.integer) for kind in types)
    return _natural([int(value) for value in values] if whole else values)


class Codebook:
    """Small numbers in place of ids, equal where the ids are.

    Attributes:
      own: int32 [g], the number of each id the book was made of, from 0 to len(book) - 1.

    >>> book = Codebook(as_ids([70, 90, 70], 3))
    >>> book.own.tolist(), book.of(as_ids([90, 5], 2)).tolist()
    ([0, 1, 0], [1, -2])
    """

    def __init__(self, ids: np.ndarray, what: str = "gallery_ids"):
        self.kind, self.what = kind_of(ids), what
        whole = _int64(ids)
        # The different ids: in order where they are int64, else as they come, which needs no order.
        self._sorted = whole is not None
        if whole is not None:
            self._ids, own = np.unique(whole, return_inverse=True)
        else:
            self._ids = np.fromiter(dict.fromkeys(ids.tolist()), object)
            own = np.array([*map(self._numbers.__getitem__, ids.tolist())])
        self.own = own.reshape(-1).astype(np.int32)

    def __len__(self) -> int:
        return len(self._ids)

    @functools.cached_property
    def _numbers(self) -> dict[Any, int]:
        return {i: number for number, i in enumerate(self._ids.tolist())}

    def of(self, ids: np.ndarray, what: str = "query_ids") -> np.ndarray:
        """The numbers of other ids [q], int32; `UNKNOWN` where the book has no such id.

        Raises:
          UserError: they are of another kind, so that none could ever be equal.
        """
        kind = kind_of(ids)
        if kind != self.kind and self.kind and kind:
            raise UserError(f"{what} are {kind} and {self.what} {self.kind}: they do not match")
        whole = _int64(ids) if self._sorted and len(self) else None
        if whole is None:
            return np.array([self._numbers.get(i, UNKNOWN) for i in ids.tolist()], np.int32)
        place = np.minimum(np.searchsorted(self._ids, whole), len(self) - 1)
        return np.where(self._ids[place] == whole, place, UNKNOWN).astype(np.int32)


def kind_of(ids: np.ndarray) -> str:
    """What ids are: "whole numbers", "strings" or "bytes"; "" where there are none."""
    return _KINDS[_kind(type(ids[:1].tolist()[0]))] if len(ids) else ""


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Ids [n] and [m] as one array [n + m], exactly: int64 and uint64 do not meet in float64."""
    if not len(first) or not len(second):
        return first if len(first) else second
    if first.dtype.kind == second.dtype.kind:
        return np.concatenate([first, second])
    return _natural([*first.tolist(), *second.tolist()])


def _natural(values: list[Any]) -> np.ndarray:
    """Ids of one kind in NumPy's own dtype, or as objects where that would change them."""
    kind = _kind(type(values[0]))
    if kind is not int:
        natural = np.array(values, np.str_ if kind is str else np.bytes_)
    elif min(values) >= _LOW and max(values) <= _HIGH:
        natural = np.array(values, np.int64)
    elif min(values) >= 0 and max(values) < 2**64:
        natural = np.array(values, np.uint64)
    else:
        natural = np.zeros(0, np.int64)
    return natural if natural.tolist() == values else np.fromiter(values, object, len(values))


def _int64(ids: np.ndarray) -> np.ndarray | None:
    """Ids as int64, where that holds all of them."""
    if ids.dtype.kind == "i" or (ids.dtype.kind == "u" and int(ids.max(initial=0)) <= _HIGH):
        return ids.astype(np.int64)
    return None


def _kind(held: type) -> type:
    return int if issubclass(held, np.integer) else next(k for k in _KINDS if issubclass(held, k))


# --- both ------------------------------------------------------------------------------------


def _column(values: ArrayLike) -> np.ndarray:
    """Values as an array, each as it was given: NumPy's own would make strings of [1, "a"]."""
    if isinstance(values, np.ma.MaskedArray) and values.ndim == 1:
        column = values.data.astype(object)
        column[np.ma.getmaskarray(values)] = None
        return column
    if hasattr(values, "__array__"):
        column = np.asarray(values)
        return column.astype(object) if column.dtype.kind == "T" else column
    if isinstance(values, range) or not isinstance(values, Iterable):
        return np.asarray(values)
    if isinstance(values, str | bytes | set | frozenset | dict):
        return np.asarray(None)  # no order, or one name: no column
    values = list(values)
    if values and all(map(_is_row, values)):
        return np.asarray(values)
    return np.fromiter(values, object, len(values))


def _is_row(value: Any) -> bool:
    """Whether a value is a row of a matrix of numbers, rather than several names."""
    if not isinstance(value, list | tuple) and not getattr(value, "ndim", 0):
        return False
    return len(value) > 0 and np.asarray(value).dtype.kind in "biuf"


@dataclass(frozen=True)
class Groups:
    """The gallery's rows by key: those of key c are `order[starts[c]:starts[c + 1]]`, ascending.

    Keys are 0..count-1; a negative one is nobody's, and has no members.
    """

    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, count: int) -> "Groups":
        """The groups of keys int [n], of which `count` is one more than the largest possible."""
        there = np.flatnonzero(keys >= 0)
        sizes = np.bincount(keys[there], minlength=max(count, 1))
        order = there[np.argsort(keys[there], kind="stable")]
        return cls(order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    def sizes(self, keys: np.ndarray) -> np.ndarray:
        """How many members each key has, int64 [q]; 0 for a key below 0."""
        held = np.maximum(keys, 0)
        return np.where(keys >= 0, self.starts[held + 1] - self.starts[held], 0)

    def members(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All members of each key: (position in `keys` int64 [h], gallery row int64 [h])."""
        sizes = self.sizes(keys)
        owner = np.repeat(np.arange(len(keys)), sizes)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return owner, self.order[self.starts[keys][owner] + within]
