"""A search on accelerators, or with the gallery split over devices: `sharded`, slab by slab."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.engine import blocks, cpu, device_program, operands, order
from siamese_jax.search.engine.request import Search


def nearest_on_devices(
    search: Search, devices: Sequence[jax.Device], wanted: np.ndarray, k: int, precision: str
) -> Iterator[tuple]:
    """As `ways.nearest`, the gallery split over devices, a slab of rows at a time."""
    q, (g, d) = len(search.queries), (len(search.gallery.rows), search.rows.width)
    k = min(k, g)
    if not q or not k:
        return
    frame, mesh = search.frame(precision), device_program.mesh_of(devices)
    size = device_program.sizes(
        q, g, operands.padded_width(d), k, len(devices), search.memory_limit
    )
    found: list[list[tuple]] = [[] for _ in range(0, q, size.chunk)]
    sure = np.ones(q, bool)
    zeros = [np.empty(0, np.int64)]
    for start in range(0, g, size.slab):
        slab = search.gallery.slab(mesh, start, size.slab, search.there)
        for c, (at, count, rows, code) in enumerate(_plain_chunks(search, size.chunk)):
            with jax.enable_x64(True):
                answer = device_program.search(
                    rows,
                    code,
                    *slab,
                    frame.origin,
                    np.float32(d),
                    mesh=mesh,
                    k=min(k, size.slab // len(devices)),
                    block=size.block,
                    distance=search.distance,
                    precision=precision,
                    exclude=search.codes is not None,
                )
                answer = {name: np.asarray(value) for name, value in answer.items()}
            _complain(search, answer["bad"], start, size.slab // len(devices))
            if c == 0:
                zero = start + np.flatnonzero(answer["zero"])
                zero = zero[zero < g]
                zeros.append(zero if search.there is None else zero[search.there[zero]])
            sure[at : at + count] &= device_program.certain(answer["low"], answer["ceiling"], k)[
                :count
            ]
            row, away = (answer[v][:, :count] for v in ("row", "distance"))
            there = row >= 0
            _, i, _ = np.nonzero(there)
            found[c].append((i.astype(np.int32), start + row[there], away[there]))
    for c, (at, count, side) in enumerate(search.sides(frame, size.chunk)):
        i, j, away = (np.concatenate(v) for v in zip(*found[c], strict=True))
        # A zero query's distances are all 1 under cosine, whatever the scores said.
        lost = np.asarray(side.zero)
        i, j, away = (v[~lost[i]] for v in (i, j, away))
        more = search.with_zeros(at, lost[:count], zeros, k)
        i, j = np.concatenate([i, more[0]]), np.concatenate([j, more[1]])
        away = np.concatenate([away, np.ones(len(more[0]), np.float32)])
        sure[at : at + count] |= lost[:count]
        i, place, j, away = order.first(i, j, away, wanted[at : at + count])
        good = sure[at + i]
        yield i[good] + at, place[good], j[good], away[good]
    again = np.flatnonzero(~sure)
    if len(again):
        rest = search.only(again)
        for i, place, j, away in cpu.nearest(rest, wanted[again], k, "float32", False):
            yield again[i], place, j, away


def _plain_chunks(search: Search, size: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """(first query, how many, float32 [size, padded d], codes int32 [size])."""
    q, d = search.queries.shape
    for at in range(0, q, size):
        count = min(size, q - at)
        rows = np.zeros((size, operands.padded_width(d)), np.float32)
        rows[:count, :d] = search.queries[at : at + count]
        code = np.full(size, -2, np.int32)
        if search.codes is not None:
            code[:count] = search.codes[0][at : at + count]
        yield at, count, rows, code


def _complain(search: Search, bad: np.ndarray, start: int, size: int) -> None:
    for n in np.flatnonzero(bad < size)[:1]:
        row = start + int(n) * size + int(bad[n])
        raise UserError(blocks.complaint(search.gallery.rows, row))
