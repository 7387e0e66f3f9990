"""A search on accelerators, or with the gallery split over devices: `sharded`, slab by slab."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.engine import blocks, cpu, device_program, operands, order
from siamese_jax.search.engine.request import Search


def nearest_on_devices(
    search: Search, devices: Sequence[jax.Device], wanted: np.ndarray, k: int, precision: str
) -> Iterator[tuple]:
    """As `cpu.nearest`, the gallery split over devices, a slab of rows at a time."""
    q, k = len(search.queries), min(k, len(search.gallery.rows))
    if not q or not k:
        return
    blocks.check_all(search.rows)
    size, parts = _searched(search, devices, k, precision)
    found: list[list[tuple]] = [[] for _ in range(0, q, size)]
    sure = np.ones(q, bool)
    for at, start, answer in parts:
        here = slice(at, min(at + size, q))
        low, ceiling = (answer[v][:, : here.stop - at] for v in ("low", "ceiling"))
        sure[here] &= device_program.certain(low, ceiling, k)
        row, away = (answer[v][:, : here.stop - at] for v in ("row", "distance"))
        there = row >= 0
        _, i, _ = np.nonzero(there)
        found[at // size].append((i.astype(np.int32), start + row[there], away[there]))
    for at, some in zip(range(0, q, size), found, strict=True):
        i, j, away = (np.concatenate(v) for v in zip(*some, strict=True))
        i, place, j, away = order.first(i, j, away, wanted[at : at + size])
        good = sure[at + i]
        yield i[good] + at, place[good], j[good], away[good]
    again = np.flatnonzero(~sure)
    if len(again):
        rest = search.only(again)
        for i, place, j, away in cpu.nearest(rest, wanted[again], k, "float32", False):
            yield again[i], place, j, away


def _searched(
    search: Search, devices: Sequence[jax.Device], k: int, precision: str
) -> tuple[int, Iterator[tuple[int, int, dict[str, np.ndarray]]]]:
    """How many queries are asked at a time, and (first query, first row, what the program found)
    of each slab and some queries after others."""
    q, (g, d) = len(search.queries), (len(search.gallery.rows), search.rows.width)
    frame, mesh = search.frame(precision), device_program.mesh_of(devices)
    size = device_program.sizes(
        q, g, operands.padded_width(d), k, len(devices), search.memory_limit
    )
    each = size.slab // len(devices)
    program = functools.partial(
        device_program.search,
        mesh=mesh,
        k=min(k, each),
        block=size.block,
        distance=search.distance,
        precision=precision,
        exclude=search.codes is not None,
    )

    def parts() -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        for start in range(0, g, size.slab):
            slab = search.gallery.slab(mesh, start, size.slab, search.there)
            for at in range(0, q, size.chunk):
                with jax.enable_x64(True):
                    asked = _asked(search, at, size.chunk)
                    answer = program(asked, slab, frame.origin, np.float32(d))
                    answer = {name: np.asarray(value) for name, value in answer.items()}
                _complain(search, answer["bad"], start, each)
                yield at, start, answer

    return size.chunk, parts()


def _asked(search: Search, at: int, size: int) -> device_program.Asked:
    """Queries from `at` on, filled up to a size."""
    own = None if search.codes is None else search.codes[0]
    rows = np.zeros((size, operands.padded_width(search.rows.width)), np.float32)
    count = search.rows.read(at, rows)
    _, code = blocks.padded(at, size, count, None, own, -2)
    return device_program.Asked(rows, code)


def _complain(search: Search, bad: np.ndarray, start: int, size: int) -> None:
    for n in np.flatnonzero(bad < size)[:1]:
        row = start + int(n) * size + int(bad[n])
        raise UserError(blocks.complaint(search.gallery.rows, row))
