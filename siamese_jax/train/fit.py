"""An encoder for someone's pictures, without a gradient: chosen by folds, then fitted to all."""

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.data.records import Records, content_keys, fingerprint
from siamese_jax.encoder import folder, lda
from siamese_jax.encoder.combined import Part, whitened
from siamese_jax.encoder.embedding import embedded_rows
from siamese_jax.encoder.whitening import Whitening
from siamese_jax.train import fitting
from siamese_jax.train.fitting import Candidate, Scored

log = logging.getLogger(__name__)
WIDTHS = (128, 256, 512, 1024)


class Source(NamedTuple):
    """Where candidates come from: a trunk at one image size, or an encoder that is there.

    Attributes:
      name: in the table.
      load: stages, one or several -> the encoder of their features.
      stages: the sets of stages to try.
    """

    name: str
    load: Callable[[tuple[str, ...]], Part]
    stages: Sequence[tuple[str, ...]]


class Grid(NamedTuple):
    """What is tried of each source.

    Attributes:
      shrinkages: see `lda.closed_form`.
      widths: None takes all axes; where none are given, several are tried on the best with all,
        as far as there are images to tell so many axes by (`lda.few`).
      folds, seed: of `fitting.score`.
    """

    shrinkages: Sequence[float] = fitting.SHRINKAGES
    widths: Sequence[int | None] = ()
    folds: int = fitting.FOLDS
    seed: int = 0


class Row(NamedTuple):
    """A row of the table: a source, and what a candidate of it got."""

    source: Source
    scored: Scored


class Fitted(NamedTuple):
    """What was fitted.

    Attributes:
      encoder: the winner, refitted on all images; as it is, where no fit was better.
      rows: all candidates, the best first; of a single candidate none is scored.
      chosen: the winner's row, which is not scored where it is the only candidate.
      bare: the best row without a fit; None where none is scored.
      fitted: the chosen row of those with one, the winner's or not; None where none is scored.
    """

    encoder: Part
    rows: list[Row]
    chosen: Row
    bare: Row | None
    fitted: Row | None


def fit(
    sources: Sequence[Source],
    records: Records,
    out: str | os.PathLike[str] | None = None,
    *,
    grid: Grid | None = None,
    **options: Any,
) -> Fitted:
    """Scores all candidates by folds over the classes, and fits the best one to all images.

    Args:
      sources: trunks and image sizes.
      records: with labels.
      out: a folder for `load_encoder`; None saves nothing.
      grid: of shrinkages and widths.
      **options: of `siamese_jax.encoder.embedding.embed_records`.

    Raises:
      UserError: too few classes to choose by, or to fit to.
    """
    grid = grid or Grid()
    options["keys"] = options.get("keys") or content_keys(records)
    tried = [_candidates(source, grid) for source in sources]
    if sum(map(len, tried)) == 1 and grid.widths:
        alone = Row(sources[0], Scored(tried[0][0], np.zeros(0)))
        return Fitted(_refit(alone, records, out, options), [], alone, None, None)
    folds = len(fitting.held_folds(records.label, grid.folds, grid.seed))  # before the work
    if folds < grid.folds:
        log.warning("%d folds, not %d: each needs two classes of two images", folds, grid.folds)
    rows = []
    for source, candidates in zip(sources, tried, strict=True):
        plain = [Candidate(stages, None) for stages in source.stages]
        rows += _scored(source, [*plain, *candidates], records, grid, options)
    top = _top(rows)
    if not grid.widths:
        full = sum(_parts(top.source, top.scored.candidate.stages).values())
        narrower = [w for w in WIDTHS if w < full and not lda.few(len(records), w, full)]
        more = [top.scored.candidate._replace(width=width) for width in narrower]
        found = _scored(top.source, more, records, grid, options) if more else []
        rows += found
        least = min(top.scored.mean, _bare(rows).scored.mean + 1e-9)
        enough = [row for row in (*found, top) if row.scored.mean >= least]
        narrow = fitting.untold([row.scored for row in enough])[0]  # the narrowest
        top = next(row for row in enough if row.scored is narrow)
    rows.sort(key=lambda row: -row.scored.mean)
    bare = _bare(rows)
    if bare.scored.mean < top.scored.mean:
        return Fitted(_refit(top, records, out, options), rows, top, bare, top)
    encoder = bare.source.load(bare.scored.candidate.stages)
    if out is not None:
        folder.save(out, encoder, None)
    return Fitted(encoder, rows, bare, bare, top)


def _bare(rows: Sequence[Row]) -> Row:
    """The best row without a fit."""
    return max(
        (row for row in rows if row.scored.candidate.shrinkage is None),
        key=lambda row: row.scored.mean,
    )


def _candidates(source: Source, grid: Grid) -> list[Candidate]:
    made = itertools.product(source.stages, grid.shrinkages, grid.widths or (None,))
    return [Candidate(*each) for each in made]


def _top(rows: Sequence[Row]) -> Row:
    """The best source of what is fitted, with stages and a shrinkage as training chooses them.

    Several stages are taken where folds tell them from the first ones, and of the shrinkages that
    they do not tell from the best the moderate one.
    """
    fitted = [row for row in rows if row.scored.candidate.shrinkage is not None]
    of: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in fitted:
        of.setdefault((row.source.name, row.scored.candidate.stages), []).append(row)
    moderate = {kind: _of(alike, fitting.moderate) for kind, alike in of.items()}
    names = dict.fromkeys(name for name, _ in moderate)
    best = [
        _of([row for kind, row in moderate.items() if kind[0] == name], fitting.best_if_told)
        for name in names
    ]
    return _of(best, fitting.best)


def _of(rows: Sequence[Row], choose: Callable[[Sequence[Scored]], Scored]) -> Row:
    """The row that a choice among their scores takes."""
    chosen = choose([row.scored for row in rows])
    return next(row for row in rows if row.scored is chosen)


def _union(source: Source) -> tuple[str, ...]:
    return tuple(dict.fromkeys(itertools.chain.from_iterable(source.stages)))


def _parts(source: Source, stages: tuple[str, ...]) -> dict[str, int]:
    """The width of each part; of an encoder that is there, its own under the name ""."""
    encoder = source.load(stages)
    if stages == ("",):
        return {"": encoder.embedding_dim}
    return encoder.model.columns  # type: ignore[union-attr]


def _scored(
    source: Source,
    candidates: Sequence[Candidate],
    records: Records,
    grid: Grid,
    options: Mapping[str, Any],
) -> list[Row]:
    stages = _union(source)
    rows, kept = embedded_rows(source.load(stages), records, **options)
    scored = fitting.score(
        rows,
        kept,
        _parts(source, stages),
        candidates,
        folds=grid.folds,
        seed=grid.seed,
    )
    return [Row(source, one) for one in scored]


def _refit(
    chosen: Row,
    records: Records,
    out: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> Part:
    _, shrinkage, width = chosen.scored.candidate
    encoder = chosen.source.load(chosen.scored.candidate.stages)
    rows, kept = embedded_rows(encoder, records, **options)
    assert shrinkage is not None
    width = width or encoder.embedding_dim
    if lda.few(len(kept), width, encoder.embedding_dim):
        log.warning(
            "%d axes are kept of %d, and %d images are too few to tell which: others will lose "
            "what these do not show; take all axes, or at most %d",
            width, encoder.embedding_dim, len(kept), len(kept) // lda.IMAGES_AN_AXIS,
        )  # fmt: skip
    mean, projection = lda.fitted(rows, kept.label, shrinkage=shrinkage, width=width)
    about = {
        "method": "learned",
        "dim": width,
        "shrinkage": shrinkage,
        "images": len(kept),
        "data": fingerprint(records, options["keys"]),
        "encoder": encoder.fingerprint,
    }
    there = np.isin(records.id, kept.id)
    keys = frozenset(key for key, good in zip(options["keys"], there, strict=True) if good)
    whitening = Whitening(mean, projection, about, keys)
    if out is not None:
        folder.save(out, encoder, whitening)
    return whitened(encoder, whitening)
