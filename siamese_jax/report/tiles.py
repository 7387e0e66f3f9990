"""Queries and their nearest neighbours as pictures: choose the queries, shrink, frame, lay out."""

import base64
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from siamese_jax.data.preprocess import whole_image
from siamese_jax.errors import UserError
from siamese_jax.report.page import escape

SELECTION = (
    "Drawn at random with a fixed seed, not picked: among them the share of queries whose nearest "
    "neighbour is wrong is that of the whole set."
)


@dataclass(frozen=True)
class Tile:
    """One image of an example. `correct` is None where nothing is known, as for a query itself."""

    path: str
    label: str
    distance: float | None = None
    correct: bool | None = None


@dataclass(frozen=True)
class Example:
    """A query and its neighbours, nearest first."""

    query: Tile
    neighbours: list[Tile]


def choose_examples(
    ranking_indices: np.ndarray, correct: np.ndarray, n: int = 24, seed: int = 0
) -> np.ndarray:
    """Rows of `n` queries to show: a stratified random sample, so that the page flatters nobody.

    Of the n, round(n * share) are queries whose first neighbour is wrong, share being their share
    among all queries; inside both groups the draw is uniform.

    Args:
      ranking_indices: int [q, k], -1 where a query has no such neighbour. Queries without any
        neighbour have nothing to show and are left out.
      correct: bool [q, k], whether that neighbour is relevant.
      n: how many; all of them, where there are fewer.
      seed: of the draw; the same seed gives the same rows.

    Returns:
      int64 [min(n, q')], ascending.
    """
    usable = np.flatnonzero(np.asarray(ranking_indices)[:, 0] >= 0)
    n = min(n, len(usable))
    first = np.asarray(correct)[usable, 0].astype(bool)
    wrong, right = usable[~first], usable[first]
    n_wrong = round(n * len(wrong) / max(len(usable), 1))
    rng = np.random.default_rng(seed)
    drawn = [
        rng.choice(wrong, n_wrong, replace=False),
        rng.choice(right, n - n_wrong, replace=False),
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


@functools.lru_cache(maxsize=4096)
def thumbnail(path: str) -> str | None:
    """The image, upright and on white, at most 96 pixels a side, as a JPEG data URI.

    None where the file is missing or no image: a report never fails for a picture.
    """
    try:
        picture = whole_image(path)
    except UserError:
        return None
    picture.thumbnail((96, 96))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _tile(tile: Tile, rank: int | None) -> str:
    image = thumbnail(tile.path)
    picture = (
        f'<img src="{image}" alt="{escape(tile.label)}" loading="lazy">'
        if image
        else '<span class="absent">no image</span>'
    )
    sign = {True: " ✓", False: " ✗", None: ""}[tile.correct]
    mark = "" if rank is None else f'<span class="mark">{rank}{sign}</span>'
    distance = "" if tile.distance is None else f'<span class="distance">{tile.distance:.4f}</span>'
    tag = "div" if rank is None else "button"
    return (
        f'<{tag} class="tile" title="{escape(tile.path)}">'
        f'<span class="frame">{picture}{mark}</span>'
        f'<span class="label">{escape(tile.label)}</span>{distance}</{tag}>'
    )


def _row(example: Example) -> str:
    frames = {True: "right", False: "wrong", None: ""}
    tiles = "".join(
        f'<li class="{frames[tile.correct]}">{_tile(tile, rank)}</li>'
        for rank, tile in enumerate(example.neighbours, start=1)
    )
    known = [tile.correct for tile in example.neighbours]
    state = "".join(
        name
        for name, holds in (
            (" first-wrong", bool(known) and known[0] is False),
            (" none-right", bool(known) and all(c is False for c in known)),
        )
        if holds
    )
    return (
        f'<article class="card query-row{state}"><div class="asked">{_tile(example.query, None)}'
        f'</div><ol class="tiles">{tiles}</ol></article>'
    )


def explorer(examples: Sequence[Example], note: str = SELECTION) -> str:
    """Every example as a row, with a filter for the failures; neighbours open enlarged."""
    rows = [_row(example) for example in examples]
    wrong = sum("first-wrong" in row.split(">", 1)[0] for row in rows)
    none = sum("none-right" in row.split(">", 1)[0] for row in rows)
    choices = (
        ("show-all", f"all {len(rows)}", True),
        ("show-first", f"nearest one wrong: {wrong}", False),
        ("show-none", f"none right: {none}", False),
    )
    known = any(tile.correct is not None for e in examples for tile in e.neighbours)
    filters = "".join(
        f'<label><input type="radio" name="show" id="{name}"{" checked" if checked else ""}>'
        f"{text}</label>"
        for name, text, checked in choices
    )
    legend = "Green ✓: right. Red ✗: wrong. " if known else ""
    return (
        f'<p class="soft">{legend}Each neighbour with its rank, label and distance (smaller is '
        f"closer); select one to see it beside its query. {escape(note)}</p>"
        f'<div class="explorer">{f"<div class=filters>{filters}</div>" if known else ""}'
        f"{''.join(rows)}</div>"
        '<dialog><div class="pair"></div><p class="where mono soft"></p></dialog>'
    )
