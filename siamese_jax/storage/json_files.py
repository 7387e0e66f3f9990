"""JSON as all our files hold it: strict (RFC 8259), with null for NaN and infinity.

Where numbers are expected, a reader takes null as NaN: see `numbers`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siamese_jax.errors import UserError
from siamese_jax.storage.writing import written


def strict(value: Any) -> Any:
    """The same value of what JSON has: NumPy's scalars as numbers, what is not finite as None.

    >>> strict({"a": (1, math.nan), 2: "x"})
    {'a': [1, None], '2': 'x'}
    """
    if isinstance(value, Mapping):
        return {str(name): strict(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [strict(held) for held in value]
    if getattr(value, "shape", None) == ():  # a scalar of NumPy or JAX
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as text: one line, if not indented."""
    return json.dumps(strict(value), indent=indent, allow_nan=False)


def write_json(path: Path | str, value: Any) -> None:
    """Writes to a temporary file and renames it: a reader never sees half a file."""
    with written(path) as file:
        file.write(json_text(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file; UserError where it cannot be read, or is no object of JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no names")
        return found
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it or choose another folder"
        ) from None


def numbers(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block of metrics as it was before it was written: null is NaN.

    >>> numbers({"low": {"recall@1": None, "map@r": 0.5}})
    {'low': {'recall@1': nan, 'map@r': 0.5}}
    """

    def restored(value: Any) -> Any:
        if isinstance(value, Mapping):
            return numbers(value)
        return math.nan if value is None else value

    return {name: restored(value) for name, value in block.items()}
