"""The gallery's rows a block at a time: read, checked, padded, and prepared for the product."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.engine import operands, reused_memory
from siamese_jax.search.engine.operands import Frame, Side
from siamese_jax.search.engine.parallel import THREADS, in_threads, rows_at_once
from siamese_jax.search.engine.rows import Rows

# Numbers that are checked at a time.
_CHECKED = 1 << 25


class Item(NamedTuple):
    """A block of the gallery: its first row and its prepared side."""

    start: int
    side: Side


class Blocks:
    """The gallery as prepared blocks, made on the way or kept."""

    def __init__(
        self, rows: Rows, there: np.ndarray | None, code: np.ndarray | None, frame: Frame, size: int
    ):
        self.rows, self.there, self.code, self.frame, self.size = rows, there, code, frame, size
        self.kept: list[Item] | None = None

    def __iter__(self) -> Iterator[Item]:
        if self.kept is not None:
            return iter(self.kept)
        return (self._prepare(start) for start in range(0, len(self.rows), self.size))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def keep(self) -> "Blocks":
        """Makes all blocks once and holds them, so that later passes do not make them anew."""
        if self.kept is None:
            self.kept = list(self)
        return self

    def _prepare(self, start: int) -> Item:
        side = prepare_rows(
            self.rows, start, self.size, self.there, self.code, self.frame, is_query=False
        )
        return Item(start, side)


def prepare_rows(
    rows: Rows,
    start: int,
    size: int,
    there: np.ndarray | None,
    code: np.ndarray | None,
    frame: Frame,
    *,
    is_query: bool,
) -> Side:
    """Rows start : start + size of an array, padded, checked, as one side of the product."""
    count = min(size, len(rows) - start)
    here, codes = padded(start, size, count, there, code, -2 if is_query else -1)
    wide = operands.padded_width(frame.width)
    total = operands.product_width(frame.width, frame.precision)
    values = reused_memory.aligned((size, total), operands.product_dtype(frame.precision))
    length, residual = np.empty(size, np.float32), np.empty(size, np.float32)
    fine = np.empty(size, bool)
    side = Side(values, length, residual, codes, fine)
    step = min(rows_at_once(wide), -(-size // THREADS))
    starts = iter(range(0, size, step))

    def work() -> None:
        buffer = np.zeros((step, wide), np.float32)
        for at in starts:
            part = slice(at, min(at + step, size))
            block = _padded_rows(rows, start + at, count - at, buffer[: part.stop - at])
            with np.errstate(over="ignore", invalid="ignore"):
                operands.prepare_into(
                    Side(*(v[part] for v in side)), block, here[part], frame, is_query
                )

    in_threads(work, step < size)
    rows.release()
    if not fine.all():
        raise UserError(complaint(rows, start + int(np.argmin(fine))))
    return side._replace(values=jax.device_put(values))


def _padded_rows(rows: Rows, start: int, count: int, buffer: np.ndarray) -> np.ndarray:
    """Up to `count` rows from `start` on, as wide as the buffer, zero where there are none."""
    n, wide = buffer.shape
    block = rows.view(start, n) if wide == rows.width and n <= count else None
    if block is None:
        block = buffer
        block[max(0, count) :] = 0
        rows.read(start, block[: max(0, count)])
    return block


def padded(
    start: int,
    size: int,
    count: int,
    there: np.ndarray | None,
    code: np.ndarray | None,
    spare: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the rows start : start + size, of which there are `count`, are to be found, bool
    [size], and their codes, int32 [size], with `spare` where there are none."""
    here, codes = np.zeros(size, bool), np.full(size, spare, np.int32)
    here[:count] = True if there is None else there[start : start + count]
    if code is not None:
        codes[:count] = code[start : start + count]
    return here, codes


def piece(rows: Rows, start: int, size: int) -> np.ndarray:
    """float32 [size, d] from row `start` on, without a copy where that is possible."""
    block = rows.view(start, size)
    if block is None:
        block = np.empty((size, rows.width), np.float32)
        rows.read(start, block)
    return block


def check_rows(rows: Rows, start: int, size: int) -> np.ndarray:
    """`piece`, refusing a row that is not finite, or whose squared distances could overflow."""
    block = piece(rows, start, size)
    fine = operands.fits(block)
    if not fine.all():
        raise UserError(complaint(rows, start + int(np.argmin(fine))))
    return block


def check_all(rows: Rows) -> None:
    """`check_rows` of all rows, some at a time."""
    step = max(1, _CHECKED // max(1, rows.width))
    for at in range(0, len(rows), step):
        check_rows(rows, at, min(step, len(rows) - at))
        rows.release()


def complaint(rows: Rows, row: int) -> str:
    """What to say about a row that is not finite, or too large."""
    with np.errstate(over="ignore"):
        values = rows.take(np.array([row]))[0]
    if np.isfinite(values).all():
        return (
            f"{rows.name} row {row} is longer than {operands.LONGEST:.1e}, so squared distances "
            "from it overflow float32: scale the vectors down"
        )
    return f"{rows.name} row {row} is not finite: remove it or mend what computed it"
