"""What a value may be: a type with its range, said in words, read from text and checked.

The tables of config fields, of losses' options and of the tools' options are made of these, so that
a message, the help and `docs/config.md` say the same.
"""

import ast
import contextlib
import math
import numbers
import re
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from siamese_jax.errors import UserError


class Kind(NamedTuple):
    """A type and its range.

    Attributes:
      says: in words, to stand after "must be".
      holds: whether a value is of it.
      read: from text, as a command line gives it; ValueError where that is not of the type.
    """

    says: str
    holds: Callable[[Any], bool]
    read: Callable[[str], Any]


class Option(NamedTuple):
    """One row of a table: what an option may be, and what it means."""

    kind: Kind
    meaning: str


def check(name: str, value: Any, kind: Kind) -> None:
    """UserError that names the option, its value and what is allowed.

    >>> check("train.steps", -1, whole(1))
    Traceback (most recent call last):
    siamese_jax.errors.UserError: train.steps=-1: must be a whole number from 1 on
    """
    if not kind.holds(value):
        raise UserError(f"{name}={shown(value)}: must be {kind.says}")


def shown(value: Any) -> str:
    """A value in a message: on one line, and cut where it is long."""
    try:
        said = " ".join(repr(value).split())
    except Exception:  # such as a whole number of more digits than Python prints
        said = f"<{type(value).__name__}>"
    return said if len(said) <= 80 else said[:77] + "..."


def literal(given: str) -> Any:
    """What a Python literal stands for; ValueError where it is none, or nested without end."""
    try:
        return ast.literal_eval(given.strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no literal: {error}") from error


def parse(name: str, text: str, kind: Kind) -> Any:
    """A value from a command line's text, checked."""
    try:
        value = kind.read(text)
    except (ValueError, OverflowError):
        value = text
    check(name, value, kind)
    return value


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """What was meant, most likely, as the end of a message; nothing where no name is near.

    >>> nearest("step", ["steps", "log_every"])
    '; did you mean steps?'
    """
    found = get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {found[0]}?" if found else ""


def whole(low: int, high: int | None = None) -> Kind:
    """Whole numbers from `low` to `high`, both included."""
    top = math.inf if high is None else high

    def holds(value: Any) -> bool:
        return _is(value, numbers.Integral) and low <= value <= top

    return Kind(f"a whole number {_range(low, high)}", holds, int)


def number(
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Kind:
    """Finite numbers; `low` and `high` are included, `above` and `below` are not."""
    ends = [
        f"{word} {end:g}"
        for word, end in (("from", low), ("above", above), ("to", high), ("below", below))
        if end is not None
    ]
    says = " ".join(["a finite number", *ends])

    def holds(value: Any) -> bool:
        if not _is(value, numbers.Real) or not abs(value) <= sys.float_info.max:
            return False
        return (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        )

    return Kind(says, holds, float)


def choice(*names: str) -> Kind:
    """One of some names, of which the first few stand for very many."""
    more = f" and {len(names) - 8} more" if len(names) > 40 else ""
    shown = ", ".join(names[:8] if more else names) + more
    return Kind(f"one of {shown}", lambda value: _is(value, str) and value in names, str)


def listed(*names: str) -> Kind:
    """Text: one of some names, or several with commas between.

    >>> listed("average", "max").holds("average, max")
    True
    """

    def holds(value: Any) -> bool:
        return isinstance(value, str) and all(part.strip() in names for part in value.split(","))

    return Kind(f"one of {', '.join(names)}, or several with commas between", holds, str)


def text(what: str = "text") -> Kind:
    """Text that is not empty."""
    return Kind(what, lambda value: isinstance(value, str) and value != "", str)


def flag() -> Kind:
    """True or False; text may say it in small letters."""
    return Kind("True or False", lambda value: isinstance(value, bool), _flag)


def size() -> Kind:
    """Bytes, as a number or as text.

    >>> size().holds("1.5 TB"), size().holds("20 pounds"), size().holds(2**30)
    (True, False, True)
    """
    return Kind("a number of bytes, such as 500MB or 20GB", lambda v: _bytes(v) is not None, str)


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?([kMGT]?B?)")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def in_bytes(value: Any) -> int:
    """The bytes of a value of `size`.

    >>> in_bytes("20GB"), in_bytes(1e6)
    (20000000000, 1000000)
    """
    count = _bytes(value)
    assert count is not None
    return count


def _bytes(value: Any) -> int | None:
    if isinstance(value, str) and (found := _SIZE.fullmatch(value)):
        return round(float(found[1]) * _UNITS[found[2].removesuffix("B")])
    return round(value) if number(0).holds(value) else None


def said_bytes(count: int) -> str:
    """Bytes in words that `size` reads; never less.

    >>> said_bytes(20_101_000_000), said_bytes(1_500), said_bytes(0)
    ('20.11GB', '1.5kB', '0B')
    """
    for unit in "TGMk":
        if count >= _UNITS[unit]:
            return f"{math.ceil(100 * count / _UNITS[unit]) / 100:g}{unit}B"
    return f"{count}B"


def fold() -> Kind:
    """Text: one of some folds, counted from 1.

    >>> fold().holds("4/4"), fold().holds("5/4"), fold().holds("1/1")
    (True, False, False)
    """

    def holds(value: Any) -> bool:
        if not isinstance(value, str) or not re.fullmatch(r"[1-9]\d{0,3}/[1-9]\d{0,3}", value):
            return False
        number, count = map(int, value.split("/"))
        return count > 1 and number <= count

    return Kind("NUMBER/COUNT, such as 1/4, of 2 to 9,999 folds", holds, str)


def optional(kind: Kind) -> Kind:
    """None, or a value of the kind."""

    def read(given: str) -> Any:
        return None if given == "None" else kind.read(given)

    return Kind(f"{kind.says}, or None", lambda value: value is None or kind.holds(value), read)


def either(one: Kind, other: Kind) -> Kind:
    """A value of one kind or of the other."""

    def read(given: str) -> Any:
        try:
            if one.holds(value := one.read(given)):
                return value
        except ValueError:
            pass
        return other.read(given)

    says = f"{one.says}, or {other.says}"
    return Kind(says, lambda value: one.holds(value) or other.holds(value), read)


def several(kind: Kind, least: int = 0, most: int | None = None) -> Kind:
    """A tuple of values of one kind. Text is "1,5" or "(1, 5)".

    >>> several(whole(1)).read("1,5"), several(text()).read("('a,b',)")
    ((1, 5), ('a,b',))
    """
    top = math.inf if most is None else most
    count = f"{least}" if least == most else f"{least} or more"

    def holds(value: Any) -> bool:
        listed = isinstance(value, tuple | list)
        return listed and least <= len(value) <= top and all(map(kind.holds, value))

    def read(given: str) -> tuple[Any, ...]:
        if given.strip()[:1] in ("(", "["):
            with contextlib.suppress(ValueError):  # text that begins so, such as a pattern
                found = literal(given)
                return tuple(found) if isinstance(found, tuple | list) else (found,)
        return tuple(kind.read(part.strip()) for part in given.split(",") if part.strip())

    return Kind(f"{count} values, each {kind.says}", holds, read)


def rising(kind: Kind) -> Kind:
    """Values of which none is below the one before."""

    def holds(value: Any) -> bool:
        return kind.holds(value) and list(value) == sorted(value)

    return Kind(f"{kind.says}, none below the one before", holds, kind.read)


def _flag(given: str) -> bool:
    words = {"true": True, "false": False}
    if given.lower() not in words:
        raise ValueError
    return words[given.lower()]


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _range(low: int, high: int | None) -> str:
    return f"from {low} on" if high is None else f"from {low} to {high:,}"


# What several places share. The largest sizes are what memory allows on the machines of today: more
# is a mistake of the keyboard.
COUNT = whole(1, 2**31 - 1)
BATCH = whole(1, 65_536)
PIXELS = whole(1, 4096)
SHARE = number(above=0, below=1)
SHRINKAGE = number(0, 1e6)
FUSE_WEIGHT = number(0, 1e6)
SCALE = number(above=0, high=16)
EXPONENT = number(0, 1e3)
